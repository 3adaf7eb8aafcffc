"""Values and first derivatives agree with 60-digit arithmetic and with published values."""

import functools
import importlib
import unittest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_family
import truth
from helpers import (
    EXPONENTS,
    LOSSES,
    PROGRAMS,
    WITH_PUBLISHED_VALUES,
    Row,
    assert_close,
    near_labels,
    published_values_of,
    range_of,
)

import focal_jax
from focal_jax import catalogue
from focal_jax.engine.options import CLASS_WEIGHTS

pytestmark = pytest.mark.quick

# ---------------------------------------------------------------- 60 digits

LOGITS = np.concatenate([np.linspace(-87, 87, 31), [0, 1e-6, -1e-6, -1e-3, 0.3, -0.7, 12, -12]])
WIDE = np.concatenate([np.linspace(-300, 300, 31), [1e-6, -1e-6, -1e-3, 0.3, -0.7, 12, -12]])
HARD, SOFT = [0, 1], [1e-4, 0.3, 0.5, 0.9, 1 - 1e-4, 1 - 2**-20]


def _elementwise(row, logits):
    labels = HARD + SOFT if "soft" in row.loss.labels else HARD
    logits, labels = np.meshgrid(logits, labels)
    return {"logits": logits.ravel(), "labels": labels.ravel()}


def _logits(reach, shifts):
    """Return logits `[n, 6]` whose margin of one class is between `-reach` and `reach`.

    Also return the index of that class.
    """
    rng = np.random.default_rng(0)
    margins = reach * np.concatenate([np.linspace(-1, 1, 17), rng.uniform(-1, 1, 8)])
    margins = np.concatenate([margins, [1e-2, 1e-4, -1e-4]])  # two classes that almost tie
    logits = rng.normal(size=(margins.size, 6)) * rng.choice([0.0, 1.0, 5.0], (margins.size, 1))
    logits[:, 0] = logits[:, 1:].max(1) + margins
    logits = np.concatenate([logits + shift for shift in shifts])
    index = np.arange(len(logits)) % 6
    return np.stack([np.roll(z, i) for z, i in zip(logits, index)]), index


def _softmax(row, logits, index):
    n, classes = logits.shape
    if row.kind == "interval":  # at class indices and between them
        fraction = np.array([0, 0.25, 0.7, 0.9])[np.arange(n) % 4]
        return {"logits": logits, "labels": np.minimum(index + fraction, classes - 1)}
    if row.kind != "distribution":
        return row.of_logits(logits, index.astype(np.int32))
    # One-hot labels, labels with much and with little smoothing, and random distributions.
    one_hot = np.eye(classes)[index]
    smoothing = np.where(np.arange(n) % 2, 0.1, 1e-3)[:, None]
    soft = np.where(one_hot == 1, 1 - smoothing, smoothing / (classes - 1))
    soft[::7] = np.random.default_rng(1).dirichlet(np.ones(classes), len(soft[::7]))
    return {"logits": np.concatenate([logits] * 2), "labels": np.concatenate([one_hot, soft])}


def _arguments(row: Row, dtype):
    """Return arguments with labels of every kind that the loss has."""
    wide = dtype == np.float64
    if row.softmax:
        arguments = _softmax(row, *(_logits(300, [0]) if wide else _logits(60, [0, 1e4, -1e4])))
    else:
        arguments = _elementwise(row, WIDE if wide else LOGITS)
    return {
        k: np.asarray(x, None if k == "labels" and row.integer else dtype)
        for k, x in arguments.items()
    }


def _settings(row: Row, *, static):
    """Return values of the options. Each exponent takes all values of `EXPONENTS`.

    Two of the static settings set the flags and leave out the optional numbers.
    """
    settings = {}
    for i in range(len(EXPONENTS)):
        setting, special = {}, static and i in (1, 4)
        for j, (name, option) in enumerate(row.options.items()):
            if option.kind == "exponent":
                setting[name] = EXPONENTS[(i + j) % len(EXPONENTS)]
            elif option.kind == "flag" and static:
                setting[name] = special
            elif option.kind == "number" and not (special and option.optional):
                setting[name] = range_of(option)[0] + 0.25
        settings[tuple(setting.items())] = setting
    return list(settings.values())


