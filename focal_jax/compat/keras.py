"""Losses for `keras.Model.compile`, on Keras's JAX backend.

The losses take `(y_true, y_pred)`, as Keras's losses do. Reduction, sample weights and the masks of
layers are Keras's own. `y_pred` may be logits, or probabilities with `from_logits=False`.

A probability outside [0, 1] by more than rounding gives NaN: then the predictions are logits.
Probabilities of exactly 0 and 1 count as the nearest numbers inside (0, 1) and have gradient 0. Of
a model that ends with a sigmoid or a softmax only logits have gradients for saturated predictions,
so they are the default.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from focal_jax import catalogue, reduction
from focal_jax.compat._arguments import check_options, class_indices
from focal_jax.engine import arguments
from focal_jax.engine.arguments import InputError
from focal_jax.losses.sigmoid import sigmoid_focal_loss
from focal_jax.losses.softmax import (
    linear_softmax_focal_loss_with_integer_labels,
    softmax_focal_loss,
    softmax_focal_loss_with_integer_labels,
)

try:
    import keras
    from keras.src.backend import set_keras_mask  # Keras has no public function for it
except ImportError as error:
    raise ImportError("focal_jax.compat.keras requires Keras 3: pip install keras") from error

if keras.backend.backend() != "jax":
    raise ImportError(
        f"focal_jax.compat.keras: got Keras's backend {keras.backend.backend()!r}, wanted 'jax': "
        "set the environment variable KERAS_BACKEND=jax before Keras is imported"
    )

__all__ = ["LinearHead", "Loss", "SigmoidFocalLoss", "SoftmaxFocalLoss"]

_register = keras.saving.register_keras_serializable("focal_jax")


def _in_config(option: Any) -> Any:
    """Return an option as Python numbers and lists, which JSON can store."""
    return option.tolist() if isinstance(option, np.ndarray | np.generic | Array) else option


def _probability(p: Array) -> Array:
    """Return probabilities inside (0, 1), and NaN for those outside [0, 1]."""
    info = jnp.finfo(p.dtype)
    outside = (p < -4 * info.eps) | (p > 1 + 4 * info.eps)
    return jnp.where(outside, jnp.nan, jnp.clip(p, info.tiny, 1 - info.epsneg))


class _Loss(keras.losses.Loss):
    """A loss with Keras's arguments. `options` holds those of the constructor, for `get_config`."""

    def __init__(self, options: dict[str, Any], **kwargs: Any):
        super().__init__(**kwargs)
        self.options = {name: _in_config(option) for name, option in options.items()}

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Array:
        """Return the reduced loss."""
        # Keras casts both to the dtype of the loss, which would hide these mistakes.
        labels = arguments.as_array("y_true", y_true)
        predictions = arguments.as_array("y_pred", y_pred)
        if not jnp.issubdtype(predictions.dtype, jnp.floating):
            raise InputError(
                f"y_pred: got dtype {predictions.dtype}, wanted a floating dtype: Keras's losses "
                "take (y_true, y_pred), in this order"
            )
        self.check_labels(labels, predictions)
        losses: Any = super().__call__(y_true, y_pred, sample_weight)
        return losses

    def check_labels(self, y_true: Array, y_pred: Array) -> None:
        """Raise for labels whose dtype or shape does not fit."""

    def given(self, y_pred: Array) -> dict[str, Any]:
        """Return the options, with arrays in the dtype of the predictions."""
        return {
            name: jnp.asarray(option, y_pred.dtype) if isinstance(option, list) else option
            for name, option in self.options.items()
        }

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "dtype": self.dtype, **self.options}


@_register
class SigmoidFocalLoss(_Loss):
    r"""Focal loss of independent sigmoids, `focal_jax.sigmoid_focal_loss`.

    As in `keras.losses.BinaryFocalCrossentropy`, the losses are averaged over the last axis.

    Example:
      >>> import numpy as np
      >>> from focal_jax.compat.keras import SigmoidFocalLoss
      >>> loss = SigmoidFocalLoss(alpha=0.25)
      >>> round(float(loss(np.array([[1.0, 0.0]]), np.array([[2.0, -1.0]]))), 4)
      0.0087

    Args:
      alpha: None, or the weight of the positive labels in [0, 1]; `1 - alpha` is that of the rest.
      gamma: focusing exponent, at least 0.
      label_smoothing: the labels become `y * (1 - s) + s / 2`.
      from_logits: whether the predictions are logits. False: probabilities.
      **kwargs: `reduction`, `name` and `dtype` of `keras.losses.Loss`.
    """

    def __init__(
        self,
        alpha: Any = None,
        gamma: Any = 2.0,
        label_smoothing: float = 0.0,
        from_logits: bool = True,
        **kwargs: Any,
    ):
        """Check the options."""
        check_options(sigmoid_focal_loss, alpha=alpha, gamma=gamma)
        smoothing = arguments.static_label_smoothing(label_smoothing)
        logits = arguments.static_bool("from_logits", from_logits)
        options = {"alpha": alpha, "gamma": gamma}
        super().__init__(options | {"label_smoothing": smoothing, "from_logits": logits}, **kwargs)

    def call(self, y_true: Array, y_pred: Array) -> Array:
        """Return one loss per row: the mean over the last axis."""
        y_true = _like_predictions(y_true, y_pred)
        options = self.given(y_pred)
        smoothing = options.pop("label_smoothing")
        if not options.pop("from_logits"):
            p = _probability(y_pred)
            y_pred = jnp.log(p) - jnp.log1p(-p)
        y_true = y_true * (1 - smoothing) + smoothing / 2
        return jnp.mean(sigmoid_focal_loss(y_pred, y_true, **options), -1)

    def check_labels(self, y_true: Array, y_pred: Array) -> None:
        """Raise if the shapes do not agree."""
        _like_predictions(y_true, y_pred)


