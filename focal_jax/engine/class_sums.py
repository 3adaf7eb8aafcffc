"""Sums over the class axis: the largest logit, the label's logit, and the rest of the softmax.

Two forms compute the same numbers. An accelerator is limited by the bytes that it reads, so one
reduction computes everything in one pass. XLA:CPU has fast library code for a plain maximum and a
plain sum, and none for that reduction, so on CPU each is a pass of its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from focal_jax.engine import arguments
from focal_jax.engine.blocks import in_blocks
from focal_jax.engine.cpu import by_devices, compile_separately
from focal_jax.engine.platform import by_platform
from focal_jax.engine.sharding import AxisName, cast_to_common_varying

Labels = tuple[Array, ...]  # class indices, each with a class axis of size 1


class ClassSums(NamedTuple):
    """Sums of each position, with a class axis of size 1. `max_logit` has no derivative.

    Attributes:
      max_logit: the largest logit; finite even if every logit is -inf.
      label_logit: the logit of the label's class; 0 if the label is not one of these classes.
      rest: the sum over the other classes of `exp(logit - max_logit)`.
    """

    max_logit: Array
    label_logit: Any
    rest: Array


def class_index(logits: Array, axis: int) -> Array:
    """Return 0, 1, ... along the class axis, with size 1 along the other axes."""
    shape = [1] * logits.ndim
    shape[axis] = logits.shape[axis]
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def cast_logits(logits: Array, where: Array | None) -> Array:
    """Return the logits in the dtype of the loss, 0 where the mask is False."""
    return arguments.mask_to_zero(logits.astype(arguments.compute_dtype(logits)), where)


def pick_class(z: Array, label: Array, axis: int) -> Array:
    """Return the entry of the class `label`, or 0 if there is no such class."""
    if z.shape[axis] and jax.typeof(z).sharding.spec[axis] is None:
        # `checkify.index_checks` would report a gather of an ignored label that is no class.
        inside = (label >= 0) & (label < z.shape[axis])
        label = jnp.where(inside, label, 0)
        return jnp.where(inside, jnp.take_along_axis(z, label, axis, mode="promise_in_bounds"), 0)
    # `take_along_axis` raises if the class axis is sharded over an explicit mesh, or empty.
    return jnp.sum(jnp.where(class_index(z, axis) == label, z, 0), axis, keepdims=True)


def zero_at(v: Array, index: Array, *labels: Array) -> Array:
    """Return `v` with 0 for the class at each label."""
    for label in labels:
        v = jnp.where(index == label, 0, v)
    return v


def reduce_classes(axis: int, operands: Any, initial: Any, combine: Callable[[Any, Any], Any]):
    """Reduce a tree of arrays along the class axis in one pass, and keep the axis with size 1."""
    leaves, tree = jax.tree.flatten(operands)

    def combine_leaves(*sides):
        return tuple(jax.tree.leaves(combine(*(jax.tree.unflatten(tree, x) for x in sides))))

    found = lax.reduce(leaves, jax.tree.leaves(initial), combine_leaves, (axis,))
    return jax.tree.unflatten(tree, [jnp.expand_dims(x, axis) for x in found])


def max_logit(z: Array, axis: int) -> Array:
    """Return the largest logit; the smallest finite number if every logit is -inf."""
    return jnp.max(z, axis, keepdims=True, initial=jnp.finfo(z.dtype).min)


# ---------------------------------------------------------------- the two forms


# In rows of fewer classes, XLA:CPU excludes a class faster by a select than by a scatter.
_MIN_SCATTERED_CLASSES = 40
# Class indices below this number are exact in float32.
MAX_FLOAT_INDEX = 2**24


def _exp_excluding(logits: Array, index: Array, labels: Labels, top: Array, where) -> Array:
    """Return `exp(logit - top)` for every class, 0 for the classes at the labels."""
    return zero_at(jnp.exp(cast_logits(logits, where) - top), index, *labels)


def _exp_excluding_without_select(logits, index, labels, top, where):
    # XLA:CPU compiles exponentials and sums that are fused with a select to slow code. The
    # exponentials are at most 1, and |index - label| is below 1 only at the label, so the minimum
    # of the two is 0 there.
    e = jnp.exp(cast_logits(logits, where) - top)
    for label in labels:
        e = jnp.minimum(e, jnp.abs(index.astype(e.dtype) - label.astype(e.dtype)))
    return e


def _exp_excluding_by_scatter(logits, index, labels, top, where):
    e, axis = jnp.exp(cast_logits(logits, where) - top), index.shape.index(index.size)
    for label in labels:
        e = put_at_label(e, label, jnp.zeros_like(top), axis)
    return e


def put_at_label(v: Array, label: Array, entry: Array, axis: int) -> Array:
    """Return `v` with `entry` for the class at the label; unchanged if there is no such class."""
    label = jnp.where(label < 0, v.shape[axis], label)
    return jnp.put_along_axis(v, label, entry, axis, inplace=False, mode="drop")


def _exponentials(axis: int, gradient: bool, logits: Array) -> Callable[..., Array]:
    """Return the function of the exponentials on CPUs."""
    num_classes = logits.shape[axis]
    has_rows = axis == logits.ndim - 1 and num_classes <= MAX_FLOAT_INDEX
    if not gradient:
        # The sum is the only use of the exponentials.
        no_select = _exp_excluding_without_select
        return no_select if has_rows else partial(compile_separately, _exp_excluding)
    # The sum and the gradient both use the exponentials. XLA:CPU writes them to memory once, into
    # the gradient's buffer. For short rows a select is faster than a scatter.
    if has_rows and num_classes >= _MIN_SCATTERED_CLASSES:
        return partial(by_devices, _exp_excluding_by_scatter, _exp_excluding_without_select)
    return _exp_excluding


def sums_in_passes(axis: int, gradient: bool, logits: Array, labels: Labels, where) -> ClassSums:
    """Return the class sums by one pass for the maximum and one for the sum, for CPUs."""
    z = cast_logits(logits, where)
    top = max_logit(z, axis)
    args = logits, class_index(logits, axis), labels, top, where
    e = _exponentials(axis, gradient, logits)(*args)
    return ClassSums(
        top, tuple(pick_class(z, x, axis) for x in labels), jnp.sum(e, axis, keepdims=True)
    )


def _in_one_pass(axis: int, gradient: bool, logits: Array, labels: Labels, where) -> ClassSums:
    """Return the class sums by one reduction that reads the logits once, for accelerators."""
    del gradient
    z = cast_logits(logits, where)
    least, index = jnp.finfo(z.dtype).min, class_index(logits, axis)
    label_logits = tuple(jnp.where(index == label, z, 0) for label in labels)
    # With a single class, exp(logit - max) is 1, or 0 if the logit is -inf.
    one = zero_at(jnp.where(z == -jnp.inf, 0, jnp.ones_like(z)), index, *labels)

    def combine(a, b):
        top = jnp.maximum(a.max_logit, b.max_logit)
        rest = a.rest * jnp.exp(a.max_logit - top) + b.rest * jnp.exp(b.max_logit - top)
        return ClassSums(top, jax.tree.map(jnp.add, a.label_logit, b.label_logit), rest)

    zero = jnp.zeros((), z.dtype)
    initial = ClassSums(zero + least, (zero,) * len(labels), zero)
    return reduce_classes(
        axis, ClassSums(jnp.maximum(z, least), label_logits, one), initial, combine
    )


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _plain_class_sums(
    axis: int, gradient: bool, logits: Array, labels: Labels, where: Array | None
) -> ClassSums:
    """Return the class sums for use in `custom_vjp` rules; differentiable in both modes."""
    in_passes = partial(in_blocks, partial(sums_in_passes, axis, gradient), axis)
    return by_platform(in_passes, partial(_in_one_pass, axis, gradient), logits, labels, where)


@_plain_class_sums.defjvp
def _plain_class_sums_jvp(axis, gradient, primals, tangents):
    logits, labels, where = primals
    sums = _plain_class_sums(axis, gradient, *primals)
    dz, top = cast_logits(tangents[0], where), lax.stop_gradient(sums.max_logit)
    e = _exp_excluding(logits, class_index(logits, axis), labels, top, where)
    of_labels = tuple(pick_class(dz, label, axis) for label in labels)
    return sums, ClassSums(jnp.zeros_like(top), of_labels, jnp.sum(e * dz, axis, keepdims=True))


# ---------------------------------------------------------------- the custom_vjp

_jitted = jax.jit(_plain_class_sums, static_argnums=(0, 1))


def _primal(axis, *args):
    return _jitted(axis, False, *args)


def _forward(axis, *args):
    sums = _jitted(axis, True, *args)
    return sums, (args, lax.stop_gradient(sums.max_logit))


@partial(jax.jit, static_argnums=0)
def _backward(axis, residuals, cts):
    (logits, labels, where), top = residuals
    index = class_index(logits, axis)
    args = logits, index, labels, top, where
    dz = cts.rest * by_platform(_exponentials(axis, True, logits), _exp_excluding, *args)
    finish = partial(arguments.mask_to_zero, where=where)
    dz, *of_labels = (finish(x).astype(logits.dtype) for x in (dz, *cts.label_logit))

    def select(dz, labels, of_labels):
        for label, of_label in zip(labels, of_labels):
            dz = jnp.where(index == label, of_label, dz)
        return dz

    def scatter(dz, labels, of_labels):
        for label, of_label in zip(labels, of_labels):
            dz = put_at_label(dz, label, of_label, axis)
        return dz

    # The gradient of a linear layer with several axes of positions needs a transposed copy of `dz`.
    # XLA:CPU would compute `dz` for the copy again, and keep the exponentials.
    on_cpu = partial(by_devices, scatter, select) if axis == dz.ndim - 1 > 1 else select
    return by_platform(on_cpu, select, dz, labels, of_labels), None, None


_core = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_core.defvjp(_forward, _backward)


def class_sums(axis: int, logits: Array, labels: Labels, where: Array | None) -> ClassSums:
    """Return the class sums; `rest` excludes the classes at all labels.

    The exponentials are recomputed in the backward pass and not stored.
    """
    return _core(axis, *cast_to_common_varying(logits, labels, where))


def sum_over_shards(sums: ClassSums, class_axis_name: AxisName | None) -> ClassSums:
    """Return the sums over all classes from the sums of this device's classes.

    The collectives stand outside the `custom_vjp`: there JAX transposes them correctly in every
    mode of `jax.shard_map`. They exchange three numbers per position.
    """
    if class_axis_name is None:
        return sums
    own_top = lax.stop_gradient(sums.max_logit)
    top = lax.pmax(own_top, class_axis_name)
    rest = sums.rest * jnp.exp(own_top - top)
    label_logit, rest = lax.psum((sums.label_logit, rest), class_axis_name)
    return ClassSums(top, label_logit, rest)


def log_sum_exp(sums: ClassSums, invalid: Array, where: Array | None) -> Array:
    """Return the log-sum-exp of the logits, 0 where masked; also correct for invalid labels.

    The sum of `exp(logit - max)` is at least 1. Its excess over 1 is computed without cancellation
    if the label's class dominates. An invalid label adds nothing to the sum.
    """
    top = lax.stop_gradient(sums.max_logit)
    label_logit = jnp.where(invalid, -jnp.inf, sums.label_logit - top)
    # JAX differentiates expm1(x) as `expm1(x) + 1`, which cancels for a large negative x.
    e = jnp.exp(label_logit)
    excess = jnp.expm1(lax.stop_gradient(label_logit)) + (e - lax.stop_gradient(e))
    return arguments.mask_to_zero(top + jnp.log1p(excess + sums.rest), where)
