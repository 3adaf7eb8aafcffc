"""The catalogue of losses: what each one is, for whoever works through all of them.

Plain data that imports nothing of the package. The comparison with autodiff, the property
tests, the benchmarks and the documentation read it, so that a new loss is one entry here. A
loss is found by its name: the public function is `focal_jax.NAME`, the plain formula
`focal_jax.reference.NAME`.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

# What a loss is a function of.
#   elementwise    one logit and its label
#   position       the softmax of one position and the index of its own class
#   distribution   the softmax of one position and a weight for each class
#   linear         a position loss whose logits are `features @ kernel + bias`
#   interval       the softmax of one position and a real number between two of the classes
#   region         the softmax of all the positions together: one loss for each class
Kind = Literal["elementwise", "position", "distribution", "linear", "interval", "region"]

# What the labels may be.
#   hard           0 or 1
#   soft           a real number in [0, 1]
#   one-hot        1 for one class, 0 for the others
#   distribution   weights of the classes, usually with the sum 1
#   integer        the index of a class
#   real           a real number from 0 to the index of the last class
Labels = Literal["hard", "soft", "one-hot", "distribution", "integer", "real"]


class Option(NamedTuple):
    """An option that a loss is differentiable in, and the range in which the promises hold."""

    low: float
    high: float
    default: float | None  # None: the loss goes without
    # One number for each class instead of one for each position: `[C]` instead of a shape
    # that broadcasts to the losses.
    per_class: bool = False
    # The power of a number that may be 0. As a Python number it is structure: products and
    # roots instead of a logarithm.
    exponent: bool = False


class Loss(NamedTuple):
    """One loss."""

    name: str
    kind: Kind
    labels: tuple[Labels, ...]
    options: Mapping[str, Option]
    masks: tuple[str, ...] = ()  # bool options that broadcast to the losses, besides `where`
    flags: tuple[str, ...] = ()  # bool options of Python's own
    # Whether a weight is a constant to differentiation: the gradient is not that of the value.
    held: bool = False

    @property
    def softmax(self) -> bool:
        """Whether the loss has a class axis."""
        return self.kind != "elementwise"

    @property
    def differentiable_labels(self) -> bool:
        """Whether there is a derivative in the labels."""
        return "integer" not in self.labels


def by_name() -> dict[str, Loss]:
    """Return the losses by their names."""
    return {loss.name: loss for loss in LOSSES}


_GAMMA = Option(0.0, 5.0, default=2.0, exponent=True)
_CLASS_WEIGHT = Option(0.0, math.inf, default=None, per_class=True)

LOSSES = (
    Loss(
        "sigmoid_focal_loss",
        "elementwise",
        ("hard", "soft"),
        {"alpha": Option(0.0, 1.0, default=None), "gamma": _GAMMA},
    ),
    Loss(
        "softmax_focal_loss",
        "distribution",
        ("one-hot", "distribution"),
        {"alpha": _CLASS_WEIGHT, "gamma": _GAMMA},
    ),
    Loss(
        "softmax_focal_loss_with_integer_labels",
        "position",
        ("integer",),
        {"alpha": _CLASS_WEIGHT, "gamma": _GAMMA},
    ),
    Loss(
        "linear_softmax_focal_loss_with_integer_labels",
        "linear",
        ("integer",),
        {"alpha": _CLASS_WEIGHT, "gamma": _GAMMA},
    ),
    Loss("quality_focal_loss", "elementwise", ("hard", "soft"), {"beta": _GAMMA}),
    Loss(
        "gaussian_focal_loss",
        "elementwise",
        ("hard", "soft"),
        {"alpha": _GAMMA, "beta": _GAMMA._replace(default=4.0)},
    ),
    Loss(
        "varifocal_loss",
        "elementwise",
        ("hard", "soft"),
        {"alpha": Option(0.0, math.inf, default=0.75), "gamma": _GAMMA},
        masks=("positive",),
        flags=("stop_weight_gradient",),
    ),
    Loss(
        "matchability_aware_loss",
        "elementwise",
        ("hard", "soft"),
        {
            "gamma": _GAMMA._replace(default=1.5),
            "alpha": Option(0.0, math.inf, default=None),
        },
        masks=("positive",),
        held=True,
    ),
    Loss(
        "asymmetric_loss",
        "elementwise",
        ("hard", "soft"),
        {
            "gamma_positive": _GAMMA._replace(default=0.0),
            "gamma_negative": _GAMMA._replace(default=4.0),
            "margin": Option(0.0, 1.0, default=0.05),
        },
        flags=("stop_weight_gradient",),
    ),
    Loss(
        "sigmoid_focal_loss_star",
        "elementwise",
        ("hard",),
        {"gamma": Option(0.5, 5.0, default=2.0), "beta": Option(0.0, math.inf, default=1.0)},
    ),
    Loss(
        "sigmoid_poly_focal_loss",
        "elementwise",
        ("hard", "soft"),
        {
            "epsilon": Option(0.0, math.inf, default=1.0),
            "alpha": Option(0.0, 1.0, default=None),
            "gamma": _GAMMA,
        },
    ),
    Loss(
        "softmax_poly_focal_loss_with_integer_labels",
        "position",
        ("integer",),
        {
            "alpha": _CLASS_WEIGHT,
            "epsilon": Option(0.0, math.inf, default=1.0),
            "gamma": _GAMMA,
        },
    ),
    Loss(
        "softmax_probability_weighted_loss_with_integer_labels",
        "position",
        ("integer",),
        {"alpha": _CLASS_WEIGHT},
        held=True,
    ),
    Loss(
        "dual_focal_loss_with_integer_labels",
        "position",
        ("integer",),
        {"alpha": _CLASS_WEIGHT, "gamma": _GAMMA._replace(default=5.0)},
    ),
    Loss("distribution_focal_loss", "interval", ("real",), {}),
    Loss(
        "focal_tversky_loss",
        "region",
        ("one-hot", "distribution"),
        {
            "alpha": Option(0.0, math.inf, default=0.7, per_class=True),
            "beta": Option(0.0, math.inf, default=0.3, per_class=True),
            "gamma": Option(0.0, 5.0, default=0.75, per_class=True, exponent=True),
            "smooth": Option(0.0, math.inf, default=1.0, per_class=True),
        },
    ),
)
