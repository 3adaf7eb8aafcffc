"""A loss followed by `reduce_loss`: the part that the linen and the nnx modules share."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from focal_jax import catalogue
from focal_jax.engine import arguments, checks
from focal_jax.engine.arguments import InputError
from focal_jax.engine.options import LABEL_SMOOTHING, TEMPERATURE, check_call, check_names
from focal_jax.losses.sigmoid import sigmoid_focal_loss
from focal_jax.losses.softmax import softmax_focal_loss, softmax_focal_loss_with_integer_labels
from focal_jax.reduction import check_normalization, reduce_loss


@dataclasses.dataclass(frozen=True, repr=False)
class ConstantArray:
    """An array of numbers that hashes and compares by its bytes.

    linen hashes and compares modules by their fields. nnx treats an array attribute as state,
    which transforms differentiate and optimizers update. A `ConstantArray` is static in both.
    """

    data: bytes  # Python caches the hash of bytes.
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return a NumPy array, read-only unless it is a copy."""
        return np.array(np.ndarray(self.shape, self.dtype, buffer=self.data), dtype, copy=copy)

    def __repr__(self) -> str:
        """Return the representation of the NumPy array."""
        return repr(np.asarray(self))


def constant(value: Any) -> Any:
    """Return an array, list or tuple of numbers as a Python number or a `ConstantArray`.

    Traced arrays, and everything that does not hold numbers, are returned unchanged.
    """
    is_sequence = isinstance(value, list | tuple)
    is_array = isinstance(value, np.ndarray | Array) and not isinstance(value, jax.core.Tracer)
    try:
        if not (is_sequence or is_array) or arguments.is_masked(value):
            return value
        array = np.asarray(value)
    except jax.errors.TracerArrayConversionError:  # a list of traced numbers
        return jnp.asarray(value)
    except Exception:  # such as a ragged or very deep list, which the check rejects
        return value
    if array.dtype.kind in "OSUMm" or (is_sequence and not array.size):
        return tuple(value) if is_sequence else value  # for example names of mapped axes
    return ConstantArray(array.tobytes(), array.shape, array.dtype) if array.ndim else array.item()


# Checks of the static arguments, which are not among the declared options.
_STATIC: dict[str, Callable[[Any], Any]] = {
    "axis": lambda value: arguments.static_axis(value, 64),  # the rank of the logits is unknown
    "ignore_label": arguments.static_ignore_label,
    "label_smoothing": functools.partial(LABEL_SMOOTHING.static, "label_smoothing"),
    "logit_softcap": checks.static_logit_softcap,
    "class_axis_name": lambda value: arguments.check_axis_name("class_axis_name", value),
    "mesh": checks.check_mesh,
    "transpose_kernel": lambda value: arguments.static_bool("transpose_kernel", value),
    "temperature": lambda value: checks.check_number("temperature", value, TEMPERATURE),
    "chunk_size": checks.static_chunk_size,
    "where": lambda value: value is None or arguments.bool_array("where", value),
    "bias": lambda value: value is None or arguments.floating_array("bias", value),
}


def checked_option(loss: Callable[..., Any], name: str, value: Any) -> Any:
    """Return an option as a constant. Raise if it is invalid for every input."""
    value = constant(value)
    declaration = catalogue.declaration_of(loss)
    if declaration and name in _STATIC:
        _STATIC[name](value)
    elif declaration and name in declaration.options:
        option = declaration.options[name]
        option.check(name, value)
        if option.kind == "mask" and value is not None:
            arguments.bool_array(name, value)
        if option.differentiable and value is not None:
            shape = checks.check_number(name, value, option)
            if option.per_class and (len(shape) > 1 or shape == (0,)):
                raise InputError(f"{name}: got shape {shape}, wanted one number per class")
    return value


