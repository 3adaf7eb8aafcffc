"""Tempered cross entropy, a loss of one logit with hand-derived slopes.

With the inverse temperature beta, a positive has the loss `-log sigmoid(beta z) / beta`, and a
negative the loss of `-z`.
"""

import jax.numpy as jnp

from focal_jax import engine


def _weights(y, alpha):
    """Return the weights of the positive and the negative side of a label."""
    return (y, 1 - y) if alpha is None else (alpha * y, (1 - alpha) * (1 - y))


def _tempered(logit, label, alpha, beta):
    positive, negative = _weights(label, alpha)
    n_positive, n_negative = (engine.sigmoid_terms(x * beta).n for x in (logit, -logit))
    return (engine.weigh(positive, n_positive) + engine.weigh(negative, n_negative)) / beta


def _slopes(logit, label, alpha, beta):
    u = beta * logit
    t, n_negative = engine.sigmoid_terms(u), engine.sigmoid_terms(-u).n
    positive, negative = _weights(label, alpha)
    entropy = jnp.where(u >= 0, t.n + u * t.q, n_negative - u * t.p)
    by_label = -logit if alpha is None else (alpha * t.n - (1 - alpha) * n_negative) / beta
    by_alpha = (label * t.n - (1 - label) * n_negative) / beta
    by_beta = -(positive + negative) * entropy / beta**2
    return negative * t.p - positive * t.q, by_label, by_alpha, by_beta


TEMPERED = engine.elementwise_loss(
    _tempered,
    _slopes,
    alpha=engine.number(None, low=0.0, high=1.0),
    beta=engine.number(1.0, low=0.0, above_low=True),
)


def tempered_formula(ops, logit, label, alpha, beta):
    positive, negative = _weights(label, alpha)
    losses = positive * ops.log_sigmoid(beta * logit) + negative * ops.log_sigmoid(-beta * logit)
    return -losses / beta
