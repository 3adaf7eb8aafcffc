"""Losses of class indices as functions of features, kernel, bias and labels.

A dense head computes an array of logits. The linear head computes the logits in chunks. The
reference is the plain formula. All heads have one signature, so that one test compares them.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import focal_jax
from focal_jax import engine, reference

DEPTH, CLASSES, POSITIONS = 5, 12, (4, 3)


def inputs(
    seed=0, positions=POSITIONS, depth=DEPTH, classes=CLASSES, *, dtype=np.float32, scale=1.0
):
    """Return `[features, kernel, bias, alpha, gamma]`, and labels."""
    rng = np.random.default_rng(seed)
    shapes = (*positions, depth), (depth, classes), (classes,)
    arrays = [scale * rng.normal(size=shape) for shape in shapes]
    arrays += [rng.uniform(0.1, 0.9, classes), rng.uniform(0.2, 4, positions)]
    labels = jnp.asarray(rng.integers(0, classes, positions), jnp.int32)
    return [jnp.asarray(x, dtype) for x in arrays], labels


# ---------------------------------------------------------------- heads


def product(features, kernel, bias):
    """Return the logits."""
    logits = features @ kernel
    return logits if bias is None else logits + jnp.broadcast_to(bias, logits.shape)


def dense(loss):
    """Return the head that passes an array of logits to `loss`."""
    has_gamma = "gamma" in inspect.signature(loss).parameters

    def head(features, kernel, bias, labels, **options):
        if not has_gamma:
            options.pop("gamma", None)
        return loss(product(features, kernel, bias), labels, **options)

    return head


softmax = dense(focal_jax.softmax_focal_loss_with_integer_labels)


def linear(features, kernel, bias, labels, **options):
    """Return the losses of the linear head; 5 does not divide the 12 classes."""
    loss = focal_jax.linear_softmax_focal_loss_with_integer_labels
    return loss(features, kernel, labels, bias=bias, **{"chunk_size": 5} | options)


def formula(features, kernel, bias, labels, **options):
    """Return the losses of the plain formula of the linear head."""
    loss = reference.linear_softmax_focal_loss_with_integer_labels
    return loss(features, kernel, labels, bias=bias, **options)


# ---------------------------------------------------------------- a loss made with the engine


def _poly(terms, gamma, epsilon):
    return engine.power(terms.q, terms.log_q, gamma) * (terms.n + epsilon * terms.q)


# The poly focal loss without slopes, with the default options of the package's own loss.
engine_loss = engine.position_loss(_poly, epsilon=1.0, gamma=engine.exponent(2.0))
engine_dense = dense(engine_loss)
engine_formula = dense(reference.softmax_poly_focal_loss_with_integer_labels)


def engine_linear(features, kernel, bias, labels, **options):
    """Return the losses of the linear form of a loss that is made with the engine."""
    return engine_loss.linear(features, kernel, labels, bias=bias, **{"chunk_size": 5} | options)


# ---------------------------------------------------------------- gradients


def total(head, labels, weights=1.0, **options):
    """Return the weighted sum of the squares of all outputs, as a function of the arrays."""

    def function(features, kernel, bias, alpha, gamma):
        outputs = head(features, kernel, bias, labels, alpha=alpha, gamma=gamma, **options)
        return sum(jnp.sum(weights * x**2) for x in jax.tree.leaves(outputs))

    return function


def value_and_gradients(head, arrays, labels, weights=1.0, **options):
    """Return `total` and its gradients in all arrays, compiled."""
    function = total(head, labels, weights, **options)
    return jax.jit(jax.value_and_grad(function, range(len(arrays))))(*arrays)


def directional_derivative(function, direction):
    """Return the derivative of `function` along a direction, by reverse mode."""

    def derivative(*arrays):
        gradients = jax.grad(function, range(len(arrays)))(*arrays)
        return sum(jnp.vdot(g, v) for g, v in zip(gradients, direction))

    return derivative


# ---------------------------------------------------------------- every linear head


def _position_head(loss, **options):
    return lambda x, w, b, labels, **more: loss.linear(x, w, labels, bias=b, **options, **more)


def _with_logsumexp(*args, **options):
    losses, logsumexp = linear(*args, **{"chunk_size": None}, **options, return_logsumexp=True)
    return losses + 0.1 * logsumexp**2


def _statistics(x, w, b, labels, **options):
    found = focal_jax.linear_token_statistics(x, w, labels, bias=b, **options)
    return found.logsumexp * found.log_probability + found.entropy


def _pairs(labels):
    """Return two classes per position and their weights."""
    return jnp.stack([labels, (labels + 1) // 2], -1), jnp.full((*labels.shape, 2), 0.4)


def _sparse(x, w, b, labels, **options):
    loss = focal_jax.linear_softmax_focal_loss_with_sparse_labels
    return loss(x, w, *_pairs(labels), bias=b, **options)


def _multilabel(loss):
    return lambda x, w, b, labels, **options: loss(x, w, _pairs(labels)[0], bias=b, **options)


# Functions of features, kernel, bias and class indices, with one number per position.
LINEAR_HEADS = {
    loss.name: _position_head(loss.engine_loss)
    for loss in focal_jax.catalogue.LOSSES.values()
    if loss.kind == "position" and loss.engine_loss.row_option is None
}
LINEAR_HEADS |= {
    "label smoothing": _position_head(engine_loss, label_smoothing=0.1),
    "label smoothing and logsumexp": partial(_with_logsumexp, label_smoothing=0.1),
    "logsumexp": _with_logsumexp,
    "statistics": _statistics,
    "sparse labels": _sparse,
    "linear_sigmoid_focal_loss": _multilabel(focal_jax.linear_sigmoid_focal_loss),
    "linear_asymmetric_loss": _multilabel(focal_jax.linear_asymmetric_loss),
}
