"""Class indices as the original systems keep them."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _checks


def class_indices(name: str, labels: ArrayLike) -> Array:
    """Return labels as integers: floating ones, which the originals take, are truncated.

    What is no number becomes a class that does not exist.
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        _checks.integer(name, labels)
        return labels
    nowhere = jnp.iinfo(jnp.int32).min
    return jnp.where(jnp.isfinite(labels), labels.astype(jnp.int32), nowhere)
