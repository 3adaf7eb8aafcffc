"""The mesh axes that arrays vary over inside `jax.shard_map`."""

from typing import Any

import jax
from jax import lax

from focal_jax import _checks


def _varying(x: Any) -> frozenset[Any]:
    """Return the mapped axes that `x` varies over, as its type has them."""
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # before, from 0.10


def aligned_varying(*arrays: Any) -> Any:
    """Return the arrays cast to vary over the mapped axes that any of them varies over.

    Under `shard_map` with `check_vma=True` the arguments of a custom_vjp and its
    cotangents must vary over the same axes, and so must a scan's carry before and after a
    step. The transpose of the cast is the psum that a replicated argument's gradient
    needs: it stands outside the custom_vjp, where JAX places it rightly in every mode.
    Anywhere else no array varies, and nothing is done. None stays None.
    """
    union = frozenset[Any]().union(*map(_varying, jax.tree.leaves(arrays)))

    def cast(x):
        missing = tuple(sorted(union - _varying(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, arrays)


def not_varying(name: str, x: Any, axis_name: str | tuple[str, ...]) -> None:
    """Check that `x` is the same over a mapped axis, as far as JAX keeps account of it."""
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    varied = set[Any]().union(*map(_varying, jax.tree.leaves(x))) & names
    if varied:
        raise _checks.InputError(
            f"{name}: got values that vary over {sorted(varied)}, wanted the same on every "
            "device that has a slice of the classes"
        )
