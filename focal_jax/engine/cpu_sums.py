"""The class sums on CPUs.

XLA:CPU has fast library code for a plain maximum and a plain sum, and none for the reduction of
`class_sums.py`, so each is a pass of its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from focal_jax.engine.blocks import in_blocks
from focal_jax.engine.class_axis import (
    ClassSums,
    Labels,
    cast_logits,
    class_index,
    exp_excluding,
    max_logit,
    pick_class,
)
from focal_jax.engine.cpu import by_devices, compile_separately

# In rows of at most this many classes, XLA:CPU replaces an entry faster by a select than a scatter.
_MAX_SELECTED_CLASSES = 39
# Class indices below this number are exact in float32.
MAX_FLOAT_INDEX = 2**24


def is_at_most(num_classes: Any, limit: int) -> bool:
    """Return whether the number of classes is known and small. A symbolic number is not known."""
    return isinstance(num_classes, int) and num_classes <= limit


@jax.custom_jvp
def minimum_with_distance(e: Array, distance: Array) -> Array:
    """Return `e`, which is at most 1, and 0 for a distance of 0 to an excluded class."""
    return jnp.minimum(e, distance)


@minimum_with_distance.defjvp
def _minimum_with_distance_jvp(primals, tangents):
    # The derivative of `jnp.minimum` would be 1/2 where both are 1.
    return minimum_with_distance(*primals), jnp.where(primals[1] > 0, tangents[0], 0)


def _exp_excluding_without_select(logits, index, labels, top, where):
    # XLA:CPU compiles exponentials and sums that are fused with a select to slow code. The
    # exponentials are at most 1, and |index - label| is below 1 only at the label, so the minimum
    # of the two is 0 there.
    e = jnp.exp(cast_logits(logits, where) - top)
    for label in labels:
        e = minimum_with_distance(e, jnp.abs(index.astype(e.dtype) - label.astype(e.dtype)))
    return e


def _exp_excluding_by_scatter(logits, index, labels, top, where):
    e, axis = jnp.exp(cast_logits(logits, where) - top), index.shape.index(index.size)
    for label in labels:
        e = _put_at_label(e, label, jnp.zeros_like(top), axis)
    return e


def _put_at_label(v: Array, label: Array, entry: Array, axis: int) -> Array:
    """Return `v` with `entry` for the class at the label; unchanged if there is no such class."""
    label = jnp.where(label < 0, v.shape[axis], label)
    return jnp.put_along_axis(v, label, entry, axis, inplace=False, mode="drop")


def exponentials(axis: int, gradient: bool, logits: Array) -> Callable[..., Array]:
    """Return the function of the exponentials on CPUs."""
    num_classes = logits.shape[axis]
    has_rows = axis == logits.ndim - 1 and is_at_most(num_classes, MAX_FLOAT_INDEX)
    if not gradient:
        # The sum is the only use of the exponentials.
        no_select = _exp_excluding_without_select
        return no_select if has_rows else partial(compile_separately, exp_excluding)
    # The sum and the gradient both use the exponentials. XLA:CPU writes them to memory once, into
    # the gradient's buffer. For short rows a select is faster than a scatter.
    if has_rows and not is_at_most(num_classes, _MAX_SELECTED_CLASSES):
        return partial(by_devices, _exp_excluding_by_scatter, _exp_excluding_without_select)
    return exp_excluding


def sums_in_passes(axis: int, gradient: bool, logits: Array, labels: Labels, where) -> ClassSums:
    """Return the class sums by one pass for the maximum and one for the sum."""
    z = cast_logits(logits, where)
    top = max_logit(z, axis)
    args = logits, class_index(logits, axis), labels, top, where
    rest = jnp.sum(exponentials(axis, gradient, logits)(*args), axis, keepdims=True)
    return ClassSums(top, tuple(pick_class(z, x, axis) for x in labels), rest)


def class_sums(axis: int, gradient: bool, logits: Array, labels: Labels, where) -> ClassSums:
    """Return the class sums; `gradient` tells whether the gradient is computed too."""
    return in_blocks(partial(sums_in_passes, axis, gradient), axis, logits, labels, where)


def write_at_labels(
    axis: int, select: Callable[..., Array], dz: Array, labels: Labels, entries: Any
) -> Array:
    """Return the gradient `dz` with the entries for the classes at the labels."""

    def scatter(dz, labels, entries):
        for label, entry in zip(labels, entries):
            dz = _put_at_label(dz, label, entry, axis)
        return dz

    # The gradient of a linear layer with several axes of positions needs a transposed copy of `dz`.
    # XLA:CPU would compute a `dz` of many classes for the copy again, and keep the exponentials.
    scatters = axis == dz.ndim - 1 > 1 and not is_at_most(dz.shape[axis], _MAX_SELECTED_CLASSES)
    form = partial(by_devices, scatter, select) if scatters else select
    return form(dz, labels, entries)
