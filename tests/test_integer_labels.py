"""Tests of the options of the losses of class indices: log-sum-exp and label smoothing.

Every test runs with an array of logits and with the logits of the linear head.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads import (
    CLASSES,
    POSITIONS,
    dense,
    directional_derivative,
    engine_dense,
    engine_linear,
    formula,
    inputs,
    linear,
    product,
    softmax,
    total,
    value_and_gradients,
)
from helpers import assert_close
from jax import lax
from truth import evaluate, worst_error

import focal_jax
from focal_jax import reference
from focal_jax.catalogue import LOSSES

pytestmark = pytest.mark.quick

LOSS = focal_jax.softmax_focal_loss_with_integer_labels
LINEAR_LOSS = focal_jax.linear_softmax_focal_loss_with_integer_labels
HEADS = [pytest.param(softmax, id="softmax"), pytest.param(linear, id="linear")]
NAMES = [name for name, loss in LOSSES.items() if loss.kind == "position"]
SMOOTHED = [name for name in NAMES if name != "dual_focal_loss_with_integer_labels"]


# ---------------------------------------------------------------- return_logsumexp


@pytest.mark.parametrize("head", HEADS)
def test_logsumexp_equals_that_of_the_logits(head):
    arrays, labels = inputs(1, scale=3.0)
    arrays = arrays[:3]
    labels = labels.at[0, 0].set(CLASSES).at[1, 1].set(-3)
    losses, got = head(*arrays, labels, return_logsumexp=True, ignore_label=-3)
    np.testing.assert_array_equal(losses, head(*arrays, labels, ignore_label=-3))
    assert np.isnan(losses[0, 0])  # an invalid label; the log-sum-exp does not depend on the label
    want = jax.nn.logsumexp(product(*arrays), -1)
    assert_close(got, want.at[1, 1].set(0), 1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in NAMES] + [(name, {"label_smoothing": 0.1}) for name in SMOOTHED],
    ids=str,
)
def test_logsumexp_of_every_loss(name, options):
    arrays, labels = inputs(2)
    head = dense(getattr(focal_jax, name))
    losses, got = head(*arrays[:3], labels, return_logsumexp=True, **options)
    assert_close(losses, head(*arrays[:3], labels, **options), 1e-6)
    assert_close(got, jax.nn.logsumexp(product(*arrays[:3]), -1), 1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("head", HEADS)
def test_gradients_of_a_z_loss(head, smoothing):
    arrays, labels = inputs(2)
    where = jnp.ones(POSITIONS, bool).at[2].set(False)
    if head is linear:  # the NaN would reach the kernel's gradient through `features @ kernel`
        arrays[0] = arrays[0].at[2].set(jnp.nan)
    options = {"label_smoothing": smoothing}
    got = value_and_gradients(head, arrays, labels, return_logsumexp=True, where=where, **options)

    def z_loss(features, kernel, bias, alpha, gamma):
        features = jnp.where(where[..., None], features, 0)
        losses = formula(features, kernel, bias, labels, alpha=alpha, gamma=gamma, **options)
        log_sum_exp = jax.nn.logsumexp(product(features, kernel, bias), -1)
        return jnp.sum(jnp.where(where, losses**2 + log_sum_exp**2, 0))

    assert_close(got, jax.jit(jax.value_and_grad(z_loss, range(5)))(*arrays), 1e-5)


@pytest.mark.quick(False)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logsumexp_is_accurate_close_to_zero(smoothing, x64):
    # For a margin of at least 0 the largest logit is 0, and the log-sum-exp is log(1 + rest).
    for margin in (-80.0, 0.0, 12.0, 25.0, 80.0):
        logits = np.array([[0.0, -margin, -margin - 1]])
        top = np.max(logits)
        want = top + np.log1p(np.sum(np.sort(np.exp(logits - top))[0, :-1]))
        for label in range(3):
            _, got = LOSS(
                jnp.asarray(logits, jnp.float32),
                jnp.array([label]),
                return_logsumexp=True,
                label_smoothing=smoothing,
            )
            # Without smoothing the error is relative if the label's class has the largest logit.
            # Otherwise it is relative to the exponential of the largest logit, which is 1.
            exact = smoothing > 0 or logits[0, label] == top
            np.testing.assert_allclose(got, [want], rtol=1e-6, atol=0 if exact else 1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["dense", "linear"])
def test_gradient_of_the_logsumexp_keeps_its_digits(name, smoothing):
    # Of every class, from margin -87 to 87 of the label's class, also with a weight of 0.
    margins = np.concatenate([np.linspace(-87, 87, 30), [-0.3, 0, 1e-3, 0.7]])
    logits = np.stack([margins, np.zeros_like(margins), np.full_like(margins, -3)], 1)
    logits, labels = logits.astype(np.float32), jnp.zeros(margins.size, jnp.int32)
    options = {"return_logsumexp": True, "label_smoothing": smoothing, "alpha": jnp.arange(3.0)}

    def total(x):
        dense = name == "dense"
        outputs = (
            LOSS(x, labels, **options) if dense else LINEAR_LOSS(x, jnp.eye(3), labels, **options)
        )
        return jnp.sum(outputs[1])

    wide = logits.astype(np.float64)
    want = np.exp(wide - np.logaddexp.reduce(wide, -1)[:, None])
    assert worst_error(jax.jit(jax.grad(total))(logits), want, np.finfo(np.float32).tiny) < 1e-5


# ---------------------------------------------------------------- label smoothing


def _of_smooth_labels(features, kernel, bias, labels, *, label_smoothing, ignore_label, **options):
    """Return the losses of smoothed labels, as a distribution over the classes."""
    logits = product(features, kernel, bias)
    one_hot = jax.nn.one_hot(labels, CLASSES, dtype=logits.dtype)
    smooth = (1 - label_smoothing) * one_hot + label_smoothing / CLASSES
    return focal_jax.softmax_focal_loss(logits, smooth, where=labels != ignore_label, **options)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("smoothing", [1e-3, 0.1, 0.9])
def test_smoothing_equals_the_loss_of_smooth_labels(head, smoothing):
    arrays, labels = inputs(11, scale=2.0)
    options = {"label_smoothing": smoothing, "ignore_label": int(labels[0, 0])}
    got = value_and_gradients(head, arrays, labels, **options)
    assert_close(got, value_and_gradients(_of_smooth_labels, arrays, labels, **options), 1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_smoothing_equals_the_formula(head, x64):
    arrays, labels = inputs(11, dtype=np.float64, scale=2.0)
    options = {"label_smoothing": 0.01, "ignore_label": int(labels[0, 0])}
    want = value_and_gradients(formula, arrays, labels, **options)
    assert_close(value_and_gradients(head, arrays, labels, **options), want, 1e-9)


@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothing_of_every_loss_equals_its_formula(name, x64):
    arrays, labels = inputs(12, dtype=np.float64, scale=2.0)
    labels = labels.at[3, 0].set(CLASSES)
    options = {"label_smoothing": 0.1, "ignore_label": CLASSES, "return_logsumexp": True}
    got, want = (
        value_and_gradients(dense(getattr(module, name)), arrays, labels, **options)
        for module in (focal_jax, reference)
    )
    assert_close(got, want, 1e-9)


@pytest.mark.parametrize("head", [engine_dense, engine_linear], ids=["dense", "linear"])
def test_smoothing_is_a_weighted_sum_over_the_classes(head):
    arrays, labels = inputs(13, scale=2.0)
    got = value_and_gradients(head, arrays, labels, label_smoothing=0.3)

    def definition(features, kernel, bias, labels, **options):
        of_labels = functools.partial(head, features, kernel, bias, **options)
        every_class = jnp.broadcast_to(jnp.arange(CLASSES)[:, None, None], (CLASSES, *POSITIONS))
        return 0.7 * of_labels(labels) + 0.3 * jnp.mean(jax.vmap(of_labels)(every_class), 0)

    assert_close(got, value_and_gradients(definition, arrays, labels), 1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_second_derivatives_of_smoothed_losses(head, x64):
    arrays, labels = inputs(12, dtype=np.float64)
    direction = jax.tree.map(jnp.cos, arrays)

    def second(head):
        function = total(head, labels, label_smoothing=0.2, return_logsumexp=True)
        return jax.jit(jax.grad(directional_derivative(function, direction), range(5)))(*arrays)

    assert_close(second(head), second(formula), 1e-8)


@pytest.mark.parametrize("head", HEADS)
def test_second_derivatives_with_equal_logits(head, x64):
    arrays, labels = inputs(15, dtype=np.float64)
    features, kernel, bias, *others = arrays
    # Three classes, in two chunks, have one logit, which is the largest for most positions.
    equal = jnp.array([0, 1, 7], jnp.int32)
    kernel, bias = kernel.at[:, equal].set(kernel[:, :1]), bias.at[equal].set(2.0)
    features = features.at[0].set(0)  # without roundings
    arrays = [features, kernel, bias, *others]
    labels = labels.at[0].set(equal)
    direction = jax.tree.map(jnp.cos, arrays)

    def second(head):
        function = total(head, labels, label_smoothing=0.2, return_logsumexp=True)
        gradient = jax.grad(function, range(5))

        def both(*arrays):
            reverse = jax.grad(directional_derivative(function, direction), range(5))(*arrays)
            return reverse, jax.jvp(gradient, arrays, tuple(direction))[1]

        return jax.jit(both)(*arrays)

    assert_close(second(head), second(formula), 1e-8)


@pytest.mark.parametrize("head", HEADS)
def test_invalid_labels_make_smoothed_losses_nan_at_their_position(head):
    (features, kernel, bias, *_), labels = inputs(13)
    invalid = labels.at[1, 2].set(CLASSES)

    def both(labels):
        def total(features):
            losses = head(features, kernel, bias, labels, label_smoothing=0.1)
            return jnp.sum(losses), losses

        return jax.jit(jax.grad(total, has_aux=True))(features)

    gradient, losses = both(invalid)
    assert np.array_equal(np.isnan(losses), invalid == CLASSES)
    assert_close(gradient, both(labels)[0].at[1, 2].set(jnp.nan), 1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_class_at_minus_infinity_counts_unless_its_weight_is_zero(head):
    (features, kernel, bias, alpha, _), labels = inputs(14)
    labels, bias = labels % 7, bias.at[7].set(-jnp.inf)
    assert np.all(np.isinf(head(features, kernel, bias, labels, label_smoothing=0.1)))

    def total(features, kernel, bias, alpha):
        options = {"alpha": alpha.at[7].set(0), "label_smoothing": 0.1}
        return jnp.sum(head(features, kernel, bias, labels, **options))

    value, gradients = jax.jit(jax.value_and_grad(total, range(4)))(features, kernel, bias, alpha)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in gradients)
    assert np.all(gradients[1][:, 7] == 0)


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, np.nan, True, "0.1", None])
def test_invalid_smoothing(value):
    (features, kernel, bias, *_), labels = inputs()
    for head in (linear, softmax, formula):
        with pytest.raises(ValueError, match=r"label_smoothing: got .*, wanted a number in"):
            head(features, kernel, bias, labels, label_smoothing=value)


# ---------------------------------------------------------------- accuracy of label smoothing


@pytest.mark.slow
@pytest.mark.quick(False)
@pytest.mark.parametrize("gamma", [0, 0.5, 1, 1.3, 2.0, 3, 5])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_smoothing_from_margin_minus_80_to_80(gamma, dtype):
    margins = np.array([-80, -30, -17, -10, -3, -1, 0, 0.5, 2, 6, 12, 17, 30, 80], np.float32)
    logits = jnp.stack([margins, jnp.zeros(margins.size), jnp.full(margins.size, -1.0)], 1)
    logits, labels = logits.astype(dtype), jnp.zeros(margins.size, jnp.int32)
    smooth = 0.9 * jax.nn.one_hot(labels, 3) + 0.1 / 3

    def both(loss, labels, **options):
        def total(logits):
            losses = loss(logits, labels, gamma=gamma, **options)
            return jnp.sum(losses), losses

        gradient, losses = jax.jit(jax.grad(total, has_aux=True))(logits)
        return losses, gradient.astype(np.float32)

    got = both(LOSS, labels, label_smoothing=0.1)
    want = both(focal_jax.softmax_focal_loss, smooth)
    assert_close(got[0], want[0], 1e-5, 0)
    assert_close(got[1], want[1], 1e-5 if dtype is np.float32 else 0.01, 1e-7)


def _dense(logits, alpha, gamma, labels):
    return LOSS(logits, labels, alpha=alpha, gamma=gamma, label_smoothing=0.1)


def _linear(chunk_size):
    def losses(logits, alpha, gamma, labels):
        return LINEAR_LOSS(
            logits,
            jnp.eye(logits.shape[-1]),
            labels,
            alpha=alpha,
            gamma=gamma,
            label_smoothing=0.1,
            chunk_size=chunk_size,
        )

    return losses


def _sharded(logits, alpha, gamma, labels):
    """Return the losses of classes that are sharded, with one class per shard."""

    def of_shard(logits):
        options = {"label_smoothing": 0.1, "class_axis_name": "model"}
        return LOSS(logits, labels, alpha=alpha, gamma=gamma, **options)

    return jax.vmap(of_shard, in_axes=1, axis_name="model")(logits[..., None])[0]


def _errors(losses, logits, alpha, gamma, relative):
    """Return the errors of smoothed losses and of their gradients in logits, alpha and gamma.

    Args:
      losses: the losses as a function of logits, alpha, gamma and labels.
      logits: the logits; the labels are class 0.
      alpha: the class weights.
      gamma: a Python number, or one exponent per position.
      relative: whether errors are relative to the exact derivatives, and not to the sum of the
        absolute values of their terms.
    """
    positions, classes = logits.shape
    labels, static = jnp.zeros(positions, jnp.int32), isinstance(gamma, int | float)

    def losses_and_gradients(logits, alpha, gammas):
        def total(logits, alpha, gammas):
            found = losses(logits, alpha, gamma if static else gammas, labels)
            return jnp.sum(found), found

        gradients, found = jax.grad(total, (0, 1, 2), has_aux=True)(logits, alpha, gammas)
        return found, *gradients

    gammas = np.full(positions, gamma, np.float32) if static else gamma
    found, *gradients = jax.jit(losses_and_gradients)(logits, alpha, gammas)
    arrays = {
        "logits": logits,
        "labels": np.broadcast_to(0.9 * np.eye(classes)[0] + 0.1 / classes, logits.shape),
        "alpha": np.broadcast_to(alpha, logits.shape),
        "gamma": gammas,
    }
    exact, tiny = evaluate(LOSSES["softmax_focal_loss"], arrays), np.finfo(np.float32).tiny
    yield worst_error(found, exact.losses, tiny)
    for name, gradient in zip(("logits", "alpha", "gamma"), gradients):
        if name == "gamma" and static:
            continue
        want, scale = exact.slopes[name], exact.magnitudes[name]
        if name == "alpha":
            want, scale = want.sum(0), scale.sum(0)
        yield worst_error(gradient, want, tiny, None if relative else scale)


FORMS = [
    pytest.param(_dense, id="dense"),
    pytest.param(_linear(1), id="one class per chunk"),
    pytest.param(_linear(2), id="two classes per chunk"),
    pytest.param(_sharded, id="sharded"),
]
GAMMAS = [0, 0.5, 2, pytest.param(np.float32(1.3), id="array")]


@pytest.mark.slow
@pytest.mark.quick(False)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("losses", FORMS)
def test_smoothing_to_60_digits_if_only_the_labels_class_has_a_weight(losses, gamma):
    # The share of the label's class is tiny. A sum over all classes from which the other classes
    # are subtracted would lose it.
    margins = np.array([10, 15, 20, 40], np.float32)
    logits = np.stack([margins, np.zeros(4), np.full(4, -1)], 1).astype(np.float32)
    gamma = np.full(4, gamma) if isinstance(gamma, np.float32) else gamma
    errors = _errors(losses, logits, np.eye(3, dtype=np.float32)[0], gamma, relative=True)
    assert max(errors) < 1e-5


@pytest.mark.quick(False)
@pytest.mark.parametrize("gamma", GAMMAS[-2:])
@pytest.mark.parametrize("losses", FORMS)
def test_smoothing_to_60_digits_with_equal_logits(losses, gamma):
    logits = np.array(
        [[0, 0, -1], [-1, 0, 0], [2, 2, 2], [3, 3, -80], [-9, 7, 7], [-30, 0, 5]], np.float32
    )
    gamma = np.full(6, gamma) if isinstance(gamma, np.float32) else gamma
    alpha = np.array([0.3, 1, 0.7], np.float32)
    assert max(_errors(losses, logits, alpha, gamma, relative=False)) < 1e-5


# ---------------------------------------------------------------- label smoothing in 16 bits


@pytest.mark.parametrize("return_logsumexp", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rounding_of_smoothed_gradients_in_16_bits(dtype, return_logsumexp):
    rng = np.random.default_rng(18)
    arrays = rng.normal(size=(64, 256)), rng.normal(size=(256, 300)) / 16
    arrays = [jnp.asarray(x, dtype) for x in arrays]
    labels = jnp.asarray(rng.integers(0, 300, 64), jnp.int32)

    def smoothed(features, kernel):
        options = {"label_smoothing": 0.3, "return_logsumexp": return_logsumexp}
        found = LINEAR_LOSS(features, kernel, labels, **options)
        return jnp.sum(found[0] if return_logsumexp else found)

    def with_constant_sums(features, kernel):
        """Return the losses with the sums of exponentials held constant."""
        logits = features @ kernel
        n = lax.stop_gradient(jax.nn.logsumexp(logits, -1, keepdims=True)) - logits
        weights = 0.7 * jax.nn.one_hot(labels, 300) + 0.3 / 300
        return jnp.sum(weights * (1 - jnp.exp(-n)) ** 2 * n)

    exact = [x.astype(np.float32) for x in arrays]
    got, want = (jax.jit(jax.grad(smoothed, (0, 1)))(*x) for x in (arrays, exact))
    rounding = 0.51 * float(jnp.finfo(dtype).eps)
    for a, b, part in zip(got, want, jax.jit(jax.grad(with_constant_sums, (0, 1)))(*exact)):
        # One rounding; with the log-sum-exp two gradients are rounded, and then their sum.
        magnitude = np.abs(b)
        if return_logsumexp:
            magnitude = magnitude + np.abs(part) + np.abs(b - part)
        error = np.abs(a.astype(np.float32) - b)
        assert np.all(error <= rounding * magnitude + 1e-6)
