"""Tests of the token statistics and of sparse labels, against dense plain JAX and 60 digits."""

from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from helpers import assert_close
from jax.sharding import PartitionSpec as P
from meshes import GATHERS, make_mesh, result_sizes

import focal_jax
from focal_jax import InputError, engine

pytestmark = pytest.mark.quick

POSITIONS, DEPTH, CLASSES, PAIRS = (4, 3), 5, 24, 3


def _inputs(dtype=np.float32):
    """Return features, kernel, bias, temperature, pair weights and class weights; then indices."""
    rng = np.random.default_rng(0)
    arrays = [
        2 * rng.normal(size=(*POSITIONS, DEPTH)),
        rng.normal(size=(DEPTH, CLASSES)),
        rng.normal(size=CLASSES),
        rng.uniform(0.5, 2, POSITIONS),
        rng.uniform(0.1, 1, (*POSITIONS, PAIRS)),
        rng.uniform(0.1, 1, CLASSES),
    ]
    indices = rng.integers(0, CLASSES, (*POSITIONS, PAIRS)).astype(np.int32)
    indices[0, 0] = 7  # equal indices
    indices[1, :, 1] = -1  # padding
    indices[2, 0, 0] = np.argmax(arrays[0][2, 0] @ arrays[1] + arrays[2])
    return [jnp.asarray(x, dtype) for x in arrays], jnp.asarray(indices)


def _logits(features, kernel, bias, temperature, softcap=None):
    logits = features @ kernel + bias[None, None]
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return logits / temperature[..., None]


def _plain(features, kernel, bias, temperature, labels, softcap=None):
    """Return the differentiable statistics by their formulas, and the argmax."""
    logits = _logits(features, kernel, bias, temperature, softcap)
    log_p = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
    of_labels = jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    return of_labels, jax.nn.logsumexp(logits, -1), entropy, jnp.argmax(logits, -1)


def _linear(features, kernel, bias, temperature, labels, softcap=None, **options):
    return focal_jax.linear_token_statistics(
        features,
        kernel,
        labels,
        bias=bias,
        temperature=temperature,
        logit_softcap=softcap,
        **options,
    )


def _dense(features, kernel, bias, temperature, labels, softcap=None, **options):
    logits = _logits(features, kernel, bias, jnp.ones_like(temperature), softcap)
    return focal_jax.token_statistics(logits, labels, temperature=temperature, **options)


def _total(head, *args, **options):
    """Return a sum in which every statistic of every position has another weight."""
    found = head(*args, **options)
    log_p, lse, entropy = found[:3]
    weights = jnp.linspace(0.5, 2, log_p.size).reshape(log_p.shape)
    return jnp.sum(weights * (log_p * lse + 3 * entropy**2 + lse))


def _gradients(head, arrays, labels, **options):
    function = partial(_total, head, **options)
    return jax.jit(jax.value_and_grad(lambda *a: function(*a, labels), range(4)))(*arrays[:4])


HEADS = pytest.mark.parametrize("head", [_dense, _linear], ids=["dense", "linear"])


@pytest.mark.one_in(2)
@HEADS
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_size", [None, 7, 24])
def test_statistics_equal_the_formulas(head, softcap, chunk_size):
    arrays, indices = _inputs()
    labels, options = indices[..., 0], {"softcap": softcap}
    own = options | ({"chunk_size": chunk_size} if head is _linear else {})
    want = _plain(*arrays[:4], labels, **options)
    found = head(*arrays[:4], labels, **own)
    for x, y in zip(found, want):
        assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert found.argmax.dtype == jnp.int32
    for x, y in zip(
        *(_gradients(h, arrays, labels, **o) for h, o in ((head, own), (_plain, options)))
    ):
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y)):
            assert_close(a, b, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(b))))


