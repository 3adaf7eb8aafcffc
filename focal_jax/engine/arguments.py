"""Checks and conversions of arguments, and conversions of cotangents.

Error messages have the form `name: got ..., wanted ...`.
"""

import math
import numbers
import operator
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeGuard

import chex
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

INT32 = jnp.iinfo(jnp.int32)
_NUMBERS = "a number or an array of numbers"


class InputError(AssertionError, ValueError, TypeError):
    """An argument is invalid. The message names the argument, its value and the valid values.

    The class derives from three exceptions because callers expect different ones: chex raises
    `AssertionError`, NumPy raises `ValueError` for a shape and `TypeError` for a dtype.
    """

    __module__ = "focal_jax"  # the public name in tracebacks


# ---------------------------------------------------------------- arrays


def is_masked(x: Any) -> bool:
    """Return whether `x` is a masked array of NumPy, or a list that contains one."""
    return any(isinstance(leaf, np.ma.MaskedArray) for leaf in jax.tree.leaves(x))


def numpy_array(name: str, x: Any, wanted: str) -> np.ndarray | None:
    """Return `x` as a NumPy array of numbers; None for a JAX array or a list with traced ones."""
    if hasattr(x, "__jax_array__"):
        return None
    try:
        masked, leaves = is_masked(x), jax.tree.leaves(x)
        is_known = not any(isinstance(leaf, jax.core.Tracer) for leaf in [x, *leaves])
        array = np.asarray(x) if is_known and not (masked or isinstance(x, Array)) else None
    except Exception:  # a ragged list, or an object that is not an array
        raise InputError(f"{name}: got {shown(x)}, wanted {wanted}") from None
    if masked:  # NumPy and JAX would ignore the mask
        raise InputError(
            f"{name}: got a masked array of NumPy, wanted an array without a mask: `.filled()` "
            "replaces the masked entries, and `where=~mask` masks the losses"
        )
    if array is None and not isinstance(x, list | tuple | Array):
        raise InputError(f"{name}: got {type(x).__name__}, wanted {wanted}")
    if array is not None and not array.dtype.isnative:  # JAX has no other byte order
        array = array.astype(array.dtype.newbyteorder("="))
    if isinstance(x, bytearray | memoryview) or (array is not None and array.dtype.kind in "OSUMm"):
        raise InputError(f"{name}: got {shown(x)}, wanted {wanted}")
    return array


def as_array(
    name: str,
    x: Any,
    wanted: str = "an array of numbers",
    *,
    integers: Any = None,
    ignore_label: int | None = None,
) -> Array:
    """Return `x` as a JAX array of numbers.

    Without `jax_enable_x64`, JAX converts 64-bit integers to 32 bits by wrapping: 2**32 + 1
    becomes 1, another class. Here they are converted by `as_int32`. With `integers`, a floating
    dtype, integers are converted to that dtype.
    """
    if not isinstance(x, Array) and hasattr(x, "__jax_array__"):  # such as an nnx.Param
        x = x.__jax_array__()
    array = numpy_array(name, x, wanted)
    if array is not None and array.dtype.kind in "iu":
        if integers is not None:
            array = array.astype(integers)
        elif array.dtype.itemsize == 8 and not jax.config.read("jax_enable_x64"):
            array = as_int32(array, ignore_label)
    try:
        with jax.debug_nans(False):  # a mask may be applied later
            x = jnp.asarray(x if array is None else array)
    except (TypeError, ValueError):  # a dtype that JAX does not have, or arrays of several shapes
        raise InputError(f"{name}: got {shown(x)}, wanted {wanted}") from None
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        raise InputError(f"{name}: got dtype {x.dtype}, wanted {wanted}")
    return x


def floating_array(name: str, x: ArrayLike) -> Array:
    """Return `x` as an array of a floating dtype."""
    x = as_array(name, x, "an array of floating numbers")
    _check_dtype(name, x, jnp.floating, "a floating dtype", float)
    return x


def real_array(name: str, x: ArrayLike) -> Array:
    """Return `x` as an array of real numbers: bool, integer or floating."""
    x = as_array(name, x)
    check_real(name, x)
    return x


def number_array(
    name: str, x: Any, dtype: jnp.dtype, wanted: str = _NUMBERS, allow_bool: bool = False
) -> Array:
    """Return a number or an array of numbers as a floating array.

    Floating arrays keep their dtype. Python numbers and integers get `dtype`.
    """
    number = real_number(x)
    if number is not None:
        return jnp.asarray(number, dtype)
    require(not isinstance(x, bool | np.bool_), f"{name}: got {shown(x)}, wanted {wanted}")
    x = as_array(name, x, wanted, integers=dtype)
    check_real(name, x)
    require(allow_bool or x.dtype != bool, f"{name}: got dtype bool, wanted {wanted}")
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)


def bool_array(name: str, x: ArrayLike) -> Array:
    """Return `x` as an array of bool."""
    x = as_array(name, x, "an array of bool")
    _check_dtype(name, x, np.bool_, "bool", bool)
    return x


