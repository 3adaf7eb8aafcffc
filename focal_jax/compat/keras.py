"""Losses of Keras 3 on its JAX backend: subclasses of `keras.losses.Loss`, and a linear head.

Conventions of Keras hold: `loss(y_true, y_pred, sample_weight)`, `reduction`, masks
(`_keras_mask`), and a mean over the last axis of losses of one logit. A mask is applied to the
logits and labels, so masked positions may hold NaN. `y_pred` holds logits, or with
`from_logits=False` probabilities: of a sigmoid, or of a softmax, which are normalized as in Keras.
No probability is clipped. Beyond rounding errors a probability outside [0, 1] gives NaN.

Importing this module raises ImportError without Keras, and InputError with another backend.
"""

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from focal_jax import catalogue, reduced
from focal_jax.compat._arguments import check_calls, class_indices
from focal_jax.engine import arguments, checks
from focal_jax.engine.arguments import InputError
from focal_jax.engine.options import LABEL_SMOOTHING
from focal_jax.training import PriorBias

__all__ = ["LinearHead", "Loss", "SigmoidFocalLoss", "SoftmaxFocalLoss"]

_SWITCH = "set the environment variable KERAS_BACKEND=jax before the first import of Keras"
try:
    keras: Any = importlib.import_module("keras")
    # Keras has no public functions for the masks of traced arrays, which have no attributes.
    _masks: Any = importlib.import_module("keras.src.backend")
except ImportError as error:
    _HINT = "install Keras 3 in a checkout: pip install '.[compat]'"
    if (error.name or "").partition(".")[0] != "keras":  # the default backend is TensorFlow
        _HINT = f"Keras failed to import its backend: {_SWITCH}"
    raise ImportError(f"focal_jax.compat.keras: {error}; {_HINT}", name=error.name) from error
if keras.backend.backend() != "jax":
    raise InputError(f"keras.backend: got {keras.backend.backend()!r}, wanted 'jax': {_SWITCH}")

_register = keras.saving.register_keras_serializable(package="focal_jax")
_register(PriorBias)
# Options that Keras passes in another way.
_HINTS = {
    "where": "Keras passes masks with the predictions",
    "ignore_label": "use ignore_class=",
    "bias": "y_pred is (features, kernel, bias)",
    "class_axis_name": "Keras maps no axes",
}


class _Reduction(keras.losses.Loss):
    """Keras's reduction, applied to losses with the mask of Keras."""

    def call(self, y_true: Array, y_pred: Array) -> Array:
        """Return the losses."""
        return y_pred


def _log(x: Array) -> Array:
    """Return the logarithm. It is -inf with the derivative 0 for 0 and subnormal numbers."""
    positive = x >= jnp.finfo(x.dtype).tiny
    return jnp.where(positive, jnp.log(jnp.where(positive, x, 1)), -jnp.inf)


def _logits(p: Array, sigmoid: bool) -> Array:
    """Return the logits of probabilities, NaN outside of [0, 1]."""
    y, invalid = arguments.clip_labels(p, p.astype(arguments.compute_dtype(p)), 1)
    z = _log(y)
    if sigmoid:
        below = y < 1
        z -= jnp.where(below, jnp.log1p(-jnp.where(below, y, 0)), -jnp.inf)
    # The derivative of an invalid probability is 1: the cotangent 0 of a masked position stays 0,
    # and the slope of any other loss at a NaN logit is NaN.
    return jnp.where(invalid, jnp.nan + y, z)


def _constructor_names(cls: type, names: Iterable[str]) -> set[str]:
    """Return the parameters of a constructor, and of those that its `**keywords` reach."""
    found: set[str] = set()
    constructors = [c for c in cls.__mro__ if "__init__" in vars(c)]
    for c in constructors:
        parameters = inspect.signature(c.__init__).parameters.values()
        found |= set(names) if c is Loss else {x.name for x in parameters}
        if c is Loss or not any(x.kind is x.VAR_KEYWORD for x in parameters):
            break
    # Without a parameter `loss` or `*args`, the subclass is assumed to choose the loss itself.
    first = inspect.signature(constructors[0].__init__).parameters.values()
    takes_loss = any(x.name == "loss" or x.kind is x.VAR_POSITIONAL for x in first)
    return found if takes_loss else found - {"loss"}


def _position_mask(mask: Any, shape: tuple[int, ...]) -> Array:
    """Return a mask of Keras, which has the first axes of the positions, with axes of size 1."""
    mask = jnp.asarray(mask, bool)
    valid = mask.ndim <= len(shape) and mask.shape == shape[: mask.ndim]
    got = f"y_pred: got a mask of shape {mask.shape}"
    arguments.require(valid, f"{got}, wanted the first axes of {shape}")
    return mask.reshape(*mask.shape, *(1,) * (len(shape) - mask.ndim))


