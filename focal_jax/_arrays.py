"""What every head does to its arrays before and after the mathematics."""

import numbers
import operator
from typing import TypeGuard

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _checks


def compute_dtype(logits: Array) -> jnp.dtype:
    """Return the dtype of the loss: float32 for 16-bit logits, else the logits' own."""
    return logits.dtype if logits.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def option(name: str, x: ArrayLike, dtype: jnp.dtype) -> Array:
    """Return a numeric option as a floating array: its own dtype, or `dtype` if it has none."""
    if isinstance(x, numbers.Real):
        return jnp.asarray(x, dtype)
    x = jnp.asarray(x)
    _checks.real(name, x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)


def split_gamma(
    gamma: ArrayLike, losses: tuple[int, ...], dtype: jnp.dtype
) -> tuple[int | float | None, Array | None]:
    """Return gamma as (Python number, None) or (None, array): static, or differentiable.

    A Python number that is whole becomes an int, which is an integer power later.
    """
    if isinstance(gamma, numbers.Real):
        _checks.static_gamma(gamma)
        exponent = float(gamma)
        return (int(exponent) if exponent.is_integer() else exponent), None
    gamma = option("gamma", gamma, dtype)
    _checks.broadcastable("gamma", gamma, losses, "the losses")
    return None, gamma


def gamma_of(
    exponent: int | float | None, dynamic: Array | None, dtype: jnp.dtype
) -> int | float | Array:
    """Return the gamma that `split_gamma` split, an array in the dtype of the loss."""
    if exponent is not None:
        return exponent
    assert dynamic is not None
    return dynamic.astype(dtype)


def int32_labels(labels: ArrayLike, losses: tuple[int, ...]) -> Array:
    """Return integer labels checked, as int32: compared in a narrow dtype they would wrap.

    The cast saturates, so that no wide label can turn into another class.
    """
    labels = jnp.asarray(labels)
    _checks.integer("labels", labels)
    _checks.shape("labels", labels, losses, "the logits' without the class axis")
    own, wanted = jnp.iinfo(labels.dtype), jnp.iinfo(jnp.int32)
    return labels.clip(max(own.min, wanted.min), min(own.max, wanted.max)).astype(jnp.int32)


def not_ignored(labels: Array, ignore_label: int | None, where: Array | None) -> Array | None:
    """Return the mask `where` without the positions that have the label to ignore."""
    if ignore_label is None:
        return where
    counts = labels != operator.index(ignore_label)
    return counts if where is None else counts & where


def mask(where: ArrayLike | None, losses: tuple[int, ...]) -> Array | None:
    """Return `where` checked: a bool array that broadcasts to the losses, or None."""
    if where is None:
        return None
    where = jnp.asarray(where)
    _checks.boolean("where", where)
    _checks.broadcastable("where", where, losses, "the losses")
    return where


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


def differentiable(x: Array | None) -> TypeGuard[Array]:
    """Return whether `x` is there and is floating."""
    return x is not None and jnp.issubdtype(x.dtype, jnp.floating)


def cotangent_of(primal: Array | None, ct: Array, where: Array | None) -> Array | None:
    """Return `ct` as a cotangent of `primal`: 0 where masked, its shape, its dtype.

    None for integers. JAX takes a cotangent of another dtype without a word and fails far
    away.
    """
    if not differentiable(primal):
        return None
    ct = keep(ct, where)
    repeated = tuple(i for i, n in enumerate(primal.shape) if n == 1 and ct.shape[i] != 1)
    total = jnp.sum(ct, axis=repeated, keepdims=True) if repeated else ct
    return total.astype(primal.dtype)
