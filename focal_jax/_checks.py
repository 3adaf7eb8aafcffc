"""Assertions on what a caller hands in; every message names the argument."""

import numbers
from collections.abc import Sequence

import chex
import jax.numpy as jnp
from jax import Array

NORMALIZATIONS = ("sum", "none", "mean", "full", "valid", "batch_size")


class InputError(AssertionError, ValueError, TypeError):
    """An argument that does not fit: what was got and what was wanted.

    chex raises assertion errors, NumPy users expect a `ValueError` for a shape and a
    `TypeError` for a dtype; whichever of them a caller catches, this is one.
    """


def _chex(check, *args, message: str) -> None:
    check(*args, custom_message=message, include_default_message=False, exception_type=InputError)


def floating(name: str, x: Array) -> None:
    """`x` holds floating-point numbers."""
    _chex(
        chex.assert_type,
        x,
        float,
        message=f"{name}: got dtype {x.dtype}, wanted a floating dtype",
    )


def integer(name: str, x: Array) -> None:
    """`x` holds integers (bool is none)."""
    _chex(
        chex.assert_type,
        x,
        int,
        message=f"{name}: got dtype {x.dtype}, wanted an integer dtype",
    )


def boolean(name: str, x: Array) -> None:
    """`x` is a mask."""
    _chex(chex.assert_type, x, bool, message=f"{name}: got dtype {x.dtype}, wanted bool")


def real(name: str, x: Array) -> None:
    """`x` holds real numbers of any kind: bool, integer or floating."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise InputError(f"{name}: got dtype {x.dtype}, wanted real numbers")


def shape(name: str, x: Array, wanted: Sequence[int], why: str) -> None:
    """`x` has exactly the shape `wanted`."""
    _chex(
        chex.assert_shape,
        x,
        tuple(wanted),
        message=f"{name}: got shape {x.shape}, wanted {tuple(wanted)}: {why}",
    )


def broadcastable(name: str, x: Array, to: Sequence[int], what: str) -> None:
    """`x` broadcasts to the shape `to` without enlarging it."""
    _chex(
        chex.assert_is_broadcastable,
        x.shape,
        tuple(to),
        message=(
            f"{name}: got shape {x.shape}, wanted one that broadcasts to "
            f"{tuple(to)}, the shape of {what}"
        ),
    )


def class_weights(alpha: Array, classes: int) -> None:
    """`alpha` is a scalar or has one weight per class."""
    if alpha.shape not in ((), (classes,)):
        raise InputError(
            f"alpha: got shape {alpha.shape}, wanted a scalar or ({classes},), one weight per class"
        )


def normalization(value: str | None, losses: Array) -> None:
    """`value` names a divisor that the losses have."""
    if value not in NORMALIZATIONS:
        raise InputError(
            f"normalization: got {value!r}, wanted one of {NORMALIZATIONS}, a number or a "
            "scalar array"
        )
    if value == "batch_size" and not losses.ndim:
        raise InputError(
            "normalization: got 'batch_size' for losses of shape (), wanted losses with a "
            "batch axis"
        )


def axis(value: int, ndim: int) -> int:
    """Return `value` as a non-negative axis of an array of rank `ndim`."""
    if not isinstance(value, numbers.Integral):
        raise InputError(f"axis: got {value!r}, wanted an integer")
    if not -ndim <= value < ndim:
        raise InputError(
            f"axis: got {value}, wanted one in [{-ndim}, {ndim}) for logits of rank {ndim}"
        )
    return int(value) % ndim


def static_gamma(value: numbers.Real) -> None:
    """A Python `gamma` is a finite number, zero or more."""
    if not 0 <= float(value) < float("inf"):
        raise InputError(f"gamma: got {value}, wanted a finite number >= 0")
