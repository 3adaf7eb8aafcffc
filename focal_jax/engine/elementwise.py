"""The engine for losses of one logit.

A loss is its value and its slopes, two functions of a logit and a label. The engine adds dtypes,
masks, invalid labels, the `custom_vjp`, recomputation in the backward pass, and the shapes, dtypes
and mesh axes of the cotangents.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax.engine import arguments, scalar
from focal_jax.engine.arguments import InputError
from focal_jax.engine.cpu import compile_separately
from focal_jax.engine.declaration import Loss
from focal_jax.engine.options import (
    Option,
    check_call,
    check_names,
    declared,
    prepare_options,
    unwrap,
)
from focal_jax.engine.platform import by_platform
from focal_jax.engine.rules import with_gradient
from focal_jax.engine.sharding import cast_to_common_varying, place_like

Slopes = tuple[Any, ...]  # arrays, and None for a derivative that is 0


def parameter_order(
    role: str, function: Callable[..., Any], leading: int, options: Mapping[str, Option]
) -> tuple[str, ...]:
    """Return the names of the options in the order of the function's parameters.

    The first `leading` parameters are arrays. Options are passed by name. A parameter that has a
    default and no declaration keeps its default.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise InputError(f"{role}: got {arguments.shown(function)}, wanted a function") from None
    arrays = [p for p in parameters if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)][:leading]
    others = [p for p in parameters if p not in arrays and p.kind is not p.VAR_POSITIONAL]
    names = [p.name for p in others if p.name in options or p.default is p.empty]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        names = list(options)
    enough = len(arrays) == leading or any(p.kind is p.VAR_POSITIONAL for p in arrays)
    by_name = all(p.kind is not p.POSITIONAL_ONLY for p in others)
    if not (enough and by_name and set(names) == set(options)):
        raise InputError(
            f"{role}: got parameters ({', '.join(map(str, parameters))}), wanted {leading} "
            f"array{'s' * (leading > 1)} and then the options {list(options)}"
        )
    return tuple(names)


def slopes_by_name(
    found: Slopes, like: Array, leading: int, names: Sequence[str], options: Mapping[str, Option]
) -> tuple[list[Array], dict[str, Array]]:
    """Return the slopes in the leading arrays, and the slopes in the options by name.

    They are arrays like the losses; 0 for None.
    """
    differentiable = [name for name in names if options[name].differentiable]
    count = len(found) if isinstance(found, tuple | list) else 0
    if count != leading + len(differentiable):
        raise InputError(
            f"slopes: got {count} derivatives, wanted {leading + len(differentiable)}: "
            f"{leading} and then those in {differentiable}"
        )
    arrays = []
    for slope in found:
        x = arguments.number_array("slopes", 0 if slope is None else slope, like.dtype)
        why = "a number, or the shape of the losses"
        arguments.check_shape("slopes", x, like.shape if x.ndim else (), why)
        arrays.append(jnp.broadcast_to(x, like.shape).astype(like.dtype))
    of_options = dict.fromkeys(options, jnp.zeros_like(like))
    return arrays[:leading], of_options | dict(zip(differentiable, arrays[leading:]))


def signature_of(
    options: Mapping[str, Option], call: Callable[..., Any], *more: Callable[..., Any]
) -> inspect.Signature:
    """Return the signature of a method of two arrays, with the options by name.

    The keyword arguments of `more` functions are added.
    """
    arrays = list(inspect.signature(call).parameters.values())[1:3]
    keyword, functions = inspect.Parameter.KEYWORD_ONLY, (call, *more)
    declared = [inspect.Parameter(k, keyword, default=x.default) for k, x in options.items()]
    others = [p for f in functions for p in inspect.signature(f).parameters.values()]
    return inspect.Signature([*arrays, *declared, *(p for p in others if p.kind is keyword)])


def check_value(result: Any, like: Array) -> None:
    """Raise unless `result`, which the value of a loss returned, is an array like this one."""
    got, wanted = (
        f"{x.dtype}{list(x.shape)}" if isinstance(x, Array) else type(x).__name__
        for x in (result, like)
    )
    arguments.require(got == wanted, f"value: got {got}, wanted an array {wanted}")


