"""The exponentials of a row of logits, with each class in turn as the true class.

Every class c needs `1 - p_c`, and this difference cancels only if `p_c` is well above 1/2. At most
one class has such a probability: a class with the largest logit. Its `1 - p` is computed as the sum
of the other exponentials divided by the sum of all. So the sum of a row is stored in two parts: 1,
for one class with the largest logit, and the rest. If the rest is below 1/2, exactly one class has
a logit near the maximum, and it can be found by its logit instead of by an index.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from focal_jax.engine import scalar
from focal_jax.engine.blocks import in_blocks
from focal_jax.engine.class_axis import argmax, cast_logits, max_logit, reduce_classes
from focal_jax.engine.cpu_sums import is_at_most, sums_in_passes
from focal_jax.engine.platform import by_platform
from focal_jax.engine.scalar import Terms
from focal_jax.engine.sharding import AxisName


class Split(NamedTuple):
    """A sum over the classes in two parts, with a class axis of size 1."""

    at_max: Array  # over the classes near the largest logit
    rest: Array  # over the other classes


class RowSums(NamedTuple):
    """The exponentials of one position, with a class axis of size 1.

    `max_logit` has no derivative: the losses do not depend on the number that is subtracted. `exps`
    is the sum of `exp(logit - max_logit)`. `exps.at_max` is 1. If several classes tie for the
    largest logit, the others are part of `exps.rest`.
    """

    max_logit: Array
    exps: Split


# ---------------------------------------------------------------- sums of exponentials


# Along the last axis, XLA:CPU computes an argmax of at most this many classes faster than a sum.
_FEW_CLASSES = 64


def max_class_on_cpu(z: Array, axis: int) -> Array | None:
    """Return the first class with the largest logit, or None if an argmax would be slow."""
    num_classes = z.shape[axis]
    if not num_classes or (axis == z.ndim - 1 and not is_at_most(num_classes, _FEW_CLASSES)):
        return None
    return argmax(z, axis)


def _row_in_passes(axis: int, logits: Array, where: Array | None) -> RowSums:
    z = cast_logits(logits, where)
    max_index = max_class_on_cpu(z, axis)
    if max_index is not None:
        sums = sums_in_passes(axis, False, logits, (max_index,), where)
        return RowSums(
            sums.max_logit, Split(jnp.exp(sums.label_logit[0] - sums.max_logit), sums.rest)
        )
    top = max_logit(z, axis)
    total = jnp.sum(jnp.exp(z - top), axis, keepdims=True)
    # The barrier keeps the sums from sharing `z - top`, which XLA:CPU would write to memory.
    x = z - lax.optimization_barrier(top)
    rest = jnp.sum(zero_near_max(x, jnp.exp(x)), axis, keepdims=True)
    return RowSums(top, normalize(Split(total - rest, rest)))


def _row_in_one_pass(axis: int, logits: Array, where: Array | None) -> RowSums:
    z = cast_logits(logits, where)
    least, zero = jnp.finfo(z.dtype).min, jnp.zeros((), z.dtype)

    def combine(a, b):
        top = jnp.maximum(a.max_logit, b.max_logit)
        parts = [rescale(side.exps, side.max_logit - top) for side in (a, b)]
        return RowSums(top, normalize(jax.tree.map(jnp.add, *parts)))

    # With a single class, exp(logit - max) is 1, or 0 if the logit is -inf.
    one = jnp.where(z == -jnp.inf, 0, jnp.ones_like(z))
    operands = RowSums(jnp.maximum(z, least), Split(one, jnp.zeros_like(z)))
    return reduce_classes(axis, operands, RowSums(zero + least, Split(zero, zero)), combine)


def rescale(exps: Split, shift: Array) -> Split:
    """Return the sums for a new largest logit; `shift` is the old one minus the new one."""
    at_max, rest = (x * jnp.exp(shift) for x in exps)
    near = is_near_max(shift)
    return Split(jnp.where(near, at_max, 0), rest + jnp.where(near, 0, at_max))


def normalize(exps: Split) -> Split:
    """Return the sums with 1 for the class with the largest logit; 0 if every logit is -inf.

    `exps.at_max` is a sum over all classes near the maximum. If the total is below 1.5, there is
    one such class. Otherwise subtracting 1 from the total does not cancel.
    """
    total = exps.at_max + exps.rest
    one = jnp.where(total < 0.5, 0, jnp.ones_like(total))
    tangent = exps.at_max - lax.stop_gradient(exps.at_max)
    dominates = total < 1.5
    at_max = one + jnp.where(dominates, tangent, 0)
    return Split(at_max, jnp.where(dominates, exps.rest, total - one))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def plain_row(axis: int, logits: Array, where: Array | None) -> RowSums:
    """Return the row sums for use in `custom_vjp` rules."""
    in_passes = partial(in_blocks, partial(_row_in_passes, axis), axis)
    return by_platform(in_passes, partial(_row_in_one_pass, axis), logits, where)


@plain_row.defjvp
def _plain_row_jvp(axis, primals, tangents):
    (logits, where), row = primals, plain_row(axis, *primals)
    x = cast_logits(logits, where) - lax.stop_gradient(row.max_logit)
    de = jnp.exp(x) * cast_logits(tangents[0], where)
    near = is_near_max(x)
    total = partial(jnp.sum, axis=axis, keepdims=True)
    of_exps = Split(total(jnp.where(near, de, 0)), total(jnp.where(near, 0, de)))
    return row, RowSums(jnp.zeros_like(row.max_logit), of_exps)


def row_over_shards(row: RowSums, class_axis_name: AxisName | None) -> RowSums:
    """Return the row sums over all classes from those of this device's classes."""
    own_top = lax.stop_gradient(row.max_logit)
    if class_axis_name is None:
        return RowSums(own_top, row.exps)
    top = lax.pmax(own_top, class_axis_name)
    exps = lax.psum(rescale(row.exps, own_top - top), class_axis_name)
    return RowSums(top, normalize(exps))


