"""Published values of the losses, and relations between the losses."""

import inspect
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
import truth
from helpers import PROGRAMS, assert_close, published_values_of
from jax.sharding import AxisType, PartitionSpec as P

import focal_jax
from focal_jax import reference
from focal_jax.catalogue import LOSSES
from focal_jax.losses import poly, probability_weighted

pytestmark = pytest.mark.quick

LOGITS = np.array([-60.0, -8, -3, -1, -0.2, 0.0, 0.3, 2, 4, 20, 70], np.float32)
QUALITIES = np.array([0.0, 0.05, 0.3, 0.6, 1.0], np.float32)


def _grid(logits=LOGITS, labels=QUALITIES):
    z, y = np.meshgrid(logits, labels)
    return jnp.asarray(z.ravel()), jnp.asarray(y.ravel())


def _slopes(function, *arguments):
    """Return the derivatives of the sum of the losses in every argument."""
    total = lambda *args: jnp.sum(function(*args))  # noqa: E731
    return jax.jit(jax.grad(total, tuple(range(len(arguments)))))(*arguments)


# ---------------------------------------------------------------- published values


@published_values_of("asymmetric_loss")
def test_mmpretrain_asymmetric():
    # tests/test_models/test_losses.py: the mean over the rows, with and without a margin.
    logits = jnp.array([[5.0, -5, 0], [5, -5, 0]])
    labels = jnp.array([[1.0, 0, 1], [0, 1, 0]])
    for margin, total in ((0.05, 3.80845), (0.0, 5.1186)):
        losses = focal_jax.asymmetric_loss(logits, labels, gamma_positive=1.0, margin=margin)
        np.testing.assert_allclose(losses.mean(), total / 3, rtol=2e-5)


@published_values_of("softmax_poly_focal_loss_with_integer_labels", "sigmoid_poly_focal_loss")
def test_optax_poly():
    # optax computes the loss of the paper's listing.
    logits = jnp.array([[4.0, 2.0, 1.0], [0.0, 5.0, 1.0]])
    for epsilon in (-1.0, 0.0, 2.0, 5.45):
        for label in range(3):
            one_hot = jax.nn.one_hot(jnp.full(2, label), 3)
            want = optax.losses.poly_loss_cross_entropy(logits, one_hot, epsilon=epsilon)
            got = focal_jax.softmax_poly_focal_loss_with_integer_labels(
                logits, jnp.full(2, label), epsilon=epsilon, gamma=0
            )
            assert_close(got, want, 1e-5)
        # The softmax of two classes is the sigmoid of the difference of their logits.
        pair, positive = logits[:, :2], jnp.array([0.0, 1.0])
        want = optax.losses.poly_loss_cross_entropy(pair, jnp.eye(2), epsilon=epsilon)
        difference = pair[:, 1] - pair[:, 0]
        got = focal_jax.sigmoid_poly_focal_loss(difference, positive, epsilon=epsilon, gamma=0)
        assert_close(got, want, 1e-5)


@published_values_of("focal_tversky_loss")
def test_monai_tversky():
    # tests/losses/test_tversky_loss.py: softmax, reduction "none", one value per image and class.
    logits = jnp.array([[[-1.0, 0, 1], [1, 0, -1]], [[0, 0, 0], [0, 0, 0]]])
    labels = jax.nn.one_hot(jnp.array([[1, 0, 0], [1, 1, 0]]), 2, axis=1)

    def of_image(logits, labels):
        options = {"alpha": 0.5, "beta": 0.5, "gamma": 1, "smooth": 1e-4}
        return focal_jax.focal_tversky_loss(logits, labels, axis=0, **options)

    want = [[0.210961, 0.295339], [0.599952, 0.428547]]
    np.testing.assert_allclose(jax.vmap(of_image)(logits, labels), want, rtol=1e-5)


def _with_60_digits(formula):
    """Return the formula of one element as a function of arrays."""

    def evaluate(*arrays):
        with mpmath.workdps(60):
            elements = zip(*(np.asarray(x).ravel() for x in arrays))
            return np.array([float(formula(*map(truth.to_mpf, x))) for x in elements])

    return evaluate


def _s(x):
    return 1 / (1 + mpmath.exp(-x))


def _bce(x, y):
    return -y * mpmath.log(_s(x)) - (1 - y) * mpmath.log(_s(-x))


