"""From losses per position to one number."""


import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _arrays, _checks

_NORMALIZATIONS = ("none", "full", "valid", "batch_size")


def _divisor(
    normalization: str | ArrayLike, losses: Array, where: Array | None, axis_name
) -> Array:
    """Return the divisor of the whole batch, over all the mapped axes, at least 1."""
    if isinstance(normalization, str):
        if normalization not in _NORMALIZATIONS:
            raise _checks.InputError(
                f"normalization: got {normalization!r}, wanted one of {_NORMALIZATIONS}, "
                "a number or a scalar array"
            )
        if normalization == "batch_size" and not losses.ndim:
            raise _checks.InputError(
                "normalization: got 'batch_size' with losses of shape (), wanted losses "
                "with a batch axis"
            )
        count: int | Array = {
            "none": 1,
            "full": losses.size,
            "valid": losses.size,
            "batch_size": losses.shape[0] if losses.ndim else 1,
        }[normalization]
        if normalization == "valid" and where is not None:
            count = jnp.sum(jnp.broadcast_to(where, losses.shape), dtype=jnp.int32)
        if normalization != "none" and axis_name is not None:
            count = lax.psum(count, axis_name)
        divisor = jnp.asarray(count, losses.dtype)
    else:
        divisor = _arrays.option("normalization", normalization, losses.dtype)
        _checks.shape("normalization", divisor, (), "one divisor for all the losses")
        divisor = divisor.astype(losses.dtype)
    return jnp.maximum(divisor, 1)


def reduce_loss(
    losses: ArrayLike,
    *,
    normalization: str | ArrayLike = "valid",
    where: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    r"""Reduce losses per position to `sum(losses) / max(1, divisor)`.

    Args:
      losses: `[...]`, floating.
      normalization: the divisor: `"none"` 1, `"full"` every position, `"valid"` the
        positions where `where` is True (all without a mask), `"batch_size"`
        `losses.shape[0]`; or the divisor itself, a number or a scalar array, such as a
        running count of positives. It is never less than 1.
      where: bool, broadcasts to the losses: the positions that count.
      axis_name: one name or several of mapped axes (`pmap`, `shard_map`, `vmap`) that
        the batch is spread over. The count is then taken over all of them and divided by
        their size, so that `lax.pmean` of the losses, and of the gradients, equals the
        result of one device, also with uneven counts. A divisor given as a number is the
        one for the whole batch.

    Returns:
      A scalar: float32 for 16-bit losses, else of the losses' dtype. 0 where nothing is
      valid.

    Raises:
      ValueError: for losses that are not floating, an unknown normalization or one that
        is not a scalar, `"batch_size"` of a scalar, a `where` that is not bool or does
        not broadcast to the losses.
      NameError: for an `axis_name` that is not bound here.

    Differentiation: any mode, in the losses and in an array divisor.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import reduce_loss
      >>> losses = jnp.array([3.0, 1.0, jnp.nan])
      >>> float(reduce_loss(losses, where=jnp.array([True, True, False])))
      2.0

    References:
      The normalizations are those of the Caffe loss layers; the divisor of
      [RetinaNet](https://arxiv.org/abs/1708.02002) is the number of positives.
    """
    losses = jnp.asarray(losses)
    _checks.floating("losses", losses)
    where = _arrays.mask(where, losses.shape)
    where = None if where is None else _arrays.aligned(where, losses.shape)
    losses = losses.astype(_arrays.compute_dtype(losses))
    divisor = _divisor(normalization, losses, where, axis_name)
    total = jnp.sum(_arrays.keep(losses, where))
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    return devices * total / divisor
