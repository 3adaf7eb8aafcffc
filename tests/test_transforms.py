"""The losses under JAX's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import LOSSES, assert_close, ids


def _loss_and_gradient(loss, labels, **options):
    return jax.value_and_grad(lambda z: jnp.sum(loss.ours(z, labels, **options)))


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_jit_changes_nothing(loss):
    logits, labels = loss.inputs(0, (5, 3))
    function = jax.value_and_grad(lambda z: jnp.sum(loss.eager(z, labels, gamma=1.5)))
    assert_close(jax.jit(function)(logits), function(logits), 1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_is_a_loop(loss, axis):
    logits, labels = loss.inputs(1, (4, 3, 2), -1)
    gamma = jnp.array([0.5, 1.0, 2.0, 3.0])
    if axis:
        logits, labels = jnp.swapaxes(logits, 0, 1), jnp.swapaxes(labels, 0, 1)

    def one(z, y, g):
        return jax.value_and_grad(
            lambda z, g: jnp.sum(loss.ours(z, y, alpha=0.3, gamma=g)), (0, 1)
        )(z, g)

    got = jax.vmap(one, (axis, axis, 0))(logits, labels, gamma)
    rows = [one(jnp.take(logits, i, axis), jnp.take(labels, i, axis), gamma[i]) for i in range(4)]
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_vmap_over_one_option_alone(loss):
    # Residuals that are not mapped meet cotangents that are.
    logits, labels = loss.inputs(2, (4, 3))
    gammas = jnp.array([0.5, 2.0])

    def one(g):
        return jax.grad(lambda z, g: jnp.sum(loss.ours(z, labels, gamma=g)), (0, 1))(logits, g)

    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[one(g) for g in gammas])
    assert_close(jax.vmap(one)(gammas), want, 1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_scan_and_remat(loss):
    logits, labels = loss.inputs(3, (4, 5, 3))

    def total(z):
        def step(total, zy):
            return total + jnp.sum(jax.checkpoint(loss.ours)(*zy)), None

        return jax.lax.scan(step, jnp.float32(0), (z, labels))[0]

    want = jax.value_and_grad(lambda z: jnp.sum(loss.ours(z, labels)))(logits)
    assert_close(jax.jit(jax.value_and_grad(total))(logits), want, 1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_forward_mode_alone_is_refused_and_the_reference_has_it(loss):
    logits, labels = loss.inputs(4, (4, 3))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda z: loss.ours(z, labels), (logits,), (logits,))
    tangent = jax.jvp(lambda z: jnp.sum(loss.reference(z, labels)), (logits,), (logits,))[1]
    gradient = jax.grad(lambda z: jnp.sum(loss.ours(z, labels)))(logits)
    assert_close(tangent, jnp.sum(gradient * logits), 1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_a_closed_over_tracer_is_differentiated(loss):
    logits, labels = loss.inputs(5, (4, 3))

    def outer(gamma, alpha):
        def inner(z):
            return jnp.sum(loss.ours(z, labels, gamma=gamma, alpha=alpha))

        return jnp.sum(jax.jit(jax.grad(inner))(logits) ** 2)

    def plain(gamma, alpha):
        def inner(z):
            return jnp.sum(loss.reference(z, labels, gamma=gamma, alpha=alpha))

        return jnp.sum(jax.grad(inner)(logits) ** 2)

    args = jnp.float32(1.5), jnp.float32(0.3)
    assert_close(jax.grad(outer, (0, 1))(*args), jax.grad(plain, (0, 1))(*args), 1e-4)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_every_axis_is_the_last_axis_moved(loss):
    if not loss.softmax:
        pytest.skip("no class axis")
    logits, labels = loss.inputs(6, (2, 3, 4), -1)
    want = _loss_and_gradient(loss, labels)(logits)
    for axis in (0, 1, -2, -3):
        moved = jnp.moveaxis(logits, -1, axis)
        y = jnp.moveaxis(labels, -1, axis) if loss.soft else labels
        value, gradient = _loss_and_gradient(loss, y, axis=axis)(moved)
        assert_close((value, jnp.moveaxis(gradient, axis, -1)), want, 1e-6)
        # Without a gradient the sums are taken another way.
        assert_close(jnp.sum(loss.ours(moved, y, axis=axis)), want[0], 1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_numpy_and_lists_are_taken(loss):
    logits, labels = loss.inputs(7, (3, 2))
    want = loss.eager(logits, labels)
    got = loss.eager(np.asarray(logits), np.asarray(labels))
    assert isinstance(got, jax.Array)
    assert_close(got, want, 0)
    assert_close(loss.eager(logits.tolist(), labels.tolist()), want, 1e-7)
    for gamma in (np.float32(2), np.int64(2), 2, 2.0):
        assert_close(loss.eager(logits, labels, gamma=gamma), want, 0)
    assert_close(loss.ours(logits, labels, gamma=jnp.int32(2)), want, 1e-6)
