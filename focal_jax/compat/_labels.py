"""Class indices as the original systems keep them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs


def class_indices(name: str, labels: ArrayLike) -> Array:
    """Return labels as int32: floating ones, which the originals take, are truncated.

    What int32 cannot hold becomes a class that does not exist, and so does what is no
    number. NumPy's 64 bits are looked at before JAX could cut them to another class.
    """
    array: Any = labels if isinstance(labels, Array) else np.asarray(labels)
    int32 = jnp.iinfo(jnp.int32)
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = jnp.asarray(array)
        array = array.astype(_inputs.compute_dtype(array))
        return jnp.where(jnp.abs(array) < int32.max, array.astype(jnp.int32), int32.min)
    _checks.integer(name, array)
    own = jnp.iinfo(array.dtype)
    inside = array.clip(max(own.min, int32.min), min(own.max, int32.max))
    return jnp.asarray(inside.astype(jnp.int32))
