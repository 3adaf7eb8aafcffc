"""RetinaNet's two losses, from logits and annotations to two numbers."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs
from focal_jax._modules import function_of
from focal_jax._sigmoid import sigmoid_focal_loss
from focal_jax.detection import _options
from focal_jax.detection.boxes import Box, columns, offsets, rows_of_four
from focal_jax.detection.matching import BACKGROUND, IGNORED, comparable, nearest

__all__ = ["RetinaNetLoss", "retinanet_loss"]


class RetinaNetLoss(NamedTuple):
    """What a RetinaNet minimizes: the sum of the two."""

    classification: Array
    regression: Array


class _Targets(NamedTuple):
    """What an image's anchors are to answer, each an array along the anchors."""

    label: Array  # the class index, BACKGROUND or IGNORED
    offsets: Array  # `[A, 4]`; those of the positive anchors count


def _looked_up(anchors: Array, annotations: Array) -> tuple[Array, Box, Array]:
    """Return each anchor's IoU with the nearest annotation, its box and class: found by index."""
    iou, index = nearest(anchors, annotations)
    box, label = jax.tree.map(
        lambda x: x[jnp.maximum(index, 0)], (columns(annotations), annotations[:, 4])
    )
    return iou, box, label


def _carried_along(anchors: Array, annotations: Array) -> tuple[Array, Box, Array]:
    """Return the same, carried along by the search: a TPU has no quick look-up."""
    iou, _, *box, label = nearest(anchors, annotations, *columns(annotations), annotations[:, 4])
    return iou, Box(*box), label


def _targets(
    annotations: Array, anchors: Array, positive_iou: float, negative_iou: float
) -> _Targets:
    """Return the targets of one image."""
    iou, box, label = lax.platform_dependent(
        anchors, annotations, tpu=_carried_along, default=_looked_up
    )
    other = jnp.where(iou < negative_iou, BACKGROUND, IGNORED)
    label = jnp.where(iou >= positive_iou, label.astype(jnp.int32), other)
    return _Targets(label, jnp.stack(offsets(box, columns(anchors)), -1))


def _sound(annotations: Array, classes: int) -> Array:
    """Return whether each image's annotations are finite and have a class, padding aside."""
    label = annotations[..., 4]
    index = (label >= 0) & (label < classes) & (label == jnp.floor(label))
    sound = index & jnp.all(jnp.isfinite(annotations), -1)
    return jnp.all(sound | (label == BACKGROUND), 1)


