"""Tempered cross entropy: the logistic loss of a logit that is sharpened or softened."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _checks, _scalar
from focal_jax._elementwise import elementwise
from focal_jax._scalar import Logit


def _sides(y, alpha):
    return (y, 1 - y) if alpha is None else (alpha * y, (1 - alpha) * (1 - y))


def _value(x: Logit, y, alpha, beta):
    t = _scalar.sigmoid_terms(_scalar.logit(beta * x.z, again=False))
    positive, negative = _sides(y, alpha)
    return (positive * t.n - negative * t.log_q) / beta


def _slopes(x: Logit, y, alpha, beta):
    u = beta * x.z
    t = _scalar.sigmoid_terms(_scalar.logit(u, again=True))
    positive, negative = _sides(y, alpha)
    # The entropy of the sigmoid, the same of both sides.
    entropy = jnp.where(u >= 0, t.n + u * t.q, -t.log_q - u * t.p)
    dy = -x.z if alpha is None else (alpha * t.n + (1 - alpha) * t.log_q) / beta
    dalpha = (y * t.n + (1 - y) * t.log_q) / beta
    dbeta = -(positive + negative) * entropy / beta**2
    return negative * t.p - positive * t.q, dy, dalpha, dbeta


_losses = elementwise(_value, _slopes)


def tempered_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    beta: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    """Compute `-log sigmoid(beta z) / beta` of a positive, of a negative that of `-z`.

    Args: as `sigmoid_focal_loss`; beta is the inverse temperature, above 0.
    Returns: the losses. Raises: as it.
    Differentiation: any number of times.
    Example: none.
    References: none.
    """
    beta = _checks.array("beta", beta)
    return _losses(logits, labels, alpha=alpha, beta=beta, where=where)
