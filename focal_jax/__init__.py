"""Focal losses for JAX with hand-derived gradients, accurate to the precision of the dtype.

Conventions of every loss:

* Losses return one value per position (`focal_tversky_loss`: per class). `reduce_loss` averages
  them. Options are keyword-only.
* Logits have a floating dtype. For 16-bit logits the loss is computed and returned in float32. A
  gradient has the dtype of its argument.
* `axis` is the class axis; all other axes are positions. Options broadcast to the losses; class
  weights are a scalar or `[C]`. A Python exponent is static, and small multiples of 1/2 compile to
  products and square roots. An array is traced and differentiable.
* `where` (bool, broadcasts to the losses) and `ignore_label` mask positions: their loss and
  gradient are 0, even if the logits are NaN.
* An invalid label (a class index outside `[0, C)`, a real label outside its range) makes the
  loss and the gradient of its position NaN.
* A class with the logit -inf has probability 0 and gradient 0. If that class is the label, the loss
  is inf and the gradient is finite.
* An invalid argument raises `InputError`, which is a ValueError, a TypeError and an AssertionError.
  The values of traced arguments are not checked.
* Differentiation: reverse mode any number of times, and forward over reverse. Forward mode alone
  raises; the plain formulas in `focal_jax.reference` support it.
* The losses work under `jit`, `vmap`, `pmap`, `shard_map` and on meshes. With `class_axis_name` the
  classes may be sharded.

`focal_jax.engine` turns a formula into a loss with these conventions.
"""

import importlib
from typing import TYPE_CHECKING

from focal_jax._version import __version__ as __version__

# Loaded on first use, as are the losses: the command line shows its help without importing JAX.
_MODULES = ("catalogue", "compat", "detection", "engine", "linen", "measure", "nnx", "reference")
_MODULES += ("training",)
_NAMES = {
    "InputError": "engine",
    "TokenStatistics": "statistics",
    "compare_gradients": "measure",
    "linear_asymmetric_loss": "losses.multilabel",
    "linear_sigmoid_focal_loss": "losses.multilabel",
    "linear_softmax_focal_loss_with_sparse_labels": "losses.sparse",
    "linear_token_statistics": "statistics",
    "reduce_loss": "reduction",
    "softmax_focal_loss_with_sparse_labels": "losses.sparse",
    "token_statistics": "statistics",
}

if TYPE_CHECKING:
    from focal_jax import (
        catalogue as catalogue,
        compat as compat,
        detection as detection,
        engine as engine,
        linen as linen,
        measure as measure,
        nnx as nnx,
        reference as reference,
        training as training,
    )
    from focal_jax.engine import InputError as InputError
    from focal_jax.losses.asymmetric import asymmetric_loss as asymmetric_loss
    from focal_jax.losses.distribution import distribution_focal_loss as distribution_focal_loss
    from focal_jax.losses.dual import (
        dual_focal_loss_with_integer_labels as dual_focal_loss_with_integer_labels,
    )
    from focal_jax.losses.gaussian import gaussian_focal_loss as gaussian_focal_loss
    from focal_jax.losses.matchability import matchability_aware_loss as matchability_aware_loss
    from focal_jax.losses.multilabel import (
        linear_asymmetric_loss as linear_asymmetric_loss,
        linear_sigmoid_focal_loss as linear_sigmoid_focal_loss,
    )
    from focal_jax.losses.poly import (
        sigmoid_poly_focal_loss as sigmoid_poly_focal_loss,
        softmax_poly_focal_loss_with_integer_labels as softmax_poly_focal_loss_with_integer_labels,
    )
    from focal_jax.losses.probability_weighted import (
        softmax_probability_weighted_loss_with_integer_labels as softmax_probability_weighted_loss_with_integer_labels,  # noqa: E501
    )
    from focal_jax.losses.quality import quality_focal_loss as quality_focal_loss
    from focal_jax.losses.sigmoid import sigmoid_focal_loss as sigmoid_focal_loss
    from focal_jax.losses.softmax import (
        linear_softmax_focal_loss_with_integer_labels as linear_softmax_focal_loss_with_integer_labels,  # noqa: E501
        softmax_focal_loss as softmax_focal_loss,
        softmax_focal_loss_with_integer_labels as softmax_focal_loss_with_integer_labels,
    )
    from focal_jax.losses.sparse import (
        linear_softmax_focal_loss_with_sparse_labels as linear_softmax_focal_loss_with_sparse_labels,  # noqa: E501
        softmax_focal_loss_with_sparse_labels as softmax_focal_loss_with_sparse_labels,
    )
    from focal_jax.losses.star import sigmoid_focal_loss_star as sigmoid_focal_loss_star
    from focal_jax.losses.tversky import focal_tversky_loss as focal_tversky_loss
    from focal_jax.losses.varifocal import varifocal_loss as varifocal_loss
    from focal_jax.measure import compare_gradients as compare_gradients
    from focal_jax.reduction import reduce_loss as reduce_loss
    from focal_jax.statistics import (
        TokenStatistics as TokenStatistics,
        linear_token_statistics as linear_token_statistics,
        token_statistics as token_statistics,
    )
else:

    def __getattr__(name):
        if name in _MODULES:
            return importlib.import_module(f"focal_jax.{name}")
        if name in _NAMES:
            return getattr(importlib.import_module(f"focal_jax.{_NAMES[name]}"), name)
        if name == "__all__" or not name.startswith("_"):
            losses = importlib.import_module("focal_jax.catalogue").LOSSES
            if name == "__all__":
                return [*losses, *_NAMES, *_MODULES]
            if name in losses:
                return losses[name].function
        raise AttributeError(f"module 'focal_jax' has no attribute {name!r}")

    def __dir__():
        return __getattr__("__all__")
