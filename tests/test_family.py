"""The focal loss's relatives: what others' figures, and what holds between the members."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
import truth
from helpers import assert_close, figure_of, jit
from jax.sharding import AxisType, PartitionSpec

import focal_jax
from focal_jax import _catalogue, _linear, reference
from focal_jax._poly import poly
from focal_jax._probability_weighted import probability_weighted

pytestmark = pytest.mark.quick
LOSSES = {loss.name: loss for loss in _catalogue.LOSSES}
MEMBERS = [
    "quality_focal_loss",
    "varifocal_loss",
    "matchability_aware_loss",
    "gaussian_focal_loss",
    "asymmetric_loss",
    "sigmoid_focal_loss_star",
    "sigmoid_poly_focal_loss",
]
LOGITS = np.array([-60.0, -8, -3, -1, -0.2, 0.0, 0.3, 2, 4, 20, 70], np.float32)
QUALITIES = np.array([0.0, 0.05, 0.3, 0.6, 1.0], np.float32)


def _grid(logits=LOGITS, labels=QUALITIES):
    z, y = np.meshgrid(logits, labels)
    return jnp.asarray(z.ravel()), jnp.asarray(y.ravel())


def _slopes(function, *arguments, **options):
    """Return the derivatives of each loss in every argument, of element by element losses."""
    total = lambda *args: jnp.sum(function(*args, **options))  # noqa: E731
    return jit(jax.grad(total, tuple(range(len(arguments)))))(*arguments)


# ---------------------------------------------------------------- others' figures


@figure_of("asymmetric_loss")
def test_mmpretrain_asymmetric():
    # tests/test_models/test_losses.py: with a clip of 0.05 and without, the mean over the rows.
    logits = jnp.array([[5.0, -5, 0], [5, -5, 0]])
    labels = jnp.array([[1.0, 0, 1], [0, 1, 0]])
    for margin, total in ((0.05, 3.80845), (0.0, 5.1186)):
        losses = focal_jax.asymmetric_loss(logits, labels, gamma_positive=1.0, margin=margin)
        np.testing.assert_allclose(losses.mean(), total / 3, rtol=2e-5)


@figure_of("softmax_poly_focal_loss_with_integer_labels", "sigmoid_poly_focal_loss")
def test_optax_poly():
    # optax's own expected values, which are those of the paper's listing.
    logits = jnp.array([[4.0, 2.0, 1.0], [0.0, 5.0, 1.0]])
    for epsilon in (-1.0, 0.0, 2.0, 5.45):
        for label in range(3):
            one_hot = jax.nn.one_hot(jnp.full(2, label), 3)
            theirs = optax.losses.poly_loss_cross_entropy(logits, one_hot, epsilon=epsilon)
            ours = focal_jax.softmax_poly_focal_loss_with_integer_labels(
                logits, jnp.full(2, label), epsilon=epsilon, gamma=0
            )
            assert_close(ours, theirs, 1e-5)
        # Of two classes the softmax is the sigmoid of the difference of their logits.
        pair, positive = logits[:, :2], jnp.array([0.0, 1.0])
        theirs = optax.losses.poly_loss_cross_entropy(pair, jnp.eye(2), epsilon=epsilon)
        difference = pair[:, 1] - pair[:, 0]
        ours = focal_jax.sigmoid_poly_focal_loss(difference, positive, epsilon=epsilon, gamma=0)
        assert_close(ours, theirs, 1e-5)


@figure_of("focal_tversky_loss")
def test_monai_tversky():
    # tests/losses/test_tversky_loss.py: softmax, reduction "none", of each image and class.
    logits = jnp.array([[[-1.0, 0, 1], [1, 0, -1]], [[0, 0, 0], [0, 0, 0]]])
    labels = jax.nn.one_hot(jnp.array([[1, 0, 0], [1, 1, 0]]), 2, axis=1)

    def of_image(logits, labels):
        options = {"alpha": 0.5, "beta": 0.5, "gamma": 1, "smooth": 1e-4}
        return focal_jax.focal_tversky_loss(logits, labels, axis=0, **options)

    want = [[0.210961, 0.295339], [0.599952, 0.428547]]
    np.testing.assert_allclose(jax.vmap(of_image)(logits, labels), want, rtol=1e-5)


def _published(function):
    """Return a formula of one element, at 60 digits, as a function of arrays."""

    def evaluate(*arrays):
        with mpmath.workdps(60):
            rows = zip(*(np.asarray(x).ravel() for x in arrays))
            return np.array([float(function(*map(truth.exact, row))) for row in rows])

    return evaluate


def _s(x):
    return 1 / (1 + mpmath.exp(-x))


def _bce(x, y):
    return -y * mpmath.log(_s(x)) - (1 - y) * mpmath.log(_s(-x))


def _mmdetection_varifocal(x, y):
    return (y if y > 0 else mpmath.mpf("0.75") * abs(_s(x) - y) ** 2) * _bce(x, y)


def _deim_mal(x, y):
    target, is_target = y ** mpmath.mpf("1.5"), int(y > 0)
    weight = _s(x) ** mpmath.mpf("1.5") * (1 - is_target) + is_target
    return weight * _bce(x, target)


def _centernet(x, y):
    if y == 1:
        return -((1 - _s(x)) ** 2) * mpmath.log(_s(x))
    return -((1 - y) ** 4) * _s(x) ** 2 * mpmath.log(1 - _s(x))


def _asl(x, y):
    s = _s(x)
    negative = min(1 - s + mpmath.mpf(0.05), 1)
    p_t = s * y + negative * (1 - y)
    weight = (1 - p_t) ** (1 * y + 4 * (1 - y))
    return -weight * (y * mpmath.log(s) + (1 - y) * mpmath.log(negative))


def _fvcore_star(x, y):
    return -mpmath.log(_s(2 * x * (2 * y - 1))) / 2


# The implementations that people train with, by the formula of their code, away from its clamps.
PUBLISHED = {
    "mmdetection quality": (
        focal_jax.quality_focal_loss,
        {},
        lambda x, y: abs(y - _s(x)) ** 2 * _bce(x, y),
    ),
    "mmdetection varifocal": (focal_jax.varifocal_loss, {}, _mmdetection_varifocal),
    "DEIM": (focal_jax.matchability_aware_loss, {}, _deim_mal),
    "CenterNet": (focal_jax.gaussian_focal_loss, {}, _centernet),
    "ASL": (focal_jax.asymmetric_loss, {"gamma_positive": 1}, _asl),
    "fvcore": (focal_jax.sigmoid_focal_loss_star, {"gamma": 2.0, "beta": 0.0}, _fvcore_star),
}


FIGURES = [function.__name__ for function, *_ in PUBLISHED.values()]


@figure_of(*FIGURES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_formula(name):
    function, options, formula = PUBLISHED[name]
    hard = name in ("ASL", "fvcore")
    z, y = _grid([-12.0, -4, -1.5, 0.4, 3, 9], [0.0, 1] if hard else QUALITIES)
    got = function(z, y, **options)
    # A score at the margin is known to float32's digits.
    np.testing.assert_allclose(got, _published(formula)(z, y), rtol=1e-5, atol=1e-12)


@figure_of("dual_focal_loss_with_integer_labels")
def test_the_published_dual_focal_loss():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (30, 6)), rng.integers(6, size=30)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    p_t = p[np.arange(30), labels]
    p_j = (p * (p < p_t[:, None])).max(1)
    want = (1 - p_t + p_j) ** 5 * -np.log(p_t)
    assert (p_j == 0).any()
    assert (p_j > 0).any()
    logits = jnp.asarray(logits, jnp.float32)
    got = focal_jax.dual_focal_loss_with_integer_labels(logits, jnp.asarray(labels))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@figure_of("distribution_focal_loss")
def test_the_published_distribution_focal_loss():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (40, 8)), rng.uniform(0, 7, 40)
    left = labels.astype(int)
    cross_entropy = np.log(np.exp(logits).sum(1, keepdims=True)) - logits
    rows = np.arange(40)
    want = cross_entropy[rows, left] * (left + 1 - labels)
    want += cross_entropy[rows, left + 1] * (labels - left)
    logits, labels = jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.float32)
    got = focal_jax.distribution_focal_loss(logits, labels)
    np.testing.assert_allclose(got, want, rtol=1e-5)


# ---------------------------------------------------------------- weights held constant


def _same(ours, plain, *arguments):
    assert_close(ours(*arguments), plain(*arguments), 1e-5)
    for first in range(len(arguments)):
        by_first = jax.grad(lambda *x, f=ours, i=first: jnp.sum(f(*x)), first)
        plain_by_first = jax.grad(lambda *x, f=plain, i=first: jnp.sum(f(*x)), first)
        assert_close(by_first(*arguments), plain_by_first(*arguments), 1e-5)
        for second in range(len(arguments)):
            both = [
                jit(jax.grad(lambda *x, g=g: jnp.sum(g(*x)), second))(*arguments)
                for g in (by_first, plain_by_first)
            ]
            assert_close(*both, 2e-5)


HELD = [
    ("varifocal_loss", {"stop_weight_gradient": True}, ("alpha", "gamma")),
    ("asymmetric_loss", {"stop_weight_gradient": True}, ("gamma_positive", "gamma_negative")),
    ("matchability_aware_loss", {}, ("gamma", "alpha")),
]


@pytest.mark.parametrize(("name", "flags", "options"), HELD, ids=[h[0] for h in HELD])
def test_a_held_weight_is_a_constant_in_every_order(name, flags, options):
    z, y = _grid([-3.0, -0.9, 0.4, 2.0], [0.2, 0.3, 0.8])
    if "positive" in LOSSES[name].masks:
        flags = flags | {"positive": y > 0.25}
    numbers = [jnp.full(z.shape, x) for x in (1.3, 2.4)]

    def of(module):
        function = getattr(module, name)
        return lambda z, y, *x: function(z, y, **flags, **dict(zip(options, x)))

    _same(of(focal_jax), of(reference), z, y, *numbers)


@pytest.mark.quick(False)
@pytest.mark.parametrize(("name", "flags"), [h[:2] for h in HELD], ids=[h[0] for h in HELD])
def test_a_held_weight_to_60_digits(name, flags):
    z, y = _grid(LOGITS[LOGITS != 0], [0.0, 0.3, 1.0])
    arrays = {"logits": np.asarray(z), "labels": np.asarray(y)}
    options = {k: o.default for k, o in LOSSES[name].options.items() if o.default is not None}
    arrays |= {k: np.full(z.shape, v, np.float32) for k, v in options.items()}
    values, want, sizes = truth.evaluate(LOSSES[name], arrays | flags)
    function = getattr(focal_jax, name)
    tiny = float(np.finfo(np.float32).tiny)
    assert truth.worst_error(function(z, y, **flags), values, tiny) < 1e-5
    for argument, got in zip(("logits", "labels"), _slopes(function, z, y, **flags)):
        scale = sizes[argument] / 10
        assert truth.worst_error(got, want[argument], 100 * tiny, scale) < 1e-5, argument


@figure_of("softmax_probability_weighted_loss_with_integer_labels")
def test_a_held_probability_scales_the_gradient():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 3, (9, 5)), jnp.float32)
    labels = jnp.asarray(rng.integers(5, size=9))
    loss = focal_jax.softmax_probability_weighted_loss_with_integer_labels
    p = jax.nn.softmax(logits)[jnp.arange(9), labels]
    (got,) = _slopes(lambda z: loss(z, labels), logits)
    (want,) = _slopes(
        lambda z: focal_jax.softmax_focal_loss_with_integer_labels(z, labels, gamma=0), logits
    )
    assert_close(got, p[:, None] * want, 1e-5)


# ---------------------------------------------------------------- relations


def test_hard_quality_is_the_focal_loss():
    z, y = _grid(labels=[0.0, 1.0])
    for beta in (0, 0.5, 2.0, 3.3):
        got = [focal_jax.quality_focal_loss(z, y, beta=beta)]
        got += _slopes(lambda z, b=beta: focal_jax.quality_focal_loss(z, y, beta=b), z)
        want = [focal_jax.sigmoid_focal_loss(z, y, gamma=beta)]
        want += _slopes(lambda z, b=beta: focal_jax.sigmoid_focal_loss(z, y, gamma=b), z)
        for a, b in zip(got, want):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-37)


def test_a_heat_map_of_peaks_alone_is_the_focal_loss():
    z, y = _grid(labels=[0.0, 1.0])
    got = focal_jax.gaussian_focal_loss(z, y, alpha=1.7)
    np.testing.assert_allclose(got, focal_jax.sigmoid_focal_loss(z, y, gamma=1.7), rtol=1e-6)


def test_asymmetric_without_a_margin_has_a_focal_loss_for_each_label():
    z, y = _grid(labels=[0.0, 1.0])
    got = focal_jax.asymmetric_loss(z, y, gamma_positive=1.0, gamma_negative=3.0, margin=0.0)
    focal = focal_jax.sigmoid_focal_loss
    want = focal(z, y, gamma=jnp.where(y == 1, 1.0, 3.0))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-37)


def test_the_margin_is_like_relu():
    below, at = jnp.float32(-3.1), jnp.float32(0.0)
    for z, margin in ((below, 0.05), (at, 0.5)):
        loss = lambda z, m=margin: focal_jax.asymmetric_loss(z, 0.0, margin=m)  # noqa: E731
        assert [float(f(z)) for f in (loss, jax.grad(loss), jax.grad(jax.grad(loss)))] == [0] * 3


def test_star_without_a_stretch_is_the_cross_entropy():
    z, y = _grid(labels=[0.0, 1.0])
    got = focal_jax.sigmoid_focal_loss_star(z, y, gamma=1.0, beta=0.0)
    np.testing.assert_allclose(got, focal_jax.sigmoid_focal_loss(z, y, gamma=0), rtol=1e-6)


def test_poly_without_epsilon_is_the_focal_loss():
    z, y = _grid()
    got = focal_jax.sigmoid_poly_focal_loss(z, y, epsilon=0.0, alpha=0.25)
    assert_close(got, focal_jax.sigmoid_focal_loss(z, y, alpha=0.25), 1e-6)


def test_a_positive_of_quality_zero():
    z = jnp.array([-2.0, 0.0, 2.0])
    zero, positive = jnp.zeros(3), jnp.ones(3, bool)
    vfl, mal = focal_jax.varifocal_loss, focal_jax.matchability_aware_loss
    negative = 0.75 * jax.nn.sigmoid(z) ** 2 * jax.nn.softplus(z)
    assert_close(vfl(z, zero), negative, 1e-6)
    assert vfl(z, zero, positive=positive).tolist() == [0, 0, 0]
    assert_close(mal(z, zero), jax.nn.sigmoid(z) ** 1.5 * jax.nn.softplus(z), 1e-6)
    assert_close(mal(z, zero, positive=positive), jax.nn.softplus(z), 1e-6)
    # A negative's label is nobody's business in the one, a target in the other.
    half = jnp.full(3, 0.5)
    assert_close(vfl(z, half, positive=~positive), negative, 1e-6)
    for loss in (vfl, mal):
        with_mask = loss(z, half, positive=positive, where=jnp.array([True, False, True]))
        assert_close(with_mask, loss(z, half).at[1].set(0), 1e-6)


def test_dual_with_two_classes():
    # There the next class below is the other one, if it is below.
    logits = jnp.array([[2.0, 0.5], [0.5, 2.0]])
    got = focal_jax.dual_focal_loss_with_integer_labels(logits, jnp.zeros(2, int), gamma=2.0)
    p = jax.nn.softmax(logits)
    want = jnp.array([2 * p[0, 1], p[1, 1]]) ** 2 * -jnp.log(p[:, 0])
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize(
    ("loss", "name", "options"),
    [
        (poly, "softmax_poly_focal_loss_with_integer_labels", {"epsilon": 1.5, "gamma": 2.0}),
        (probability_weighted, "softmax_probability_weighted_loss_with_integer_labels", {}),
    ],
)
def test_the_linear_head_takes_any_position_loss(loss, name, options):
    rng = np.random.default_rng(0)
    features, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 4), (4, 9)))
    labels = jnp.asarray(rng.integers(9, size=6))
    exponents = {
        k: focal_jax._inputs.exponent(k, v) if k == "gamma" else v for k, v in options.items()
    }

    def linear(features, kernel):
        return _linear.linear_head(
            loss,
            features,
            kernel,
            labels,
            bias=None,
            alpha=None,
            ignore_label=None,
            where=None,
            chunk_size=2,
            **exponents,
        )

    def apart(features, kernel):
        return getattr(focal_jax, name)(features @ kernel, labels, **options)

    assert_close(linear(features, kernel), apart(features, kernel), 1e-5)
    assert_close(_slopes(linear, features, kernel), _slopes(apart, features, kernel), 1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "softmax_poly_focal_loss_with_integer_labels",
        "softmax_probability_weighted_loss_with_integer_labels",
        "dual_focal_loss_with_integer_labels",
    ],
)
def test_classes_in_slices(name, check_vma):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 3, (9, 8)), jnp.float32)
    labels = jnp.asarray(rng.integers(8, size=9))
    # The next class below is there twice, on two devices.
    logits = logits.at[:, 3].set(logits[:, 5])
    loss = getattr(focal_jax, name)
    mesh = jax.make_mesh((4,), ("classes",), (AxisType.Auto,), devices=jax.devices()[:4])
    sliced = jax.shard_map(
        lambda z: loss(z, labels, class_axis_name="classes"),
        mesh=mesh,
        in_specs=PartitionSpec(None, "classes"),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )
    whole = lambda z: loss(z, labels)  # noqa: E731
    assert_close(jit(sliced)(logits), whole(logits), 1e-6)
    assert_close(_slopes(sliced, logits), _slopes(whole, logits), 1e-5)


# ---------------------------------------------------------------- numbers


SETTINGS = {
    "quality_focal_loss": [{"beta": b} for b in (0, 0.5, 1, 2.0)],
    "varifocal_loss": [{"gamma": g} for g in (0, 0.5, 2.0)],
    "matchability_aware_loss": [{"gamma": g, "alpha": 0.3} for g in (0, 0.5, 1.5)],
    "gaussian_focal_loss": [{"alpha": a, "beta": b} for a, b in ((0, 0.5), (2.0, 0), (0.5, 4.0))],
    "asymmetric_loss": [
        {"gamma_negative": g, "margin": m} for g, m in ((0, 0.05), (0.5, 0.0), (4.0, 0.05))
    ],
    "sigmoid_focal_loss_star": [{}],
    "sigmoid_poly_focal_loss": [{"gamma": g} for g in (0, 0.5, 2.0)],
}


@pytest.mark.parametrize("name", MEMBERS)
def test_three_derivatives_are_finite_for_finite_logits(name):
    logits = np.concatenate([LOGITS, [-1e4, -100, -45, 45, 100, 1e4]]).astype(np.float32)
    z, y = _grid(logits)
    function, settings = getattr(focal_jax, name), SETTINGS[name]

    @partial(jit, static_argnames=tuple(settings[-1]))
    def derivatives(z, y, given, **static):
        # Each carries along what it is the derivative of: nothing is traced or compiled twice.
        def first(z, y, given):
            total = lambda z, y, given: jnp.sum(function(z, y, **static, **given))  # noqa: E731
            return jax.value_and_grad(total, (0, 1, 2))(z, y, given)

        def of_sum(slopes):
            return jnp.sum(slopes[1][0]), slopes

        second = jax.value_and_grad(lambda z, y: of_sum(first(z, y, given)), (0, 1), has_aux=True)
        return jax.value_and_grad(lambda z: of_sum(second(z, y)), has_aux=True)(z)

    found = [derivatives(z, y, {}, **settings[-1])]
    for options in settings:
        found.append(
            derivatives(z, y, {k: jnp.full(z.shape, float(v)) for k, v in options.items()})
        )
    for leaf in jax.tree.leaves(found):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("name", MEMBERS)
def test_infinite_logits(name):
    function = getattr(focal_jax, name)
    z, y = jnp.array([jnp.inf, -jnp.inf]), jnp.array([1.0, 0.0])
    assert function(z, y).tolist() == [0, 0]
    wrong = function(-z, y)
    assert wrong[0] == np.inf
    # With a margin the loss of a negative has a limit.
    limit = -np.log(0.05) * 0.95**4 if name == "asymmetric_loss" else np.inf
    np.testing.assert_allclose(wrong[1], limit, rtol=1e-5)
    for sign, label in itertools.product((1, -1), (0.0, 0.4, 1.0)):
        for leaf in _slopes(function, sign * z, jnp.full(2, label)):
            assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits_are_computed_in_32(name, dtype):
    z, y = _grid()
    z, function = z.astype(dtype), getattr(focal_jax, name)
    losses = function(z, y)
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, function(z.astype(jnp.float32), y))
    by_logits, _ = _slopes(function, z, y)
    assert by_logits.dtype == dtype


@pytest.mark.quick(False)
@pytest.mark.parametrize("reach", [3, 30, 80])
@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_tversky_to_60_digits(reach, dtype, limit):
    rng = np.random.default_rng(0)
    labels = np.eye(3)[rng.integers(3, size=5)].astype(dtype)
    tiny = float(np.finfo(dtype).tiny)

    @jax.jit
    def loss_and_slopes(z, options):
        loss = partial(focal_jax.focal_tversky_loss, labels=labels, **options)
        return loss(z), jax.jacrev(loss)(z)

    with jax.enable_x64(dtype == np.float64):
        # Every position is right, or some are not.
        for rolled, gamma in itertools.product((0, 1), (0.75, 1.3, 2.0)):
            logits = rng.normal(size=(5, 3)) + reach * np.roll(labels, rolled, 0)
            logits = logits.astype(dtype)
            options = {"alpha": 0.7, "beta": 0.3, "gamma": gamma, "smooth": 1.0}
            options = {name: dtype(x) for name, x in options.items()}
            values, slopes, _ = truth.evaluate(
                LOSSES["focal_tversky_loss"], {"logits": logits, "labels": labels} | options
            )
            got_values, got = loss_and_slopes(logits, options)
            assert truth.worst_error(got_values, values, tiny) < limit
            # An entry is a difference of what the classes of its position add.
            scale = np.abs(slopes["logits"]).max(-1, keepdims=True)
            assert truth.worst_error(got, slopes["logits"], 100 * tiny, scale) < limit


@pytest.mark.quick(False)
@pytest.mark.parametrize("reach", [3, 30, 80])
@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_distribution_focal_to_60_digits(reach, dtype, limit):
    rng = np.random.default_rng(0)
    labels = np.array([0, 0.25, 1, 1.7, 2, 2.9, 3, 3], dtype)
    logits = rng.normal(size=(8, 4))
    logits[np.arange(8), labels.astype(int)] += reach * np.where(np.arange(8) % 2, 1, -1)
    logits, tiny = logits.astype(dtype), float(np.finfo(dtype).tiny)
    with jax.enable_x64(dtype == np.float64):
        loss = focal_jax.distribution_focal_loss
        want = truth.evaluate(
            LOSSES["distribution_focal_loss"], {"logits": logits, "labels": labels}
        )
        losses, transpose = jax.vjp(loss, jnp.asarray(logits), jnp.asarray(labels))
        slopes = transpose(jnp.ones_like(losses))
    assert truth.worst_error(losses, want.losses, tiny) < limit
    for name, got in zip(("logits", "labels"), slopes):
        # A probability less its share, and one cross entropy less another: where they cancel,
        # to the last digits of what is subtracted.
        scale = want.sizes[name] / 10
        assert truth.worst_error(got, want.slopes[name], 100 * tiny, scale) < limit, name


def _put_together(name):
    """Return a loss that is put together from others, and what it is a function of."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    index = jnp.asarray(rng.integers(4, size=6))
    labels = (
        jax.nn.one_hot(index, 4)
        if name == "focal_tversky_loss"
        else 0.9 * index.astype(jnp.float32)
    )
    return getattr(focal_jax, name), logits, labels


