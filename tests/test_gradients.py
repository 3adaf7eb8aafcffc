"""The hand-derived cotangents, of every order, against autodiff and finite differences."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GAMMAS, INTEGER, LOSSES, ONE_HOT, SIGMOID, assert_close, ids
from jax.test_util import check_grads


def _sum(function, loss, cotangent, **options):
    """Return the weighted sum of the losses as a function of everything differentiable."""

    def total(logits, labels, alpha, gamma):
        return jnp.sum(cotangent * function(logits, labels, alpha=alpha, gamma=gamma, **options))

    return total, (0, 1, 2, 3) if loss.soft else (0, 2, 3)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@hypothesis.settings(max_examples=8)
@hypothesis.given(data=st.data())
def test_every_cotangent_is_autodiffs(loss, data):
    shape = data.draw(st.sampled_from([(3,), (2, 3), (4, 3, 2), (2, 3, 2, 5)]), "shape")
    axis = data.draw(st.integers(-len(shape), len(shape) - 1), "axis")
    seed = data.draw(st.integers(0, 2**16), "seed")
    positions = loss.positions(shape, axis)
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        logits, labels = loss.inputs(seed, shape, axis, dtype=np.float64)
        alpha_shape = st.sampled_from([(), (loss.classes(shape, axis),) if loss.softmax else shape])
        alpha = jnp.asarray(rng.uniform(0.1, 0.9, data.draw(alpha_shape, "alpha")))
        gamma_shape = data.draw(st.sampled_from([(), positions, positions[1:]]), "gamma")
        gamma = jnp.asarray(rng.uniform(0, 4, gamma_shape))
        cotangent = jnp.asarray(rng.normal(size=positions))
        grads = []
        for function in (loss.ours, loss.reference):
            total, wrt = _sum(function, loss, cotangent, **loss.axis(axis))
            grads.append(jax.jit(jax.value_and_grad(total, wrt))(logits, labels, alpha, gamma))
        assert_close(*grads, rtol=1e-9)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_static_gamma(loss, gamma, x64):
    logits, labels = loss.inputs(2, (5, 4), scale=1.0, dtype=np.float64)
    cotangent = np.random.default_rng(2).normal(size=loss.positions((5, 4)))
    wrt = (0, 1) if loss.soft else (0,)
    got, want = (
        jax.grad(lambda z, y, f=f: jnp.sum(cotangent * f(z, y, alpha=0.3, gamma=gamma)), wrt)(
            logits, labels
        )
        for f in (loss.ours, loss.reference)
    )
    assert_close(got, want, 1e-10)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize("gamma", [0, 0.5, 2, "traced"])
def test_finite_differences_to_second_order(loss, gamma, x64):
    logits, labels = loss.inputs(3, (2, 3), scale=1.0, dtype=np.float64)
    args = [logits, jnp.asarray(0.3)]
    if gamma == "traced":
        args.append(jnp.asarray(1.5))
    differentiable = loss.soft and loss.kind != "hard"  # no step out of [0, 1]
    if differentiable:
        args.append(labels)

    def function(logits, alpha, *rest):
        exponent = rest[0] if gamma == "traced" else gamma
        y = rest[-1] if differentiable else labels
        return loss.ours(logits, y, alpha=alpha, gamma=exponent)

    check_grads(jax.jit(function), args, order=2, modes=["rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize("gamma", [0, 0.5, 1, 1.5, 2])
def test_hessian(loss, gamma, x64):
    # Against autodiff of the plain formula, which is right at moderate float64 logits;
    # 0 is there because |x| has its kink there.
    logits, labels = loss.inputs(4, (3, 3), scale=1.0, dtype=np.float64)
    logits = logits.at[0, 0].set(0.0)

    def total(function):
        return lambda z: jnp.sum(function(z, labels, gamma=gamma, alpha=0.3))

    tangent = jnp.asarray(np.random.default_rng(4).normal(size=logits.shape))

    gradient = jax.grad(total(loss.ours))

    @jax.jit
    def derivatives(z):
        product = jax.jvp(gradient, (z,), (tangent,))[1]
        return jax.hessian(total(loss.ours))(z), jax.jacrev(gradient)(z), product

    want = jax.jit(jax.hessian(total(loss.reference)))(logits)
    product = jnp.einsum("abcd,cd->ab", want, tangent)
    assert_close(derivatives(logits), (want, want, product), 1e-9)


@pytest.mark.parametrize("loss", [row for row in LOSSES if row.soft], ids=ids)
def test_mixed_second_derivatives(loss, x64):
    logits, labels = loss.inputs(5, (3, 3), scale=1.0, dtype=np.float64)
    args = (logits, labels, jnp.asarray(0.3), jnp.asarray(1.5))

    def total(function):
        return lambda z, y, a, g: jnp.sum(function(z, y, alpha=a, gamma=g))

    got, want = (
        jax.jit(jax.jacrev(jax.grad(total(f), (0, 1, 2, 3)), (0, 1, 2, 3)))(*args)
        for f in (loss.ours, loss.reference)
    )
    if loss.kind == "soft":
        assert_close(got, want, 1e-8)
    else:  # the plain formula divides 0 by 0 at a hard label; its derivatives in y are NaN
        assert_close([row[0] for row in got][:1], [row[0] for row in want][:1], 1e-8)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_unit_weights_change_nothing(loss):
    # alpha None, a scalar 1 and a weight of 1 for every class are one loss.
    logits, labels = loss.inputs(6, (4, 3))
    if loss.softmax:
        want = loss.ours(logits, labels)
        assert_close(loss.ours(logits, labels, alpha=1.0), want, 0)
        assert_close(loss.ours(logits, labels, alpha=jnp.ones(3)), want, 0)
    else:
        want = loss.ours(logits, labels)
        assert_close(loss.ours(logits, labels, alpha=0.5), 0.5 * want, 1e-7)


def test_one_hot_is_the_integer_loss():
    logits, labels = INTEGER.inputs(7, (6, 5))
    alpha = jnp.linspace(0.1, 0.9, 5)
    got, want = (
        jax.value_and_grad(lambda z, a, f=f, y=y: jnp.sum(f(z, y, alpha=a, gamma=1.5)), (0, 1))(
            logits, alpha
        )
        for f, y in ((ONE_HOT.ours, jax.nn.one_hot(labels, 5)), (INTEGER.ours, labels))
    )
    assert_close(got, want, 1e-6)


def test_two_classes_are_the_sigmoid():
    logits, _ = SIGMOID.inputs(8, (9,))
    pair = jnp.stack([jnp.zeros(9), logits], -1)
    labels = jnp.arange(9) % 2
    want = SIGMOID.ours(logits, labels, alpha=0.3)
    assert_close(INTEGER.ours(pair, labels, alpha=jnp.array([0.7, 0.3])), want, 1e-6)


# Large enough that XLA compiles other loops and splits them over the cores.
@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize(("shape", "axis"), [((30_000, 21), -1), ((2, 21, 128, 96), 1)])
def test_large_arrays(loss, shape, axis):
    logits, labels = loss.inputs(6, shape, axis)
    positions = loss.positions(shape, axis)
    where = np.random.default_rng(6).random(positions) < 0.9
    options = {"alpha": 0.3, "where": where, **loss.axis(axis)}
    losses = loss.ours(logits, labels, **options)

    def total(function):
        return jax.jit(jax.value_and_grad(lambda z, y: jnp.sum(function(z, y, **options))))

    value, gradient = total(loss.ours)(logits, labels)
    with jax.enable_x64(True):
        wide = [
            np.asarray(x, np.float64 if x.dtype == np.float32 else None) for x in (logits, labels)
        ]
        want = total(loss.reference)(*wide)
        assert_close(losses, loss.reference(*wide, **options), 1e-5)
    assert_close((value, gradient), want, 1e-5)
    inside = np.expand_dims(where, axis) if loss.softmax else where
    assert not np.any(np.where(inside, 0, gradient))
