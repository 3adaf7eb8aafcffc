"""The modules of `focal_jax.nnx` for Flax linen: without parameters, with options as fields.

They are called inside another module, or without `init` and `apply`:

  >>> import jax.numpy as jnp
  >>> from focal_jax.linen import SoftmaxFocalLoss
  >>> loss = SoftmaxFocalLoss(ignore_label=-1)
  >>> f"{loss(jnp.array([[2.0, 0.0, 0.0], [5.0, 1.0, 0.0]]), jnp.array([0, -1])):.4f}"
  '0.0109'
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike

from focal_jax import catalogue, reduced
from focal_jax.engine import arguments

__all__ = ["Reduced", "SigmoidFocalLoss", "SoftmaxFocalLoss"]


class _Fields(reduced.Reduced, nn.Module):
    # linen generates the constructor that `Reduced` calls.
    loss: Callable[..., Array]
    normalization: str | ArrayLike = "valid"
    loss_weight: ArrayLike = 1.0
    axis_name: str | tuple[str, ...] | None = None
    options: Any = ()  # pairs of name and value, which are hashable


class Reduced(_Fields):
    """Reduce any loss, given by its name or as a function. See `focal_jax.nnx.Reduced`."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Keep the constructor. linen generates one for every subclass, such as `nn.remat`'s."""
        has_own = "__init__" in vars(cls)
        super().__init_subclass__(**options)
        if not has_own:
            cls.__init__ = Reduced.__init__

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
        pairs: Any = options.pop("options", ())
        got = f"options: got {arguments.shown(pairs)}"
        is_valid = isinstance(pairs, tuple | dict)
        arguments.require(is_valid, f"{got}, wanted pairs of a name and a value")
        options = {**dict(pairs), **options}
        loss = catalogue.function_of(loss)
        reduced.check_reserved(loss)
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
    """Reduce `focal_jax.sigmoid_focal_loss`. See `focal_jax.nnx.SigmoidFocalLoss`."""


class SoftmaxFocalLoss(reduced.SoftmaxFocalLoss, nn.Module, kw_only=True):
    """Reduce a softmax focal loss. See `focal_jax.nnx.SoftmaxFocalLoss`."""
