"""Values and gradients are right to the last digits, against things we did not write."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_family
import truth
from helpers import EXPONENTS, LOSSES, OUTSIDE, Row, assert_close, figure_of, near_labels

import focal_jax
from focal_jax import _catalogue

# ---------------------------------------------------------------- 60 digits

LOGITS = np.concatenate([np.linspace(-87, 87, 31), [0, 1e-6, -1e-6, -1e-3, 0.3, -0.7, 12, -12]])
WIDE = np.concatenate([np.linspace(-300, 300, 31), [1e-6, -1e-6, -1e-3, 0.3, -0.7, 12, -12]])
SOFT = [1e-4, 0.3, 0.5, 0.9, 1 - 1e-4, 1 - 2**-20]


def _elementwise(row, logits):
    logits, labels = np.meshgrid(logits, SOFT if row.soft else [0, 1])
    return {"logits": logits.ravel(), "labels": labels.ravel()}


def _rows(reach, shifts):
    """Return rows of logits whose first class has a margin of -`reach` to `reach`."""
    rng = np.random.default_rng(0)
    margins = reach * np.concatenate([np.linspace(-1, 1, 17), rng.uniform(-1, 1, 8)])
    rows = rng.normal(size=(margins.size, 6)) * rng.choice([0.0, 1.0, 5.0], (margins.size, 1))
    rows[:, 0] = rows[:, 1:].max(1) + margins
    return np.concatenate([rows + shift for shift in shifts])


def _softmax(row, logits):
    n, classes = logits.shape
    true = np.arange(n) % classes
    logits = np.stack([np.roll(z, t) for z, t in zip(logits, true)])
    if row.integer:
        return row.of_logits(logits, true.astype(np.int32))
    labels = np.eye(classes)[true]
    if row.soft:  # smoothed by much and by little, and anything
        smoothing = np.where(np.arange(n) % 2, 0.1, 1e-3)[:, None]
        labels = np.where(labels == 1, 1 - smoothing, smoothing / (classes - 1))
        labels[::7] = np.random.default_rng(1).dirichlet(np.ones(classes), len(labels[::7]))
    return {"logits": logits, "labels": labels}


def _arguments(row: Row, dtype):
    """Return the positions at which the digits are counted."""
    wide = dtype == np.float64
    if row.softmax:
        arguments = _softmax(row, _rows(300, [0]) if wide else _rows(60, [0, 1e4, -1e4]))
    else:
        arguments = _elementwise(row, WIDE if wide else LOGITS)
    return {
        k: np.asarray(x, None if k == "labels" and row.integer else dtype)
        for k, x in arguments.items()
    }


def _settings(row: Row, complete):
    """Return what the options are set to: each exponent to all its values.

    What a loss can do without is left out every other time, unless they are to be complete.
    """
    out = []
    for i in range(len(EXPONENTS)):
        numbers = {}
        for j, (name, option) in enumerate(row.options.items()):
            if option.exponent:
                numbers[name] = EXPONENTS[(i + j) % len(EXPONENTS)]
            elif option.default is not None or complete or i % 2 == 0:
                numbers[name] = option.low + 0.25
        out.append(numbers)
    return out


@functools.cache
def _truth(row: Row, dtype, setting, near=None):
    """Return the losses and the derivatives of every position, with the sizes of their terms.

    With `near` they are those of labels that are wrong in their last digits.
    """
    arguments = _arguments(row, dtype)
    n, classes = len(arguments["labels"]), arguments[row.first].shape[-1]
    if row.linear:
        arguments["kernel"] = np.broadcast_to(arguments["kernel"], (n, classes, classes))
    for name, value in setting:
        shape = (n, classes) if row.options[name].per_class else (n,)
        arguments[name] = np.full(shape, value, dtype)
    if near is not None:
        arguments["labels"] = near_labels(row, arguments, dtype)[near]
    return truth.evaluate(row.loss, arguments)


def _scale(row: Row, name, dtype, setting, want):
    """Return what an error is relative to where terms cancel by nature, None elsewhere."""
    if name == row.first and row.labels == "distribution":
        # The entries of a gradient are differences of the slopes of all the classes.
        return np.abs(want).max(-1, keepdims=True)
    if row.loss.kind == "elementwise":
        # The sides that a soft label weighs cancel somewhere, and so do a weight that falls
        # and a loss that rises.
        sizes = _truth(row, dtype, setting).sizes[name] / 10
        return np.maximum(sizes, _moved(row, dtype, setting, lambda found: found.slopes[name]))
    return None


def _moved(row: Row, dtype, setting, what):
    """Return how far something moves with labels that are wrong in their last digits, in 1e-5."""
    here = what(_truth(row, dtype, setting))
    labels = near_labels(row, _arguments(row, dtype), dtype)
    near = [what(_truth(row, dtype, setting, near=i)) for i in range(len(labels))]
    error = np.max([np.abs(x - here) for x in near], 0, initial=0)
    return error / (1e-5 if dtype == np.float32 else 1e-12)


def _check(row, dtype, setting, losses, slopes, limit):
    values, want, _ = _truth(row, dtype, setting)
    tiny = float(jnp.finfo(dtype).tiny)
    assert losses.dtype == dtype
    scale = _moved(row, dtype, setting, lambda found: found.losses)
    assert truth.worst_error(losses, values, tiny, scale) < limit, ("loss", setting)
    # Where the loss underflows so does its product with a logarithm.
    tiny = np.where(np.abs(values) < tiny, 100, 1) * tiny
    for name, got in slopes.items():
        scale, least = _scale(row, name, dtype, setting, want[name]), tiny
        if name == "kernel":  # the products of a feature and a slope, which may underflow
            least = tiny[:, None] * np.maximum(1, np.abs(_arguments(row, dtype)["features"]))
        assert truth.worst_error(got, want[name], least, scale) < limit, (name, setting)


def _value_and_slopes(row, own, shared):
    """Return the losses, and their sum's derivatives in what has an entry a position."""
    losses, transpose = jax.vjp(lambda own: row.eager(**own, **shared), own)
    return losses, transpose(jnp.ones_like(losses))[0]