def _class_labels(y: Array, shape: tuple[int, ...], axis: int) -> tuple[Array, bool]:
    """Return labels, without a class axis of size 1, and whether they are class indices."""
    num_classes, positions = shape[axis], (*shape[:axis], *shape[axis + 1 :])
    if num_classes == 1:
        wanted = "two classes, or a loss of one logit such as SigmoidFocalLoss"
        raise InputError(f"y_pred: got one class in shape {shape}, wanted {wanted}")
    if y.shape == (*shape[:axis], 1, *shape[axis + 1 :]):
        return y.squeeze(axis), True
    wanted = f"{positions}, class indices; or {shape}, one weight per class"
    valid = y.shape in (positions, shape)
    arguments.require(valid, f"y_true: got shape {y.shape}, wanted {wanted}")
    return y, y.shape == positions


def _indices(y: Array, num_classes: int, ignore: int | None) -> Array:
    """Return class indices as int32, -1 or -2 for a floating label that is no integer."""
    largest = num_classes - 1
    if jnp.issubdtype(y.dtype, jnp.floating):
        checks.check_holds_class("y_true", y, max(largest, abs(ignore or 0)))
        whole = class_indices("y_true", y, num_classes, ignore)
        return jnp.where(y == whole, whole, -2 if ignore == -1 else -1)
    limit = 1 if y.dtype == bool else jnp.iinfo(y.dtype).max
    if largest > limit:
        raise InputError(
            f"y_true: got dtype {y.dtype}, wanted a wider integer dtype: {y.dtype} holds no "
            f"integer above {limit}, and there is a class {largest}"
        )
    return arguments.as_int32(y.astype(jnp.int32) if y.dtype == bool else y, ignore)


