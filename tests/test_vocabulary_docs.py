"""Tests of docs/vocabularies.md: its code gives the results of the definitions."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from pages import code_blocks

PAGE = (Path(__file__).parents[1] / "docs" / "vocabularies.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page():
    """Return the names that the code of the page defines."""
    names = {}
    for block in code_blocks(PAGE):
        exec(block, names)
    return names


@pytest.fixture(scope="module")
def log_p(page):
    """Return the log-probabilities, `[N, C]`, in float64."""
    logits = page["features"].astype(np.float64) @ page["embedding"].T
    return logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))


def _at_labels(page, x):
    return np.take_along_axis(x, page["labels"][:, None], -1)[:, 0]


def _focal(log_p, gamma):
    return -((1 - np.exp(log_p)) ** gamma) * log_p


def test_linear_head_equals_linear_layer_and_loss(page, log_p):
    want = np.mean(_at_labels(page, _focal(log_p, 1)))
    np.testing.assert_allclose(page["value"], want, rtol=1e-5)

    def plain(features, kernel):
        label_log_p = jax.nn.log_softmax(features @ kernel)[jnp.arange(page["N"]), page["labels"]]
        return jnp.mean(-(1 - jnp.exp(label_log_p)) * label_log_p)

    want = jax.grad(plain, (0, 1))(page["features"], page["embedding"].T)
    assert_close(page["gradients"], want, 1e-4)


def test_tied_embedding_gradient(page):
    def plain(embedding):
        logits = page["features"] @ embedding.T
        label_log_p = jax.nn.log_softmax(logits)[jnp.arange(page["N"]), page["labels"]]
        return jnp.mean(-((1 - jnp.exp(label_log_p)) ** 2) * label_log_p)

    assert_close(page["tied_gradient"], jax.grad(plain)(page["embedding"]), 1e-4)


def test_z_loss(page, log_p):
    logits = page["features"].astype(np.float64) @ page["embedding"].T
    z = np.log(np.sum(np.exp(logits), -1))
    want = -_at_labels(page, log_p) + 1e-4 * z**2
    np.testing.assert_allclose(page["with_z_loss"], want, rtol=1e-5)

    (block,) = [block for block in code_blocks(PAGE) if "return_logsumexp" in block]

    def of_page(features, embedding):
        names = page | {"features": features, "embedding": embedding}
        exec(block, names)
        return jnp.sum(names["with_z_loss"])

    def plain(features, embedding):
        logits = features @ embedding.T
        z = jax.nn.logsumexp(logits, -1)
        return jnp.sum(z - logits[jnp.arange(page["N"]), page["labels"]] + 1e-4 * z**2)

    args = page["features"], page["embedding"]
    assert_close(jax.grad(of_page, (0, 1))(*args), jax.grad(plain, (0, 1))(*args), 1e-5)


def test_logit_softcap(page):
    capped = 30 * np.tanh(page["features"].astype(np.float64) @ page["embedding"].T / 30)
    log_p = capped - np.log(np.sum(np.exp(capped), -1, keepdims=True))
    np.testing.assert_allclose(page["capped"], _at_labels(page, _focal(log_p, 2)), rtol=1e-5)


def test_label_smoothing(page, log_p):
    losses = _focal(log_p, 2)
    want = 0.9 * _at_labels(page, losses) + 0.1 * np.mean(losses, -1)
    np.testing.assert_allclose(page["smoothed"], want, rtol=1e-5)


def test_token_weights(page, log_p):
    weights, losses = page["weights"], np.asarray(page["losses"])
    total = np.sum(weights * losses)
    np.testing.assert_allclose(page["weighted"], total / np.sum(weights), rtol=1e-6)
    np.testing.assert_allclose(page["per_token"], total / len(losses), rtol=1e-6)
    label_log_p = _at_labels(page, log_p)
    want = np.mean(-np.exp(label_log_p) * label_log_p)
    np.testing.assert_allclose(page["fine_tuning"], want, rtol=1e-5)
