"""Workarounds for XLA's CPU backend.

`compile_separately(f, *args)` returns `f(*args)`. It changes speed and memory on CPUs only. On
other platforms, and with JAX versions without the internals that it needs, it is a plain call.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap

from focal_jax.engine.platform import by_platform
from focal_jax.engine.sharding import explicit_mesh


def _make_single_device_primitive() -> Any:
    """Return a primitive that is True if the program runs on one device.

    The devices are known at lowering, not at tracing. Eager execution gives False. Returns None if
    JAX has moved the internal names that are needed.
    """
    try:
        from jax.core import ShapedArray
        from jax.extend.core import Primitive
        from jax.interpreters import batching, mlir

        def lower(ctx):
            axes: Any = getattr(ctx.module_context, "axis_context", None)
            if hasattr(axes, "manual_axes"):  # in shard_map
                single = set(axes.manual_axes) == set(axes.mesh.axis_names)
            else:
                single = getattr(axes, "num_devices", None) == 1
            return [mlir.ir_constant(np.bool_(single))]

        primitive = Primitive("single_device")
        primitive.def_impl(lambda: np.bool_(False))
        primitive.def_abstract_eval(lambda: ShapedArray((), np.dtype(bool)))
        mlir.register_lowering(primitive, lower)
        batching.primitive_batchers[primitive] = lambda *_: (primitive.bind(), None)
    except (ImportError, AttributeError):
        return None
    return primitive


single_device_primitive = _make_single_device_primitive()


@custom_vmap
def _false_at_runtime(*after: Array) -> Array:
    """Return a False that XLA cannot fold to a constant and that depends on `after`."""
    false = lax.optimization_barrier(jnp.array(False))
    for x in after:
        if x.size:
            false = false & jnp.isnan(x.reshape(-1)[0])
    return false


@_false_at_runtime.def_vmap
def _(size, batched, *after):
    # One unbatched predicate: `vmap` turns a `cond` with a batched predicate into a `select`.
    del size, batched
    return _false_at_runtime(*after), False


def compile_separately(function: Callable[..., Any], *args: Any, after: Array | None = None) -> Any:
    """Return `function(*args)`; on CPU, compile each result as a computation of its own.

    XLA:CPU compiles elementwise losses badly in four cases:

    * It does not vectorize an elementwise chain that is fused into a reduction, such as the sum of
      the losses.
    * It writes an intermediate that the forward and the backward pass share to memory, because a
      fusion on CPU has one output.
    * It vectorizes the last axis only: 20 columns run at half the speed of a flat array.
    * It may schedule the backward pass before the sum of the losses, so that both are in memory
      at the same time.

    The first two happen when XLA fuses `function` with other code. So `function` is a branch of a
    `cond` whose predicate is false at run time. The predicate depends on `after`. Inside the branch
    the arrays are flat. Flattening would gather a sharded array: on several devices the arrays keep
    their shape, and calls with `after` are plain.

    Args:
      function: an elementwise function of trees of arrays that have one rank and broadcast to the
        first argument. It returns an array of the first argument's shape, or a tree of them.
      *args: the arguments.
      after: an array whose memory a result may reuse if nothing else needs the array.
    """
    first, *_ = args
    if not first.size or single_device_primitive is None:
        return function(*args)
    function = jax.jit(function, inline=True)  # traced once for all branches below
    shapes, tree = jax.tree.flatten(jax.eval_shape(function, *args))

    def separate(function, dtype, *after):
        def conditional(*args):
            predicate = _false_at_runtime(*after)
            return lax.cond(predicate, lambda first, *_: first.astype(dtype), function, *args)

        return conditional

    def flat(function, dtype):
        # The reshape is outside the `cond`, so that the branch is a loop over one flat axis.
        inner = separate(function, dtype)
        return lambda *args: inner(*jax.tree.map(jnp.ravel, args)).reshape(first.shape)

    def each(make, *args):
        picks = (lambda *args, i=i: jax.tree.leaves(function(*args))[i] for i in range(len(shapes)))
        return tree.unflatten(make(pick, x.dtype)(*args) for pick, x in zip(picks, shapes))

    arrays = jax.tree.leaves(args)
    waits = [] if after is None else [lax.stop_gradient(after)]
    one_shape = {x.shape for x in arrays if x.size != 1} == {arrays[0].shape}
    form = flat if one_shape else lambda pick, _: pick
    on_one_device = partial(each, lambda pick, dtype: separate(form(pick, dtype), dtype, *waits))
    on_many_devices = partial(each, separate) if after is None else function

    on_cpu = partial(by_devices, on_one_device, on_many_devices)
    return by_platform(on_cpu, function, *args)


def by_devices(on_one: Callable[..., Any], on_many: Callable[..., Any], *args: Any) -> Any:
    """Return `on_one(*args)` if the program runs on one device, and else `on_many(*args)`."""
    if single_device_primitive is None or explicit_mesh(jax.tree.leaves(args)) is not None:
        return on_many(*args)
    return lax.cond(single_device_primitive.bind(), on_one, on_many, *args)
