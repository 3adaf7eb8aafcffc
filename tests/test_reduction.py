"""`reduce_loss`: the denominators, on one device and on several devices."""

import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P

import focal_jax
from focal_jax import InputError
from focal_jax.reduction import NORMALIZATIONS, count_true

pytestmark = pytest.mark.quick

LOSSES = jnp.arange(1.0, 13.0).reshape(4, 3)
WHERE = LOSSES % 5 != 0
DENOMINATORS = {
    "sum": 1,
    "mean": 12,
    "valid": int(WHERE.sum()),
    "batch_size": 4,
    7: 7,
    0.25: 1,
    0: 1,
}


@pytest.mark.parametrize("module", [focal_jax, focal_jax.reference], ids=["focal_jax", "reference"])
@pytest.mark.parametrize("normalization", DENOMINATORS)
def test_denominators(module, normalization):
    got = module.reduce_loss(LOSSES, normalization=normalization, where=WHERE)
    assert got.shape == ()
    total = float(LOSSES[WHERE].sum())
    np.testing.assert_allclose(got, total / DENOMINATORS[normalization], rtol=1e-6)
    if not isinstance(normalization, str):
        got = module.reduce_loss(LOSSES, normalization=jnp.asarray(normalization), where=WHERE)
        np.testing.assert_allclose(got, total / DENOMINATORS[normalization], rtol=1e-6)


@pytest.mark.parametrize(("word", "wanted"), [("none", "'sum' divides by 1"), ("full", "'mean'")])
def test_words_of_caffe_are_errors_that_name_the_replacement(word, wanted):
    words = r"wanted one of \('sum', 'mean', 'valid', 'batch_size'\), a number .*; "
    with pytest.raises(InputError, match=f"normalization: got '{word}', {words}{wanted}"):
        focal_jax.reduce_loss(LOSSES, normalization=word)


def test_default_is_the_mean_over_valid_positions():
    assert_close(focal_jax.reduce_loss(LOSSES), LOSSES.mean(), 1e-7)
    assert_close(focal_jax.reduce_loss(LOSSES, where=WHERE), LOSSES[WHERE].mean(), 1e-7)
    rows = jnp.array([[True], [False], [True], [True]])
    want = LOSSES[jnp.array([0, 2, 3])].mean()
    assert_close(focal_jax.reduce_loss(LOSSES, where=rows), want, 1e-7)


@pytest.mark.parametrize("normalization", [n for n in DENOMINATORS if isinstance(n, str)])
def test_result_is_zero_if_all_positions_are_masked(normalization):
    where = jnp.zeros((4, 3), bool)
    reduce = jax.value_and_grad(
        lambda x: focal_jax.reduce_loss(x, normalization=normalization, where=where)
    )
    value, gradient = reduce(jnp.full((4, 3), jnp.nan))
    assert value == 0
    assert np.all(gradient == 0)
    empty = jnp.zeros((0, 3))
    assert focal_jax.reduce_loss(empty, normalization=normalization) == 0


def test_16_bit_losses_are_summed_in_float32():
    losses = jnp.full((4096,), 1.001, jnp.bfloat16)
    got = focal_jax.reduce_loss(losses, normalization="sum")
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 4096 * float(losses[0]), rtol=1e-6)


def test_denominator_is_differentiable():
    gradient = jax.grad(lambda d: focal_jax.reduce_loss(LOSSES, normalization=d))(jnp.float32(8))
    np.testing.assert_allclose(gradient, -LOSSES.sum() / 64, rtol=1e-6)


LABELS = np.array([[0, 2, -1], [-1, 1, 0], [2, 2, -1], [0, -1, 1]])


