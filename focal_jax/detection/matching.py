"""Match anchors with annotations by intersection over union."""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax.detection.boxes import UNIT, Box, box_arrays, clip_coordinates, iou, pairwise, to_box
from focal_jax.engine import arguments
from focal_jax.engine.checks import check_holds_class
from focal_jax.engine.layout import replicate_on_mesh
from focal_jax.engine.options import check_call, known_numbers
from focal_jax.engine.platform import by_platform
from focal_jax.engine.sharding import cast_to_common_varying

__all__ = ["BACKGROUND", "IGNORED", "match_anchors"]

# Results of the matching in place of the index of an annotation.
BACKGROUND = -1
IGNORED = -2

_NO_MATCH = -1  # the class of padding, and the IoU and the index where there is no annotation


def iou_thresholds(positive_iou: Any, negative_iou: Any) -> tuple[float, float]:
    """Return the two thresholds as floats; they are in [0, 1] and in order."""
    positive = UNIT.static("positive_iou", positive_iou)
    negative = UNIT.static("negative_iou", negative_iou)
    got = f"negative_iou: got {negative_iou}"
    arguments.require(negative <= positive, f"{got}, wanted at most positive_iou, {positive_iou}")
    return positive, negative


def _better(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    """Return the tuple `(IoU, index, ...)` with the larger IoU, or with the lower index."""
    choose_b = (b[0] > a[0]) | ((b[0] == a[0]) & (b[1] < a[1]))
    return jax.tree.map(lambda x, y: jnp.where(choose_b, y, x), a, b)


def _best_by_reduce(anchors: Box, boxes: Box, valid: Array, *columns: Array) -> tuple[Array, ...]:
    """Reduce over all pairs at once. XLA fuses the IoUs, so none is written to memory."""
    ious = jnp.where(valid, pairwise(iou, anchors, boxes), _NO_MATCH)
    operands = (ious, *(jnp.broadcast_to(x, ious.shape) for x in columns))
    initial = tuple(jnp.asarray(_NO_MATCH, x.dtype) for x in operands)
    return lax.reduce(cast_to_common_varying(*operands), initial, _better, (1,))


def _best_by_scan(anchors: Box, boxes: Box, valid: Array, *columns: Array) -> tuple[Array, ...]:
    """Scan over the annotations. XLA:CPU vectorizes a step, but not the reduction over pairs."""

    def step(best, annotation):
        box, valid, *columns = annotation
        ious = jnp.where(valid, iou(anchors, box), _NO_MATCH)
        return _better(best, (ious, *(jnp.broadcast_to(x, ious.shape) for x in columns))), None

    initial = tuple(jnp.full_like(anchors.x1, _NO_MATCH, x.dtype) for x in (anchors.x1, *columns))
    anchors, xs, initial = cast_to_common_varying(anchors, (boxes, valid, *columns), initial)
    return lax.scan(step, initial, xs)[0]


def annotation_array(
    annotations: Any, anchors: Any, images: tuple[int, ...] = (), num_classes: int | None = None
) -> Array:
    """Return annotations as a floating array `[*images, M, 5]`. Known values are checked too."""
    wanted = "rows of (x1, y1, x2, y2, class); rows of class -1 pad images to equal lengths"
    array = arguments.number_array("annotations", annotations, jnp.dtype(jnp.float32), wanted)
    rows = array.shape[len(images) : len(images) + 1] or (1,)
    arguments.check_shape("annotations", array, (*images, *rows, 5), wanted)
    known = known_numbers(annotations, "annotations", wanted)
    known = np.zeros((0, 5)) if known is None else known[known[..., 4] != _NO_MATCH]
    largest = np.max(known[:, 4], initial=0) if num_classes is None else num_classes - 1
    check_holds_class("annotations", array, largest)
    if len(known) and np.all(np.abs(known[:, :4]) <= 1):
        pixels = known_numbers(anchors, "anchors", "numbers")
        if pixels is not None and np.any(np.abs(pixels) >= 100):
            text = "annotations: got coordinates of at most 1, wanted pixels as for the anchors"
            warnings.warn(text, stacklevel=4)  # the caller of a checked function
    return array


def are_boxes(annotations: Array) -> Array:
    """Return which rows have corners in order: `x1 <= x2` and `y1 <= y2`. A NaN is not in order."""
    return jnp.all(annotations[..., :2] <= annotations[..., 2:4], -1)


def prepare(anchors: Array, annotations: Array) -> tuple[Array, Array]:
    """Return anchors and annotations in one dtype, with clipped coordinates, for `find_best`.

    An anchor with a NaN becomes a point, which overlaps nothing.
    """
    dtype = np.result_type(anchors.dtype, arguments.compute_dtype(annotations))
    anchors = jnp.where(jnp.any(jnp.isnan(anchors), 1, keepdims=True), 0, anchors)
    arrays = clip_coordinates(anchors.astype(dtype)), clip_coordinates(annotations.astype(dtype))
    return lax.optimization_barrier(arrays)  # else XLA fuses the clipping into every pair


@partial(jax.jit, inline=True)  # the step is a new function, which eager calls compile every time
def find_best(anchors: Array, annotations: Array, *columns: Array) -> tuple[Array, ...]:
    """Return the IoU and the index of the annotation with the largest IoU for each anchor.

    Anchors `[A, 4]` and annotations `[M, 5]` come from `prepare`. The result also has the entries
    of `columns`, arrays `[M]`, at that index. Everything is -1 if there is no annotation.
    """
    valid = (annotations[:, 4] != _NO_MATCH) & are_boxes(annotations)
    index = jnp.arange(annotations.shape[0], dtype=jnp.int32)
    args = (to_box(anchors), to_box(annotations), valid, index, *columns)
    return by_platform(_best_by_scan, _best_by_reduce, *args)


def are_forced(anchors: Array, annotations: Array) -> Array:
    """Return which anchors are positive by `force_match`, for arrays as in `find_best`."""
    ious = pairwise(iou, to_box(anchors), to_box(annotations))
    largest_of_annotation = jnp.max(ious, 0, keepdims=True, initial=0)
    valid = annotations[None, :, 4] != _NO_MATCH
    return jnp.any((ious == largest_of_annotation) & (ious > 0) & valid, 1)


@check_call
def match_anchors(
    anchors: ArrayLike,
    annotations: ArrayLike,
    *,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    force_match: bool = False,
) -> Array:
    r"""Match each anchor with the annotation that has the largest IoU with it.

    Example:
      >>> from focal_jax.detection import match_anchors
      >>> anchors = [[0, 0, 4, 4], [0, 0, 4, 9], [20, 20, 24, 24]]
      >>> annotations = [[0, 0, 4, 4, 7], [-1, -1, -1, -1, -1]]
      >>> match_anchors(anchors, annotations).tolist()
      [0, -2, -1]

    Args:
      anchors: `[A, 4]`, real. An anchor with a NaN overlaps nothing.
      annotations: `[M, 5]`, real: `(x1, y1, x2, y2, class)`. Rows with the class -1 are padding
        and match nothing. A box with a NaN, or with `x2 < x1` or `y2 < y1`, matches nothing.
      positive_iou: in [0, 1]. An anchor is positive if its largest IoU is at least this number.
      negative_iou: in [0, 1]. An anchor is background if its largest IoU is less than this number.
        Between the two thresholds an anchor is ignored.
      force_match: whether an anchor is also positive if no other anchor has a larger IoU with some
        annotation (torchvision's low-quality matches). Such an anchor is matched with its own best
        annotation. Annotations that overlap no anchor force nothing.

    Returns:
      `[A]`, int32: the index of the matched annotation, `BACKGROUND` (-1) or `IGNORED` (-2). Of
      several annotations with the same IoU the first is matched.

    References:
      [Focal Loss for Dense Object Detection](https://arxiv.org/abs/1708.02002). ICCV 2017.
    """
    positive_iou, negative_iou = iou_thresholds(positive_iou, negative_iou)
    force_match = arguments.static_bool("force_match", force_match)
    annotations = annotation_array(annotations, anchors)
    (anchors,) = box_arrays(anchors=anchors)
    anchors = replicate_on_mesh(anchors, annotations)
    args = lax.stop_gradient((anchors, annotations))
    return _match(positive_iou, negative_iou, force_match, *args)


@partial(jax.jit, static_argnums=(0, 1, 2))  # `jax_debug_nans` would report a NaN of a padding row
def _match(
    positive_iou: float, negative_iou: float, force_match: bool, anchors: Array, annotations: Array
) -> Array:
    anchors, annotations = prepare(anchors, annotations)
    largest, index = find_best(anchors, annotations)
    positive = largest >= positive_iou
    if force_match:
        positive |= are_forced(anchors, annotations)
    return jnp.where(positive, index, jnp.where(largest < negative_iou, BACKGROUND, IGNORED))