def log_total(exps: Split) -> Array:
    """Return the logarithm of the sum of the exponentials.

    `log(1 + rest)` would round a small rest away.
    """
    return jnp.log1p((exps.at_max - 1) + exps.rest)


# ---------------------------------------------------------------- each class as the true class


def shift_logits(z: Array, top: Array, *, for_backward: bool) -> Array:
    """Return `z - top`; for the backward pass in another form, see `scalar.prevent_cse`."""
    return _shift(for_backward, z, lax.stop_gradient(top))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _shift(for_backward: bool, z: Array, top: Array) -> Array:
    return (jnp.minimum(z, top) if for_backward else z) - top


@_shift.defjvp
def _shift_jvp(for_backward, primals, tangents):
    # At z = top, JAX's derivative of the minimum would be 1/2 in each argument.
    return _shift(for_backward, *primals), tangents[0] - tangents[1]


# A class near the maximum has a logit of at least the largest one minus this. XLA may compute a
# logit again in another fusion, with another rounding, so `x == 0` does not find the maximum.
_NEAR = 0.5


def is_near_max(x: Array) -> Array:
    """Return whether a shifted logit is near 0."""
    return x > -_NEAR


def _dominates(x: Array, exps: Split) -> Array:
    """Return whether `1 - p` of a class may cancel.

    If the rest is below 1/2, so is every other exponential, and only the dominant class is near
    the maximum. Otherwise every probability is at most 2/3.
    """
    return x > jnp.where(exps.rest < 0.5, jnp.full_like(exps.rest, -_NEAR), jnp.inf)


@jax.custom_jvp
def class_terms(x: Array, exps: Split) -> Terms:
    """Return the terms of each class in turn, for shifted logits `x`."""
    dominates, log_sum, share = _dominates(x, exps), log_total(exps), 1 / (exps.at_max + exps.rest)
    p, n = jnp.exp(x) * share, log_sum - jnp.where(dominates, 0, x)
    # A probability above 1/2 is that of the class with the largest logit.
    above_half = x > log_sum - math.log(2)
    q = jnp.where(above_half, exps.rest * share, 1 - p)
    log_q = jnp.where(above_half, jnp.log(exps.rest) - log_sum, scalar.log1p(-jnp.minimum(p, 0.5)))
    return Terms(p, q, n, jnp.maximum(log_q, scalar.min_log(x)), scalar.n_over_q(n, q))


@class_terms.defjvp
def _class_terms_jvp(primals, tangents):
    (x, exps), (dx, dexps) = primals, tangents
    t, e, dominates = class_terms(x, exps), jnp.exp(x), _dominates(x, exps)
    others = jnp.where(dominates, exps.rest, (exps.rest - e) + exps.at_max)
    d_others = jnp.where(dominates, dexps.rest, (dexps.rest - e * dx) + dexps.at_max)
    return t, scalar.terms_tangents(t, dx - scalar.divide(d_others, others))


# ---------------------------------------------------------------- gradients

# With G_c for the slope of class c in n, the gradient of the logits is p_j * (sum of all G) - G_j.
# It is computed in two parts: the derivative in the class's own logit with the row sums held
# constant, and the derivative through the row sums. Neither cancels for the dominant class.


def direct_gradient(x: Array, exps: Split, by_n: Array) -> Array:
    """Return the gradient of the logits with the row sums held constant."""
    q = jnp.where(_dominates(x, exps), exps.rest / (exps.at_max + exps.rest), 1)
    return -by_n * q


def whole_gradient(x: Array, exps: Split, by_n: Array, slopes: Split) -> Array:
    """Return the gradient of the logits: the direct one, and the one through the row sums."""
    # A sum of products per class: XLA:GPU writes a number per position to memory.
    dominates, share = _dominates(x, exps), 1 / (exps.at_max + exps.rest)
    others = slopes.rest + jnp.where(dominates, 0, slopes.at_max)
    q = jnp.where(dominates, exps.rest * share, 1)
    return (jnp.exp(x) * share) * others - q * by_n


# A difference of logits times this is at least 1, unless the difference is below 1e-30.
_LARGE = 1e30


def zero_near_max(x: Array, v: Array, scale: float = 1.0) -> Array:
    """Return `scale * v` with 0 for the classes near the maximum.

    Computed without a select and a clamp, which keep XLA:CPU from vectorizing a sum. Calls with
    different scales share no constant: XLA:CPU would write its broadcast to memory.
    """
    far = lax.stop_gradient(x) * (-_LARGE * scale) - _NEAR * _LARGE * scale
    return v * jnp.minimum(far + jnp.abs(far), scale)  # far + |far| is 0 near the maximum


def row_cotangent(exps: Split, slopes: Split) -> Split:
    """Return the gradient of the row sums, without a dominant class's slope in its own sum."""
    share = 1 / (exps.at_max + exps.rest)
    total = slopes.at_max + slopes.rest
    return Split(jnp.where(exps.rest < 0.5, slopes.rest, total) * share, total * share)