@HEADS
def test_second_derivatives(head, x64):
    arrays, indices = _inputs(np.float64)
    labels = indices[..., 0]
    direction = [jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in arrays[:4]]

    def along(head, *arrays):
        gradients = jax.grad(lambda *a: _total(head, *a, labels), range(4))(*arrays)
        return sum(jnp.vdot(g, d) for g, d in zip(gradients, direction))

    for transform in (jax.grad, jax.jacfwd):
        got, want = (
            jax.jit(transform(partial(along, h), range(4)))(*arrays[:4]) for h in (head, _plain)
        )
        for a, b in zip(got, want):
            assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_entropy_and_log_probability_to_60_digits():
    rng = np.random.default_rng(1)
    rows = [np.zeros(6), rng.normal(size=6), [0, 0, -1, -2, -3, -4], [5e-4, 0, 0, 0, 0, 0]]
    rows += [np.r_[margin, rng.normal(size=5)] for margin in (2, 5, 10, 17, 40, 80)]
    logits = np.array(rows, np.float32)
    labels = np.zeros(len(logits), np.int32)

    def entropy_sum(z):
        return jnp.sum(focal_jax.token_statistics(z, labels).entropy)

    def log_p_sum(z):
        return jnp.sum(focal_jax.token_statistics(z, labels).log_probability)

    found = focal_jax.token_statistics(jnp.asarray(logits), labels)
    of_entropy, of_log_p = (jax.jit(jax.grad(f))(logits) for f in (entropy_sum, log_p_sum))
    with mpmath.workdps(60):
        for i, row in enumerate(logits):
            z = [mpmath.mpf(float(x)) for x in row]
            lse = mpmath.log(mpmath.fsum(map(mpmath.exp, z)))
            log_p = [x - lse for x in z]
            p = [mpmath.exp(x) for x in log_p]
            entropy = -mpmath.fsum(a * b for a, b in zip(p, log_p))
            assert abs(float(found.entropy[i]) - float(entropy)) <= 1e-5 * float(entropy)
            assert found.log_probability[i] == pytest.approx(float(log_p[0]), rel=1e-5)
            assert found.logsumexp[i] == pytest.approx(float(lse), rel=1e-6)
            want = np.array([float(-a * (b + entropy)) for a, b in zip(p, log_p)])
            # A uniform row has the gradient 0, as a difference of its largest terms.
            atol = 1e-6 * max(abs(want)) + 1e-7 * float(1 - max(p))
            np.testing.assert_allclose(of_entropy[i], want, rtol=1e-4, atol=atol)
            want = np.array([float((c == 0) - a) for c, a in enumerate(p)])
            np.testing.assert_allclose(of_log_p[i], want, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("scale", [1e-4, 0.1, 3])
def test_gradients_of_many_classes_keep_their_digits(scale, x64):
    """The gradient of every class, of the largest too, is as accurate as the logits allow."""
    logits = (scale * np.random.default_rng(0).normal(size=(2, 2000))).astype(np.float32)
    labels = np.array([3, np.argmax(logits[1])])

    def statistics(z):
        found = focal_jax.token_statistics(z, labels)
        return [jnp.sum(x) for x in found[:3]]

    def plain(z):
        log_p = jax.nn.log_softmax(z)
        of_labels = jnp.take_along_axis(log_p, labels[:, None], -1)
        return [x.sum() for x in (of_labels, jax.nn.logsumexp(z, -1), -jnp.exp(log_p) * log_p)]

    got, want = (
        jax.jit(jax.jacrev(statistics))(logits),
        jax.jit(jax.jacrev(plain))(logits.astype("d")),
    )
    for a, b in zip(got[:2], want[:2]):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(got[2], want[2], rtol=0, atol=2e-6 * np.abs(want[2]).max())


@HEADS
def test_gradient_of_the_temperature_with_a_class_that_is_switched_off(head):
    arrays, indices = _inputs()
    labels = jnp.minimum(indices[..., 0], 22)

    def of_temperature(head, bias):
        keep = bias.size
        features, kernel, _, temperature, *_ = arrays

        def total(t):
            of_labels, lse, entropy, _ = head(features, kernel[:, :keep], bias, t, labels)
            return jnp.sum(lse * entropy - of_labels**2)

        gradient = jax.grad(total)
        second = jax.grad(lambda t: jnp.sum(gradient(t)))
        return jax.jit(lambda t: (gradient(t), second(t)))(temperature)

    bias = arrays[2].at[-1].set(-jnp.inf)
    got, want = of_temperature(head, bias), of_temperature(_plain, bias[:-1])
    for a, b in zip(got, want):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


@HEADS
def test_masks_and_invalid_labels(head):
    arrays, indices = _inputs()
    arrays[0] = arrays[0].at[0].set(jnp.nan)
    labels = indices[..., 0].at[1, 0].set(-100).at[2, 1].set(CLASSES)
    where = jnp.ones(POSITIONS, bool).at[0].set(False)
    options = {"where": where, "ignore_label": -100}
    found = head(*arrays[:4], labels, **options)
    masked = np.array(~where).copy()
    masked[1, 0] = True
    for x in found:
        assert not np.any(np.asarray(x)[masked])
    assert np.argwhere(np.isnan(found.log_probability)).tolist() == [[2, 1]]
    assert np.all(np.isfinite(found.entropy + found.logsumexp))

    def entropy(*a):
        return jnp.sum(head(*a, labels, **options).entropy)

    gradients = jax.jit(jax.grad(entropy, (0, 1, 2, 3)))(*arrays[:4])
    # The gradient of a plain kernel is a product with the features, NaN included.
    assert all(np.all(np.isfinite(g)) for g in (gradients if head is _linear else gradients[::3]))
    assert not np.any(np.asarray(gradients[0])[masked])


@HEADS
def test_temperatures_of_masked_positions_may_be_anything(head):
    arrays, indices = _inputs()
    where = jnp.ones(POSITIONS, bool).at[0].set(False)
    labels = indices[..., 0].at[0].set(255)

    def total(temperature):
        found = head(*arrays[:3], temperature, labels, where=where)
        return sum(jnp.sum(x) for x in found[:3])

    gradient = jax.jit(jax.grad(total))
    valid = jnp.full(POSITIONS, 2.0)
    want = gradient(valid)
    assert not np.any(want[0])
    for anything in (0.0, jnp.nan):
        np.testing.assert_array_equal(gradient(valid.at[0].set(anything)), want)


@HEADS
def test_ignored_labels_do_not_trigger_debug_nans_in_eager_calls(head):
    arrays, indices = _inputs()
    labels = indices[..., 0].at[0].set(255)
    with jax.debug_nans(True):
        found = head(*arrays[:4], labels, ignore_label=255)
    assert not np.any(found.log_probability[0])


@HEADS
def test_logsumexp_of_classes_that_are_all_switched_off(head):
    arrays, indices = _inputs()
    arrays[2] = jnp.full(CLASSES, -jnp.inf)  # the bias
    found = head(*arrays[:4], indices[..., 0])
    assert np.all(found.logsumexp == -np.inf)


def test_minus_infinity_and_ties():
    logits = jnp.array([[-jnp.inf, 1.0, 1.0], [0.0, -jnp.inf, -jnp.inf], [-jnp.inf, 2.0, 0.0]])
    labels = jnp.array([1, 0, 0])
    found = focal_jax.token_statistics(logits, labels)
    np.testing.assert_allclose(found.log_probability, [-np.log(2), 0, -np.inf], rtol=1e-6)
    np.testing.assert_allclose(found.entropy[:2], [np.log(2), 0], rtol=1e-6)
    assert found.argmax.tolist() == [1, 0, 1]
    gradient = jax.grad(lambda z: jnp.sum(focal_jax.token_statistics(z, labels).entropy))(logits)
    assert np.all(np.isfinite(gradient))
    assert gradient[0, 0] == 0


def test_second_derivatives_where_classes_tie(x64):
    z, label = jnp.array([1.0, 1.0, 0.5, 1.0]), jnp.array(2)

    def statistics(z):
        found = focal_jax.token_statistics(z, label)
        return found.entropy * found.logsumexp - found.log_probability**2

    def plain(z):
        log_p, lse = jax.nn.log_softmax(z), jax.nn.logsumexp(z)
        return -jnp.sum(jnp.exp(log_p) * log_p) * lse - log_p[2] ** 2

    for order in (jax.grad, jax.hessian):
        assert_close(jax.jit(order(statistics))(z), jax.jit(order(plain))(z), 1e-10)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits(dtype):
    arrays, indices = _inputs(dtype)
    labels = indices[..., 0]
    wide = [x.astype(jnp.float32) for x in arrays]
    found = focal_jax.linear_token_statistics(*arrays[:2], labels, chunk_size=7)
    want = focal_jax.linear_token_statistics(*wide[:2], labels, chunk_size=7)
    assert {x.dtype.name for x in found[:3]} == {"float32"}
    for x, y in zip(found[:3], want[:3]):
        assert_close(x, y, rtol=1e-5, atol=1e-5)
    function = lambda x, w: jnp.sum(focal_jax.linear_token_statistics(x, w, labels).entropy)  # noqa: E731
    assert [g.dtype for g in jax.grad(function, (0, 1))(*arrays[:2])] == [dtype] * 2


# ---------------------------------------------------------------- sharded classes

SPECS = P("data"), P(None, "model"), P("model"), P("data")


def _sharded(head, check_vma, *more_specs):
    """Return the head with positions and classes sharded over eight devices."""

    def function(*args, **options):
        local = partial(head, class_axis_name="model", **options)
        mapped = jax.shard_map(
            local,
            mesh=make_mesh((2, 4)),
            in_specs=(*SPECS, *more_specs),
            out_specs=P("data"),
            check_vma=check_vma,
        )
        return mapped(*args)

    return function


@pytest.mark.one_in(2)
@pytest.mark.parametrize("check_vma", [True, False])
@HEADS
def test_sharded_classes(head, check_vma):
    arrays, indices = _inputs()
    labels = indices[..., 0]
    options = {"chunk_size": 4} if head is _linear else {}
    sharded = _sharded(head, check_vma, P("data"))
    found, want = (
        jax.jit(partial(sharded, **options))(*arrays[:4], labels),
        head(*arrays[:4], labels),
    )
    for x, y in zip(found, want):
        assert_close(x, y, rtol=1e-5, atol=1e-6)
    got = _gradients(sharded, arrays, labels, **options)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(_gradients(head, arrays, labels))):
        assert_close(a, b, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(b))))
    text = jax.jit(partial(sharded, **options)).lower(*arrays[:4], labels).compile().as_text()
    assert not result_sizes(text, GATHERS)