def mask_array(
    where: ArrayLike | None, losses: tuple[int, ...], axis: int | None = None, name: str = "where"
) -> Array | None:
    """Return a bool mask that broadcasts to the losses, aligned with the logits; or None."""
    if where is None:
        return None
    where = bool_array(name, where)
    check_broadcastable(name, where, losses, "the losses")
    check_unambiguous(name, where, losses, losses[: where.ndim], "the batch")
    return align(where, losses, axis)


def integer_labels(
    labels: ArrayLike,
    logits: tuple[int, ...],
    axis: int | None = None,
    ignore_label: int | None = None,
) -> Array:
    """Return class indices as int32.

    Their shape is that of the logits without the class axis; or, with `axis=None`, of `logits`.
    """
    ignore_label = static_ignore_label(ignore_label)
    labels = as_array("labels", labels, "an array of integers", ignore_label=ignore_label)
    is_distribution = labels.shape == logits and axis is not None
    hint = ": softmax_focal_loss takes a distribution over the classes" if is_distribution else ""
    check_integer("labels", labels, hint)
    check_label_shape(labels, logits, axis)
    if axis is not None:
        warn_of_one_class(logits[axis])
    return as_int32(labels, ignore_label)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _clip_with_slope_one(y: Array, high: Any) -> Array:
    return jnp.where(y >= 0, jnp.minimum(y, high), 0)


@_clip_with_slope_one.defjvp
def _clip_with_slope_one_jvp(high, primals, tangents):
    return _clip_with_slope_one(*primals, high), tangents[0]


def clip_labels(labels: Array, y: Array, high: Any) -> tuple[Array, Array]:
    """Return `y`, which is `labels` in the dtype of the loss, in [0, high]; and the invalid labels.

    A floating label that is outside by at most four roundings counts as the bound: interpolated
    masks and averaged votes have such labels. The derivative is that at the bound.
    """
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        invalid = jnp.array(False) if labels.dtype == bool else (y < 0) | (y > high)
        return jnp.where(invalid, 0, y), invalid
    tolerance = 4 * float(max(jnp.finfo(x).eps for x in (labels.dtype, jnp.float32)))
    largest = jnp.asarray(high, y.dtype) * (1 + tolerance)  # `high` may be a symbolic dimension
    return _clip_with_slope_one(y, high), ~((y >= -tolerance) & (y <= largest))


def as_int32(labels: Any, ignore_label: int | None = None) -> Any:
    """Return integers of NumPy or JAX as int32.

    A comparison in a narrower dtype would wrap and match a wrong class. An integer that does not
    fit becomes an invalid class that is not `ignore_label`.
    """
    own, where = jnp.iinfo(labels.dtype), jnp.where if isinstance(labels, Array) else np.where
    low, high = max(own.min, INT32.min), min(own.max, INT32.max)
    if (low, high) == (own.min, own.max):
        return labels.astype(np.int32)
    fits = (labels >= low) & (labels <= high)
    return where(fits, labels.astype(np.int32), INT32.min + (ignore_label == INT32.min))


def warn_of_one_class(num_classes: int) -> None:
    """Warn if a softmax has one class; of sharded classes, all shards count."""
    if num_classes == 1:
        message = "logits: got one class, whose softmax is 1: loss and gradient are 0; wanted two "
        message += "classes, or a loss of one logit such as sigmoid_focal_loss"
        warnings.warn(message, stacklevel=2)


def class_weights(alpha: ArrayLike | None, num_classes: int, dtype: jnp.dtype) -> Array:
    """Return alpha as an array: a scalar (1 for None), or one weight per class."""
    alpha = number_array("alpha", 1.0 if alpha is None else alpha, dtype)
    wanted = f"a scalar or ({num_classes},), one weight per class"
    require(alpha.shape in ((), (num_classes,)), f"alpha: got shape {alpha.shape}, wanted {wanted}")
    return alpha


# ---------------------------------------------------------------- checks of arrays


def require(condition: bool, message: str, assertion: Any = None, *args: Any) -> None:
    """Raise `InputError` unless the condition holds.

    `assertion` is the assertion of chex that fails too; its message becomes the cause. It does not
    decide, because `chex.disable_asserts` switches it off.
    """
    if condition:
        return
    try:
        if assertion is not None:
            assertion(*args)
    except AssertionError as error:
        raise InputError(message) from error
    raise InputError(message)


def _check_dtype(name: str, x: Array, kind: Any, wanted: str, of_chex: type) -> None:
    message = f"{name}: got dtype {x.dtype}, wanted {wanted}"
    require(jnp.issubdtype(x.dtype, kind), message, chex.assert_type, x, of_chex)


def check_integer(name: str, x: Array, hint: str = "") -> None:
    """Raise unless `x` has an integer dtype. bool is not an integer dtype here."""
    _check_dtype(name, x, jnp.integer, f"an integer dtype{hint}", int)


def check_real(name: str, x: Array) -> None:
    """Raise unless `x` is bool, integer or floating."""
    is_real = not jnp.issubdtype(x.dtype, jnp.complexfloating)
    require(is_real, f"{name}: got dtype {x.dtype}, wanted real numbers")


