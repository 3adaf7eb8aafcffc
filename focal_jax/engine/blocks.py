"""Reductions over a class axis that is not the last one, for XLA's CPU backend.

`in_blocks(f, axis, *args)` returns `f(*args)`. It changes the speed and the memory on CPUs and
nothing else.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from focal_jax.engine.cpu import by_devices
from focal_jax.engine.platform import by_platform
from focal_jax.engine.sharding import cast_to_common_varying

# A block of logits of this size stays in the caches, with its intermediates.
_BLOCK_BYTES = 2**20
# Blocks are faster if the logits of one example are larger than this, about a core's cache.
MIN_EXAMPLE_BYTES = 2**21


def in_blocks(function: Callable[..., Any], axis: int, logits: Array, *others: Any) -> Any:
    """Return `function(logits, *others)`; on a CPU, for one block of positions after another.

    XLA:CPU runs every step of a reduction on the whole array. If the classes are not the last axis
    and the axes after them are large, as those of images are, the entries of one position are far
    apart, and each step waits for the memory. All steps of a block read and write the caches. The
    last block may overlap the one before it.

    On several devices, blocks would gather a sharded array, so the call is plain.

    Args:
      function: a function that computes each position from the entries of this position. Its
        arrays have one axis instead of the axes after the class axis. It returns a tree of arrays
        with a class axis of any size.
      axis: the class axis.
      logits: the logits.
      *others: trees of arrays that broadcast to the logits, except along the class axis.
    """
    after = logits.shape[axis + 1 :]
    known = all(isinstance(n, int) for n in logits.shape)  # not symbolic
    float_bytes, positions = 4, math.prod(after)
    if not known or float_bytes * positions * logits.shape[axis] <= MIN_EXAMPLE_BYTES:
        return function(logits, *others)
    column = float_bytes * math.prod(logits.shape[: axis + 1])
    size = min(positions, 128 * max(1, _BLOCK_BYTES // max(1, 128 * column)))

    def pack_block(x):
        # XLA may copy an array with an axis of size 1 that a loop reads.
        x = jnp.squeeze(x, axis) if x.shape[axis] == 1 else x
        return lax.bitcast_convert_type(x, _bits(x.dtype)) if x.dtype.itemsize == 2 else x

    def pack(x):
        leading = x.shape[: axis + 1]
        trailing = (1,) * len(after) if set(x.shape[axis + 1 :]) == {1} else after
        return pack_block(jnp.broadcast_to(x, leading + trailing).reshape(*leading, -1))

    def unpack(x, dtype):
        x = x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)
        return x if x.ndim == axis + 2 else jnp.expand_dims(x, axis)

    def blocked(*args):
        packed = jax.tree.map(pack, args)

        def of_block(start):
            def take(x, given):
                x = x if x.shape[-1] == 1 else lax.dynamic_slice_in_dim(x, start, size, -1)
                return unpack(x, given.dtype)

            return function(*jax.tree.map(take, packed, args))

        def step(i, found):
            start = jnp.minimum(i * size, positions - size)
            put = partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=-1)
            return jax.tree.map(lambda x, block: put(x, pack_block(block)), found, of_block(start))

        def zeros(x):
            return jnp.zeros((*jax.eval_shape(pack_block, x).shape[:-1], positions), _bits(x.dtype))

        result = jax.eval_shape(of_block, 0)
        found, _ = cast_to_common_varying(jax.tree.map(zeros, result), args)
        found = lax.fori_loop(0, -(-positions // size), step, found)

        def restore(x, like):
            return unpack(x, like.dtype).reshape(*like.shape[: axis + 1], *after)

        return jax.tree.map(restore, found, result)

    on_cpu = partial(by_devices, blocked, function)
    return by_platform(on_cpu, function, logits, *others)


# XLA:CPU converts an array of 16-bit floats to float32 before it takes a slice of it, and does this
# once for the whole array, before the loop. Slices of integers are left as they are.


def _bits(dtype: Any) -> jnp.dtype:
    dtype = jnp.dtype(dtype)
    return jnp.dtype("uint16") if dtype.itemsize == 2 else dtype