@pytest.mark.parametrize("labels", [LABELS.astype(np.int8), LABELS, jnp.asarray(LABELS)])
@pytest.mark.parametrize("where", [None, WHERE, WHERE[:, :1], WHERE[0]])
@pytest.mark.parametrize("normalization", ["valid", "mean"])
def test_ignored_labels_are_masked(labels, where, normalization):
    losses = jnp.where(LABELS == -1, jnp.nan, LOSSES)
    counted = (LABELS != -1) & (True if where is None else np.asarray(where))
    value, gradient = jax.value_and_grad(focal_jax.reduce_loss)(
        losses, normalization=normalization, where=where, labels=labels, ignore_label=-1
    )
    denominator = counted.sum() if normalization == "valid" else 12
    np.testing.assert_allclose(value, np.asarray(LOSSES)[counted].sum() / denominator, rtol=1e-6)
    np.testing.assert_allclose(gradient, counted / denominator, rtol=1e-6)
    # Labels without ignore_label have no effect.
    np.testing.assert_array_equal(
        focal_jax.reduce_loss(LOSSES, where=where, labels=labels),
        focal_jax.reduce_loss(LOSSES, where=where),
    )


def test_ignore_label_agrees_with_the_loss():
    logits = jax.random.normal(jax.random.key(0), (4, 3, 5))
    losses = focal_jax.softmax_focal_loss_with_integer_labels(logits, LABELS, ignore_label=-1)
    valid = focal_jax.softmax_focal_loss_with_integer_labels(
        logits[LABELS != -1], LABELS[LABELS != -1]
    )
    got = focal_jax.reduce_loss(losses, labels=LABELS, ignore_label=-1)
    np.testing.assert_allclose(got, valid.mean(), rtol=1e-6)


WEIGHTS = np.array([[0.5, 0, 0.25], [0, 0, 0], [0.125, 0.5, 1], [0.25, 0, 0]], np.float32)
WEIGHTED = {"valid": None, "mean": 12, "sum": 1, "batch_size": 4, 0.25: 0.25, 0: 1}


@pytest.mark.parametrize("normalization", WEIGHTED)
@pytest.mark.parametrize("scale", [1e-3, 1, 100])
@pytest.mark.parametrize("where", [None, WHERE])
def test_weights(normalization, scale, where):
    counted = np.ones((4, 3), bool) if where is None else np.asarray(where)
    weights = scale * WEIGHTS * counted
    denominator = WEIGHTED[normalization] or weights.sum()
    assert scale != 1e-3 or weights.sum() < 1  # a denominator below 1 is not rounded up to 1

    def reduced(losses, weights):
        return focal_jax.reduce_loss(
            losses, normalization=normalization, where=where, weights=weights
        )

    # The weights of masked positions are ignored.
    given = np.where(counted, scale * WEIGHTS, np.nan)
    value, gradients = jax.value_and_grad(reduced, argnums=(0, 1))(LOSSES, jnp.asarray(given))
    want = (weights * np.asarray(LOSSES)).sum() / denominator
    np.testing.assert_allclose(value, want, rtol=1e-6)
    mean = want if normalization == "valid" else 0
    weight_gradient = counted * (np.asarray(LOSSES) - mean) / denominator
    assert_close(gradients, (weights / denominator, weight_gradient), 1e-6)


def test_weights_broadcast_and_may_be_integers():
    weights = np.array([[3], [0], [1], [2]])
    want = (weights * np.asarray(LOSSES)).sum() / 18
    np.testing.assert_allclose(focal_jax.reduce_loss(LOSSES, weights=weights), want, rtol=1e-6)
    # Integer weights of 64 bits do not wrap.
    weights = weights.astype(np.int64) * 2**32
    np.testing.assert_allclose(focal_jax.reduce_loss(LOSSES, weights=weights), want, rtol=1e-6)
    row = jnp.array([1.0, 0.0, 3.0], jnp.bfloat16)
    want = (np.array([1, 0, 3]) * np.asarray(LOSSES)).sum() / 16
    np.testing.assert_allclose(focal_jax.reduce_loss(LOSSES, weights=row), want, rtol=1e-6)
    np.testing.assert_allclose(
        focal_jax.reduce_loss(LOSSES, weights=0.001), LOSSES.mean(), rtol=1e-6
    )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_zero_weights_give_zero_and_negative_weights_are_invalid(normalization):
    def reduced(losses, weights):
        return focal_jax.reduce_loss(losses, normalization=normalization, weights=weights)

    value, gradients = jax.value_and_grad(reduced, argnums=(0, 1))(LOSSES, 0 * LOSSES)
    assert value == 0
    assert np.all(gradients[0] == 0)
    assert np.isfinite(gradients[1]).all()
    assert np.isnan(reduced(LOSSES, jnp.asarray(WEIGHTS).at[1, 1].set(-1e-3)))
    assert reduced(LOSSES[:0], WEIGHTS[:0]) == 0
    for negative in (-1.0, -np.ones(LOSSES.shape, np.float32)):
        with pytest.raises(ValueError, match=r"weights: got -1\.0, wanted numbers >= 0"):
            reduced(LOSSES, negative)


