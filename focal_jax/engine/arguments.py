"""Checks and conversions of arguments, and conversions of cotangents.

Error messages have the form `name: got ..., wanted ...`.
"""

import contextlib
import numbers
import operator
from collections.abc import Sequence
from typing import Any, TypeGuard

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

INT32 = jnp.iinfo(jnp.int32)


class InputError(AssertionError, ValueError, TypeError):
    """An argument is invalid. The message says what was got and what was wanted.

    The class derives from three exceptions because callers expect different ones: chex raises
    `AssertionError`, NumPy raises `ValueError` for a shape and `TypeError` for a dtype.
    """


# ---------------------------------------------------------------- arrays


def as_array(
    name: str, x: Any, wanted: str = "an array of numbers", *, integers: Any = None
) -> Array:
    """Return `x` as a JAX array of numbers.

    Without `jax_enable_x64`, JAX converts 64-bit integers to 32 bits by wrapping: 2**32 + 1
    becomes 1, another class. Here 64-bit integers of NumPy and Python saturate instead. With
    `integers`, a floating dtype, integers are converted to that dtype.
    """
    if not isinstance(x, Array) and hasattr(x, "__jax_array__"):  # such as an nnx.Param
        x = x.__jax_array__()
    if not any(isinstance(leaf, Array) for leaf in jax.tree.leaves(x)):
        try:
            x = np.asarray(x)
        except ValueError:  # a ragged list
            raise InputError(f"{name}: got {shown(x)}, wanted {wanted}") from None
        if x.dtype.kind in "OSUMm":
            raise InputError(f"{name}: got {shown(x.tolist())}, wanted {wanted}")
        if x.dtype.kind in "iu" and integers is not None:
            x = x.astype(integers)
        elif (
            x.dtype.kind in "iu" and x.dtype.itemsize == 8 and not jax.config.read("jax_enable_x64")
        ):
            x = x.clip(max(np.iinfo(x.dtype).min, INT32.min), INT32.max).astype(np.int32)
    elif not isinstance(x, list | tuple | Array):
        raise InputError(f"{name}: got {type(x).__name__}, wanted {wanted}")
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError):  # a list of JAX arrays of several shapes
        raise InputError(f"{name}: got {shown(x)}, wanted {wanted}") from None
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        raise InputError(f"{name}: got dtype {x.dtype}, wanted {wanted}")
    return x


def floating_array(name: str, x: ArrayLike) -> Array:
    """Return `x` as an array of a floating dtype."""
    x = as_array(name, x, "an array of floating numbers")
    message = f"{name}: got dtype {x.dtype}, wanted a floating dtype"
    _chex(chex.assert_type, x, float, message=message)
    return x


def real_array(name: str, x: ArrayLike) -> Array:
    """Return `x` as an array of real numbers: bool, integer or floating."""
    x = as_array(name, x)
    check_real(name, x)
    return x


def number_array(
    name: str, x: Any, dtype: jnp.dtype, wanted: str = "a number or an array of numbers"
) -> Array:
    """Return a number or an array of numbers as a floating array.

    Floating arrays keep their dtype. Python numbers and integers get `dtype`.
    """
    if isinstance(x, numbers.Real):
        with contextlib.suppress(OverflowError):  # `as_array` names the argument
            return jnp.asarray(float(x), dtype)
    x = as_array(name, x, wanted, integers=dtype)
    check_real(name, x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)


def mask_array(
    where: ArrayLike | None, losses: tuple[int, ...], axis: int | None = None, name: str = "where"
) -> Array | None:
    """Return a bool mask that broadcasts to the losses, aligned with the logits; or None."""
    if where is None:
        return None
    where = as_array(name, where, "an array of bool")
    message = f"{name}: got dtype {where.dtype}, wanted bool"
    _chex(chex.assert_type, where, bool, message=message)
    check_broadcastable(name, where, losses, "the losses")
    return align(where, losses, axis)


def integer_labels(labels: ArrayLike, logits: tuple[int, ...], axis: int | None = None) -> Array:
    """Return class indices as int32.

    Their shape is that of the logits without the class axis; or, with `axis=None`, of `logits`.
    """
    labels = as_array("labels", labels, "an array of integers")
    is_distribution = labels.shape == logits and axis is not None
    hint = ": softmax_focal_loss takes a distribution over the classes" if is_distribution else ""
    check_integer("labels", labels, hint)
    check_label_shape(labels, logits, axis)
    return saturate_int32(labels)


