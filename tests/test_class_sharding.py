"""Tests that losses whose classes are sharded over devices equal those on one device."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads import (
    dense,
    directional_derivative,
    engine_dense,
    engine_linear,
    formula,
    inputs,
    linear,
    softmax,
    total,
    value_and_gradients,
)
from helpers import assert_close
from jax import lax
from jax.sharding import PartitionSpec as P
from meshes import GATHERS, make_mesh, result_sizes

import focal_jax

pytestmark = [pytest.mark.quick, pytest.mark.every_form]

LOSS = focal_jax.softmax_focal_loss_with_integer_labels
LINEAR_LOSS = focal_jax.linear_softmax_focal_loss_with_integer_labels

# ---------------------------------------------------------------- every head and option

POLY = dense(focal_jax.softmax_poly_focal_loss_with_integer_labels)
WEIGHTED = dense(focal_jax.softmax_probability_weighted_loss_with_integer_labels)
DUAL = dense(focal_jax.dual_focal_loss_with_integer_labels)
PAIR = {"return_logsumexp": True}
SMOOTH = {"label_smoothing": 0.1}
# In chunks of two of the three classes per device.
CHUNKS = {"chunk_size": 2}
CASES = {
    "softmax smoothed": (softmax, SMOOTH),
    "softmax smoothed logsumexp": (softmax, SMOOTH | PAIR),
    "poly logsumexp": (POLY, PAIR),
    "poly smoothed logsumexp": (POLY, SMOOTH | PAIR),
    "probability-weighted logsumexp": (WEIGHTED, PAIR),
    "probability-weighted smoothed logsumexp": (WEIGHTED, SMOOTH | PAIR),
    "dual logsumexp": (DUAL, PAIR),
    "linear": (linear, CHUNKS),
    "linear softcap logsumexp": (linear, CHUNKS | PAIR | {"logit_softcap": 3.0}),
    "linear smoothed": (linear, CHUNKS | SMOOTH),
    "linear smoothed softcap logsumexp": (
        linear,
        CHUNKS | SMOOTH | PAIR | {"logit_softcap": 3.0},
    ),
    "engine": (engine_dense, {}),
    "engine smoothed logsumexp": (engine_dense, SMOOTH | PAIR),
    "engine linear": (engine_linear, CHUNKS),
    "engine linear smoothed logsumexp": (engine_linear, CHUNKS | SMOOTH | PAIR),
}
# Of features, kernel, bias, alpha, gamma and labels.
SPECS = P("data"), P(None, "model"), P("model"), P(), P("data"), P("data")


def _over_a_mesh(head, *, check_vma=True):
    """Return the head with its positions and its classes sharded."""

    def sharded(features, kernel, bias, labels, *, alpha, gamma, **options):
        def local(features, kernel, bias, alpha, gamma, labels):
            arrays = {"alpha": alpha, "gamma": gamma, "class_axis_name": "model"}
            return head(features, kernel, bias, labels, **arrays, **options)

        mapped = jax.shard_map(
            local,
            mesh=make_mesh((2, 4)),
            in_specs=SPECS,
            out_specs=P("data"),
            check_vma=check_vma,
        )
        return mapped(features, kernel, bias, alpha, gamma, labels)

    return sharded


def _case_inputs():
    arrays, labels = inputs(3, scale=2.0)
    return arrays, labels.at[0, 0].set(99).at[3, 1].set(99)


@cache
def _on_one_device(case):
    head, options = CASES[case]
    return value_and_gradients(head, *_case_inputs(), ignore_label=99, **options)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("check_vma", [True, False])
def test_values_and_gradients(case, check_vma):
    head, options = CASES[case]
    sharded = _over_a_mesh(head, check_vma=check_vma)
    got = value_and_gradients(sharded, *_case_inputs(), ignore_label=99, **options)
    assert_close(got, _on_one_device(case), 1e-5)


@pytest.mark.parametrize("options", [PAIR, PAIR | SMOOTH], ids=str)
@pytest.mark.parametrize("head", [softmax, linear], ids=["softmax", "linear"])
def test_gradient_inside_shard_map(head, options):
    arrays, labels = inputs(4)

    def local(*args):
        function = total(head, args[-1], class_axis_name="model", **options)
        return jax.grad(function, range(5))(*args[:-1])

    mapped = jax.shard_map(local, mesh=make_mesh((2, 4)), in_specs=SPECS, out_specs=SPECS[:-1])
    want = value_and_gradients(head, arrays, labels, **options)[1]
    assert_close(jax.jit(mapped)(*arrays, labels), want, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [PAIR, PAIR | SMOOTH], ids=str)
@pytest.mark.parametrize(
    "head", [softmax, linear, engine_linear], ids=["softmax", "linear", "engine linear"]
)
def test_second_derivatives(head, options):
    arrays, labels = inputs(5)
    direction = jax.tree.map(jnp.cos, arrays)

    def second(head):
        """Return second derivatives by reverse over reverse and by forward over reverse."""
        function = total(head, labels, **options)
        gradient = jax.grad(function, range(5))

        def both(*arrays):
            reverse = jax.grad(directional_derivative(function, direction), range(5))(*arrays)
            return reverse, jax.jvp(gradient, arrays, tuple(direction))[1]

        return jax.jit(both)(*arrays)

    reverse, forward = second(_over_a_mesh(head))
    want, _ = second(head)
    assert_close(reverse, want, 1e-5)
    assert_close(forward, want, 1e-5)


@pytest.mark.parametrize("options", [PAIR, PAIR | SMOOTH], ids=str)
def test_reference(options):
    arrays, labels = inputs(6)
    want = value_and_gradients(formula, arrays, labels, **options)
    assert_close(value_and_gradients(_over_a_mesh(formula), arrays, labels, **options), want, 1e-5)


# ---------------------------------------------------------------- an array of logits

NUM_CLASSES = 12
# Every shard has a label. One label is ignored, two are invalid.
LABELS = np.array([[0, 1, 3, 4, 6, 7, 9, 11], [2, 5, 8, 10, 12, -1, 99, 0]], np.int32)


def _logits_and_options():
    """Return logits, labels, alpha and gamma."""
    rng = np.random.default_rng(7)
    logits = (5 * rng.normal(size=(*LABELS.shape, NUM_CLASSES))).astype(np.float32)
    logits[0, 1, 3:9] = -np.inf  # all classes of some shards
    alpha = rng.random(NUM_CLASSES).astype(np.float32)
    return jnp.asarray(logits), jnp.asarray(LABELS), jnp.asarray(alpha), jnp.float32(1.5)


def _mean_loss(axis_name=None, class_axis_name=None, axis=-1):
    """Return the mean loss over the valid labels."""

    def mean(logits, labels, alpha, gamma):
        losses = LOSS(
            logits,
            labels,
            alpha=alpha,
            gamma=gamma,
            axis=axis,
            ignore_label=99,
            class_axis_name=class_axis_name,
        )
        valid = (labels >= 0) & (labels < NUM_CLASSES)
        mean = focal_jax.reduce_loss(losses, where=valid, axis_name=axis_name)
        return mean if axis_name is None else lax.pmean(mean, axis_name)

    return mean


@cache
def _mean_on_one_device():
    return jax.jit(jax.value_and_grad(_mean_loss(), (0, 2, 3)))(*_logits_and_options())


@pytest.mark.parametrize("names", ["model", ("model", "other")], ids=["one axis", "two axes"])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("inside", [True, False], ids=["grad inside", "grad outside"])
def test_class_axis_names(inside, check_vma, names):
    mesh = make_mesh((2, 4) if names == "model" else (2, 2, 2))
    mean = _mean_loss("data", names)

    def local(*args):
        value, (own, *shared) = jax.value_and_grad(mean, (0, 2, 3))(*args)
        if not check_vma:  # the gradient of the sum of the values of all devices
            own = own / lax.axis_size(mesh.axis_names)
            shared = lax.pmean(shared, mesh.axis_names)
        return value, (own, *shared)

    specs = P("data", None, names), P("data"), P(), P()
    mapped = jax.shard_map(
        local if inside else mean,
        mesh=mesh,
        in_specs=specs,
        out_specs=(P(), (specs[0], P(), P())) if inside else P(),
        check_vma=check_vma,
    )
    function = mapped if inside else jax.value_and_grad(mapped, (0, 2, 3))
    assert_close(jax.jit(function)(*_logits_and_options()), _mean_on_one_device(), 1e-5)


def test_any_class_axis():
    logits, *others = _logits_and_options()
    mapped = jax.shard_map(
        jax.value_and_grad(_mean_loss("data", "model", axis=0)),
        mesh=make_mesh((2, 4)),
        in_specs=(P("model", None, "data"), P(None, "data"), P(), P()),
        out_specs=(P(), P("model", None, "data")),
    )
    value, gradient = jax.jit(mapped)(jnp.moveaxis(logits, -1, 0), *others)
    want_value, (want, *_) = _mean_on_one_device()
    assert_close((value, jnp.moveaxis(gradient, 0, -1)), (want_value, want), 1e-5)


@pytest.mark.parametrize("options", [{}, PAIR, PAIR | SMOOTH], ids=str)
def test_pmap_and_vmap(options):
    logits, labels, alpha, gamma = _logits_and_options()
    if options:  # a class of -inf makes smoothed losses infinite
        logits = jnp.maximum(logits, -20)
    shards = jnp.stack(jnp.split(logits, 4, -1))

    def losses(logits, **more):
        return LOSS(logits, labels, alpha=alpha, gamma=gamma, **more, **options)

    def of_shard(logits):
        return losses(logits, class_axis_name="model")

    want = jax.tree.leaves(losses(logits))
    for mapped in (jax.pmap, jax.vmap):
        got = jax.tree.leaves(mapped(of_shard, axis_name="model")(shards))
        for shard in range(4):
            of_device = [x[shard] for x in got]
            assert_close(of_device, want, 1e-6)
            assert np.isnan(of_device[0][1, 4:7]).all()


def test_reference_of_logits():
    logits, labels, alpha, gamma = _logits_and_options()

    def losses(logits, **options):
        loss = focal_jax.reference.softmax_focal_loss_with_integer_labels
        return loss(logits, labels, alpha=alpha, gamma=gamma, **options)

    mapped = jax.shard_map(
        lambda logits: losses(logits, class_axis_name="model"),
        mesh=make_mesh(),
        in_specs=P(None, None, "model"),
        out_specs=P(),
    )
    assert_close(jax.jit(mapped)(logits), losses(logits), 1e-5)


# ---------------------------------------------------------------- collectives


def _compiled(loss, specs, *args, grad=(0,)):
    """Return the HLO of the gradient of the sharded losses of logits, or features and kernel."""
    mapped = jax.shard_map(
        lambda *args: loss(*args, class_axis_name="model"),
        mesh=make_mesh((2, 4)),
        in_specs=specs,
        out_specs=P("data"),
    )
    gradient = jax.grad(lambda *args: jnp.sum(mapped(*args)), grad)
    return jax.jit(gradient).lower(*args).compile().as_text()


@pytest.mark.quick(False)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_collectives_of_an_array_of_logits(smoothing):
    def loss(*args, **options):
        return LOSS(*args, label_smoothing=smoothing, **options)

    args = jnp.zeros((64, 1024)), jnp.zeros(64, jnp.int32)
    text = _compiled(loss, (P("data", "model"), P("data")), *args)
    assert not result_sizes(text, GATHERS)
    # A few numbers per position.
    sizes = result_sizes(text, "all-reduce")
    assert sizes
    assert max(sizes) <= 32


@pytest.mark.quick(False)
def test_collectives_of_the_linear_head():
    args = jnp.ones((64, 32)), jnp.ones((32, 1024)), jnp.zeros(64, jnp.int32)
    specs = P("data"), P(None, "model"), P("data")
    text = _compiled(LINEAR_LOSS, specs, *args, grad=(0, 1))
    # Over the classes three numbers per position and the gradient of the features, over the
    # batch the gradient of the kernel's shard.
    assert sorted(result_sizes(text, "all-reduce")) == [32] * 3 + [32 * 32, 32 * 256]
    assert not result_sizes(text, GATHERS)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("specs", "length", "message"),
    [
        ((P("data", None, "model"), P("data"), P()), 3, r"alpha: got shape \(3,\), wanted"),
        (
            (P("data", None, "model"), P("data"), P("model")),
            NUM_CLASSES,
            r"alpha: got shape \(3,\)",
        ),
        (
            (P("data", None, "model"), P(None, "model"), P()),
            NUM_CLASSES,
            r"labels: got shape \(2, 2\)",
        ),
        (
            (P("data", "model"), P("data", "model"), P()),
            4 * NUM_CLASSES,
            "labels: got values that vary",
        ),
    ],
)
def test_wrong_specs(specs, length, message):
    logits, labels, _, gamma = _logits_and_options()
    mapped = jax.shard_map(
        lambda logits, labels, alpha: _mean_loss("data", "model")(logits, labels, alpha, gamma),
        mesh=make_mesh((2, 4)),
        in_specs=specs,
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=message):
        mapped(logits, labels, jnp.ones(length))


def test_features_that_vary_over_the_class_axis():
    (features, kernel, *_), labels = inputs(5)
    mapped = jax.shard_map(
        lambda *args: LINEAR_LOSS(*args, class_axis_name="model"),
        mesh=make_mesh((2, 4)),
        in_specs=(P("model"), P(None, "model"), P()),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match="features: got values that vary over"):
        mapped(features, kernel, labels[:1])


def test_shards_that_do_not_divide_the_classes():
    (features, kernel, bias, alpha, _), labels = inputs(6)

    def call(num_classes):
        mapped = jax.shard_map(
            lambda kernel, bias: linear(
                features, kernel, bias, labels, class_axis_name="model", alpha=alpha
            ),
            mesh=make_mesh((2, 4)),
            in_specs=(P(None, "model"), P("model")),
            out_specs=P(),
        )
        return mapped(kernel[:, :num_classes], bias[:num_classes])

    with pytest.raises(ValueError, match="divisible"):
        call(11)
    # alpha has one weight for each class of all shards.
    with pytest.raises(ValueError, match=r"alpha: got shape \(12,\), wanted"):
        call(8)


@pytest.mark.parametrize(
    "head",
    [softmax, linear, formula, dense(focal_jax.reference.softmax_focal_loss_with_integer_labels)],
    ids=["softmax", "linear", "linear formula", "softmax formula"],
)
def test_class_axis_name_that_is_not_bound(head):
    (features, kernel, bias, *_), labels = inputs(7)
    with pytest.raises(NameError, match="vocabulary"):
        head(features, kernel, bias, labels, class_axis_name="vocabulary")
