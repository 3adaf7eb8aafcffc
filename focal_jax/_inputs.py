"""What every head does to its arguments, and to the cotangents that it returns for them."""

import dataclasses
import numbers
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _checks


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Exponent:
    """An exponent. A Python number is structure, so that a whole one is a product of factors.

    An array is a leaf of this tree: there to be traced, mapped and differentiated.
    """

    value: int | float | Array

    def tree_flatten(self):
        """Return the leaves, and what is structure."""
        static = isinstance(self.value, int | float)
        return ((), self.value) if static else ((self.value,), None)

    @classmethod
    def tree_unflatten(cls, number, leaves):
        """Return what `tree_flatten` took apart."""
        return cls(*leaves) if number is None else cls(number)


def exponent(name: str, x: ArrayLike) -> Exponent:
    """Return an exponent, checked where it is a Python number; a whole number becomes an int."""
    if isinstance(x, numbers.Real):
        _checks.static_exponent(name, x)
        number = float(x)
        whole = number.is_integer() and number <= _checks.INT32.max
        return Exponent(int(number) if whole else number)
    return Exponent(_checks.array(name, x, "a number >= 0 or an array of such"))


def compute_dtype(logits: Array) -> jnp.dtype:
    """Return the dtype of the loss: float32 for 16-bit logits, else the logits' own."""
    return logits.dtype if logits.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def floating(name: str, x: ArrayLike) -> Array:
    """Return `x` as an array, checked to be floating."""
    x = _checks.array(name, x, "an array of floating numbers")
    _checks.floating(name, x)
    return x


def option(name: str, x: ArrayLike | Sequence[float], dtype: jnp.dtype) -> Array:
    """Return a numeric option as a floating array: its own dtype, or `dtype` if it has none."""
    if isinstance(x, numbers.Real):
        return jnp.asarray(float(x), dtype)
    x = _checks.array(name, x, "a number or an array of numbers", integers=dtype)
    _checks.real(name, x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)


def mask(where: ArrayLike | None, losses: tuple[int, ...], name: str = "where") -> Array | None:
    """Return a mask checked: a bool array that broadcasts to the losses, or None."""
    if where is None:
        return None
    where = _checks.array(name, where, "an array of bool")
    _checks.boolean(name, where)
    _checks.broadcastable(name, where, losses, "the losses")
    return where


def aligned_mask(
    where: ArrayLike | None, losses: tuple[int, ...], axis: int | None = None
) -> Array | None:
    """Return the mask `where` checked, and aligned with the logits; or None."""
    where = mask(where, losses)
    return None if where is None else aligned(where, losses, axis)


def options(
    given: dict[str, Any], losses: tuple[int, ...], dtype: jnp.dtype, axis: int | None = None
) -> tuple[Any, ...]:
    """Return the options of a loss as trees of arrays that are aligned with the losses.

    Each is None, an `Exponent`, a number or an array, and broadcasts to the losses. A mask
    stays a mask, in which nothing is differentiated.
    """

    def prepared(name, leaf):
        if not (isinstance(leaf, Array) and leaf.dtype == jnp.bool_):
            leaf = option(name, leaf, dtype)
        _checks.broadcastable(name, leaf, losses, "the losses")
        return aligned(leaf, losses, axis)

    # An exponent is a tree. All else is an array to be, or what an error is about.
    mapped = partial(jax.tree.map, is_leaf=lambda x: x is not None and not isinstance(x, Exponent))
    return tuple(mapped(partial(prepared, name), tree) for name, tree in given.items())


def class_weights(alpha: ArrayLike | None, classes: int, dtype: jnp.dtype) -> Array:
    """Return alpha checked: a scalar, 1 in place of None, or one weight per class."""
    alpha = option("alpha", 1.0 if alpha is None else alpha, dtype)
    _checks.class_weights(alpha, classes)
    return alpha


def int32_labels(labels: ArrayLike, logits: tuple[int, ...], axis: int | None = None) -> Array:
    """Return class indices checked, as int32.

    They have the shape of the logits without the class axis; with no axis, all of the shape.
    """
    labels = _checks.array("labels", labels, "an array of integers")
    distribution = labels.shape == logits and axis is not None
    hint = ": softmax_focal_loss takes a distribution over the classes" if distribution else ""
    _checks.integer("labels", labels, hint)
    _checks.index_shape(labels, logits, axis)
    return _checks.saturated(labels)


def not_ignored(labels: Array, ignore_label: int | None, where: Array | None) -> Array | None:
    """Return the mask `where` without the positions that have the label to ignore."""
    ignore_label = _checks.ignore_label(ignore_label)
    if ignore_label is None:
        return where
    counts = labels != ignore_label
    return counts if where is None else counts & where


def aligned(x: Array, losses: tuple[int, ...], axis: int | None = None) -> Array:
    """Give `x` the rank of the logits, with sizes of 1 where it is to broadcast.

    `x` broadcasts to the losses; `axis` is where the logits have the class axis that the
    losses lack. Nothing is copied out to the full size.
    """
    x = x.reshape((1,) * (len(losses) - x.ndim) + x.shape)
    return x if axis is None else jnp.expand_dims(x, axis)


def keep(x: Array, where: Array | None) -> Array:
    """Return `x` where the mask is True and 0, whatever `x` holds, where it is False."""
    return x if where is None else jnp.where(where, x, 0)


class Kept(NamedTuple):
    """Trees of arrays as the mathematics takes them: in one dtype, and 0 where masked.

    Masks come first, so that nothing behind them can be NaN: what is 0 only at the end has
    NaN for a derivative.
    """

    dtype: jnp.dtype
    where: Array | None

    def __call__(self, tree: Any) -> Any:
        """Return the tree's leaves in the dtype, 0 where the mask is False."""
        return jax.tree.map(lambda leaf: keep(leaf.astype(self.dtype), self.where), tree)


def differentiable(x: Array | None) -> TypeGuard[Array]:
    """Return whether `x` is there and is floating."""
    return x is not None and jnp.issubdtype(x.dtype, jnp.floating)


def finished(result: Array, impossible: Array, where: Array | None) -> Array:
    """Return losses or slopes with NaN for the impossible labels, and 0 where masked."""
    return keep(jnp.where(impossible, jnp.nan, result), where)


def times(ct: Array, slope: Array) -> Array:
    """Return a cotangent times a slope, and 0 where a cotangent of 0 meets a slope that is NaN.

    An impossible label makes the slope NaN, which is loud, and never another class. But where
    the cotangent is 0 nobody uses the loss, and its label may be anything.
    """
    return ct * jnp.where((ct == 0) & jnp.isnan(slope), 0, slope)


def cotangent_of(primal: Array, ct: Array) -> Array | None:
    """Return `ct` as a cotangent of `primal`: summed to its shape, cast to its dtype.

    None for integers. JAX takes a cotangent of another dtype without a word and fails far
    away.
    """
    if not differentiable(primal):
        return None
    repeated = tuple(i for i, n in enumerate(primal.shape) if n == 1 and ct.shape[i] != 1)
    total = jnp.sum(ct, axis=repeated, keepdims=True) if repeated else ct
    return total.astype(primal.dtype)
