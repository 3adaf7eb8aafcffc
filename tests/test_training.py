"""Training utilities: bias priors, class weights, gamma schedules, normalizers."""

import functools

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import focal_jax
from focal_jax import InputError, training

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("prior", [1e-6, 0.01, 0.5, 0.9])
def test_sigmoid_of_the_initial_bias_is_the_prior(prior, x64):
    bias = training.prior_bias_init(prior)(jax.random.key(0), (3,), jnp.float64)
    chex.assert_trees_all_close(jax.nn.sigmoid(bias), jnp.full(3, prior), rtol=1e-13)


def test_prior_bias_init_works_in_flax_layers():
    init = training.prior_bias_init()
    linen = nn.Dense(4, bias_init=init).init(jax.random.key(0), jnp.ones((1, 2)))
    layer = nnx.Linear(2, 4, bias_init=init, rngs=nnx.Rngs(0))
    for bias in (linen["params"]["bias"], layer.bias[...]):
        np.testing.assert_allclose(bias, np.full(4, -np.log(99)), rtol=1e-6)
    chex.assert_type(init(jax.random.key(0), (2, 3), jnp.bfloat16), jnp.bfloat16)


@pytest.mark.parametrize("prior", [0.0, 1.0, -1, 2, float("nan")])
def test_prior_out_of_range_is_an_error(prior):
    with pytest.raises(InputError, match="prior: got"):
        training.prior_bias_init(prior)


def exact_alpha(counts, beta):
    """Return the class-balanced weights, computed with 60 digits."""
    with mpmath.workdps(60):
        weights = [1 / (1 - mpmath.mpf(beta) ** n) if n else 0 for n in counts]
        return np.array([float(w * len(counts) / mpmath.fsum(weights)) for w in weights])


@pytest.mark.parametrize("beta", [0, 0.5, 0.9, 0.999, 0.9999999, 1 - 1e-15])
@pytest.mark.parametrize("counts", [[1, 7, 100, 5000], [3, 0, 10**6, 12], [4, 4]])
def test_class_balanced_alpha_matches_60_digits(counts, beta):
    for double, rtol in ((False, 1e-6), (True, 1e-13)):
        with jax.enable_x64(double):
            alpha = jax.jit(training.class_balanced_alpha, static_argnames="beta")(
                jnp.array(counts), beta=beta
            )
            np.testing.assert_allclose(alpha, exact_alpha(counts, beta), rtol=rtol)
            np.testing.assert_allclose(alpha.sum(), len(counts), rtol=rtol)


def test_class_balanced_alpha_at_the_limits_of_beta():
    counts = jnp.array([10.0, 20.0, 40.0])
    chex.assert_trees_all_close(training.class_balanced_alpha(counts, beta=0), jnp.ones(3))
    inverse = 1 / counts
    chex.assert_trees_all_close(
        training.class_balanced_alpha(counts, beta=1 - 1e-9), 3 * inverse / inverse.sum(), rtol=1e-6
    )


def test_class_balanced_alpha_as_alpha_of_a_loss():
    alpha = training.class_balanced_alpha(np.array([90, 0, 9], np.int16))
    logits, labels = jnp.zeros((2, 3)), jnp.array([0, 2])
    losses = focal_jax.softmax_focal_loss_with_integer_labels(logits, labels, alpha=alpha)
    plain = focal_jax.softmax_focal_loss_with_integer_labels(logits, labels)
    np.testing.assert_allclose(losses, alpha[labels] * plain, rtol=1e-6)
    assert alpha[1] == 0


@pytest.mark.parametrize("counts", [[0, 0], [3, -1], [float("nan"), 1.0]])
def test_invalid_counts_give_nan(counts):
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


