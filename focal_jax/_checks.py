"""Assertions on what a caller hands in; every message names the argument."""

import numbers
import operator
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

NORMALIZATIONS = ("sum", "none", "mean", "full", "valid", "batch_size")
INT32 = jnp.iinfo(jnp.int32)


class InputError(AssertionError, ValueError, TypeError):
    """An argument that does not fit: what was got and what was wanted.

    chex raises assertion errors, NumPy users expect a `ValueError` for a shape and a
    `TypeError` for a dtype; whichever of them a caller catches, this is one.
    """


def _chex(check, *args, message: str) -> None:
    try:
        check(*args)
    except AssertionError:
        raise InputError(message) from None  # chex's own prefix says nothing to a caller


def _shown(x: Any) -> str:
    """Return a value for a message: what it is where it is short, else its type."""
    text = repr(x)
    return text if len(text) <= 40 else type(x).__name__


def array(name: str, x: Any, wanted: str = "an array of numbers", *, integers: Any = None) -> Array:
    """Return `x` as an array of numbers.

    Integers of 64 bits that come from NumPy or Python saturate at those of 32 where JAX
    has no wider ones: JAX itself would let 2**32 + 1 wrap round to 1, another class. With
    `integers`, a floating dtype, they become that instead.
    """
    if not isinstance(x, Array) and hasattr(x, "__jax_array__"):  # such as a parameter of nnx
        x = x.__jax_array__()
    if not any(isinstance(leaf, Array) for leaf in jax.tree.leaves(x)):
        try:
            x = np.asarray(x)
        except ValueError:  # rows of unequal lengths
            raise InputError(f"{name}: got {_shown(x)}, wanted {wanted}") from None
        if x.dtype.kind in "OSUMm":
            raise InputError(f"{name}: got {_shown(x.tolist())}, wanted {wanted}")
        if x.dtype.kind in "iu" and integers is not None:
            x = x.astype(integers)
        elif (
            x.dtype.kind in "iu" and x.dtype.itemsize == 8 and not jax.config.read("jax_enable_x64")
        ):
            x = x.clip(max(np.iinfo(x.dtype).min, INT32.min), INT32.max).astype(np.int32)
    elif not isinstance(x, list | tuple | Array):
        raise InputError(f"{name}: got {type(x).__name__}, wanted {wanted}")
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        raise InputError(f"{name}: got dtype {x.dtype}, wanted {wanted}")
    return x


def given(name: str, x: Any) -> Any:
    """Return an option that a loss cannot go without."""
    if x is None:
        raise InputError(f"{name}: got None, wanted a number or an array of numbers")
    return x


def saturated(labels: Array) -> Array:
    """Return integers as int32, never another class: what is too wide is the last of them.

    Compared in a narrow dtype they would wrap.
    """
    own, wanted = jnp.iinfo(labels.dtype), INT32
    return labels.clip(max(own.min, wanted.min), min(own.max, wanted.max)).astype(jnp.int32)


def floating(name: str, x: Array) -> None:
    """`x` holds floating-point numbers."""
    message = f"{name}: got dtype {x.dtype}, wanted a floating dtype"
    _chex(chex.assert_type, x, float, message=message)


def integer(name: str, x: Array, hint: str = "") -> None:
    """`x` holds integers (bool is none)."""
    message = f"{name}: got dtype {x.dtype}, wanted an integer dtype{hint}"
    _chex(chex.assert_type, x, int, message=message)


def boolean(name: str, x: Array) -> None:
    """`x` is a mask."""
    _chex(chex.assert_type, x, bool, message=f"{name}: got dtype {x.dtype}, wanted bool")


