"""The linear head beside those of other packages: numbers, and digits in bfloat16."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps import assert_equal_trainings

from focal_jax import linear_softmax_focal_loss_with_integer_labels

rng = np.random.default_rng(0)
FEATURES = rng.normal(size=(48, 32)).astype(np.float32)
KERNEL = (rng.normal(size=(32, 500)) / 4).astype(np.float32)
LABELS = rng.integers(500, size=48).astype(np.int32)


def with_focal_jax(features, kernel):
    losses = linear_softmax_focal_loss_with_integer_labels(features, kernel, LABELS, gamma=0.0)
    return jnp.mean(losses)


def plain(features, kernel):
    logits = features @ kernel
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, LABELS)
    return jnp.mean(losses)


def jax_cce(features, kernel):
    cce = pytest.importorskip("jax_cce")
    return cce.linear_cross_entropy(features, kernel.T, jnp.asarray(LABELS), chunk_size=128)


def tokamax(features, kernel, **options):
    module = pytest.importorskip("tokamax")
    loss = module.linear_softmax_cross_entropy_loss
    return loss(features, jnp.asarray(LABELS), kernel, reduction="mean", **options)


PEERS = [plain, jax_cce, tokamax]


@pytest.mark.parametrize("peer", PEERS)
def test_values_and_gradients(peer):
    got, want = (jax.value_and_grad(f, (0, 1))(FEATURES, KERNEL) for f in (with_focal_jax, peer))
    assert_equal_trainings(want, got)


def _temporary_bytes(head):
    arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2048, 512), (512, 32000)))
    compiled = jax.jit(jax.value_and_grad(head, (0, 1))).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes


# The table of docs/which-head.md. tokamax holds the logits on a CPU, unless it computes chunks.
@pytest.mark.parametrize("peer", [*PEERS, partial(tokamax, implementation="chunked_xla")])
def test_temporaries(peer, monkeypatch):
    monkeypatch.setitem(globals(), "LABELS", np.zeros(2048, np.int32))
    assert _temporary_bytes(with_focal_jax) < 0.12 * _temporary_bytes(peer)


@pytest.mark.parametrize("peer", PEERS)
def test_bfloat16_gradients_have_at_least_the_digits_of_the_peer(peer):
    args = [jnp.asarray(x, jnp.bfloat16) for x in (FEATURES, KERNEL)]
    with jax.enable_x64(True):
        exact = jax.grad(plain, (0, 1))(*(np.asarray(x, np.float64) for x in args))

    def errors(function):
        # tokamax returns float32; an optimizer of bfloat16 parameters rounds it.
        found = [x.astype(jnp.bfloat16) for x in jax.jit(jax.grad(function, (0, 1)))(*args)]
        return [np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b) for a, b in zip(found, exact)]

    for own, other in zip(errors(with_focal_jax), errors(peer)):
        assert own <= 1.02 * other  # both round each entry once in the best case
