"""The registry of losses: every property is tested over every row of `LOSSES`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import focal_jax

GAMMAS = [0, 0.5, 1, 1.5, 2.0, 3, 5]


class Loss(NamedTuple):
    """One loss with one kind of labels."""

    name: str
    kind: str
    labels: Callable[[np.random.Generator, tuple[int, ...], int], Any]

    @property
    def softmax(self) -> bool:
        """Whether the loss has a class axis."""
        return self.name != "sigmoid_focal_loss"

    @property
    def soft(self) -> bool:
        """Whether the labels are differentiable."""
        return self.kind != "integer"

    def eager(self, *args, **kwargs):
        return getattr(focal_jax, self.name)(*args, **kwargs)

    def ours(self, *args, **kwargs):
        return _jitted(focal_jax, self.name, *args, **kwargs)

    def reference(self, *args, **kwargs):
        return _jitted(focal_jax.reference, self.name, *args, **kwargs)

    def positions(self, shape, axis=-1):
        return tuple(np.delete(shape, axis)) if self.softmax else tuple(shape)

    def axis(self, axis):
        return {"axis": axis} if self.softmax else {}

    def classes(self, shape, axis=-1):
        return shape[axis] if self.softmax else 2

    def inputs(self, seed, shape, axis=-1, scale=3.0, dtype=np.float32):
        """Return random logits and labels."""
        rng = np.random.default_rng(seed)
        logits = (scale * rng.normal(size=shape)).astype(dtype)
        labels = self.labels(rng, shape, axis % len(shape))
        if self.soft:
            labels = np.asarray(labels).astype(dtype)
        return jnp.asarray(logits), jnp.asarray(labels)

    def at(self, margins, classes=3):
        """Return logits and labels with the given margins of the true class, one a position."""
        margins = np.asarray(margins, np.float32)
        if not self.softmax:
            sign = np.where(np.arange(margins.size) % 2, -1, 1).astype(np.float32)
            return jnp.asarray(sign * margins), jnp.asarray((sign > 0).astype(np.float32))
        true = np.arange(margins.size) % classes
        logits = np.zeros((margins.size, classes), np.float32)
        logits[np.arange(margins.size), true] = margins
        labels = np.eye(classes, dtype=np.float32)[true] if self.soft else true.astype(np.int32)
        return jnp.asarray(logits), jnp.asarray(labels)


@functools.cache
def _compiled(module, name, static):
    return jax.jit(functools.partial(getattr(module, name), **dict(static)))


def _jitted(module, name, *args, **kwargs):
    """Call a loss compiled: many small eager operations compile for longer than one big one."""
    static = {k: v for k, v in kwargs.items() if v is None or isinstance(v, (int, float))}
    arrays = {k: v for k, v in kwargs.items() if k not in static}
    return _compiled(module, name, tuple(static.items()))(*args, **arrays)


def _indices(rng, shape, axis):
    return rng.integers(0, shape[axis], np.delete(shape, axis)).astype(np.int32)


def _one_hot(rng, shape, axis):
    return np.moveaxis(np.eye(shape[axis])[_indices(rng, shape, axis)], -1, axis)


def _distribution(rng, shape, axis):
    weights = rng.exponential(size=shape)
    return weights / weights.sum(axis, keepdims=True)


SIGMOID = Loss("sigmoid_focal_loss", "hard", lambda rng, shape, _: rng.random(shape) < 0.3)
SIGMOID_SOFT = Loss("sigmoid_focal_loss", "soft", lambda rng, shape, _: rng.random(shape))
ONE_HOT = Loss("softmax_focal_loss", "one-hot", _one_hot)
SOFT = Loss("softmax_focal_loss", "soft", _distribution)
INTEGER = Loss("softmax_focal_loss_with_integer_labels", "integer", _indices)
LOSSES = [SIGMOID, SIGMOID_SOFT, ONE_HOT, SOFT, INTEGER]
HARD = [loss for loss in LOSSES if loss.kind != "soft"]
SOFTMAX = [loss for loss in LOSSES if loss.softmax]


def ids(loss: Loss) -> str:
    return f"{loss.name}-{loss.kind}"


def assert_close(got, want, rtol=1e-5, atol=None):
    """Compare trees; `atol` defaults to `rtol` of the largest entry of each leaf."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        scale = np.max(np.abs(b[np.isfinite(b)]), initial=0)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale if atol is None else atol)