def _mmdetection_quality(x, y):
    return abs(y - _s(x)) ** 2 * _bce(x, y)


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


# The formulas in the code of the authors, or of the most used implementation, without its clamps.
PUBLISHED = {
    "mmdetection quality": (focal_jax.quality_focal_loss, {}, _mmdetection_quality),
    "mmdetection varifocal": (focal_jax.varifocal_loss, {}, _mmdetection_varifocal),
    "DEIM": (focal_jax.matchability_aware_loss, {}, _deim_mal),
    "CenterNet": (focal_jax.gaussian_focal_loss, {}, _centernet),
    "ASL": (focal_jax.asymmetric_loss, {"gamma_positive": 1}, _asl),
    "fvcore": (focal_jax.sigmoid_focal_loss_star, {"gamma": 2.0, "beta": 0.0}, _fvcore_star),
}


@published_values_of(*(function.__name__ for function, *_ in PUBLISHED.values()))
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_formula(name):
    function, options, formula = PUBLISHED[name]
    hard = name in ("ASL", "fvcore")
    z, y = _grid([-12.0, -4, -1.5, 0.4, 3, 9], [0.0, 1] if hard else QUALITIES)
    got = function(z, y, **options)
    # The difference of a score and the margin has an error of float32's epsilon.
    np.testing.assert_allclose(got, _with_60_digits(formula)(z, y), rtol=1e-5, atol=1e-12)


@published_values_of("dual_focal_loss_with_integer_labels")
def test_published_dual_focal_loss():
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


@published_values_of("distribution_focal_loss")
def test_published_distribution_focal_loss():
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


# ---------------------------------------------------------------- constant weights

CONSTANT_WEIGHT = [
    ("varifocal_loss", {"stop_weight_gradient": True}, ("alpha", "gamma")),
    ("asymmetric_loss", {"stop_weight_gradient": True}, ("gamma_positive", "gamma_negative")),
    ("matchability_aware_loss", {}, ("gamma", "alpha")),
]


@pytest.mark.parametrize(
    ("name", "flags", "options"), CONSTANT_WEIGHT, ids=[x[0] for x in CONSTANT_WEIGHT]
)
def test_constant_weight_has_no_derivative_of_any_order(name, flags, options):
    z, y = _grid([-3.0, -0.9, 0.4, 2.0], [0.2, 0.3, 0.8])
    if "positive" in LOSSES[name].masks:
        flags = flags | {"positive": y > 0.25}
    args = z, y, *(jnp.full(z.shape, x) for x in (1.3, 2.4))

    def orders(module):
        """Return the losses, their derivatives in each argument, and in each pair of arguments."""

        def loss(z, y, *numbers):
            return getattr(module, name)(z, y, **flags, **dict(zip(options, numbers)))

        def slope(i):
            return jax.grad(lambda *x: jnp.sum(loss(*x)), i)

        def sum_of_slopes(i):
            return jax.grad(lambda *x: jnp.sum(slope(i)(*x)), range(len(args)))

        first, second = ([f(i)(*args) for i in range(len(args))] for f in (slope, sum_of_slopes))
        return loss(*args), first, second

    (loss, first, second), want = (jax.jit(partial(orders, x))() for x in (focal_jax, reference))
    assert_close((loss, first), want[:2], 1e-5)
    assert_close(second, want[2], 2e-5)


@published_values_of("softmax_probability_weighted_loss_with_integer_labels")
def test_constant_probability_scales_the_gradient():
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


# ---------------------------------------------------------------- relations between losses


def test_quality_loss_of_hard_labels_is_the_focal_loss():
    z, y = _grid(labels=[0.0, 1.0])
    for beta in (0, 0.5, 2.0, 3.3):
        got = [focal_jax.quality_focal_loss(z, y, beta=beta)]
        got += _slopes(lambda z, b=beta: focal_jax.quality_focal_loss(z, y, beta=b), z)
        want = [focal_jax.sigmoid_focal_loss(z, y, gamma=beta)]
        want += _slopes(lambda z, b=beta: focal_jax.sigmoid_focal_loss(z, y, gamma=b), z)
        for a, b in zip(got, want):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-37)


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_gaussian_loss_of_hard_labels_is_the_focal_loss(alpha):
    z, y = _grid(labels=[0.0, 1.0])
    got = focal_jax.gaussian_focal_loss(z, y, alpha=alpha, gamma=1.7)
    want = focal_jax.sigmoid_focal_loss(z, y, alpha=alpha, gamma=1.7)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_asymmetric_loss_without_a_margin_is_a_focal_loss_with_one_gamma_per_label():
    z, y = _grid(labels=[0.0, 1.0])
    got = focal_jax.asymmetric_loss(z, y, gamma_positive=1.0, gamma_negative=3.0, margin=0.0)
    want = focal_jax.sigmoid_focal_loss(z, y, gamma=jnp.where(y == 1, 1.0, 3.0))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-37)


