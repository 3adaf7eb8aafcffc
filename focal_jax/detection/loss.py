"""RetinaNet's two losses, from logits and annotations to two numbers."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _arrays, _checks
from focal_jax._reduction import reduce_loss
from focal_jax._sigmoid import sigmoid_focal_loss
from focal_jax.detection.boxes import encode_boxes
from focal_jax.detection.matching import BACKGROUND, IGNORED, match_anchors


class RetinaNetLoss(NamedTuple):
    """What a RetinaNet minimizes: the sum of the two."""

    classification: Array
    regression: Array


def _targets(
    annotations: Array, anchors: Array, positive_iou: float, negative_iou: float
) -> tuple[Array, Array, Array]:
    """Return each anchor's match, class and offsets, for one image."""
    matches = match_anchors(
        anchors, annotations, positive_iou=positive_iou, negative_iou=negative_iou
    )
    # A row of padding, the last, for the anchors without an annotation: no class, and a
    # box with a finite encoding.
    annotations = jnp.pad(annotations, ((0, 1), (0, 0)), constant_values=-1)
    matched = annotations[jnp.maximum(matches, BACKGROUND)]
    return matches, matched[:, 4], encode_boxes(matched[:, :4], anchors)


def retinanet_loss(
    class_logits: ArrayLike,
    box_regression: ArrayLike,
    anchors: ArrayLike,
    annotations: ArrayLike,
    *,
    alpha: ArrayLike | None = 0.25,
    gamma: ArrayLike = 2.0,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    smooth_l1_beta: float = 1 / 9,
    empty_images: str = "background",
    normalization: str = "image",
    axis_name: str | tuple[str, ...] | None = None,
) -> RetinaNetLoss:
    r"""Compute RetinaNet's losses: focal for the classes, smooth L1 for the boxes.

    Anchors are matched by `match_anchors`. With `P` the number of positive ones,

        classification = sum over positive and background anchors and all classes of
                         sigmoid_focal_loss / max(1, P)
        regression     = sum over positive anchors and the 4 offsets of
                         smooth_l1(offset - encode_boxes(annotation, anchor)) / max(1, 4 P)

    where `smooth_l1(d)` is `d**2 / (2 beta)` up to `|d| = beta`, `|d| - beta / 2` beyond.

    Args:
      class_logits: `[B, A, C]`, floating: log-odds of every class, of which there is
        none for the background.
      box_regression: `[B, A, 4]`, floating: offsets in the units of `encode_boxes`.
      anchors: `[A, 4]`, real: boxes `(x1, y1, x2, y2)`, the same for every image.
      annotations: `[B, M, 5]`, real: `(x1, y1, x2, y2, class)`; rows of class -1 are
        padding, whatever else they hold. Another class outside `[0, C)` gives NaN at the
        anchors that match it.
      alpha: weight of an anchor's own class, the others weigh `1 - alpha`; None weighs
        all 1.
      gamma: focusing exponent, 0 or more.
      positive_iou: see `match_anchors`.
      negative_iou: see `match_anchors`.
      smooth_l1_beta: where smooth L1 turns from a parabola into a line.
      empty_images: `"background"` counts the anchors of an image without annotations as
        background, over `max(1, 0)`; `"skip"` gives such an image a loss of 0.
      normalization: `"image"` divides each image's losses by its own positives and
        averages over the images; `"batch"` divides the sum over all images by the
        positives of them all.
      axis_name: one name or several of mapped axes (`pmap`, `shard_map`, `vmap`) that
        the batch is spread over, for `normalization="batch"`: its positives are counted
        over all of them, so that `lax.pmean` of losses and gradients equals the result
        of one device. `"image"` needs no name for that.

    Returns:
      `RetinaNetLoss(classification, regression)`: two scalars, float32 for 16-bit
      inputs, else of `class_logits`' and of `box_regression`'s dtype. Where nothing
      matches, regression is 0.

    Raises:
      ValueError: for logits or offsets that are not floating, shapes that do not fit
        each other, an unknown `empty_images` or `normalization`, a `smooth_l1_beta` that
        is not positive, `negative_iou` above `positive_iou`, or what
        `sigmoid_focal_loss` refuses.
      NameError: for an `axis_name` that is not bound here.

    Differentiation: reverse mode in `class_logits`, `box_regression`, `alpha` and
      `gamma`; never NaN, also for boxes and anchors without area.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.detection import pyramid_anchors, retinanet_loss
      >>> anchors = pyramid_anchors((64, 64), levels=[3, 4])
      >>> logits = jnp.full((1, len(anchors), 2), -4.6)
      >>> annotations = jnp.array([[[10.0, 12.0, 44.0, 47.0, 1.0], [-1.0] * 5]])
      >>> loss = retinanet_loss(logits, jnp.zeros((1, len(anchors), 4)), anchors, annotations)
      >>> [round(x.item(), 4) for x in loss]
      [1.1297, 1.0437]

    References:
      Lin, Goyal, Girshick, He, Dollar. [Focal Loss for Dense Object
      Detection](https://arxiv.org/abs/1708.02002). ICCV 2017.
    """
    class_logits, box_regression = jnp.asarray(class_logits), jnp.asarray(box_regression)
    annotations = _arrays.option("annotations", jnp.asarray(annotations), jnp.dtype(jnp.float32))
    anchors = jnp.asarray(anchors)
    _checks.floating("class_logits", class_logits)
    _checks.floating("box_regression", box_regression)
    if class_logits.ndim != 3:
        raise _checks.InputError(
            f"class_logits: got shape {class_logits.shape}, wanted [images, anchors, classes]"
        )
    images, count, classes = class_logits.shape
    _checks.shape("box_regression", box_regression, (images, count, 4), "four offsets an anchor")
    _checks.shape("anchors", anchors, (count, 4), "a box for each anchor of class_logits")
    if annotations.shape[:1] + annotations.shape[2:] != (images, 5):
        raise _checks.InputError(
            f"annotations: got shape {annotations.shape}, wanted ({images}, any, 5): rows of "
            "(x1, y1, x2, y2, class) for each image of class_logits"
        )
    for name, value, known in (
        ("empty_images", empty_images, ("background", "skip")),
        ("normalization", normalization, ("image", "batch")),
    ):
        if value not in known:
            raise _checks.InputError(f"{name}: got {value!r}, wanted one of {known}")
    if not smooth_l1_beta > 0:
        raise _checks.InputError(f"smooth_l1_beta: got {smooth_l1_beta}, wanted more than 0")

    targets = partial(
        _targets, anchors=anchors, positive_iou=positive_iou, negative_iou=negative_iou
    )
    matches, matched_class, offsets = jax.vmap(targets)(annotations)
    positive, counts = matches >= 0, matches != IGNORED
    if empty_images == "skip":
        counts &= jnp.any(annotations[..., 4] != -1, 1, keepdims=True)

    losses = sigmoid_focal_loss(
        class_logits,
        jax.nn.one_hot(matched_class.astype(jnp.int32), classes, dtype=jnp.bool_),
        alpha=alpha,
        gamma=gamma,
        where=counts[..., None],
    )
    possible = (matched_class >= -1) & (matched_class < classes)
    losses *= jnp.where(possible, 1, jnp.nan).astype(losses.dtype)[..., None]

    dtype = _arrays.compute_dtype(box_regression)
    error = box_regression.astype(dtype) - offsets.astype(dtype)
    error = _arrays.keep(error, positive[..., None])
    smooth_l1 = optax.huber_loss(error, delta=smooth_l1_beta) / smooth_l1_beta

    positives = jnp.sum(positive, 1, dtype=jnp.int32)
    if normalization == "image":
        divide = jax.vmap(lambda losses, divisor: reduce_loss(losses, normalization=divisor))
        losses, smooth_l1 = divide(losses, positives), divide(smooth_l1, 4 * positives)
        return RetinaNetLoss(reduce_loss(losses), reduce_loss(smooth_l1))
    positives = jnp.sum(positives)
    if axis_name is not None:
        positives = lax.psum(positives, axis_name)
    return RetinaNetLoss(
        reduce_loss(losses, normalization=positives, axis_name=axis_name),
        reduce_loss(smooth_l1, normalization=4 * positives, axis_name=axis_name),
    )