@functools.cache
def _exact(row: Row, dtype, setting, near=None):
    """Return the exact losses and derivatives of all positions.

    With `near`, the labels are those of `near_labels`.
    """
    arguments = _arguments(row, dtype)
    n, classes = len(arguments["labels"]), arguments[row.first].shape[-1]
    if row.linear:
        arguments["kernel"] = np.broadcast_to(arguments["kernel"], (n, classes, classes))
    for name, value in setting:
        option = row.options[name]
        if option.kind != "flag":
            value = np.full((n, classes) if option.per_class else (n,), value, dtype)
        arguments[name] = value
    if near is not None:
        arguments["labels"] = near_labels(row, arguments, dtype)[near]
    return truth.evaluate(row.loss, arguments, formula=row.formula)


def _scale(row: Row, name, dtype, setting):
    """Return the number that an error is relative to, at least; None for the exact number itself.

    It is larger than the exact number where terms of the exact number cancel.
    """
    exact = _exact(row, dtype, setting)
    if row.kind == "elementwise":
        # With a soft label the two sides cancel somewhere, and so do a weight that decreases and
        # a cross entropy that increases.
        scale = exact.magnitudes[name] / 10
        return np.maximum(scale, _change_near(row, dtype, setting, lambda x: x.slopes[name]))
    if row.kind == "interval":
        # Two probabilities cancel, and two cross entropies.
        return exact.magnitudes[name] / 10
    if row.kind == "distribution" and name == "logits":
        # An entry is a difference of the slopes of all classes.
        slopes = np.abs(exact.slopes[name])
        one_hot = np.max(_arguments(row, dtype)["labels"], -1, keepdims=True) == 1
        return np.where(one_hot, slopes, slopes.max(-1, keepdims=True))
    return None


def _change_near(row: Row, dtype, setting, pick):
    """Return the change of a value between the labels and `near_labels`, over the error limit."""
    here = pick(_exact(row, dtype, setting))
    labels = near_labels(row, _arguments(row, dtype), dtype)
    near = [pick(_exact(row, dtype, setting, near=i)) for i in range(len(labels))]
    change = np.max([np.abs(x - here) for x in near], 0, initial=0)
    return change / (1e-5 if dtype == np.float32 else 1e-12)


def _check(row, dtype, setting, losses, slopes, limit):
    exact = _exact(row, dtype, setting)
    tiny = float(jnp.finfo(dtype).tiny)
    assert losses.dtype == dtype
    scale = _change_near(row, dtype, setting, lambda x: x.losses)
    assert truth.worst_error(losses, exact.losses, tiny, scale) < limit, ("loss", setting)
    # Where the loss underflows, its product with a logarithm underflows too.
    tiny = np.where(np.abs(exact.losses) < tiny, 100, 1) * tiny
    for name, got in slopes.items():
        smallest = tiny
        if name == "kernel":  # products of a feature and a slope, which may underflow
            smallest = tiny[:, None] * np.maximum(1, np.abs(_arguments(row, dtype)["features"]))
        scale = _scale(row, name, dtype, setting)
        error = truth.worst_error(got, exact.slopes[name], smallest, scale)
        assert error < limit, (name, setting)


def _value_and_slopes(row, own, shared):
    """Return the losses, and the derivatives of their sum in the arguments `own`."""
    losses, transpose = jax.vjp(lambda own: row.eager(**own, **shared), own)
    return losses, transpose(jnp.ones_like(losses))[0]