@pytest.mark.parametrize("counts", [[2**32, 2**33, 5], [2**40, 2**20, 1], [2**63, 1, 0]])
@pytest.mark.parametrize("dtype", [list, np.int64, np.uint64, np.float64])
@pytest.mark.parametrize("function", [training.class_balanced_alpha, training.logit_adjustment])
def test_64_bit_counts_do_not_wrap(counts, dtype, function):
    counts = [min(n, 2**63 - 1) for n in counts]
    given = counts if dtype is list else np.array(counts, dtype)
    np.testing.assert_allclose(
        function(given), function(jnp.asarray(counts, jnp.float32)), rtol=1e-6
    )
    assert np.isfinite(function(given)[:2]).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("beta", [0.999, 1 - 1e-6, 1 - 1e-15])
def test_16_bit_counts_with_beta_near_1(dtype, beta):
    counts = jnp.array([1, 8, 1024, 0], dtype)
    alpha = training.class_balanced_alpha(counts, beta=beta)
    assert alpha.dtype == jnp.float32
    np.testing.assert_allclose(alpha, exact_alpha([1, 8, 1024, 0], beta), rtol=1e-6)


LABELS = np.array([[0, 2, 2, 255], [1, 0, 2, 255], [255, 0, 0, 3]])


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("length", [None, 7, 256])
def test_counts_of_bincount_with_ignored_and_missing_classes(jit, length):
    labels = LABELS if length is None or length > 255 else LABELS[LABELS < 255]
    counts = np.bincount(labels.ravel(), minlength=length or 0)
    function = functools.partial(training.class_balanced_alpha, num_classes=6, ignore_label=255)
    alpha = (jax.jit(function) if jit else function)(jnp.asarray(counts))
    np.testing.assert_allclose(alpha, exact_alpha([4, 1, 3, 1, 0, 0], 0.999), rtol=1e-6)


def test_counts_of_invalid_labels_give_nan():
    counts = np.bincount(LABELS.ravel())
    for options in ({"num_classes": 4}, {"num_classes": 3, "ignore_label": 255}):
        assert np.isnan(training.class_balanced_alpha(counts, **options)).all()
    # Without num_classes every count is the count of a class, and no class has the label -1.
    alpha = training.class_balanced_alpha(counts, ignore_label=-1)
    assert alpha.shape == (256,)
    assert alpha[255] > 0


def test_ignored_class_has_weight_zero():
    alpha = training.class_balanced_alpha(np.array([90, 5, 9]), ignore_label=0)
    np.testing.assert_allclose(alpha, exact_alpha([0, 5, 9], 0.999), rtol=1e-6)


def test_labels_in_place_of_counts_are_an_error():
    for function in (training.class_balanced_alpha, training.logit_adjustment):
        with pytest.raises(InputError, match=r"counts: got shape \(3, 4\), .* jnp.bincount"):
            function(LABELS)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2])
def test_logit_adjustment_equals_the_balanced_softmax(tau):
    counts = np.array([500, 20, 0, 3])
    adjustment = training.logit_adjustment(counts, tau=tau)
    assert adjustment[2] == -np.inf
    logits = jax.random.normal(jax.random.key(0), (5, 4))
    labels = jnp.array([0, 1, 3, 1, 0])
    step = jax.value_and_grad(
        lambda z: focal_jax.softmax_focal_loss_with_integer_labels(z, labels, gamma=0).sum()
    )
    value, gradient = step(logits + adjustment[None])
    # Ren et al. 2020: the exponentials of the softmax are multiplied by the class counts.
    weighted = (counts / 523) ** tau * np.exp(np.asarray(logits, float))
    p = weighted / weighted.sum(1, keepdims=True)
    np.testing.assert_allclose(value, -np.log(p[np.arange(5), labels]).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, p - np.eye(4)[labels], rtol=1e-4, atol=1e-7)
    # The adjustment can also be the bias of a linear head.
    features, kernel = logits[:, :3], jnp.arange(12.0).reshape(3, 4) / 10
    np.testing.assert_allclose(
        focal_jax.linear_softmax_focal_loss_with_integer_labels(
            features, kernel, labels, bias=adjustment
        ),
        focal_jax.softmax_focal_loss_with_integer_labels(
            features @ kernel + adjustment[None], labels
        ),
        rtol=1e-5,
    )


