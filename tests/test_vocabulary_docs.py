"""The page on vocabularies: its code runs, and gives what the definitions give."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from pages import code_blocks

PAGE = (Path(__file__).parents[1] / "docs" / "vocabularies.md").read_text()


@pytest.fixture(scope="module")
def page():
    """Return what the page's code defines."""
    names = {}
    for block in code_blocks(PAGE):
        exec(block, names)
    return names


@pytest.fixture(scope="module")
def log_p(page):
    """Return the logarithm of every probability, `[N, C]`, in float64."""
    logits = page["features"].astype(np.float64) @ page["embedding"].T
    return logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))


def _own(page, x):
    return np.take_along_axis(x, page["labels"][:, None], -1)[:, 0]


def _focal(log_p, gamma):
    return -((1 - np.exp(log_p)) ** gamma) * log_p


def test_the_head_is_the_layer_and_its_loss(page, log_p):
    np.testing.assert_allclose(page["value"], np.mean(_own(page, _focal(log_p, 1))), rtol=1e-5)

    def plain(features, kernel):
        own = jax.nn.log_softmax(features @ kernel)[jnp.arange(len(features)), page["labels"]]
        return jnp.mean(-(1 - jnp.exp(own)) * own)

    want = jax.grad(plain, (0, 1))(page["features"], page["embedding"].T)
    assert_close(page["gradients"], want, 1e-4)


def test_the_tied_gradient(page):
    def plain(embedding):
        logits = page["features"] @ embedding.T
        own = jax.nn.log_softmax(logits)[jnp.arange(page["N"]), page["labels"]]
        return jnp.mean(-((1 - jnp.exp(own)) ** 2) * own)

    assert_close(page["of_embedding"], jax.grad(plain)(page["embedding"]), 1e-4)


def test_the_line_of_the_z_loss(page, log_p):
    logits = page["features"].astype(np.float64) @ page["embedding"].T
    z = np.log(np.sum(np.exp(logits), -1))
    np.testing.assert_allclose(page["losses"], -_own(page, log_p) + 1e-4 * z**2, rtol=1e-5)

    (block,) = [block for block in code_blocks(PAGE) if "return_logsumexp" in block]

    def ours(features, embedding):
        names = page | {"features": features, "embedding": embedding}
        exec(block, names)
        return jnp.sum(names["losses"])

    def definition(features, embedding):
        logits = features @ embedding.T
        z = jax.nn.logsumexp(logits, -1)
        return jnp.sum(z - logits[jnp.arange(page["N"]), page["labels"]] + 1e-4 * z**2)

    args = page["features"], page["embedding"]
    assert_close(jax.grad(ours, (0, 1))(*args), jax.grad(definition, (0, 1))(*args), 1e-5)


def test_the_softcap(page):
    capped = 30 * np.tanh(page["features"].astype(np.float64) @ page["embedding"].T / 30)
    log_p = capped - np.log(np.sum(np.exp(capped), -1, keepdims=True))
    np.testing.assert_allclose(page["capped"], _own(page, _focal(log_p, 2)), rtol=1e-5)


def test_the_smoothing(page, log_p):
    every = _focal(log_p, 2)
    want = 0.9 * _own(page, every) + 0.1 * np.mean(every, -1)
    np.testing.assert_allclose(page["smoothed"], want, rtol=1e-5)


def test_the_weights(page, log_p):
    weights, losses = page["weights"], np.asarray(page["losses"])
    total = np.sum(weights * losses)
    np.testing.assert_allclose(page["weighted"], total / np.sum(weights), rtol=1e-6)
    np.testing.assert_allclose(page["per_token"], total / len(losses), rtol=1e-6)
    own = _own(page, log_p)
    np.testing.assert_allclose(page["fine_tuning"], np.mean(-np.exp(own) * own), rtol=1e-5)
