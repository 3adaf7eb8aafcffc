"""Focal losses for JAX: hand-derived gradients, right to the last digits."""

import importlib
from typing import TYPE_CHECKING

from focal_jax import reference
from focal_jax._asymmetric import asymmetric_loss
from focal_jax._compare import compare_gradients
from focal_jax._dual import dual_focal_loss_with_integer_labels
from focal_jax._gaussian import gaussian_focal_loss
from focal_jax._linear import linear_softmax_focal_loss_with_integer_labels
from focal_jax._matchability import matchability_aware_loss
from focal_jax._poly import (
    sigmoid_poly_focal_loss,
    softmax_poly_focal_loss_with_integer_labels,
)
from focal_jax._probability_weighted import softmax_probability_weighted_loss_with_integer_labels
from focal_jax._quality import quality_focal_loss
from focal_jax._reduction import reduce_loss
from focal_jax._sigmoid import sigmoid_focal_loss
from focal_jax._softmax_integer import softmax_focal_loss_with_integer_labels
from focal_jax._softmax_soft import softmax_focal_loss
from focal_jax._star import sigmoid_focal_loss_star
from focal_jax._varifocal import varifocal_loss
from focal_jax._version import __version__ as __version__

__all__ = [
    "asymmetric_loss",
    "compare_gradients",
    "compat",
    "detection",
    "dual_focal_loss_with_integer_labels",
    "gaussian_focal_loss",
    "linear_softmax_focal_loss_with_integer_labels",
    "linen",
    "matchability_aware_loss",
    "nnx",
    "quality_focal_loss",
    "reduce_loss",
    "reference",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_star",
    "sigmoid_poly_focal_loss",
    "softmax_focal_loss",
    "softmax_focal_loss_with_integer_labels",
    "softmax_poly_focal_loss_with_integer_labels",
    "softmax_probability_weighted_loss_with_integer_labels",
    "training",
    "varifocal_loss",
]

# Loaded when first used: they import Flax, optax or protobuf, which the losses do without.
if TYPE_CHECKING:
    from focal_jax import compat, detection, linen, nnx, training
else:

    def __getattr__(name):
        if name in __all__:
            return importlib.import_module(f"focal_jax.{name}")
        raise AttributeError(f"module 'focal_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
