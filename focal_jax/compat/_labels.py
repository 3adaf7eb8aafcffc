"""Class indices as the original systems keep them."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs


def class_indices(name: str, labels: ArrayLike) -> Array:
    """Return labels as int32: floating ones, which the originals take, are truncated.

    What int32 cannot hold becomes a class that does not exist, and so does what is no
    number.
    """
    labels = _checks.array(name, labels, "class indices")
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        _checks.integer(name, labels)
        return _checks.saturated(labels)
    labels = labels.astype(_inputs.compute_dtype(labels))
    int32 = _checks.INT32
    return jnp.where(jnp.abs(labels) < int32.max, labels.astype(jnp.int32), int32.min)
