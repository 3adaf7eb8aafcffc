"""Tests that the linear head computes the softmax loss of `features @ kernel + bias`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads import (
    LINEAR_HEADS,
    directional_derivative,
    engine_formula,
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

import focal_jax
from focal_jax import engine
from focal_jax.engine import chunks, linear_sums

pytestmark = pytest.mark.quick

LOSS = focal_jax.linear_softmax_focal_loss_with_integer_labels
# One class per chunk, sizes that do not divide the 7 classes, all classes, and more.
CHUNK_SIZES = [1, 2, 3, 7, 100, None]


def _transposed(features, kernel, bias, labels, **options):
    """Return the losses of the linear head whose kernel is `[C, D]`."""
    options = {"chunk_size": 5, "transpose_kernel": True} | options
    return LOSS(features, kernel.T, labels, bias=bias, **options)


# ---------------------------------------------------------------- values and gradients


@pytest.mark.one_in(2)
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_values_and_gradients_equal_those_of_the_softmax_loss(chunk_size):
    arrays, labels = inputs(classes=7)
    weights = np.random.default_rng(1).normal(size=labels.shape).astype(np.float32)
    got = value_and_gradients(linear, arrays, labels, weights, chunk_size=chunk_size)
    assert_close(got, value_and_gradients(softmax, arrays, labels, weights), 1e-5)
    want = value_and_gradients(formula, arrays, labels, weights, chunk_size=chunk_size)
    assert_close(got, want, 1e-4)


@pytest.mark.parametrize("gamma", [0, 0.5, 2, 5])
def test_static_gamma_without_other_options(gamma, x64):
    (features, kernel, *_), labels = inputs(2, classes=7, dtype=np.float64)

    def both(head, **options):
        def total(features, kernel):
            return jnp.sum(head(features, kernel, None, labels, gamma=gamma, **options) ** 2)

        return jax.jit(jax.value_and_grad(total, (0, 1)))(features, kernel)

    got = both(linear, chunk_size=2)
    assert_close(got, both(softmax), 1e-12)
    assert_close(got, both(formula), 1e-9)


@pytest.mark.parametrize("positions", [(), (0,), (3,), (2, 0), (1, 2, 1, 3)], ids=str)
def test_any_shape_of_positions(positions):
    arrays, labels = inputs(3, positions, classes=7)
    got = value_and_gradients(linear, arrays, labels, chunk_size=3)
    assert got[1][0].shape == (*positions, 5)
    assert_close(got, value_and_gradients(softmax, arrays, labels), 1e-5)


def test_options_broadcast():
    (features, kernel, bias, *_), labels = inputs(4, classes=7)
    gamma, where = jnp.array([[0.5], [1.0], [2.0], [3.0]]), jnp.array([True, False, True])
    for options in ({"alpha": 0.3, "gamma": gamma}, {"gamma": gamma[0, 0], "where": where}):
        got = linear(features, kernel, bias, labels, chunk_size=4, **options)
        assert_close(got, softmax(features, kernel, bias, labels, **options), 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_logsumexp": True, "logit_softcap": 3.0},
        {"label_smoothing": 0.1, "logit_softcap": 3.0, "chunk_size": 4},
        {"label_smoothing": 0.1, "return_logsumexp": True},
    ],
    ids=str,
)
def test_transposed_kernel(options):
    arrays, labels = inputs(5)
    where = jnp.ones(labels.shape, bool).at[2].set(False)
    arrays[0] = arrays[0].at[2].set(jnp.nan)
    got = value_and_gradients(_transposed, arrays, labels, where=where, **options)
    assert_close(got, value_and_gradients(linear, arrays, labels, where=where, **options), 1e-6)
    want = value_and_gradients(formula, arrays, labels, where=where, **options)
    assert_close(got, want, 1e-4)


@pytest.mark.parametrize("transpose", [True, False])
def test_kernel_of_the_wrong_shape(transpose):
    (features, kernel, *_), labels = inputs()
    wanted = r"\(C, D\) with transpose_kernel=True" if transpose else r"\(D, C\), with"
    kernel = kernel if transpose else kernel.T
    with pytest.raises(focal_jax.InputError, match=f"kernel: got shape .*, wanted {wanted}"):
        LOSS(features, kernel, labels, transpose_kernel=transpose)


# ---------------------------------------------------------------- losses made with the engine


@pytest.mark.parametrize(
    "options",
    [{}, {"return_logsumexp": True, "ignore_label": 3}, {"label_smoothing": 0.1}],
    ids=str,
)
def test_linear_form_of_an_engine_loss(options, x64):
    arrays, labels = inputs(6, dtype=np.float64, scale=2.0)
    got = value_and_gradients(engine_linear, arrays, labels, **options)
    assert_close(got, value_and_gradients(engine_formula, arrays, labels, **options), 1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_linear_form_differentiates_every_option(smoothing):
    (features, kernel, *_), labels = inputs(7)
    epsilon = jnp.cos(jnp.arange(12.0)).reshape(labels.shape)

    def both(head):
        def total(epsilon):
            losses = head(
                features, kernel, None, labels, epsilon=epsilon, label_smoothing=smoothing
            )
            return jnp.sum(losses**2)

        return jax.jit(jax.value_and_grad(total))(epsilon)

    assert_close(both(engine_linear), both(engine_formula), 1e-5)


def test_losses_of_a_whole_row_have_no_linear_form():
    (features, kernel, *_), labels = inputs()
    loss = focal_jax.losses.dual._loss
    with pytest.raises(focal_jax.InputError, match=r"linear: .* needs a whole row of logits"):
        loss.linear(features, kernel, labels)


def test_options_of_an_engine_loss_are_checked():
    (features, kernel, bias, *_), labels = inputs()
    with pytest.raises(engine.InputError, match="beta: got an option that poly does not have"):
        engine_linear(features, kernel, bias, labels, beta=1.0)
    with pytest.raises(engine.InputError, match="gamma: got -1, wanted a finite number >= 0"):
        engine_linear(features, kernel, bias, labels, gamma=-1)


def test_dtypes_that_jax_does_not_promote():
    kernel = jnp.eye(3, dtype=jnp.float8_e4m3fn)
    with pytest.raises(focal_jax.InputError, match="kernel: got dtype float8_e4m3fn, wanted"):
        LOSS(jnp.ones((2, 3), jnp.bfloat16), kernel, jnp.array([0, 2]))


# ---------------------------------------------------------------- higher derivatives


@pytest.mark.one_in(2)
@pytest.mark.parametrize("head", [linear, _transposed], ids=["[D, C]", "[C, D]"])
def test_second_derivatives_equal_those_of_the_softmax_loss(head, x64):
    arrays, labels = inputs(8, (3,), 2, 5, dtype=np.float64)
    every = tuple(range(len(arrays)))
    function = total(head, labels, chunk_size=2)
    want = jax.jit(jax.jacrev(jax.grad(total(softmax, labels), every), every))(*arrays)
    assert_close(jax.jit(jax.jacrev(jax.grad(function, every), every))(*arrays), want, 1e-10)
    assert_close(jax.jit(jax.jacfwd(jax.grad(function, every), every))(*arrays), want, 1e-10)


# ---------------------------------------------------------------- logits of -inf


@pytest.mark.one_in(3)
@pytest.mark.parametrize("chunk_size", [1, 3, 8])
def test_class_with_a_bias_of_minus_infinity(chunk_size):
    arrays, labels = inputs(11, classes=7)
    features, kernel, bias, alpha, gamma = arrays
    with_off = [
        features,
        jnp.pad(kernel, ((0, 0), (0, 1))),
        jnp.append(bias, -jnp.inf),
        jnp.append(alpha, 1.0),
        gamma,
    ]
    value, got = value_and_gradients(linear, with_off, labels, chunk_size=chunk_size)
    assert_close(value, value_and_gradients(linear, arrays, labels)[0], 1e-6)
    assert_close(got, value_and_gradients(softmax, with_off, labels)[1], 1e-5)
    assert np.all(got[1][:, 7] == 0)

    # If it is the label's class, the loss is infinite and the gradients are finite.
    def total(features, kernel, bias):
        off = jnp.full_like(labels, 7)
        return jnp.sum(linear(features, kernel, bias, off, chunk_size=chunk_size))

    value, got = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*with_off[:3])
    assert value == np.inf
    assert all(np.all(np.isfinite(gradient)) for gradient in got)


# ---------------------------------------------------------------- 16-bit dtypes


@pytest.mark.one_in(2)
@pytest.mark.quick(False)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_arrays_are_accumulated_in_float32(dtype):
    # The arrays are deep and wide enough that 16-bit sums, or cotangents that are rounded after
    # every chunk, would exceed the tolerance.
    arrays, labels = inputs(12, (64,), 256, 300)
    arrays[0], arrays[1] = arrays[0].astype(dtype), (arrays[1] / 16).astype(dtype)
    wide = [x.astype(jnp.float32) for x in arrays]
    assert LOSS(*arrays[:2], labels).dtype == jnp.float32
    value, got = value_and_gradients(linear, arrays, labels, chunk_size=7)
    want_value, want = value_and_gradients(linear, wide, labels, chunk_size=7)
    assert_close(value, want_value, 1e-6)
    assert [g.dtype for g in got] == [x.dtype for x in arrays]
    eps = float(jnp.finfo(dtype).eps)
    for a, b in zip(got[:2], want[:2]):
        # The float32 result, rounded once.
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=0.51 * eps, atol=1e-6)
    assert_close(got[2:], want[2:], 1e-5)


@pytest.mark.quick(False)
def test_gradient_of_the_labels_logit_in_bfloat16(x64):
    rng = np.random.default_rng(17)
    features, kernel = (
        jnp.asarray(rng.normal(size=shape) / 4, jnp.bfloat16) for shape in ((32, 64), (64, 50))
    )
    exact = np.asarray(features, np.float64) @ np.asarray(kernel, np.float64)
    labels = jnp.asarray(rng.integers(0, 50, 32), jnp.int32)
    is_label = np.eye(50, dtype=bool)[labels]
    others = np.log(np.sum(np.where(is_label, 0, np.exp(exact)), 1))

    def engine_form(bias, x, label):
        return LOSS(x, kernel, label, bias=bias)

    def plain(bias, x, label):
        log_p = jax.nn.log_softmax(x @ kernel + bias)[label]
        return -((1 - jnp.exp(log_p)) ** 2) * log_p

    engine_slopes, plain_slopes = (
        jax.jit(jax.vmap(jax.grad(loss))) for loss in (engine_form, plain)
    )
    for probability in (0.9, 0.99, 0.999):
        # This bias gives the label's class the probability, up to the rounding to bfloat16.
        bias = np.log(probability / (1 - probability)) + others - exact[is_label]
        biases = jnp.asarray(np.where(is_label, bias[:, None], 0), jnp.bfloat16)
        logits = exact + np.asarray(biases, np.float64)
        rest = np.sum(np.where(is_label, 0, np.exp(logits - logits[is_label][:, None])), 1)
        p, q = 1 / (1 + rest), rest / (1 + rest)
        want = -(q**2) * (q + 2 * p * np.log1p(rest))

        def error(slopes, biases, want=want):
            got = slopes(biases, features, labels)[is_label]
            return np.max(np.abs(np.asarray(got, np.float64) / want - 1))

        rounding = float(jnp.finfo(jnp.bfloat16).eps) / 2
        assert error(engine_slopes, biases) <= 1.01 * rounding < error(plain_slopes, biases)
        assert error(engine_slopes, biases.astype(jnp.float32)) < 1e-5


# ---------------------------------------------------------------- logit_softcap


def test_softcap_equals_tanh_of_the_logits():
    arrays, labels = inputs(8, scale=2.0)
    got = value_and_gradients(linear, arrays, labels, logit_softcap=3.0)
    assert_close(got, value_and_gradients(formula, arrays, labels, logit_softcap=3.0), 1e-4)

    def capped(features, kernel, bias, labels, **options):
        logits = 3.0 * jnp.tanh(product(features, kernel, bias) / 3.0)
        return focal_jax.softmax_focal_loss_with_integer_labels(logits, labels, **options)

    assert_close(got, value_and_gradients(capped, arrays, labels), 1e-5)


def test_softcap_derivative_does_not_cancel(x64):
    # The derivative of tanh at 10 is 8e-9. In float32, 1 - tanh(10)**2 is 0.
    kernel, labels = np.array([[30.0, 0.0]]), jnp.array([1])

    def gradient(dtype):
        def total(features):
            options = {"gamma": 0, "logit_softcap": 3.0}
            return jnp.sum(LOSS(features, jnp.asarray(kernel, dtype), labels, **options))

        return jax.grad(total)(jnp.ones((1, 1), dtype))

    np.testing.assert_allclose(gradient(np.float32), gradient(np.float64), rtol=1e-5)


def test_third_derivatives_through_the_softcap(x64):
    arrays, labels = inputs(9, dtype=np.float64)
    arrays[0] = arrays[0].at[0].set(0)  # logits of 0, where |x| has a kink
    options = {"logit_softcap": 3.0, "return_logsumexp": True}
    direction = jax.tree.map(jnp.cos, arrays)

    def third(head):
        function = total(head, labels, **options)
        for _ in range(2):
            function = directional_derivative(function, direction)
        return jax.jit(jax.grad(function))(*arrays)

    assert_close(third(linear), third(formula), 1e-8)


@pytest.mark.parametrize("softcap", [1e-30, 1e-3, 30.0, 1e30, 3e38])
def test_softcap_of_any_size_keeps_the_digits(softcap):
    logits = np.array([[1e-30, 2.0, 1e-3, -20.0]], np.float32)
    capped = np.where(
        logits / softcap == 0, logits, softcap * np.tanh(logits / np.float64(softcap))
    )
    want = np.exp(capped - np.logaddexp.reduce(capped, -1)[:, None])
    want -= np.eye(4)[:1]
    cosh = np.cosh(np.minimum(np.abs(logits / np.float64(softcap)), 300))
    loss = focal_jax.linear_softmax_focal_loss_with_integer_labels

    def total(x):
        return jnp.sum(loss(x, jnp.eye(4), jnp.array([0]), gamma=0, logit_softcap=softcap))

    value, gradient = jax.jit(jax.value_and_grad(total))(jnp.asarray(logits))
    exact = np.logaddexp.reduce(capped, -1)[0] - capped[0, 0]
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    np.testing.assert_allclose(gradient, want / cosh**2, rtol=1e-5, atol=1e-37)


def test_softcap_keeps_logits_of_minus_infinity():
    arrays, labels = inputs(10)
    arrays[2] = arrays[2].at[7].set(-jnp.inf)
    value, gradients = value_and_gradients(linear, arrays, labels * 0, logit_softcap=2.0)
    assert np.isfinite(value)
    assert np.all(gradients[1][:, 7] == 0)


@pytest.mark.parametrize("value", [0, 0.0, -3.0, np.nan, np.inf, True, "30"])
def test_invalid_softcap(value):
    (features, kernel, bias, *_), labels = inputs()
    wanted = r"logit_softcap: got .*, wanted (None or a|a finite) number"
    for head in (linear, formula):
        with pytest.raises(ValueError, match=wanted):
            head(features, kernel, bias, labels, logit_softcap=value)


# ---------------------------------------------------------------- chunks


@pytest.mark.parametrize(
    ("positions", "num_classes", "want"),
    [
        (1, 7, 7),
        (64, 1_000, 32),  # a fortieth, in multiples of 16
        (64, 5_119, 128),
        (64, 5_121, 256),  # in multiples of 128
        (1_024, 128_000, 3_200),
        (2_048, 512_000, 4_096),  # 2**23 logits
        (2**20, 512_000, 1_024),  # the minimum
        (0, 32_000, 896),
    ],
)
def test_default_chunk_size(positions, num_classes, want):
    assert min(chunks.default_chunk_size(positions, num_classes), num_classes) == want


# Each number stands for 64 equal logits. A chunk has two of them, and the last chunk, which is
# computed first, has one. The first two give the maximum with which the sums begin.
JUMPS = [
    [0.0, 1.0, 2.0, 3.0, 2.0, 1.0, 0.0],
    [0.0, 0.0, 0.0, linear_sums._MAX_JUMP - 4, 30.0, 0.0, 0.0],  # nearly the largest jump
    [0.0, 0.0, 0.0, 1e3, 1.0, 1e4, 0.0],  # larger jumps
    [0.0, 0.0, 0.0, -1e4, 0.0, 100.0, 99.0],
    [-np.inf, -np.inf, -np.inf, 3.0, 4.0, 5.0, -np.inf],  # no maximum to begin with
    [-1e30, 1e30, 0.0, 0.0, 0.0, 0.0, 0.0],
]
SPEC = chunks.ChunkSpec(size=128, softcap=None, class_axis=-1)


def _jump_inputs(bias, label):
    """Return a `Linear` of two positions, and the label's class index.

    The logits of the first position are the bias; the second position adds cosines.
    """
    features, kernel = jnp.array([[0.0], [1.0]]), jnp.cos(jnp.arange(7.0 * 64))[None]
    bias = jnp.repeat(jnp.asarray(bias), 64, -1)
    return chunks.Linear(features, kernel, bias), jnp.full((2, 1), 64 * label, jnp.int32)


@functools.cache
def _sums_and_gradients(form):
    def total(arrays, place):
        sums = form(SPEC, arrays, place)
        of_label = jnp.sum(jnp.cos(sums.label_logit - sums.max_logit))
        return jnp.sum(jnp.log1p(sums.rest)) + of_label, sums

    # JAX differentiates the forms themselves, as it does for second derivatives.
    return jax.jit(jax.grad(total, has_aux=True))


@pytest.mark.parametrize("logits", JUMPS, ids=str)
@pytest.mark.parametrize("label", [0, 3, 6, 7])
def test_sums_in_one_pass_equal_those_in_two(logits, label):
    arrays = _jump_inputs(logits, label)
    got = _sums_and_gradients(linear_sums._sums_in_one_pass)(*arrays)
    assert_close(got, _sums_and_gradients(linear_sums._sums_in_passes)(*arrays), 1e-6)


def test_vmapped_sums_in_one_pass_keep_their_conditional():
    features, biases = jnp.ones((3, 2, 1)), jnp.zeros((3, 7))
    # The first example has no jump, the second one that is too large, the third a small one.
    biases = biases.at[1, 5].set(1e3).at[2, 5].set(20.0)

    def both(form):
        def of_example(features, bias):
            arrays, place = _jump_inputs(bias, 3)
            sums = form(SPEC, arrays._replace(features=features), place)
            return jnp.sum(sums.label_logit - sums.max_logit - jnp.log1p(sums.rest))

        return jax.vmap(jax.value_and_grad(of_example, (0, 1)))

    in_one_pass, in_passes = both(linear_sums._sums_in_one_pass), both(linear_sums._sums_in_passes)
    assert " cond[" in str(jax.make_jaxpr(in_one_pass)(features, biases))
    got, want = (jax.jit(form)(features, biases) for form in (in_one_pass, in_passes))
    assert_close(got, want, 1e-6)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("softcap", [1e18, 3e38, float(np.finfo(np.float32).max)])
def test_large_softcaps_leave_the_logits_unchanged(softcap):
    arrays, labels = inputs()
    for head in (linear, formula):
        got = head(*arrays[:3], labels, logit_softcap=softcap)
        assert_close(got, head(*arrays[:3], labels), 1e-6)


@pytest.mark.parametrize("name", LINEAR_HEADS)
def test_features_without_entries(name):
    args = jnp.ones((2, 0)), jnp.ones((0, 3)), jnp.array([0.0, 1.0, 2.0]), jnp.array([0, 2])
    one = jnp.zeros((2, 1)), jnp.ones((1, 3)), *args[2:]
    assert_close(LINEAR_HEADS[name](*args), LINEAR_HEADS[name](*one), 1e-6)


# ---------------------------------------------------------------- vmap


def _gradients_of(head, labels, order=1):
    """Return the gradient of a sum in features, kernel and bias; or, of order 2, of its norm."""

    def total(*args):
        return jnp.sum(jnp.sin(head(*args, labels)))

    def squared_norm(*args):
        return sum(jnp.sum(g**2) for g in jax.grad(total, (0, 1, 2))(*args))

    return jax.grad(total if order == 1 else squared_norm, (0, 1, 2))


def _mapped(head, axis=0):
    """Return the head, mapped over the positions."""
    return jax.vmap(head, (axis, None, None, axis), axis)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", LINEAR_HEADS)
def test_vmap_over_positions(name, x64):
    head, (arrays, labels) = LINEAR_HEADS[name], inputs(13, dtype=np.float64)
    want = jax.jit(_gradients_of(head, labels))(*arrays[:3])
    heads = _mapped(_mapped(head)), _mapped(jax.jit(head), 1)
    got = jax.jit(lambda *args: [_gradients_of(h, labels)(*args) for h in heads])(*arrays[:3])
    assert_close(got, [want, want], 1e-10)


VMAP_HEADS = ["linear_sigmoid_focal_loss", "statistics", "label smoothing and logsumexp"]


@pytest.mark.slow
@pytest.mark.parametrize("name", VMAP_HEADS)
def test_vmap_with_every_order_of_transformations(name, x64):
    head, (arrays, labels) = LINEAR_HEADS[name], inputs(14, (2, 2), 3, 7, dtype=np.float64)
    features, kernel, bias = arrays[:3]
    of_example = jax.jit(_gradients_of(head, labels[0]))

    def stacked(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    # Reverse over reverse.
    want = jax.jit(_gradients_of(head, labels, 2))(features, kernel, bias)
    assert_close(
        jax.jit(_gradients_of(_mapped(head), labels, 2))(features, kernel, bias), want, 1e-10
    )
    # One gradient of the kernel per example.
    want = stacked([of_example(x, kernel, bias) for x in features])
    each = jax.vmap(_gradients_of(head, labels[0]), (0, None, None))
    assert_close(jax.jit(each)(features, kernel, bias), want, 1e-10)
    # The same with examples that are mapped over their positions.
    each = jax.vmap(_gradients_of(_mapped(head), labels[0]), (0, None, None))
    assert_close(jax.jit(each)(features, kernel, bias), want, 1e-10)
    # Several kernels.
    kernels = jnp.stack([kernel, -kernel])
    want = stacked([of_example(features[0], k, bias) for k in kernels])
    each = jax.vmap(_gradients_of(head, labels[0]), (None, 0, None))
    assert_close(jax.jit(each)(features[0], kernels, bias), want, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*VMAP_HEADS, "softmax_focal_loss_with_integer_labels"])
def test_vmap_takes_the_memory_of_the_whole_batch(name):
    head, depth, classes = LINEAR_HEADS[name], 32, 2048
    kernel, bias, labels = jnp.zeros((depth, classes)), jnp.zeros(classes), jnp.zeros((8, 8))

    def temporaries(head):
        gradient = jax.jit(_gradients_of(head, labels.astype(jnp.int32)))
        compiled = gradient.lower(jnp.zeros((*labels.shape, depth)), kernel, bias).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = temporaries(head)
    assert temporaries(_mapped(head)) <= 1.5 * whole
    assert temporaries(_mapped(_mapped(head))) <= 1.5 * whole
