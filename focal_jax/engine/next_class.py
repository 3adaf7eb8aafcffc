"""The largest logit below a bound, for example below the logit of the label's class."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from focal_jax.engine.arguments import INT32, mask_to_zero
from focal_jax.engine.class_axis import cast_logits, class_index, pick_class, reduce_classes
from focal_jax.engine.platform import by_platform
from focal_jax.engine.sharding import AxisName, cast_to_common_varying


class _Next(NamedTuple):
    """The largest logit below the bound, or -inf, and the index of its first class."""

    z: Array
    class_index: Any


def _largest_in_passes(axis: int, z: Array) -> _Next:
    if not z.shape[axis]:
        nothing = jnp.zeros_like(jnp.sum(z, axis, keepdims=True))
        return _Next(nothing - jnp.inf, nothing.astype(jnp.int32))
    index = jnp.argmax(z, axis, keepdims=True).astype(jnp.int32)
    return _Next(pick_class(z, index, axis), index)


def _largest_in_one_pass(axis: int, z: Array) -> _Next:
    def combine(a, b):
        first = (a.z > b.z) | ((a.z == b.z) & (a.class_index < b.class_index))
        return jax.tree.map(partial(jnp.where, first), a, b)

    # The sum with zeros of the logits' shape gives the index the sharding of the logits.
    index = class_index(z, axis) + jnp.zeros_like(z, jnp.int32)
    initial = _Next(jnp.asarray(-jnp.inf, z.dtype), jnp.int32(INT32.max))
    return reduce_classes(axis, _Next(z, index), initial, combine)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _next_below(axis: int, logits: Array, bound: Array, where: Array | None) -> _Next:
    z = cast_logits(logits, where)
    below = jnp.where(z < bound, z, -jnp.inf)
    forms = (partial(form, axis) for form in (_largest_in_passes, _largest_in_one_pass))
    return by_platform(*forms, below)


@_next_below.defjvp
def _next_below_jvp(axis, primals, tangents):
    found, dz = _next_below(axis, *primals), cast_logits(tangents[0], primals[2])
    dz = jnp.where(found.z == -jnp.inf, 0, pick_class(dz, found.class_index, axis))
    return found, _Next(dz, np.zeros(found.class_index.shape, jax.dtypes.float0))


def _below_primal(axis: int, *args) -> Array:
    return _next_below(axis, *args).z


def _below_forward(axis, *args):
    return _below_primal(axis, *args), args


def _below_backward(axis, args, ct):
    # A comparison with the index, because the transpose of a gather would be a scatter.
    logits, bound, where = args
    is_next = class_index(logits, axis) == _next_below(axis, *args).class_index
    ct = jnp.where(is_next & (cast_logits(logits, where) < bound), ct, 0)
    return mask_to_zero(ct, where).astype(logits.dtype), jnp.zeros_like(bound), None


_below = jax.custom_vjp(_below_primal, nondiff_argnums=(0,))
_below.defvjp(_below_forward, _below_backward)


def largest_below(
    axis: int, logits: Array, bound: Array, where: Array | None, class_axis_name: AxisName | None
) -> Array:
    """Return the largest logit below the bound, with a class axis of size 1, or -inf.

    If several classes tie, the first gets the derivative. The bound has no derivative.
    """
    bound = lax.stop_gradient(bound)
    below: Array = _below(axis, *cast_to_common_varying(logits, bound, where))
    if class_axis_name is None:
        return below
    # The largest over the shards, taken from the first device that has it.
    own = lax.stop_gradient(below)
    index, size = lax.axis_index(class_axis_name), lax.axis_size(class_axis_name)
    holds = jnp.where(own == lax.pmax(own, class_axis_name), index, size)
    is_first = lax.pmin(holds, class_axis_name) == index
    return lax.psum(jnp.where(is_first, below, 0), class_axis_name)