TOGETHER = ["distribution_focal_loss", "focal_tversky_loss"]


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("hidden", [np.nan, np.inf, 1e30])
def test_what_is_masked_is_nothing_to_third_order(name, hidden):
    loss, logits, labels = _put_together(name)
    where = jnp.arange(6) % 3 > 0

    @jax.jit
    def derivatives(z):
        def total(z):
            return jnp.sum(loss(z, labels, where=where))

        first = jax.grad(total)
        second = jax.grad(lambda z: jnp.sum(jnp.sin(first(z))))
        third = jax.grad(lambda z: jnp.sum(jnp.sin(second(z))))
        return total(z), first(z), second(z), third(z)

    with jax.debug_nans(True):
        bare = derivatives(jnp.where(where[:, None], logits, 0))
    hidden = derivatives(jnp.where(where[:, None], logits, hidden))
    for order, (got, want) in enumerate(zip(hidden, bare)):
        np.testing.assert_array_equal(got, want)
        assert order == 0 or (not np.any(got[~where]) and np.all(np.any(got[where], -1)))


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_together_16_bits_are_computed_in_32(name, dtype):
    loss, logits, labels = _put_together(name)
    losses = loss(logits.astype(dtype), labels)
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, loss(logits.astype(dtype).astype(jnp.float32), labels))
    gradient = jax.grad(lambda z: jnp.sum(loss(z, labels)))(logits.astype(dtype))
    assert gradient.dtype == dtype


