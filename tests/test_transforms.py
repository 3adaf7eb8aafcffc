"""The losses under JAX's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PROGRAMS, assert_close, gradients, jit, total

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_jit_changes_nothing(row):
    inside, fixed = row.split(row.all(0, (5, 3)))
    function = jax.value_and_grad(total(row.eager, **fixed))
    assert_close(jit(function)(inside), function(inside), 1e-6)


def _rows(tree, axes):
    """Return the elements of a tree of arrays, along the axis that each is mapped over."""
    leaves, structure = jax.tree.flatten(tree)
    n = leaves[0].shape[axes]
    return [structure.unflatten([jnp.take(x, i, axes) for x in leaves]) for i in range(n)]


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_vmap_is_a_loop(row):
    # Over an axis of everything, first or last; what all share may stay unmapped.
    inside, fixed = row.split(row.all(1, (4, 2, 3)))
    shared = {k: inside.pop(k) for k in list(inside) if inside[k].shape[:1] != (4,)}
    arrays = {k: fixed.pop(k) for k in ("labels",) if k in fixed}

    def one(inside, arrays, shared):
        function = total(row.eager, **fixed, **arrays)
        return jax.value_and_grad(function)(inside | shared)

    compiled = jit(one)
    rows = [compiled(*each, shared) for each in _rows((inside, arrays), 0)]
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    assert_close(jit(jax.vmap(one, (0, 0, None)))(inside, arrays, shared), want, 1e-6)
    last = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), (inside, arrays))
    assert_close(jit(jax.vmap(one, (-1, -1, None)))(*last, shared), want, 1e-6)


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_vmap_over_one_option_alone(row):
    # Residuals that are not mapped meet cotangents that are.
    inside, fixed = row.split(row.arguments(2, (4, 3)))
    options = row.scalars()

    def one(option, name):
        function = total(row.eager, **fixed)
        return jax.grad(function)(inside | options | {name: option})

    for name in row.exponents:
        values = jnp.array([0.5, 2.0])
        compiled = jit(lambda v, name=name: one(v, name))
        want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(compiled, values))
        assert_close(jit(jax.vmap(lambda v, name=name: one(v, name)))(values), want, 1e-6)


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_scan_and_remat(row):
    arguments = row.all(3, (4, 5, 3))
    inside, fixed = row.split(arguments)
    static = row.axis(-1)
    mapped = {k for k, x in arguments.items() if k not in static and x.shape[:1] == (4,)}

    def summed(inside):
        every = arguments | inside
        shared = {k: v for k, v in every.items() if k not in mapped}

        def step(total, own):
            losses = jax.checkpoint(lambda own: row.eager(**own, **shared))(own)
            return total + jnp.sum(losses), None

        return jax.lax.scan(step, jnp.float32(0), {k: every[k] for k in mapped})[0]

    want = gradients(row.eager, **fixed)(inside)
    assert_close(jit(jax.value_and_grad(summed))(inside), want, 1e-5)


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_forward_mode_alone_is_refused_and_the_reference_has_it(row):
    inside, fixed = row.split(row.all(4, (4, 3)))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(total(row.eager, **fixed), (inside,), (inside,))
    plain = total(row.reference, **fixed)
    tangent = jit(lambda x: jax.jvp(plain, (x,), (x,))[1])(inside)
    gradient = gradients(row.eager, **fixed)(inside)[1]
    assert_close(tangent, sum(jnp.vdot(gradient[k], inside[k]) for k in inside), 1e-4)


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_a_closed_over_tracer_is_differentiated(row):
    inside, fixed = row.split(row.arguments(5, (4, 3)))

    def outer(function):
        def penalty(options):
            inner = total(function, **fixed, **options)
            return sum(jnp.sum(x**2) for x in jax.tree.leaves(jax.jit(jax.grad(inner))(inside)))

        return jit(jax.grad(penalty))(row.scalars())

    assert_close(outer(row.eager), outer(row.reference), 1e-4)


@pytest.mark.parametrize("row", [row for row in PROGRAMS if len(row.axes(2)) > 1], ids=str)
def test_every_axis_is_the_last_axis_moved(row):
    arguments = row.arguments(6, (2, 3, 4))
    inside, fixed = row.split(arguments)
    want = gradients(row.eager, **fixed)(inside)
    for axis in (0, 1, -2, -3):
        moved = {k: jnp.moveaxis(x, -1, axis) for k, x in inside.items()}
        value, gradient = gradients(row.eager, **fixed | row.axis(axis))(moved)
        back = {k: jnp.moveaxis(x, axis, -1) for k, x in gradient.items()}
        assert_close((value, back), want, 1e-6)
        # Without a gradient the sums are taken another way.
        assert_close(jnp.sum(row.ours(**moved | fixed | row.axis(axis))), want[0], 1e-6)


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_numpy_and_lists_are_taken(row):
    arguments = row.arguments(7, (3, 2))
    want = row.eager(**arguments)

    def as_(convert):
        return {k: convert(x) if hasattr(x, "dtype") else x for k, x in arguments.items()}

    got = row.eager(**as_(np.asarray))
    assert isinstance(got, jax.Array)
    assert_close(got, want, 0)
    assert_close(row.eager(**as_(lambda x: x.tolist())), want, 1e-7)
    for two in (np.float32(2), np.int64(2), 2, 2.0, jnp.int32(2)):
        exponents = dict.fromkeys(row.exponents, two)
        whole = dict.fromkeys(row.exponents, 2)
        assert_close(row.eager(**arguments, **exponents), row.eager(**arguments, **whole), 1e-6)