def _to_60_digits(row, dtype, limit):
    if row.region:
        return _region_to_60_digits(row, dtype, limit)
    inside, integer = row.split(_arguments(row, dtype))
    shared = integer | {k: inside.pop(k) for k in ("kernel",) if k in inside}

    # One program for all settings with Python numbers.
    settings = _settings(row, static=True)

    @jax.jit
    def static(own):
        return [_value_and_slopes(row, own, shared | setting) for setting in settings]

    for setting, (losses, slopes) in zip(settings, static(inside)):
        _check(row, dtype, tuple(setting.items()), losses, slopes, limit)
    if not row.numbers:
        return None

    # Arrays as options. The derivatives in arguments that the positions share are sums, which
    # have no exact value here; so each position also gets arguments of its own, by `vmap`.
    n, classes = len(inside[row.first]), inside[row.first].shape[-1]

    @jax.jit
    def batch(own, shared):
        return _value_and_slopes(row, own, shared | integer)

    @jax.jit
    @jax.vmap
    def one(own, integer):
        return _value_and_slopes(row, own, integer)

    for setting in _settings(row, static=False):
        options = {
            k: np.full((classes,) if row.options[k].per_class else (n,), v, dtype)
            for k, v in setting.items()
        }
        per_class = {k: v for k, v in options.items() if row.options[k].per_class}
        own = inside | {k: v for k, v in options.items() if k not in per_class}
        together = {k: v for k, v in shared.items() if k == "kernel"} | per_class
        _check(row, dtype, tuple(setting.items()), *batch(own, together), limit)
        if together:
            repeated = {k: np.repeat(v[None], n, 0) for k, v in together.items()}
            _check(row, dtype, tuple(setting.items()), *one(own | repeated, integer), limit)
    return None


def _regions(dtype):
    """Yield logits and labels of regions: with small and large margins, right and partly wrong."""
    rng = np.random.default_rng(0)
    for reach in (3, 30, 80):
        one_hot = np.eye(3)[rng.integers(3, size=5)]
        for labels in (one_hot, 0.9 * one_hot + 0.1 * rng.dirichlet(np.ones(3), 5)):
            for shift in (0, 1):
                logits = rng.normal(size=(5, 3)) + reach * np.roll(one_hot, shift, 0)
                yield logits.astype(dtype), labels.astype(dtype)


def _region_to_60_digits(row, dtype, limit):
    """Compare the losses and their derivatives in the logits, which all classes share."""
    settings = _settings(row, static=True)
    tiny = float(np.finfo(dtype).tiny)

    def losses_and_slopes(logits, labels, options):
        loss = functools.partial(row.eager, labels=labels, **options)
        return loss(logits=logits), jax.jacrev(lambda z: loss(logits=z))(logits)

    @jax.jit
    def static(logits, labels):
        return [losses_and_slopes(logits, labels, setting) for setting in settings]

    traced = jax.jit(losses_and_slopes)
    for logits, labels in _regions(dtype):
        for setting, of_numbers in zip(settings, static(logits, labels)):
            options = {name: np.full(3, x, dtype) for name, x in setting.items()}
            arrays = {"logits": logits, "labels": labels} | options
            exact = truth.evaluate(row.loss, arrays, formula=row.formula)
            # An entry is a difference of the slopes of all classes.
            scale = np.abs(exact.slopes["logits"]).max(-1, keepdims=True)
            for losses, slopes in (of_numbers, traced(logits, labels, options)):
                assert losses.dtype == dtype
                assert truth.worst_error(losses, exact.losses, tiny) < limit, setting
                error = truth.worst_error(slopes, exact.slopes["logits"], 100 * tiny, scale)
                assert error < limit, setting


