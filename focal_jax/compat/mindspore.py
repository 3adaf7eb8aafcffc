"""MindSpore's nn.FocalLoss."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs
from focal_jax._modules import static_options
from focal_jax._reduction import reduce_loss
from focal_jax._softmax_integer import softmax_focal_loss_with_integer_labels
from focal_jax._softmax_soft import softmax_focal_loss
from focal_jax.compat._labels import class_indices

__all__ = ["FocalLoss"]

_REDUCTIONS = ("none", "mean", "sum")


def _loss_per_class(predict: Array, target: Array, **options) -> Array:
    """Return each class's share of `softmax_focal_loss`, of the shape of predict.

    The loss is linear in the target, so its slope there is the loss of a whole label.
    """
    target = target.astype(_inputs.compute_dtype(predict))
    loss = jax.grad(lambda target: jnp.sum(softmax_focal_loss(predict, target, **options)))
    return target * loss(target)


@dataclass(frozen=True, eq=False)
class FocalLoss:
    r"""Compute MindSpore's `nn.FocalLoss`: a softmax over axis 1, focal, reduced.

    Whatever the reduction, the mean over the positions of a sample is taken first. Then
    `"none"` leaves one loss for each sample, and for one-hot targets for each class too;
    `"mean"` and `"sum"` are over those: the mean of a one-hot target divides by `N * C`.

    Attributes:
      weight: None or `[C]`, one weight per class.
      gamma: focusing exponent, 0 or more.
      reduction: `"none"`, `"mean"` or `"sum"`.

    Raises:
      ValueError: for an unknown reduction or a negative gamma.

    Differentiation: that of `focal_jax.softmax_focal_loss`, in predict, weight and gamma.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.compat.mindspore import FocalLoss
      >>> predict = jnp.array([[0.8, 1.4], [0.5, 0.9], [1.2, 0.9]])
      >>> target = jnp.array([[1], [1], [0]])
      >>> loss = FocalLoss(weight=jnp.array([1.0, 2.0]), gamma=2.0, reduction="mean")
      >>> round(loss(predict, target).item(), 4)
      0.1252

    References:
      [mindspore.nn.FocalLoss](
      https://www.mindspore.cn/docs/en/master/api_python/nn/mindspore.nn.FocalLoss.html).
    """

    weight: ArrayLike | None = None
    gamma: ArrayLike = 2.0
    reduction: str = "mean"

    def __post_init__(self):
        """Refuse options that no input could make good."""
        if self.reduction not in _REDUCTIONS:
            raise _checks.InputError(
                f"reduction: got {self.reduction!r}, wanted one of {_REDUCTIONS}"
            )
        static_options(softmax_focal_loss, {"gamma": self.gamma})

    def __call__(self, predict: ArrayLike, target: ArrayLike) -> Array:
        """Return the loss.

        Args:
          predict: `[N, C, ...]`, floating: logits.
          target: `[N, 1, ...]`, real: class indices (floating ones are truncated, as
            MindSpore does; one outside `[0, C)` gives NaN, where MindSpore wraps a negative
            one); or `[N, C, ...]`, real: one-hot, or any weights of the classes.

        Returns:
          A scalar, or for `"none"` `[N]` for indices, `[N, C]` for one-hot targets.

        Raises:
          ValueError: for a target of another shape, or what
            `focal_jax.softmax_focal_loss` refuses.
        """
        predict = _inputs.floating("predict", predict)
        target = _checks.array("target", target)
        if predict.ndim < 2:
            raise _checks.InputError(f"predict: got shape {predict.shape}, wanted [N, C, ...]")
        samples, classes, *positions = predict.shape
        weight = self.weight
        if weight is not None:
            weight = _inputs.option("weight", weight, predict.dtype)
            _checks.shape("weight", weight, (classes,), "one weight per class")
        options = {"alpha": weight, "gamma": self.gamma, "axis": 1}
        if target.shape == (samples, 1, *positions):
            labels = class_indices("target", target).squeeze(1)
            losses = softmax_focal_loss_with_integer_labels(predict, labels, **options)
            count = samples
        else:
            _checks.shape("target", target, predict.shape, "one-hot; or indices, [N, 1, ...]")
            _checks.real("target", target)
            loss = _loss_per_class if self.reduction == "none" else softmax_focal_loss
            losses = loss(predict, target, **options)
            count = samples * classes
        spatial = range(losses.ndim - len(positions), losses.ndim)
        losses = jnp.sum(losses, tuple(spatial)) / max(1, math.prod(positions))
        if self.reduction == "none":
            return losses
        return reduce_loss(losses, normalization=count if self.reduction == "mean" else "none")
