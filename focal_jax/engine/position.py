"""The engine for losses of one softmax position.

A loss is its value and its slopes, two functions of the terms of the true class. The engine makes
a loss of class indices, a loss of features and a kernel, and a loss of a distribution from them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax.engine import arguments, head, scalar
from focal_jax.engine.arguments import InputError
from focal_jax.engine.class_axis import ClassSums
from focal_jax.engine.cpu import compile_separately
from focal_jax.engine.declaration import Loss
from focal_jax.engine.elementwise import (
    CopiedAsFunction,
    Slopes,
    check_value,
    parameter_order,
    signature_of,
    slopes_by_name,
)
from focal_jax.engine.options import CLASS_WEIGHTS, Option, check_call, declared, number, unwrap
from focal_jax.engine.rules import with_gradient
from focal_jax.engine.scalar import Terms
from focal_jax.engine.sharding import AxisName, cast_to_common_varying

# An option that is computed from the row of logits:
# (axis, class_axis_name, logits, class sums, mask) -> array.
RowOption = Callable[[int, AxisName | None, Array, ClassSums, Array | None], Array]


class PositionLoss(CopiedAsFunction):
    """A loss of one softmax position: `loss(logits, labels, *, alpha=None, axis=-1, ...)`.

    See `position_loss`.
    """

    def __init__(
        self,
        value: Callable[..., Array],
        slopes: Callable[..., Slopes] | None,
        options: Mapping[str, Option],
        row_option: tuple[str, RowOption] | None = None,
    ):
        self._arguments = value, slopes, options, row_option
        self.options, self.row_option = dict(options), row_option
        inner = self.options if row_option is None else self.options | {row_option[0]: number(0.0)}
        names = parameter_order("value", value, 1, inner)
        slope_names = names if slopes is None else parameter_order("slopes", slopes, 1, inner)
        self._value, self._inner, self._slope_names = value, inner, slope_names
        if slopes is None:
            from focal_jax.engine.autodiff import slopes_of_terms  # few losses need it

            slopes = slopes_of_terms(value, names, inner)
        self._slopes = slopes
        self._core = _with_slopes(self)
        self.__name__ = getattr(value, "__name__", "loss").strip("_")
        self.__doc__ = value.__doc__
        self.declaration = Loss(
            self.__name__,
            "position",
            ("integer",),
            {"alpha": CLASS_WEIGHTS} | self.options,
            self,
            engine_loss=self,
        )
        call = PositionLoss.__call__
        self.__signature__ = signature_of(self.options, call, head.integer_losses)

    @check_call
    def __call__(
        self, logits: ArrayLike, labels: ArrayLike, *, axis: int = -1, **options: Any
    ) -> Any:
        """Return the losses of an array of logits, one per label."""
        logits = arguments.floating_array("logits", logits)
        source = head.DenseSource(arguments.static_axis(axis, logits.ndim))
        return head.integer_losses(self, source, logits, labels, **options)

    @check_call
    def linear(
        self,
        features: ArrayLike,
        kernel: ArrayLike,
        labels: ArrayLike,
        *,
        bias: ArrayLike | None = None,
        logit_softcap: float | None = None,
        temperature: ArrayLike = 1.0,
        transpose_kernel: bool = False,
        chunk_size: int | None = None,
        class_axis_name: AxisName | None = None,
        mesh: Any = None,
        **options: Any,
    ) -> Any:
        """Return the losses of `features @ kernel + bias`, whose logits are never stored.

        The arguments are those of `focal_jax.linear_softmax_focal_loss_with_integer_labels`.
        """
        # Imported here, because most programs do not use it.
        from focal_jax.engine.linear import linear_source

        if self.row_option is not None:
            got = f"linear: got {self.__name__}, which needs a whole row of logits at once"
            raise InputError(f"{got}, wanted another loss")
        of_logits = bias, transpose_kernel, logit_softcap, chunk_size, mesh, class_axis_name
        source, arrays, name = linear_source(features, kernel, *of_logits, temperature)
        return head.integer_losses(self, source, arrays, labels, class_axis_name=name, **options)

    @check_call
    def of_distribution(
        self,
        logits: ArrayLike,
        labels: ArrayLike,
        *,
        alpha: ArrayLike | None = None,
        axis: int = -1,
        where: ArrayLike | None = None,
        **options: Any,
    ) -> Array:
        """Return `sum over c of alpha_c y_c value(p_c)` for labels `y` of the logits' shape.

        The arguments are those of `focal_jax.softmax_focal_loss`.
        """
        from focal_jax.engine.every_class import distribution_losses  # see `linear`

        return distribution_losses(self, logits, labels, alpha, axis, where, options)

    def value_of(self, t: Terms, options: Mapping[str, Any]) -> Array:
        """Return the value for options by name."""
        result = self._value(t, **options)
        check_value(result, t.n)
        return result

    def slopes_of(self, t: Terms, options: Mapping[str, Any]) -> tuple[Array, dict[str, Any]]:
        """Return the derivative of the value in n, and the derivatives in the options by name."""
        found = self._slopes(t, **options)
        (by_n,), of_options = slopes_by_name(found, t.n, 1, self._slope_names, self._inner)
        return by_n, of_options

    def of_sums(self, label_logit, rest, weight, options, where, invalid) -> Array:
        """Return the losses from the class sums, see `scalar.softmax_terms`."""
        args = label_logit, rest, weight, options, where, invalid
        return self._core(*cast_to_common_varying(*args))


def _with_slopes(loss: PositionLoss):
    """Return the losses as a function of the class sums, with a `custom_vjp`."""

    def losses(label_logit, rest, weight, options, where, invalid):
        t, weight, options = _prepare(label_logit, rest, weight, options, where)
        result = scalar.weigh(weight, loss.value_of(t, options))
        return arguments.mask_and_invalidate(result, invalid, where)

    @jax.jit
    def primal(*args):
        return compile_separately(losses, *args)

    def forward(*args):
        return primal(*args), args

    def backward(args, ct):
        label_logit, rest, weight, options, where, invalid = args
        t, w, given = _prepare(label_logit, rest, weight, options, where)
        t = scalar.finite(t)
        by_n, of_options = loss.slopes_of(t, given)

        def scaled(slope):
            slope = arguments.mask_and_invalidate(slope, invalid, where)
            return arguments.scale_cotangent(ct, slope)

        def cotangent(slope, tree):
            return jax.tree.map(lambda x: arguments.cotangent_like(x, scaled(slope)), tree)

        # log p = label_logit - log(exp(label_logit) + rest), so the derivative of log p in `rest`
        # is -1 / sum, and the derivative in `label_logit` is rest / sum.
        label_logit, rest = arguments.cast_and_mask((label_logit, rest), rest.dtype, where)
        of_rest = scaled(w * by_n / (jnp.exp(label_logit) + rest))
        return (
            arguments.cotangent_like(args[0], -rest * of_rest),
            arguments.cotangent_like(args[1], of_rest),
            cotangent(loss.value_of(t, given), weight),
            {
                name: None if slope is None else cotangent(w * slope, options[name])
                for name, slope in of_options.items()
            },
            None,
            None,
        )

    return with_gradient(primal, forward, backward)


def _prepare(label_logit, rest, weight, options, where):
    """Return the terms, the weight and the options in the dtype of the loss, 0 where masked."""
    cast = partial(arguments.cast_and_mask, dtype=rest.dtype, where=where)
    label_logit, rest, weight, options = cast((label_logit, rest, weight, options))
    options = {name: unwrap(option) for name, option in options.items()}
    return scalar.softmax_terms(label_logit, rest), weight, options


@check_call
def position_loss(
    value: Callable[..., Array], slopes: Callable[..., Slopes] | None = None, **options: Any
) -> PositionLoss:
    """Make a loss of one softmax position from its value and its slopes.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import engine
      >>> def value(terms, scale):  # the mean absolute error of a one-hot label, 1 - p
      ...     return scale * terms.q
      >>> loss = engine.position_loss(value, scale=1.0)
      >>> losses = loss(jnp.array([[2.0, 0.0, 0.0]]), jnp.array([0]), scale=2.0)
      >>> [round(x, 4) for x in losses.tolist()]
      [0.426]

    Args:
      value: `value(terms, *options) -> losses`, of the `Terms` of the true class. Parameters after
        the first have the options' names. The engine multiplies the value by the class weight
        `alpha`, which is an option of every loss of a position.
      slopes: None, or a function like `value` that returns a tuple: the derivative of the value
        in `n = -log p`, and in each of its options in the order of its own parameters. `slopes`
        gets finite terms. JAX differentiates `slopes` for derivatives of higher order. Without
        slopes JAX differentiates the value.
      **options: declarations: `exponent(2.0)`, `number(1.0, low=0)`, or a plain number, the
        default of a `number`.

    Returns:
      A function of logits and class indices, with the keyword arguments of
      `focal_jax.softmax_focal_loss_with_integer_labels` and the declared options. Its method
      `linear` takes features and a kernel instead of logits.

    Raises:
      InputError: if the parameters of `value` or `slopes` are not the declared options.
    """
    heads = head.integer_losses, PositionLoss.__call__, PositionLoss.linear
    return PositionLoss(value, slopes, declared(options, *heads))