@pytest.mark.parametrize("name", TOGETHER)
def test_together_mapped_and_along_any_axis(name):
    loss, logits, labels = _put_together(name)
    batch = jnp.stack([logits, 2 * logits]), jnp.stack([labels, labels])
    mapped = jax.vmap(jax.value_and_grad(lambda z, y: jnp.sum(loss(z, y))))(*batch)
    one_by_one = [jax.value_and_grad(lambda z: jnp.sum(loss(z, labels)))(z) for z in batch[0]]
    assert_close(mapped, jax.tree.map(lambda *x: jnp.stack(x), *one_by_one), 1e-6)
    assert_close(loss(logits.T, labels.T, axis=0), loss(logits, labels), 1e-6)


def test_tversky_over_devices():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    labels = jax.nn.one_hot(jnp.asarray(rng.integers(3, size=8)), 3)
    where = jnp.arange(8) != 2
    mesh = jax.make_mesh((4,), ("batch",), (AxisType.Auto,), devices=jax.devices()[:4])
    spread = jax.shard_map(
        lambda z, y, w: focal_jax.focal_tversky_loss(z, y, where=w, axis_name="batch"),
        mesh=mesh,
        in_specs=PartitionSpec("batch"),
        out_specs=PartitionSpec(),
    )
    whole = lambda z, y: focal_jax.focal_tversky_loss(z, y, where=where)  # noqa: E731
    assert_close(spread(logits, labels, where), whole(logits, labels), 1e-6)
    got = _slopes(lambda z, y: spread(z, y, where), logits, labels)
    assert_close(got, _slopes(whole, logits, labels), 1e-5)


