"""Which annotation each anchor answers for."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs
from focal_jax._varying import aligned_varying
from focal_jax.detection import _options
from focal_jax.detection.boxes import Box, bounded, columns, overlap, pairs, rows_of_four

__all__ = ["BACKGROUND", "IGNORED", "match_anchors"]

# What an anchor has in place of an annotation's index.
BACKGROUND = -1
IGNORED = -2


# What of an annotation is no overlap: padding, a box with a NaN, and none at all.
_NOTHING = -1


def _nearer(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    """Return of two `(IoU, index, ...)` the one with the larger IoU, or else the first."""
    second = (b[0] > a[0]) | ((b[0] == a[0]) & (b[1] < a[1]))
    return jax.tree.map(lambda x, y: jnp.where(second, y, x), a, b)


def _by_reduction(anchors: Box, boxes: Box, real: Array, *carried: Array) -> tuple[Array, ...]:
    """Find the nearest in one reduction over all pairs, of which none is written to memory."""
    iou = jnp.where(real, pairs(anchors, boxes), _NOTHING)
    operands = (iou, *(jnp.broadcast_to(x, iou.shape) for x in carried))
    nothing = tuple(jnp.asarray(_NOTHING, x.dtype) for x in operands)
    return lax.reduce(aligned_varying(*operands), nothing, _nearer, (1,))


def _by_turns(anchors: Box, boxes: Box, real: Array, *carried: Array) -> tuple[Array, ...]:
    """Find the nearest one annotation after another, each for all the anchors at once.

    XLA's CPU backend has vector instructions for this, and none for such a reduction.
    """

    def step(nearest, annotation):
        box, real, *carried = annotation
        iou = jnp.where(real, overlap(anchors, box), _NOTHING)
        found = (iou, *(jnp.broadcast_to(x, iou.shape) for x in carried))
        return _nearer(nearest, found), None

    nothing = tuple(jnp.full_like(anchors.x1, _NOTHING, x.dtype) for x in (anchors.x1, *carried))
    anchors, annotations, nothing = aligned_varying(anchors, (boxes, real, *carried), nothing)
    return lax.scan(step, nothing, annotations)[0]


def comparable(anchors: Array, annotations: Array) -> tuple[Array, Array]:
    """Return both in one dtype and bounded, as `nearest` wants them."""
    dtype = np.result_type(anchors.dtype, _inputs.compute_dtype(annotations))
    both = bounded(anchors.astype(dtype)), bounded(annotations.astype(dtype))
    return lax.optimization_barrier(both)  # bounded once, and not again in every pair


def nearest(anchors: Array, annotations: Array, *carried: Array) -> tuple[Array, ...]:
    """Return of the annotation nearest to each anchor the IoU, the index, and what else it has.

    The anchors `[A, 4]` and annotations `[M, 5]` are `comparable`; `carried` are more numbers
    of each annotation, `[M]`. An anchor without an annotation has -1 for all of them. The
    coordinates lie along the anchors in the whole of it.
    """
    real = (annotations[:, 4] != _NOTHING) & ~jnp.any(jnp.isnan(annotations[:, :4]), 1)
    index = jnp.arange(len(annotations), dtype=jnp.int32)
    args = (columns(anchors), columns(annotations), real, index, *carried)
    return lax.platform_dependent(*args, cpu=_by_turns, default=_by_reduction)


def match_anchors(
    anchors: ArrayLike,
    annotations: ArrayLike,
    *,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    force_match: bool = False,
) -> Array:
    r"""Match every anchor with the annotation that it overlaps most.

    Args:
      anchors: `[A, 4]`, real: boxes `(x1, y1, x2, y2)`.
      annotations: `[M, 5]`, real: `(x1, y1, x2, y2, class)`; rows of class -1 are
        padding and match nothing, whatever else they hold, nor does a box with a NaN.
      positive_iou: in [0, 1]; an anchor whose largest IoU is at least this is positive.
      negative_iou: in [0, 1]; one whose largest IoU is less than this is background; between the
        two it is ignored.
      force_match: also make positive, whatever its IoU, every anchor that no other
        overlaps an annotation more than (torchvision's low-quality matches). It gets the
        annotation that it overlaps most itself. An annotation that no anchor touches
        forces nothing.

    Returns:
      `[A]`, int32: the index of the anchor's annotation, `BACKGROUND` (-1) or `IGNORED`
      (-2). The first of several annotations with the same IoU is taken.

    Raises:
      ValueError: for arrays of another shape, thresholds that are not Python numbers in
        [0, 1], or `negative_iou` above `positive_iou`.

    Differentiation: none; the result is integer.

    Example:
      >>> from focal_jax.detection import match_anchors
      >>> anchors = [[0, 0, 4, 4], [0, 0, 4, 9], [20, 20, 24, 24]]
      >>> annotations = [[0, 0, 4, 4, 7], [-1, -1, -1, -1, -1]]
      >>> match_anchors(anchors, annotations).tolist()
      [0, -2, -1]

    References:
      Lin, Goyal, Girshick, He, Dollar. [Focal Loss for Dense Object
      Detection](https://arxiv.org/abs/1708.02002). ICCV 2017. Section 4.
    """
    positive_iou, negative_iou = _options.iou_thresholds(positive_iou, negative_iou)
    annotations = _inputs.option("annotations", annotations, jnp.dtype(jnp.float32))
    _checks.shape(
        "annotations",
        annotations,
        (*annotations.shape[:1], 5),
        "rows of (x1, y1, x2, y2, class), class -1 for padding",
    )
    (anchors,) = rows_of_four(anchors=anchors)
    anchors, annotations = comparable(anchors, annotations)
    iou, index = nearest(anchors, annotations)
    positive = iou >= positive_iou
    if force_match:
        each = pairs(columns(anchors), columns(annotations))
        most = jnp.max(each, 0, keepdims=True, initial=0)
        real = annotations[None, :, 4] != _NOTHING
        positive |= jnp.any((each == most) & (each > 0) & real, 1)
    return jnp.where(positive, index, jnp.where(iou < negative_iou, BACKGROUND, IGNORED))