@pytest.mark.parametrize("smooth", [1e-3, 1e-6])
@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.region], ids=str)
def test_regions_with_an_absent_class_to_60_digits(row, smooth):
    rng = np.random.default_rng(0)
    labels = np.eye(3, dtype=np.float32)[rng.integers(2, size=20)]
    for reach in (0, 3, 30):
        logits = (rng.normal(size=(20, 3)) + [0, 0, -reach]).astype(np.float32)
        options = {k: np.float32(x.default) for k, x in row.numbers.items()}
        options = {k: np.full(3, x) for k, x in (options | {"smooth": np.float32(smooth)}).items()}
        exact = truth.evaluate(
            row.loss, {"logits": logits, "labels": labels} | options, formula=row.formula
        )
        loss = functools.partial(row.eager, labels=labels, **options)
        assert truth.worst_error(loss(logits=logits), exact.losses, 0) < 1e-5
        got = jax.jit(jax.jacrev(lambda z, f=loss: f(logits=z)))(logits)
        # An entry is a difference of the slopes of all classes.
        scale = np.abs(exact.slopes["logits"]).max((1, 2), keepdims=True)
        assert truth.worst_error(got, exact.slopes["logits"], 0, scale) < 1e-5


@pytest.mark.quick(False)
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_float32_to_60_digits(row):
    _to_60_digits(row, np.float32, 1e-5)


@pytest.mark.slow
@pytest.mark.quick(False)
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_float64_to_60_digits(row, x64):
    _to_60_digits(row, np.float64, 1e-12)


_CLASS_WEIGHTS = [
    row for row in PROGRAMS if row.softmax and row.options.get("alpha") == CLASS_WEIGHTS
]