def _class_loss(given: Any, alpha: Any, gamma: Any) -> Callable[..., Array]:
    """Return the loss of the classes, with its options."""
    if given is None:
        return partial(sigmoid_focal_loss, alpha=alpha, gamma=gamma)
    for name, option, default in (("alpha", alpha, 0.25), ("gamma", gamma, 2.0)):
        if not (isinstance(option, float) and option == default):
            raise _checks.InputError(
                f"{name}: got {option} beside a class_loss, wanted it among that loss's own "
                "options, as functools.partial gives them"
            )
    return function_of(given, "class_loss", kinds=("elementwise",))


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
    smooth_l1_beta: float = 1 / 9,
    empty_images: str = "background",
    normalization: str = "image",
    axis_name: str | tuple[str, ...] | None = None,
) -> RetinaNetLoss:
    r"""Compute RetinaNet's losses: focal for the classes, smooth L1 for the boxes.

    Anchors are matched by `match_anchors`. With `P` the number of positive ones,

        classification = sum over positive and background anchors and all classes of
                         sigmoid_focal_loss / max(1, P), or another class_loss
        regression     = sum over positive anchors and the 4 offsets of
                         smooth_l1(offset - encode_boxes(annotation, anchor)) / max(1, 4 P)

    where `smooth_l1(d)` is `d**2 / (2 beta)` up to `|d| = beta`, `|d| - beta / 2` beyond.

    Args:
      class_logits: `[B, A, C]`, floating: log-odds of every class, of which there is
        none for the background.
      box_regression: `[B, A, 4]`, floating: offsets in the units of `encode_boxes`.
      anchors: `[A, 4]`, real: boxes `(x1, y1, x2, y2)`, the same for every image.
      annotations: `[B, M, 5]`, real: `(x1, y1, x2, y2, class)`; rows of class -1 are
        padding, whatever else they hold. One that is not finite, or whose class is no index
        in `[0, C)`, makes both losses of its image NaN, whether an anchor matches it or
        not.
      alpha: weight of an anchor's own class, the others weigh `1 - alpha`; None weighs
        all 1.
      gamma: focusing exponent, 0 or more.
      class_loss: what stands in the place of `sigmoid_focal_loss`: the name of a loss of this
        package that is one of a single logit, or a function that is called with logits and
        bool labels, `[B, A, C]`, and a bool mask `where`, `[B, A, 1]`, and returns the losses,
        `[B, A, C]`. It brings its own options, such as
        `functools.partial(focal_jax.asymmetric_loss, margin=0.1)`: `alpha` and `gamma` are
        those of the default alone.
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
        is not a finite Python number above 0, thresholds that `match_anchors` refuses, an
        unknown `class_loss` or one that returns another shape, `alpha` or `gamma` beside one,
        or what the class loss refuses.
      NameError: for an `axis_name` that is not bound here.

    Differentiation: reverse mode in `class_logits`, `box_regression`, `alpha` and
      `gamma`; never NaN for finite annotations with a class, also for boxes and anchors
      without area. Anchors and annotations are constants.

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
    class_logits = _inputs.floating("class_logits", class_logits)
    box_regression = _inputs.floating("box_regression", box_regression)
    annotations = _inputs.option("annotations", annotations, jnp.dtype(jnp.float32))
    anchors = _checks.array("anchors", anchors)
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
    positive_iou, negative_iou = _options.iou_thresholds(positive_iou, negative_iou)
    beta = _options.above_zero("smooth_l1_beta", smooth_l1_beta)
    of_classes = _class_loss(class_loss, alpha, gamma)
    # What it refuses, before any work.
    losses = jax.eval_shape(lambda z: of_classes(z, z > 0, where=z[..., :1] > 0), class_logits)
    if getattr(losses, "shape", None) != class_logits.shape:
        raise _checks.InputError(
            f"class_loss: got a function that returns {losses}, wanted an array of shape "
            f"{class_logits.shape}, a loss for each logit"
        )

    sound = _sound(annotations, classes)[:, None]
    (anchors,) = rows_of_four(anchors=anchors)
    anchors, annotations = comparable(*lax.stop_gradient((anchors, annotations)))
    # A row of padding more, so that there is one to look up.
    annotations = jnp.pad(annotations, ((0, 0), (0, 1), (0, 0)), constant_values=BACKGROUND)
    targets = partial(
        _targets, anchors=anchors, positive_iou=positive_iou, negative_iou=negative_iou
    )
    label, wanted = jax.vmap(targets)(annotations)
    label = label[..., None]
    positive, counts = label > BACKGROUND, label != IGNORED
    if empty_images == "skip":
        counts &= jnp.any(annotations[..., 4:] != BACKGROUND, 1, keepdims=True)

    index = lax.broadcasted_iota(jnp.int32, (1, 1, classes), 2)
    losses = of_classes(class_logits, label == index, where=counts)
    dtype = _inputs.compute_dtype(box_regression)
    error = box_regression.astype(dtype) - wanted.astype(dtype)
    smooth_l1 = optax.huber_loss(_inputs.keep(error, positive), delta=beta) / beta

    positives, whole = jnp.sum(positive, 1, dtype=jnp.int32), 1 / max(1, images)
    if normalization == "batch":
        positives, whole = jnp.sum(positives), 1
        if axis_name is not None:
            positives, whole = lax.psum(positives, axis_name), lax.axis_size(axis_name)

    def reduced(losses, each):
        # Every loss has its share of one sum of them all. The images' own sums would be a
        # second pass over the logits on a GPU, which adds up an anchor's losses beside the
        # gradient; and shares before that sum would keep a CPU from its vector instructions.
        share = whole / jnp.maximum(each * positives.astype(losses.dtype), 1)
        return jnp.sum(jnp.sum(losses, 2) * jnp.where(sound, share, jnp.nan))

    return RetinaNetLoss(reduced(losses, 1), reduced(smooth_l1, 4))
