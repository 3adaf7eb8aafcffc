"""Arguments that the compat modules share: class indices, and options that are checked early."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax import catalogue
from focal_jax.engine import arguments
from focal_jax.engine.checks import check_holds_class, check_number
from focal_jax.engine.options import check_call

T = TypeVar("T")


def class_indices(
    name: str, labels: ArrayLike, num_classes: int, ignore_label: int | None = None
) -> Array:
    """Return labels as int32. Floating labels are truncated, as the original systems do.

    NaN and floating labels that do not fit int32 become an invalid class, not `ignore_label`.
    """
    labels = arguments.as_array(name, labels, "class indices", ignore_label=ignore_label)
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        arguments.check_integer(name, labels)
        return arguments.as_int32(labels, ignore_label)
    check_holds_class(name, labels, num_classes - 1)
    labels = labels.astype(arguments.compute_dtype(labels))
    fits = (labels >= arguments.INT32.min) & (labels < arguments.INT32.max)
    return jnp.where(fits, labels.astype(jnp.int32), -2 if ignore_label == -1 else -1)


def check_options(loss: Callable[..., Any], **options: Any) -> None:
    """Raise if an option of a loss is invalid, as far as that is known before the call."""
    declaration = catalogue.declaration_of(loss)
    assert declaration is not None
    for name, value in options.items():
        option = declaration.options[name]
        if option.check(name, value) is not None:
            check_number(name, value, option)


def check_calls(cls: T) -> T:
    """Apply `check_call` to the constructor and the call of a class (decorator)."""
    checked: Any = cls
    checked.__init__, checked.__call__ = map(check_call, (checked.__init__, checked.__call__))
    return cls