@pytest.mark.parametrize("gamma", [0.75, 1, 2.5])
@pytest.mark.parametrize("module", [focal_jax, reference])
def test_tversky_without_smoothing_of_an_absent_class(module, gamma):
    logits, labels = jnp.array([[5.0, 0, -300], [0, 5, -300]]), jnp.eye(2, 3)
    loss = partial(module.focal_tversky_loss, smooth=0.0, gamma=gamma)
    for exponent in ({}, {"gamma": jnp.float32(gamma)}):
        losses = loss(logits, labels, **exponent)
        assert losses[2] == 0
        assert np.all(losses[:2] > 0)
        nothing = loss(logits, labels, where=jnp.zeros(2, bool), **exponent)
        np.testing.assert_array_equal(nothing, 0)
    if module is focal_jax:
        gradient = jax.grad(lambda z: loss(z, labels).sum())(logits)
        assert np.all(np.isfinite(gradient))


def test_tversky_is_quiet_where_there_is_nothing():
    logits, labels = jnp.full((4, 2), jnp.nan), jnp.full((4, 2), jnp.nan)
    loss = lambda z: focal_jax.focal_tversky_loss(z, labels, where=jnp.zeros(4, bool))  # noqa: E731
    assert loss(logits).tolist() == [0, 0]
    assert np.all(_slopes(loss, logits)[0] == 0)