# ---------------------------------------------------------------- unused statistics


def test_unused_statistics_are_not_computed():
    arrays, indices = _inputs()
    labels = indices[..., 0]

    def loop(pick):
        function = lambda x, w: pick(focal_jax.linear_token_statistics(x, w, labels, chunk_size=8))  # noqa: E731
        text = jax.jit(function).lower(*arrays[:2]).compile().as_text()
        (loop,) = [line for line in text.splitlines() if " while(" in line]
        return loop.split(" while(")[0].count("[4,3,1]")

    assert loop(lambda found: found.argmax) < loop(lambda found: found.entropy)
    assert loop(lambda found: found.log_probability) < loop(lambda found: found)


# ---------------------------------------------------------------- sparse labels


def _sparse(features, kernel, bias, temperature, weights, alpha, indices, **options):
    logits = _logits(features, kernel, bias, temperature)
    loss = focal_jax.softmax_focal_loss_with_sparse_labels
    return loss(logits, indices, weights, alpha=alpha, **options)


def _linear_sparse(features, kernel, bias, temperature, weights, alpha, indices, **options):
    return focal_jax.linear_softmax_focal_loss_with_sparse_labels(
        features,
        kernel,
        indices,
        weights,
        bias=bias,
        temperature=temperature,
        alpha=alpha,
        **options,
    )


