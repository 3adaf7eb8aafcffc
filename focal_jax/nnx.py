"""Focal losses as Flax NNX modules: the options are attributes, the result is reduced."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _modules

__all__ = ["Reduced", "SigmoidFocalLoss", "SoftmaxFocalLoss"]


class Reduced(_modules.Reduced, nnx.Module):
    """Any loss of this package, reduced, an nnx module without state.

    `loss` is the name of the loss or the function; what else is given are options of that
    loss, but for `normalization` and `axis_name`, which are those of
    `focal_jax.reduce_loss`, and `loss_weight`, by which the result is multiplied. A mask or
    an `ignore_label` counts for the loss and for its divisor. The options are static, never
    parameters: an array is held as a tuple; one that is traced is used as it is. A loss
    that takes an `axis_name` of its own is given that of the module.

    Raises:
      ValueError: for an unknown loss, an option that it does not have, and one that no
        input could make good.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.nnx import Reduced
      >>> loss = Reduced("softmax_focal_loss_with_integer_labels", gamma=1.0, ignore_label=-1)
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
      >>> f"{loss(logits, jnp.array([0, 1, -1])):.4f}"
      '0.3917'
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
        """Hold the options."""
        super().__init__(
            loss=loss,  # pyright: ignore[reportArgumentType]
            normalization=normalization,
            loss_weight=loss_weight,
            axis_name=axis_name,
            options=tuple(options.items()),
        )


class SigmoidFocalLoss(_modules.SigmoidFocalLoss, nnx.Module):
    """Reduced sigmoid focal loss, an nnx module without state.

    The attributes `alpha` and `gamma` are options of `focal_jax.sigmoid_focal_loss`,
    `normalization` and `axis_name` of `focal_jax.reduce_loss`; the result is multiplied
    by `loss_weight`. They are static, never parameters: an array is held as a tuple; one
    that is traced is used as it is.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.nnx import SigmoidFocalLoss
      >>> loss = SigmoidFocalLoss(alpha=0.25, normalization="full")
      >>> f"{loss(jnp.array([0.0, 20.0]), jnp.array([1, 1])):.4f}"
      '0.0217'
    """


class SoftmaxFocalLoss(_modules.SoftmaxFocalLoss, nnx.Module):
    """Reduced softmax focal loss, an nnx module without state.

    The attributes `alpha`, `gamma`, `axis` and `ignore_label` are options of
    `focal_jax.softmax_focal_loss_with_integer_labels`, for integer labels, and but for
    `ignore_label` of `focal_jax.softmax_focal_loss`, for a distribution over the classes;
    `normalization` and `axis_name` are those of `focal_jax.reduce_loss`; the result is
    multiplied by `loss_weight`. They are static, never parameters: an array is held as a
    tuple; one that is traced is used as it is.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.nnx import SoftmaxFocalLoss
      >>> loss = SoftmaxFocalLoss(ignore_label=-1)
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
      >>> f"{loss(logits, jnp.array([0, 1, -1])):.4f}"
      '0.2496'
    """