@pytest.mark.parametrize("module", [focal_jax, reference])
def test_the_ends_of_the_interval(module):
    loss = module.distribution_focal_loss
    logits = jnp.array([0.3, -1.0, 2.0, 0.5])
    cross_entropy = -jax.nn.log_softmax(logits)
    value_and_slope = jax.value_and_grad(loss, 1)
    for label, place in ((0.0, 0), (2.0, 2), (3.0, 3)):
        value, slope = value_and_slope(logits, jnp.float32(label))
        left = min(place, 2)
        np.testing.assert_allclose(value, cross_entropy[place], rtol=1e-6)
        np.testing.assert_allclose(slope, cross_entropy[left + 1] - cross_entropy[left], rtol=1e-5)
    assert float(loss(jnp.zeros(1), jnp.float32(0))) == 0


def test_a_bin_without_weight_may_be_switched_off():
    logits = jnp.array([0.3, -jnp.inf, 2.0, -jnp.inf])
    loss = focal_jax.distribution_focal_loss
    for label in (0.0, 2.0):
        value, slope = jax.value_and_grad(loss)(logits, jnp.float32(label))
        assert np.isfinite(value)
        assert np.all(np.isfinite(slope))
    assert loss(logits, jnp.float32(1.5)) == np.inf


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", MEMBERS)
def test_a_label_that_is_none_is_nan_at_its_position(name):
    z, y = jnp.array([0.5, 0.5, 0.5, 0.5]), jnp.array([1.0, -0.1, 1.1, jnp.nan])
    function = getattr(focal_jax, name)
    assert np.isnan(function(z, y)).tolist() == [False, True, True, True]
    (slope,) = _slopes(lambda z: function(z, y), z)
    assert np.isnan(slope).tolist() == [False, True, True, True]


