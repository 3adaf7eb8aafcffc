"""The declaration of a loss: its kind, its labels and its options."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from focal_jax.engine.options import Option

# The arguments of one loss value.
#   elementwise    one logit and its label
#   position       the softmax of one position and the index of its class
#   distribution   the softmax of one position and one weight per class
#   linear         a position loss whose logits are `features @ kernel + bias`
#   interval       the softmax of one position and a real number between two class indices
#   region         the softmax of all positions: one loss value per class
Kind = Literal["elementwise", "position", "distribution", "linear", "interval", "region"]

# The valid labels.
#   hard           0 or 1
#   soft           a real number in [0, 1]
#   one-hot        1 for one class, 0 for the others
#   distribution   one weight per class, usually with the sum 1
#   integer        a class index
#   real           a real number from 0 to the index of the last class
Labels = Literal["hard", "soft", "one-hot", "distribution", "integer", "real"]


class Loss(NamedTuple):
    """The declaration of one loss."""

    name: str
    kind: Kind
    labels: tuple[Labels, ...]
    options: Mapping[str, Option]  # in the order of the signature
    function: Callable[..., Any]
    # Whether the loss holds a weight constant under differentiation, so that its gradient is
    # not the derivative of its value.
    stop_gradient_weight: bool = False
    # The `PositionLoss` or `ElementwiseLoss` that the function calls, if there is one.
    engine_loss: Any = None

    @property
    def has_class_axis(self) -> bool:
        """Whether the loss has a class axis."""
        return self.kind != "elementwise"

    @property
    def differentiable_labels(self) -> bool:
        """Whether the loss has a derivative in the labels."""
        return "integer" not in self.labels

    @property
    def numbers(self) -> dict[str, Option]:
        """The options that the loss is differentiable in."""
        return {name: x for name, x in self.options.items() if x.differentiable}

    @property
    def masks(self) -> tuple[str, ...]:
        """The options, besides `where`, that are bool arrays."""
        return tuple(name for name, x in self.options.items() if x.kind == "mask")