def _distribution(features, kernel, bias, temperature, weights, alpha, indices, **options):
    logits = _logits(features, kernel, bias, temperature)
    place = jnp.where(indices < 0, CLASSES, indices)[..., None] == jnp.arange(CLASSES).reshape(
        1, 1, 1, -1
    )
    labels = jnp.sum(jnp.where(place, weights[..., None], 0), -2)
    return focal_jax.softmax_focal_loss(logits, labels, alpha=alpha, **options)


def _weighted(head, arrays, indices, **options):
    def function(*arrays):
        losses = head(*arrays, indices, **options)
        return jnp.sum(jnp.linspace(0.5, 2, losses.size).reshape(losses.shape) * losses)

    return jax.jit(jax.value_and_grad(function, range(len(arrays))))(*arrays)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("head", [_sparse, _linear_sparse], ids=["dense", "linear"])
@pytest.mark.parametrize("gamma", [0, 2, 0.7])
@pytest.mark.parametrize("pairs", [0, PAIRS, 20])
def test_sparse_labels_equal_the_distribution(head, gamma, pairs):
    arrays, indices = _inputs()
    repeats = (1, 1, -(-pairs // PAIRS))
    indices = jnp.tile(indices, repeats)[..., :pairs]
    arrays[4] = jnp.tile(arrays[4], repeats)[..., :pairs]
    options = {"chunk_size": 7} if head is _linear_sparse else {}
    found = _weighted(head, arrays, indices, gamma=gamma, **options)
    want = _weighted(_distribution, arrays, indices, gamma=gamma)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        assert_close(a, b, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(b), initial=0)) + 1e-30)


