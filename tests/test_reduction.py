"""The divisor, on one device and on several."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P

import focal_jax
from focal_jax import _reduction
from focal_jax._checks import NORMALIZATIONS, InputError

LOSSES = jnp.arange(1.0, 13.0).reshape(4, 3)
WHERE = LOSSES % 5 != 0
DIVISORS = {
    "none": 1,
    "full": 12,
    "valid": int(WHERE.sum()),
    "batch_size": 4,
    7: 7,
    0.25: 1,
    0: 1,
}


@pytest.mark.parametrize("module", [focal_jax, focal_jax.reference], ids=["ours", "reference"])
@pytest.mark.parametrize("normalization", DIVISORS)
def test_divisors(module, normalization):
    got = module.reduce_loss(LOSSES, normalization=normalization, where=WHERE)
    assert got.shape == ()
    total = float(LOSSES[WHERE].sum())
    np.testing.assert_allclose(got, total / DIVISORS[normalization], rtol=1e-6)
    if not isinstance(normalization, str):
        got = module.reduce_loss(LOSSES, normalization=jnp.asarray(normalization), where=WHERE)
        np.testing.assert_allclose(got, total / DIVISORS[normalization], rtol=1e-6)


@pytest.mark.parametrize(("said", "meant"), [("sum", "none"), ("mean", "full")])
@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_two_words_for_one_divisor(said, meant, axis_name):
    def reduced(normalization):
        def one(losses, where):
            return focal_jax.reduce_loss(
                losses, normalization=normalization, where=where, axis_name=axis_name
            )

        return jax.vmap(one, axis_name="batch")(LOSSES, WHERE)

    np.testing.assert_array_equal(reduced(said), reduced(meant))


def test_the_default_is_the_mean_over_the_valid_positions():
    assert_close(focal_jax.reduce_loss(LOSSES), LOSSES.mean(), 1e-7)
    assert_close(focal_jax.reduce_loss(LOSSES, where=WHERE), LOSSES[WHERE].mean(), 1e-7)
    rows = jnp.array([[True], [False], [True], [True]])
    want = LOSSES[jnp.array([0, 2, 3])].mean()
    assert_close(focal_jax.reduce_loss(LOSSES, where=rows), want, 1e-7)


@pytest.mark.parametrize("normalization", [n for n in DIVISORS if isinstance(n, str)])
def test_nothing_valid_is_zero(normalization):
    nothing = jnp.zeros((4, 3), bool)
    reduce = jax.value_and_grad(
        lambda x: focal_jax.reduce_loss(x, normalization=normalization, where=nothing)
    )
    value, gradient = reduce(jnp.full((4, 3), jnp.nan))
    assert value == 0
    assert np.all(gradient == 0)
    empty = jnp.zeros((0, 3))
    assert focal_jax.reduce_loss(empty, normalization=normalization) == 0


def test_sixteen_bit_losses_are_summed_in_float32():
    losses = jnp.full((4096,), 1.001, jnp.bfloat16)
    got = focal_jax.reduce_loss(losses, normalization="none")
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 4096 * float(losses[0]), rtol=1e-6)


def test_differentiable_divisor():
    gradient = jax.grad(lambda d: focal_jax.reduce_loss(LOSSES, normalization=d))(jnp.float32(8))
    np.testing.assert_allclose(gradient, -LOSSES.sum() / 64, rtol=1e-6)


LABELS = np.array([[0, 2, -1], [-1, 1, 0], [2, 2, -1], [0, -1, 1]])


@pytest.mark.parametrize("labels", [LABELS.astype(np.int8), LABELS, jnp.asarray(LABELS)])
@pytest.mark.parametrize("where", [None, WHERE, WHERE[:, :1], WHERE[0]])
@pytest.mark.parametrize("normalization", ["valid", "mean"])
def test_an_ignored_label_does_not_count(labels, where, normalization):
    losses = jnp.where(LABELS == -1, jnp.nan, LOSSES)
    counts = (LABELS != -1) & (True if where is None else np.asarray(where))
    value, gradient = jax.value_and_grad(focal_jax.reduce_loss)(
        losses, normalization=normalization, where=where, labels=labels, ignore_label=-1
    )
    divisor = counts.sum() if normalization == "valid" else 12
    np.testing.assert_allclose(value, np.asarray(LOSSES)[counts].sum() / divisor, rtol=1e-6)
    np.testing.assert_allclose(gradient, counts / divisor, rtol=1e-6)
    # Labels alone ignore nothing, as for the losses.
    np.testing.assert_array_equal(
        focal_jax.reduce_loss(LOSSES, where=where, labels=labels),
        focal_jax.reduce_loss(LOSSES, where=where),
    )


def test_it_counts_as_the_loss_does():
    logits = jax.random.normal(jax.random.key(0), (4, 3, 5))
    losses = focal_jax.softmax_focal_loss_with_integer_labels(logits, LABELS, ignore_label=-1)
    kept = focal_jax.softmax_focal_loss_with_integer_labels(
        logits[LABELS != -1], LABELS[LABELS != -1]
    )
    got = focal_jax.reduce_loss(losses, labels=LABELS, ignore_label=-1)
    np.testing.assert_allclose(got, kept.mean(), rtol=1e-6)


WEIGHTS = np.array([[0.5, 0, 0.25], [0, 0, 0], [0.125, 0.5, 1], [0.25, 0, 0]], np.float32)
WEIGHTED = {"valid": None, "mean": 12, "sum": 1, "batch_size": 4, 0.25: 0.25, 0: 1, -2: 1}


@pytest.mark.parametrize("normalization", WEIGHTED)
@pytest.mark.parametrize("scale", [1e-3, 1, 100])
@pytest.mark.parametrize("where", [None, WHERE])
def test_weights(normalization, scale, where):
    counts = np.ones((4, 3), bool) if where is None else np.asarray(where)
    weights = scale * WEIGHTS * counts
    divisor = WEIGHTED[normalization] or weights.sum()
    assert scale != 1e-3 or weights.sum() < 1  # fractions, that a floor of 1 would spoil

    def reduced(losses, weights):
        return focal_jax.reduce_loss(
            losses, normalization=normalization, where=where, weights=weights
        )

    # What is masked does not count, whatever it weighs.
    given = np.where(counts, scale * WEIGHTS, np.nan)
    value, gradients = jax.value_and_grad(reduced, argnums=(0, 1))(LOSSES, jnp.asarray(given))
    want = (weights * np.asarray(LOSSES)).sum() / divisor
    np.testing.assert_allclose(value, want, rtol=1e-6)
    of_weights = counts * (np.asarray(LOSSES) - (want if normalization == "valid" else 0)) / divisor
    assert_close(gradients, (weights / divisor, of_weights), 1e-6)


def test_weights_broadcast_and_may_be_integers():
    weights = np.array([[3], [0], [1], [2]])
    want = (weights * np.asarray(LOSSES)).sum() / 18
    np.testing.assert_allclose(focal_jax.reduce_loss(LOSSES, weights=weights), want, rtol=1e-6)
    # Counts of 2**32 are not 0.
    weights = weights.astype(np.int64) * 2**32
    np.testing.assert_allclose(focal_jax.reduce_loss(LOSSES, weights=weights), want, rtol=1e-6)
    row = jnp.array([1.0, 0.0, 3.0], jnp.bfloat16)
    want = (np.array([1, 0, 3]) * np.asarray(LOSSES)).sum() / 16
    np.testing.assert_allclose(focal_jax.reduce_loss(LOSSES, weights=row), want, rtol=1e-6)
    np.testing.assert_allclose(
        focal_jax.reduce_loss(LOSSES, weights=0.001), LOSSES.mean(), rtol=1e-6
    )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_no_weight_at_all_is_zero_and_a_negative_one_is_loud(normalization):
    def reduced(losses, weights):
        return focal_jax.reduce_loss(losses, normalization=normalization, weights=weights)

    value, gradients = jax.value_and_grad(reduced, argnums=(0, 1))(LOSSES, 0 * LOSSES)
    assert value == 0
    assert np.all(gradients[0] == 0)
    assert np.isfinite(gradients[1]).all()
    assert np.isnan(reduced(LOSSES, jnp.asarray(WEIGHTS).at[1, 1].set(-1e-3)))
    assert reduced(LOSSES[:0], WEIGHTS[:0]) == 0
    for negative in (-1.0, -np.ones(LOSSES.shape, np.float32)):
        with pytest.raises(ValueError, match=r"weights: got -1\.0, wanted zero or more"):
            reduced(LOSSES, negative)


POD = (65536, 32768)


@pytest.mark.parametrize("normalization", ["valid", "mean"])
@pytest.mark.parametrize("where", [None, (65536, 1), (32768,), POD])
def test_a_count_beyond_int32_can_be_traced(normalization, where):
    shapes = {"losses": POD, "where": where}
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
def test_a_mask_that_broadcasts_counts_beyond_int32(shape):
    losses = jax.ShapeDtypeStruct((65536, 49152, 3), jnp.float32)
    where = jnp.ones(shape, bool).at[0, -1, 0].set(len(shape) == sum(shape))
    counted = int(where.sum()) * (losses.size // where.size)
    assert counted > 2**31
    np.testing.assert_allclose(_reduction._count(where, losses), counted, rtol=1e-7)


@pytest.mark.parametrize("shape", [POD, (32768, 2, 65536), (2**24, 300, 7), (3, 2**31)])
def test_no_partial_count_can_wrap(shape):
    losses = jax.ShapeDtypeStruct(shape, jnp.float32)
    counts = jax.make_jaxpr(lambda where: _reduction._count(where, losses))(
        jax.ShapeDtypeStruct(shape, bool)
    )
    sums = {str(x.invars[0].aval.dtype): x for x in counts.eqns if x.primitive.name == "reduce_sum"}
    sizes = sums["int32"].invars[0].aval.shape
    assert math.prod(sizes[axis] for axis in sums["int32"].params["axes"]) < 2**31
    # And few are left to be added in floating point, so that no sum of ones can stagnate.
    assert sums["float32"].invars[0].aval.size <= 2**16 or 2**31 in shape


def test_partial_counts_add_up(monkeypatch):
    monkeypatch.setattr(_reduction, "_WRAPS", 50)
    where = jax.random.bernoulli(jax.random.key(0), 0.7, (3, 11, 4, 5))
    losses = jax.ShapeDtypeStruct(where.shape, jnp.float32)
    assert _reduction._count(where, losses) == int(where.sum())


@pytest.mark.parametrize("normalization", ["valid", "mean", "batch_size"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_pod_s_count_does_not_wrap(normalization, masked):
    losses = jnp.ones((65536, 3))
    where = (jnp.arange(65536) % 4 > 0)[:, None] if masked else None

    def device(losses, where):
        return focal_jax.reduce_loss(
            losses, normalization=normalization, where=where, axis_name="pod"
        )

    pod = jax.vmap(device, axis_name="pod", axis_size=2**20, in_axes=None, out_axes=None)
    want = focal_jax.reduce_loss(losses, normalization=normalization, where=where)
    assert want > 0
    np.testing.assert_allclose(pod(losses, where), want, rtol=1e-6)


@pytest.mark.parametrize("divisor", [2**40, np.int64(2**40), np.array(2**40)])
def test_a_divisor_of_64_bits_does_not_wrap(divisor):
    got = focal_jax.reduce_loss(LOSSES, normalization=divisor)
    np.testing.assert_allclose(got, float(LOSSES.sum()) / 2**40, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization": None}, "normalization: got None, wanted one of .*'sum', .*'mean'"),
        ({"normalization": jax.random.key(0)}, "normalization: got dtype key"),
        ({"normalization": [1, [2]]}, "normalization: got"),
        ({"normalization": {}}, "normalization: got {}, wanted a number"),
        ({"normalization": 1j}, "normalization: got dtype complex"),
        ({"weights": "token"}, "weights: got 'token', wanted"),
        ({"weights": jnp.ones(4)}, r"weights: got shape \(4,\), wanted one that broadcasts"),
        ({"weights": jnp.ones((1, 4, 3))}, r"weights: got shape \(1, 4, 3\), wanted"),
        ({"ignore_label": -1}, "ignore_label: got -1 and no labels"),
        ({"labels": jnp.zeros((4, 3)), "ignore_label": 0}, "labels: got dtype float32"),
        ({"labels": jnp.zeros((4, 1), int), "ignore_label": 0}, r"labels: got shape \(4, 1\)"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        focal_jax.reduce_loss(LOSSES, **options)


def _uneven(devices):
    """Return losses and a mask with uneven counts, and one device with nothing valid."""
    rng = np.random.default_rng(0)
    losses = jnp.asarray(rng.random((devices, 3, 5)), jnp.float32)
    where = jnp.asarray(rng.random((devices, 3, 5)) < 0.4).at[1].set(False)
    return losses, where


@pytest.mark.parametrize("how", ["vmap", "pmap", "shard_map", "shard_map, two axes"])
@pytest.mark.parametrize("valid", ["some", "nothing", "weighted"])
def test_pmean_is_the_result_of_one_device(how, valid):
    losses, where = _uneven(8)
    where = jnp.zeros_like(where) if valid == "nothing" else where
    if valid == "weighted":  # with a sum far below 1
        where = jnp.where(where, 0.01 * jnp.arange(1.0, 6.0), 0)
    names = ("data", "model") if how.endswith("axes") else ("data",)

    def one(x, where, axis_name=None):
        counts = {"weights" if valid == "weighted" else "where": where}
        reduced = [
            jax.value_and_grad(focal_jax.reduce_loss)(
                x, normalization=normalization, axis_name=axis_name, **counts
            )
            for normalization in DIVISORS
        ]
        values, gradients = zip(*reduced)
        return jnp.stack(values), jnp.stack(gradients, 1)

    def local(x, where):
        name = names if len(names) > 1 else names[0]
        values, gradients = one(x, where, name)
        # The gradient of a pmean over the devices: each has its part of the batch.
        return lax.pmean(values, name), gradients / lax.axis_size(name)

    flat, mask = losses.reshape(24, 5), where.reshape(24, 5)
    if how in ("vmap", "pmap"):
        mapped = {"vmap": jax.vmap, "pmap": jax.pmap}[how](local, axis_name="data")
        values, gradients = mapped(losses, where)
        values, gradients = values[0], gradients.reshape(24, -1, 5)
    else:
        shape = (8,) if len(names) == 1 else (2, 4)
        mesh = Mesh(np.array(jax.devices()).reshape(shape), names)
        values, gradients = jax.jit(
            jax.shard_map(local, mesh=mesh, in_specs=P(names), out_specs=(P(), P(names)))
        )(flat, mask)
    assert_close((values, gradients), jax.jit(one)(flat, mask), 1e-6)
    assert valid == "nothing" or len(set(values.tolist())) > 4
