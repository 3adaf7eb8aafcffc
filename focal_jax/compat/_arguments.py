"""Arguments that the compat modules share: class indices, and options that are checked early."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax import catalogue
from focal_jax.engine import arguments


def class_indices(name: str, labels: ArrayLike) -> Array:
    """Return labels as int32. Floating labels are truncated, as the original systems do.

    NaN and floating labels that do not fit int32 become an invalid class.
    """
    labels = arguments.as_array(name, labels, "class indices")
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        arguments.check_integer(name, labels)
        return arguments.as_int32(labels)
    labels = labels.astype(arguments.compute_dtype(labels))
    int32 = arguments.INT32
    return jnp.where(jnp.abs(labels) < int32.max, labels.astype(jnp.int32), int32.min)


def check_options(loss: Callable[..., Any], **options: Any) -> None:
    """Raise if an option of a loss is invalid, as far as that is known before the call."""
    declaration = catalogue.declaration_of(loss)
    assert declaration is not None
    for name, value in options.items():
        declaration.options[name].check(name, value)
        if value is not None:
            arguments.number_array(name, value, jnp.dtype(jnp.float32))
