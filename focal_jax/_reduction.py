"""From losses per position to one number."""

import numbers
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs

_WRAPS = 2**31  # so many positions int32 cannot count


def _count(where: Array, losses: Array) -> Array:
    """Return at how many of the losses the mask is True, as a floating number.

    A count of 2**31 wraps in int32, and in float32 a sum of ones ends at 2**24. So the
    longest axes are counted in int32, as many as cannot wrap, and the few counts of the
    axes that are left are added in floating point. Axes that the mask does not have are a
    factor.
    """
    counted, positions = [], 1
    for axis in sorted(range(where.ndim), key=lambda axis: -where.shape[axis]):
        if positions * where.shape[axis] < _WRAPS:
            counted.append(axis)
            positions *= where.shape[axis]
    exact = jnp.sum(where, counted, dtype=jnp.int32)
    return jnp.sum(exact.astype(losses.dtype)) * float(losses.size // max(1, where.size))


def _divisor(
    normalization: Any,
    losses: Array,
    where: Array | None,
    weights: Array | None,
    axis_name: str | tuple[str, ...] | None,
) -> Array:
    """Return the divisor of the whole batch, over all the mapped axes."""
    if not (normalization is None or isinstance(normalization, str)):
        divisor = _inputs.option("normalization", normalization, losses.dtype)
        _checks.shape("normalization", divisor, (), "one divisor for all the losses")
        return divisor.astype(losses.dtype)
    _checks.normalization(normalization, losses)
    match normalization:
        case "sum" | "none":
            return jnp.ones((), losses.dtype)
        case "batch_size":
            # Floating from here on: a sum over the devices could wrap too.
            divisor = float(losses.shape[0])
        case "valid" if weights is not None:
            divisor = jnp.sum(_inputs.keep(jnp.broadcast_to(weights, losses.shape), where))
        case "valid" if where is not None:
            divisor = _count(where, losses)
        case _:
            divisor = float(losses.size)
    if axis_name is not None:
        divisor = lax.psum(divisor, axis_name)
    return jnp.asarray(divisor, losses.dtype)


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

        sum(losses) / max(1, divisor)        or with weights
        sum(weights * losses) / divisor      and 0 / 0 is 0

    where the sums are over the positions that count.

    Args:
      losses: `[...]`, floating.
      normalization: the divisor: `"valid"` the positions that count (their weights, if
        there are any), `"mean"` every position (`"full"` says the same), `"sum"` 1 (so does
        `"none"`), `"batch_size"` `losses.shape[0]`; or the divisor itself, a number or a
        scalar array, such as a running count of positives.
      where: bool, broadcasts to the losses: positions where it is False do not count,
        whatever they hold.
      labels: of the losses' shape, any integers: the labels that the losses were computed
        from. Needed with `ignore_label` only.
      ignore_label: positions with this label do not count either, as for the losses.
      weights: real, zero or more, broadcasts to the losses: how much each position counts.
        A negative one gives NaN, and one of 0 is no mask: 0 times a loss that is not finite
        is NaN. The divisor is then not rounded up to 1, since a sum of fractions may well
        be less; where it is not above 0, the sum is not divided.
      axis_name: one name or several of mapped axes (`pmap`, `shard_map`, `vmap`) that
        the batch is spread over. The divisor is then taken over all of them and divided by
        their size, so that `lax.pmean` of the losses, and of the gradients, equals the
        result of one device, also with uneven counts. A divisor given as a number is the
        one for the whole batch.

    Returns:
      A scalar: float32 for 16-bit losses, else of the losses' dtype. 0 where nothing
      counts. Counts are exact as far as that dtype is, also beyond 2**31 positions.

    Raises:
      ValueError: for losses that are not floating, an unknown normalization or one that
        is not a scalar, `"batch_size"` of a scalar, a `where` that is not bool, labels that
        are not integers, an `ignore_label` without labels, negative weights of Python's or
        NumPy's (of JAX's the result is NaN), shapes that do not fit the losses.
      NameError: for an `axis_name` that is not bound here.

    Differentiation: any mode, in the losses, the weights and an array divisor.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import reduce_loss
      >>> losses, labels = jnp.array([3.0, 1.0, jnp.nan]), jnp.array([0, 2, 255])
      >>> float(reduce_loss(losses, labels=labels, ignore_label=255))
      2.0
      >>> float(reduce_loss(losses[:2], weights=jnp.array([0.5, 0.0])))
      3.0

    References:
      The normalizations are those of the Caffe loss layers; the divisor of
      [RetinaNet](https://arxiv.org/abs/1708.02002) is the number of positives.
    """
    losses = _inputs.floating("losses", losses)
    losses = losses.astype(_inputs.compute_dtype(losses))
    where = _inputs.aligned_mask(where, losses.shape)
    if labels is not None:
        labels = _inputs.int32_labels(labels, losses.shape)
        where = _inputs.not_ignored(labels, ignore_label, where)
    elif ignore_label is not None:
        raise _checks.InputError(
            f"ignore_label: got {ignore_label} and no labels, wanted the labels that it is one of"
        )
    losses = _inputs.keep(losses, where)
    if weights is not None:
        given, weights = weights, _inputs.option("weights", weights, losses.dtype)
        # What has its numbers without waiting for a device is told at once.
        if isinstance(given, numbers.Real | np.ndarray) and np.min(given, initial=0) < 0:
            raise _checks.InputError(f"weights: got {np.min(given)}, wanted zero or more")
        _checks.broadcastable("weights", weights, losses.shape, "the losses")
        weights = _inputs.aligned(weights, losses.shape).astype(losses.dtype)
        weights = jnp.where(weights < 0, jnp.nan, weights)
        losses *= _inputs.keep(weights, where)
    _checks.axis_name("axis_name", axis_name)
    divisor = _divisor(normalization, losses, where, weights, axis_name)
    # Nothing that counts is divided by 1. A count is never a fraction, a sum of weights may be.
    too_small = divisor < 1 if weights is None else divisor <= 0
    divisor = jnp.where(too_small, 1, divisor)
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    return devices * jnp.sum(losses) / divisor