def real(name: str, x: Array) -> None:
    """`x` holds real numbers of any kind: bool, integer or floating."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise InputError(f"{name}: got dtype {x.dtype}, wanted real numbers")


def shape(name: str, x: Array, wanted: Sequence[int], why: str) -> None:
    """`x` has exactly the shape `wanted`."""
    message = f"{name}: got shape {x.shape}, wanted {tuple(wanted)}: {why}"
    _chex(chex.assert_shape, x, tuple(wanted), message=message)


def broadcastable(name: str, x: Array, to: Sequence[int], what: str) -> None:
    """`x` broadcasts to the shape `to` without enlarging it."""
    message = (
        f"{name}: got shape {x.shape}, wanted one that broadcasts to {tuple(to)}, the shape of "
        f"{what}"
    )
    _chex(chex.assert_is_broadcastable, x.shape, tuple(to), message=message)


def index_shape(labels: Array, logits: Sequence[int], axis: int | None) -> None:
    """`labels` has the logits' shape without the class axis; else say what may be meant."""
    if axis is None:
        return shape("labels", labels, logits, "the shape of the losses")
    wanted = tuple(n for i, n in enumerate(logits) if i != axis)
    hint = ""
    if labels.shape == tuple(logits):
        hint = "; for a distribution over the classes there is softmax_focal_loss"
    else:
        others = [i for i in range(len(logits)) if (*logits[:i], *logits[i + 1 :]) == labels.shape]
        if others:
            hint = f"; the class axis may be {others[0]}: axis={others[0]}"
    shape("labels", labels, wanted, f"the logits' {tuple(logits)} without the class axis{hint}")


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


def axis(value: Any, ndim: int) -> int:
    """Return `value` as a non-negative axis of an array of rank `ndim`."""
    if not isinstance(value, numbers.Integral):
        raise InputError(f"axis: got {_shown(value)}, wanted an integer")
    if not -ndim <= int(value) < ndim:
        raise InputError(
            f"axis: got {value}, wanted one in [{-ndim}, {ndim}) for logits of rank {ndim}"
        )
    return int(value) % ndim


def ignore_label(value: Any) -> int | None:
    """Return `value` as a Python integer that a label can be, or None."""
    if value is None:
        return None
    try:
        label = operator.index(value)
    except Exception:  # a float, a string, a traced array: each has its own error
        raise InputError(f"ignore_label: got {_shown(value)}, wanted None or an integer") from None
    if not INT32.min <= label <= INT32.max:
        raise InputError(f"ignore_label: got {label}, wanted an integer of 32 bits")
    return label


def static_exponent(name: str, value: numbers.Real) -> None:
    """A Python exponent is a finite number, zero or more, and so in float32 too."""
    if not 0 <= value <= float(jnp.finfo(jnp.float32).max):  # type: ignore[operator]
        raise InputError(f"{name}: got {_shown(value)}, wanted a finite number >= 0")


def flag(name: str, value: Any) -> bool:
    """Return `value`, which is True or False of Python's own."""
    if not isinstance(value, bool):
        raise InputError(f"{name}: got {_shown(value)}, wanted True or False")
    return value


def axis_name(name: str, value: Any) -> Any:
    """`value` names one mapped axis or several, or is None: a number would be a place."""
    names = value if isinstance(value, tuple | list) else (value,)
    if any(isinstance(each, int) for each in names):
        raise InputError(f"{name}: got {_shown(value)}, wanted the name of a mapped axis, or None")
    return value


def static_margin(name: str, value: numbers.Real) -> None:
    """A Python margin is at least 0 and less than 1."""
    if not 0 <= float(value) < 1:
        raise InputError(f"{name}: got {value}, wanted a number in [0, 1)")


def static_stretch(name: str, value: numbers.Real | float) -> None:
    """A Python number to divide by is finite and above 0."""
    float32 = jnp.finfo(jnp.float32)
    if not float32.tiny <= float(value) <= float32.max:
        raise InputError(f"{name}: got {value}, wanted a finite number > 0, of float32 too")


def _number(value: Any) -> float | None:
    """Return a real number of Python's, None for anything else."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(value) if real else None


def label_smoothing(value: Any) -> float:
    """Return `value` as a Python number in [0, 1)."""
    number = _number(value)
    if number is None or not 0 <= number < 1:
        raise InputError(f"label_smoothing: got {_shown(value)}, wanted a number in [0, 1)")
    return number


def logit_softcap(value: Any) -> float | None:
    """Return `value` as a Python number that can be divided by, or None."""
    if value is None:
        return None
    number = _number(value)
    if number is None:
        raise InputError(f"logit_softcap: got {_shown(value)}, wanted None or a number")
    static_stretch("logit_softcap", number)
    return number
