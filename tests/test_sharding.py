"""The same numbers on one device and on several."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import INTEGER, LOSSES, assert_close, ids
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

import focal_jax

SHAPE = (16, 8, 4)


def _mesh(kind=jax.sharding.AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def _inputs(loss):
    logits, labels = loss.inputs(0, SHAPE)
    return logits, labels, jnp.float32(0.3), jnp.float32(1.5)


def _reduced(loss, axis_name=None):
    def reduced(logits, labels, alpha, gamma):
        losses = loss.eager(logits, labels, alpha=alpha, gamma=gamma)
        return focal_jax.reduce_loss(losses, axis_name=axis_name)

    return reduced


def _wrt(loss):
    return (0, 1, 2, 3) if loss.soft else (0, 2, 3)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_the_gradient_outside(loss, check_vma):
    args = _inputs(loss)

    def local(*args):
        return lax.pmean(_reduced(loss, "data")(*args), "data")

    mapped = jax.shard_map(
        local,
        mesh=_mesh(),
        in_specs=(P("data"), P("data"), P(), P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    got = jax.jit(jax.value_and_grad(mapped, _wrt(loss)))(*args)
    assert_close(got, jax.jit(jax.value_and_grad(_reduced(loss), _wrt(loss)))(*args), 1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_shard_map_with_the_gradient_inside(loss):
    args = _inputs(loss)

    def local(*args):
        def mean(*args):
            return lax.pmean(_reduced(loss, "data")(*args), "data")

        return jax.value_and_grad(mean, _wrt(loss))(*args)

    spec = P("data")
    gradients = (spec, spec, P(), P()) if loss.soft else (spec, P(), P())
    mapped = jax.shard_map(
        local, mesh=_mesh(), in_specs=(spec, spec, P(), P()), out_specs=(P(), gradients)
    )
    want = jax.jit(jax.value_and_grad(_reduced(loss), _wrt(loss)))(*args)
    assert_close(jax.jit(mapped)(*args), want, 1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize(
    "spec", [P("data"), P(None, "data"), P("data", "model")], ids=["batch", "space", "both"]
)
def test_jit_over_a_mesh_gathers_nothing(loss, spec):
    logits, labels, alpha, gamma = _inputs(loss)
    sharding = NamedSharding(_mesh(), spec)
    logits, labels = jax.device_put((logits, labels), sharding)
    function = jax.jit(jax.value_and_grad(_reduced(loss), _wrt(loss)))
    text = function.lower(logits, labels, alpha, gamma).compile().as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    want = function(*_inputs(loss))
    got = function(logits, labels, alpha, gamma)
    assert_close(got, want, 1e-5)
    assert got[1][0].sharding.is_equivalent_to(sharding, 3)


def test_an_explicit_mesh():
    logits, labels, alpha, gamma = _inputs(INTEGER)
    mesh = _mesh(jax.sharding.AxisType.Explicit)
    want = jax.jit(jax.value_and_grad(_reduced(INTEGER)))(logits, labels, alpha, gamma)
    with jax.set_mesh(mesh):
        sharded = jax.device_put((logits, labels), NamedSharding(mesh, P("data", "model")))
        got = jax.jit(jax.value_and_grad(_reduced(INTEGER)))(*sharded, alpha, gamma)
        assert jax.typeof(got[1]).sharding.spec == P("data", "model", None)
    assert_close(jax.tree.map(np.asarray, got), want, 1e-5)