@_register
@check_calls
class Loss(keras.losses.Loss):
    """Apply any loss of the catalogue in Keras.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.compat.keras import Loss
      >>> loss = Loss("asymmetric_loss", gamma_negative=2.0)
      >>> f"{loss(jnp.array([[1, 0]]), jnp.array([[2.0, -1.0]])):.4f}"
      '0.0694'

    Args:
      loss: the name of a loss of `focal_jax`. A loss of a softmax takes class indices, of the
        shape of `y_pred` without the class axis or with a class axis of size 1, or weights of
        the classes of the shape of `y_pred`; some losses take one of the two. For a linear head
        `y_pred` is a tuple `(features, kernel)` or `(features, kernel, bias)`.
      from_logits: whether `y_pred` holds logits, else probabilities.
      label_smoothing: a number in [0, 1). Labels are mixed with `1 / C`, or with 1/2 for a loss of
        one logit.
      ignore_class: None or the class index of positions that are masked. As in Keras, they do not
        count in the denominator of a mean.
      reduction: a reduction of Keras. For a region loss, which has one value per class,
        the mean is over the classes.
      name: the name of Keras.
      dtype: the dtype of the reduction. The losses are computed in float32 or a wider dtype.
      **options: options of the loss.
    """

    def __init__(
        self,
        loss: str,
        *,
        from_logits: bool = True,
        label_smoothing: float = 0.0,
        ignore_class: int | None = None,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: Any = None,
        **options: Any,
    ):
        """Check and store the options."""
        function = catalogue.function_of(loss if isinstance(loss, str) else None)
        for option in options:
            if option in _HINTS:
                raise InputError(f"{option}: got an option of JAX's API, wanted {_HINTS[option]}")
        reduced.check_option_names(function, options)
        self.loss = catalogue.LOSSES[loss]
        self.options = {k: reduced.checked_option(function, k, v) for k, v in options.items()}
        self.from_logits = arguments.static_bool("from_logits", from_logits)
        self.label_smoothing = LABEL_SMOOTHING.static("label_smoothing", label_smoothing)
        kind, labels = self.loss.kind, self.loss.labels
        arguments.require(
            from_logits or kind != "linear",
            f"from_logits: got False, wanted True: {loss} computes logits",
        )
        smooth = "label_smoothing" in inspect.signature(function).parameters
        smooth |= not {"soft", "distribution"}.isdisjoint(labels)
        got = f"label_smoothing: got {label_smoothing}"
        arguments.require(smooth or not label_smoothing, f"{got}, wanted 0 for {loss}")
        try:
            self.ignore_class = arguments.static_ignore_label(ignore_class)
        except InputError as error:
            message = str(error).replace("ignore_label", "ignore_class", 1)
            raise InputError(message) from None
        if ignore_class is not None and kind in ("elementwise", "interval"):
            raise InputError(f"ignore_class: got {ignore_class}, wanted None: {loss} has no class")
        for key, value in (("reduction", reduction), ("name", name)):
            valid = value is None or isinstance(value, str)
            arguments.require(valid, f"{key}: got {arguments.shown(value)}, wanted a str or None")
        try:
            super().__init__(name=name or loss, reduction=reduction)
        except ValueError as error:
            raise InputError(f"reduction: {error}") from error
        try:
            super().__init__(name=name or loss, reduction=reduction, dtype=dtype)
            if not jnp.issubdtype(self.dtype, jnp.floating):
                raise TypeError("wanted a floating dtype")
        except (TypeError, ValueError) as error:
            raise InputError(f"dtype: got {arguments.shown(dtype)}: {error}") from error

    def call(self, y_true: Any, y_pred: Any) -> Array:
        """Return the losses before the reduction, with the mask of Keras if there is one."""
        kind, ignore = self.loss.kind, self.ignore_class
        if kind == "linear" and not (isinstance(y_pred, list | tuple) and len(y_pred) in (2, 3)):
            wanted = "(features, kernel) or (features, kernel, bias)"
            raise InputError(f"y_pred: got {arguments.shown(y_pred)}, wanted {wanted}")
        first, *rest = y_pred if kind == "linear" else (y_pred,)
        mask = _masks.get_keras_mask(first)
        x = arguments.as_array("y_pred", first, "an array of floating numbers")
        hint = "Keras's order of the arguments is (y_true, y_pred)"
        is_floating = jnp.issubdtype(x.dtype, jnp.floating)
        got = f"y_pred: got dtype {x.dtype}"
        arguments.require(is_floating, f"{got}, wanted a floating dtype; {hint}")
        y = arguments.as_array("y_true", y_true, ignore_label=ignore)
        arguments.check_real("y_true", y)
        if not self.from_logits:
            x = _logits(x, kind == "elementwise")
        shape, axis = x.shape, -1
        options = {
            k: np.asarray(v) if isinstance(v, reduced.ConstantArray) else v
            for k, v in self.options.items()
        }
        if kind == "linear":
            own = "transpose_kernel"
            kernel = arguments.floating_array("kernel", rest[0])
            got = f"kernel: got shape {kernel.shape}"
            arguments.require(kernel.ndim == 2, f"{got}, wanted [D, C], or [C, D] with {own}")
            shape = (*shape[:-1], kernel.shape[0 if options.get(own) else -1])
            options["bias"] = rest[1] if len(rest) > 1 else None
        if kind == "elementwise":
            return self._elementwise(x, y, mask, options)
        axis = arguments.static_axis(options.get("axis", -1), len(shape))
        num_classes, positions = shape[axis], (*shape[:axis], *shape[axis + 1 :])
        y, is_sparse = _class_labels(y, shape, axis)
        where = None if mask is None else _position_mask(mask, positions)
        function: Any = self.loss.function
        s = self.label_smoothing
        if kind != "interval" and is_sparse:
            y = _indices(y, num_classes, ignore)
            where = arguments.not_ignored(y, ignore, where)
        elif ignore is not None:
            raise InputError(f"y_true: got shape {y.shape}, wanted class indices for ignore_class")
        if kind in ("position", "distribution") and self.loss.engine_loss is not None:
            engine = self.loss.engine_loss
            function = engine if is_sparse else engine.of_distribution
            if not is_sparse and engine.row_option is not None:
                got = f"y_true: got shape {y.shape}, wanted class indices"
                why = "is defined for the class of the label only"
                raise InputError(f"{got}: {self.loss.name} {why}")
        if is_sparse and kind == "region":
            invalid = (y < 0) | (y >= num_classes)
            y = jax.nn.one_hot(y, num_classes, axis=axis, dtype=arguments.compute_dtype(x))
            y = jnp.where(jnp.expand_dims(invalid, axis), jnp.nan, y)
            is_sparse = False
        if s and is_sparse:
            options["label_smoothing"] = s
        elif s:
            y = (1 - s) * y.astype(arguments.compute_dtype(x)) + s / num_classes
        losses = function(x, *rest[:1], y, where=where, **options)
        if where is not None and kind != "region":
            _masks.set_keras_mask(losses, jnp.broadcast_to(where, positions))
        return losses

    def _elementwise(self, x: Array, y: Array, mask: Any, options: Mapping[str, Any]) -> Array:
        """Return the losses of one logit, averaged over the last axis as in Keras."""
        if x.shape == (*y.shape, 1) or y.shape == (*x.shape, 1):
            y = y.reshape(x.shape)
        why = "one label for each prediction"
        arguments.check_shape("y_true", y, x.shape, why)
        if self.label_smoothing:
            s = self.label_smoothing
            y = (1 - s) * y.astype(arguments.compute_dtype(x)) + s / 2
        where = None if mask is None else _position_mask(mask, x.shape)
        losses = self.loss.function(x, y, where=where, **options)
        if x.ndim > 1 and (mask is None or mask.ndim < x.ndim):
            losses = jnp.mean(losses, -1)
            where = None if where is None else where[..., 0]
        if where is not None:
            _masks.set_keras_mask(losses, jnp.broadcast_to(where, losses.shape))
        return losses

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Return the reduced loss.

        Keras casts labels and predictions to the dtype of the loss. Here the losses are computed
        from the original dtypes, so that class indices stay exact and 16-bit predictions get
        16-bit gradients.
        """
        if sample_weight is not None and self.loss.kind == "region":
            got = "sample_weight: got weights"
            raise InputError(f"{got}, wanted None: {self.loss.name} has no value per sample")
        losses = self.call(y_true, y_pred)
        reduction = _Reduction(name=self.name, reduction=self.reduction, dtype=self.dtype)
        if sample_weight is None:
            return reduction(losses, losses)
        weights = arguments.number_array(
            "sample_weight", sample_weight, losses.dtype, allow_bool=True
        )
        try:
            return reduction(losses, losses, weights)
        except (TypeError, ValueError) as error:
            wanted = f"a shape that Keras broadcasts to the losses {losses.shape}"
            got = f"sample_weight: got shape {weights.shape}"
            raise InputError(f"{got}, wanted {wanted}") from error

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor, in types of JSON."""
        constants = (reduced.ConstantArray, np.ndarray, np.generic, Array)
        options = {
            k: np.asarray(v).tolist() if isinstance(v, constants) else v
            for k, v in self.options.items()
        }
        own = ("from_logits", "label_smoothing", "ignore_class", "dtype")
        config = {"loss": self.loss.name, **{k: getattr(self, k) for k in own}, **options}
        config = {**super().get_config(), **config}
        keep = _constructor_names(type(self), config)
        return {k: v for k, v in config.items() if k in keep}


