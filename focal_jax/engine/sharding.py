"""Mesh axes in the types of arrays: varying axes in `jax.shard_map`, and explicit meshes."""

from collections.abc import Iterable
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from focal_jax.engine.arguments import InputError


def _varying_axes(x: Any) -> frozenset[Any]:
    """Return the mapped axes over which `x` varies, according to its type."""
    aval = jax.typeof(x)
    if hasattr(aval, "vma"):
        return aval.vma
    return aval.manual_axis_type.varying  # JAX 0.10 and later


def cast_to_common_varying(*arrays: Any) -> Any:
    """Return the arrays cast to vary over every mapped axis over which any of them varies.

    With `check_vma=True`, `jax.shard_map` requires that the arguments and the cotangents of a
    `custom_vjp` vary over the same axes, and that a scan does not change the axes of its carry. The
    transpose of the cast is the psum that the gradient of a replicated argument needs. The cast
    is outside the `custom_vjp`, so that JAX inserts the psum in every mode. Outside
    `jax.shard_map` the arrays are returned unchanged. None stays None.
    """
    union = frozenset[Any]().union(*map(_varying_axes, jax.tree.leaves(arrays)))

    def cast(x):
        missing = tuple(sorted(union - _varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, arrays)


def check_not_varying(name: str, x: Any, axis_name: str | tuple[str, ...]) -> None:
    """Raise if the type of `x` says that it varies over one of the mapped axes."""
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    varied = set[Any]().union(*map(_varying_axes, jax.tree.leaves(x))) & names
    if varied:
        raise InputError(
            f"{name}: got values that vary over {sorted(varied)}, wanted the same values on every "
            "device that has a slice of the classes"
        )


def on_explicit_mesh(arrays: Iterable[Array]) -> bool:
    """Return whether the type of any of the arrays shards it over an explicit mesh."""
    return any(any(jax.typeof(x).sharding.spec) for x in arrays)


def place_like(like: Array, tree: Any) -> Any:
    """Return the arrays of a tree, sharded over an explicit mesh as `like` is.

    The arrays broadcast to `like`, or have another rank and become replicated. On an explicit mesh,
    JAX rejects a select and the cotangents of a `custom_vjp` whose operands are sharded in
    different ways. Without an explicit mesh the arrays are returned unchanged.
    """
    if not on_explicit_mesh(jax.tree.leaves((like, tree))):
        return tree
    sharding = jax.typeof(like).sharding

    def place(x: Array) -> Array:
        axes = zip(sharding.spec, like.shape, x.shape) if x.ndim == like.ndim else ()
        spec = PartitionSpec(*(name if n == m > 1 else None for name, n, m in axes))
        return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))

    return tree if sharding.mesh.empty else jax.tree.map(place, tree)