@pytest.mark.parametrize("head", [_sparse, _linear_sparse], ids=["dense", "linear"])
def test_sparse_labels_of_classes_that_tie(head):
    arrays, indices = _inputs()
    arrays[1], arrays[2] = jnp.zeros_like(arrays[1]), jnp.zeros_like(arrays[2])
    features, weights = arrays[0], arrays[4]

    def of_kernel(head):
        def total(kernel):
            parts = features, kernel, arrays[2], arrays[3], weights, arrays[5]
            return jnp.sum(jnp.cos(weights[..., 0]) * head(*parts, indices, gamma=1.5))

        gradient = jax.grad(total)
        direction = jnp.sin(jnp.arange(120.0)).reshape(5, 24)
        second = jax.grad(lambda kernel: jnp.vdot(direction, gradient(kernel)))
        return jax.jit(lambda kernel: (gradient(kernel), second(kernel)))(arrays[1])

    for a, b in zip(of_kernel(head), of_kernel(_distribution)):
        assert_close(a, b, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(b))))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("head", [_sparse, _linear_sparse], ids=["dense", "linear"])
def test_sparse_labels_with_sharded_classes(head, check_vma):
    arrays, indices = _inputs()
    sharded = _sharded(head, check_vma, P("data"), P(), P("data"))
    found, want = (_weighted(h, arrays, indices, gamma=1.5) for h in (sharded, head))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        assert_close(a, b, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("head", [_sparse, _linear_sparse], ids=["dense", "linear"])
def test_sparse_labels_that_are_invalid(head):
    arrays, indices = _inputs()
    indices = indices.at[0, 0, 0].set(CLASSES).at[1, 0, 0].set(-2)
    arrays[4] = arrays[4].at[2, 1, 2].set(-0.1)
    where = jnp.ones(POSITIONS, bool).at[1].set(False)
    losses = head(*arrays, indices, where=where)
    assert np.argwhere(np.isnan(losses)).tolist() == [[0, 0], [2, 1]]
    assert not np.any(losses[1])


def test_sparse_labels_on_another_axis():
    arrays, indices = _inputs()
    logits = _logits(*arrays[:4])
    loss = partial(focal_jax.softmax_focal_loss_with_sparse_labels, indices=indices, gamma=1)
    last = loss(logits, weights=arrays[4])
    first = loss(jnp.moveaxis(logits, -1, 1), weights=arrays[4], axis=1)
    assert_close(first, last, rtol=1e-6)


# ---------------------------------------------------------------- losses of log-probabilities

POSITION_LOSSES = [
    loss
    for loss in focal_jax.catalogue.LOSSES.values()
    if loss.kind == "position" and not loss.name.startswith("dual")
]


@pytest.mark.parametrize("loss", POSITION_LOSSES, ids=lambda loss: loss.name)
def test_losses_of_log_probabilities(loss):
    logits = jnp.array([[0.0, m, 0.5] for m in (-80, -5, -0.3, 0, 2, 9, 17, 80)], jnp.float32)
    labels = jnp.zeros(8, jnp.int32)

    def of_statistics(z):
        found = focal_jax.token_statistics(z, labels)
        return engine.of_log_probability(loss.function, found.log_probability)

    def of_logits(z):
        return loss.function(z, labels)

    got, want = (
        (f(logits), jax.grad(lambda z, f=f: jnp.sum(f(z)))(logits))
        for f in (of_statistics, of_logits)
    )
    for a, b in zip(got, want):
        assert_close(a, b, rtol=1e-4, atol=1e-30)


def test_second_derivatives_in_log_probabilities():
    """`1 - p` has the derivative -p, also for a p that is small beside 1."""
    loss = focal_jax.softmax_focal_loss_with_integer_labels
    for log_p in (-20.0, -10.0, -1e-3):
        value = partial(engine.of_log_probability, loss, gamma=0.5)
        got = jax.grad(jax.grad(value))(jnp.float32(log_p))
        with mpmath.workdps(60):
            want = mpmath.diff(lambda x: -mpmath.sqrt(1 - mpmath.exp(x)) * x, mpmath.mpf(log_p), 2)
        assert got == pytest.approx(float(want), rel=1e-4)


def test_invalid_log_probabilities():
    loss = focal_jax.softmax_focal_loss_with_integer_labels
    log_p = jnp.array([0.0, -jnp.inf, jnp.nan, 0.1, jnp.nan])
    losses = engine.of_log_probability(loss, log_p, where=jnp.arange(5) < 4)
    np.testing.assert_array_equal(losses, [0, np.inf, np.nan, np.nan, 0])
    with pytest.raises(focal_jax.InputError, match=r"loss: .*whole row"):
        engine.of_log_probability(focal_jax.dual_focal_loss_with_integer_labels, log_p)
    with pytest.raises(focal_jax.InputError, match="loss: got"):
        engine.of_log_probability(focal_jax.sigmoid_focal_loss, log_p)


# ---------------------------------------------------------------- errors


@HEADS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": jnp.zeros(POSITIONS)}, "temperature: got 0, wanted a finite number > 0"),
        ({"temperature": -1.0}, "temperature: got -1"),
        ({"temperature": jnp.ones(7)}, r"temperature: got shape \(7,\)"),
        ({"labels": jnp.zeros(POSITIONS)}, "labels: got dtype float32"),
        ({"labels": jnp.zeros(5, jnp.int32)}, r"labels: got shape \(5,\)"),
        ({"where": jnp.ones(POSITIONS)}, "where: got dtype"),
        ({"ignore_label": 0.5}, "ignore_label: got 0.5"),
        ({"class_axis_name": 0}, "class_axis_name: got 0"),
    ],
)
def test_errors_of_statistics(head, change, message):
    arrays, indices = _inputs()
    arguments = {"labels": indices[..., 0]} | change
    if head is _dense:
        call = partial(focal_jax.token_statistics, _logits(*arrays[:4]))
    else:
        call = partial(focal_jax.linear_token_statistics, *arrays[:2])
    with pytest.raises(focal_jax.InputError, match=message):
        call(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": jnp.zeros((*POSITIONS, 2))}, "indices: got dtype float32"),
        ({"weights": jnp.zeros((*POSITIONS, 2))}, r"weights: got shape \(4, 3, 2\)"),
        ({"indices": jnp.zeros(4, jnp.int32)}, r"indices: got shape \(4,\)"),
        ({"alpha": jnp.ones(3)}, r"alpha: got shape \(3,\)"),
        ({"gamma": -1.0}, "gamma: got -1"),
        ({"smoothing": 1}, "smoothing"),
    ],
)
def test_errors_of_sparse_labels(change, message):
    arrays, indices = _inputs()
    arguments = {"indices": indices, "weights": arrays[4]} | change
    with pytest.raises((focal_jax.InputError, TypeError), match=message):
        focal_jax.softmax_focal_loss_with_sparse_labels(_logits(*arrays[:4]), **arguments)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("head", ["dense", "linear"])
