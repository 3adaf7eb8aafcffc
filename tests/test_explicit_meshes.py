"""Tests of losses on explicit meshes, whose arguments are sharded in any way or not placed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, jit
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from meshes import make_mesh

import focal_jax

pytestmark = pytest.mark.quick

POSITIONS, CLASSES, DEPTH = 8, 6, 4
INTEGER = focal_jax.softmax_focal_loss_with_integer_labels


def _arrays():
    rng = np.random.default_rng(0)
    return {
        "logits": rng.normal(size=(POSITIONS, CLASSES)).astype(np.float32),
        "indices": rng.integers(0, CLASSES, POSITIONS).astype(np.int32),
        "labels": rng.dirichlet(np.ones(CLASSES), POSITIONS).astype(np.float32),
        "alpha": rng.uniform(0.1, 1, CLASSES).astype(np.float32),
        "gamma": rng.uniform(0.5, 2, POSITIONS).astype(np.float32),
    }


def _integer(a, **options):
    return INTEGER(a["logits"], a["indices"], alpha=a["alpha"], gamma=a["gamma"], **options)


def _statistics(a):
    log_p, lse, entropy, _ = focal_jax.token_statistics(a["logits"], a["indices"])
    return log_p + 2 * lse + 3 * entropy


def _sparse(a):
    pairs = a["indices"][:, None], a["gamma"][:, None]
    loss = focal_jax.softmax_focal_loss_with_sparse_labels
    return loss(a["logits"], *pairs, alpha=a["alpha"])


LOSSES = {
    "integer": _integer,
    "smoothed": partial(_integer, label_smoothing=0.1),
    "logsumexp": lambda a: _integer(a, return_logsumexp=True)[1],
    "distribution": lambda a: focal_jax.softmax_focal_loss(
        a["logits"], a["labels"], alpha=a["alpha"], gamma=a["gamma"]
    ),
    "sigmoid": lambda a: focal_jax.sigmoid_focal_loss(
        a["logits"], a["labels"], gamma=a["gamma"][:, None]
    ),
    "dual": lambda a: focal_jax.dual_focal_loss_with_integer_labels(
        a["logits"], a["indices"], alpha=a["alpha"]
    ),
    "tversky": lambda a: focal_jax.focal_tversky_loss(a["logits"], a["labels"], gamma=2.0),
    "statistics": _statistics,
    "sparse": _sparse,
}
# The specs of the logits, of the labels and of alpha; None for arrays that are not placed.
LAYOUTS = {
    "batch": (P("data", None), P("data", None), P()),
    "batch, weights spread": (P("data", None), None, P("model")),
    "classes": (P(None, "model"), P(None, "model"), P()),
    "classes, labels not placed": (P(None, "model"), None, P("model")),
    "both": (P("data", "model"), P("data", "model"), P("model")),
    "both, others not placed": (P("data", "model"), None, None),
}


def _value_and_gradients(loss, arrays):
    differentiated = {k: v for k, v in arrays.items() if k != "indices"}

    def total(given):
        return jnp.sum(loss(arrays | given))

    return jit(jax.value_and_grad(total))(differentiated)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_layout_has_the_values_of_one_device(name, layout):
    arrays, (logits, labels, alpha) = _arrays(), LAYOUTS[layout]
    mesh = make_mesh((4, 2), AxisType.Explicit)
    positions = None if labels is None else P(labels[0])
    specs = dict(zip(arrays, (logits, positions, labels, alpha, positions)))
    placed = {
        k: x if specs[k] is None else jax.device_put(x, NamedSharding(mesh, specs[k]))
        for k, x in arrays.items()
    }
    want = _value_and_gradients(LOSSES[name], arrays)
    with jax.sharding.set_mesh(mesh):
        found = _value_and_gradients(LOSSES[name], placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        assert_close(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("features", [P("data", None), P()], ids=["batch", "replicated"])
@pytest.mark.parametrize("kernel", [P("data", None), P(None, "model"), P("data", "model"), P()])
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_kernels_of_every_layout(name, kernel, features):
    rng, mesh = np.random.default_rng(1), make_mesh((4, 2), AxisType.Explicit)
    x, w = (rng.normal(size=s).astype(np.float32) for s in ((POSITIONS, DEPTH), (DEPTH, CLASSES)))
    labels = rng.integers(0, CLASSES, POSITIONS).astype(np.int32)

    def total(x, w):
        if name == "softmax":
            losses = focal_jax.linear_softmax_focal_loss_with_integer_labels(x, w, labels)
        else:
            losses = focal_jax.linear_sigmoid_focal_loss(x, w, labels[:, None])
        return jnp.sum(losses)

    def placed():
        args = (jax.device_put(v, NamedSharding(mesh, s)) for v, s in ((x, features), (w, kernel)))
        return jit(jax.value_and_grad(total, (0, 1)))(*args)

    with jax.sharding.set_mesh(mesh):
        if len(kernel) > 1 and kernel[1] is not None:
            with pytest.raises(focal_jax.InputError, match="kernel: got classes that are sharded"):
                placed()
            return
        found = placed()
    want = jit(jax.value_and_grad(total, (0, 1)))(x, w)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        assert_close(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)
