"""Losses followed by `focal_jax.reduce_loss`, as Flax linen modules without parameters.

`normalization` and `axis_name` are arguments of `reduce_loss`; `loss_weight` multiplies the result.
The other arguments are options of the loss. They are static fields, unless they are traced. A
mask and an `ignore_label` apply to the losses and to the denominator. A constructor raises
`InputError` if an argument is invalid for every input.
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike

from focal_jax import catalogue, reduced

__all__ = ["Reduced", "SigmoidFocalLoss", "SoftmaxFocalLoss"]


class _Fields(reduced.Reduced, nn.Module):
    # linen generates the constructor that `Reduced` calls.
    loss: Callable[..., Array]
    normalization: str | ArrayLike = "valid"
    loss_weight: ArrayLike = 1.0
    axis_name: str | tuple[str, ...] | None = None
    options: Any = ()  # pairs of name and value, which are hashable


class Reduced(_Fields):
    """Reduce any loss, given by its name or as a function.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.linen import Reduced
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
        """Check and store the options."""
        # Every linen module has the fields `parent` and `name`. `clone` passes all fields.
        fields = {name: options.pop(name) for name in ("parent", "name") if name in options}
        options = {**dict(options.pop("options", ())), **options}
        loss = catalogue.function_of(loss)
        reduced.check_option_names(loss, options)
        super().__init__(
            loss=loss,
            normalization=normalization,
            loss_weight=loss_weight,
            axis_name=axis_name,
            options=tuple(
                (x, reduced.checked_option(loss, x, options[x])) for x in sorted(options)
            ),
            **fields,
        )


class SigmoidFocalLoss(reduced.SigmoidFocalLoss, nn.Module, kw_only=True):
    """Reduce `focal_jax.sigmoid_focal_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.linen import SigmoidFocalLoss
      >>> loss = SigmoidFocalLoss(alpha=0.25, normalization="mean")
      >>> f"{loss(jnp.array([0.0, 20.0]), jnp.array([1, 1])):.4f}"
      '0.0217'
    """


class SoftmaxFocalLoss(reduced.SoftmaxFocalLoss, nn.Module, kw_only=True):
    """Reduce a softmax focal loss.

    Integer labels are class indices, for `focal_jax.softmax_focal_loss_with_integer_labels`.
    Floating labels are distributions, for `focal_jax.softmax_focal_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.linen import SoftmaxFocalLoss
      >>> loss = SoftmaxFocalLoss(ignore_label=-1)
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
      >>> f"{loss(logits, jnp.array([0, 1, -1])):.4f}"
      '0.2496'
    """
