"""The divisor, on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P

import focal_jax

LOSSES = jnp.arange(1.0, 13.0).reshape(4, 3)
WHERE = LOSSES % 5 != 0
DIVISORS = {
    "none": 1,
    "full": 12,
    "valid": int(WHERE.sum()),
    "batch_size": 4,
    7: 7,
    0.25: 1,
    0: 1,
}


@pytest.mark.parametrize("module", [focal_jax, focal_jax.reference], ids=["ours", "reference"])
@pytest.mark.parametrize("normalization", DIVISORS)
def test_divisors(module, normalization):
    got = module.reduce_loss(LOSSES, normalization=normalization, where=WHERE)
    assert got.shape == ()
    total = float(LOSSES[WHERE].sum())
    np.testing.assert_allclose(got, total / DIVISORS[normalization], rtol=1e-6)
    if not isinstance(normalization, str):
        got = module.reduce_loss(LOSSES, normalization=jnp.asarray(normalization), where=WHERE)
        np.testing.assert_allclose(got, total / DIVISORS[normalization], rtol=1e-6)


def test_the_default_is_the_mean_over_the_valid_positions():
    assert_close(focal_jax.reduce_loss(LOSSES), LOSSES.mean(), 1e-7)
    assert_close(focal_jax.reduce_loss(LOSSES, where=WHERE), LOSSES[WHERE].mean(), 1e-7)
    rows = jnp.array([[True], [False], [True], [True]])
    want = LOSSES[jnp.array([0, 2, 3])].mean()
    assert_close(focal_jax.reduce_loss(LOSSES, where=rows), want, 1e-7)


@pytest.mark.parametrize("normalization", [n for n in DIVISORS if isinstance(n, str)])
def test_nothing_valid_is_zero(normalization):
    nothing = jnp.zeros((4, 3), bool)
    reduce = jax.value_and_grad(
        lambda x: focal_jax.reduce_loss(x, normalization=normalization, where=nothing)
    )
    value, gradient = reduce(jnp.full((4, 3), jnp.nan))
    assert value == 0
    assert np.all(gradient == 0)
    empty = jnp.zeros((0, 3))
    assert focal_jax.reduce_loss(empty, normalization=normalization) == 0


def test_sixteen_bit_losses_are_summed_in_float32():
    losses = jnp.full((4096,), 1.001, jnp.bfloat16)
    got = focal_jax.reduce_loss(losses, normalization="none")
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 4096 * float(losses[0]), rtol=1e-6)


def test_differentiable_divisor():
    gradient = jax.grad(lambda d: focal_jax.reduce_loss(LOSSES, normalization=d))(jnp.float32(8))
    np.testing.assert_allclose(gradient, -LOSSES.sum() / 64, rtol=1e-6)


def _uneven(devices):
    """Return losses and a mask with uneven counts, and one device with nothing valid."""
    rng = np.random.default_rng(0)
    losses = jnp.asarray(rng.random((devices, 3, 5)), jnp.float32)
    where = jnp.asarray(rng.random((devices, 3, 5)) < 0.4).at[1].set(False)
    return losses, where


@pytest.mark.parametrize("normalization", [*DIVISORS])
@pytest.mark.parametrize("how", ["vmap", "pmap", "shard_map", "shard_map, two axes"])
@pytest.mark.parametrize("valid", ["some", "nothing"])
def test_pmean_is_the_result_of_one_device(normalization, how, valid):
    losses, where = _uneven(8)
    where = where if valid == "some" else jnp.zeros_like(where)
    names = ("data", "model") if how.endswith("axes") else ("data",)

    def one(x, where, axis_name=None):
        return focal_jax.reduce_loss(
            x, normalization=normalization, where=where, axis_name=axis_name
        )

    def local(x, where):
        name = names if len(names) > 1 else names[0]
        value, gradient = jax.value_and_grad(one)(x, where, name)
        # The gradient of a pmean over the devices: each has its part of the batch.
        return lax.pmean(value, name), gradient / lax.axis_size(name)

    if how in ("vmap", "pmap"):
        mapped = {"vmap": jax.vmap, "pmap": jax.pmap}[how](local, axis_name="data")
        value, gradient = mapped(losses, where)
        value = value[0]
    else:
        shape = (8,) if len(names) == 1 else (2, 4)
        mesh = Mesh(np.array(jax.devices()).reshape(shape), names)
        flat, mask = losses.reshape(24, 5), where.reshape(24, 5)
        value, gradient = jax.shard_map(
            local, mesh=mesh, in_specs=P(names), out_specs=(P(), P(names))
        )(flat, mask)
    flat, mask = losses.reshape(24, 5), where.reshape(24, 5)
    want = jax.value_and_grad(one)(flat, mask)
    got = value, gradient.reshape(24, 5)
    assert_close(got, want, 1e-6)
