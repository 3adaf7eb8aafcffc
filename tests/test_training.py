"""Initializer, class weights, gamma by sample, running normalizer."""

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import focal_jax
from focal_jax import training
from focal_jax._checks import InputError


@pytest.mark.parametrize("prior", [1e-6, 0.01, 0.5, 0.9])
def test_prior_bias_starts_the_sigmoid_at_the_prior(prior, x64):
    bias = training.prior_bias_init(prior)(jax.random.key(0), (3,), jnp.float64)
    chex.assert_trees_all_close(jax.nn.sigmoid(bias), jnp.full(3, prior), rtol=1e-13)


def test_prior_bias_is_an_initializer_of_flax():
    init = training.prior_bias_init()
    linen = nn.Dense(4, bias_init=init).init(jax.random.key(0), jnp.ones((1, 2)))
    layer = nnx.Linear(2, 4, bias_init=init, rngs=nnx.Rngs(0))
    for bias in (linen["params"]["bias"], layer.bias[...]):
        np.testing.assert_allclose(bias, np.full(4, -np.log(99)), rtol=1e-6)
    chex.assert_type(init(jax.random.key(0), (2, 3), jnp.bfloat16), jnp.bfloat16)


@pytest.mark.parametrize("prior", [0.0, 1.0, -1, 2, float("nan")])
def test_prior_outside_its_range(prior):
    with pytest.raises(InputError, match="prior: got"):
        training.prior_bias_init(prior)


def exact_alpha(counts, beta):
    with mpmath.workdps(60):
        weights = [1 / (1 - mpmath.mpf(beta) ** n) if n else 0 for n in counts]
        return np.array([float(w * len(counts) / mpmath.fsum(weights)) for w in weights])


@pytest.mark.parametrize("beta", [0, 0.5, 0.9, 0.999, 0.9999999, 1 - 1e-15])
@pytest.mark.parametrize("counts", [[1, 7, 100, 5000], [3, 0, 10**6, 12], [4, 4]])
def test_class_balanced_alpha_is_exact(counts, beta):
    for double, rtol in ((False, 1e-6), (True, 1e-13)):
        with jax.enable_x64(double):
            alpha = jax.jit(training.class_balanced_alpha, static_argnames="beta")(
                jnp.array(counts), beta=beta
            )
            np.testing.assert_allclose(alpha, exact_alpha(counts, beta), rtol=rtol)
            np.testing.assert_allclose(alpha.sum(), len(counts), rtol=rtol)


def test_class_balanced_alpha_between_its_limits():
    counts = jnp.array([10.0, 20.0, 40.0])
    chex.assert_trees_all_close(training.class_balanced_alpha(counts, beta=0), jnp.ones(3))
    inverse = 1 / counts
    chex.assert_trees_all_close(
        training.class_balanced_alpha(counts, beta=1 - 1e-9), 3 * inverse / inverse.sum(), rtol=1e-6
    )


def test_class_balanced_alpha_is_an_alpha():
    alpha = training.class_balanced_alpha(np.array([90, 0, 9], np.int16))
    logits, labels = jnp.zeros((2, 3)), jnp.array([0, 2])
    losses = focal_jax.softmax_focal_loss_with_integer_labels(logits, labels, alpha=alpha)
    plain = focal_jax.softmax_focal_loss_with_integer_labels(logits, labels)
    np.testing.assert_allclose(losses, alpha[labels] * plain, rtol=1e-6)
    assert alpha[1] == 0


@pytest.mark.parametrize("counts", [[0, 0], [3, -1], [float("nan"), 1.0]])
def test_counts_without_a_meaning_are_not_silent(counts):
    assert jnp.isnan(training.class_balanced_alpha(jnp.array(counts))).all()


