"""The exponentials of a row of logits, with each class in turn as the true class.

`1 - p_c` is needed for every class c. Only a class with `p_c > 1/2` cancels there. At most one
class has that, and it has the largest logit: its `1 - p` is the sum of the other exponentials
divided by the sum of all. If several classes tie for the largest logit, none of them exceeds 1/2.
So the sums over a row are kept in two parts, over the classes with the largest logit and over the
rest, and no index of the largest class is needed.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from focal_jax.engine import arguments, scalar
from focal_jax.engine.class_sums import (
    AxisName,
    cast_logits,
    max_logit,
    reduce_classes,
    sum_classes,
)
from focal_jax.engine.platform import by_platform
from focal_jax.engine.scalar import Terms
from focal_jax.engine.sharding import cast_to_common_varying


class Split(NamedTuple):
    """A sum over the classes in two parts, with a class axis of size 1."""

    at_max: Array  # over the classes with the largest logit
    rest: Array  # over the other classes


class Row(NamedTuple):
    """The exponentials of one position, with a class axis of size 1.

    `max_logit` has no derivative: the losses do not depend on the number that is subtracted.
    """

    max_logit: Array
    exps: Split  # of exp(logit - max_logit), so that `at_max` is the number of ties

    @property
    def total(self) -> Array:
        """The sum of all exponentials."""
        return self.exps.at_max + self.exps.rest


# ---------------------------------------------------------------- sums of exponentials


def _row_in_passes(axis: int, logits: Array, where: Array | None) -> Row:
    z = cast_logits(logits, where)
    top = max_logit(z, axis)
    # Without a select in the sum, which XLA:CPU would not vectorize: at a tie exp(0) - 1 is 0.
    ties = (z - top == 0).astype(z.dtype)
    rest = sum_classes(axis, jnp.exp(z - top) - ties)
    return Row(top, Split(sum_classes(axis, ties), rest))


def _row_in_one_pass(axis: int, logits: Array, where: Array | None) -> Row:
    z = cast_logits(logits, where)
    least, zero = jnp.finfo(z.dtype).min, jnp.zeros((), z.dtype)

    def combine(a, b):
        top = jnp.maximum(a.max_logit, b.max_logit)
        parts = [rescale(side.exps, side.max_logit - top) for side in (a, b)]
        return Row(top, jax.tree.map(jnp.add, *parts))

    # With a single class, exp(logit - max) is 1, or 0 if the logit is -inf.
    one = jnp.where(z == -jnp.inf, 0, jnp.ones_like(z))
    operands = Row(jnp.maximum(z, least), Split(one, jnp.zeros_like(z)))
    return reduce_classes(axis, operands, Row(zero + least, Split(zero, zero)), combine)


def rescale(exps: Split, shift: Array) -> Split:
    """Return sums of exponentials relative to a largest logit that is larger by `-shift`."""
    factor = jnp.exp(shift)
    at_max = jnp.where(shift == 0, exps.at_max, 0)
    rest = exps.rest * factor + jnp.where(shift == 0, 0, exps.at_max * factor)
    return Split(at_max, rest)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def plain_row(axis: int, logits: Array, where: Array | None) -> Row:
    """Return the row sums for use in `custom_vjp` rules."""
    on_cpu, elsewhere = (partial(form, axis) for form in (_row_in_passes, _row_in_one_pass))
    return by_platform(on_cpu, elsewhere, logits, where)


@plain_row.defjvp
def _plain_row_jvp(axis, primals, tangents):
    (logits, where), row = primals, plain_row(axis, *primals)
    x = cast_logits(logits, where) - lax.stop_gradient(row.max_logit)
    de = jnp.exp(x) * cast_logits(tangents[0], where)
    of_exps = _split(partial(sum_classes, axis), de, x == 0)
    return row, Row(jnp.zeros_like(row.max_logit), of_exps)


def _split(total: Any, v: Array, at_max: Array) -> Split:
    return Split(total(jnp.where(at_max, v, 0)), total(jnp.where(at_max, 0, v)))


def _row_backward(axis, residuals, cts: Row):
    (logits, where), top = residuals
    x = cast_logits(logits, where) - top
    dz = arguments.mask_to_zero(row_gradient(x, cts.exps), where)
    return dz.astype(logits.dtype), None


def _row_forward(axis, logits, where):
    row = plain_row(axis, logits, where)
    return row, ((logits, where), lax.stop_gradient(row.max_logit))


_row_core = jax.custom_vjp(plain_row, nondiff_argnums=(0,))
_row_core.defvjp(_row_forward, _row_backward)


def row_sums(axis: int, logits: Array, where: Array | None) -> Row:
    """Return the sums of the exponentials of each position."""
    return _row_core(axis, *cast_to_common_varying(logits, where))


def row_over_shards(row: Row, class_axis_name: AxisName | None) -> Row:
    """Return the row sums over all classes from those of this device's classes."""
    own_top = lax.stop_gradient(row.max_logit)
    if class_axis_name is None:
        return Row(own_top, row.exps)
    top = lax.pmax(own_top, class_axis_name)
    return Row(top, lax.psum(rescale(row.exps, own_top - top), class_axis_name))


