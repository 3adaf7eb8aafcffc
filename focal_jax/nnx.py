"""Losses followed by `focal_jax.reduce_loss`, as Flax NNX modules without state.

The options of the loss are static attributes, unless they are traced. A mask and an `ignore_label`
apply to the losses and to the denominator. A constructor raises `InputError` if an argument is
invalid for every input.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from focal_jax import reduced

__all__ = ["Reduced", "SigmoidFocalLoss", "SoftmaxFocalLoss"]


class Reduced(reduced.Reduced, nnx.Module):
    """Reduce any loss, given by its name or as a function.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.nnx import Reduced
      >>> loss = Reduced("softmax_focal_loss_with_integer_labels", gamma=1.0, ignore_label=-1)
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
      >>> f"{loss(logits, jnp.array([0, 1, -1])):.4f}"
      '0.3917'

    Args:
      loss: a name in `focal_jax.catalogue.LOSSES`, or a function.
      normalization: the denominator, see `focal_jax.reduce_loss`.
      loss_weight: a number that multiplies the result.
      axis_name: names of mapped axes, see `focal_jax.reduce_loss`. A loss that has a parameter of
        this name gets it, and applies masks and sums over the devices itself.
      **options: keyword arguments of the loss.
    """

    def __init__(
        self,
        loss: str | Callable[..., Array],
        *,
        normalization: str | ArrayLike = "valid",
        loss_weight: ArrayLike = 1.0,
        axis_name: str | tuple[str, ...] | None = None,
        **options: Any,
    ):
        """Check and store the options."""
        self.loss = loss  # pyright: ignore[reportAttributeAccessIssue]
        self.normalization, self.loss_weight = normalization, loss_weight
        self.axis_name = axis_name
        reduced.check_option_names(self.loss, options)
        self.option_names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)


class SigmoidFocalLoss(reduced.SigmoidFocalLoss, nnx.Module):
    """Reduce `focal_jax.sigmoid_focal_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.nnx import SigmoidFocalLoss
      >>> loss = SigmoidFocalLoss(alpha=0.25, normalization="mean")
      >>> f"{loss(jnp.array([0.0, 20.0]), jnp.array([1, 1])):.4f}"
      '0.0217'

    Args:
      alpha: weight of the positives; None for no weighting.
      gamma: focusing exponent.
      normalization: the denominator, see `focal_jax.reduce_loss`.
      loss_weight: a number that multiplies the result.
      axis_name: names of mapped axes, see `focal_jax.reduce_loss`.
    """


class SoftmaxFocalLoss(reduced.SoftmaxFocalLoss, nnx.Module):
    """Reduce a softmax focal loss.

    Integer labels are class indices, for `focal_jax.softmax_focal_loss_with_integer_labels`.
    Floating labels are distributions, for `focal_jax.softmax_focal_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.nnx import SoftmaxFocalLoss
      >>> loss = SoftmaxFocalLoss(ignore_label=-1)
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
      >>> f"{loss(logits, jnp.array([0, 1, -1])):.4f}"
      '0.2496'

    Args:
      alpha: weight of all classes or `[C]`, one weight per class; None for no weighting.
      gamma: focusing exponent.
      normalization: the denominator, see `focal_jax.reduce_loss`.
      loss_weight: a number that multiplies the result.
      axis_name: names of mapped axes, see `focal_jax.reduce_loss`.
      axis: the class axis of the logits.
      ignore_label: class index of ignored positions.
    """