@pytest.mark.parametrize(
    ("counts", "beta", "message"),
    [
        ([1, 2], 1, "beta: got 1"),
        ([1, 2], -0.1, "beta: got -0.1"),
        ([[1, 2]], 0.9, "counts: got shape"),
        (5, 0.9, "counts: got shape"),
        ([1j, 2], 0.9, "counts: got dtype"),
    ],
)
def test_class_balanced_alpha_errors(counts, beta, message):
    with pytest.raises(InputError, match=message):
        training.class_balanced_alpha(jnp.array(counts), beta=beta)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_sample_dependent_gamma(dtype):
    p_t = jnp.array([0.0, 0.1, 0.1992, 0.2, 0.5, 1.0], dtype)
    gamma = training.sample_dependent_gamma(p_t)
    chex.assert_trees_all_equal(gamma, jnp.where(p_t < 0.2, 5, 3).astype(dtype))
    chex.assert_type(gamma, dtype)


def test_no_gradient_through_the_threshold():
    logits, labels = jnp.linspace(-6, 6, 24).reshape(8, 3), jnp.arange(8) % 3

    def p_t(logits):
        return jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], 1)[:, 0]

    def loss(logits, gamma):
        return focal_jax.softmax_focal_loss_with_integer_labels(logits, labels, gamma=gamma).sum()

    constant = training.sample_dependent_gamma(p_t(logits))
    assert set(constant.tolist()) == {3.0, 5.0}
    chex.assert_trees_all_equal(
        jax.grad(lambda z: loss(z, training.sample_dependent_gamma(p_t(z))))(logits),
        jax.grad(loss)(logits, constant),
    )


def test_sample_dependent_gamma_wants_probabilities():
    with pytest.raises(InputError, match="p_t: got dtype"):
        training.sample_dependent_gamma(jnp.array([0, 1]))


def test_positive_count_ema_follows_the_counts_under_scan():
    counts = np.array([0, 50, 3, 2000])
    ema = training.positive_count_ema(decay=0.8, initial=10)
    update = jax.jit(lambda state, count: ema.update(count, state)[::-1])
    state, normalizers = jax.lax.scan(update, ema.init(), jnp.array(counts))
    expected = [10.0]
    for count in counts:
        expected.append(0.8 * expected[-1] + 0.2 * max(count, 1))
    np.testing.assert_allclose(normalizers, expected[1:], rtol=1e-6)
    assert state.normalizer == normalizers[-1]


def test_positive_count_ema_has_the_defaults_of_detectron2():
    ema = training.positive_count_ema()
    normalizer, state = ema.update(0, ema.init())
    np.testing.assert_allclose(normalizer, 0.9 * 100 + 0.1 * 1, rtol=1e-6)
    chex.assert_tree_all_finite(state)
    assert optax.tree.get(state, "normalizer") == normalizer


def test_positive_count_ema_counts_the_whole_batch():
    ema = training.positive_count_ema()
    counts = jnp.array([3, 0, 9])
    logits = jnp.arange(6.0).reshape(3, 2)

    def loss(logits, count):
        normalizer, _ = ema.update(count, ema.init(), axis_name="batch")
        return normalizer, focal_jax.reduce_loss(
            logits, normalization=normalizer, axis_name="batch"
        )

    normalizers, losses = jax.vmap(loss, axis_name="batch")(logits, counts)
    np.testing.assert_allclose(normalizers, np.full(3, 0.9 * 100 + 0.1 * 12), rtol=1e-6)
    np.testing.assert_allclose(losses.mean(), logits.sum() / normalizers[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.5}, "decay: got 1.5"),
        ({"decay": -0.1}, "decay: got -0.1"),
        ({"initial": 0}, "initial: got 0"),
        ({"initial": float("inf")}, "initial: got inf"),
    ],
)
def test_positive_count_ema_errors(options, message):
    with pytest.raises(InputError, match=message):
        training.positive_count_ema(**options)


def test_a_count_is_one_number():
    ema = training.positive_count_ema()
    with pytest.raises(InputError, match="count: got shape"):
        ema.update(jnp.ones(2), ema.init())