def test_masked_weights_of_nan_do_not_trigger_debug_nans_in_eager_calls(head, dtype):
    indices, where = jnp.array([[0, 2], [1, 3]]), jnp.array([True, False])
    weights = jnp.array([[0.5, 0.5], [jnp.nan, 0.0]], dtype)
    jax.clear_caches()  # JAX checks the results of a program when it is new
    with jax.debug_nans(True):
        if head == "dense":
            function = focal_jax.softmax_focal_loss_with_sparse_labels
            losses = function(jnp.zeros((2, 4)), indices, weights, where=where)
        else:
            function = focal_jax.linear_softmax_focal_loss_with_sparse_labels
            losses = function(jnp.zeros((2, 3)), jnp.zeros((3, 4)), indices, weights, where=where)
    np.testing.assert_allclose(losses, [0.75**2 * np.log(4), 0], rtol=1e-6)


@pytest.mark.parametrize("hidden", [np.nan, np.inf, 1.0])
def test_masked_log_probabilities_have_gradient_zero(hidden):
    loss = focal_jax.softmax_focal_loss_with_integer_labels

    def total(log_p):
        where = jnp.array([True, False])
        return jnp.sum(engine.of_log_probability(loss, log_p, where=where))

    for order in (jax.grad(total), jax.hessian(total)):
        got, want = (jax.jit(order)(jnp.array([-1.0, x])) for x in (hidden, -2.0))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_gradient_of_class_weights_of_sparse_labels_does_not_drift(dtype):
    n = 20_000
    weights = jnp.tile(jnp.array([0.7, 0.3]), (n, 1))
    indices, alpha = jnp.tile(jnp.array([0, 1]), (n, 1)), jnp.ones(2, dtype)

    def dense(alpha):
        function = focal_jax.softmax_focal_loss_with_sparse_labels
        return function(jnp.zeros((n, 2)), indices, weights, alpha=alpha, gamma=0).mean()

    def linear(alpha):
        function = focal_jax.linear_softmax_focal_loss_with_sparse_labels
        arrays = jnp.zeros((n, 1)), jnp.zeros((1, 2)), indices, weights
        return function(*arrays, alpha=alpha, gamma=0).mean()

    want = (np.log(2) * jnp.array([0.7, 0.3])).astype(dtype)
    for function in (dense, linear):
        got = jax.jit(jax.grad(function))(alpha)
        rtol = 1e-5 if dtype == jnp.float32 else 0
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=rtol)


