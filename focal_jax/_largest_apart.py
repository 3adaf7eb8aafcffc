"""Sums over the classes but one, for each class, without cancellation.

"All less this one" loses its digits where this one is all but the whole of the sum. Of a row of
exponentials that can only be the largest: it stands apart, and what is added up are the others.
As in `_class_sums`, a form of one reduction for accelerators and a form of plain passes for a
CPU.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from focal_jax import _checks
from focal_jax._class_sums import (
    classes_along,
    kept,
    others,
    picked,
    plain_class_sums,
    reduced,
    without,
)
from focal_jax._cpu import compiled_apart
from focal_jax._scalar import Terms, class_terms


class Apart(NamedTuple):
    """Of each position, with a class axis of one: the entry of a class, and the others."""

    place: Array  # the class that stands apart: the first with the largest logit
    own: Array  # its entry
    rest: Array  # the sum of the entries of the others

    def is_at(self, classes: Array, again: bool) -> Array:
        """Return whether each class is the one that stands apart.

        `again` is in other words, as in `_less_top`.
        """
        return (classes ^ self.place) == 0 if again else classes == self.place

    def others_of(self, v: Array, classes: Array, *, again: bool) -> Array:
        """Return for each class the sum of the entries `v` over the others."""
        return jnp.where(self.is_at(classes, again), self.rest, (self.rest - v) + self.own)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _less_top(again: bool, z: Array, top: Array) -> Array:
    """Return a logit less the largest one, or once more, `again`, for the gradient.

    The same number in other words: an accelerator's compiler takes the same words for one
    intermediate with two users, and writes it out to memory. So each of the two passes over
    the classes reads the logits, and writes nothing but its result.
    """
    return (jnp.minimum(z, top) if again else z) - top


@_less_top.defjvp
def _less_top_jvp(again, primals, tangents):
    # Not the minimum's: where the two are equal it has half the derivative of each.
    return _less_top(again, *primals), tangents[0] - tangents[1]


class Row(NamedTuple):
    """The exponentials of a row of logits. Differentiable as if `top` were a constant."""

    top: Array  # the largest logit; finite also where no class is left
    apart: Apart  # of exp(logit - top)

    def terms(self, z: Array, classes: Array, log_whole: Array, *, again: bool) -> Terms:
        """Return the terms of each class in turn, of its logit."""
        z = _less_top(again, z, self.top)
        e, whole = jnp.exp(z), self.apart.own + self.apart.rest
        others, share = self.apart.others_of(e, classes, again=again), 1 / whole
        # The probability of any class but the one apart is at most a half.
        q = jnp.where(self.apart.is_at(classes, again), self.apart.rest * share, 1 - e * share)
        return class_terms(z, others, whole, log_whole, q)


def no_tangent(x: Array) -> Any:
    """Return the tangent that JAX has for integers."""
    return np.zeros(x.shape, jax.dtypes.float0)


def first_place(v: Array, axis: int) -> Array:
    """Return the first place of the largest entry, with a class axis of one."""
    if not v.shape[axis]:
        return jnp.zeros_like(jnp.sum(v, axis, keepdims=True), jnp.int32)
    return jnp.argmax(v, axis, keepdims=True).astype(jnp.int32)


def _winner_first(size_a, a: Apart, size_b, b: Apart) -> tuple[Apart, Apart]:
    """Return the one with the larger entry, and the other; of equal ones the earlier class."""
    return _where((size_a > size_b) | ((size_a == size_b) & (a.place < b.place)), a, b)


def _where(first: Array, a: Apart, b: Apart) -> tuple[Apart, Apart]:
    """Return the two in this order, or in the other."""
    pairs = [(jnp.where(first, x, y), jnp.where(first, y, x)) for x, y in zip(a, b)]
    return Apart(*(x for x, _ in pairs)), Apart(*(y for _, y in pairs))


def places(v: Array, axis: int) -> Array:
    """Return the place of each entry along the axis."""
    # Added to an array of its own kind, so that on a mesh it is spread as the entries are.
    return classes_along(v, axis) + jnp.zeros_like(v, jnp.int32)


# ---------------------------------------------------------------- entries as they are


def in_passes(axis: int, place: Array, v: Array, beside: Any) -> tuple[Apart, Any]:
    """Return the entries `v` with the class at `place` apart, and the sums of what is `beside`."""
    classes = classes_along(v, axis)
    if axis == v.ndim - 1:
        # XLA adds up the last axis in passing, if it meets no select on the way.
        rest = v * jnp.minimum(jnp.abs(classes - place), 1).astype(v.dtype)
    else:
        rest = compiled_apart(without, v, classes, place)
    total = partial(jnp.sum, axis=axis, keepdims=True)
    return Apart(place, picked(v, place, axis), total(rest)), jax.tree.map(total, beside)


def in_one_pass(axis: int, place: Array, v: Array, beside: Any) -> tuple[Apart, Any]:
    """Return the same by one reduction."""

    def joined(a, b):
        # Which comes first is no matter but for the class at `place`, which comes before all.
        (a, beside_a), (b, beside_b) = a, b
        first, other = _where(a.place < b.place, a, b)
        rest = (first.rest + other.rest) + other.own
        return first._replace(rest=rest), jax.tree.map(jnp.add, beside_a, beside_b)

    zero = jnp.zeros((), v.dtype)
    none = jax.tree.map(lambda x: jnp.zeros((), x.dtype), beside)
    of_nothing = Apart(jnp.int32(_checks.INT32.max), zero, zero), none
    order = jnp.where(classes_along(v, axis) == place, -1, places(v, axis))
    found, sums = reduced(axis, (Apart(order, v, jnp.zeros_like(v)), beside), of_nothing, joined)
    return found._replace(place=place), sums


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def apart(form, axis: int, place: Array, v: Array, beside: Any = ()) -> tuple[Apart, Any]:
    """Return what the two forms return, in the one that is asked for.

    The place of the largest logit serves for other entries than the exponentials too. Another
    class's sum over the others may lose digits to an entry of its own that outweighs them; but
    where a gradient multiplies that sum by the class's probability, at most a half, it adds the
    entry times what the probability lacks of 1, at least a half.
    """
    return form(axis, place, v, beside)


@apart.defjvp
def _apart_jvp(form, axis, primals, tangents):
    found, sums = apart(form, axis, *primals)
    _, dv, d_beside = tangents
    total = partial(jnp.sum, axis=axis, keepdims=True)
    rest = total(without(dv, classes_along(dv, axis), found.place))
    d_apart = Apart(no_tangent(found.place), picked(dv, found.place, axis), rest)
    return (found, sums), (d_apart, jax.tree.map(total, d_beside))


# ---------------------------------------------------------------- exponentials of logits


def _row_in_passes(axis: int, logits: Array, where: Array | None) -> Row:
    place = first_place(kept(logits, where), axis)
    sums = plain_class_sums(axis, False, logits, (place,), where)
    return Row(sums.top, Apart(place, jnp.exp(sums.true[0] - sums.top), sums.rest))


def _row_in_one_pass(axis: int, logits: Array, where: Array | None) -> Row:
    z = kept(logits, where)
    least = jnp.finfo(z.dtype).min

    def joined(a, b):
        winner, other = _winner_first(a.top, a.apart, b.top, b.apart)
        top, low = jnp.maximum(a.top, b.top), jnp.minimum(a.top, b.top)
        rest = winner.rest + (other.rest + other.own) * jnp.exp(low - top)
        return Row(top, winner._replace(rest=rest))

    zero = jnp.zeros((), z.dtype)
    of_nothing = Row(zero + least, Apart(jnp.int32(_checks.INT32.max), zero, zero))
    # Of a class alone, exp(logit - top) is 1, or 0 for one that is switched off.
    one = jnp.where(z == -jnp.inf, 0, jnp.ones_like(z))
    operands = Row(jnp.maximum(z, least), Apart(places(z, axis), one, jnp.zeros_like(z)))
    return reduced(axis, operands, of_nothing, joined)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def row(axis: int, logits: Array, where: Array | None) -> Row:
    """Return the sums of the exponentials of a row, for use inside of rules."""
    on_cpu, elsewhere = (partial(form, axis) for form in (_row_in_passes, _row_in_one_pass))
    return lax.platform_dependent(logits, where, cpu=on_cpu, default=elsewhere)


@row.defjvp
def _row_jvp(axis, primals, tangents):
    (logits, where), dz = primals, kept(tangents[0], primals[1])
    top, apart = row(axis, *primals)
    e = others(logits, classes_along(logits, axis), (apart.place,), lax.stop_gradient(top), where)
    return Row(top, apart), Row(
        jnp.zeros_like(top),
        Apart(
            no_tangent(apart.place),
            apart.own * picked(dz, apart.place, axis),
            jnp.sum(e * dz, axis, keepdims=True),
        ),
    )
