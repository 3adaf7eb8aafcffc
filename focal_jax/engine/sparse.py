"""Losses of a few weighted classes per position: K pairs of a class index and a weight."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax.engine import arguments, checks, row_statistics
from focal_jax.engine.head import DenseSource, label_weight
from focal_jax.engine.linear import linear_source
from focal_jax.engine.options import CLASS_WEIGHTS, check_names, prepare_options
from focal_jax.engine.sharding import AxisName, check_not_varying, class_range, place_like


def of_array(
    loss: Any, logits: ArrayLike, indices: ArrayLike, weights: ArrayLike, *, axis: int, **options
) -> Array:
    """Return the losses of an array of logits."""
    logits = arguments.floating_array("logits", logits)
    source = DenseSource(arguments.static_axis(axis, logits.ndim))
    return _losses(loss, source, logits, indices, weights, **options)


def of_linear(
    loss: Any,
    features: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None,
    logit_softcap: float | None,
    temperature: ArrayLike,
    transpose_kernel: bool,
    chunk_size: int | None,
    class_axis_name: AxisName | None,
    mesh: Any,
    **options: Any,
) -> Array:
    """Return the losses of `features @ kernel + bias`."""
    of_logits = bias, transpose_kernel, logit_softcap, chunk_size, mesh, class_axis_name
    source, arrays, name = linear_source(features, kernel, *of_logits, temperature)
    return _losses(loss, source, arrays, indices, weights, class_axis_name=name, **options)


def _losses(
    loss: Any,
    source: Any,
    logits: Any,
    indices: ArrayLike,
    weights: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    where: ArrayLike | None = None,
    class_axis_name: AxisName | None = None,
    **options: Any,
) -> Array:
    """Return `sum over k of alpha_k weight_k value(p_k)` for each position."""
    check_names(loss.__name__, loss.options, options)
    arguments.check_axis_name("class_axis_name", class_axis_name)
    axis, shape, dtype = source.axis(logits), source.logits_shape(logits), source.dtype(logits)
    losses = shape[:axis] + shape[axis + 1 :]
    classes = checks.class_index_lists("indices", indices, losses)
    given = arguments.real_array("weights", weights)
    arguments.check_shape("weights", given, classes.shape, "one weight per class index")
    prepared = prepare_options(loss.options, options, losses, dtype, axis)
    mask = arguments.mask_array(where, losses, axis)
    same = {"indices": classes, "weights": given, "where": mask, **prepared}
    check_not_varying(same, class_axis_name)
    num_classes, _ = class_range(shape[axis], class_axis_name)
    arguments.warn_of_one_class(num_classes)
    weight = arguments.class_weights(CLASS_WEIGHTS.check("alpha", alpha), num_classes, dtype)
    classes = jnp.moveaxis(classes, -1, axis)
    y = arguments.cast_and_mask(jnp.moveaxis(given, -1, axis), dtype, mask)
    given = classes, y, weight, prepared, mask
    classes, y, weight, prepared, mask = place_like(jax.tree.leaves(logits)[0], given)
    row = row_statistics.of_source(source, logits, class_axis_name, classes, mask)
    x, rest = row_statistics.of_picked(row, classes)
    of_class, invalid = label_weight(weight, classes, num_classes)
    padding = classes == -1
    invalid = (invalid & ~padding) | ~(y >= 0)
    keep = ~padding if mask is None else mask & ~padding
    weight = of_class.astype(dtype) * jnp.where(invalid, 0, y)
    found = loss.of_sums(x, rest, weight, prepared, keep, invalid)
    return jnp.sum(found, axis)