def test_derivatives_are_zero_below_and_at_the_margin():
    below, at = jnp.float32(-3.1), jnp.float32(0.0)
    for z, margin in ((below, 0.05), (at, 0.5)):
        loss = lambda z, m=margin: focal_jax.asymmetric_loss(z, 0.0, margin=m)  # noqa: E731
        assert [float(f(z)) for f in (loss, jax.grad(loss), jax.grad(jax.grad(loss)))] == [0] * 3


def test_star_with_gamma_one_and_beta_zero_is_the_cross_entropy():
    z, y = _grid(labels=[0.0, 1.0])
    got = focal_jax.sigmoid_focal_loss_star(z, y, gamma=1.0, beta=0.0)
    np.testing.assert_allclose(got, focal_jax.sigmoid_focal_loss(z, y, gamma=0), rtol=1e-6)


def test_poly_without_epsilon_is_the_focal_loss():
    z, y = _grid()
    got = focal_jax.sigmoid_poly_focal_loss(z, y, epsilon=0.0, alpha=0.25)
    assert_close(got, focal_jax.sigmoid_focal_loss(z, y, alpha=0.25), 1e-6)


def test_positive_mask_decides_about_quality_zero():
    z = jnp.array([-2.0, 0.0, 2.0])
    zero, positive = jnp.zeros(3), jnp.ones(3, bool)
    vfl, mal = focal_jax.varifocal_loss, focal_jax.matchability_aware_loss
    negative = 0.75 * jax.nn.sigmoid(z) ** 2 * jax.nn.softplus(z)
    assert_close(vfl(z, zero), negative, 1e-6)
    assert vfl(z, zero, positive=positive).tolist() == [0, 0, 0]
    assert_close(mal(z, zero), jax.nn.sigmoid(z) ** 1.5 * jax.nn.softplus(z), 1e-6)
    assert_close(mal(z, zero, positive=positive), jax.nn.softplus(z), 1e-6)
    # The varifocal loss ignores the label of a negative.
    half = jnp.full(3, 0.5)
    assert_close(vfl(z, half, positive=~positive), negative, 1e-6)
    for loss in (vfl, mal):
        with_mask = loss(z, half, positive=positive, where=jnp.array([True, False, True]))
        assert_close(with_mask, loss(z, half).at[1].set(0), 1e-6)


def test_dual_focal_loss_of_two_classes():
    # The other class has a lower probability in the first row only.
    logits = jnp.array([[2.0, 0.5], [0.5, 2.0]])
    got = focal_jax.dual_focal_loss_with_integer_labels(logits, jnp.zeros(2, int), gamma=2.0)
    p = jax.nn.softmax(logits)
    want = jnp.array([2 * p[0, 1], p[1, 1]]) ** 2 * -jnp.log(p[:, 0])
    assert_close(got, want, 1e-6)


# ---------------------------------------------------------------- losses of integer labels

INTEGER = [row for row in PROGRAMS if row.integer]


def _integer_options(row):
    """Return settings of the options that all losses of integer labels share."""
    settings = [{"return_logsumexp": True}, {"ignore_label": 1}]
    if "label_smoothing" in inspect.signature(row.loss.function).parameters:
        settings += [
            {"label_smoothing": 0.1},
            {"label_smoothing": 0.1, "ignore_label": 1, "return_logsumexp": True},
        ]
    return settings


def _weighted_sum(tree):
    """Return a sum of all entries with different weights."""
    weights = lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)  # noqa: E731
    return sum(jnp.sum(weights(x) * x) for x in jax.tree.leaves(tree))


def test_losses_without_label_smoothing():
    # The dual focal loss compares the class of the label with one other class.
    without = [row.name for row in INTEGER if len(_integer_options(row)) == 2]
    assert without == ["dual_focal_loss_with_integer_labels"]