def test_a_number_outside_the_interval_is_nan_at_its_position():
    z, y = jnp.zeros((5, 4)), jnp.array([1.5, -0.1, 3.1, jnp.nan, 3.0])
    bad = [False, True, True, True, False]
    loss = focal_jax.distribution_focal_loss
    assert np.isnan(loss(z, y)).tolist() == bad
    by_logits, by_labels = _slopes(loss, z, y)
    assert np.isnan(by_logits).any(1).tolist() == np.isnan(by_labels).tolist() == bad
    where = jnp.array([True, False, False, False, True])
    assert not np.isnan(loss(z, y, where=where)).any()
    by_logits, by_labels = _slopes(loss, z, y, where=where)
    assert not np.isnan(by_logits).any()
    assert not np.isnan(by_labels).any()


EXPONENTS = [
    (loss.name, option)
    for loss in _catalogue.LOSSES
    for option, spec in loss.options.items()
    if spec.exponent
]


@pytest.mark.parametrize("module", [focal_jax, reference])
@pytest.mark.parametrize(("name", "option"), EXPONENTS)
def test_a_negative_exponent(module, name, option):
    if name.startswith("linear"):
        return
    integer = "integer" in name
    labels = jnp.zeros(2, int) if integer else jnp.zeros((2, 2))
    with pytest.raises(ValueError, match=rf"^{option}: got -0.5, wanted a finite number >= 0"):
        getattr(module, name)(jnp.zeros((2, 2)), labels, **{option: -0.5})


