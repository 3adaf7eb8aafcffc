"""Boxes `(x1, y1, x2, y2)`: their overlap, and their offsets from anchors."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _arrays, _checks

# The least divisor: a union without area, or an anchor without a side, divides by this
# and not by 0.
_TINY = 1e-8
# The unit of each offset: a RetinaNet's targets are of about that spread.
_UNITS = (0.1, 0.1, 0.2, 0.2)


def rows_of_four(**arrays: ArrayLike) -> list[Array]:
    """Return arrays checked to be `[any, 4]`, floating, in the widest of their dtypes."""
    checked = []
    for name, array in arrays.items():
        array = _arrays.option(name, jnp.asarray(array), jnp.dtype(jnp.float32))
        _checks.shape(name, array, (*array.shape[:1], 4), "a row of four numbers for each box")
        checked.append(array)
    dtype = np.result_type(*(_arrays.compute_dtype(array) for array in checked))
    return [array.astype(dtype) for array in checked]


def _centers_and_sides(boxes: Array) -> tuple[Array, Array]:
    sides = boxes[:, 2:] - boxes[:, :2]
    return boxes[:, :2] + 0.5 * sides, sides


def _area(sides: Array) -> Array:
    return sides[..., 0] * sides[..., 1]


def box_iou(a: ArrayLike, b: ArrayLike) -> Array:
    r"""Compute the intersection over union of every box in `a` with every box in `b`.

        IoU = |a & b| / max(|a| + |b| - |a & b|, 1e-8)

    Args:
      a: `[N, 4]`, real: boxes `(x1, y1, x2, y2)`.
      b: `[M, 4]`, real: likewise.

    Returns:
      `[N, M]`, in [0, 1]: float32, or float64 where an input is. A box without area
      overlaps nothing: 0, never NaN.

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
    (_, sides_a), (_, sides_b) = _centers_and_sides(a), _centers_and_sides(b)
    a, b = a[:, None], b[None]
    ends, starts = jnp.minimum(a[..., 2:], b[..., 2:]), jnp.maximum(a[..., :2], b[..., :2])
    intersection = _area(jnp.maximum(ends - starts, 0))
    union = _area(sides_a)[:, None] + _area(sides_b)[None] - intersection
    return intersection / jnp.maximum(union, _TINY)


def encode_boxes(boxes: ArrayLike, anchors: ArrayLike, *, min_side: float = 1.0) -> Array:
    r"""Encode boxes as offsets from their anchors: what a RetinaNet regresses.

    With `(x, y)` the center and `(w, h)` the sides of a box, `_a` for its anchor's,

        (x - x_a) / w_a / 0.1, (y - y_a) / h_a / 0.1, log(w / w_a) / 0.2, log(h / h_a) / 0.2

    Args:
      boxes: `[N, 4]`, real: boxes `(x1, y1, x2, y2)`.
      anchors: `[N, 4]`, real: the anchor of each.
      min_side: a shorter side of a box counts as this long in the logarithm: one pixel,
        so that an empty box has an encoding too. Give less for boxes in another unit.

    Returns:
      `[N, 4]`: float32, or float64 where an input is. Finite for finite boxes.

    Raises:
      ValueError: for inputs that are not rows of four real numbers, as many of each.

    Differentiation: any mode, in both.

    Example:
      >>> from focal_jax.detection import encode_boxes
      >>> encode_boxes([[1, 0, 5, 4]], [[0, 0, 4, 4]]).tolist()
      [[2.5, 0.0, 0.0, 0.0]]

    References:
      Girshick, Donahue, Darrell, Malik. [Rich feature hierarchies for accurate object
      detection](https://arxiv.org/abs/1311.2524). 2014. Appendix C.
    """
    boxes, anchors = rows_of_four(boxes=boxes, anchors=anchors)
    _checks.shape("boxes", boxes, anchors.shape, "one for each anchor")
    centers, sides = _centers_and_sides(boxes)
    anchor_centers, anchor_sides = _centers_and_sides(anchors)
    anchor_sides = jnp.maximum(anchor_sides, _TINY)
    shift = (centers - anchor_centers) / anchor_sides
    growth = jnp.log(jnp.maximum(sides, min_side) / anchor_sides)
    return jnp.concatenate([shift, growth], -1) / jnp.asarray([_UNITS], boxes.dtype)


def decode_boxes(offsets: ArrayLike, anchors: ArrayLike) -> Array:
    r"""Decode a network's offsets into boxes: the inverse of `encode_boxes`.

    Args:
      offsets: `[N, 4]`, real: as `encode_boxes` gives them.
      anchors: `[N, 4]`, real: the anchor of each, `(x1, y1, x2, y2)`.

    Returns:
      `[N, 4]`, boxes `(x1, y1, x2, y2)`: float32, or float64 where an input is. They are
      not clipped to any image.

    Raises:
      ValueError: for inputs that are not rows of four real numbers, as many of each.

    Differentiation: any mode, in both.

    Example:
      >>> from focal_jax.detection import decode_boxes
      >>> decode_boxes([[2.5, 0.0, 0.0, 0.0]], [[0, 0, 4, 4]]).tolist()
      [[1.0, 0.0, 5.0, 4.0]]

    References:
      As for `encode_boxes`.
    """
    offsets, anchors = rows_of_four(offsets=offsets, anchors=anchors)
    _checks.shape("offsets", offsets, anchors.shape, "a row for each anchor")
    offsets = offsets * jnp.asarray([_UNITS], offsets.dtype)
    anchor_centers, anchor_sides = _centers_and_sides(anchors)
    centers = anchor_centers + offsets[:, :2] * anchor_sides
    half_sides = 0.5 * anchor_sides * jnp.exp(offsets[:, 2:])
    return jnp.concatenate([centers - half_sides, centers + half_sides], -1)