@_register
class SoftmaxFocalLoss(_Loss):
    r"""Focal loss of a softmax, of class indices or of a distribution over the classes.

    Labels of the predictions' shape are a distribution (one-hot or soft). Labels without the class
    axis, or with a class axis of size 1, are class indices. If the predictions have a single class,
    labels of an integer dtype are indices, and floating labels are a distribution.

    Example:
      >>> import numpy as np
      >>> from focal_jax.compat.keras import SoftmaxFocalLoss
      >>> loss, logits = SoftmaxFocalLoss(ignore_class=-1), np.array([[2.0, 0.0, 0.0], [0.0] * 3])
      >>> [round(float(loss(np.array(y), logits)), 4) for y in ([0, 1], [[0], [1]], [0, -1])]
      [0.2496, 0.2496, 0.0109]

    Args:
      alpha: class weights: None, a scalar or `[C]`.
      gamma: focusing exponent, at least 0.
      axis: the class axis.
      label_smoothing: the labels become `y * (1 - s) + s / C`.
      ignore_class: None, or a class index: positions with it have loss 0, and the mean divides by
        the number of the other positions, as in `keras.losses.SparseCategoricalCrossentropy`.
      from_logits: whether the predictions are logits. False: probabilities, which are divided by
        their sum, as Keras does.
      **kwargs: `reduction`, `name` and `dtype` of `keras.losses.Loss`.
    """

    def __init__(
        self,
        alpha: Any = None,
        gamma: Any = 2.0,
        axis: int = -1,
        label_smoothing: float = 0.0,
        ignore_class: int | None = None,
        from_logits: bool = True,
        **kwargs: Any,
    ):
        """Check the options."""
        check_options(softmax_focal_loss, gamma=gamma)
        options = {"alpha": alpha, "gamma": gamma, "axis": axis, "ignore_class": ignore_class}
        options["label_smoothing"] = arguments.static_label_smoothing(label_smoothing)
        options["from_logits"] = arguments.static_bool("from_logits", from_logits)
        super().__init__(options, **kwargs)

    def call(self, y_true: Array, y_pred: Array) -> Array:
        """Return one loss per position."""
        given = self.given(y_pred)
        axis = arguments.static_axis(given["axis"], y_pred.ndim)
        smoothing, ignore = given.pop("label_smoothing"), given.pop("ignore_class")
        if not given.pop("from_logits"):
            y_pred = jnp.log(_probability(y_pred))
        if _is_distribution(y_true, y_pred, axis):
            y_true = y_true * (1 - smoothing) + smoothing / y_pred.shape[axis]
            return softmax_focal_loss(y_pred, y_true, **given)
        labels = _indices(y_true, y_pred, axis, ignore)
        losses = softmax_focal_loss_with_integer_labels(
            y_pred, labels, label_smoothing=smoothing, ignore_label=ignore, **given
        )
        if ignore is not None:
            set_keras_mask(losses, labels != ignore)
        return losses

    def check_labels(self, y_true: Array, y_pred: Array) -> None:
        """Raise if labels are neither class indices nor a distribution."""
        axis = arguments.static_axis(self.options["axis"], y_pred.ndim)
        if not _is_distribution(y_true, y_pred, axis):
            _indices(y_true, y_pred, axis, self.options["ignore_class"])
        elif self.options["ignore_class"] is not None:
            raise InputError(
                f"ignore_class: got {self.options['ignore_class']} and labels that are a "
                "distribution over the classes, wanted class indices"
            )


