"""The FocalLoss of pytorch-retinanet."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax.compat._arguments import check_calls
from focal_jax.detection import retinanet_loss
from focal_jax.engine import arguments
from focal_jax.engine.arguments import InputError

__all__ = ["FocalLoss"]

_MARGIN = 1e-4


@check_calls
class FocalLoss:
    r"""Compute the two losses of pytorch-retinanet from probabilities.

    The losses are those of `focal_jax.detection.retinanet_loss` with the logits
    `log(p / (1 - p))`. As in the original, probabilities are clamped to `[1e-4, 1 - 1e-4]`, and
    the gradient of a clamped probability is 0, even if the prediction is wrong. To avoid the
    clamp, call `retinanet_loss` with logits.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.compat.pytorch_retinanet import FocalLoss
      >>> classifications = jnp.array([[[0.9, 0.2], [0.1, 0.1]]])
      >>> anchors = jnp.array([[[0.0, 0.0, 8.0, 8.0], [20.0, 20.0, 28.0, 28.0]]])
      >>> annotations = jnp.array([[[1.0, 0.0, 9.0, 8.0, 0.0], [-1.0] * 5]])
      >>> losses = FocalLoss()(classifications, jnp.zeros((1, 2, 4)), anchors, annotations)
      >>> [(loss.shape, round(loss.item(), 4)) for loss in losses]
      [((1,), 0.0085), ((1,), 0.2986)]

    References:
      `retinanet/losses.py` of [yhenon/pytorch-retinanet](
      https://github.com/yhenon/pytorch-retinanet).
    """

    def __init__(self):
        """Take no options."""

    def __call__(
        self,
        classifications: ArrayLike,
        regressions: ArrayLike,
        anchors: ArrayLike,
        annotations: ArrayLike,
    ) -> tuple[Array, Array]:
        """Return the classification and the regression loss, each of shape (1,).

        Args:
          classifications: `[B, A, C]`, floating: probabilities.
          regressions: `[B, A, 4]`, floating: offsets in the units of `encode_boxes`.
          anchors: `[1, A, 4]`, real: boxes `(x1, y1, x2, y2)`.
          annotations: `[B, M, 5]`, real: `(x1, y1, x2, y2, class)`, class -1 for padding. Both
            losses of an image without annotations are 0, as in versions up to June 2020.
        """
        p = arguments.floating_array("classifications", classifications)
        if p.ndim != 3:
            raise InputError(f"classifications: got shape {p.shape}, wanted [B, A, C]")
        regressions = arguments.floating_array("regressions", regressions)
        arguments.check_shape("regressions", regressions, (*p.shape[:2], 4), "4 offsets an anchor")
        # 1 - 1e-4 rounds to 1 in 16 bits.
        p = p.astype(arguments.compute_dtype(p))
        anchors = arguments.number_array("anchors", anchors, p.dtype)
        arguments.check_shape("anchors", anchors, (1, p.shape[1], 4), "anchors of all images")
        # At the ends of the range jnp.clip halves the gradient, and PyTorch's clamp does not.
        p = jnp.where(p < _MARGIN, _MARGIN, jnp.where(p > 1 - _MARGIN, 1 - _MARGIN, p))
        loss = retinanet_loss(
            jax.scipy.special.logit(p), regressions, anchors[0], annotations, empty_images="skip"
        )
        return loss.classification.reshape(1), loss.regression.reshape(1)
