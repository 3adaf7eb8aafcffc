"""Operations along the class axis that the sums over the classes are made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from focal_jax.engine import arguments

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


def argmax(z: Array, axis: int) -> Array:
    """Return the first class with the largest logit, as int32, with a class axis of size 1."""
    return jnp.expand_dims(lax.argmax(z, axis, jnp.int32), axis)


def max_logit(z: Array, axis: int) -> Array:
    """Return the largest logit; `finfo.min` if every logit is -inf."""
    return jnp.max(z, axis, keepdims=True, initial=jnp.finfo(z.dtype).min)


def exp_excluding(logits: Array, index: Array, labels: Labels, top: Array, where) -> Array:
    """Return `exp(logit - top)` for every class, 0 for the classes at the labels."""
    return zero_at(jnp.exp(cast_logits(logits, where) - top), index, *labels)