@pytest.mark.slow
@pytest.mark.parametrize("row", INTEGER, ids=str)
def test_shared_options_equal_the_reference(row, x64):
    # Alpha as a scalar, and with one entry per class.
    inside, fixed = row.split(row.all(0, (6, 5), dtype=np.float64))
    fixed["where"] = jnp.arange(6) != 2
    scalar = inside | {k: x[0] for k, x in inside.items() if row.options.get(k) and x.ndim}

    def outputs_and_slopes(function, options):
        def total(inside):
            outputs = function(**inside, **fixed, **options)
            return _weighted_sum(outputs), outputs

        return [jax.value_and_grad(total, has_aux=True)(x) for x in (inside, scalar)]

    def all_of_them(function):
        return jax.jit(lambda: [outputs_and_slopes(function, x) for x in _integer_options(row)])()

    assert_close(all_of_them(row.eager), all_of_them(row.reference), 1e-9)


@pytest.mark.parametrize("row", INTEGER, ids=str)
def test_logsumexp_is_that_of_jax(row):
    arguments = row.arguments(0, (6, 5))
    arguments["labels"] = arguments["labels"].at[3].set(99)
    where = jnp.arange(6) != 2
    losses, logsumexp = row.eager(**arguments, where=where, return_logsumexp=True)
    if row.linear:
        logits = arguments["features"] @ arguments["kernel"] + arguments["bias"][None]
    else:
        logits = arguments["logits"]
    # An invalid label does not affect the log-sum-exp.
    assert np.isnan(losses).tolist() == [i == 3 for i in range(6)]
    assert_close(logsumexp, jnp.where(where, jax.nn.logsumexp(logits, -1), 0), 1e-6)


def _sharded(row, options, names, check_vma):
    """Return the loss with the classes sharded over devices, and its mesh."""
    shape = (4,) if isinstance(names, str) else (2, 2)
    axes = (names,) if isinstance(names, str) else names
    types = (AxisType.Auto,) * len(shape)
    mesh = jax.make_mesh(shape, axes, types, devices=jax.devices()[:4])
    specs = {"logits": P(None, names), "kernel": P(None, names), "bias": P(names)}

    def loss(sharded, replicated):
        return jax.shard_map(
            lambda a, b: row.eager(**a, **b, **options, class_axis_name=names),
            mesh=mesh,
            in_specs=({k: specs[k] for k in sharded}, P()),
            out_specs=P(),
            check_vma=check_vma,
        )(sharded, replicated)

    return loss, specs


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("row", INTEGER, ids=str)
def test_sharded_classes(row, check_vma):
    arguments = row.all(0, (9, 8))
    # The class with the next lower logit occurs twice, on two devices.
    if not row.linear:
        arguments["logits"] = arguments["logits"].at[:, 3].set(arguments["logits"][:, 5])
    static = row.axis(-1)
    names = "classes" if check_vma else ("classes", "more")
    settings = _integer_options(row)

    def outputs_and_slopes(loss, sharded, replicated):
        def total(sharded, moving):
            outputs = loss(sharded, replicated | moving)
            return _weighted_sum(outputs), outputs

        moving = {k: x for k, x in replicated.items() if k in row.split(arguments)[0]}
        return jax.value_and_grad(total, (0, 1), has_aux=True)(sharded, moving)

    _, specs = _sharded(row, {}, names, check_vma)
    arrays = {k: x for k, x in arguments.items() if k not in static}
    sharded = {k: x for k, x in arrays.items() if k in specs}
    replicated = {k: x for k, x in arrays.items() if k not in specs}

    @jax.jit
    def on_devices(sharded, replicated):
        losses = [_sharded(row, static | x, names, check_vma)[0] for x in settings]
        return [outputs_and_slopes(loss, sharded, replicated) for loss in losses]

    @jax.jit
    def on_one_device(sharded, replicated):
        losses = [lambda a, b, x=x: row.eager(**a, **b, **static, **x) for x in settings]
        return [outputs_and_slopes(loss, sharded, replicated) for loss in losses]

    got = on_devices(sharded, replicated)
    assert_close(got, on_one_device(sharded, replicated), 1e-5)


