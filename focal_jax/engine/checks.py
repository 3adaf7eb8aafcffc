"""Checks that the losses of an array of logits do not need."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike

from focal_jax.engine import arguments
from focal_jax.engine.arguments import InputError, real_number, shown
from focal_jax.engine.options import Option, number

_SOFTCAP = number(1.0, low=0, above_low=True)


def check_known_numbers(name: str, x: Any, dtype: jnp.dtype, low: float = 0) -> None:
    """Raise if a Python or NumPy number is infinite in `dtype`, NaN, or below `low`.

    The values of a JAX array are not read: that would wait for the device.
    """
    bound = "" if low == -math.inf else f" >= {low}"
    wanted = f"finite numbers{bound} in the range of {dtype}"
    real = real_number(x)
    known = arguments.numpy_array(name, x if real is None else real, wanted)
    if known is not None and known.dtype.kind in "iufV" and jnp.issubdtype(known.dtype, jnp.number):
        known = known.astype(np.float64)
        wrong = known[~((known >= low) & (np.abs(known) <= float(jnp.finfo(dtype).max)))].ravel()
        if wrong.size:
            raise InputError(f"{name}: got {wrong[0]:g}, wanted {wanted}")


def check_number(name: str, value: Any, option: Option) -> tuple[int, ...]:
    """Return the shape of a number or an array of numbers; raise if it is invalid."""
    return arguments.number_array(name, option.check(name, value), jnp.dtype(jnp.float32)).shape


def class_index_lists(name: str, indices: ArrayLike, positions: tuple[int, ...]) -> Array:
    """Return int32 class indices `[*positions, K]`, padded with -1."""
    array = arguments.as_array(name, indices, "an array of integers")
    arguments.check_integer(name, array)
    why = "K class indices for each position, on the last axis, padded with -1"
    arguments.check_shape(name, array, (*positions, *(array.shape[-1:] or (1,))), why)
    return arguments.as_int32(array)


def distribution_over_classes(
    logits: ArrayLike, labels: ArrayLike, axis: int
) -> tuple[Array, Array, int, tuple[int, ...]]:
    """Return floating logits, real labels of their shape, the class axis, and the losses' shape."""
    logits = arguments.floating_array("logits", logits)
    labels = arguments.real_array("labels", labels)
    axis = arguments.static_axis(axis, logits.ndim)
    why = "a distribution over the classes, as the logits; jax.nn.one_hot converts class indices"
    arguments.check_shape("labels", labels, logits.shape, why)
    arguments.warn_of_one_class(logits.shape[axis])
    return logits, labels, axis, logits.shape[:axis] + logits.shape[axis + 1 :]


def check_holds_class(name: str, x: Array, largest: Any) -> None:
    """Raise if `x` is a floating array of fewer than 32 bits that rounds large class indices."""
    if x.dtype.itemsize < 4 and jnp.issubdtype(x.dtype, jnp.floating):
        limit = 2 ** (jnp.finfo(x.dtype).nmant + 1)  # all integers up to this one are exact
        if largest >= limit:  # the next index rounds to this one
            raise InputError(
                f"{name}: got dtype {x.dtype}, wanted float32 or an integer dtype: {x.dtype} "
                f"rounds integers above {limit}, and there is a class {largest:g}"
            )


def check_mesh(mesh: Any) -> None:
    """Raise unless `mesh` is None, a mesh, or the sharding of the features over one."""
    wanted = "None, a jax.sharding.Mesh, or the jax.sharding.NamedSharding of the features"
    valid = mesh is None or isinstance(mesh, Mesh | NamedSharding)
    arguments.require(valid, f"mesh: got {shown(mesh)}, wanted {wanted}")


def static_chunk_size(value: Any) -> int | None:
    """Return `value` as a Python integer of at least 1, or None."""
    if value is None:
        return None
    wanted = "None or an integer of at least 1"
    size = arguments.static_integer("chunk_size", value, wanted)
    arguments.require(size >= 1, f"chunk_size: got {shown(size)}, wanted {wanted}")
    return size


def static_logit_softcap(value: Any) -> float | None:
    """Return `value` as a finite positive Python number, or None."""
    return None if value is None else _SOFTCAP.static("logit_softcap", value)
