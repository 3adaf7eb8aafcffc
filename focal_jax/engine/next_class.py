"""The largest logit below a bound, for example below the logit of the label's class."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from focal_jax.engine.class_axis import argmax, cast_logits, class_index
from focal_jax.engine.sharding import AxisName


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _first_largest(axis: int, z: Array) -> Array:
    """Return the largest entry, whose derivative is that of the first one; -inf if there is none.

    JAX would divide the derivative of a maximum among all entries that have it.
    """
    return jnp.max(z, axis, keepdims=True, initial=-jnp.inf)


@_first_largest.defjvp
def _first_largest_jvp(axis, primals, tangents):
    (z,), (dz,) = primals, tangents
    if z.shape[axis]:
        first = argmax(z, axis)
        dz = jnp.where(class_index(z, axis) == first, dz, 0)
    return _first_largest(axis, z), jnp.sum(dz, axis, keepdims=True)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=(0,))  # stores only its arguments
def _below(axis: int, logits: Array, bound: Array, where: Array | None) -> Array:
    z = cast_logits(logits, where)
    return _first_largest(axis, jnp.where(z < bound, z, -jnp.inf))


def is_first_with(x: Array, value: Array, class_axis_name: AxisName) -> Array:
    """Return whether this device is the first one whose `x` equals `value`."""
    device = lax.axis_index(class_axis_name)
    holder = jnp.where(x == value, device, lax.axis_size(class_axis_name))
    return lax.pmin(holder, class_axis_name) == device


def largest_below(
    axis: int, logits: Array, bound: Array, where: Array | None, class_axis_name: AxisName | None
) -> Array:
    """Return the largest logit below the bound, with a class axis of size 1, or -inf.

    If several classes tie, the first gets the derivative. The bound has no derivative.
    """
    below = _below(axis, logits, lax.stop_gradient(bound), where)
    if class_axis_name is None:
        return below
    # The largest over the shards, taken from the first device that has it.
    own = lax.stop_gradient(below)
    is_first = is_first_with(own, lax.pmax(own, class_axis_name), class_axis_name)
    return lax.psum(jnp.where(is_first, below, 0), class_axis_name)