@pytest.mark.parametrize("module", [focal_jax, reference])
def test_named_errors(module):
    z = jnp.zeros(3)
    for margin in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"^margin: got .*, wanted a number in \[0, 1\)"):
            module.asymmetric_loss(z, z, margin=margin)
    for name in ("varifocal_loss", "matchability_aware_loss"):
        with pytest.raises(TypeError, match=r"^positive: got dtype float32, wanted bool"):
            getattr(module, name)(z, z, positive=jnp.ones(3))
        with pytest.raises(ValueError, match=r"^positive: got shape \(2,\), wanted one that"):
            getattr(module, name)(z, z, positive=jnp.ones(2, bool))
    for name in ("varifocal_loss", "asymmetric_loss"):
        with pytest.raises(TypeError, match=r"^stop_weight_gradient: got 1, wanted True or False"):
            getattr(module, name)(z, z, stop_weight_gradient=1)
    for gamma in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"^gamma: got .*, wanted a finite number > 0"):
            module.sigmoid_focal_loss_star(z, z, gamma=gamma)
    with pytest.raises(ValueError, match=r"^labels: got shape \(3,\), wanted \(3, 2\)"):
        module.focal_tversky_loss(jnp.zeros((3, 2)), z)
    with pytest.raises(ValueError, match=r"^labels: got shape \(2,\), wanted \(3,\)"):
        module.distribution_focal_loss(jnp.zeros((3, 2)), jnp.zeros(2))
