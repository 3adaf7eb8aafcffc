"""The slopes of a loss that is given by its value alone, differentiated by JAX."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from focal_jax.engine import scalar
from focal_jax.engine.options import Option


def slopes_of(value: Callable[..., Array], names: Sequence[str], options: Mapping[str, Option]):
    """Return the slopes of the value of an `elementwise_loss`."""
    differentiable = [options[name].differentiable for name in names]

    def slopes(*arrays, **given):
        args, leading = (*arrays, *(given[name] for name in names)), len(arrays)
        wanted = [i for i in range(len(args)) if i < leading or differentiable[i - leading]]
        moved = [i for i in wanted if isinstance(args[i], Array)]
        shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in jax.tree.leaves(args)))

        def total(*arrays):
            all_args = list((dict(enumerate(args)) | dict(zip(moved, arrays))).values())
            return value(*all_args[:leading], **dict(zip(names, all_args[leading:])))

        full = (jnp.broadcast_to(args[i], shape) for i in moved)
        losses, transpose = jax.vjp(total, *full)
        found = dict(zip(moved, transpose(jnp.ones_like(losses))))
        return tuple(found.get(i) for i in wanted)

    return slopes


def slopes_of_terms(
    value: Callable[..., Array], names: Sequence[str], options: Mapping[str, Option]
):
    """Return the slopes of the value of a `position_loss`."""

    def slopes(t, **given):
        def shifted(n, **given):
            return value(scalar.shift_log_p(t, -n), **given)

        return slopes_of(shifted, names, options)(jnp.zeros_like(t.n), **given)

    return slopes