@_register
@check_calls
class SigmoidFocalLoss(Loss):
    """Apply `focal_jax.sigmoid_focal_loss` in Keras.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.compat.keras import SigmoidFocalLoss
      >>> loss = SigmoidFocalLoss(alpha=0.25)
      >>> f"{loss(jnp.array([[1], [1]]), jnp.array([[0.0], [20.0]])):.4f}"
      '0.0217'
    """

    def __init__(
        self,
        alpha: Any = None,
        gamma: Any = 2.0,
        from_logits: bool = True,
        label_smoothing: float = 0.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "sigmoid_focal_loss",
        dtype: Any = None,
    ):
        """Check and store the options."""
        options = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__("sigmoid_focal_loss", **options)


@_register
@check_calls
class SoftmaxFocalLoss(Loss):
    """Apply the softmax focal loss in Keras, to class indices or to weights of the classes.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.compat.keras import SoftmaxFocalLoss
      >>> loss = SoftmaxFocalLoss(ignore_class=-1)
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
      >>> f"{loss(jnp.array([0, 1, -1]), logits):.4f}"
      '0.2496'
    """

    def __init__(
        self,
        alpha: Any = None,
        gamma: Any = 2.0,
        axis: int = -1,
        label_smoothing: float = 0.0,
        ignore_class: int | None = None,
        from_logits: bool = True,
        reduction: str | None = "sum_over_batch_size",
        name: str = "softmax_focal_loss",
        dtype: Any = None,
    ):
        """Check and store the options."""
        options = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__("softmax_focal_loss_with_integer_labels", **options)


@_register
class LinearHead(keras.layers.Dense):
    """Compute logits as `keras.layers.Dense`, or a loss of the features without the logits.

    `head(features)` returns logits. `head.loss(loss, y_true, features)` applies
    `Loss("linear_softmax_focal_loss_with_integer_labels")`.
    The products are those of the layer's compute dtype.
    """

    def loss(self, loss: Loss, y_true: Any, features: Any, sample_weight: Any = None) -> Any:
        """Return `loss` of the features, the kernel and the bias."""
        if not isinstance(loss, Loss) or loss.loss.kind != "linear":
            got = arguments.shown(loss)
            raise InputError(f"loss: got {got}, wanted a Loss of a linear head")
        got = f"activation: got {keras.activations.serialize(self.activation)}"
        linear = self.activation is keras.activations.linear
        arguments.require(linear, f"{got}, wanted None: a loss takes logits")
        arguments.require(self.built, "features: got a head without weights, wanted a built layer")
        arrays = [self.kernel, self.bias] if self.use_bias else [self.kernel]
        cast = [keras.ops.cast(x, self.compute_dtype) for x in arrays]
        return loss(y_true, (features, *cast), sample_weight)