def check_shape(name: str, x: Array, wanted: Sequence[int], why: str) -> None:
    """Raise unless `x` has exactly the shape `wanted`."""
    wanted = tuple(wanted)
    message = f"{name}: got shape {x.shape}, wanted {wanted}: {why}"
    require(x.shape == wanted, message, chex.assert_shape, x, wanted)


def check_broadcastable(name: str, x: Array, to: Sequence[int], what: str) -> None:
    """Raise unless `x` broadcasts to the shape `to` without enlarging it."""
    fits = all(own in (1, n) for own, n in zip(reversed(x.shape), reversed(to)))
    require(
        x.ndim <= len(to) and fits,
        f"{name}: got shape {x.shape}, wanted a shape that broadcasts to {tuple(to)}, the shape "
        f"of {what}",
    )


def check_unambiguous(name: str, x: Array, losses: Any, other: Any, what: str) -> None:
    """Raise if `x` fits the last axes of the losses, and as well `what`, of the shape `other`."""
    added = len(losses) - x.ndim
    if added > 0 and x.shape == tuple(other) and math.prod(x.shape) != 1:
        last, first = (1,) * added + x.shape, x.shape + (1,) * added
        hint = f", {name}.reshape{first} for the first" if what == "the batch" else ""
        raise InputError(
            f"{name}: got shape {x.shape}, which fits {what} and the last axes of the losses "
            f"{tuple(losses)}, wanted {len(losses)} axes: {name}.reshape{last} for the last{hint}"
        )


def check_label_shape(labels: Array, logits: Sequence[int], axis: int | None) -> None:
    """Raise, with a hint, unless `labels` has the logits' shape without the class axis."""
    if axis is None:
        return check_shape("labels", labels, logits, "the shape of the losses")
    wanted = tuple(n for i, n in enumerate(logits) if i != axis)
    others = [i for i in range(len(logits)) if (*logits[:i], *logits[i + 1 :]) == labels.shape]
    hint = f"; the class axis may be {others[0]}: axis={others[0]}" if others else ""
    if labels.shape == tuple(logits):
        hint = "; softmax_focal_loss takes a distribution over the classes"
    why = f"the shape of the logits, {tuple(logits)}, without the class axis{hint}"
    check_shape("labels", labels, wanted, why)


# ---------------------------------------------------------------- static arguments


def shown(x: Any) -> str:
    """Return `repr(x)` for an error message, or the type's name if that is long or fails."""
    try:
        text = repr(x)
    except Exception:  # an integer of thousands of digits, or a broken object
        return type(x).__name__
    return text if len(text) <= 40 else type(x).__name__


def static_integer(name: str, value: Any, wanted: str = "an integer") -> int:
    """Return `value` as a Python integer. bool is not an integer here."""
    try:
        if not isinstance(value, bool | np.ma.MaskedArray):
            return operator.index(value)
    except Exception:  # floats, strings and tracers each raise a different exception
        pass
    raise InputError(f"{name}: got {shown(value)}, wanted {wanted}")


def static_axis(value: Any, ndim: int) -> int:
    """Return `value` as a non-negative axis of an array of rank `ndim`."""
    axis = static_integer("axis", value)
    require(
        -ndim <= axis < ndim,
        f"axis: got {shown(axis)}, wanted an axis in [{-ndim}, {ndim}) for logits of rank {ndim}",
    )
    return axis % ndim


def static_ignore_label(value: Any) -> int | None:
    """Return `value` as a Python integer that fits int32, or None."""
    if value is None:
        return None
    label = static_integer("ignore_label", value, "None or an integer")
    fits = INT32.min <= label <= INT32.max
    require(fits, f"ignore_label: got {shown(label)}, wanted an integer that fits int32")
    return label


def static_bool(name: str, value: Any) -> bool:
    """Return `value`, which has to be a Python bool."""
    if not isinstance(value, bool):
        raise InputError(f"{name}: got {shown(value)}, wanted True or False")
    return value


def check_axis_name(name: str, value: Any) -> None:
    """Raise unless `value` is the name of a mapped axis, a tuple of names, or None.

    JAX would take a number for a positional axis.
    """
    names = value if isinstance(value, tuple) else (value,)
    are_names = value is None or all(isinstance(each, str) for each in names)
    wanted = "the name of a mapped axis, a tuple of different names, or None"
    is_valid = are_names and 0 < len(names) == len(set(names))
    require(is_valid, f"{name}: got {shown(value)}, wanted {wanted}")


def real_number(value: Any) -> float | None:
    """Return a Python or NumPy number as a float, infinite if it is too large; else None."""
    number: Any = value
    if isinstance(value, bool | np.timedelta64) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


# ---------------------------------------------------------------- dtypes, ranks, masks


def compute_dtype(logits: Array) -> jnp.dtype:
    """Return the dtype of the loss: float32 for 16-bit logits, else the logits' dtype."""
    return logits.dtype if logits.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def align(x: Array, losses: tuple[int, ...], axis: int | None = None) -> Array:
    """Give `x` the rank of the logits by adding axes of size 1.

    `x` broadcasts to `losses`; `axis` is the class axis, which the losses do not have.
    """
    with jax.debug_nans(False):  # the mask is applied later
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
