"""Linear heads over a mesh: each device computes its slice of the classes for its positions.

On an explicit mesh the type of the kernel states that its classes are sharded. With automatic axes
the argument `mesh` states it. In both cases the head runs in `jax.shard_map`, so that XLA gathers
neither the kernel nor the logits, and adds the gradient of the kernel up once and not per chunk.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from focal_jax.engine import checks
from focal_jax.engine.arguments import InputError
from focal_jax.engine.chunks import Linear
from focal_jax.engine.sharding import AxisName, axis_names, explicit_mesh, specs_like


class Layout(NamedTuple):
    """The shardings of the arrays of a linear head."""

    mesh: Any
    classes: AxisName | None  # the mesh axes of the classes
    positions: PartitionSpec  # of the features, whose last axis is whole


def layout_of(
    linear: Linear, class_axis: int, mesh: Any, class_axis_name: AxisName | None
) -> Layout | None:
    """Return the layout that `mesh` or the types of the arrays describe; None on one device."""
    checks.check_mesh(mesh)
    features, kernel = (jax.typeof(x).sharding for x in (linear.features, linear.kernel))
    if mesh is None:
        mesh = features.mesh if kernel.mesh.empty else kernel.mesh
        classes, spec = kernel.spec[class_axis], features.spec
        # Only for sharded classes: `jax.shard_map` does not support `vmap` over a sharded axis.
        if AxisType.Explicit not in mesh.axis_types or classes is None:
            return None
        if class_axis_name not in (None, classes):
            raise InputError(
                f"class_axis_name: got {class_axis_name!r}, wanted {classes!r}, the mesh axes of "
                "the kernel's classes"
            )
    else:
        mesh, spec = (mesh, None) if isinstance(mesh, Mesh) else (mesh.mesh, mesh.spec)
        classes = class_axis_name
    names = axis_names(classes)
    if missing := set(names) - set(mesh.axis_names):
        raise InputError(
            f"class_axis_name: got {sorted(missing)}, wanted axes of the mesh, {mesh.axis_names}"
        )
    if spec is None:  # the first axis of the positions over all other axes of the mesh
        spec = (mesh.axis_names,)
    axes = [tuple(name for name in axis_names(axis) if name not in names) for axis in spec]
    axes = (axes + [()] * linear.features.ndim)[: linear.features.ndim - 1]
    _check_divides(mesh, "kernel", linear.kernel.shape[class_axis], "classes", names)
    for axis, size in zip(axes, linear.features.shape):
        _check_divides(mesh, "features", size, "positions", axis)
    return Layout(mesh, classes, PartitionSpec(*(axis or None for axis in axes), None))


def _check_divides(mesh: Any, name: str, size: Any, what: str, axes: tuple[str, ...]) -> None:
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if devices > 1 and size % devices:
        wanted = f"a multiple of {devices}, the devices along the mesh axes {axes}"
        raise InputError(f"{name}: got {size} {what}, wanted {wanted}")


@partial(jax.jit, static_argnums=(0, 1, 2, 4))
def on_mesh(
    source: Any,
    function: Callable[..., Any],
    static: Any,
    linear: Linear,
    class_axis_name: AxisName | None,
    *others: Any,
) -> Any:
    """Return `function(static, linear, class_axis_name, *others)`, on the shards of each device.

    The others are trees of arrays that broadcast to the features, or that are replicated. The last
    one is the mask of the positions.
    """
    # In the compiled function, because eager JAX would report a masked NaN with `jax_debug_nans`.
    if source.layout is None:
        linear = source.promoted(_on_the_mesh_of(linear, others), others[-1])
        return function(static, linear, class_axis_name, *others)
    mesh, classes, spec = source.layout
    by_class: list[Any] = [None, None]
    by_class[source.class_axis] = classes
    specs = specs_like(spec, linear.features, (linear, *others))
    bias = None if linear.bias is None else PartitionSpec(classes)
    own = specs[0]._replace(kernel=PartitionSpec(*by_class), bias=bias)
    leaves, tree = jax.tree.flatten((linear, *others))
    specs = jax.tree.leaves((own, *specs[1:]))
    kinds = zip(mesh.axis_names, mesh.axis_types)
    manual = {axis for axis, kind in kinds if kind != AxisType.Manual}
    if AxisType.Explicit in mesh.axis_types:
        leaves = [jax.sharding.reshard(x, NamedSharding(mesh, s)) for x, s in zip(leaves, specs)]

    def local(*leaves):
        linear, *others = jax.tree.unflatten(tree, leaves)
        linear = source.promoted(linear, others[-1])
        return function(static, linear, classes or class_axis_name, *others)

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=tuple(specs), out_specs=spec, axis_names=manual
    )
    return mapped(*leaves)


def _on_the_mesh_of(linear: Linear, others: Any) -> Linear:
    """Return the arrays of a head; those without a mesh become replicated over the others' mesh.

    In a jitted function a NumPy array has no mesh, and JAX does not mix it with arrays of a mesh.
    """
    mesh = explicit_mesh(jax.tree.leaves((linear, others)))
    if mesh is None:
        return linear
    whole = NamedSharding(mesh, PartitionSpec())

    def place(x):
        return jax.sharding.reshard(x, whole) if jax.typeof(x).sharding.mesh.empty else x

    return jax.tree.map(place, linear)


def replicate_on_mesh(x: Array, like: Array) -> Array:
    """Return `x` replicated over its explicit mesh, or over that of `like`.

    On an explicit mesh the carry of a scan must not mix arrays of different shardings. FSDP shards
    the features of a kernel and gathers them at every use. The transpose of the gathering gives the
    gradient the sharding of the kernel.
    """
    own, mesh = jax.typeof(x).sharding, jax.typeof(like).sharding.mesh
    mesh = own.mesh if mesh.empty else mesh
    if mesh.empty or (own.mesh == mesh and not any(own.spec)):
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))


def whole_on_mesh(x: Array, axis: int) -> Array:
    """Return `x` with one axis whole on every device of its explicit mesh."""
    mesh, spec = jax.typeof(x).sharding.mesh, list(jax.typeof(x).sharding.spec)
    if mesh.empty or spec[axis] is None:
        return x
    spec[axis] = None
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))
