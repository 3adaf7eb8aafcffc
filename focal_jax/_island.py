"""A way to keep XLA's CPU backend from fusing what is faster apart."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def island(function: Callable[..., Array], *args: Any) -> Array:
    """Return `function(*args)`, on CPU compiled as a computation of its own.

    Two habits of XLA's CPU backend make a loss several times slower than its arithmetic:
    a chain of elementwise operations that is fused into a reduction, such as the sum of
    the losses, is not vectorized; and an intermediate that the forward and the backward
    pass share is written out to memory, since CPU fusions have one output. Both need to
    see the function's inside. Here it is the branch of a conditional whose predicate is
    true but becomes known only when the program runs, so neither happens, and the result
    is one buffer, in which the backward pass may leave the gradient.

    The result has the shape of the first argument, which must be an array.
    """
    dtype = jax.eval_shape(function, *args).dtype

    def apart(*args):
        true = lax.optimization_barrier(jnp.array(True))
        return lax.cond(true, function, lambda first, *_: first.astype(dtype), *args)

    return lax.platform_dependent(*args, cpu=apart, default=function)
