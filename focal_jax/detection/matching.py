"""Which annotation each anchor answers for."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _arrays, _checks
from focal_jax.detection.boxes import box_iou, rows_of_four

# What an anchor has in place of an annotation's index.
BACKGROUND = -1
IGNORED = -2


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
        padding and match nothing, whatever else they hold.
      positive_iou: an anchor whose largest IoU is at least this is positive.
      negative_iou: one whose largest IoU is less than this is background; between the
        two it is ignored.
      force_match: also make positive, whatever its IoU, every anchor that no other
        overlaps an annotation more than (torchvision's low-quality matches). It gets the
        annotation that it overlaps most itself. An annotation that no anchor touches
        forces nothing.

    Returns:
      `[A]`, int32: the index of the anchor's annotation, `BACKGROUND` (-1) or `IGNORED`
      (-2). The first of several annotations with the same IoU is taken.

    Raises:
      ValueError: for arrays of another shape, or `negative_iou` above `positive_iou`.

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
    if negative_iou > positive_iou:
        raise _checks.InputError(
            f"negative_iou: got {negative_iou}, wanted at most positive_iou, {positive_iou}"
        )
    annotations = _arrays.option("annotations", jnp.asarray(annotations), jnp.dtype(jnp.float32))
    _checks.shape(
        "annotations",
        annotations,
        (*annotations.shape[:1], 5),
        "rows of (x1, y1, x2, y2, class), class -1 for padding",
    )
    (anchors,) = rows_of_four(anchors=anchors)
    # One row of padding more, the last: what an anchor has where there is no annotation.
    annotations = jnp.pad(annotations, ((0, 1), (0, 0)), constant_values=-1)
    iou = box_iou(anchors, annotations[:, :4])
    iou = jnp.where(annotations[:, 4] == -1, -1, iou)
    best = jnp.argmax(iou, 1).astype(jnp.int32)
    largest = jnp.max(iou, 1)
    positive = largest >= positive_iou
    if force_match:
        nearest = iou == jnp.max(iou, 0, keepdims=True, initial=0)
        positive |= jnp.any(nearest & (iou > 0), 1)
    return jnp.where(positive, best, jnp.where(largest < negative_iou, BACKGROUND, IGNORED))