LARGE = (65536, 32768)  # more than 2**31 - 1 positions


@pytest.mark.parametrize("normalization", ["valid", "mean"])
@pytest.mark.parametrize("where", [None, (65536, 1), (32768,), LARGE])
def test_counts_beyond_int32_can_be_traced(normalization, where):
    shapes = {"losses": LARGE, "where": where}
    arrays = {
        name: shape and jax.ShapeDtypeStruct(shape, "bool" if name == "where" else "float32")
        for name, shape in shapes.items()
    }
    out = jax.eval_shape(
        lambda losses, where: focal_jax.reduce_loss(
            losses, where=where, normalization=normalization
        ),
        **arrays,
    )
    assert out.shape == ()


@pytest.mark.parametrize("shape", [(65536, 1, 1), (1, 49152, 1), (1, 1, 3), (1, 1, 1)])
def test_counts_beyond_int32_of_a_mask_that_broadcasts(shape):
    losses = jax.ShapeDtypeStruct((65536, 49152, 3), jnp.float32)
    where = jnp.ones(shape, bool).at[0, -1, 0].set(len(shape) == sum(shape))
    counted = int(where.sum()) * (losses.size // where.size)
    assert counted > 2**31
    np.testing.assert_allclose(count_true(where, losses), counted, rtol=1e-7)


@pytest.mark.parametrize("shape", [LARGE, (32768, 2, 65536), (2**24, 300, 7), (3, 2**31)])
def test_partial_counts_cannot_wrap(shape):
    losses = jax.ShapeDtypeStruct(shape, jnp.float32)
    counts = jax.make_jaxpr(lambda where: count_true(where, losses))(
        jax.ShapeDtypeStruct(shape, bool)
    )
    sums = {str(x.invars[0].aval.dtype): x for x in counts.eqns if x.primitive.name == "reduce_sum"}
    sizes = sums["int32"].invars[0].aval.shape
    assert math.prod(sizes[axis] for axis in sums["int32"].params["axes"]) < 2**31
    # The floating sum has few terms: a float32 sum of ones would stop growing at 2**24.
    assert sums["float32"].invars[0].aval.size <= 2**16 or 2**31 in shape


def test_partial_counts_add_up():
    where = jax.random.bernoulli(jax.random.key(0), 0.7, (3, 11, 4, 5))
    losses = jax.ShapeDtypeStruct(where.shape, jnp.float32)
    assert count_true(where, losses, int32_limit=50) == int(where.sum())


@pytest.mark.parametrize("normalization", ["valid", "mean", "batch_size"])
@pytest.mark.parametrize("masked", [False, True])
def test_counts_over_many_devices_do_not_wrap(normalization, masked):
    losses = jnp.ones((65536, 3))
    where = (jnp.arange(65536) % 4 > 0)[:, None] if masked else None

    def device(losses, where):
        return focal_jax.reduce_loss(
            losses, normalization=normalization, where=where, axis_name="devices"
        )

    mapped = jax.vmap(device, axis_name="devices", axis_size=2**20, in_axes=None, out_axes=None)
    want = focal_jax.reduce_loss(losses, normalization=normalization, where=where)
    assert want > 0
    np.testing.assert_allclose(mapped(losses, where), want, rtol=1e-6)


@pytest.mark.parametrize("denominator", [2**40, np.int64(2**40), np.array(2**40)])
def test_64_bit_denominators_do_not_wrap(denominator):
    got = focal_jax.reduce_loss(LOSSES, normalization=denominator)
    np.testing.assert_allclose(got, float(LOSSES.sum()) / 2**40, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization": None}, "normalization: got None, wanted one of .*'sum', .*'mean'"),
        ({"normalization": jax.random.key(0)}, "normalization: got dtype key"),
        ({"normalization": [1, [2]]}, "normalization: got"),
        ({"normalization": {}}, "normalization: got {}, wanted finite numbers"),
        ({"normalization": 1e39}, "normalization: got .*, wanted finite .* range of float32"),
        ({"normalization": 1j}, "normalization: got dtype complex"),
        ({"weights": "token"}, "weights: got 'token', wanted"),
        ({"weights": jnp.ones(4)}, r"weights: got shape \(4,\), wanted a shape that broadcasts"),
        ({"weights": jnp.ones((1, 4, 3))}, r"weights: got shape \(1, 4, 3\), wanted"),
        ({"ignore_label": -1}, "ignore_label: got -1 without labels"),
        ({"labels": jnp.zeros((4, 3)), "ignore_label": 0}, "labels: got dtype float32"),
        ({"labels": jnp.zeros((4, 1), int), "ignore_label": 0}, r"labels: got shape \(4, 1\)"),
    ],
)
def test_errors_name_the_option(options, message):
    with pytest.raises(InputError, match=message):
        focal_jax.reduce_loss(LOSSES, **options)


