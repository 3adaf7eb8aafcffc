"""The classification and regression losses of RetinaNet."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax.catalogue import function_of
from focal_jax.detection.boxes import (
    POSITIVE,
    WEIGHTS,
    Box,
    box_arrays,
    check_weights,
    corners,
    encode_corners,
    pairwise,
    share_inside,
    to_box,
)
from focal_jax.detection.matching import (
    BACKGROUND,
    IGNORED,
    annotation_array,
    are_boxes,
    are_forced,
    find_best,
    iou_thresholds,
    prepare,
)
from focal_jax.engine import arguments, scalar
from focal_jax.engine.arguments import InputError, check_shape, shown
from focal_jax.engine.layout import replicate_on_mesh
from focal_jax.engine.options import check_call
from focal_jax.engine.platform import by_platform
from focal_jax.engine.rules import keep_rules
from focal_jax.losses.sigmoid import sigmoid_focal_loss

__all__ = ["RetinaNetLoss", "retinanet_loss"]


class RetinaNetLoss(NamedTuple):
    """The two losses of a RetinaNet. Training minimizes their sum.

    Attributes:
      classification: a scalar in the dtype of the loss of the logits.
      regression: a scalar in the dtype of the loss of the offsets.
    """

    classification: Array
    regression: Array


class Best(NamedTuple):
    """The annotation that has the largest IoU with each anchor.

    `annotation` is the index of the annotation, and `box` is 0. On a TPU, where a gather is slow,
    `annotation` is 0, and `box` is the box, which takes four times the memory of the index.
    """

    iou: Array
    label: Array
    annotation: Array
    box: Box

    def corners(self, annotations: Array) -> tuple[Array, Array]:
        """Return the corners of the boxes, see `boxes.corners`."""

        def gather(annotations, best):
            return jax.tree.map(lambda x: x[best.annotation], corners(to_box(annotations)))

        return by_platform(
            gather, gather, annotations, self, on_tpu=lambda _, best: corners(best.box)
        )


def gather_best(anchors: Array, annotations: Array) -> Best:
    """Return the best annotations for CPUs and GPUs."""
    iou, index = find_best(anchors, annotations)
    index, zero = jnp.maximum(index, 0), jnp.zeros_like(iou)
    return Best(iou, annotations[index, 4], index, Box(zero, zero, zero, zero))


def carry_best(anchors: Array, annotations: Array) -> Best:
    """Return the best annotations for TPUs."""
    columns = *to_box(annotations), annotations[:, 4]
    iou, index, *box, label = find_best(anchors, annotations, *columns)
    return Best(iou, label, jnp.zeros_like(index), Box(*box))


class _Matching(NamedTuple):
    """The options of the matching."""

    positive_iou: float
    negative_iou: float
    force_match: bool

    def labels(
        self, annotations: Array, regions: Array | None, anchors: Array
    ) -> tuple[Array, Best]:
        """Return each anchor's class, `BACKGROUND` or `IGNORED`, and its best annotation."""
        args = anchors, annotations
        best = by_platform(gather_best, gather_best, *args, on_tpu=carry_best)
        unmatched = jnp.where(best.iou < self.negative_iou, BACKGROUND, IGNORED)
        if regions is not None:
            inside = pairwise(share_inside, to_box(anchors), to_box(regions))
            unmatched = jnp.where(jnp.any(inside >= 0.5, 1), IGNORED, unmatched)
        positive = best.iou >= self.positive_iou
        if self.force_match:
            positive |= are_forced(anchors, annotations)
        return jnp.where(positive, best.label.astype(jnp.int32), unmatched), best


def _are_valid(annotations: Array, num_classes: int) -> Array:
    """Return, for each image, whether all rows are padding, or finite boxes of existing classes."""
    label = annotations[..., 4]
    is_class = (label >= 0) & (label < num_classes) & (label == jnp.floor(label))
    valid = is_class & jnp.all(jnp.isfinite(annotations), -1) & are_boxes(annotations)
    return jnp.all(valid | (label == BACKGROUND), 1)