def _optional(named: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return the names of the parameters that have a default or are keyword-only."""
    return [k for k, x in named.items() if x.kind is x.KEYWORD_ONLY or x.default is not x.empty]


def check_option_names(loss: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise for unknown options and for `return_logsumexp`, which a module does not return."""
    try:
        parameters = inspect.signature(loss).parameters
    except (TypeError, ValueError):  # a builtin
        got = arguments.shown(loss)
        raise InputError(f"loss: got {got}, wanted a Python function") from None
    known = _optional(parameters)
    for name in options:
        if name in parameters and name not in known:
            raise InputError(f"{name}: got a keyword argument, wanted a positional argument")
    if not any(x.kind is x.VAR_KEYWORD for x in parameters.values()):
        check_names(getattr(loss, "__name__", "the loss"), known, options)
    if (pair := options.get("return_logsumexp", False)) is not False:
        got = arguments.shown(pair)
        raise InputError(f"return_logsumexp: got {got}, wanted False: a module returns one number")


def check_reserved(loss: Callable[..., Any]) -> None:
    """Raise if an option of a loss has the name of an argument of the modules."""
    declaration = catalogue.declaration_of(loss)
    names = {"loss", "normalization", "loss_weight", "option_names", "options", "parent", "name"}
    if same := names & set(declaration.options if declaration else ()):
        raise InputError(f"loss: got a loss with the options {sorted(same)}, wanted other names")


class _ConstructorSignature:
    """The constructor's signature. nnx's metaclass would show `(*args, **kwargs)` instead."""

    def __get__(self, module: Any, owner: type) -> inspect.Signature:
        if module is not None:
            raise AttributeError  # `inspect` then takes the signature of `__call__`
        signature = inspect.signature(owner.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class Reduced:
    """The checks of the constructor and the call. Subclasses store the attributes."""

    loss: Callable[..., Array]
    normalization: str | ArrayLike
    loss_weight: ArrayLike
    axis_name: str | tuple[str, ...] | None
    option_names: tuple[str, ...] = ()  # the attributes that are options of the loss

    __signature__ = _ConstructorSignature()

    def __init_subclass__(cls, **options: Any) -> None:
        """Check calls, and define them on the class: linen does not wrap inherited methods."""
        cls.__call__ = check_call(cls.__call__)
        super().__init_subclass__(**options)
        if cls.__module__ != __name__:  # `dataclass` has not yet defined the constructors here
            cls.__init__ = check_call(cls.__init__)

    @property
    def options(self) -> Any:
        """The options of the loss, as a mapping or as pairs of a name and a value."""
        return {name: getattr(self, name) for name in self.option_names}

    def __setattr__(self, name: str, value: Any) -> None:
        """Check an attribute, and make arrays constant before Flax sees them."""
        if name == "loss":
            value = catalogue.function_of(value)
            check_reserved(value)
        elif name == "normalization" and (value is None or isinstance(value, str)):
            check_normalization(value, jnp.zeros(1))
        elif name in ("normalization", "loss_weight"):
            value = constant(value)
            dtype = jnp.dtype(jnp.result_type(float))
            low = 0 if name == "normalization" else -math.inf
            checks.check_known_numbers(name, value, dtype, low)
            number = arguments.number_array(name, value, dtype)
            arguments.check_shape(name, number, (), "one number for all losses")
        elif name == "axis_name":
            arguments.check_axis_name(name, value)
        elif name in self.option_names:
            value = checked_option(self.loss, name, value)
        elif hasattr(self, "loss") and name in _optional(inspect.signature(self.loss).parameters):
            raise InputError(f"{name}: got an option after the construction, wanted it at creation")
        super().__setattr__(name, value)

    def __call__(
        self, *arrays: ArrayLike, weights: ArrayLike | None = None, **options: Any
    ) -> Array:
        """Return `loss_weight * reduce_loss(loss(*arrays, **options))`, a scalar.

        `weights` is an argument of `focal_jax.reduce_loss`. The options replace those of the module
        in this call, for example a `where` or a scheduled `gamma`. They may be traced.
        """
        check_option_names(self.loss, options)
        for name, value in dict(self.options).items():
            array = np.asarray(value) if isinstance(value, ConstantArray) else value
            options.setdefault(name, array)
        try:
            bound = inspect.signature(self.loss).bind_partial(*arrays, **options)
        except TypeError as error:
            raise InputError(f"{getattr(self.loss, '__name__', 'loss')}: {error}") from error
        bound.apply_defaults()  # those of `functools.partial` too
        given = bound.arguments | options
        masks: dict[str, Any] = {"axis_name": self.axis_name, "where": given.get("where")}
        if "axis_name" in given:
            # A region loss applies the mask and sums over the devices itself.
            masks, options = {}, {"axis_name": self.axis_name, **options}
        elif given.get("ignore_label") is not None:
            masks |= {name: given.get(name) for name in ("labels", "ignore_label")}
        losses = self.loss(*arrays, **options)
        reduced = reduce_loss(losses, normalization=self.normalization, weights=weights, **masks)
        loss_weight = arguments.number_array("loss_weight", self.loss_weight, reduced.dtype)
        return loss_weight.astype(reduced.dtype) * reduced


# `wraps` copies the declaration and the signature.
@functools.wraps(softmax_focal_loss_with_integer_labels, assigned=())
def softmax_focal_loss_by_label_dtype(
    logits: ArrayLike, labels: ArrayLike, *, ignore_label: int | None = None, **options: Any
) -> Array:
    """Call the loss for integer labels, or `softmax_focal_loss` if the labels are floating."""
    ignore_label = arguments.static_ignore_label(ignore_label)
    labels = arguments.as_array("labels", labels, ignore_label=ignore_label)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        loss = softmax_focal_loss_with_integer_labels
        return loss(logits, labels, ignore_label=ignore_label, **options)
    if not jnp.issubdtype(labels.dtype, jnp.floating) or ignore_label is not None:
        wanted = "integers or floating numbers" if ignore_label is None else "integers"
        raise InputError(
            f"labels: got dtype {labels.dtype}, wanted {wanted} with ignore_label={ignore_label}"
        )
    return softmax_focal_loss(logits, labels, **options)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)  # Flax defines both
class SigmoidFocalLoss(Reduced):
    """The options and the call of the sigmoid focal loss."""

    alpha: ArrayLike | None = None
    gamma: ArrayLike = 2.0
    normalization: str | ArrayLike = "valid"
    loss_weight: ArrayLike = 1.0
    axis_name: str | tuple[str, ...] | None = None

    @property
    def loss(self) -> Callable[..., Array]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The loss."""
        return sigmoid_focal_loss

    option_names = ("alpha", "gamma")

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        logits: ArrayLike,
        labels: ArrayLike,
        *,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        gamma: ArrayLike | None = None,
    ) -> Array:
        """Return the reduced loss, multiplied by `loss_weight`, a scalar.

        `where` masks positions, in the loss and in the denominator. `weights` is an argument of
        `focal_jax.reduce_loss`. `gamma` replaces the gamma of the module in this call, for example
        by a scheduled one. It may be traced.
        """
        options = {"where": where} if gamma is None else {"where": where, "gamma": gamma}
        return super().__call__(logits, labels, weights=weights, **options)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class SoftmaxFocalLoss(SigmoidFocalLoss):
    """The options of the softmax focal losses."""

    axis: int = -1
    ignore_label: int | None = None

    @property
    def loss(self) -> Callable[..., Array]:
        """The loss."""
        return softmax_focal_loss_by_label_dtype

    option_names = ("alpha", "gamma", "axis", "ignore_label")