def test_logit_adjustment_with_tau_zero_and_with_invalid_counts():
    np.testing.assert_array_equal(training.logit_adjustment([3, 0, 5], tau=0), np.zeros(3))
    for counts in ([0, 0], [3, -1]):
        assert jnp.isnan(training.logit_adjustment(counts)).any()


def test_gradient_of_logit_adjustment_in_counts_of_zero():
    def log_probability(counts):
        return jax.nn.log_softmax(training.logit_adjustment(counts))[0]

    gradient = jax.grad(log_probability)(jnp.array([3.0, 5, 0]))
    want = jax.grad(log_probability)(jnp.array([3.0, 5]))
    np.testing.assert_allclose(gradient, [*want, 0], rtol=1e-5, atol=1e-7)


def cross_entropy(logits, labels, w):
    """Return PyTorch's `BCEWithLogitsLoss(pos_weight=w, reduction="none")` in float64."""
    z, y = np.asarray(logits, float), np.asarray(labels, float)
    return w * y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)


@pytest.mark.parametrize("w", [0, 0.3, 1.0, np.float32(40), np.array([0.1, 3.0, 99.0])])
def test_positive_weight_equals_pytorch(w):
    logits = 4 * jax.random.normal(jax.random.key(0), (50, 3))
    labels = jax.random.bernoulli(jax.random.key(1), 0.3, (50, 3))
    alpha, factor = training.positive_weight(w)
    factor = jnp.broadcast_to(factor, (50, 3))
    losses = factor * focal_jax.sigmoid_focal_loss(logits, labels, alpha=alpha, gamma=0)
    np.testing.assert_allclose(losses, cross_entropy(logits, labels, w), rtol=1e-5)


def test_positive_weight_is_differentiable_and_checks_w():
    def total(w):
        alpha, factor = training.positive_weight(w)
        return (factor * focal_jax.sigmoid_focal_loss(1.5 * w / w, 1.0, alpha=alpha, gamma=0)).sum()

    np.testing.assert_allclose(
        jax.grad(total)(jnp.array([2.0, 5.0])), np.full(2, np.log1p(np.exp(-1.5))), rtol=1e-5
    )
    for w in (1e-3, 1.0, 1e5):
        slope = jax.grad(lambda w: training.positive_weight(w).alpha)(jnp.float32(w))
        np.testing.assert_allclose(slope, (1 + w) ** -2, rtol=1e-5)
    assert np.isnan(training.positive_weight(jnp.array([1.0, -1.0])).alpha).tolist() == [
        False,
        True,
    ]
    for w, message in ((-1, "w: got -1"), (float("inf"), "w: got inf"), ("2", "w: got '2'")):
        with pytest.raises(InputError, match=message):
            training.positive_weight(w)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (training.prior_bias_init, "prior"),
        (lambda x: training.class_balanced_alpha([1, 2], beta=x), "beta"),
        (lambda x: training.class_balanced_alpha([1, 2], num_classes=x), "num_classes"),
        (lambda x: training.logit_adjustment([1, 2], tau=x), "tau"),
        (lambda x: training.positive_count_ema(decay=x), "decay"),
        (lambda x: training.positive_count_ema(initial=x), "initial"),
        (training.class_balanced_alpha, "counts"),
        (training.positive_weight, "w"),
    ],
)
@pytest.mark.parametrize("invalid", ["0.5", {}, (1, (2, 3)), jax.random.key(0)], ids=str)
def test_errors_name_the_argument(function, name, invalid):
    with pytest.raises(InputError, match=f"^{name}: got"):
        function(invalid)
    with pytest.raises(InputError, match=f"^{name}: got"):
        function(-1 if name in ("num_classes", "tau", "w") else invalid)