@partial(jax.jit, static_argnums=(0, 1))  # `jax_debug_nans` would report a NaN of a padding row
def _targets(
    matching: _Matching, num_classes: int, boxes: tuple[Array, Array], ignored: Array | None
) -> tuple[Array, Array, Array, tuple[Array, Best, Array]]:
    """Return masks of valid images and of images with objects, the labels, and the matching.

    The matching is the annotations, the best one of each anchor, and the anchors.
    """
    valid = _are_valid(boxes[1], num_classes)[:, None]
    anchors, annotations = prepare(*boxes)
    is_padding = annotations[..., 4:] == BACKGROUND
    annotations = jnp.where(is_padding, BACKGROUND, annotations)  # a box of padding may be NaN
    regions = None
    if ignored is not None:
        ignored = ignored[..., None] & ~is_padding
        regions, annotations = (
            jnp.where(ignored, annotations, 0),
            jnp.where(ignored, BACKGROUND, annotations),
        )
    # With one more row of padding there is always a row to gather.
    annotations = jnp.pad(annotations, ((0, 0), (0, 1), (0, 0)), constant_values=BACKGROUND)
    labels = jax.vmap(matching.labels, in_axes=(0, 0, None))
    label, best = labels(annotations, regions, anchors)
    has_objects = jnp.any(annotations[..., 4:] != BACKGROUND, 1, keepdims=True)
    return valid, has_objects, label[..., None], (annotations, best, anchors)


class _Regression(NamedTuple):
    """The options of the regression loss."""

    weights: tuple[float, ...]
    min_side: float
    beta: float

    def errors(self, offsets: Array, positive: Array, annotations: Array, best: Best, anchors: Any):
        """Return the errors of the offsets of positive anchors, and 0 for the others."""

        def encode(annotations, best):
            box = best.corners(annotations)
            return encode_corners(box, corners(to_box(anchors)), self.weights, self.min_side)

        wanted = jax.vmap(encode)(annotations, best).astype(offsets.dtype)
        return arguments.mask_to_zero(offsets - wanted, positive)


# `optax.huber_loss` of the errors would keep them in memory for its gradient.
@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _smooth_l1_core(options: _Regression, *args: Any) -> Array:
    abs_error = jnp.abs(options.errors(*args))
    quadratic = jnp.minimum(abs_error, options.beta)
    return (quadratic / options.beta) * (abs_error - 0.5 * quadratic)


@_smooth_l1_core.defjvp
def _smooth_l1_jvp(options, primals, tangents):
    offsets, positive, annotations, best, anchors = primals
    box = jax.tree.map(scalar.prevent_cse, best.box)
    matching = scalar.prevent_cse(annotations), best._replace(box=box), anchors
    slope = jnp.clip(options.errors(offsets, positive, *matching) / options.beta, -1, 1)
    return _smooth_l1_core(options, *primals), slope * tangents[0]


_smooth_l1 = keep_rules(_smooth_l1_core, num_static=1)


def _class_loss(class_loss: Any, alpha: Any, gamma: Any) -> Callable[..., Array]:
    """Return the classification loss with its options."""
    if class_loss is None:
        return partial(sigmoid_focal_loss, alpha=alpha, gamma=gamma)
    for name, option, default in (("alpha", alpha, 0.25), ("gamma", gamma, 2.0)):
        if not (isinstance(option, float) and option == default):
            raise InputError(
                f"{name}: got {option} together with class_loss, wanted the option in class_loss, "
                "for example by functools.partial"
            )
    loss = function_of(class_loss, "class_loss", kinds=("elementwise",))
    try:
        inspect.signature(loss).bind("logits", "labels", where="where")
    except (TypeError, ValueError) as error:
        wanted = f"a function of logits, labels and where=: {error}"
        raise InputError(f"class_loss: got {shown(class_loss)}, wanted {wanted}") from error
    return loss


