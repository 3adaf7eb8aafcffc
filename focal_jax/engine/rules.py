"""Functions whose `custom_jvp` rules JAX keeps inside loops."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax


def keep_rules(function: Callable[..., Any], num_static: int = 0) -> Callable[..., Any]:
    """Return the function, jitted, with `custom_jvp` rules that every derivative uses.

    JAX splits a loop into known and unknown values to differentiate it, and loses the rules of the
    known ones, which the next derivative needs. The first `num_static` arguments are static.
    """

    @partial(jax.jit, static_argnums=range(num_static))
    @wraps(function)
    def kept(*args):
        from focal_jax.engine.batching import bind  # not loaded with the package

        return bind(partial(function, *args[:num_static]), args[num_static:])

    return kept


def with_gradient(primal: Any, forward: Any, backward: Any, num_static: int = 0) -> Any:
    """Return the `jax.custom_vjp` of the functions, with `keep_rules` for both passes."""
    core = jax.custom_vjp(primal, nondiff_argnums=range(num_static))
    core.defvjp(forward, keep_rules(backward, num_static))
    return keep_rules(core, num_static)