def test_sparse_weights_a_few_roundings_below_0_count_as_0():
    logits, indices = jnp.zeros((3, 4)), jnp.array([[0, 1]] * 3)
    for roundings, is_nan in ((3, False), (9, True)):
        below = -roundings * float(jnp.finfo(jnp.float32).eps)
        weights = jnp.array([[1, 0.0], [1, below], [1, 2]])
        losses = focal_jax.softmax_focal_loss_with_sparse_labels(logits, indices, weights)
        assert np.isnan(losses).tolist() == [False, is_nan, False]
        assert is_nan or losses[0] == losses[1]


def test_sparse_labels_without_classes_and_ambiguous_gamma():
    logits, pairs = jnp.zeros((2, 4, 4)), (jnp.zeros((2, 4, 1), int), jnp.ones((2, 4, 1)))
    function = focal_jax.softmax_focal_loss_with_sparse_labels
    with pytest.raises(InputError, match=r"gamma: got shape \(4,\), which fits the classes"):
        function(logits, *pairs, gamma=jnp.ones(4))
    with pytest.raises(InputError, match="logits: got 0 classes"):
        function(jnp.zeros((3, 0)), jnp.full((3, 1), -1), jnp.ones((3, 1)))
    arrays = jnp.zeros((2, 4, 3)), jnp.zeros((3, 4)), pairs[0]
    with pytest.raises(InputError, match=r"gamma: got shape \(4,\), which fits the classes"):
        focal_jax.linear_sigmoid_focal_loss(*arrays, gamma=jnp.ones(4))
