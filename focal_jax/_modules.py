"""The options and the call that the linen and the nnx modules share; no Flax in here."""

import dataclasses
import importlib
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, get_args

import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _catalogue, _checks, _inputs
from focal_jax._reduction import reduce_loss
from focal_jax._sigmoid import sigmoid_focal_loss
from focal_jax._softmax_integer import softmax_focal_loss_with_integer_labels
from focal_jax._softmax_soft import softmax_focal_loss


def _constant(option: Any) -> Any:
    """Return an array of numbers as nested tuples, anything else as it is.

    A constant that hashes and compares: Flax modules are compared and hashed, and an
    array among an nnx module's attributes is state, there for a transform to differentiate
    or an optimizer to find. A traced array has no numbers yet and stays what it is.
    """
    if isinstance(option, list | np.ndarray | Array) and not isinstance(option, jax.core.Tracer):
        return _tuples(np.asarray(option).tolist())
    return option


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


# Options that only a call can judge: arrays, and axes that are bound there.
_OF_A_CALL = frozenset({"where", "positive", "bias", "axis_name", "class_axis_name"})


def _shape(option: Any) -> tuple[int, ...]:
    try:
        return np.shape(option)
    except ValueError:  # rows of unequal lengths, which the loss itself names
        return ()


def static_options(loss: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse options that no input could make good: the loss itself is asked, about shapes alone.

    What is traced is left to the call, and so is a loss that is not of this package.
    """
    name = getattr(loss, "__name__", "")
    entry = _catalogue.by_name().get(name)
    if entry is None or loss is not function_of(name):
        return
    asked = {
        k: v
        for k, v in options.items()
        if k not in _OF_A_CALL and not isinstance(v, jax.core.Tracer)
    }
    if not asked:
        return
    # The smallest shapes that the options fit.
    per_class = {k for k, option in entry.options.items() if option.per_class}
    classes = next((n for k in per_class for n in _shape(asked.get(k))[:1]), 2)
    shapes = [_shape(asked[k]) for k in entry.options.keys() & asked.keys() - per_class]
    given = asked.get("axis", -1)
    axis = int(given) if isinstance(given, numbers.Integral) else -1  # the loss says what it is
    rank = max(axis + 1, -axis)
    positions = jnp.broadcast_shapes(*shapes, (1,) * max(rank - entry.softmax, 1))
    logits = positions
    if entry.softmax:
        axis %= len(positions) + 1
        logits = (*positions[:axis], classes, *positions[axis:])
    labels = positions if entry.labels[-1] in ("integer", "real") else logits
    dtype = jnp.int32 if "integer" in entry.labels else jnp.float32
    kernel = [jax.ShapeDtypeStruct((classes,) * 2, jnp.float32)] * (entry.kind == "linear")
    arguments = (
        jax.ShapeDtypeStruct(logits, jnp.float32),
        *kernel,
        jax.ShapeDtypeStruct(labels, dtype),
    )
    jax.eval_shape(lambda *arguments: loss(*arguments, **asked), *arguments)


def function_of(
    loss: Any, name: str = "loss", kinds: tuple[str, ...] = get_args(_catalogue.Kind)
) -> Callable[..., Any]:
    """Return a loss that is given by itself, or by its name if it is of one of the kinds."""
    if callable(loss):
        return loss
    known = tuple(entry.name for entry in _catalogue.LOSSES if entry.kind in kinds)
    if loss not in known:
        raise _checks.InputError(f"{name}: got {loss!r}, wanted a function or one of {known}")
    # By name, since the package itself stands above its rooms and imports them.
    return getattr(importlib.import_module("focal_jax"), loss)


def known_options(loss: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse options that the loss does not have; what they are, the loss itself refuses."""
    parameters = inspect.signature(loss).parameters
    known = [
        k for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY or p.default is not p.empty
    ]
    arrays = [k for k, p in parameters.items() if k not in known and p.kind is not p.VAR_KEYWORD]
    for name in options:
        if name in arrays:
            raise _checks.InputError(f"{name}: got it by name, wanted it in its place: {arrays}")
        if name not in known and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise _checks.InputError(
                f"{name}: got an option that the loss does not have, wanted one of {known}"
            )
    if options.get("return_logsumexp"):
        raise _checks.InputError("return_logsumexp: got True, wanted losses alone to reduce")


def loss_weight(given: Any, dtype: jnp.dtype) -> Array:
    """Return what a reduced loss is multiplied by."""
    weight = _inputs.option("loss_weight", given, dtype)
    _checks.shape("loss_weight", weight, (), "one weight for the reduced loss")
    return weight


# The identity stays an nnx module's hash, the fields become a linen module's; each
# framework has its own repr.
@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class _ReducedLoss:
    """The options of the reduction, and the call of a loss and of the reduction after it."""

    normalization: str | ArrayLike = "valid"
    loss_weight: ArrayLike = 1.0
    axis_name: str | tuple[str, ...] | None = None

    def __setattr__(self, name: str, value: Any):
        # Before nnx sees it: an attribute that has once held an array remains state.
        value = _constant(value)
        self._refuse(name, value)
        super().__setattr__(name, value)

    def _refuse(self, name: str, value: Any) -> None:
        """Refuse a field that no input could make good."""
        if isinstance(value, jax.core.Tracer):
            return
        if name == "normalization":
            losses = jax.ShapeDtypeStruct((1,), jnp.float32)
            jax.eval_shape(lambda x: reduce_loss(x, normalization=value), losses)
        if name == "loss_weight" and not isinstance(value, numbers.Real):
            loss_weight(value, jnp.dtype(jnp.float32))

    def _reduced(
        self,
        loss: Callable[..., Array],
        arrays: tuple[ArrayLike, ...],
        weights: ArrayLike | None,
        options: dict[str, Any],
    ) -> Array:
        """Return the weighted, reduced loss; the reduction counts as the loss does."""
        signature = inspect.signature(loss)
        counting: dict[str, Any] = {"axis_name": self.axis_name, "where": options.get("where")}
        if "axis_name" in signature.parameters:
            # Such a loss has summed over the positions and the devices itself.
            counting, options = {}, {"axis_name": self.axis_name} | options
        elif options.get("ignore_label") is not None:
            labels = signature.bind_partial(*arrays).arguments.get("labels")
            counting |= {"labels": labels, "ignore_label": options["ignore_label"]}
        losses = loss(*arrays, **options)
        reduced = reduce_loss(losses, normalization=self.normalization, weights=weights, **counting)
        return loss_weight(self.loss_weight, reduced.dtype).astype(reduced.dtype) * reduced


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Reduced(_ReducedLoss):
    """Any loss, reduced."""

    loss: Callable[..., Array]
    # Pairs of a name and a value, which hash and compare as a whole.
    options: tuple[tuple[str, Any], ...] = ()

    def __setattr__(self, name: str, value: Any):
        if name == "loss":
            value = function_of(value)
            self._check(value, dict(self.options))
        if name == "options":
            value = tuple(sorted((option, _constant(x)) for option, x in dict(value).items()))
            self._check(self.loss, dict(value))
        super().__setattr__(name, value)

    def _check(self, loss: Callable[..., Array], options: Mapping[str, Any]) -> None:
        """Refuse options before there is any input."""
        known_options(loss, options)
        static_options(loss, options)

    def __call__(
        self, *arrays: ArrayLike, weights: ArrayLike | None = None, **options: Any
    ) -> Array:
        """Return `loss_weight * reduce_loss(loss(*arrays, **options))`.

        Args:
          *arrays: what the loss takes: logits and labels, or features, kernel and labels.
          weights: how much each position counts, as `focal_jax.reduce_loss` has it.
          **options: take the place of the module's own for this call, such as a `where` or
            a schedule's `gamma`; may be traced.

        Returns:
          A scalar: float32 for 16-bit logits, else of the logits' dtype.

        Raises:
          ValueError: as the loss and `focal_jax.reduce_loss` do, and for an option that the
            loss does not have.

        Differentiation: as the loss.
        """
        known_options(self.loss, options)
        return self._reduced(self.loss, arrays, weights, dict(self.options) | options)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class _FocalLoss(_ReducedLoss):
    alpha: ArrayLike | None = None
    gamma: ArrayLike = 2.0

    _loss: ClassVar[Callable[..., Any]]  # which has the fields for options

    def _refuse(self, name: str, value: Any) -> None:
        super()._refuse(name, value)
        if name in inspect.signature(self._loss).parameters:
            static_options(self._loss, {name: value})

    def _options(self, gamma: ArrayLike | None, where: ArrayLike | None) -> dict[str, Any]:
        gamma = self.gamma if gamma is None else gamma
        return {"alpha": self.alpha, "gamma": gamma, "where": where}


class SigmoidFocalLoss(_FocalLoss):
    """`focal_jax.sigmoid_focal_loss`, reduced."""

    _loss = staticmethod(sigmoid_focal_loss)

    def __call__(
        self,
        logits: ArrayLike,
        labels: ArrayLike,
        *,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        gamma: ArrayLike | None = None,
    ) -> Array:
        """Return `loss_weight * reduce_loss(sigmoid_focal_loss(logits, labels))`.

        Args:
          logits: `[...]`, floating.
          labels: real or bool in `[0, 1]`, broadcasts to the logits.
          where: bool, broadcasts to the losses: the positions that count.
          weights: how much each position counts, as `focal_jax.reduce_loss` has it.
          gamma: takes the place of the field for this call; may be traced, as a schedule's
            value is.

        Returns:
          A scalar: float32 for 16-bit logits, else of the logits' dtype.

        Raises:
          ValueError: as `focal_jax.sigmoid_focal_loss` and `focal_jax.reduce_loss` do.

        Differentiation: as `focal_jax.sigmoid_focal_loss`.
        """
        options = self._options(gamma, where)
        return self._reduced(sigmoid_focal_loss, (logits, labels), weights, options)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class SoftmaxFocalLoss(_FocalLoss):
    """A softmax focal loss, reduced; the labels' dtype picks which."""

    axis: int = -1
    ignore_label: int | None = None

    _loss = staticmethod(softmax_focal_loss_with_integer_labels)

    def __call__(
        self,
        logits: ArrayLike,
        labels: ArrayLike,
        *,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        gamma: ArrayLike | None = None,
    ) -> Array:
        """Return `loss_weight * reduce_loss(losses)` of the softmax focal losses.

        Args:
          logits: `[..., C, ...]`, floating.
          labels: integers of the logits' shape without the class axis, class indices for
            `focal_jax.softmax_focal_loss_with_integer_labels`; or floating and of the
            logits' shape, a distribution for `focal_jax.softmax_focal_loss`.
          where: bool, broadcasts to the losses: the positions that count. Those with
            `ignore_label` never do.
          weights: how much each position counts, as `focal_jax.reduce_loss` has it.
          gamma: takes the place of the field for this call; may be traced, as a schedule's
            value is.

        Returns:
          A scalar: float32 for 16-bit logits, else of the logits' dtype.

        Raises:
          ValueError: as the two losses and `focal_jax.reduce_loss` do, for labels that are
            neither integers nor floating, and for a distribution where there is an
            `ignore_label` (it has none to ignore).

        Differentiation: as the two losses.
        """
        # Not made an array of JAX's here: that would narrow labels of 64 bits.
        labels = labels if hasattr(labels, "dtype") else jnp.asarray(labels)
        dtype = jnp.result_type(labels)
        options = self._options(gamma, where) | {"axis": self.axis}
        if jnp.issubdtype(dtype, jnp.integer):
            loss = softmax_focal_loss_with_integer_labels
            options["ignore_label"] = self.ignore_label
        elif not jnp.issubdtype(dtype, jnp.floating):
            raise _checks.InputError(
                f"labels: got dtype {dtype}, wanted integers, class indices, or a floating "
                "dtype, a distribution over the classes"
            )
        elif self.ignore_label is not None:
            raise _checks.InputError(
                f"labels: got dtype {dtype}, a distribution over the classes, wanted "
                f"integers: ignore_label is {self.ignore_label}; `where` masks either kind"
            )
        else:
            loss = softmax_focal_loss
        return self._reduced(loss, (logits, labels), weights, options)
