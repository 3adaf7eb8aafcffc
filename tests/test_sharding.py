"""Tests that losses whose positions are sharded over devices equal those on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads import inputs, linear, total, value_and_gradients
from helpers import KINDS, PROGRAMS, assert_close, quick_options
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from meshes import GATHERS, make_mesh, result_sizes

import focal_jax
from focal_jax.engine.sharding import cast_to_common_varying

pytestmark = pytest.mark.every_form

SHAPE = (16, 8, 4)


def _arguments(row, shape=SHAPE, dtype=np.float32):
    """Return three dictionaries of arguments.

    They are the differentiable arguments that have positions; the arguments that all positions
    share, which are differentiable too; and integer labels.
    """
    arguments = row.arguments(0, shape, dtype=dtype) | row.scalars(dtype)
    if row.integer:  # the labels select the class weights
        arguments["alpha"] = row.random_options(0, shape, dtype=dtype)["alpha"]
    own = {name: arguments.pop(name) for name in (row.first, "labels")}
    shared = {name: x for name, x in arguments.items() if name not in row.axis(-1)}
    fixed = {"labels": own.pop("labels")} if row.integer else {}
    return own, shared, fixed


def _mean_loss(row, axis_name=None):
    """Return the mean loss as a function of `_arguments`, for `axis_name` on each device."""

    def mean(own, shared, fixed):
        if axis_name is None:
            return focal_jax.reduce_loss(row.eager(**own, **shared, **fixed))
        if row.region:
            losses = row.eager(**own, **shared, **fixed, axis_name=axis_name)
            return focal_jax.reduce_loss(losses)
        losses = row.eager(**own, **shared, **fixed)
        return lax.pmean(focal_jax.reduce_loss(losses, axis_name=axis_name), axis_name)

    return mean


def _value_and_grad(function):
    return jax.value_and_grad(function, (0, 1))


@functools.cache
def _on_one_device(row, *shape_and_dtype):
    """Return the mean loss and its gradients without a mesh."""
    return jax.jit(_value_and_grad(_mean_loss(row)))(*_arguments(row, *shape_and_dtype))


# ---------------------------------------------------------------- shard_map and pmap


@pytest.mark.one_in(2)
@pytest.mark.quick
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradient_of_shard_map(row, check_vma):
    mapped = jax.shard_map(
        _mean_loss(row, "data"),
        mesh=make_mesh(),
        in_specs=(P("data"), P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    got = jax.jit(_value_and_grad(mapped))(*_arguments(row))
    assert_close(got, _on_one_device(row), 1e-5)


def _gradient_inside(mean, names, check_vma):
    """Return a function for use inside a map: the value and the gradients on one device.

    The first argument is sharded over the axes `names`, the second is replicated. Without
    `check_vma` the gradient is that of the sum of the values that all devices return.
    """

    def local(*args):
        value, (own, shared) = _value_and_grad(mean)(*args)
        if not check_vma:
            own = jax.tree.map(lambda x: x / lax.axis_size(names), own)
            shared = lax.pmean(shared, names)
        return value, (own, shared)

    return local


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradient_inside_shard_map(row, check_vma):
    mapped = jax.shard_map(
        _gradient_inside(_mean_loss(row, "data"), "data", check_vma),
        mesh=make_mesh(),
        in_specs=(P("data"), P(), P("data")),
        out_specs=(P(), (P("data"), P())),
        check_vma=check_vma,
    )
    assert_close(jax.jit(mapped)(*_arguments(row)), _on_one_device(row), 1e-5)


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_pmap(row):
    own, shared, fixed = _arguments(row)
    local = _gradient_inside(_mean_loss(row, "data"), "data", check_vma=False)
    split = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), (own, fixed))
    replicated = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), shared)
    value, (by_own, by_shared) = jax.pmap(local, "data")(split[0], replicated, split[1])
    want = _on_one_device(row)
    by_own = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), by_own)
    for i in range(8):
        of_device = {name: x[i] for name, x in by_shared.items()}
        assert_close((value[i], (by_own, of_device)), want, 1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("inside", [True, False], ids=["grad inside", "grad outside"])
def test_linear_head_with_positions_over_two_axes(check_vma, inside):
    arrays, labels = inputs(16, (8, 4))
    axes, split, whole = ("data", "model"), P("data", "model"), P()
    specs = split, whole, whole, whole, split

    def local(*args):
        function = total(linear, args[-1], chunk_size=3)
        value, gradients = jax.value_and_grad(function, range(5))(*args[:-1])
        if not check_vma:  # with it the gradient of a replicated array is summed already
            gradients = [
                lax.psum(g, axes) if spec == whole else g for g, spec in zip(gradients, specs)
            ]
        return lax.psum(value, axes), tuple(gradients)

    def mapped(function, in_specs, out_specs):
        return jax.shard_map(
            function, mesh=make_mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
        )

    if inside:
        got = jax.jit(mapped(local, (*specs, split), (whole, specs)))(*arrays, labels)
    else:

        def sharded(features, kernel, bias, labels, *, alpha, gamma):
            def local(features, kernel, bias, alpha, gamma, labels):
                options = {"alpha": alpha, "gamma": gamma, "chunk_size": 3}
                return linear(features, kernel, bias, labels, **options)

            args = features, kernel, bias, alpha, gamma, labels
            return mapped(local, (*specs, split), split)(*args)

        got = value_and_gradients(sharded, arrays, labels)
    assert_close(got, value_and_gradients(linear, arrays, labels, chunk_size=3), 1e-5)


def test_cast_to_common_varying():
    def local(x, y, z):
        def total(*arrays):
            *arrays, none = cast_to_common_varying(*arrays, None)
            assert none is None
            return jnp.sum(jnp.stack(arrays))

        return jax.grad(total, (0, 1, 2))(x[:2], y[:2], z[:2])

    specs, ones = (P("data"), P("model"), P()), jnp.ones(8)
    mapped = jax.shard_map(local, mesh=make_mesh(), in_specs=specs, out_specs=specs)
    # The transpose of the cast is a psum over the axes that the cast adds.
    assert [float(x[0]) for x in mapped(ones, ones, ones)] == [2, 4, 8]
    assert cast_to_common_varying(ones, None)[0] is ones


# ---------------------------------------------------------------- jit over a mesh


def _place(mesh, spec, args):
    """Return the arguments with those that have positions sharded over the mesh."""
    own, shared, fixed = args

    def place(x):
        return jax.device_put(x, NamedSharding(mesh, P(*spec[: x.ndim])))

    return *jax.tree.map(place, (own,)), shared, jax.tree.map(place, fixed)


_SPECS = {
    "batch": P("data"),
    "space": P(None, "data"),
    "both": P("data", "model"),
    "classes": P("data", None, "model"),
}
# The last axis of a linear head's features is not a class axis. The sharding of the positions
# depends on the engine and not on the formula: one loss per kind has all layouts, the others have
# those that shard two axes.
_LAYOUTS = [
    pytest.param(row, spec, id=f"{row}-{name}")
    for row in PROGRAMS
    for name, spec in _SPECS.items()
    if not (row.linear and name == "classes") and (row in KINDS or "model" in spec)
]


@pytest.mark.slow
@pytest.mark.parametrize(("row", "spec"), _LAYOUTS)
def test_jit_over_a_mesh_does_not_gather(row, spec, x64):
    # float64, because the mesh changes the order in which the gradient of an option is summed.
    shape = (16, 8, 16 if row.linear else 64)
    mesh = make_mesh()
    placed = _place(mesh, spec, _arguments(row, shape, np.float64))
    # The options make compilation faster. They do not change the collectives.
    function = jax.jit(_value_and_grad(_mean_loss(row)), compiler_options=quick_options())
    compiled = function.lower(*placed).compile()
    # For an argmax over sharded classes, XLA gathers one logit and its index from each shard.
    most = 16 * 8 if row.softmax and spec == _SPECS["classes"] else 0
    assert max(result_sizes(compiled.as_text(), GATHERS), default=0) <= most
    got = compiled(*placed)
    assert_close(got, _on_one_device(row, shape, np.float64), 1e-10)
    assert got[1][0][row.first].sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("row", "spec"), [layout for layout in _LAYOUTS if "model" in layout.values[1]]
)
def test_explicit_mesh(row, spec):
    own, shared, fixed = _arguments(row)
    if not row.linear:  # sharded labels select the class weights
        options = row.random_options(0, SHAPE)
        shared |= {name: x for name, x in options.items() if row.options[name].per_class}
    mesh = make_mesh(kind=AxisType.Explicit)
    function = jax.jit(_value_and_grad(_mean_loss(row)))
    want = function(own, shared, fixed)
    with jax.set_mesh(mesh):
        placed = _place(mesh, spec, (own, shared, fixed))
        got = function(*placed)
        sharding = jax.typeof(placed[0][row.first]).sharding.spec
        assert jax.typeof(got[1][0][row.first]).sharding.spec == sharding
    assert_close(jax.tree.map(np.asarray, got), want, 1e-5)
