"""What a softmax loss needs of a row of logits: the true one, and the sum over the others.

Or of two classes, between which the label lies, their logits and the sum over the rest.

Two forms of the same numbers. An accelerator is bound by the bytes that it reads: one
reduction takes all in one pass. XLA's CPU backend has fast paths for a plain maximum and a
plain sum, and none for that reduction: there it is a pass each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from focal_jax import _inputs
from focal_jax._cpu import compiled_apart
from focal_jax._varying import aligned_varying

Places = tuple[Array, ...]  # of classes, each with a class axis of one


class ClassSums(NamedTuple):
    """Of each position, with a class axis of one. Differentiable as if `top` were a constant."""

    top: Array  # the largest logit; finite also where no class is left
    true: Any  # the true class's logit; 0 where the true class is not one of these
    rest: Array  # the sum over the other classes of exp(logit - top)


def classes_along(logits: Array, axis: int) -> Array:
    """Return 0, 1, ... along the class axis, of size 1 along the others."""
    shape = [1] * logits.ndim
    shape[axis] = logits.shape[axis]
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def kept(logits: Array, where: Array | None) -> Array:
    """Return the logits in the dtype of the loss, 0 where the mask is False."""
    return _inputs.keep(logits.astype(_inputs.compute_dtype(logits)), where)


def picked(z: Array, place: Array, axis: int) -> Array:
    """Return the entry of the class at `place`, or 0 where that is none of the classes."""
    if z.shape[axis] and jax.typeof(z).sharding.spec[axis] is None:
        place = jnp.where(place < 0, z.shape[axis], place)  # -1 would be the last
        return jnp.take_along_axis(z, place, axis, mode="fill", fill_value=0)
    # No gather reaches across the devices of an explicit mesh axis, or into no class at all.
    return jnp.sum(jnp.where(classes_along(z, axis) == place, z, 0), axis, keepdims=True)


def without(v: Array, classes: Array, *places: Array) -> Array:
    """Return `v`, 0 for the class at each place."""
    for place in places:
        v = jnp.where(classes == place, 0, v)
    return v


def others(logits: Array, classes: Array, places: Places, top: Array, where: Array | None) -> Array:
    """Return exp(logit - top) of every class, 0 for those at the places."""
    return without(jnp.exp(kept(logits, where) - top), classes, *places)


def _others_without_a_select(logits, classes, places, top, where):
    # No exponential here is above 1, and only the class at a place is less than 1 away from it.
    e = jnp.exp(kept(logits, where) - top)
    for place in places:
        e = jnp.minimum(e, jnp.abs(classes.astype(e.dtype) - place.astype(e.dtype)))
    return e


def _in_passes(axis: int, gradient: bool, logits: Array, places: Places, where) -> ClassSums:
    """Return the sums by a pass for the maximum and one for the sum, as a CPU likes it."""
    z = kept(logits, where)
    top = jnp.max(z, axis, keepdims=True, initial=jnp.finfo(z.dtype).min)
    if gradient:
        # The exponentials have two users, this sum and the gradient: they are written out
        # once, in the gradient's place.
        exponentials = others
    elif axis == logits.ndim - 1:
        # XLA adds up the last axis in passing, if it meets no select on the way.
        exponentials = _others_without_a_select
    else:
        exponentials = partial(compiled_apart, others)
    e = exponentials(logits, classes_along(logits, axis), places, top, where)
    true = tuple(picked(z, place, axis) for place in places)
    return ClassSums(top, true, jnp.sum(e, axis, keepdims=True))


def reduced(axis: int, operands: Any, of_nothing: Any, joined: Callable[[Any, Any], Any]) -> Any:
    """Return the reduction of trees of arrays along the class axis, which keeps a size of one."""
    leaves, tree = jax.tree.flatten(operands)

    def flat(*sides):
        return tuple(jax.tree.leaves(joined(*(jax.tree.unflatten(tree, x) for x in sides))))

    found = lax.reduce(leaves, jax.tree.leaves(of_nothing), flat, (axis,))
    return jax.tree.unflatten(tree, [jnp.expand_dims(x, axis) for x in found])


def _in_one_pass(axis: int, gradient: bool, logits: Array, places: Places, where) -> ClassSums:
    """Return the sums by one reduction, which reads the logits once."""
    del gradient
    z = kept(logits, where)
    least, classes = jnp.finfo(z.dtype).min, classes_along(z, axis)
    true = tuple(jnp.where(classes == place, z, 0) for place in places)
    # Of a class alone, exp(logit - top) is 1, or 0 for one that does not count.
    one = without(jnp.where(z == -jnp.inf, 0, jnp.ones_like(z)), classes, *places)

    def joined(a, b):
        top = jnp.maximum(a.top, b.top)
        rest = a.rest * jnp.exp(a.top - top) + b.rest * jnp.exp(b.top - top)
        return ClassSums(top, jax.tree.map(jnp.add, a.true, b.true), rest)

    zero = jnp.zeros((), z.dtype)
    of_nothing = ClassSums(zero + least, (zero,) * len(places), zero)
    return reduced(axis, ClassSums(jnp.maximum(z, least), true, one), of_nothing, joined)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def plain_class_sums(
    axis: int, gradient: bool, logits: Array, places: Places, where: Array | None
) -> ClassSums:
    """Return the class sums, for use inside of rules: differentiable in both modes.

    `true` has the logit of the class at each of the places.
    """
    on_cpu, elsewhere = (partial(form, axis, gradient) for form in (_in_passes, _in_one_pass))
    return lax.platform_dependent(logits, places, where, cpu=on_cpu, default=elsewhere)


@plain_class_sums.defjvp
def _plain_class_sums_jvp(axis, gradient, primals, tangents):
    logits, places, where = primals
    sums = plain_class_sums(axis, gradient, *primals)
    dz = kept(tangents[0], where)
    e = others(logits, classes_along(logits, axis), places, lax.stop_gradient(sums.top), where)
    of_rest = jnp.sum(e * dz, axis, keepdims=True)
    of_true = tuple(picked(dz, place, axis) for place in places)
    return sums, ClassSums(jnp.zeros_like(sums.top), of_true, of_rest)


_compiled = jax.jit(plain_class_sums, static_argnums=(0, 1))


def _primal(axis, *args):
    return _compiled(axis, False, *args)


def _forward(axis, *args):
    sums = _compiled(axis, True, *args)
    return sums, (args, lax.stop_gradient(sums.top))


@partial(jax.jit, static_argnums=0)
def _backward(axis, residuals, cts):
    (logits, places, where), top = residuals
    classes = classes_along(logits, axis)
    ct = cts.rest * others(logits, classes, places, top, where)
    for place, of_true in zip(places, cts.true):
        ct = jnp.where(classes == place, of_true, ct)
    return _inputs.keep(ct, where).astype(logits.dtype), None, None


_core = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_core.defvjp(_forward, _backward)


def class_sums(
    axis: int,
    logits: Array,
    place: Array,
    where: Array | None,
    class_axis_name: str | tuple[str, ...] | None = None,
) -> ClassSums:
    """Return the class sums for one place.

    With `class_axis_name` the logits, and `place`, are of this device's slice of the classes,
    and the sums are over the slices of all: out here, where JAX transposes the collectives
    rightly in every mode of `shard_map`, and a number a position each.
    """
    sums = sums_between(axis, logits, (place,), where)
    return over_slices(sums._replace(true=sums.true[0]), class_axis_name)


def sums_between(axis: int, logits: Array, places: Places, where: Array | None) -> ClassSums:
    """Return the class sums for several places, whose classes the rest is without.

    What is computed again in the backward pass is not kept.
    """
    return _core(axis, *aligned_varying(logits, places, where))


def over_slices(sums: ClassSums, class_axis_name: str | tuple[str, ...] | None) -> ClassSums:
    """Return the sums over the slices of all the devices, from those of this device's slice."""
    if class_axis_name is None:
        return sums
    own_top = lax.stop_gradient(sums.top)
    top = lax.pmax(own_top, class_axis_name)
    true, rest = lax.psum((sums.true, sums.rest * jnp.exp(own_top - top)), class_axis_name)
    return ClassSums(top, true, rest)


def log_whole(sums: ClassSums, impossible: Array) -> Array:
    """Return the logarithm of the sum over all the classes of exp(logit - top).

    That sum is never less than 1: as its excess over 1 it keeps its digits where the true class
    outweighs the others. A label that is no class has no part in it.
    """
    true = jnp.where(impossible, -jnp.inf, sums.true - lax.stop_gradient(sums.top))
    return jnp.log1p(jnp.expm1(true) + sums.rest)


def logsumexp(sums: ClassSums, impossible: Array, where: Array | None) -> Array:
    """Return the log-sum-exp of the logits, 0 where masked."""
    top = lax.stop_gradient(sums.top)
    return _inputs.keep(top + log_whole(sums, impossible), where)
