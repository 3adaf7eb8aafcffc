"""A way to keep XLA's CPU backend from habits that make a loss several times slower."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


def _bool(name: str, lowering: Callable[..., Any]) -> Primitive:
    """Return a primitive for a bool of which tracing knows nothing yet; run eagerly it is False.

    For all the examples of a `vmap` it is one and the same.
    """
    primitive = Primitive(name)
    primitive.def_impl(lambda *_: np.bool_(False))
    primitive.def_abstract_eval(lambda *_: ShapedArray((), np.dtype(bool)))
    mlir.register_lowering(primitive, lowering)
    batching.primitive_batchers[primitive] = lambda args, _: (primitive.bind(*args), None)
    return primitive


def _lower_one_device(ctx: mlir.LoweringRuleContext) -> list[Any]:
    axes = ctx.module_context.axis_context
    if isinstance(axes, mlir.SPMDAxisContext):  # in shard_map
        one = set(axes.manual_axes) == set(axes.mesh.axis_names)
    else:
        one = getattr(axes, "num_devices", 1) == 1
    return [mlir.ir_constant(np.bool_(one))]


def _never(*after: Array) -> Array:
    false = lax.optimization_barrier(jnp.array(False))
    for x in after:
        false = false & jnp.isnan(x.reshape(-1)[0])
    return false


# True where each array of the program is whole on one device. Known when it is lowered.
_one_device_p = _bool("one_device", _lower_one_device)
# False, but only once the program runs and has computed the array that is its operand, if any.
_never_p = _bool("never", mlir.lower_fun(_never, multiple_results=False))


def _explicit(arrays: list[Array]) -> bool:
    """Return whether the types of the arrays say that they are spread over a mesh."""
    return any(any(jax.typeof(x).sharding.spec) for x in arrays)


def _alike(arrays: list[Array]) -> bool:
    """Return whether the arrays meet element by element also when they are laid flat."""
    return {x.shape for x in arrays if x.size != 1} == {arrays[0].shape}


def island(function: Callable[..., Array], *args: Any, after: Array | None = None) -> Array:
    """Return `function(*args)`, on CPU compiled as a computation of its own.

    `function` works element by element, on arrays of any one rank that broadcast to the
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
    if not first.size:
        return function(*args)
    function = jax.jit(function, inline=True)  # traced once, not in each of the places below
    dtype = jax.eval_shape(function, *args).dtype

    def apart(function, *after):
        def conditional(*args):
            never = _never_p.bind(*after)
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
        return lax.cond(_one_device_p.bind(), whole, spread, *args)

    return lax.platform_dependent(*args, cpu=cpu, default=function)
