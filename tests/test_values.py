"""Values and gradients are right to the last digits, against things we did not write."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from helpers import GAMMAS, LOSSES, assert_close, ids

import focal_jax

TINY = float(jnp.finfo(jnp.float32).tiny)
MARGINS = np.concatenate([np.linspace(-87, 87, 59), [0, 1e-6, -1e-3, 0.3, -0.7]])


def _value_and_gradients(function, *args):
    """Return the losses and the gradients of their sum."""
    losses, vjp = jax.vjp(function, *args)
    return losses, *vjp(jnp.ones_like(losses))


@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
def test_sigmoid_to_60_digits(traced):
    labels, logits = np.float32([1.0, 0.0, 0.9, 0.3, 1 - 2**-20]), MARGINS.astype(np.float32)
    labels, logits = (x.ravel() for x in np.meshgrid(labels, logits))
    for gamma in GAMMAS:
        exponent = jnp.float32(gamma) if traced else gamma

        def loss(logits, exponent=exponent):
            return focal_jax.sigmoid_focal_loss(logits, labels, alpha=0.25, gamma=exponent)

        want = truth.sigmoid(logits, labels, gamma, 0.25)
        got = _value_and_gradients(loss, logits)
        for a, b in zip(got, want[:2]):
            assert truth.relative_error(a, b, TINY) < 1e-5, gamma


def _rows(shift):
    """Return rows of logits whose first class has a margin of -60 to 60."""
    rng = np.random.default_rng(0)
    margins = np.concatenate([np.linspace(-60, 60, 25), rng.uniform(-60, 60, 10)])
    rows = rng.normal(size=(margins.size, 6)) * rng.choice([0.0, 1.0, 5.0], (margins.size, 1))
    rows[:, 0] = rows[:, 1:].max(1) + margins
    return (rows + shift).astype(np.float32)


@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
def test_softmax_to_60_digits(traced):
    logits = np.concatenate([_rows(shift) for shift in (0.0, 1e4, -1e4)])
    labels = np.zeros(len(logits), np.int32)
    one_hot = np.eye(logits.shape[1], dtype=np.float32)[labels]
    for gamma in GAMMAS:
        exponent = jnp.float32(gamma) if traced else gamma
        rows = [truth.softmax(z, y, gamma) for z, y in zip(logits, one_hot)]
        losses, gradients, per_class = (np.array(part, dtype=object) for part in zip(*rows))

        def hard(z, exponent=exponent):
            return focal_jax.softmax_focal_loss_with_integer_labels(z, labels, gamma=exponent)

        def soft(z, y, exponent=exponent):
            return focal_jax.softmax_focal_loss(z, y, gamma=exponent)

        got_hard = _value_and_gradients(hard, logits)
        got_soft = _value_and_gradients(soft, logits, one_hot)
        for a, b in zip(got_hard + got_soft, [losses, gradients, losses, gradients, per_class]):
            assert truth.relative_error(a, b, TINY) < 1e-5, gamma


@pytest.mark.parametrize("smoothing", [0.1, 1e-3])
def test_softmax_of_a_distribution_to_60_digits(smoothing):
    # The entries of a soft gradient may cancel: they are right relative to their row.
    logits = _rows(0.0)
    labels = np.full(logits.shape, smoothing / 5, np.float32)
    labels[:, 0] = 1 - smoothing
    for gamma in GAMMAS:

        def loss(z, y, gamma=gamma):
            return focal_jax.softmax_focal_loss(z, y, gamma=gamma)

        losses, gradients, label_gradients = _value_and_gradients(loss, logits, labels)
        rows = [truth.softmax(z, y, gamma) for z, y in zip(logits, labels)]
        assert truth.relative_error(losses, [row[0] for row in rows], TINY) < 1e-5
        for got, row in zip(np.asarray(gradients, np.float64), rows):
            want = row[1].astype(np.float64)
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
        want = np.concatenate([row[2] for row in rows])
        assert truth.relative_error(label_gradients, want, TINY) < 1e-5


def test_float64_to_60_digits(x64):
    logits = np.linspace(-300, 300, 41)
    labels = np.ones_like(logits)
    rows = np.stack([logits, np.zeros_like(logits), np.ones_like(logits)], 1)
    one_hot = np.eye(3)[np.zeros(len(rows), int)]
    tiny = float(jnp.finfo(jnp.float64).tiny)
    for gamma in GAMMAS:
        got = _value_and_gradients(
            lambda z, g=gamma: focal_jax.sigmoid_focal_loss(z, labels, gamma=g), logits
        )
        for a, b in zip(got, truth.sigmoid(logits, labels, gamma)[:2]):
            assert a.dtype == jnp.float64
            assert truth.relative_error(a, b, tiny) < 1e-13
        want = [truth.softmax(z, y, gamma) for z, y in zip(rows, one_hot)]
        for function, y in (
            (focal_jax.softmax_focal_loss, one_hot),
            (focal_jax.softmax_focal_loss_with_integer_labels, np.zeros(len(rows), int)),
        ):
            got = _value_and_gradients(lambda z, f=function, y=y, g=gamma: f(z, y, gamma=g), rows)
            for a, b in zip(got, zip(*want)):
                assert truth.relative_error(a, np.array(b, dtype=object), tiny) < 1e-13


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_the_plain_formula(loss):
    # Where the textbook formula does not lose digits, the two agree.
    for shape, axis in (((7,), -1), ((3, 4), 0), ((2, 3, 4, 5), 1)):
        logits, labels = loss.inputs(1, shape, axis, scale=1.0)
        for gamma in GAMMAS:
            options = {"gamma": gamma, "alpha": 0.3, **loss.axis(axis)}
            got = loss.ours(logits, labels, **options)
            assert got.shape == loss.positions(shape, axis)
            assert_close(got, loss.reference(logits, labels, **options), 1e-5)


# ------------------------------------------------------------ peers' published figures
# Inputs and results as the projects' own tests and documentation print them.

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


@pytest.mark.parametrize("case", range(3))
def test_mmcv(case):
    logits, labels = (jnp.asarray(x) for x in _MMCV[case])
    rows, classes = logits.shape

    def softmax(z):
        losses = focal_jax.softmax_focal_loss_with_integer_labels(z, labels, alpha=0.25)
        return focal_jax.reduce_loss(losses)

    def sigmoid(z):
        losses = focal_jax.sigmoid_focal_loss(z, jax.nn.one_hot(labels, classes), alpha=0.25)
        return focal_jax.reduce_loss(losses, normalization=rows)

    for function, (loss, gradient) in (
        (softmax, _MMCV_SOFTMAX[case]),
        (sigmoid, _MMCV_SIGMOID[case]),
    ):
        want = (np.asarray(loss), np.asarray(gradient))
        assert_close(jax.value_and_grad(function)(logits), want, 2e-6)


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
