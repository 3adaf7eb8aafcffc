"""What a softmax loss needs of a row of logits: the true one, and the sum over the others.

Two forms of the same numbers. An accelerator is bound by the bytes that it reads: one
reduction takes all in one pass. XLA's CPU backend has fast paths for a plain maximum and a
plain sum, and none for that reduction: there it is a pass each.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from focal_jax import _inputs
from focal_jax._cpu import compiled_apart
from focal_jax._varying import aligned_varying


class ClassSums(NamedTuple):
    """Of each position, with a class axis of one. Differentiable as if `top` were a constant."""

    top: Array  # the largest logit; finite also where no class is left
    true: Array  # the true class's logit; 0 where the true class is not one of these
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


def without(v: Array, classes: Array, place: Array) -> Array:
    """Return `v`, 0 for the class at `place`."""
    return jnp.where(classes == place, 0, v)


def others(logits: Array, classes: Array, place: Array, top: Array, where: Array | None) -> Array:
    """Return exp(logit - top) of every class, 0 for the one at `place`."""
    return without(jnp.exp(kept(logits, where) - top), classes, place)


def _others_without_a_select(logits, classes, place, top, where):
    # No exponential here is above 1, and only the class at `place` is less than 1 away from it.
    e = jnp.exp(kept(logits, where) - top)
    return jnp.minimum(e, jnp.abs(classes.astype(e.dtype) - place.astype(e.dtype)))


def _in_passes(axis: int, gradient: bool, logits: Array, place: Array, where) -> ClassSums:
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
    e = exponentials(logits, classes_along(logits, axis), place, top, where)
    return ClassSums(top, picked(z, place, axis), jnp.sum(e, axis, keepdims=True))


def _in_one_pass(axis: int, gradient: bool, logits: Array, place: Array, where) -> ClassSums:
    """Return the sums by one reduction, which reads the logits once."""
    del gradient
    z = kept(logits, where)
    least = jnp.finfo(z.dtype).min
    own = classes_along(z, axis) == place
    # Of a class alone, exp(logit - top) is 1, or 0 for one that does not count.
    one = jnp.where(own | (z == -jnp.inf), 0, jnp.ones_like(z))
    parts = ClassSums(jnp.maximum(z, least), jnp.where(own, z, 0), one)

    def joined(a, b):
        a, b = ClassSums(*a), ClassSums(*b)
        top = jnp.maximum(a.top, b.top)
        rest = a.rest * jnp.exp(a.top - top) + b.rest * jnp.exp(b.top - top)
        return ClassSums(top, a.true + b.true, rest)

    of_nothing = ClassSums(*(jnp.asarray(x, z.dtype) for x in (least, 0, 0)))
    sums = lax.reduce(tuple(parts), tuple(of_nothing), lambda a, b: tuple(joined(a, b)), (axis,))
    return ClassSums(*(jnp.expand_dims(x, axis) for x in sums))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def plain_class_sums(
    axis: int, gradient: bool, logits: Array, place: Array, where: Array | None
) -> ClassSums:
    """Return the class sums, for use inside of rules: differentiable in both modes."""
    on_cpu, elsewhere = (partial(form, axis, gradient) for form in (_in_passes, _in_one_pass))
    return lax.platform_dependent(logits, place, where, cpu=on_cpu, default=elsewhere)


@plain_class_sums.defjvp
def _plain_class_sums_jvp(axis, gradient, primals, tangents):
    logits, place, where = primals
    sums = plain_class_sums(axis, gradient, *primals)
    dz = kept(tangents[0], where)
    e = others(logits, classes_along(logits, axis), place, lax.stop_gradient(sums.top), where)
    of_rest = jnp.sum(e * dz, axis, keepdims=True)
    return sums, ClassSums(jnp.zeros_like(sums.top), picked(dz, place, axis), of_rest)


_compiled = jax.jit(plain_class_sums, static_argnums=(0, 1))


def _primal(axis, *args):
    return _compiled(axis, False, *args)


def _forward(axis, *args):
    sums = _compiled(axis, True, *args)
    return sums, (args, lax.stop_gradient(sums.top))


@partial(jax.jit, static_argnums=0)
def _backward(axis, residuals, cts):
    (logits, place, where), top = residuals
    classes = classes_along(logits, axis)
    e = others(logits, classes, place, top, where)
    ct = jnp.where(classes == place, cts.true, cts.rest * e)
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
    """Return the class sums; what is computed again in the backward pass is not kept.

    With `class_axis_name` the logits, and `place`, are of this device's slice of the classes,
    and the sums are over the slices of all: out here, where JAX transposes the collectives
    rightly in every mode of `shard_map`, and a number a position each.
    """
    return over_slices(_core(axis, *aligned_varying(logits, place, where)), class_axis_name)


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
