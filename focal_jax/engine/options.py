"""Options of a loss, declared once beside its formula.

A declaration is `exponent(2.0)`, `number(1.0, low=0)`, `mask()`, `flag(False)` or a plain number,
the default. The engines check and prepare the arguments by it; the catalogue, the reference
implementation, the Flax modules, the command line and the documentation read it.
"""

import dataclasses
import functools
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array

from focal_jax.engine import arguments
from focal_jax.engine.arguments import InputError

F = TypeVar("F", bound=Callable[..., Any])


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class MaybeStatic:
    """A Python number or bool, which is static, or an array, which is a leaf.

    A static exponent becomes products and roots, as `x ** 2` does in JAX and `x ** 2.0` does not.
    As part of the tree's structure it reaches a `custom_vjp` rule without being traced.
    """

    value: int | float | bool | Array

    def tree_flatten(self):
        """Return the leaves and the static part."""
        is_static = isinstance(self.value, int | float)
        return ((), self.value) if is_static else ((self.value,), None)

    @classmethod
    def tree_unflatten(cls, static, leaves):
        """Return the object from its leaves and its static part."""
        return cls(*leaves) if static is None else cls(static)


def unwrap(option: Any) -> Any:
    """Return the value of a `MaybeStatic`, and anything else unchanged."""
    return option.value if isinstance(option, MaybeStatic) else option


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a loss: its default and the values that are valid."""

    # A number is traced and differentiable. An exponent is static if it is a Python number, else
    # like a number. Masks are bool arrays, flags Python bools.
    kind: Literal["number", "exponent", "mask", "flag"]
    default: float | bool | None  # None: the option may be left out
    low: float = -math.inf
    high: float = math.inf
    above_low: bool = False  # whether `low` itself is invalid
    below_high: bool = False  # whether `high` itself is invalid
    per_class: bool = False  # whether an array has one entry per class, and not per position

    @property
    def optional(self) -> bool:
        """Whether None is a valid value."""
        return self.default is None

    @property
    def differentiable(self) -> bool:
        """Whether the loss has a derivative in the option."""
        return self.kind in ("number", "exponent")

    @property
    def wanted(self) -> str:
        """The valid values in words, for error messages and documentation."""
        if self.kind == "flag":
            return "True or False"
        if self.kind == "mask":
            return "a bool array"
        if math.isfinite(self.high):
            left, right = "(" if self.above_low else "[", ")" if self.below_high else "]"
            return f"a number in {left}{self.low:g}, {self.high:g}{right}"
        if math.isfinite(self.low):
            return f"a finite number {'>' if self.above_low else '>='} {self.low:g}"
        return "a finite number"

    def check(self, name: str, value: Any) -> Any:
        """Return `value`; raise if it is invalid, as far as is known before the program runs.

        Python numbers, NumPy arrays and concrete JAX arrays have known values. Tracers do not.
        """
        if value is None and not self.optional:
            raise InputError(f"{name}: got None, wanted {self.wanted}")
        if self.kind == "flag":
            arguments.static_bool(name, value)
        elif self.differentiable and value is not None:
            self._check_range(name, value)
        return value

    def _check_range(self, name: str, value: Any) -> None:
        if isinstance(value, str | bytes | bool | np.bool_):
            raise InputError(f"{name}: got {arguments.shown(value)}, wanted {self.wanted}")
        known = known_numbers(value, name, self.wanted)
        if known is None:
            return
        # A Python number becomes a float32. A number that is too large or too small for float32
        # would be infinite or 0.
        largest = float(jnp.finfo(jnp.float32).max)
        smallest = float(jnp.finfo(jnp.float32).tiny) if self.above_low and self.low == 0 else None
        valid = (known >= max(self.low, -largest)) & (known <= min(self.high, largest))
        if self.above_low:
            valid &= (known > self.low) if smallest is None else (known >= smallest)
        if self.below_high:
            valid &= known < self.high
        if not np.all(valid):
            wrong = known[~valid].ravel()[0] if known.ndim else known
            hint = "; None means no weighting, for which other libraries use -1"
            hint = hint if name == "alpha" and self.optional else ""
            raise InputError(f"{name}: got {wrong:g}, wanted {self.wanted}{hint}")

    def static(self, name: str, value: Any) -> float:
        """Return a Python or NumPy number as a float; raise if it is not valid."""
        real = arguments.real_number(value)
        if real is None:
            raise InputError(f"{name}: got {arguments.shown(value)}, wanted {self.wanted}")
        return self.check(name, real)

    def prepare(
        self,
        name: str,
        value: Any,
        losses: tuple[int, ...],
        dtype: jnp.dtype,
        axis: int | None = None,
        num_classes: int = 1,
    ) -> Any:
        """Return the option checked, as a tree of arrays that are aligned with the losses.

        The result is None, a `MaybeStatic` or an array.
        """
        self.check(name, value)
        if value is None:
            return None
        if self.kind == "flag":
            return MaybeStatic(value)
        if self.kind == "mask":
            return arguments.mask_array(value, losses, axis, name)
        if self.kind == "exponent" and isinstance(value, numbers.Real):
            number = float(value)
            is_integer = number.is_integer() and number <= arguments.INT32.max
            return MaybeStatic(int(number) if is_integer else number)
        array = arguments.number_array(name, value, dtype)
        arguments.check_broadcastable(name, array, losses, "the losses")
        arguments.check_unambiguous(name, array, losses, (num_classes,), "the classes")
        array = arguments.align(array, losses, axis)
        return MaybeStatic(array) if self.kind == "exponent" else array


def known_numbers(value: Any, name: str, wanted: str) -> np.ndarray | None:
    """Return the numbers of a Python, NumPy or concrete JAX value; None for bools and tracers."""
    if not isinstance(value, Array) and hasattr(value, "__jax_array__"):  # such as an nnx.Param
        value = value.__jax_array__()
    if isinstance(value, jax.core.Tracer):
        return None
    number = arguments.real_number(value)
    if isinstance(value, Array):
        if not value.is_fully_addressable or jnp.issubdtype(value.dtype, jax.dtypes.extended):
            return None
        known = np.asarray(value)  # first: `value.astype` is traced inside `jit`
    else:
        known = arguments.numpy_array(name, value if number is None else number, wanted)
    if known is not None and known.dtype.kind == "V" and jnp.issubdtype(known.dtype, jnp.number):
        known = known.astype(np.float32)  # a dtype that NumPy does not have, such as bfloat16
    return known.astype(np.float64) if known is not None and known.dtype.kind in "iuf" else None


def exponent(default: float | None, *, low: float = 0.0, per_class: bool = False) -> Option:
    """Declare an exponent: a finite number of at least `low`; a Python number is static."""
    return Option("exponent", default, low=low, per_class=per_class)


def number(
    default: float | None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above_low: bool = False,
    below_high: bool = False,
    per_class: bool = False,
) -> Option:
    """Declare a number in `[low, high]`, which is traced and differentiated; see `Option`."""
    return Option("number", default, low, high, above_low, below_high, per_class)


def mask() -> Option:
    """Declare a bool array that broadcasts to the losses, or None."""
    return Option("mask", None)


def flag(default: bool) -> Option:
    """Declare a Python bool."""
    return Option("flag", default)


# alpha of a sigmoid loss: the weight of the positives. alpha of a softmax loss: class weights.
POSITIVE_WEIGHT = number(None, low=0.0, high=1.0)
CLASS_WEIGHTS = number(None, low=0.0, per_class=True)
# The divisor of the logits, one number or one per position.
TEMPERATURE = number(1.0, low=0.0, above_low=True)
LABEL_SMOOTHING = number(0.0, low=0.0, high=1.0, below_high=True)


# Arguments of some losses and of the Flax modules.
_RESERVED = {"axis", "axis_name", "bias", "chunk_size", "class_axis_name", "ignore_label", "mesh"}
_RESERVED |= {"label_smoothing", "return_logsumexp", "transpose_kernel", "weights"}


def declared(options: Mapping[str, Any], *functions: Callable[..., Any]) -> dict[str, Option]:
    """Return declarations by name; a plain number or None is the default of a `number`.

    Raise for invalid defaults, and for names of parameters of `functions`.
    """
    out: dict[str, Option] = {}
    used = _RESERVED.union(*(inspect.signature(function).parameters for function in functions))
    for name, option in options.items():
        if name in used - {"options"}:
            raise InputError(f"{name}: got the name of an argument of every loss, wanted another")
        out[name] = option if isinstance(option, Option) else number(option)
        if out[name].per_class:
            raise InputError(f"{name}: got per_class=True, wanted one number per position")
        bounds = arguments.real_number(out[name].low), arguments.real_number(out[name].high)
        arguments.require(None not in bounds, f"{name}: got {out[name]}, wanted numbers as bounds")
        out[name].check(name, out[name].default)
    return out


# Words of other libraries. Their arguments have another meaning or are passed elsewhere.
_OF_REDUCE_LOSS = "focal_jax.reduce_loss reduces the losses, with normalization= and weights="
_HINTS = {
    **dict.fromkeys(("reduction", "reduce", "size_average", "avg_factor"), _OF_REDUCE_LOSS),
    **dict.fromkeys(("sample_weight", "weights"), _OF_REDUCE_LOSS),
    **dict.fromkeys(("weight", "class_weight", "class_weights"), "alpha= weights the classes"),
    **dict.fromkeys(("ignore_index", "ignore_class"), "use ignore_label="),
    **dict.fromkeys(("dim", "class_axis"), "use axis="),
    "mask": "use where=",
    "from_logits": "all losses take logits",
    "apply_class_balancing": "alpha= is the weight of the positives",
    "pos_weight": "focal_jax.training.positive_weight returns alpha and a factor",
}


def check_names(loss: str, known: Iterable[str], given: Iterable[str]) -> None:
    """Raise for the name of an option that the loss does not have."""
    known = list(known)
    for name in [name for name in given if name not in known]:
        hint = f"; {_HINTS[name]}" if name in _HINTS else ""
        raise InputError(
            f"{name}: got an option that {loss} does not have, wanted one of {known}{hint}"
        )


def check_call(function: F) -> F:
    """Raise `InputError` if the arguments do not fit the signature of the function (decorator)."""
    signature = inspect.signature(function)
    is_method = "self" in signature.parameters
    named = {k: p for k, p in signature.parameters.items() if k != "self"}
    names = [p.replace(annotation=p.empty) for p in named.values()]

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        owner: Any = args[0] if is_method else checked  # its class may inherit the method
        name = ".".join([type(owner).__name__] * is_method + [function.__name__])
        name = name.removesuffix(".__init__")
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("keras.") and not is_method:  # Keras's own call
            raise InputError(f"{name}: got Keras's (y_true, y_pred), wanted focal_jax.compat.keras")
        try:
            signature.bind(*args, **keywords)
        except TypeError as error:
            if all(p.kind is not p.VAR_KEYWORD for p in names):
                check_names(name, named, keywords)
            wanted = f"{name}{inspect.Signature(names)}"
            raise InputError(f"{name}: got {error}, wanted {wanted}") from None
        try:
            return function(*args, **keywords)
        except TypeError as error:
            is_jax_error = "custom_vjp" in str(error) and not hasattr(error, "__notes__")
            if is_jax_error and hasattr(owner, "declaration"):
                error.add_note("focal_jax.reference has formulas for forward-mode derivatives.")
            raise

    return cast(F, checked)


def prepare_options(
    declared: Mapping[str, Option],
    given: Mapping[str, Any],
    losses: tuple[int, ...],
    dtype: jnp.dtype,
    axis: int | None = None,
    num_classes: int = 1,
) -> dict[str, Any]:
    """Return all declared options as trees of arrays, see `Option.prepare`."""
    return {
        name: option.prepare(
            name, given.get(name, option.default), losses, dtype, axis, num_classes
        )
        for name, option in declared.items()
    }
