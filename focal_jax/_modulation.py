"""The scalar that every focal loss shares: `weight * q**gamma * n` of one position.

`p` is the probability of the true class, `q = 1 - p`, `n = -log p`. The margin `x` is
the logit of the true class less the log-sum-exp of the others, so that `p = sigmoid(x)`:
a sigmoid head has the margin itself for a logit, a softmax head makes it from its row.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Terms(NamedTuple):
    """What the scalar needs of a position, each computed without cancellation."""

    p: Array  # sigmoid(x)
    q: Array  # sigmoid(-x)
    n: Array  # -log p = softplus(-x)
    log_q: Array  # -softplus(x), bounded below so that 0 * log q is 0
    ratio: Array  # n / q, which tends to 1 as q tends to 0


@jax.custom_jvp
def terms(margin: Array, rest: Array) -> Terms:
    """Return the terms of the margin `x = margin - log(rest)`.

    `margin` is the true logit less a reference logit, `rest` the sum over the other
    classes of `exp(logit - reference)`: at least 1 when the reference is the largest of
    the others, 0 when there are no others. A sigmoid has `rest = 1`.
    """
    e = jnp.exp(-jnp.abs(margin))
    right = margin >= 0
    true, others = jnp.where(right, 1, e), rest * jnp.where(right, e, 1)
    total = true + others
    p, q = true / total, others / total
    x = margin - jnp.log(rest)
    log1p = jnp.log1p(jnp.minimum(true, others) / jnp.maximum(true, others))
    n = log1p + jnp.maximum(-x, 0)
    log_q = jnp.maximum(-(log1p + jnp.maximum(x, 0)), -(_large(x) ** 0.5))
    none = (q == 0).astype(q.dtype)
    return Terms(p, q, n, log_q, (n + none) / (q + none))


@terms.defjvp
def _terms_jvp(primals, tangents):
    # By hand, since autodiff of the formulas above is wrong at margin 0 (|x| has a kink
    # there that cancels only on paper) and divides by q**2, which underflows long before
    # the derivatives do. Every rule below is bounded, and so is its own derivative.
    t = terms(*primals)
    rest = primals[1]
    dx = tangents[0] - tangents[1] / (rest + (rest == 0).astype(rest.dtype))
    dp = t.p * t.q * dx
    return t, Terms(dp, -dp, -t.q * dx, -t.p * dx, (t.p * bounded(t.ratio) - 1) * dx)


def _large(x: Array) -> float:
    return math.sqrt(float(jnp.finfo(x.dtype).max))


def bounded(x: Array) -> Array:
    """Return `x` with its infinities made finite, for products in which 0 must win."""
    return jnp.clip(x, -_large(x), _large(x))


def power(q: Array, log_q: Array, gamma: int | float | Array) -> Array:
    """Return `q**gamma`, which is 1 at `gamma = 0` for every q."""
    if isinstance(gamma, int):
        return lax.integer_pow(q, gamma)
    return jnp.exp(gamma * log_q)


def loss(
    weight: Array, q: Array, log_q: Array, n: Array, gamma: int | float | Array
) -> Array:
    """Return `weight * q**gamma * n`; a weight of 0 gives 0, also where `n` is infinite."""
    return jnp.where(weight == 0, 0, weight * (power(q, log_q, gamma) * n))


def slope(t: Terms, gamma: int | float | Array) -> Array:
    """Return `-d(q**gamma * n)/dx`, x the margin; `q` times `log_slope`, no division."""
    return power(t.q, t.log_q, gamma) * (t.q + gamma * (t.p * bounded(t.n)))


def log_slope(t: Terms, gamma: int | float | Array) -> Array:
    """Return `-d(q**gamma * n)/d(log p)`, free of the pole that `1/q` seems to have."""
    return power(t.q, t.log_q, gamma) * (1 + gamma * (t.p * bounded(t.ratio)))
