"""How the CPU backend is handled, and that it changes no number."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import LOSSES, SIGMOID, SOFTMAX, assert_close, ids
from jax.sharding import NamedSharding, PartitionSpec as P

from focal_jax._cpu import compiled_apart

SHAPE = (4000, 20)


def _value_and_grad(loss, **options):
    return jax.value_and_grad(lambda z, y: jnp.mean(loss.eager(z, y, **options)))


def _compiled(function, *args, **options):
    return jax.jit(function, **options).lower(*args).compile()


def test_on_one_device_the_losses_are_flat_and_nothing_but_the_gradient_is_kept():
    logits, labels = SIGMOID.inputs(0, SHAPE)
    for options in ({}, {"alpha": 0.25}, {"gamma": 1.5}):
        compiled = _compiled(_value_and_grad(SIGMOID, **options), logits, labels)
        text = compiled.as_text()
        assert text.count(" conditional(") == 4
        assert len(re.findall(r"= f32\[80000\]\S* fusion\(", text)) == 2
        assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * logits.nbytes


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_temporaries(loss):
    logits, labels = loss.inputs(0, SHAPE)
    compiled = _compiled(_value_and_grad(loss), logits, labels)
    # One array of the logits' size at most, and a few numbers a position.
    numbers = 10 * 4 * np.prod(loss.positions(SHAPE))
    at_most = numbers + logits.nbytes if loss.softmax else 0.1 * logits.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes <= at_most


@pytest.mark.parametrize("loss", SOFTMAX, ids=ids)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_class_on_any_axis(loss, axis):
    # All arrays then have the same shape, and may be laid flat.
    shape = np.insert([4, 3], axis, 1)
    logits = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    labels = jnp.ones_like(logits) if loss.soft else jnp.zeros((4, 3), jnp.int32)
    value, gradient = jax.jit(_value_and_grad(loss, axis=axis))(logits, labels)
    assert value == 0
    assert not np.any(gradient)
    assert not np.any(loss.ours(logits, labels, axis=axis))


def test_on_several_devices_the_axes_stay():
    # Plain arrays: that they will be spread is not known before the lowering.
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    args = SIGMOID.inputs(1, SHAPE)
    spread = (NamedSharding(mesh, P("a", "b")),) * 2
    function = _value_and_grad(SIGMOID)
    text = _compiled(function, *args, in_shardings=spread).as_text()
    assert "f32[1000,10]" in text  # a device's own
    assert not re.search(r"f32\[\d{4,}\]", text)
    assert not re.search("all-gather|all-to-all|collective-permute", text)
    assert_close(jax.jit(function, in_shardings=spread)(*args), jax.jit(function)(*args))


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map_each_device_has_its_own_flat_array(check_vma):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    args = SIGMOID.inputs(2, SHAPE)
    function = jax.shard_map(
        lambda z, y: jax.grad(lambda z: jnp.sum(SIGMOID.eager(z, y)))(z),
        mesh=mesh,
        in_specs=P("a"),
        out_specs=P("a"),
        check_vma=check_vma,
    )
    assert "f32[10000]" in _compiled(function, *args).as_text()
    want = jax.jit(jax.grad(lambda z, y: jnp.sum(SIGMOID.eager(z, y))))(*args)
    assert_close(jax.jit(function)(*args), want, 1e-6)


def test_vmap_keeps_it_apart():
    # A predicate for each example would make a select of the conditional.
    logits, labels = SIGMOID.inputs(3, SHAPE)
    function = jax.vmap(_value_and_grad(SIGMOID))
    assert _compiled(function, logits, labels).as_text().count(" conditional(") == 4


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_without_jit(loss):
    logits, labels = loss.inputs(4, (3, 2))
    function = _value_and_grad(loss, gamma=1.5)
    want = jax.jit(function)(logits, labels)
    with jax.disable_jit():
        assert_close(function(logits, labels), want, 1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_exported_for_two_platforms(loss):
    logits, labels = loss.inputs(5, (6, 5))
    function = jax.jit(_value_and_grad(loss))
    exported = jax.export.export(function, platforms=("cpu", "cuda"))(logits, labels)
    assert_close(exported.call(logits, labels), function(logits, labels), 1e-6)


@pytest.mark.parametrize("shapes", [[(6, 4)] * 2, [(6, 4), (6, 1)], [(6, 4), (1, 1)], [(0, 4)] * 2])
@pytest.mark.parametrize("waits", [False, True])
def test_the_result_is_the_functions(shapes, waits):
    arrays = [jnp.asarray(np.random.default_rng(6).normal(size=s)) for s in shapes]

    def total(function, x, *rest):
        after = 2 * x if waits else None
        return jnp.sum(function(lambda x, y: jnp.sin(x) * y, x, *rest, after=after) ** 2)

    def plainly(function, *args, after):
        del after
        return function(*args)

    for order in (jax.value_and_grad, jax.hessian):
        got, want = (jax.jit(order(partial(total, f)))(*arrays) for f in (compiled_apart, plainly))
        assert_close(got, want, 1e-6)