def test_traced_values_of_static_numbers_are_errors():
    with pytest.raises(InputError, match="beta: got"):
        jax.jit(lambda beta: training.class_balanced_alpha([1, 2], beta=beta))(0.5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_sample_dependent_gamma(dtype):
    p_t = jnp.array([0.0, 0.1, 0.1992, 0.2, 0.5, 1.0], dtype)
    gamma = training.sample_dependent_gamma(p_t)
    chex.assert_trees_all_equal(gamma, jnp.where(p_t < 0.2, 5, 3).astype(dtype))
    chex.assert_type(gamma, dtype)


def test_sample_dependent_gamma_has_zero_gradient():
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


def test_sample_dependent_gamma_rejects_integers():
    with pytest.raises(InputError, match="p_t: got dtype"):
        training.sample_dependent_gamma(jnp.array([0, 1]))


def test_positive_count_ema_under_scan():
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


def test_positive_count_ema_sums_over_mapped_axes():
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


@pytest.mark.parametrize(
    "args", [(), (jax.random.key(0),), ((-1,),), ("ab",), ((2,), "foo"), (None, (2,), "foo")]
)
def test_prior_bias_init_of_invalid_shapes_and_dtypes(args):
    with pytest.raises(focal_jax.InputError, match=r"shape or dtype: .*wanted"):
        training.prior_bias_init(0.1)(*args)


def test_prior_of_a_config_is_checked():
    with pytest.raises(focal_jax.InputError, match=r"prior: got 1\.5"):
        training.PriorBias.from_config({"prior": 1.5})


def test_prior_bias_init_of_integers():
    with pytest.raises(InputError, match="dtype: got int32, wanted a floating dtype"):
        training.prior_bias_init(0.1)(jax.random.key(0), (2,), jnp.int32)


@pytest.mark.parametrize(
    ("count", "normalizer", "message"),
    [
        (float("nan"), 1.0, "count: got nan"),
        (-3, 1.0, "count: got -3"),
        (1e39, 1.0, "count: got 1e[+]39, wanted finite .* range of float32"),
        (1, None, "state: got None"),
        (1, np.ones(3), r"state: got shape \(3,\)"),
    ],
)
def test_positive_count_ema_errors_of_update(count, normalizer, message):
    state = training.PositiveCountEmaState(normalizer)
    with pytest.raises(InputError, match=message):
        training.positive_count_ema().update(count, state)


@pytest.mark.parametrize("count", [2**33, np.int64(2**33), np.array(2**33)])
def test_positive_count_ema_64_bit_counts_do_not_wrap(count):
    ema = training.positive_count_ema(decay=0.5, initial=1.0)
    normalizer, _ = ema.update(count, ema.init())
    np.testing.assert_allclose(normalizer, 0.5 + 2**32, rtol=1e-6)


def test_positive_count_ema_rejects_arrays():
    ema = training.positive_count_ema()
    with pytest.raises(InputError, match="count: got shape"):
        ema.update(jnp.ones(2), ema.init())


def test_logit_adjustment_of_large_counts():
    counts = jnp.array([3e38, 1e38, 1e37])
    want = training.logit_adjustment(jnp.array([30.0, 10.0, 1.0]))
    chex.assert_trees_all_close(training.logit_adjustment(counts), want, rtol=1e-6)


@pytest.mark.parametrize(
    "invalid", [True, False, np.True_, jnp.array(True), np.ma.array(0.5), [0.5], "0.5"]
)
def test_numbers_that_are_bools_masked_or_lists(invalid):
    calls = {
        "prior": training.prior_bias_init,
        "beta": lambda beta: training.class_balanced_alpha([1, 2], beta=beta),
        "tau": lambda tau: training.logit_adjustment([1, 2], tau=tau),
        "decay": training.positive_count_ema,
        "initial": lambda initial: training.positive_count_ema(initial=initial),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name}: got .*, wanted"):
            call(invalid)