def row_log_sum(row: Row) -> Array:
    """Return the logarithm of the sum of `exp(logit - max_logit)`.

    `log(1 + rest)` would round a small rest away.
    """
    return jnp.log1p((row.exps.at_max - 1) + row.exps.rest)


# ---------------------------------------------------------------- each class as the true class


def shift_logits(z: Array, top: Array, *, for_backward: bool) -> Array:
    """Return `z - top`; for the backward pass in another form, see `scalar.prevent_cse`."""
    return _shift(for_backward, z, lax.stop_gradient(top))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _shift(for_backward: bool, z: Array, top: Array) -> Array:
    return (jnp.minimum(z, top) if for_backward else z) - top


@_shift.defjvp
def _shift_jvp(for_backward, primals, tangents):
    # At z = top the derivative of the minimum is 1/2 in each argument. This one is 1.
    return _shift(for_backward, *primals), tangents[0] - tangents[1]


def is_top_class(x: Array, exps: Split) -> Array:
    """Return whether a class alone has the largest logit: only its probability exceeds 1/2."""
    return (x == 0) & (exps.at_max == 1)


@jax.custom_jvp
def class_terms(x: Array, exps: Split) -> Terms:
    """Return the terms of each class in turn, for shifted logits `x`."""
    total, is_top = exps.at_max + exps.rest, is_top_class(x, exps)
    log_total, share = jnp.log1p((exps.at_max - 1) + exps.rest), 1 / total
    p, n = jnp.exp(x) * share, log_total - x
    q = jnp.where(is_top, exps.rest * share, 1 - p)
    log_q = jnp.where(is_top, jnp.log(exps.rest) - log_total, scalar.log1p(-jnp.minimum(p, 0.5)))
    return Terms(p, q, n, jnp.maximum(log_q, scalar.min_log(x)), scalar.n_over_q(n, q))


@class_terms.defjvp
def _class_terms_jvp(primals, tangents):
    (x, exps), (dx, dexps) = primals, tangents
    t, e, is_top = class_terms(x, exps), jnp.exp(x), is_top_class(x, exps)
    others = jnp.where(is_top, exps.rest, (exps.rest - e) + exps.at_max)
    d_others = jnp.where(is_top, dexps.rest, (dexps.rest - e * dx) + dexps.at_max)
    return t, scalar.terms_tangents(t, dx - scalar.divide(d_others, others))


def finite(t: Terms) -> Terms:
    """Return the terms with infinities clipped, for slopes: a weight of 0 makes them 0."""
    return t._replace(n=scalar.clip_inf(t.n), n_over_q=scalar.clip_inf(t.n_over_q))


# ---------------------------------------------------------------- gradients

# With G_c for the slope of class c in n, the gradient of the logits is p_j * (sum of all G) - G_j.
# It is computed in two parts: the derivative in the class's own logit with the row sums held
# constant, and the derivative through the row sums. Neither cancels for the dominant class.


def direct_gradient(x: Array, exps: Split, by_n: Array) -> Array:
    """Return the gradient of the logits with the row sums held constant."""
    q = jnp.where(is_top_class(x, exps), exps.rest / (exps.at_max + exps.rest), 1)
    return -by_n * q


def split_top(x: Array, exps: Split, v: Array) -> tuple[Array, Array]:
    """Return `v` for the class that alone has the largest logit, and `v` for the others."""
    is_top = is_top_class(x, exps)
    return jnp.where(is_top, v, 0), jnp.where(is_top, 0, v)


def row_cotangent(exps: Split, slopes: Split) -> Split:
    """Return the gradient of the row sums from the sums of `by_n` (see `split_top`)."""
    share = 1 / (exps.at_max + exps.rest)
    return Split(slopes.rest * share, (slopes.at_max + slopes.rest) * share)


def row_gradient(x: Array, of_exps: Split) -> Array:
    """Return the gradient of the logits from the gradient of the row sums."""
    return jnp.exp(x) * jnp.where(x == 0, of_exps.at_max, of_exps.rest)
