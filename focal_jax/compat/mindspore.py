"""MindSpore's `nn.FocalLoss`."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax.compat._arguments import check_calls, check_options, class_indices
from focal_jax.engine import arguments, scalar
from focal_jax.engine.arguments import InputError, shown
from focal_jax.engine.checks import check_number
from focal_jax.engine.options import CLASS_WEIGHTS
from focal_jax.losses.softmax import softmax_focal_loss, softmax_focal_loss_with_integer_labels

__all__ = ["FocalLoss"]

_REDUCTIONS = ("none", "mean", "sum")


def _loss_per_class(predict: Array, target: Array, **options) -> Array:
    """Return the terms of `softmax_focal_loss`, one per class.

    The loss is linear in the target, so each term is the target times the derivative in it.
    """
    dtype = arguments.compute_dtype(predict)
    target, alpha = target.astype(dtype), options["alpha"]
    slope = jax.grad(lambda y: jnp.sum(softmax_focal_loss(predict, y, **options)))(target)
    # The derivative in the target is limited to about 1e19. Where p underflows, it is -log p.
    minus_log_p = -jax.nn.log_softmax(predict.astype(dtype), 1)
    weight = jnp.ones((), dtype)
    if alpha is not None:
        weight = alpha.reshape(1, -1, *(1,) * (predict.ndim - 2)).astype(dtype)
    slope = jnp.where(minus_log_p > 1e6, scalar.weigh(weight, minus_log_p), slope)
    losses = jnp.expand_dims(softmax_focal_loss(predict, target, **options), 1)
    # An invalid target makes the losses of its position NaN, and their gradients.
    return jnp.where(jnp.isnan(losses), losses, scalar.weigh(target, slope))


@check_calls
@dataclass(frozen=True, eq=False)
class FocalLoss:
    r"""Compute MindSpore's `nn.FocalLoss`: softmax over axis 1, focal loss and reduction.

    Every reduction starts with the mean over the positions of a sample. `"none"` returns these
    means: one per sample, and for one-hot targets one per sample and class. `"mean"` and `"sum"`
    reduce them, so the mean for a one-hot target divides by `N * C`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.compat.mindspore import FocalLoss
      >>> predict = jnp.array([[0.8, 1.4], [0.5, 0.9], [1.2, 0.9]])
      >>> target = jnp.array([[1], [1], [0]])
      >>> loss = FocalLoss(weight=jnp.array([1.0, 2.0]), gamma=2.0, reduction="mean")
      >>> round(loss(predict, target).item(), 4)
      0.1252

    Attributes:
      weight: None or `[C]`, one weight per class.
      gamma: focusing exponent.
      reduction: `"none"`, `"mean"` or `"sum"`.

    References:
      [mindspore.nn.FocalLoss](
      https://www.mindspore.cn/docs/en/master/api_python/nn/mindspore.nn.FocalLoss.html).
    """

    weight: ArrayLike | None = None
    gamma: ArrayLike = 2.0
    reduction: str = "mean"

    def __post_init__(self):
        """Raise for options that are invalid for every input."""
        if not isinstance(self.reduction, str) or self.reduction not in _REDUCTIONS:
            raise InputError(f"reduction: got {shown(self.reduction)}, wanted one of {_REDUCTIONS}")
        check_options(softmax_focal_loss, gamma=self.gamma)
        if self.weight is not None:
            check_number("weight", self.weight, CLASS_WEIGHTS)

    def __call__(self, predict: ArrayLike, target: ArrayLike) -> Array:
        """Return the loss.

        Args:
          predict: `[N, C, ...]`, floating: logits.
          target: `[N, 1, ...]`, real: class indices (floating indices are truncated; an index
            outside `[0, C)` gives NaN, where MindSpore wraps a negative index); or
            `[N, C, ...]`, real: one-hot or any weights of the classes.

        Returns:
          A scalar; for `"none"` `[N]` for indices and `[N, C]` for one-hot targets.
        """
        predict = arguments.floating_array("predict", predict)
        target = arguments.as_array("target", target)
        if predict.ndim < 2:
            raise InputError(f"predict: got shape {predict.shape}, wanted [N, C, ...]")
        samples, num_classes, *positions = predict.shape
        weight = self.weight
        if weight is not None:
            weight = arguments.number_array("weight", weight, arguments.compute_dtype(predict))
            arguments.check_shape("weight", weight, (num_classes,), "one weight per class")
        options = {"alpha": weight, "gamma": self.gamma, "axis": 1}
        if target.shape == (samples, 1, *positions):
            labels = class_indices("target", target, num_classes).squeeze(1)
            losses = softmax_focal_loss_with_integer_labels(predict, labels, **options)
            count = samples
        else:
            arguments.check_shape("target", target, predict.shape, "one-hot; or [N, 1, ...]")
            arguments.check_real("target", target)
            loss = _loss_per_class if self.reduction == "none" else softmax_focal_loss
            losses = loss(predict, target, **options)
            count = samples * num_classes
        axes = tuple(range(losses.ndim - len(positions), losses.ndim))
        size, count = (jnp.asarray(n, losses.dtype) for n in (math.prod(positions), count))
        losses = jnp.sum(losses, axes) / jnp.maximum(size, 1)
        if self.reduction == "none":
            return losses
        return jnp.sum(losses) / (jnp.maximum(count, 1) if self.reduction == "mean" else 1)
