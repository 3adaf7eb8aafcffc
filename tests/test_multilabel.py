"""Tests of the linear heads of losses of one logit against the losses of a plain linear layer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax.sharding import PartitionSpec as P
from meshes import GATHERS, make_mesh, result_sizes

import focal_jax
from focal_jax import engine

pytestmark = pytest.mark.quick

POSITIONS, DEPTH, CLASSES, LABELS = (4, 3), 5, 24, 3


def _tempered(logit, label, scale, gamma):
    s = jax.nn.sigmoid(scale * logit)
    p = label * s + (1 - label) * (1 - s)
    return engine.power(1 - p, jnp.log1p(-p), gamma) * engine.cross_entropy(logit, label)


_TEMPERED = engine.elementwise_loss(_tempered, scale=1.0, gamma=engine.exponent(1.0))


def _one_more(x):
    return x[..., None]


# The linear head, the loss of one logit, and options that are numbers or one number per position.
HEADS = {
    "sigmoid": (
        focal_jax.linear_sigmoid_focal_loss,
        focal_jax.sigmoid_focal_loss,
        {"alpha": 0.3, "gamma": 1.7},
    ),
    "asymmetric": (
        focal_jax.linear_asymmetric_loss,
        focal_jax.asymmetric_loss,
        {"gamma_positive": 0.5, "gamma_negative": 2.5, "margin": 0.1},
    ),
    "engine": (_TEMPERED.linear, _TEMPERED, {"scale": 0.8, "gamma": 1.5}),
}
every_head = pytest.mark.parametrize("name", HEADS)


def _inputs(dtype=np.float32, labels=LABELS):
    """Return features, kernel and bias; then labels."""
    rng = np.random.default_rng(0)
    shapes = (*POSITIONS, DEPTH), (DEPTH, CLASSES), (CLASSES,)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    indices = rng.integers(0, CLASSES, (*POSITIONS, labels)).astype(np.int32)
    indices[1, :, -1:] = -1
    indices[0, 0] = indices[0, 0, :1]  # a class that is given several times counts once
    return arrays, jnp.asarray(indices)


def _plain(loss, features, kernel, bias, labels, **options):
    logits = features @ kernel + bias.reshape(1, 1, -1)
    classes = jnp.arange(CLASSES, dtype=jnp.int32).reshape(1, 1, 1, -1)
    is_label = jnp.any(labels[..., None] == classes, -2)
    options = {k: v[..., None] if jnp.ndim(v) else v for k, v in options.items()}
    return jnp.sum(loss(logits, is_label, **options), -1)


def _value_and_gradients(head, arrays, labels, options):
    """Return the losses and the gradients in all arrays and options, compiled."""

    def function(arrays, options):
        losses = head(*arrays, labels, **options)
        return jnp.sum(jnp.linspace(0.5, 2, losses.size).reshape(losses.shape) * losses), losses

    return jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))(arrays, options)


def _linear(head, **static):
    return lambda x, w, b, labels, **options: head(x, w, labels, bias=b, **static, **options)


def _assert_same(found, want, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, rtol=rtol, atol=rtol * float(jnp.max(jnp.abs(b), initial=0)))


@pytest.mark.one_in(6)
@every_head
@pytest.mark.parametrize("chunk_size", [None, 7, 24])
@pytest.mark.parametrize("labels", [0, LABELS, 20])
@pytest.mark.parametrize("shape", [(), POSITIONS], ids=["scalars", "arrays"])
def test_value_and_gradients(name, chunk_size, labels, shape):
    head, loss, options = HEADS[name]
    arrays, indices = _inputs(labels=labels)
    options = {k: jnp.full(shape, v, jnp.float32) for k, v in options.items()}
    head = _linear(head, chunk_size=chunk_size)
    found = _value_and_gradients(head, arrays, indices, options)
    _assert_same(found, _value_and_gradients(partial(_plain, loss), arrays, indices, options))


@every_head
def test_transposed_kernel(name):
    head, _, options = HEADS[name]
    (features, kernel, bias), labels = _inputs()
    want = head(features, kernel, labels, bias=bias, **options)
    found = head(features, kernel.T, labels, bias=bias, transpose_kernel=True, **options)
    _assert_same(found, want)


@pytest.mark.slow
@every_head
def test_second_derivatives(name, x64):
    head, loss, options = HEADS[name]
    arrays, labels = _inputs(np.float64)
    options = {k: jnp.float64(v) for k, v in options.items()}

    def along(head, *args):
        function = lambda *args: jnp.sum(jnp.sin(head(*args[0], labels, **args[1])))  # noqa: E731
        gradients = jax.tree.leaves(jax.grad(function, (0, 1))(*args))
        return sum(
            jnp.vdot(g, jnp.cos(jnp.arange(g.size, dtype=g.dtype)).reshape(g.shape))
            for g in gradients
        )

    heads = _linear(head, chunk_size=7), partial(_plain, loss)
    for transform in (jax.grad, jax.jacfwd):
        found, want = (
            jax.jit(transform(partial(along, h), (0, 1)))(arrays, options) for h in heads
        )
        _assert_same(found, want, 1e-9)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("check_vma", [True, False])
@every_head
def test_sharded_classes(name, check_vma):
    head, _, options = HEADS[name]
    arrays, labels = _inputs()
    options = {k: jnp.full(POSITIONS, v, jnp.float32) for k, v in options.items()}

    def sharded(features, kernel, bias, labels, **options):
        def local(x, w, b, labels, options):
            static = {"class_axis_name": "model", "chunk_size": 4}
            return head(x, w, labels, bias=b, **static, **options)

        data, specs = P("data"), (P("data"), P(None, "model"), P("model"), P("data"), P("data"))
        mapped = jax.shard_map(
            local, mesh=make_mesh((2, 4)), in_specs=specs, out_specs=data, check_vma=check_vma
        )
        return mapped(features, kernel, bias, labels, options)

    found = _value_and_gradients(sharded, arrays, labels, options)
    _assert_same(found, _value_and_gradients(_linear(head), arrays, labels, options))
    text = jax.jit(sharded).lower(*arrays, labels, **options).compile().as_text()
    assert not result_sizes(text, GATHERS)


@every_head
def test_masks_and_invalid_labels(name):
    head, _, options = HEADS[name]
    arrays, labels = _inputs()
    labels = labels.at[1, 0, 0].set(CLASSES).at[2, 0, 0].set(-2).at[0, 0, 0].set(CLASSES)
    arrays[0] = arrays[0].at[0].set(jnp.nan)
    where = jnp.ones(POSITIONS, bool).at[0].set(False)
    losses = head(*arrays[:2], labels, where=where, **options)
    assert np.argwhere(np.isnan(losses)).tolist() == [[1, 0], [2, 0]]
    assert not np.any(losses[0])
    where = where.at[1, 0].set(False).at[2, 0].set(False)

    def total(*arrays):
        return jnp.sum(head(*arrays, labels, where=where, **options))

    gradients = jax.jit(jax.grad(total, (0, 1)))(*arrays[:2])
    assert all(np.all(np.isfinite(g)) for g in gradients)
    assert not np.any(np.asarray(gradients[0])[~np.asarray(where)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@every_head
def test_16_bits(name, dtype):
    head, _, options = HEADS[name]
    (features, kernel, _), labels = _inputs(dtype)

    def function(x, w):
        return jnp.sum(head(x, w, labels, chunk_size=7, **options))

    value, gradients = jax.value_and_grad(function, (0, 1))(features, kernel)
    wide = features.astype(jnp.float32), kernel.astype(jnp.float32)
    want, exact = jax.value_and_grad(function, (0, 1))(*wide)
    assert value.dtype == jnp.float32
    assert_close(value, want, rtol=1e-5)
    for a, b in zip(gradients, exact):
        assert a.dtype == dtype
        assert_close(a.astype(jnp.float32), b, rtol=2e-2, atol=1e-2 * float(jnp.max(jnp.abs(b))))


def test_16_bit_features_with_a_float32_kernel():
    (features, kernel, _), labels = _inputs()
    half = features.astype(jnp.bfloat16)
    for head, columns in (
        (focal_jax.linear_sigmoid_focal_loss, labels),
        (lambda *args: focal_jax.linear_token_statistics(*args).entropy, labels[..., 0] % CLASSES),
    ):
        found, want = head(half, kernel, columns), head(half.astype(jnp.float32), kernel, columns)
        assert_close(found, want, rtol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "asymmetric"])
@pytest.mark.parametrize("sign", [-1, 1], ids=["positive at -inf", "negative at inf"])
def test_infinite_logits_have_the_gradient_of_the_dense_loss(name, sign):
    head, loss, options = HEADS[name]
    features, kernel = jnp.ones((1, 1)), jnp.zeros((1, 2))
    bias, labels = jnp.array([0.0, sign * jnp.inf]), jnp.array([[0, int(sign < 0)]])
    options = {k: jnp.float32(x) for k, x in options.items()}

    def dense(bias, options):
        return jnp.sum(loss(features @ kernel + bias[None], labels, **options))

    def linear(bias, options):
        index = jnp.array([[1 if sign < 0 else -1]])
        return jnp.sum(head(features, kernel, index, bias=bias, **options))

    found, want = (jax.jit(jax.grad(f, (0, 1)))(bias, options) for f in (linear, dense))
    assert np.all(np.isfinite(found[0]))
    assert_close(found, want, 1e-6)


def test_a_sum_that_a_formula_with_1_minus_p_loses():
    # Every class adds about exp(-60): its factor (1 - p)**2 is 0 if 1 - p is a difference.
    features, kernel = jnp.ones((1, 1)), jnp.full((1, 50), -20.0).at[0, 3].set(20.0)
    losses = focal_jax.linear_sigmoid_focal_loss(features, kernel, jnp.array([[3]]), gamma=2.0)
    np.testing.assert_allclose(losses, [50 * np.exp(-60.0)], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": jnp.zeros((*POSITIONS, 2))}, "labels: got dtype float32, wanted an integer"),
        ({"labels": jnp.zeros((5, 2), jnp.int32)}, r"labels: got shape \(5, 2\), wanted"),
        ({"kernel": jnp.zeros((4, 6))}, r"kernel: got shape \(4, 6\)"),
        ({"bias": jnp.zeros(3)}, r"bias: got shape \(3,\)"),
        ({"alpha": 2.0}, "alpha: got 2, wanted a number in"),
        ({"gamma": jnp.ones(7)}, r"gamma: got shape \(7,\)"),
        ({"where": jnp.ones(POSITIONS)}, "where: got dtype float32, wanted bool"),
        ({"chunk_size": 0}, "chunk_size: got 0"),
        ({"class_axis_name": 1}, "class_axis_name: got 1"),
    ],
)
def test_errors(change, message):
    (features, kernel, bias), labels = _inputs()
    arguments = {"features": features, "kernel": kernel, "bias": bias, "labels": labels} | change
    with pytest.raises(focal_jax.InputError, match=message):
        focal_jax.linear_sigmoid_focal_loss(**arguments)
