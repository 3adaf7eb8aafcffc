"""Models of Equinox and Haiku, and the code of docs/equinox-haiku.md."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pages import run
from steps import assert_equal_trainings, three_steps

import focal_jax

eqx = pytest.importorskip("equinox")
hk = pytest.importorskip("haiku")

DOCS = Path(__file__).parents[2] / "docs"
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(64, 8)).astype(np.float32), rng.integers(3, size=64)


def plain(logits, labels):
    """The formula that most people write, with gamma 2."""
    ce = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (1 - jnp.exp(-ce)) ** 2 * ce


LOSSES = plain, focal_jax.softmax_focal_loss_with_integer_labels


def test_page():
    names = run(DOCS / "equinox-haiku.md", language="py")
    args = names["model"], names["x"], names["y"]
    assert names["value"] > 0
    np.testing.assert_allclose(names["loss_of_examples"](*args), names["loss"](*args), rtol=1e-6)
    for value, gradients in (
        (names["classifier_value"], names["classifier_gradients"]),
        (names["haiku_value"], names["haiku_gradients"]),
        (names["head_value"], names["head_gradients"]),
    ):
        assert np.isfinite(value)
        assert all(np.any(x) for x in jax.tree.leaves(eqx.filter(gradients, eqx.is_array)))
    bias = names["params"]["linear"]["b"]
    np.testing.assert_allclose(jax.nn.sigmoid(bias), 0.01, rtol=1e-5)


@pytest.mark.parametrize("per_example", [False, True])
def test_equinox_trains_as_with_plain_jax(per_example):
    model = eqx.nn.MLP(8, 3, width_size=16, depth=1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)

    def total(loss):
        def whole(params):
            return jnp.mean(loss(jax.vmap(eqx.combine(params, static))(X), Y))

        def of_examples(params):
            model = eqx.combine(params, static)
            return jnp.mean(jax.vmap(lambda x, y: loss(model(x), y))(X, Y))

        return of_examples if per_example else whole

    assert_equal_trainings(*(three_steps(total(loss), params) for loss in LOSSES))


def test_equinox_linear_head_per_example_takes_the_memory_of_the_batch():
    features, kernel = jnp.ones((512, 64)), jnp.ones((64, 8000))
    labels = jnp.zeros(512, jnp.int32)
    head = focal_jax.linear_softmax_focal_loss_with_integer_labels

    def temporaries(function):
        compiled = jax.jit(jax.grad(function, (0, 1))).lower(features, kernel).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = temporaries(lambda x, w: jnp.mean(head(x, w, labels)))
    mapped = temporaries(lambda x, w: jnp.mean(jax.vmap(head, in_axes=(0, None, 0))(x, w, labels)))
    assert mapped <= 1.5 * whole


def test_haiku_trains_as_with_plain_jax():
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 3])(x)))
    params = network.init(jax.random.key(0), X)

    def total(loss):
        return lambda params: jnp.mean(loss(network.apply(params, X), Y))

    assert_equal_trainings(*(three_steps(total(loss), params) for loss in LOSSES))