@pytest.mark.parametrize("alpha", [[1, 0, 0], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("row", _CLASS_WEIGHTS, ids=str)
def test_class_weights_of_zero_to_60_digits(row, alpha):
    # Of every slot; the labels of a distribution also contain zeros, and some logits are equal.
    margins = np.concatenate([np.linspace(-87, 87, 13), [-0.3, 0, 0.7, 12, -12, 40]])
    n, index = margins.size, np.arange(margins.size) % 3
    logits = np.stack([margins, np.zeros(n), np.where(index, -1, 0)], 1)
    logits = np.stack([np.roll(z, i) for z, i in zip(logits, index)]).astype(np.float32)
    labels = row.labels_of(index, 3)
    if row.kind == "distribution":
        labels[1::3] /= 2
        labels[2::3, 0] += 0.25
    arrays = row.of_logits(logits, labels) | {"alpha": np.asarray(alpha, np.float32)}
    for name, option in row.numbers.items():
        if not option.per_class:
            arrays[name] = np.float32([0, 0.5, 2, 1.3])[np.arange(n) % 4]
    inside, fixed = row.split(arrays)
    losses, slopes = jax.jit(_value_and_slopes, static_argnums=0)(row, inside, fixed)
    repeated = {k: np.repeat(arrays[k][None], n, 0) for k in ("alpha", "kernel") if k in arrays}
    exact = truth.evaluate(row.loss, arrays | repeated, formula=row.formula)
    tiny = 100 * float(np.finfo(np.float32).tiny)
    assert truth.worst_error(losses, exact.losses, tiny) < 1e-5
    for name, got in slopes.items():
        want = exact.slopes[name].sum(0) if name in repeated else exact.slopes[name]
        scale = None
        if row.kind == "distribution" and name == "logits":  # a difference of slopes
            scale = np.abs(want).max(-1, keepdims=True)
        smallest = 87 * tiny if name == "kernel" else tiny
        assert truth.worst_error(got, want, smallest, scale) < 1e-5, name


@pytest.mark.parametrize("margin", [0.0, 1e-4])
@pytest.mark.parametrize("gamma", [0.0, 0.25, 2.0, "different"])
def test_asymmetric_loss_in_the_label_to_60_digits_close_to_logit_zero(gamma, margin):
    # The loss of a positive and that of a negative are almost equal there.
    z = np.float32([1e-30, 1e-6, -1e-6, -1e-3, 0.1, -0.3, 0.45, 0.7])
    positive, negative = (0.5, 0.75) if gamma == "different" else (gamma, gamma)
    options = {"gamma_positive": positive, "gamma_negative": negative, "margin": margin}
    options = {name: np.full(z.shape, x, np.float32) for name, x in options.items()}
    arrays = {"logits": z, "labels": np.full(z.shape, 0.25, np.float32)}
    row = next(row for row in PROGRAMS if row.loss.function is focal_jax.asymmetric_loss)
    exact = truth.evaluate(row.loss, arrays | options, formula=row.formula)
    _, slopes = _value_and_slopes(row, arrays, options)
    assert truth.worst_error(slopes["labels"], exact.slopes["labels"], 0) < 1e-5


def test_class_indices_above_the_integers_of_float32():
    num_classes = 2**24 + 8
    logits = jnp.zeros((1, num_classes)).at[0, 2**24].set(10.0)
    losses = jax.jit(focal_jax.softmax_focal_loss_with_integer_labels, static_argnames="gamma")
    got = losses(logits, jnp.array([2**24 + 1]), gamma=0)
    np.testing.assert_allclose(got, np.log(num_classes - 1 + np.exp(10)), rtol=1e-6)


@pytest.mark.parametrize("row", LOSSES, ids=str)
def test_moderate_values_equal_the_reference(row):
    # For moderate logits the formula as written is accurate.
    cases = []
    for shape in ((7,), (3, 4), (2, 3, 4, 5)):
        axes = row.axes(len(shape))
        axis = axes[len(axes) // 2]
        arguments = row.all(1, shape, axis, scale=1.0)
        static = row.axis(axis)
        arrays = {k: x for k, x in arguments.items() if k not in static}
        cases.append((arrays, static, row.losses_shape(shape, axis)))

    @jax.jit
    def both(arrays):
        calls = [x | static for x, (_, static, _) in zip(arrays, cases)]
        return [row.eager(**x) for x in calls], [row.reference(**x) for x in calls]

    got, want = both([arrays for arrays, *_ in cases])
    assert [x.shape for x in got] == [shape for *_, shape in cases]
    assert_close(got, want, 1e-5)


# ---------------------------------------------------------------- published values
# Inputs and results as printed in the tests and the documentation of other projects.


def test_every_loss_has_published_values():
    assert test_family.PUBLISHED  # importing the module registers its losses
    assert set(catalogue.LOSSES) == WITH_PUBLISHED_VALUES


_MMCV = [  # tests/test_ops/test_focal_loss.py: alpha 0.25, gamma 2, mean over the rows
    ([[1.0, 0], [0, 1.0]], [0, 1]),
    ([[1.0, 0, -1.0], [0, 1.0, 2.0]], [2, 1]),
    ([[1e-6, 2e-6, 3e-6], [4e-6, 5e-5, 6e-4], [7e-3, 8e-2, 9e-1]], [1, 2, 0]),
]
_MMCV_SOFTMAX = [
    (0.00566451, [[-0.00657264, 0.00657264], [0.00657264, -0.00657264]]),
    (0.34956908, [[0.10165970, 0.03739851, -0.13905823], [0.01227554, -0.10298023, 0.09070466]]),
    (
        0.15754992,
        [
            [0.02590877, -0.05181759, 0.02590882],
            [0.02589641, 0.02589760, -0.05179400],
            [-0.07307514, 0.02234372, 0.05073142],
        ],
    ),
]
_MMCV_SIGMOID = [
    (0.13562961, [[-0.00657264, 0.11185755], [0.11185755, -0.00657264]]),
    (1.10251057, [[0.28808805, 0.11185755, -0.09602935], [0.11185755, -0.00657264, 0.40376765]]),
    (
        0.42287254,
        [
            [0.07457182, -0.02485716, 0.07457201],
            [0.07457211, 0.07457669, -0.02483728],
            [-0.02462499, 0.08277918, 0.18050370],
        ],
    ),
]


@published_values_of(
    "sigmoid_focal_loss",
    "softmax_focal_loss_with_integer_labels",
    "linear_softmax_focal_loss_with_integer_labels",
)
@pytest.mark.parametrize("case", range(3))
def test_mmcv(case):
    logits, labels = (jnp.asarray(x) for x in _MMCV[case])
    rows, classes = logits.shape

    def softmax(z):
        losses = focal_jax.softmax_focal_loss_with_integer_labels(z, labels, alpha=0.25)
        return focal_jax.reduce_loss(losses)

    def linear(z):
        losses = focal_jax.linear_softmax_focal_loss_with_integer_labels(
            z, jnp.eye(classes), labels, alpha=0.25
        )
        return focal_jax.reduce_loss(losses)

    def sigmoid(z):
        losses = focal_jax.sigmoid_focal_loss(z, jax.nn.one_hot(labels, classes), alpha=0.25)
        return focal_jax.reduce_loss(losses, normalization=rows)

    for function, (loss, gradient) in (
        (softmax, _MMCV_SOFTMAX[case]),
        (linear, _MMCV_SOFTMAX[case]),
        (sigmoid, _MMCV_SIGMOID[case]),
    ):
        want = (np.asarray(loss), np.asarray(gradient))
        assert_close(jax.value_and_grad(function)(logits), want, 2e-6)


@published_values_of("softmax_focal_loss", "sigmoid_focal_loss")
def test_keras():
    # Docstrings of categorical_focal_crossentropy and binary_focal_crossentropy.
    p = jnp.array([[0.05, 0.9, 0.05], [0.1, 0.85, 0.05]])
    y = jnp.array([[0, 1, 0], [0, 0, 1]])
    got = focal_jax.softmax_focal_loss(jnp.log(p), y, alpha=0.25)
    np.testing.assert_allclose(got, [2.63401289e-04, 6.75912094e-01], rtol=1e-6)
    p, y = jnp.array([[0.6, 0.4], [0.4, 0.6]]), jnp.array([[0, 1], [0, 0]])
    got = focal_jax.sigmoid_focal_loss(jnp.log(p / (1 - p)), y).mean(-1)
    np.testing.assert_allclose(got, [0.330, 0.206], atol=6e-4)


def test_monai():
    # tests/test_focal_loss.py, test_foreground: the mean with and without channel 0.
    logits = jnp.stack([jnp.ones((5, 5)), jnp.zeros((5, 5))])
    labels = logits.at[:, 2, 2].set(jnp.array([0.0, 1.0]))
    losses = focal_jax.sigmoid_focal_loss(logits, labels)
    np.testing.assert_allclose(losses.mean(), 0.1116, atol=5e-5)
    np.testing.assert_allclose(losses[1].mean(), 0.1733, atol=5e-5)


def test_tensorflow_addons():
    # focal_loss_test.py: the order of magnitude of the cross entropy over the focal loss.
    p = jnp.array([0.97, 0.91, 0.73, 0.27, 0.09, 0.03])
    labels = jnp.array([1, 1, 1, 0, 0, 0])
    logits = jnp.log(p / (1 - p))
    focal = focal_jax.sigmoid_focal_loss(logits, labels)
    ratio = focal_jax.sigmoid_focal_loss(logits, labels, gamma=0) / focal
    assert (10 ** np.floor(np.log10(ratio))).tolist() == [1000, 100, 10, 10, 100, 1000]


def test_scenic():
    # test_model_utils.py: alpha 0.25 and gamma 2, with the formula written out.
    logits = np.arange(1.0, 7.0).reshape(2, 3)
    labels = np.array([[0, 1, 1], [1, 0, 1]])
    x = np.where(labels == 1, logits, -logits)
    want = np.where(labels == 1, 0.25, 0.75) * (1 / (1 + np.exp(x))) ** 2 * np.log1p(np.exp(-x))
    assert_close(focal_jax.sigmoid_focal_loss(logits, labels, alpha=0.25), want, 1e-6)


def test_sigmoid_focal_loss_passes_the_tests_of_optax(monkeypatch, jax_defaults):
    # optax ships its tests. They run here with this package's function.
    tests = importlib.import_module("optax.losses._classification_test")
    module = tests._classification
    monkeypatch.setattr(module, "sigmoid_focal_loss", focal_jax.sigmoid_focal_loss)
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(tests.SigmoidFocalLossTest)
    result = unittest.TestResult()
    suite.run(result)
    assert not result.errors + result.failures
    assert result.testsRun > 5