def saturate_int32(labels: Array) -> Array:
    """Return integers as int32; values that do not fit become the nearest int32 value.

    A comparison in a narrower dtype would wrap and match a wrong class.
    """
    own, int32 = jnp.iinfo(labels.dtype), INT32
    return labels.clip(max(own.min, int32.min), min(own.max, int32.max)).astype(jnp.int32)


def class_weights(alpha: ArrayLike | None, num_classes: int, dtype: jnp.dtype) -> Array:
    """Return alpha as an array: a scalar (1 for None), or one weight per class."""
    alpha = number_array("alpha", 1.0 if alpha is None else alpha, dtype)
    if alpha.shape not in ((), (num_classes,)):
        raise InputError(
            f"alpha: got shape {alpha.shape}, wanted a scalar or ({num_classes},), one weight "
            "per class"
        )
    return alpha


# ---------------------------------------------------------------- checks of arrays


def _chex(check: Any, *args: Any, message: str) -> None:
    """Run a chex assertion; its own message becomes the cause of the `InputError`."""
    try:
        check(*args)
    except AssertionError as error:
        raise InputError(message) from error


def check_integer(name: str, x: Array, hint: str = "") -> None:
    """Raise unless `x` has an integer dtype. bool is not an integer dtype here."""
    message = f"{name}: got dtype {x.dtype}, wanted an integer dtype{hint}"
    _chex(chex.assert_type, x, int, message=message)


def check_real(name: str, x: Array) -> None:
    """Raise unless `x` is bool, integer or floating."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise InputError(f"{name}: got dtype {x.dtype}, wanted real numbers")


def check_holds_class(name: str, x: Array, largest: Any) -> None:
    """Raise if `x` is a floating array of fewer than 32 bits that rounds large class indices."""
    if x.dtype.itemsize < 4 and jnp.issubdtype(x.dtype, jnp.floating):
        limit = 2 ** (jnp.finfo(x.dtype).nmant + 1)  # all integers up to this one are exact
        if largest >= limit:  # the next index rounds to this one
            raise InputError(
                f"{name}: got dtype {x.dtype}, wanted float32 or an integer dtype: {x.dtype} "
                f"rounds integers above {limit}, and there is a class {largest:g}"
            )


def check_shape(name: str, x: Array, wanted: Sequence[int], why: str) -> None:
    """Raise unless `x` has exactly the shape `wanted`."""
    message = f"{name}: got shape {x.shape}, wanted {tuple(wanted)}: {why}"
    _chex(chex.assert_shape, x, tuple(wanted), message=message)


def check_broadcastable(name: str, x: Array, to: Sequence[int], what: str) -> None:
    """Raise unless `x` broadcasts to the shape `to` without enlarging it."""
    message = (
        f"{name}: got shape {x.shape}, wanted a shape that broadcasts to {tuple(to)}, the shape "
        f"of {what}"
    )
    _chex(chex.assert_is_broadcastable, x.shape, tuple(to), message=message)


def check_label_shape(labels: Array, logits: Sequence[int], axis: int | None) -> None:
    """Raise, with a hint, unless `labels` has the logits' shape without the class axis."""
    if axis is None:
        return check_shape("labels", labels, logits, "the shape of the losses")
    wanted = tuple(n for i, n in enumerate(logits) if i != axis)
    hint = ""
    if labels.shape == tuple(logits):
        hint = "; softmax_focal_loss takes a distribution over the classes"
    else:
        others = [i for i in range(len(logits)) if (*logits[:i], *logits[i + 1 :]) == labels.shape]
        if others:
            hint = f"; the class axis may be {others[0]}: axis={others[0]}"
    why = f"the shape of the logits, {tuple(logits)}, without the class axis{hint}"
    check_shape("labels", labels, wanted, why)


# ---------------------------------------------------------------- static arguments


def shown(x: Any) -> str:
    """Return `repr(x)` for an error message, or the type's name if that is long."""
    text = repr(x)
    return text if len(text) <= 40 else type(x).__name__


def static_axis(value: Any, ndim: int) -> int:
    """Return `value` as a non-negative axis of an array of rank `ndim`."""
    if not isinstance(value, numbers.Integral):
        raise InputError(f"axis: got {shown(value)}, wanted an integer")
    if not -ndim <= int(value) < ndim:
        raise InputError(
            f"axis: got {value}, wanted an axis in [{-ndim}, {ndim}) for logits of rank {ndim}"
        )
    return int(value) % ndim


def static_ignore_label(value: Any) -> int | None:
    """Return `value` as a Python integer that fits int32, or None."""
    if value is None:
        return None
    try:
        label = operator.index(value)
    except Exception:  # floats, strings and tracers each raise a different exception
        raise InputError(f"ignore_label: got {shown(value)}, wanted None or an integer") from None
    if not INT32.min <= label <= INT32.max:
        raise InputError(f"ignore_label: got {label}, wanted an integer of 32 bits")
    return label


