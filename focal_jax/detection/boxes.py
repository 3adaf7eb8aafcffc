"""Boxes `(x1, y1, x2, y2)`: their overlap, and their offsets from anchors."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs
from focal_jax.detection import _options

__all__ = ["box_iou", "decode_boxes", "encode_boxes"]

# The least divisor: a union without area, or an anchor without a side, divides by this
# and not by 0.
_TINY = 1e-8
# What each offset is multiplied by, so that a RetinaNet's targets are of about one spread.
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


class Box(NamedTuple):
    """The coordinates of many boxes, each an array along the boxes.

    Rows of four are the wrong way round for an accelerator: a TPU pads the last axis to 128.
    """

    x1: Array
    y1: Array
    x2: Array
    y2: Array


def columns(boxes: Array) -> Box:
    """Return the coordinates of boxes `[N, 4 or more]`."""
    return Box(*(boxes[:, k] for k in range(4)))


def rows_of_four(**arrays: ArrayLike) -> list[Array]:
    """Return arrays checked to be `[any, 4]`, floating, in the widest of their dtypes."""
    checked = []
    for name, array in arrays.items():
        array = _inputs.option(name, array, jnp.dtype(jnp.float32))
        _checks.shape(name, array, (*array.shape[:1], 4), "a row of four numbers for each box")
        checked.append(array)
    dtype = np.result_type(*(_inputs.compute_dtype(array) for array in checked))
    return [array.astype(dtype) for array in checked]


def bounded(boxes: Array) -> Array:
    """Return the boxes with every coordinate small enough for the sides to be finite."""
    half = float(jnp.finfo(boxes.dtype).max) / 2
    return jnp.clip(boxes, -half, half)


def _area(width: Array, height: Array) -> Array:
    # The sum of two areas is finite, so that no overlap is infinity over infinity.
    return jnp.minimum(width * height, float(jnp.finfo(width.dtype).max) / 4)


def overlap(a: Box, b: Box) -> Array:
    """Return the intersection over union of boxes that are `bounded`, broadcast together."""
    width = jnp.maximum(jnp.minimum(a.x2, b.x2) - jnp.maximum(a.x1, b.x1), 0)
    height = jnp.maximum(jnp.minimum(a.y2, b.y2) - jnp.maximum(a.y1, b.y1), 0)
    both = _area(width, height)
    union = _area(a.x2 - a.x1, a.y2 - a.y1) + _area(b.x2 - b.x1, b.y2 - b.y1) - both
    return both / jnp.maximum(union, _TINY)


def pairs(a: Box, b: Box) -> Array:
    """Return the overlap `[N, M]` of every box in `a` with every one in `b`."""
    return overlap(Box(*(x[:, None] for x in a)), Box(*(x[None] for x in b)))


def _centers_and_sides(box: Box) -> tuple[Array, Array, Array, Array]:
    width, height = box.x2 - box.x1, box.y2 - box.y1
    return box.x1 + 0.5 * width, box.y1 + 0.5 * height, width, height


def offsets(
    box: Box, anchor: Box, weights: Sequence[float] = WEIGHTS, min_side: float = 1.0
) -> tuple[Array, Array, Array, Array]:
    """Return what `encode_boxes` does, each offset an array along the boxes."""
    x, y, *sides = _centers_and_sides(box)
    anchor_x, anchor_y, *anchor_sides = _centers_and_sides(anchor)
    width, height = (jnp.maximum(side, min_side) for side in sides)
    anchor_width, anchor_height = (jnp.maximum(side, _TINY) for side in anchor_sides)
    return (
        (x - anchor_x) / anchor_width * weights[0],
        (y - anchor_y) / anchor_height * weights[1],
        jnp.log(width / anchor_width) * weights[2],
        jnp.log(height / anchor_height) * weights[3],
    )


def _weights(weights: Sequence[float]) -> list[float]:
    if not isinstance(weights, (tuple, list)) or len(weights) != 4:
        raise _checks.InputError(
            f"weights: got {weights}, wanted a tuple of four numbers: of x, y, width and height"
        )
    return [_options.above_zero("weights", weight) for weight in weights]


def box_iou(a: ArrayLike, b: ArrayLike) -> Array:
    r"""Compute the intersection over union of every box in `a` with every box in `b`.

        IoU = |a & b| / max(|a| + |b| - |a & b|, 1e-8)

    Args:
      a: `[N, 4]`, real: boxes `(x1, y1, x2, y2)`.
      b: `[M, 4]`, real: likewise.

    Returns:
      `[N, M]`, in [0, 1]: float32, or float64 where an input is. A box without area
      overlaps nothing: 0, never NaN. Nor is it NaN for sides as large as can be: an area
      beyond a quarter of the dtype's largest number counts as that, and a coordinate
      beyond half of it, infinity too, as that. NaN where a coordinate is NaN.

    Raises:
      ValueError: for inputs that are not rows of four real numbers.

    Differentiation: any mode, in both; finite, also at boxes without area.

    Example:
      >>> from focal_jax.detection import box_iou
      >>> box_iou([[0, 0, 2, 2]], [[0, 0, 2, 2], [1, 0, 2, 2], [5, 5, 5, 5]]).tolist()
      [[1.0, 0.5, 0.0]]

    References:
      Everingham et al. [The PASCAL Visual Object Classes
      Challenge](https://doi.org/10.1007/s11263-009-0275-4). IJCV 2010.
    """
    a, b = rows_of_four(a=a, b=b)
    return pairs(columns(bounded(a)), columns(bounded(b)))


def encode_boxes(
    boxes: ArrayLike,
    anchors: ArrayLike,
    *,
    weights: Sequence[float] = WEIGHTS,
    min_side: float = 1.0,
) -> Array:
    r"""Encode boxes as offsets from their anchors: what a RetinaNet regresses.

    With `(x, y)` the center and `(w, h)` the sides of a box, `_a` for its anchor's,

        weights * ((x - x_a) / w_a, (y - y_a) / h_a, log(w / w_a), log(h / h_a))

    Args:
      boxes: `[N, 4]`, real: boxes `(x1, y1, x2, y2)`.
      anchors: `[N, 4]`, real: the anchor of each.
      weights: four positive numbers, which make the offsets about as large as each other:
        torchvision's `BoxCoder` has them, its RetinaNet with `(1, 1, 1, 1)`.
      min_side: a shorter side of a box counts as this long in the logarithm: one pixel,
        so that an empty box has an encoding too. Give less for boxes in another unit.

    Returns:
      `[N, 4]`: float32, or float64 where an input is. Finite for finite boxes.

    Raises:
      ValueError: for inputs that are not rows of four real numbers, as many of each, or
        weights that are not four positive numbers.

    Differentiation: any mode, in both.

    Example:
      >>> from focal_jax.detection import encode_boxes
      >>> encode_boxes([[1, 0, 5, 4]], [[0, 0, 4, 4]]).tolist()
      [[2.5, 0.0, 0.0, 0.0]]

    References:
      Girshick, Donahue, Darrell, Malik. [Rich feature hierarchies for accurate object
      detection](https://arxiv.org/abs/1311.2524). 2014. Appendix C.
    """
    weights = _weights(weights)
    boxes, anchors = rows_of_four(boxes=boxes, anchors=anchors)
    _checks.shape("boxes", boxes, anchors.shape, "one for each anchor")
    return jnp.stack(offsets(columns(boxes), columns(anchors), weights, min_side), -1)


def decode_boxes(
    offsets: ArrayLike, anchors: ArrayLike, *, weights: Sequence[float] = WEIGHTS
) -> Array:
    r"""Decode a network's offsets into boxes: the inverse of `encode_boxes`.

    Args:
      offsets: `[N, 4]`, real: as `encode_boxes` gives them.
      anchors: `[N, 4]`, real: the anchor of each, `(x1, y1, x2, y2)`.
      weights: those of `encode_boxes`.

    Returns:
      `[N, 4]`, boxes `(x1, y1, x2, y2)`: float32, or float64 where an input is. They are
      not clipped to any image.

    Raises:
      ValueError: for inputs that are not rows of four real numbers, as many of each, or
        weights that are not four positive numbers.

    Differentiation: any mode, in both.

    Example:
      >>> from focal_jax.detection import decode_boxes
      >>> decode_boxes([[2.5, 0.0, 0.0, 0.0]], [[0, 0, 4, 4]]).tolist()
      [[1.0, 0.0, 5.0, 4.0]]

    References:
      As for `encode_boxes`.
    """
    weights = _weights(weights)
    offsets, anchors = rows_of_four(offsets=offsets, anchors=anchors)
    _checks.shape("offsets", offsets, anchors.shape, "a row for each anchor")
    dx, dy, log_width, log_height = (offsets[:, k] / weights[k] for k in range(4))
    x, y, width, height = _centers_and_sides(columns(anchors))
    x, y = x + dx * width, y + dy * height
    half_width, half_height = 0.5 * width * jnp.exp(log_width), 0.5 * height * jnp.exp(log_height)
    corners = x - half_width, y - half_height, x + half_width, y + half_height
    return jnp.stack(corners, -1)
