"""Focal losses for JAX: hand-derived gradients, right to the last digits."""

import importlib
from types import ModuleType

from focal_jax import reference as reference
from focal_jax._asymmetric import asymmetric_loss as asymmetric_loss
from focal_jax._compare import compare_gradients as compare_gradients
from focal_jax._dual import (
    dual_focal_loss_with_integer_labels as dual_focal_loss_with_integer_labels,
)
from focal_jax._gaussian import gaussian_focal_loss as gaussian_focal_loss
from focal_jax._linear import (
    linear_softmax_focal_loss_with_integer_labels as linear_softmax_focal_loss_with_integer_labels,
)
from focal_jax._matchability import matchability_aware_loss as matchability_aware_loss
from focal_jax._poly import (
    sigmoid_poly_focal_loss as sigmoid_poly_focal_loss,
    softmax_poly_focal_loss_with_integer_labels as softmax_poly_focal_loss_with_integer_labels,
)
from focal_jax._probability_weighted import (
    softmax_probability_weighted_loss_with_integer_labels as softmax_probability_weighted_loss_with_integer_labels,  # noqa: E501
)
from focal_jax._quality import quality_focal_loss as quality_focal_loss
from focal_jax._reduction import reduce_loss as reduce_loss
from focal_jax._sigmoid import sigmoid_focal_loss as sigmoid_focal_loss
from focal_jax._softmax_integer import (
    softmax_focal_loss_with_integer_labels as softmax_focal_loss_with_integer_labels,
)
from focal_jax._softmax_soft import softmax_focal_loss as softmax_focal_loss
from focal_jax._star import sigmoid_focal_loss_star as sigmoid_focal_loss_star
from focal_jax._varifocal import varifocal_loss as varifocal_loss
from focal_jax._version import __version__ as __version__

# Loaded when first used: they import Flax, optax or protobuf, which the losses do without.
_SUBMODULES = ("compat", "detection", "linen", "nnx", "training")


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"focal_jax.{name}")
    raise AttributeError(f"module 'focal_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
