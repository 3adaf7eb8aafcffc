"""Tests of the temporary buffers of the losses of class indices."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from heads import LINEAR_HEADS, inputs, linear, softmax
from helpers import assert_close
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P

import focal_jax

pytestmark = pytest.mark.slow

LOSS = focal_jax.softmax_focal_loss_with_integer_labels
LINEAR_LOSS = focal_jax.linear_softmax_focal_loss_with_integer_labels


def _temporaries(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


# ---------------------------------------------------------------- the linear head


def _compiled_linear(head, positions, depth, classes, order=1, **options):
    """Return the compiled gradient, or second derivative, in features and kernel."""
    shapes = (positions, depth), (depth, classes)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    labels = jnp.zeros(positions, jnp.int32)
    gradient = jax.grad(lambda f, k: jnp.sum(head(f, k, None, labels, **options)), (0, 1))
    if order == 2:
        first = gradient
        gradient = jax.grad(lambda f, k: sum(jnp.sum(g**2) for g in first(f, k)), (0, 1))
    return jax.jit(gradient).lower(*args).compile()


@pytest.mark.parametrize("shape", [(2048, 512, 32000), (512, 256, 4096), (256, 64, 1000)], ids=str)
def test_temporaries_of_the_linear_head_are_a_tenth_of_the_logits(shape):
    positions, depth, classes = shape
    tenth, gradient = positions * classes * 4 / 10, positions * depth * 4
    # In addition to the gradients: the part of a chunk in the features' gradient has its size.
    compiled = _compiled_linear(linear, *shape, chunk_size=None)
    assert _temporaries(compiled) < tenth + gradient
    # The measurement finds the logits of the softmax loss.
    assert _temporaries(_compiled_linear(softmax, *shape)) >= 10 * tenth


@pytest.mark.parametrize("name", ["statistics", "sparse labels", "linear_sigmoid_focal_loss"])
def test_temporaries_of_other_heads_are_eight_hundredths_of_the_logits(name):
    shape = 2048, 512, 32000
    compiled = _compiled_linear(LINEAR_HEADS[name], *shape)
    assert _temporaries(compiled) <= 0.08 * 2048 * 32000 * 4


@pytest.mark.parametrize("shape", [(512, 4000), (4096, 100)], ids=str)
def test_statistics_of_logits_have_few_temporaries(shape):
    labels = jnp.zeros(shape[0], jnp.int32)

    def total(logits):
        found = focal_jax.token_statistics(logits, labels)
        return jnp.sum(found.log_probability + found.entropy * found.logsumexp)

    logits = jax.ShapeDtypeStruct(shape, jnp.float32)
    compiled = jax.jit(jax.value_and_grad(total)).lower(logits).compile()
    assert _temporaries(compiled) <= 0.02 * 4 * shape[0] * shape[1] + 14 * 4 * shape[0]


def test_temporaries_of_second_derivatives_are_half_of_the_logits():
    compiled = _compiled_linear(linear, 2048, 64, 32000, order=2, chunk_size=None)
    assert _temporaries(compiled) < 2048 * 32000 * 4 / 2


@pytest.mark.parametrize("positions", [(256,), (4, 64)], ids=str)
@pytest.mark.parametrize("alpha", [None, jnp.linspace(0, 1, 1000)], ids=["plain", "alpha"])
def test_a_layer_and_its_loss_take_at_most_the_memory_of_optax(positions, alpha):
    labels, where = jnp.zeros(positions, jnp.int32), jnp.ones(positions, bool)

    def temporaries(loss):
        shapes = (*positions, 32), (32, 1000)
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        total = lambda x, w: jnp.sum(loss(x @ w, labels))  # noqa: E731
        return _temporaries(jax.jit(jax.value_and_grad(total, (0, 1))).lower(*args).compile())

    peer = temporaries(optax.softmax_cross_entropy_with_integer_labels)
    options = {} if alpha is None else {"alpha": alpha, "where": where}
    assert temporaries(partial(LOSS, **options)) <= 1.03 * peer


# ---------------------------------------------------------------- a transposed kernel


def _tied(features, embedding, labels, **options):
    """Return the total loss of logits that are `features @ embedding.T`."""
    losses = LINEAR_LOSS(
        features, embedding, labels, transpose_kernel=True, chunk_size=64, **options
    )
    return jnp.sum(losses)


def _tied_with_sharded_positions(features, embedding, labels):
    mesh, specs = Mesh(np.array(jax.devices()), ("data",)), (P("data"), P(), P("data"))

    def local(*args):
        return lax.psum(_tied(*args), "data")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    return mapped(features, embedding, labels)


def _tied_with_sharded_classes(features, embedding, labels, **options):
    mesh, specs = Mesh(np.array(jax.devices()), ("model",)), (P(), P("model"), P())
    local = partial(_tied, class_axis_name="model", **options)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    return mapped(features, embedding, labels)


SMOOTH = {"label_smoothing": 0.1, "logit_softcap": 9.0}


@pytest.mark.parametrize(
    ("function", "options", "shards"),
    [
        pytest.param(_tied, {}, 1, id="no options"),
        pytest.param(_tied, SMOOTH, 1, id="options"),
        pytest.param(jax.checkpoint(_tied), {}, 1, id="checkpoint"),
        pytest.param(_tied_with_sharded_positions, {}, 1, id="sharded positions"),
        pytest.param(_tied_with_sharded_classes, {}, 8, id="sharded classes"),
    ],
)
def test_transposed_kernel_and_its_gradient_are_not_transposed(function, options, shards):
    depth, classes = 24, 1000
    (features, kernel, *_), labels = inputs(17, (16,), depth, classes)
    labels = labels.at[0].set(classes - 1)
    gradient = jax.jit(jax.grad(partial(function, **options), (0, 1)))
    compiled = gradient.lower(features, kernel.T, labels).compile()
    # The only arrays of the kernel's size are the kernel and its gradient, which is initialized
    # with a copy of the kernel.
    size = rf"= \w+\[(?:{depth},{classes // shards}|{classes // shards},{depth})\]\S* "
    assert not re.findall(size + r"transpose\(", compiled.as_text())
    assert len(re.findall(size + r"copy\(", compiled.as_text())) <= 1

    def untied(features, kernel):
        return jnp.sum(LINEAR_LOSS(features, kernel, labels, chunk_size=64, **options))

    by_features, by_kernel = jax.jit(jax.grad(untied, (0, 1)))(features, kernel)
    assert_close(compiled(features, kernel.T, labels), (by_features, by_kernel.T), 1e-5)


# ---------------------------------------------------------------- label smoothing


def _compiled_dense(positions, classes, **options):
    """Return the compiled gradient in the logits."""
    logits = jax.ShapeDtypeStruct((positions, classes), jnp.float32)
    labels = jnp.zeros(positions, jnp.int32)
    gradient = jax.grad(lambda logits: jnp.sum(LOSS(logits, labels, **options)))
    return jax.jit(gradient).lower(logits).compile()


def test_label_smoothing_stores_no_one_hot_labels():
    smoothed = _temporaries(_compiled_dense(256, 4096, label_smoothing=0.1))
    assert smoothed < _temporaries(_compiled_dense(256, 4096)) + 1.1 * 256 * 4096 * 4


def test_label_smoothing_of_zero_compiles_to_the_same_program():
    texts = [
        re.sub("metadata={[^}]*}", "", _compiled_dense(8, 32, **options).as_text())
        for options in ({}, {"label_smoothing": 0.0})
    ]
    assert texts[0] == texts[1]