def _uneven(devices):
    """Return losses and a mask with uneven counts per device. One device has no valid position."""
    rng = np.random.default_rng(0)
    losses = jnp.asarray(rng.random((devices, 3, 5)), jnp.float32)
    where = jnp.asarray(rng.random((devices, 3, 5)) < 0.4).at[1].set(False)
    return losses, where


@pytest.mark.parametrize("transform", ["vmap", "pmap", "shard_map", "shard_map, two axes"])
@pytest.mark.parametrize("valid", ["some", "none", "weighted"])
def test_pmean_over_devices_equals_the_result_on_one_device(transform, valid):
    losses, where = _uneven(8)
    where = jnp.zeros_like(where) if valid == "none" else where
    if valid == "weighted":  # the sum of the weights is far below 1
        where = jnp.where(where, 0.01 * jnp.arange(1.0, 6.0), 0)
    names = ("data", "model") if transform.endswith("axes") else ("data",)

    def one(x, where, axis_name=None):
        options = {"weights" if valid == "weighted" else "where": where}
        reduced = [
            jax.value_and_grad(focal_jax.reduce_loss)(
                x, normalization=normalization, axis_name=axis_name, **options
            )
            for normalization in DENOMINATORS
        ]
        values, gradients = zip(*reduced)
        return jnp.stack(values), jnp.stack(gradients, 1)

    def local(x, where):
        name = names if len(names) > 1 else names[0]
        values, gradients = one(x, where, name)
        # The gradient of a pmean with respect to the part of the batch on this device.
        return lax.pmean(values, name), gradients / lax.axis_size(name)

    flat, mask = losses.reshape(24, 5), where.reshape(24, 5)
    if transform in ("vmap", "pmap"):
        mapped = {"vmap": jax.vmap, "pmap": jax.pmap}[transform](local, axis_name="data")
        values, gradients = mapped(losses, where)
        values, gradients = values[0], gradients.reshape(24, -1, 5)
    else:
        shape = (8,) if len(names) == 1 else (2, 4)
        mesh = Mesh(np.array(jax.devices()).reshape(shape), names)
        values, gradients = jax.jit(
            jax.shard_map(local, mesh=mesh, in_specs=P(names), out_specs=(P(), P(names)))
        )(flat, mask)
    assert_close((values, gradients), jax.jit(one)(flat, mask), 1e-6)
    assert valid == "none" or len(set(values.tolist())) > 4


def test_tuples_of_arrays_are_no_losses():
    losses = focal_jax.softmax_focal_loss_with_integer_labels(
        jnp.zeros((2, 3)), jnp.array([0, 1]), return_logsumexp=True
    )
    with pytest.raises(focal_jax.InputError, match="losses: got a tuple of arrays"):
        focal_jax.reduce_loss(losses)


def test_a_fraction_is_a_weight():
    losses = jnp.array([1.0, 3.0])
    assert focal_jax.reduce_loss(losses, weights=fractions.Fraction(1, 2)) == 2
