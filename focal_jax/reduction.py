"""Reduce losses per position to one number."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax.engine import arguments, checks
from focal_jax.engine.arguments import InputError, mask_to_zero
from focal_jax.engine.options import check_call
from focal_jax.engine.sharding import place_like

NORMALIZATIONS = ("sum", "mean", "valid", "batch_size")
_HINTS = {
    "none": "; 'sum' divides by 1, and for unreduced losses leave out reduce_loss",
    "full": "; 'mean' divides by the number of all positions",
    "batch_size": "; 'batch_size' needs losses with a batch axis",
}


def count_true(where: Array, losses: Array, int32_limit: int = 2**31) -> Array:
    """Return the number of losses at which a mask is True, in the losses' dtype.

    An int32 count wraps at 2**31, and a float32 sum of ones stops growing at 2**24. So the longest
    axes are counted in int32, as many as cannot reach the limit, and the counts are added in
    floating point, like axes of a symbolic size.
    """
    axes, positions = [], 1
    static = [axis for axis, n in enumerate(where.shape) if isinstance(n, int)]
    for axis in sorted(static, key=lambda axis: -where.shape[axis]):
        if positions * where.shape[axis] < int32_limit:
            axes.append(axis)
            positions *= where.shape[axis]
    counts = jnp.sum(where, axes, dtype=jnp.int32)
    repeats = math.prod(n for n, m in zip(losses.shape, where.shape) if m == 1)
    return jnp.sum(counts.astype(losses.dtype)) * jnp.asarray(repeats, losses.dtype)


def check_normalization(normalization: Any, losses: Array) -> None:
    """Raise unless `normalization` is the name of a denominator of these losses."""
    words = NORMALIZATIONS if losses.ndim else NORMALIZATIONS[:-1]
    if normalization not in words:
        raise InputError(
            f"normalization: got {arguments.shown(normalization)}, wanted one of {words}, a number "
            f"or a scalar array{_HINTS.get(normalization or '', '')}"
        )


def weight_array(weights: ArrayLike, losses: Array) -> Array:
    """Return weights that broadcast to the losses. Raise if a Python or NumPy weight is negative.

    A weight may be NaN: its position may be masked.
    """
    array = arguments.number_array("weights", weights, losses.dtype, allow_bool=True)
    real = arguments.real_number(weights)
    known = arguments.numpy_array("weights", weights if real is None else real, "numbers >= 0")
    if known is not None and np.any(known < 0):
        raise InputError(f"weights: got {np.nanmin(known)}, wanted numbers >= 0")
    arguments.check_broadcastable("weights", array, losses.shape, "the losses")
    batch = losses.shape[: array.ndim]
    arguments.check_unambiguous("weights", array, losses.shape, batch, "the batch")
    return array


def _denominator(
    normalization: Any,
    losses: Array,
    where: Array | None,
    weights: Array | None,
    axis_name: str | tuple[str, ...] | None,
) -> Array:
    """Return the denominator, summed over the mapped axes."""
    if not (normalization is None or isinstance(normalization, str)):
        checks.check_known_numbers("normalization", normalization, losses.dtype)
        number = arguments.number_array("normalization", normalization, losses.dtype)
        arguments.check_shape("normalization", number, (), "one denominator for all losses")
        return number.astype(losses.dtype)
    check_normalization(normalization, losses)
    if normalization == "sum":
        return jnp.ones((), losses.dtype)
    # The count is floating before the psum, because an int32 sum over devices could wrap.
    match normalization:
        case "batch_size":
            denominator = jnp.asarray(losses.shape[0], losses.dtype)
        case "valid" if weights is not None:
            denominator = jnp.sum(jnp.broadcast_to(weights, losses.shape))
        case "valid" if where is not None:
            denominator = count_true(where, losses)
        case _:
            denominator = jnp.asarray(losses.size, losses.dtype)
    if axis_name is not None:
        denominator = lax.psum(denominator, axis_name)
    return jnp.asarray(denominator, losses.dtype)


@check_call
def reduce_loss(
    losses: ArrayLike,
    *,
    normalization: str | ArrayLike = "valid",
    where: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    ignore_label: int | None = None,
    weights: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    r"""Reduce losses per position to one number.

        sum(losses) / max(1, denominator)
        sum(weights * losses) / denominator        with weights; a denominator of 0 counts as 1

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import reduce_loss
      >>> losses, labels = jnp.array([3.0, 1.0, jnp.nan]), jnp.array([0, 2, 255])
      >>> float(reduce_loss(losses, labels=labels, ignore_label=255))
      2.0
      >>> float(reduce_loss(losses[:2], weights=jnp.array([0.5, 0.0])))
      3.0

    Args:
      losses: `[...]`, floating.
      normalization: the denominator. `"valid"` is the number of positions that are not masked,
        or the sum of their weights; `"mean"` is the number of all positions; `"batch_size"` is
        `losses.shape[0]`; `"sum"` is 1. A number or a scalar array is the denominator itself,
        such as the number of positive anchors.
      where: bool, broadcasts to the losses. Positions where it is False are masked.
      labels: integers of the losses' shape. Only `ignore_label` needs them.
      ignore_label: positions with this label are masked.
      weights: real, >= 0, broadcasts to the losses. The denominator is not rounded up to 1,
        because a sum of weights can be a fraction. A weight of 0 is not a mask: 0 times an
        infinite loss is NaN. A negative weight in a JAX array gives NaN.
      axis_name: names of the mapped axes that shard the batch. The denominator is summed over
        them and divided by their size, so that `lax.pmean` of the results and of the gradients
        gives the values on one device. A number passed as `normalization` is
        the denominator of the whole batch.

    Returns:
      A scalar. It is 0 if all positions are masked. Counts above `2**31` do not wrap.

    Raises:
      InputError: if an argument is invalid, or a Python or NumPy weight is negative.
      NameError: if `axis_name` is not bound.
    """
    if isinstance(losses, tuple) and any(isinstance(x, Array) for x in losses):
        raise InputError("losses: got a tuple of arrays, wanted one array: unpack the tuple first")
    losses = arguments.floating_array("losses", losses)
    dtype = arguments.compute_dtype(losses)
    mask: Any = place_like(losses, arguments.mask_array(where, losses.shape))
    if labels is not None:
        labels = arguments.integer_labels(labels, losses.shape, None, ignore_label)
        mask = arguments.not_ignored(place_like(losses, labels), ignore_label, mask)
    elif ignore_label is not None:
        raise InputError(
            f"ignore_label: got {arguments.shown(ignore_label)} without labels, wanted labels too"
        )
    arguments.check_axis_name("axis_name", axis_name)
    weight: Array | None = None
    with jax.debug_nans(False):  # until the mask is applied
        losses = mask_to_zero(losses.astype(dtype), mask)
        if weights is not None:
            given = arguments.align(weight_array(weights, losses), losses.shape).astype(dtype)
            placed: Array = place_like(losses, given)
            weight = mask_to_zero(jnp.where(placed < 0, jnp.nan, placed), mask)
            losses *= weight
    denominator = _denominator(normalization, losses, mask, weight, axis_name)
    too_small = denominator < 1 if weight is None else denominator <= 0
    denominator = jnp.where(too_small, 1, denominator)
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    return devices * jnp.sum(losses) / denominator
