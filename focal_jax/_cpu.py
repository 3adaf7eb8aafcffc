"""The one room that knows of XLA's CPU backend, and keeps it from slow habits.

Everything in here is about speed: `compiled_apart(f, *args)` is `f(*args)`. On other devices,
and where a JAX no longer has the inner names that are used, it is just that.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap


def _one_device_primitive() -> Any:
    """Return a primitive that is True where each array of the program is whole on one device.

    Tracing knows nothing of that yet; it is known when the program is lowered. Run eagerly
    it is False. None where JAX has moved the names of which it is made.
    """
    try:
        from jax.core import ShapedArray
        from jax.extend.core import Primitive
        from jax.interpreters import batching, mlir

        def lower(ctx):
            axes: Any = getattr(ctx.module_context, "axis_context", None)
            if hasattr(axes, "manual_axes"):  # in shard_map
                one = set(axes.manual_axes) == set(axes.mesh.axis_names)
            else:
                one = getattr(axes, "num_devices", None) == 1
            return [mlir.ir_constant(np.bool_(one))]

        primitive = Primitive("one_device")
        primitive.def_impl(lambda: np.bool_(False))
        primitive.def_abstract_eval(lambda: ShapedArray((), np.dtype(bool)))
        mlir.register_lowering(primitive, lower)
        batching.primitive_batchers[primitive] = lambda *_: (primitive.bind(), None)
    except (ImportError, AttributeError):
        return None
    return primitive


_ONE_DEVICE = _one_device_primitive()


@custom_vmap
def _never(*after: Array) -> Array:
    """Return False, which nobody knows before the program runs and has computed `after`."""
    false = lax.optimization_barrier(jnp.array(False))
    for x in after:
        if x.size:
            false = false & jnp.isnan(x.reshape(-1)[0])
    return false


@_never.def_vmap
def _(size, batched, *after):
    # One condition for all the examples: each its own would make a select of the conditional.
    del size, batched
    return _never(*after), False


def _explicit(arrays: list[Array]) -> bool:
    """Return whether the types of the arrays say that they are spread over a mesh."""
    return any(any(jax.typeof(x).sharding.spec) for x in arrays)


def _alike(arrays: list[Array]) -> bool:
    """Return whether the arrays meet element by element also when they are laid flat."""
    return {x.shape for x in arrays if x.size != 1} == {arrays[0].shape}


def compiled_apart(function: Callable[..., Array], *args: Any, after: Array | None = None) -> Array:
    """Return `function(*args)`, on CPU compiled as a computation of its own.

    `function` works element by element, on trees of arrays of one rank that broadcast to the
    first; the result has the shape of the first. With `after` it may take that array's
    memory for the result, unless others still need it.

    Of XLA's CPU backend a loss has four habits to fear. A chain of elementwise operations
    that is fused into a reduction, such as the sum of the losses, is not vectorized. An
    intermediate that the forward and the backward pass share is written out to memory,
    since CPU fusions have one output. Both need to see the function's inside: here it is
    the branch of a conditional, and that the other branch is never taken becomes known
    only when the program runs. Of the axes only the last is vectorized, and twenty columns
    are half as fast as a flat array: in the conditional the arrays are flat, in a second
    one within, which keeps the shape out of the loop. And the backward pass may be
    scheduled before the sum of the losses, so that both are in memory at once: the
    condition waits for `after`.

    Arrays that are spread over devices are left as they are, since flattening would
    gather them; there what has an `after` is not set apart.
    """
    first, *_ = args
    if not first.size or _ONE_DEVICE is None:
        return function(*args)
    function = jax.jit(function, inline=True)  # traced once, not in each of the places below
    dtype = jax.eval_shape(function, *args).dtype

    def apart(function, *after):
        def conditional(*args):
            never = _never(*after)
            return lax.cond(never, lambda first, *_: first.astype(dtype), function, *args)

        return conditional

    def flat(*args):
        return apart(function)(*jax.tree.map(jnp.ravel, args)).reshape(first.shape)

    arrays = jax.tree.leaves(args)
    waits = [] if after is None else [lax.stop_gradient(after)]
    whole = apart(flat if _alike(arrays) else function, *waits)
    spread = apart(function) if after is None else function

    def cpu(*args):
        if _explicit(arrays):
            return spread(*args)
        return lax.cond(_ONE_DEVICE.bind(), whole, spread, *args)

    return lax.platform_dependent(*args, cpu=cpu, default=function)