@pytest.mark.parametrize(
    ("loss", "name", "options"),
    [
        (
            poly._softmax,
            "softmax_poly_focal_loss_with_integer_labels",
            {"epsilon": 1.5, "gamma": 2.0},
        ),
        (
            probability_weighted._loss,
            "softmax_probability_weighted_loss_with_integer_labels",
            {},
        ),
    ],
    ids=["poly", "probability_weighted"],
)
def test_every_position_loss_has_a_linear_head(loss, name, options):
    rng = np.random.default_rng(0)
    features, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 4), (4, 9)))
    labels = jnp.asarray(rng.integers(9, size=6))

    def linear(features, kernel):
        return loss.linear(features, kernel, labels, chunk_size=2, **options)

    def dense(features, kernel):
        return getattr(focal_jax, name)(features @ kernel, labels, **options)

    assert_close(linear(features, kernel), dense(features, kernel), 1e-5)
    assert_close(_slopes(linear, features, kernel), _slopes(dense, features, kernel), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in INTEGER if row.linear], ids=str)
def test_transposed_kernel(row):
    inside, fixed = row.split(row.all(0, (6, 5)))
    fixed["where"] = jnp.arange(6) != 2
    settings = [{}, {"logit_softcap": 2.0}, *_integer_options(row)]

    def outputs_and_slopes(function, inside, transpose):
        def total(inside, options):
            kernel = inside["kernel"].T if transpose else inside["kernel"]
            options = options | {"kernel": kernel, "transpose_kernel": transpose}
            outputs = function(**inside | fixed | options)
            return _weighted_sum(outputs), outputs

        return [
            jax.value_and_grad(lambda x, o=o: total(x, o), has_aux=True)(inside) for o in settings
        ]

    def all_of_them(function, transpose):
        return jax.jit(partial(outputs_and_slopes, function, transpose=transpose))(inside)

    want = all_of_them(row.eager, False)
    assert_close(all_of_them(row.eager, True), want, 1e-5)
    assert_close(all_of_them(row.reference, True), want, 1e-5)


# ---------------------------------------------------------------- focal Tversky loss


def test_tversky_over_devices():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    labels = jax.nn.one_hot(jnp.asarray(rng.integers(3, size=8)), 3)
    where = jnp.arange(8) != 2
    mesh = jax.make_mesh((4,), ("batch",), (AxisType.Auto,), devices=jax.devices()[:4])
    sharded = jax.shard_map(
        lambda z, y, w: focal_jax.focal_tversky_loss(z, y, where=w, axis_name="batch"),
        mesh=mesh,
        in_specs=P("batch"),
        out_specs=P(),
    )
    on_one = lambda z, y: focal_jax.focal_tversky_loss(z, y, where=where)  # noqa: E731
    assert_close(sharded(logits, labels, where), on_one(logits, labels), 1e-6)
    got = _slopes(lambda z, y: sharded(z, y, where), logits, labels)
    assert_close(got, _slopes(on_one, logits, labels), 1e-5)


@pytest.mark.parametrize("gamma", [0.75, 1, 2.5])
@pytest.mark.parametrize("module", [focal_jax, reference])
def test_tversky_of_an_absent_class_is_zero_without_smoothing(module, gamma):
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


# ---------------------------------------------------------------- distribution focal loss


@pytest.mark.parametrize("module", [focal_jax, reference])
def test_labels_at_class_indices(module):
    loss = module.distribution_focal_loss
    logits = jnp.array([0.3, -1.0, 2.0, 0.5])
    cross_entropy = -jax.nn.log_softmax(logits)
    value_and_slope = jax.value_and_grad(loss, 1)
    for label, index in ((0.0, 0), (2.0, 2), (3.0, 3)):
        value, slope = value_and_slope(logits, jnp.float32(label))
        left = min(index, 2)
        np.testing.assert_allclose(value, cross_entropy[index], rtol=1e-6)
        np.testing.assert_allclose(slope, cross_entropy[left + 1] - cross_entropy[left], rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the loss warns of one class
        assert float(loss(jnp.zeros(1), jnp.float32(0))) == 0


def test_class_at_minus_infinity_beside_the_label():
    logits = jnp.array([0.3, -jnp.inf, 2.0, -jnp.inf])
    loss = focal_jax.distribution_focal_loss
    for label in (0.0, 2.0):
        value, slope = jax.value_and_grad(loss)(logits, jnp.float32(label))
        assert np.isfinite(value)
        assert np.all(np.isfinite(slope))
    assert loss(logits, jnp.float32(1.5)) == np.inf