@check_call
def retinanet_loss(
    class_logits: ArrayLike,
    box_regression: ArrayLike,
    anchors: ArrayLike,
    annotations: ArrayLike,
    *,
    alpha: ArrayLike | None = 0.25,
    gamma: ArrayLike = 2.0,
    class_loss: str | Callable[..., Array] | None = None,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    force_match: bool = False,
    ignored: ArrayLike | None = None,
    weights: Sequence[float] = WEIGHTS,
    min_side: float = 1.0,
    smooth_l1_beta: float = 1 / 9,
    empty_images: str = "background",
    normalization: str = "image",
    axis_name: str | tuple[str, ...] | None = None,
) -> RetinaNetLoss:
    r"""Compute the losses of RetinaNet: a focal loss for classes and smooth L1 for boxes.

    `match_anchors` matches the anchors. With the number `P` of positive anchors,

        classification = sum of sigmoid_focal_loss / max(1, P)
                         over positive and background anchors and all classes
        regression     = sum of smooth_l1(offset - encode_boxes(annotation, anchor)) / max(1, 4 P)
                         over positive anchors and the 4 offsets

    where `smooth_l1(d)` is `d**2 / (2 beta)` up to `|d| = beta`, and `|d| - beta / 2` beyond it.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.detection import pyramid_anchors, retinanet_loss
      >>> anchors = pyramid_anchors((64, 64), levels=[3, 4])
      >>> logits = jnp.full((1, len(anchors), 2), -4.6)
      >>> annotations = jnp.array([[[10.0, 12.0, 44.0, 47.0, 1.0], [-1.0] * 5]])
      >>> loss = retinanet_loss(logits, jnp.zeros((1, len(anchors), 4)), anchors, annotations)
      >>> [round(x.item(), 4) for x in loss]
      [1.1297, 1.0437]

    Args:
      class_logits: `[B, A, C]`, floating. There is no background class.
      box_regression: `[B, A, 4]`, floating: offsets in the units of `encode_boxes`.
      anchors: `[A, 4]`, real: the anchors of every image. No gradient flows through them.
      annotations: `[B, M, 5]`, real: `(x1, y1, x2, y2, class)`. Rows with the class -1 are padding
        and are ignored. A row that is not finite, that has `x2 < x1` or `y2 < y1`, or whose class
        is not an integer in `[0, C)`, makes both losses of its image NaN. No gradient flows through
        the annotations.
      alpha: the weight of an anchor's own class; the other classes have the weight `1 - alpha`.
      gamma: focusing exponent.
      class_loss: replaces `sigmoid_focal_loss`: the name of an elementwise loss of this package, or
        a function of logits and bool labels `[B, A, C]` and the mask `where=` `[B, A, 1]`. Its
        options are set by `functools.partial`; `alpha` and `gamma` do not apply to it.
      positive_iou: a threshold of `match_anchors`.
      negative_iou: a threshold of `match_anchors`.
      force_match: whether every annotation makes its best anchors positive, see `match_anchors`.
      ignored: None, or `[B, M]`, bool: True for annotations of whole regions of objects (COCO's
        `iscrowd`). No anchor is matched with them. An anchor that has at least half of its area
        inside one and is not positive counts in neither loss.
      weights: the weights of `encode_boxes`; torchvision's RetinaNet uses `(1, 1, 1, 1)`.
      min_side: the shortest side of `encode_boxes`; below 1 for boxes in another unit than pixels.
      smooth_l1_beta: the transition of smooth L1 from quadratic to linear.
      empty_images: `"background"` treats all anchors of an image without annotations as
        background; `"skip"` sets the losses of such an image to 0.
      normalization: `"image"` divides the losses of each image by its own positive anchors, and
        averages over the images; `"batch"` divides by the positive anchors of the batch.
      axis_name: the names of mapped axes over which `normalization="batch"` counts the positive
        anchors, so that `lax.pmean` of losses and gradients equals the result on one device.

    Returns:
      `RetinaNetLoss(classification, regression)`: two scalars.

    Raises:
      InputError: if an argument is invalid, or `class_loss` returns an invalid shape or dtype.
      NameError: if `axis_name` is used and is not bound.

    References:
      [Focal Loss for Dense Object Detection](https://arxiv.org/abs/1708.02002). ICCV 2017.
    """
    class_logits = arguments.floating_array("class_logits", class_logits)
    box_regression = arguments.floating_array("box_regression", box_regression)
    if class_logits.ndim != 3:
        raise InputError(f"class_logits: got shape {class_logits.shape}, wanted [B, A, C]")
    images, num_anchors, num_classes = class_logits.shape
    check_shape("box_regression", box_regression, (images, num_anchors, 4), "4 offsets an anchor")
    annotations = annotation_array(annotations, anchors, (images,), num_classes)
    (anchors,) = box_arrays(anchors=anchors)
    check_shape("anchors", anchors, (num_anchors, 4), "a box for each anchor of class_logits")
    for name, value, known in (
        ("empty_images", empty_images, ("background", "skip")),
        ("normalization", normalization, ("image", "batch")),
    ):
        if not isinstance(value, str) or value not in known:
            raise InputError(f"{name}: got {shown(value)}, wanted one of {known}")
    arguments.check_axis_name("axis_name", axis_name)
    matching = _Matching(
        *iou_thresholds(positive_iou, negative_iou),
        arguments.static_bool("force_match", force_match),
    )
    regression = _Regression(
        check_weights(weights),
        POSITIVE.static("min_side", min_side),
        POSITIVE.static("smooth_l1_beta", smooth_l1_beta),
    )
    if ignored is not None:
        ignored = arguments.as_array("ignored", ignored, "bool, whether an annotation is a region")
        if ignored.dtype != bool:
            raise InputError(f"ignored: got dtype {ignored.dtype}, wanted bool")
        check_shape("ignored", ignored, annotations.shape[:2], "one for each annotation")
    loss = _class_loss(class_loss, alpha, gamma)
    # Check the options of the loss before the matching.
    any_of = partial(jnp.any, axis=2, keepdims=True)
    losses = jax.eval_shape(lambda z: loss(z, z > 0, where=any_of(z > 0)), class_logits)
    has_shape = getattr(losses, "shape", None) == class_logits.shape
    if not (has_shape and jnp.issubdtype(losses.dtype, jnp.floating)):
        raise InputError(
            f"class_loss: got a function that returns {losses}, wanted one floating loss per "
            f"logit, of shape {class_logits.shape}"
        )

    anchors = replicate_on_mesh(anchors, class_logits)
    args = lax.stop_gradient((anchors, annotations)), ignored
    valid, has_objects, label, matched = _targets(matching, num_classes, *args)
    positive, counted = label > BACKGROUND, label != IGNORED
    if empty_images == "skip":
        counted &= has_objects
    index = lax.broadcasted_iota(jnp.int32, (1, 1, num_classes), 2)
    losses = loss(class_logits, label == index, where=counted)
    losses = losses.astype(arguments.compute_dtype(losses))
    dtype = arguments.compute_dtype(box_regression)
    smooth_l1 = _smooth_l1(regression, box_regression.astype(dtype), positive, *matched)

    positives, devices, count = jnp.sum(positive, 1, dtype=jnp.int32), 1, images
    if normalization == "batch":
        positives, count = jnp.sum(positives), 1
        if axis_name is not None:
            positives, devices = lax.psum(positives, axis_name), lax.axis_size(axis_name)

    def reduced(losses, per_anchor):
        # No sum per image: XLA:GPU fuses the sum over the classes into the gradient, and would read
        # the logits again. Weights inside the sum over the classes keep XLA:CPU from vectorizing.
        scale = devices / jnp.maximum(jnp.asarray(count, losses.dtype), 1)
        weight = scale / jnp.maximum(per_anchor * positives.astype(losses.dtype), 1)
        return jnp.sum(jnp.sum(losses, 2) * jnp.where(valid, weight, jnp.nan))

    return RetinaNetLoss(reduced(losses, 1), reduced(smooth_l1, 4))
