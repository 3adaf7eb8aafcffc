"""The FocalLoss of pytorch-retinanet."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs
from focal_jax.detection import retinanet_loss

__all__ = ["FocalLoss"]

_MARGIN = 1e-4


class FocalLoss:
    r"""Compute the two losses of pytorch-retinanet, from probabilities.

    It is `focal_jax.detection.retinanet_loss` with the original's options, of logits
    `log(p / (1 - p))` of the probabilities clamped to `[1e-4, 1 - 1e-4]`. The clamp is the
    original's and costs what it cost there: beyond it the gradient is zero, also for the
    worst mistakes. Give logits to `retinanet_loss` to be rid of it.

    Differentiation: that of `retinanet_loss`, in classifications and regressions.

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

    def __call__(
        self,
        classifications: ArrayLike,
        regressions: ArrayLike,
        anchors: ArrayLike,
        annotations: ArrayLike,
    ) -> tuple[Array, Array]:
        """Return the classification and the regression loss, each of shape (1,).

        Args:
          classifications: `[B, A, C]`, floating: probabilities of every class.
          regressions: `[B, A, 4]`, floating: offsets in the units of `encode_boxes`.
          anchors: `[1, A, 4]`, real: boxes `(x1, y1, x2, y2)`.
          annotations: `[B, M, 5]`, real: `(x1, y1, x2, y2, class)`, class -1 for padding.
            An image that has nothing else adds 0 to both losses.

        Raises:
          ValueError: for shapes or dtypes that do not fit.
        """
        p = _inputs.floating("classifications", classifications)
        anchors = _checks.array("anchors", anchors)
        _checks.shape("anchors", anchors, (1, *p.shape[1:2], 4), "the same anchors for all images")
        # In 16 bits 1 - 1e-4 is 1, and the clamp would be none.
        p = p.astype(_inputs.compute_dtype(p))
        # Not jnp.clip: the gradient at the ends is whole in PyTorch, halved in JAX.
        p = jnp.where(p < _MARGIN, _MARGIN, jnp.where(p > 1 - _MARGIN, 1 - _MARGIN, p))
        loss = retinanet_loss(
            jax.scipy.special.logit(p), regressions, anchors[0], annotations, empty_images="skip"
        )
        return loss.classification.reshape(1), loss.regression.reshape(1)