def _to_60_digits(row, dtype, limit):
    inside, integer = row.split(_arguments(row, dtype))
    shared = integer | {k: inside.pop(k) for k in ("kernel",) if k in inside}

    # Python numbers, and every structure that goes with them, in one program.
    settings = _settings(row, complete=False)

    @jax.jit
    def static(own):
        return [_value_and_slopes(row, own, shared | setting) for setting in settings]

    for setting, (losses, slopes) in zip(settings, static(inside)):
        _check(row, dtype, tuple(setting.items()), losses, slopes, limit)

    # Arrays, each position with its own: the derivatives in what positions share have no sum.
    n, classes = len(inside[row.first]), inside[row.first].shape[-1]

    @jax.jit
    def batch(own, shared):
        return _value_and_slopes(row, own, shared | integer)

    @jax.jit
    @jax.vmap
    def one(own, integer):
        losses, slopes = _value_and_slopes(row, own, integer)
        return losses, slopes

    for setting in _settings(row, complete=True):
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


@pytest.mark.parametrize("row", LOSSES, ids=str)
def test_float32_to_60_digits(row):
    _to_60_digits(row, np.float32, 1e-5)


@pytest.mark.parametrize("row", LOSSES, ids=str)
def test_float64_to_60_digits(row, x64):
    _to_60_digits(row, np.float64, 1e-12)


@pytest.mark.parametrize("row", LOSSES, ids=str)
def test_the_plain_formula(row):
    # Where the textbook formula does not lose digits, the two agree.
    for shape in ((7,), (3, 4), (2, 3, 4, 5)):
        axes = row.axes(len(shape))
        axis = axes[len(axes) // 2]
        arguments = row.all(1, shape, axis, scale=1.0)
        got = row.ours(**arguments)
        assert got.shape == row.positions(shape, axis)
        assert_close(got, row.plain(**arguments), 1e-5)


# ------------------------------------------------------------ peers' published figures
# Inputs and results as the projects' own tests and documentation print them.


def test_every_loss_has_a_figure_from_outside():
    assert test_family.FIGURES  # whose module has been read, and counts its own
    assert {loss.name for loss in _catalogue.LOSSES} == OUTSIDE


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


@figure_of(
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


@figure_of("softmax_focal_loss", "sigmoid_focal_loss")
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
    # focal_loss_test.py: the order of magnitude by which focal loss is below cross entropy.
    p = jnp.array([0.97, 0.91, 0.73, 0.27, 0.09, 0.03])
    labels = jnp.array([1, 1, 1, 0, 0, 0])
    logits = jnp.log(p / (1 - p))
    focal = focal_jax.sigmoid_focal_loss(logits, labels)
    ratio = focal_jax.sigmoid_focal_loss(logits, labels, gamma=0) / focal
    assert (10 ** np.floor(np.log10(ratio))).tolist() == [1000, 100, 10, 10, 100, 1000]


def test_scenic():
    # test_model_utils.py: alpha 0.25, gamma 2 on the logits 1 to 6, worked out by hand.
    logits = np.arange(1.0, 7.0).reshape(2, 3)
    labels = np.array([[0, 1, 1], [1, 0, 1]])
    x = np.where(labels == 1, logits, -logits)
    want = np.where(labels == 1, 0.25, 0.75) * (1 / (1 + np.exp(x))) ** 2 * np.log1p(np.exp(-x))
    assert_close(focal_jax.sigmoid_focal_loss(logits, labels, alpha=0.25), want, 1e-6)


def test_optax_own_tests_pass_with_this_function():
    # optax ships its tests: they run here on this library's sigmoid focal loss.
    code = (
        "import sys, focal_jax\n"
        "from absl.testing import absltest\n"
        "from optax.losses import _classification, _classification_test\n"
        "_classification.sigmoid_focal_loss = focal_jax.sigmoid_focal_loss\n"
        "SigmoidFocalLossTest = _classification_test.SigmoidFocalLossTest\n"
        "absltest.main(argv=sys.argv)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stderr.split("Ran ")[1].split()[0]) > 5, result.stderr