class CopiedAsFunction:
    """An object whose copy is the object itself. A pickle has the constructor's arguments."""

    _arguments: tuple[Any, ...]

    def __deepcopy__(self, memo: Any) -> Any:
        """Return the object itself."""
        return self

    def __reduce__(self) -> Any:
        """Return the constructor and its arguments."""
        return type(self), self._arguments


class ElementwiseLoss(CopiedAsFunction):
    """A loss of one logit and one label: `loss(logits, labels, *, where=None, **options)`.

    See `elementwise_loss`.
    """

    def __init__(
        self,
        value: Callable[..., Array],
        slopes: Callable[..., Slopes] | None,
        options: Mapping[str, Option],
        label_is_invalid: Callable[[Array], Array] | None,
    ):
        self._arguments = value, slopes, options, label_is_invalid
        self.options = dict(options)
        names = parameter_order("value", value, 2, options)
        slope_names = names if slopes is None else parameter_order("slopes", slopes, 2, options)
        if slopes is None:
            from focal_jax.engine.autodiff import slopes_of  # few losses need it

            slopes = slopes_of(value, names, options)
        self._value, self._slopes, self._slope_names = value, slopes, slope_names
        self.label_is_invalid = label_is_invalid
        self.__name__ = getattr(value, "__name__", "loss").strip("_")
        self.__doc__ = value.__doc__
        self.declaration = Loss(self.__name__, "elementwise", ("hard", "soft"), self.options, self)
        self.__signature__ = signature_of(self.options, ElementwiseLoss.__call__)

        def prepare(for_backward, logits, labels, options, where):
            dtype = arguments.compute_dtype(logits)
            z, y, options = arguments.cast_and_mask((logits, labels, options), dtype, where)
            given = y
            if for_backward:
                z, y = scalar.prevent_cse(z), scalar.prevent_cse(y)
            options = {name: unwrap(option) for name, option in options.items()}
            if label_is_invalid is None or labels.dtype == bool:
                return z, *arguments.clip_labels(labels, y, 1), options
            given = jnp.where(jnp.isinf(labels), given, y)  # `prevent_cse` makes `y` finite
            invalid = arguments.bool_array("label_is_invalid", label_is_invalid(given))
            arguments.check_shape("label_is_invalid", invalid, y.shape, "the shape of the labels")
            return z, jnp.where(invalid, 0, y), invalid, options

        def losses(*args):
            z, y, invalid, options = prepare(False, *args)
            result = self.value_of(z, y, options)
            return arguments.mask_and_invalidate(result, invalid, args[-1])

        def losses_on_tpu(*args):
            # XLA:TPU computes losses and slopes in one kernel, and their common terms once if both
            # use the same logits, clipped to finite numbers. Beyond them a loss above
            # sqrt(largest) is assumed to be proportional to the logit, a smaller loss constant.
            z, y, invalid, options = prepare(True, *args)
            result, largest = self.value_of(z, y, options), scalar.max_finite(z)
            beyond = jnp.abs(prepare(False, *args)[0] - z) / largest
            grows = (beyond > 0) & (jnp.abs(result) > math.sqrt(largest))
            result += jnp.where(grows, result * beyond, 0)
            return arguments.mask_and_invalidate(result, invalid, args[-1])

        def all_slopes(logits, labels, options, where):
            z, y, invalid, given = prepare(True, logits, labels, options, where)
            by_logit, by_label, found = self.slopes_of(z, y, given)
            by_option = {k: jax.tree.map(lambda _, k=k: found[k], x) for k, x in options.items()}
            finish = partial(arguments.mask_and_invalidate, invalid=invalid, where=where)
            return jax.tree.map(finish, (by_logit, by_label, by_option))

        self._core = _with_slopes(losses, losses_on_tpu, all_slopes)

    @check_call
    def __call__(
        self,
        logits: ArrayLike,
        labels: ArrayLike,
        *,
        where: ArrayLike | None = None,
        **options: Any,
    ) -> Array:
        """Return the losses, one per logit."""
        check_names(self.__name__, self.options, options)
        logits = arguments.floating_array("logits", logits)
        labels = arguments.real_array("labels", labels)
        arguments.check_broadcastable("labels", labels, logits.shape, "the logits")
        dtype = arguments.compute_dtype(logits)
        mask = arguments.mask_array(where, logits.shape)
        with jax.debug_nans(False):  # the mask is applied in the core
            # Axis 1 may be the classes, as in images.
            channels = logits.shape[1] if logits.ndim > 2 else 1
            prepared = prepare_options(
                self.options, options, logits.shape, dtype, num_classes=channels
            )
            labels = arguments.align(labels, logits.shape)
            given = place_like(logits, (labels, prepared, mask))
            args = cast_to_common_varying(logits, *given)
        return self._core(*args)

    @check_call
    def linear(
        self, features: ArrayLike, kernel: ArrayLike, labels: ArrayLike, **options: Any
    ) -> Array:
        """Return the losses of `features @ kernel + bias`, summed over the classes.

        The arguments are those of `focal_jax.linear_sigmoid_focal_loss`, with the loss's options.
        """
        from focal_jax.engine.multilabel import linear_losses  # most programs do not use it

        return linear_losses(self, features, kernel, labels, **options)

    def value_of(self, z: Array, y: Array, options: Mapping[str, Any]) -> Array:
        """Return the value for options by name."""
        result = self._value(z, y, **options)
        check_value(result, z)
        return result

    def slopes_of(
        self, z: Array, y: Array, options: Mapping[str, Any]
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Return the derivatives of the value in the logit, the label and the options by name."""
        found = self._slopes(z, y, **options)
        slopes = slopes_by_name(found, z, 2, self._slope_names, self.options)
        (by_logit, by_label), of_options = slopes
        return by_logit, by_label, of_options


def _with_slopes(
    losses: Callable[..., Array], on_tpu: Callable[..., Array], all_slopes: Callable[..., Any]
):
    """Return the losses with a `custom_vjp` that multiplies the cotangent by the slopes."""

    @jax.jit
    def primal(*args):
        return compile_separately(losses, *args)

    def forward(*args):
        result = by_platform(primal, primal, *args, on_tpu=on_tpu)
        return result, (args, result)

    def backward(residuals, ct):
        args, result = residuals

        # The slopes reuse the memory of the residual `result`: on CPU a new array costs more than
        # the arithmetic.
        slopes = compile_separately(all_slopes, *args, after=result)
        scaled = jax.tree.map(partial(arguments.scale_cotangent, ct), slopes)
        return *jax.tree.map(arguments.cotangent_like, args[:-1], scaled), None

    return with_gradient(primal, forward, backward)


@check_call
def elementwise_loss(
    value: Callable[..., Array],
    slopes: Callable[..., Slopes] | None = None,
    *,
    label_is_invalid: Callable[[Array], Array] | None = None,
    **options: Any,
) -> ElementwiseLoss:
    """Make a loss of one logit from its value and its slopes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from focal_jax import engine
      >>> def value(logit, label, scale):
      ...     return scale * engine.cross_entropy(logit, label)
      >>> loss = engine.elementwise_loss(value, scale=1.0)
      >>> losses = loss(jnp.array([0.0, 5.0]), jnp.array([1.0, 0.0]), scale=2.0)
      >>> [round(x, 4) for x in losses.tolist()]
      [1.3863, 10.0134]

    Args:
      value: `value(logit, label, *options) -> losses`. The arrays have the dtype of the loss and
        broadcast to the logits. A static exponent is a Python number, a flag a Python bool, an
        option that is left out None. Parameters after the first two have the options' names.
      slopes: None, or a function like `value` that returns a tuple: the derivative of the value
        in the logit, in the label, and in each of its options in the order of its own parameters,
        without masks and flags. None stands for a derivative that is 0. `slopes` gets logits that
        are clipped to about 2e19, on a TPU `value` too if there is a gradient. JAX differentiates
        `slopes` for derivatives of higher order, and the value if there are no slopes.
      label_is_invalid: returns where labels are invalid. The loss is NaN there. By default labels
        outside [0, 1] are invalid, and labels that are outside by a few roundings are clipped.
      **options: declarations: `exponent(2.0)`, `number(1.0, low=0)`, `mask()`, `flag(False)`, or
        a plain number, the default of a `number`.

    Returns:
      A function `loss(logits, labels, *, where=None, **options)`.

    Raises:
      InputError: if the parameters of `value` or `slopes` are not the declared options.
    """
    options = declared(options, ElementwiseLoss.__call__, ElementwiseLoss.linear)
    if label_is_invalid is not None:
        parameter_order("label_is_invalid", label_is_invalid, 1, {})
    return ElementwiseLoss(value, slopes, options, label_is_invalid)