def static_bool(name: str, value: Any) -> bool:
    """Return `value`, which has to be a Python bool."""
    if not isinstance(value, bool):
        raise InputError(f"{name}: got {shown(value)}, wanted True or False")
    return value


def check_axis_name(name: str, value: Any) -> None:
    """Raise if `value` is a number, which JAX would take for a positional axis."""
    names = value if isinstance(value, tuple | list) else (value,)
    if any(isinstance(each, int) for each in names):
        raise InputError(f"{name}: got {shown(value)}, wanted the name of a mapped axis, or None")


def _real_number(value: Any) -> float | None:
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(value) if is_real else None


def static_label_smoothing(value: Any) -> float:
    """Return `value` as a Python number in [0, 1)."""
    number = _real_number(value)
    if number is None or not 0 <= number < 1:
        raise InputError(f"label_smoothing: got {shown(value)}, wanted a number in [0, 1)")
    return number


def static_logit_softcap(value: Any) -> float | None:
    """Return `value` as a finite positive Python number, or None."""
    if value is None:
        return None
    number, float32 = _real_number(value), jnp.finfo(jnp.float32)
    if number is None:
        raise InputError(f"logit_softcap: got {shown(value)}, wanted None or a number")
    if not float32.tiny <= number <= float32.max:
        raise InputError(
            f"logit_softcap: got {value}, wanted a finite number > 0 that is a normal float32"
        )
    return number


# ---------------------------------------------------------------- dtypes, ranks, masks


def compute_dtype(logits: Array) -> jnp.dtype:
    """Return the dtype of the loss: float32 for 16-bit logits, else the logits' dtype."""
    return logits.dtype if logits.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def align(x: Array, losses: tuple[int, ...], axis: int | None = None) -> Array:
    """Give `x` the rank of the logits by adding axes of size 1.

    `x` broadcasts to the shape `losses`; `axis` is the class axis that the logits have and the
    losses do not. Nothing is copied to the full size.
    """
    x = x.reshape((1,) * (len(losses) - x.ndim) + x.shape)
    return x if axis is None else jnp.expand_dims(x, axis)


def mask_to_zero(x: Array, where: Array | None) -> Array:
    """Return `x` with 0 where the mask is False, whatever `x` holds there."""
    return x if where is None else jnp.where(where, x, 0)


def cast_and_mask(tree: Any, dtype: jnp.dtype, where: Array | None) -> Any:
    """Return the leaves of a tree in `dtype`, with 0 where the mask is False.

    The mask is applied to the inputs and not only to the result: a NaN that is masked only at
    the end has a NaN derivative.
    """
    return jax.tree.map(lambda leaf: mask_to_zero(leaf.astype(dtype), where), tree)


def not_ignored(labels: Array, ignore_label: int | None, where: Array | None) -> Array | None:
    """Return the mask `where`, False also where the label is `ignore_label`."""
    ignore_label = static_ignore_label(ignore_label)
    if ignore_label is None:
        return where
    valid = labels != ignore_label
    return valid if where is None else valid & where


def mask_and_invalidate(x: Array, invalid: Array, where: Array | None) -> Array:
    """Return losses or slopes with NaN for invalid labels, and 0 where masked."""
    return mask_to_zero(jnp.where(invalid, jnp.nan, x), where)


# ---------------------------------------------------------------- cotangents


def is_differentiable(x: Array | None) -> TypeGuard[Array]:
    """Return whether `x` is a floating array."""
    return x is not None and jnp.issubdtype(x.dtype, jnp.floating)


def scale_cotangent(ct: Array, slope: Array) -> Array:
    """Return `ct * slope`, and 0 where a zero cotangent meets a NaN slope.

    The slope of an invalid label is NaN. A loss with a zero cotangent is not used, so its label
    may be invalid.
    """
    return ct * jnp.where((ct == 0) & jnp.isnan(slope), 0, slope)


def cotangent_like(primal: Array, ct: Array) -> Array | None:
    """Return `ct` summed to the shape of `primal` and cast to its dtype; None for integers.

    JAX accepts a cotangent of another dtype silently and fails later, far from the cause.
    """
    if not is_differentiable(primal):
        return None
    # Also over axes of size 1: XLA:CPU adds `[n, 1]` along the first axis in long chains.
    repeated = tuple(i for i, n in enumerate(primal.shape) if n == 1)
    return jnp.sum(ct, axis=repeated, keepdims=True).astype(primal.dtype)
