"""Saturated, infinite, missing and impossible inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    GAMMAS,
    HARD,
    INTEGER,
    LOSSES,
    SIGMOID,
    SIGMOID_SOFT,
    SOFTMAX,
    assert_close,
    ids,
)


def _total(loss, labels, **options):
    return lambda z: jnp.sum(loss.ours(z, labels, **options))


@pytest.mark.parametrize("loss", HARD, ids=ids)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_derivatives_are_finite_at_saturation(loss, gamma):
    margins = [-1e4, -100, -60, -20, 0, 20, 45, 60, 100, 1e4]
    logits, labels = loss.at(margins)
    assert np.all(np.isfinite(loss.ours(logits, labels, gamma=gamma)))
    total = _total(loss, labels, gamma=gamma)
    gradient = jax.grad(total)
    for derivative in (gradient, jax.hessian(total), jax.jacrev(gradient)):
        assert np.all(np.isfinite(jax.jit(derivative)(logits)))
    # The far wrong side keeps its gradient, which clipping would have taken away.
    slopes = np.abs(jax.jit(gradient)(logits)).reshape(len(margins), -1).max(-1)
    np.testing.assert_allclose(slopes[:2], 1, rtol=1e-6)


@pytest.mark.parametrize("loss", HARD, ids=ids)
@pytest.mark.parametrize("gamma", [0, 0.5])
def test_third_derivatives_are_finite_at_saturation(loss, gamma):
    logits, labels = loss.at([-100, -60, 0, 45, 60, 100])
    gradient = jax.grad(_total(loss, labels, gamma=gamma))
    second = jax.grad(lambda z: jnp.sum(gradient(z) ** 2))
    third = jax.jit(jax.grad(lambda z: jnp.sum(second(z) ** 2)))
    assert np.all(np.isfinite(third(logits)))


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_gradients_of_gamma_alpha_and_labels_are_finite_at_saturation(loss):
    logits, labels = loss.at([-1e4, -100, 0, 100, 1e4])

    def total(z, y, a, g):
        return jnp.sum(loss.ours(z, y, alpha=a, gamma=g))

    gradients = jax.jit(jax.grad(total, (0, 1, 2, 3) if loss.soft else (0, 2, 3)))
    for gamma in GAMMAS:
        for gradient in gradients(logits, labels, jnp.float32(0.5), jnp.float32(gamma)):
            assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("gamma", [0, 0.5, 2.0, jnp.float32(0), jnp.float32(2)])
@pytest.mark.parametrize("alpha", [None, 0.25, 0.0, 1.0])
def test_sigmoid_at_infinity(gamma, alpha):
    loss = SIGMOID
    logits = jnp.array([jnp.inf, -jnp.inf, jnp.inf, -jnp.inf])
    labels = jnp.array([1.0, 0.0, 0.0, 1.0])
    losses = loss.ours(logits, labels, gamma=gamma, alpha=alpha)
    weight = {None: (1, 1), 0.25: (0.75, 0.25), 0.0: (1, 0), 1.0: (0, 1)}[alpha]
    wrong = [np.inf if w else 0 for w in weight]
    assert losses.tolist() == [0, 0, *wrong]
    gradient = jax.grad(_total(loss, labels, gamma=gamma, alpha=alpha))(logits)
    assert gradient.tolist() == [0, 0, weight[0], -weight[1]]


@pytest.mark.parametrize("gamma", [0, 1.5, 2])
@pytest.mark.parametrize("label", [0.3, 0.5])
def test_soft_sigmoid_labels_at_infinity(gamma, label):
    logits = jnp.array([jnp.inf, -jnp.inf])
    labels = jnp.full(2, label)
    assert SIGMOID_SOFT.ours(logits, labels, gamma=gamma).tolist() == [np.inf, np.inf]
    for wrt in (0, 1):
        gradient = jax.grad(lambda z, y: jnp.sum(SIGMOID_SOFT.ours(z, y, gamma=gamma)), wrt)
        assert np.all(np.isfinite(gradient(logits, labels)))


@pytest.mark.parametrize("loss", SOFTMAX, ids=ids)
@pytest.mark.parametrize("gamma", [0, 0.5, 2])
def test_a_class_at_minus_infinity_is_switched_off(loss, gamma):
    logits, labels = loss.inputs(1, (4, 3))
    cut = jnp.concatenate([logits, jnp.full((4, 1), -jnp.inf)], 1)
    wide = jnp.pad(labels, ((0, 0), (0, 1))) if loss.soft else labels
    assert_close(loss.ours(cut, wide, gamma=gamma), loss.ours(logits, labels, gamma=gamma), 1e-6)
    gradient = jax.grad(_total(loss, wide, gamma=gamma))(cut)
    assert np.all(gradient[:, 3] == 0)
    want = jax.grad(_total(loss, labels, gamma=gamma))(logits)
    assert_close(gradient[:, :3], want, 1e-6)
    assert np.all(np.isfinite(jax.jit(jax.hessian(_total(loss, wide, gamma=gamma)))(cut)))


@pytest.mark.parametrize("loss", [row for row in HARD if row.softmax], ids=ids)
@pytest.mark.parametrize("gamma", [0, 0.5, 2])
def test_the_true_class_at_minus_infinity(loss, gamma):
    logits, labels = loss.at([-np.inf, -np.inf, -np.inf])
    assert np.all(loss.ours(logits, labels, gamma=gamma) == np.inf)
    gradient = jax.grad(_total(loss, labels, gamma=gamma))(logits)
    np.testing.assert_allclose(np.sort(gradient, 1), [[-1, 0.5, 0.5]] * 3, rtol=1e-6)
    if loss.soft:
        labels_gradient = jax.grad(lambda y: jnp.sum(loss.ours(logits, y, gamma=gamma)))(labels)
        assert np.all(np.isfinite(labels_gradient))


@pytest.mark.parametrize("loss", [row for row in HARD if row.softmax], ids=ids)
def test_only_the_true_class_is_left(loss):
    for logits in (jnp.zeros((3, 1)), jnp.where(jnp.eye(3) == 1, 2.0, -jnp.inf)):
        classes = logits.shape[1]
        labels = jnp.eye(classes)[jnp.arange(3) % classes] if loss.soft else jnp.arange(3) % classes
        for gamma in (0, 0.5, 2, jnp.float32(0)):
            assert np.all(loss.ours(logits, labels, gamma=gamma) == 0)
            assert np.all(jax.grad(_total(loss, labels, gamma=gamma))(logits) == 0)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_mask_shields_whatever_is_there(loss, poison):
    logits, labels = loss.inputs(2, (4, 3))
    where = jnp.array([True, False, True, False])
    where = where if loss.softmax else where[:, None]
    poisoned = logits.at[jnp.array([1, 3])].set(poison)
    soiled = labels.at[jnp.array([1, 3])].set(jnp.nan) if loss.soft else labels.at[1].set(99)

    def total(z, y, a, g):
        return jnp.sum(loss.ours(z, y, alpha=a, gamma=g, where=where))

    wrt = (0, 1, 2, 3) if loss.soft else (0, 2, 3)
    options = jnp.float32(0.3), jnp.float32(1.5)
    value_and_grad = jax.jit(jax.value_and_grad(total, wrt))
    got = value_and_grad(poisoned, soiled, *options)
    want = value_and_grad(logits, labels, *options)
    assert_close(got, want, 1e-6)
    assert np.all(got[1][0][jnp.array([1, 3])] == 0)
    losses = loss.ours(poisoned, soiled, where=where)
    assert np.all(losses[jnp.array([1, 3])] == 0)
    for second in (jax.jit(jax.hessian(total)), jax.jit(jax.jacrev(jax.grad(total)))):
        assert_close(second(poisoned, soiled, *options), second(logits, labels, *options), 1e-6)


@pytest.mark.parametrize("ignored", [-1, -100, 255, 1])
def test_ignore_label(ignored):
    loss = INTEGER
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(5, 3)), jnp.float32)
    labels = jnp.array([0, ignored, 2, ignored, 0])
    poisoned = logits.at[jnp.array([1, 3])].set(jnp.nan)
    losses = loss.ours(poisoned, labels, ignore_label=ignored)
    kept = jnp.array([0, 2, 4])
    assert losses[jnp.array([1, 3])].tolist() == [0, 0]
    assert_close(losses[kept], loss.ours(logits[kept], labels[kept]), 1e-6)
    gradient = jax.grad(_total(loss, labels, ignore_label=ignored))(poisoned)
    assert np.all(gradient[jnp.array([1, 3])] == 0)
    both = loss.ours(
        poisoned, labels, ignore_label=ignored, where=jnp.array([False, True, True, True, True])
    )
    assert both.tolist() == [0, 0, losses[2], 0, losses[4]]


@pytest.mark.parametrize("gamma", [0, 2, jnp.float32(0.5)])
def test_an_impossible_label_is_nan_at_its_position_only(gamma):
    loss = INTEGER
    logits = jnp.zeros((5, 3)).at[:, 0].set(200.0)
    labels = jnp.array([0, -1, 3, 2**31 - 1, 2])
    losses = loss.ours(logits, labels, gamma=gamma)
    assert np.isnan(losses).tolist() == [False, True, True, True, False]
    gradient = jax.grad(_total(loss, labels, gamma=gamma))(logits)
    assert np.isnan(gradient).all(1).tolist() == [False, True, True, True, False]
    assert np.isnan(gradient).any(1).tolist() == [False, True, True, True, False]
    for alpha in (0.0, jnp.zeros(3)):
        assert np.isnan(loss.ours(logits, labels, alpha=alpha))[1:4].all()


def test_a_sigmoid_label_outside_its_range_is_nan_at_its_position_only():
    labels = jnp.array([-1.0, 0.0, 0.5, 1.0, 2.0])
    losses = SIGMOID.ours(jnp.zeros(5), labels)
    assert np.isnan(losses).tolist() == [True, False, False, False, True]
    gradient = jax.grad(_total(SIGMOID, labels))(jnp.zeros(5))
    assert np.isnan(gradient).tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0,)])
def test_empty_batches(loss, shape):
    if loss.softmax and len(shape) == 1:
        pytest.skip("no class axis")
    logits, labels = jnp.zeros(shape), jnp.zeros(shape if loss.soft else shape[:-1])
    labels = labels if loss.soft else labels.astype(jnp.int32)
    alpha = jnp.ones(3) if loss.softmax else 0.25
    losses = loss.ours(logits, labels, alpha=alpha)
    assert losses.shape == loss.positions(shape)
    gradient = jax.grad(_total(loss, labels, alpha=alpha))(logits)
    assert gradient.shape == shape


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_a_zero_dimensional_position(loss):
    logits = jnp.array([1.0, 2.0]) if loss.softmax else jnp.float32(1.0)
    labels = {"integer": jnp.int32(1), "hard": jnp.float32(1), "one-hot": jnp.array([0.0, 1.0])}
    label = labels.get(loss.kind, jnp.array([0.5, 0.5]) if loss.softmax else jnp.float32(0.5))
    got, want = (f(logits, label, alpha=0.3) for f in (loss.ours, loss.reference))
    assert got.shape == ()
    assert_close(got, want, 1e-6)
