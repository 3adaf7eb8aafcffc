"""A call that JAX does not split: keeps `custom_jvp` rules, and folds `jax.vmap` over positions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from focal_jax.engine.sharding import place_like

# A call of a function with its own rule for `vmap`, which differentiation replaces by the
# function. `jax.custom_batching.custom_vmap` has no reverse mode.
_call = Primitive("positions_call")
_call.multiple_results = True


def call(function: Callable[..., Any], shared: Any, *positions: Any) -> Any:
    """Return `function(shared, *positions)`, a tree of arrays that start with the positions' axes.

    If `vmap` maps the first array of the positions and no shared array, it calls the function once,
    with the mapped axis as the first axis of all positions. JAX's own rule would compute a gradient
    of the shared arrays, such as the kernel of a linear head, for each example.
    """

    def fold(*args):
        return call(function, *args)

    return bind(function, (shared, *positions), fold, len(jax.tree.leaves(shared)))


def bind(function: Callable[..., Any], args: Any, fold: Any = None, num_shared: int = 0) -> Any:
    """Return `function(*args)`, one equation that JAX does not split into its parts."""
    leaves, tree = jax.tree.flatten(args)

    def flat(function):
        return lambda *leaves: function(*jax.tree.unflatten(tree, leaves))

    jaxpr, shapes = jax.make_jaxpr(flat(function), return_shape=True)(*leaves)
    fold = None if fold is None else flat(fold)
    found = _call.bind(*leaves, jaxpr=jaxpr, fold=fold, num_shared=num_shared)
    # A result that is an argument is the argument itself: the call would return a copy.
    own = dict(zip(jaxpr.jaxpr.invars, leaves))
    results = zip(jaxpr.jaxpr.outvars, found)
    found = [x if isinstance(v, Literal) else own.get(v, x) for v, x in results]
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def _apply(*args, jaxpr, **_):
    return jaxpr_as_fun(jaxpr)(*args)


def _jvp(primals, tangents, *, jaxpr, **_):
    def linearize(*primals):
        return jax.linearize(jaxpr_as_fun(jaxpr), *primals)

    # The known values are a call too, so that the next derivative has the rules.
    found, linear = bind(linearize, primals)
    return found, linear(*map(ad.instantiate_zeros, tangents))


def _vmap(args, axes, *, jaxpr, fold, num_shared):
    axes = tuple(axes)
    if fold is None or axes[num_shared] is None or axes[:num_shared] != (None,) * num_shared:
        found = bind(jax.vmap(jaxpr_as_fun(jaxpr), axes), args)
        return found, [0] * len(found)
    first = jnp.moveaxis(args[num_shared], axes[num_shared], 0)

    def to_front(x, axis):
        if axis is None:
            return jnp.broadcast_to(x, (len(first), *x.shape))
        return jnp.moveaxis(x, axis, 0)

    own = [to_front(x, axis) for x, axis in zip(args[num_shared:], axes[num_shared:])]
    found = jax.tree.leaves(fold(*args[:num_shared], *place_like(first, own)))
    return found, [0] * len(found)


_call.def_impl(_apply)
_call.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
mlir.register_lowering(_call, mlir.lower_fun(_apply, multiple_results=True))
ad.primitive_jvps[_call] = _jvp
batching.primitive_batchers[_call] = _vmap
