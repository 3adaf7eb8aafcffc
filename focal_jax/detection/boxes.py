"""Boxes `(x1, y1, x2, y2)`: intersection over union, and offsets from anchors."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax.engine import arguments
from focal_jax.engine.arguments import InputError, shown
from focal_jax.engine.layout import replicate_on_mesh
from focal_jax.engine.options import check_call, number
from focal_jax.engine.sharding import explicit_mesh

__all__ = ["box_iou", "decode_boxes", "encode_boxes"]

_EPSILON = 1e-8  # the smallest denominator, for unions without area and anchors without a side
POSITIVE, UNIT = number(1.0, low=0, above_low=True), number(0.5, low=0, high=1)
# The factors of the offsets. With them the regression targets of a RetinaNet have similar scales.
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


class Box(NamedTuple):
    """Coordinates of boxes, one array each.

    An array `[N, 4]` wastes memory on accelerators: a TPU pads the last axis to 128.
    """

    x1: Array
    y1: Array
    x2: Array
    y2: Array


def to_box(boxes: Array) -> Box:
    """Return the coordinates of boxes `[N, 4 or more]`."""
    return Box(*(boxes[:, k] for k in range(4)))


def box_arrays(**arrays: ArrayLike) -> list[Array]:
    """Return arrays, checked to be `[N, 4]`, in the widest of their floating dtypes."""
    checked = []
    for name, array in arrays.items():
        array = arguments.number_array(name, array, jnp.dtype(jnp.float32))
        rows = array.shape[-2:-1] or (1,)
        arguments.check_shape(name, array, (*rows, 4), "four numbers for each box")
        checked.append(array)
    dtype = np.result_type(*map(arguments.compute_dtype, checked))
    return [array.astype(dtype) for array in checked]


def clip_coordinates(boxes: Array) -> Array:
    """Return the boxes with coordinates clipped so that the sides are finite."""
    limit = float(jnp.finfo(boxes.dtype).max) / 2
    return jnp.clip(boxes, -limit, limit)


def _area(width: Array, height: Array) -> Array:
    """Return the area, clipped so that the sum of two areas is finite: inf / inf is NaN."""
    return jnp.minimum(width * height, float(jnp.finfo(width.dtype).max) / 4)


def _intersection(a: Box, b: Box) -> Array:
    width = jnp.maximum(jnp.minimum(a.x2, b.x2) - jnp.maximum(a.x1, b.x1), 0)
    height = jnp.maximum(jnp.minimum(a.y2, b.y2) - jnp.maximum(a.y1, b.y1), 0)
    return _area(width, height)


def share_inside(a: Box, b: Box) -> Array:
    """Return the share of the area of `a` that is inside `b`, like `iou`."""
    return _intersection(a, b) / jnp.maximum(_area(a.x2 - a.x1, a.y2 - a.y1), _EPSILON)


def iou(a: Box, b: Box) -> Array:
    """Return the intersection over union of boxes with clipped coordinates, broadcast together."""
    intersection = _intersection(a, b)
    areas = _area(a.x2 - a.x1, a.y2 - a.y1) + _area(b.x2 - b.x1, b.y2 - b.y1)
    return intersection / jnp.maximum(areas - intersection, _EPSILON)


def pairwise(overlap: Callable[[Box, Box], Array], a: Box, b: Box) -> Array:
    """Return the overlap `[N, M]` of every box of `a` with every box of `b`."""
    return overlap(Box(*(x[:, None] for x in a)), Box(*(x[None] for x in b)))


def _centers_and_sides(box: Box) -> tuple[Array, Array, Array, Array]:
    width, height = box.x2 - box.x1, box.y2 - box.y1
    return box.x1 + 0.5 * width, box.y1 + 0.5 * height, width, height


def _columns() -> Array:
    """Return the column indices `[1, 4]` for a select: XLA:GPU writes a stack to memory."""
    return lax.broadcasted_iota(jnp.int32, (1, 4), 1)


def corners(box: Box) -> tuple[Array, Array]:
    """Return the corners `(x1, y1, x1, y1)` and `(x2, y2, x2, y2)` of each box, both `[N, 4]`."""
    x1, y1, x2, y2 = (coordinate[:, None] for coordinate in box)
    is_x = _columns() % 2 == 0
    return jnp.where(is_x, x1, y1), jnp.where(is_x, x2, y2)


def encode_corners(
    box: tuple[Array, Array], anchor: tuple[Array, Array], weights: Sequence[float], min_side: float
) -> Array:
    """Return the offsets of `encode_boxes` from the corners of boxes and anchors."""
    (low, high), (anchor_low, anchor_high) = box, anchor
    side = jnp.maximum(high - low, min_side)
    anchor_side = jnp.maximum(anchor_high - anchor_low, _EPSILON)
    # Differences of coordinates that are near each other are exact; centers are rounded.
    distance = 0.5 * ((low - anchor_low) + (high - anchor_high))
    offsets = jnp.where(_columns() < 2, distance / anchor_side, jnp.log(side / anchor_side))
    return offsets * jnp.asarray([weights], offsets.dtype)


def check_weights(weights: Sequence[float]) -> tuple[float, ...]:
    """Return the weights of the four offsets as floats."""
    if not isinstance(weights, (tuple, list)) or len(weights) != 4:
        wanted = "a tuple of four numbers, for x, y, width and height"
        raise InputError(f"weights: got {shown(weights)}, wanted {wanted}")
    return tuple(POSITIVE.static("weights", weight) for weight in weights)


@check_call
def box_iou(a: ArrayLike, b: ArrayLike) -> Array:
    r"""Compute the intersection over union of every box in `a` with every box in `b`.

        IoU = |a & b| / max(|a| + |b| - |a & b|, 1e-8)

    The result is differentiable in both arguments. At boxes without area the gradient is finite
    in float32, and infinite after a cast to float16. Coordinates are clipped to half of the dtype's
    largest number and areas to a quarter of it, so that infinite boxes do not give NaN. A NaN
    coordinate gives NaN.

    Example:
      >>> from focal_jax.detection import box_iou
      >>> box_iou([[0, 0, 2, 2]], [[0, 0, 2, 2], [1, 0, 2, 2], [5, 5, 5, 5]]).tolist()
      [[1.0, 0.5, 0.0]]

    Args:
      a: `[N, 4]`, real.
      b: `[M, 4]`, real.

    Returns:
      `[N, M]`, in [0, 1]: float32, or float64 if an input is. The IoU of a box without area is 0.

    References:
      [The PASCAL Visual Object Classes Challenge](https://doi.org/10.1007/s11263-009-0275-4).
      IJCV 2010.
    """
    a, b = box_arrays(a=a, b=b)
    if explicit_mesh([a]) is not None:  # one mesh axis cannot shard both arrays
        b = replicate_on_mesh(b, a)
    return pairwise(iou, to_box(clip_coordinates(a)), to_box(clip_coordinates(b)))


@check_call
def encode_boxes(
    boxes: ArrayLike,
    anchors: ArrayLike,
    *,
    weights: Sequence[float] = WEIGHTS,
    min_side: float = 1.0,
) -> Array:
    r"""Encode boxes as offsets from anchors, the regression targets of a RetinaNet.

    With the center `(x, y)` and the sides `(w, h)` of a box, and those of its anchor `_a`,

        weights * ((x - x_a) / w_a, (y - y_a) / h_a, log(w / w_a), log(h / h_a))

    The result is differentiable in both arguments. It is finite for boxes and anchors without area,
    but coordinates near the largest floating number overflow.

    Example:
      >>> from focal_jax.detection import encode_boxes
      >>> encode_boxes([[1, 0, 5, 4]], [[0, 0, 4, 4]]).tolist()
      [[2.5, 0.0, 0.0, 0.0]]

    Args:
      boxes: `[N, 4]`, real.
      anchors: `[N, 4]`, real: the anchor of each box.
      weights: four positive numbers. The default is that of torchvision's `BoxCoder`;
        torchvision's RetinaNet uses `(1, 1, 1, 1)`.
      min_side: a shorter side is replaced by this length in the logarithm. The default is one
        pixel; use a smaller number for boxes in another unit.

    Returns:
      `[N, 4]`: float32, or float64 if an input is.

    References:
      [Rich feature hierarchies for accurate object detection](https://arxiv.org/abs/1311.2524),
      appendix C. 2014.
    """
    weights = check_weights(weights)
    min_side = POSITIVE.static("min_side", min_side)
    boxes, anchors = box_arrays(boxes=boxes, anchors=anchors)
    arguments.check_shape("boxes", boxes, anchors.shape, "one box for each anchor")
    return encode_corners(corners(to_box(boxes)), corners(to_box(anchors)), weights, min_side)


@check_call
def decode_boxes(
    offsets: ArrayLike, anchors: ArrayLike, *, weights: Sequence[float] = WEIGHTS
) -> Array:
    r"""Decode offsets into boxes. This is the inverse of `encode_boxes`.

    The result is differentiable in both arguments.

    Example:
      >>> from focal_jax.detection import decode_boxes
      >>> decode_boxes([[2.5, 0.0, 0.0, 0.0]], [[0, 0, 4, 4]]).tolist()
      [[1.0, 0.0, 5.0, 4.0]]

    Args:
      offsets: `[N, 4]`, real.
      anchors: `[N, 4]`, real: the anchor of each row of offsets.
      weights: the weights of `encode_boxes`.

    Returns:
      `[N, 4]`: float32, or float64 if an input is. The boxes are not clipped to the image.
    """
    weights = check_weights(weights)
    offsets, anchors = box_arrays(offsets=offsets, anchors=anchors)
    arguments.check_shape("offsets", offsets, anchors.shape, "four offsets for each anchor")
    dx, dy, log_width, log_height = (offsets[:, k] / weights[k] for k in range(4))
    x, y, width, height = _centers_and_sides(to_box(anchors))
    x, y = x + dx * width, y + dy * height
    half_width, half_height = 0.5 * width * jnp.exp(log_width), 0.5 * height * jnp.exp(log_height)
    return jnp.stack([x - half_width, y - half_height, x + half_width, y + half_height], -1)