@_register
class Loss(_Loss):
    r"""Any loss of `focal_jax.catalogue`, by name and with its options.

    The losses of one logit are averaged over the last axis, as in Keras.

    Example:
      >>> import numpy as np
      >>> from focal_jax.compat.keras import Loss
      >>> loss = Loss("softmax_poly_focal_loss_with_integer_labels", epsilon=1.0, gamma=2.0)
      >>> round(float(loss(np.array([0]), np.array([[2.0, 0.0, 0.0]]))), 4)
      0.0205

    Args:
      loss: the name of a loss of logits and labels in the catalogue.
      reduction: see `keras.losses.Loss`, as are `name` and `dtype`.
      name: the name of the loss in Keras's logs.
      dtype: the dtype to which Keras casts labels and predictions.
      **options: the options of the loss; also its `axis`, `ignore_label` or `label_smoothing`.
    """

    def __init__(
        self,
        loss: str,
        *,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: Any = None,
        **options: Any,
    ):
        """Find the loss and check its options."""
        kinds = ("elementwise", "position", "distribution", "interval", "region")
        self.function = catalogue.function_of(loss, kinds=kinds)
        self.declaration: Any = catalogue.declaration_of(self.function)
        check_options(
            self.function,
            **{k: v for k, v in options.items() if k in self.declaration.options},
        )
        super().__init__(options, reduction=reduction, name=name or loss, dtype=dtype)

    def call(self, y_true: Array, y_pred: Array) -> Array:
        """Return the losses, averaged over the last axis for a loss of one logit."""
        if self._takes_indices:
            axis = arguments.static_axis(self.options.get("axis", -1), y_pred.ndim)
            y_true = _indices(y_true, y_pred, axis, self.options.get("ignore_label"))
        elif self.declaration.kind == "elementwise":
            y_true = _like_predictions(y_true, y_pred)
        losses = self.function(y_pred, y_true, **self.given(y_pred))
        return jnp.mean(losses, -1) if self.declaration.kind == "elementwise" else losses

    @property
    def _takes_indices(self) -> bool:
        return self.declaration.labels == ("integer",)

    def check_labels(self, y_true: Array, y_pred: Array) -> None:
        """Raise if labels cannot hold the classes, or do not have the predictions' shape."""
        if self._takes_indices:
            axis = arguments.static_axis(self.options.get("axis", -1), y_pred.ndim)
            _indices(y_true, y_pred, axis, self.options.get("ignore_label"))

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "loss": self.declaration.name}


def _is_distribution(y_true: Array, y_pred: Array, axis: int) -> bool:
    """Return whether labels are a distribution over the classes and not class indices."""
    return y_true.shape == y_pred.shape and y_pred.shape[axis] != 1


def _like_predictions(y_true: Array, y_pred: Array) -> Array:
    """Return labels of the predictions' shape; a last axis of size 1 may be missing."""
    if y_true.ndim + 1 == y_pred.ndim and y_pred.shape[-1] == 1:
        y_true = y_true[..., None]
    arguments.check_shape("y_true", y_true, y_pred.shape, "as the predictions")
    return y_true


def _indices(y_true: Array, y_pred: Array, axis: int, ignore: int | None) -> Array:
    """Return class indices without the class axis."""
    positions = y_pred.shape[:axis] + y_pred.shape[axis + 1 :]
    if y_true.ndim == y_pred.ndim and y_true.shape[axis] == 1:
        y_true = jnp.squeeze(y_true, axis)
    why = f"class indices; a distribution has the shape of the predictions, {y_pred.shape}"
    arguments.check_shape("y_true", y_true, positions, why)
    if jnp.issubdtype(y_true.dtype, jnp.bool_):
        raise InputError("y_true: got dtype bool, wanted class indices of an integer dtype")
    largest = y_pred.shape[axis] - 1
    if jnp.issubdtype(y_true.dtype, jnp.integer) and largest > jnp.iinfo(y_true.dtype).max:
        raise InputError(
            f"y_true: got dtype {y_true.dtype}, wanted a dtype that holds the class {largest}"
        )
    return class_indices("y_true", y_true, y_pred.shape[axis], ignore)


@_register
class LinearHead(keras.layers.Dense):
    """A dense layer whose focal loss never stores the logits.

    Its call returns logits, for prediction. In training the model returns the features, and its
    `compute_loss` returns `head.focal_loss(features, y)`. The arguments are those of
    `keras.layers.Dense`; the loss is that of the logits, before an activation.
    """

    def focal_loss(
        self, features: Any, labels: Any, *, sample_weight: Any = None, **options: Any
    ) -> Array:
        """Return the mean focal loss over the valid positions.

        Args:
          features: `[..., D]`.
          labels: `[...]`, class indices.
          sample_weight: None, or the weight of each position.
          **options: of `focal_jax.linear_softmax_focal_loss_with_integer_labels`.
        """
        features = arguments.floating_array("features", features).astype(self.compute_dtype)
        if not self.built:
            self.build(features.shape)
        as_array: Any = keras.ops.convert_to_tensor
        bias = as_array(self.bias) if self.use_bias else None
        ignore, where = options.get("ignore_label"), options.get("where")
        labels = class_indices("labels", labels, self.units, ignore)
        losses = linear_softmax_focal_loss_with_integer_labels(
            features, as_array(self.kernel), labels, bias=bias, **options
        )
        return reduction.reduce_loss(
            losses, where=where, labels=labels, ignore_label=ignore, weights=sample_weight
        )
