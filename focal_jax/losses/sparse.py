"""Softmax focal loss of a few weighted classes per position, in place of a dense distribution."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax.engine import arguments, checks, row_statistics
from focal_jax.engine.head import DenseSource, label_weight
from focal_jax.engine.linear import linear_source
from focal_jax.engine.options import CLASS_WEIGHTS, check_call, prepare_options
from focal_jax.engine.sharding import AxisName, check_not_varying, class_range, place_like
from focal_jax.losses.softmax import softmax_focal_loss

_LOSS: Any = softmax_focal_loss.declaration.engine_loss  # pyright: ignore[reportFunctionMemberAccess]


@check_call
def softmax_focal_loss_with_sparse_labels(
    logits: ArrayLike,
    indices: ArrayLike,
    weights: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    r"""Compute the focal loss of a softmax and a few weighted classes per position.

    With `p = softmax(logits)` along the class axis and K pairs of a class `c_k` and a weight `w_k`:

        loss = sum over k of alpha_c_k w_k * (1 - p_c_k)**gamma * (-log p_c_k)

    This is `softmax_focal_loss` of the distribution that has these weights, without an array of the
    distribution. Distillation from the K most probable classes of a teacher is `gamma=0`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import softmax_focal_loss_with_sparse_labels
      >>> logits = jnp.array([[2.0, 0.0, -jnp.inf]])
      >>> indices, weights = jnp.array([[0, 1, -1]]), jnp.array([[0.9, 0.1, 0.0]])
      >>> losses = softmax_focal_loss_with_sparse_labels(logits, indices, weights)
      >>> [round(x, 4) for x in losses.tolist()]
      [0.1666]

    Args:
      logits: `[..., C, ...]`: unnormalized log-probabilities.
      indices: `[..., K]`, integer: class indices of each position, on the last axis, padded with
        -1. Equal indices add up. Any other index outside `[0, C)` makes its position NaN.
      weights: of the shape of `indices`, at least 0; a negative weight makes its position NaN.
      alpha: class weights: None, a scalar or `[C]`.
      gamma: focusing exponent, at least 0.
      axis: the class axis of the logits.
      where: mask of the losses.
      class_axis_name: as in `softmax_focal_loss_with_integer_labels`.

    Returns:
      The losses, of the logits' shape without the class axis.
    """
    logits = arguments.floating_array("logits", logits)
    source = DenseSource(arguments.static_axis(axis, logits.ndim))
    return _losses(source, logits, indices, weights, alpha, gamma, where, class_axis_name)


@check_call
def linear_softmax_focal_loss_with_sparse_labels(
    features: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    logit_softcap: float | None = None,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    mesh: Any = None,
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
) -> Array:
    r"""Compute the focal loss of a few weighted classes without storing the logits.

    The loss is that of `softmax_focal_loss_with_sparse_labels` for `features @ kernel + bias`. The
    other arguments are those of `linear_softmax_focal_loss_with_integer_labels`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import linear_softmax_focal_loss_with_sparse_labels
      >>> features, kernel = jnp.array([[1.0, 0.0]]), jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> pairs = jnp.array([[0, 1]]), jnp.array([[0.9, 0.1]])
      >>> losses = linear_softmax_focal_loss_with_sparse_labels(features, kernel, *pairs)
      >>> [round(x, 4) for x in losses.tolist()]
      [0.1666]

    Args:
      indices: `[..., K]`, integer: class indices, padded with -1.
      weights: of the shape of `indices`, at least 0.

    Returns:
      The losses, `[...]`.
    """
    of_logits = bias, transpose_kernel, logit_softcap, chunk_size, mesh, class_axis_name
    source, linear, name = linear_source(features, kernel, *of_logits, temperature)
    return _losses(source, linear, indices, weights, alpha, gamma, where, name)


def _losses(
    source: Any,
    logits: Any,
    indices: ArrayLike,
    weights: ArrayLike,
    alpha: ArrayLike | None,
    gamma: ArrayLike,
    where: ArrayLike | None,
    class_axis_name: AxisName | None,
) -> Array:
    """Return `sum over k of alpha_k weight_k value(p_k)` for each position."""
    arguments.check_axis_name("class_axis_name", class_axis_name)
    axis, shape, dtype = source.axis(logits), source.logits_shape(logits), source.dtype(logits)
    losses = shape[:axis] + shape[axis + 1 :]
    classes = checks.class_index_lists("indices", indices, losses)
    given = arguments.real_array("weights", weights)
    arguments.check_shape("weights", given, classes.shape, "one weight per class index")
    mask = arguments.mask_array(where, losses, axis)
    num_classes, _ = class_range(shape[axis], class_axis_name)
    options = {"gamma": gamma}
    prepared = prepare_options(_LOSS.options, options, losses, dtype, axis, num_classes)
    same = {"indices": classes, "weights": given, "where": mask, **prepared}
    check_not_varying(same, class_axis_name)
    arguments.warn_of_one_class(num_classes)
    weight = arguments.class_weights(CLASS_WEIGHTS.check("alpha", alpha), num_classes, dtype)
    weight = weight.astype(dtype)  # its cotangents are added up in the dtype of the loss
    with jax.debug_nans(False):  # before the mask is applied
        classes, given = (jnp.moveaxis(x, -1, axis) for x in (classes, given))
        arrays = place_like(jax.tree.leaves(logits)[0], (classes, given, weight, prepared, mask))
        classes, given, weight, prepared, mask = arrays
        y = arguments.cast_and_mask(given, dtype, mask)
        y, negative = arguments.clip_labels(given, y, jnp.inf)
    row = row_statistics.of_source(source, logits, class_axis_name, classes, mask)
    x, rest = row_statistics.of_picked(row, classes)
    of_class, invalid = label_weight(weight, classes, num_classes)
    padding = classes == -1
    invalid = (invalid & ~padding) | negative
    keep = ~padding if mask is None else mask & ~padding
    weight = of_class * jnp.where(invalid, 0, y)
    found = _LOSS.of_sums(x, rest, weight, prepared, keep, invalid)
    return jnp.sum(found, axis)
