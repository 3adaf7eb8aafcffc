"""Mesh axes in the types of arrays: varying axes in `jax.shard_map`, and explicit meshes."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from focal_jax.engine.arguments import InputError

AxisName = str | tuple[str, ...]


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


def axis_names(axes: AxisName | None) -> tuple[str, ...]:
    """Return the names as a tuple."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def class_range(local: int, class_axis_name: AxisName | None) -> tuple[int, Array | None]:
    """Return the number of all classes, and the index of this device's first class.

    `local` is the number of this device's classes. Without `class_axis_name` the index is None.
    """
    if class_axis_name is None:
        return local, None
    return local * lax.axis_size(class_axis_name), local * lax.axis_index(class_axis_name)


def check_not_varying(arrays: Mapping[str, Any], class_axis_name: AxisName | None) -> None:
    """Raise if an array's type says that it varies over the mapped axes of the classes."""
    names = set(axis_names(class_axis_name))
    for name, x in arrays.items():
        varied = set[Any]().union(*map(_varying_axes, jax.tree.leaves(x))) & names
        if varied:
            raise InputError(
                f"{name}: got values that vary over {sorted(varied)}, wanted the same values on "
                "every device that has a slice of the classes"
            )


def explicit_mesh(arrays: Iterable[Array]) -> Any:
    """Return the explicit mesh of the first array that has one. A NumPy array has none in `jit`."""
    meshes = (jax.typeof(x).sharding.mesh for x in arrays)
    return next((x for x in meshes if not x.empty and AxisType.Explicit in x.axis_types), None)


def place_like(like: Array, tree: Any) -> Any:
    """Return the arrays of a tree, sharded over an explicit mesh as `like` is.

    The arrays broadcast to `like`, or have another rank and become replicated. On an explicit mesh,
    JAX rejects a select and the cotangents of a `custom_vjp` whose operands are sharded in
    different ways. Without an explicit mesh the arrays are returned unchanged.
    """
    mesh = explicit_mesh(jax.tree.leaves((like, tree)))
    if mesh is None:
        return tree

    def place(x: Array, spec: PartitionSpec) -> Array:
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree, specs_like(jax.typeof(like).sharding.spec, like, tree))


def specs_like(spec: PartitionSpec, like: Array, tree: Any) -> Any:
    """Return the specs of arrays that broadcast to `like`, or have another rank: replicated."""

    def spec_of(x: Array) -> PartitionSpec:
        axes = zip(spec, like.shape, x.shape) if x.ndim == like.ndim else ()
        return PartitionSpec(*(name if n == m > 1 else None for name, n, m in axes))

    return jax.tree.map(spec_of, tree)
