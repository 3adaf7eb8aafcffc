"""The scalar that every focal loss shares: `weight * q**gamma * n` of one position.

`p` is the probability of the true class, `q = 1 - p`, `n = -log p`. The margin `x` is
the logit of the true class less the log-sum-exp of the others, so that `p = sigmoid(x)`:
a sigmoid head has the margin itself for a logit, a softmax head makes it from its row.
"""

import math
from functools import partial
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


# artanh(x) / x in powers of x**2, for x up to 1/3: its series for float64; for float32 the
# polynomial that agrees with it at five Chebyshev nodes, to 4e-9, where the series needs seven.
_ARTANH = {
    4: (1.000000004, 0.333331608, 0.200122976, 0.139825789, 0.140788891),
    8: tuple(1 / (2 * k + 1) for k in range(16)),
}


def _log1p(e: Array) -> Array:
    """Return log(1 + e) for e in [0, 1], as 2 artanh(e / (2 + e)).

    Sums and products only: a fused loop of them costs XLA's CPU backend a third of what
    its own log1p does. Written with the reciprocal, which is fused where a quotient of
    two arrays is written out to memory.
    """
    twice = e * (2 / (2 + e))
    square = twice * twice
    *others, series = (c / 4**k for k, c in enumerate(_ARTANH[e.dtype.itemsize]))
    for coefficient in reversed(others):
        series = series * square + coefficient
    return twice * series


def halves(x: Array, e: Array) -> tuple[Array, Array, Array]:
    """Return sigmoid(x), sigmoid(-x) and log(1 + e), given `e = exp(-|x|)`."""
    right = x >= 0
    inverse = 1 / (1 + e)
    near, far = inverse, e * inverse
    return jnp.where(right, near, far), jnp.where(right, far, near), _log1p(e)


def _log_q(x: Array, log1p: Array) -> Array:
    return jnp.maximum(-(log1p + jnp.where(x >= 0, x, 0)), least_log(x))


def _ratio(n: Array, q: Array) -> Array:
    return jnp.where(q == 0, 1, divide(n, q))


def _terms(x: Array, e: Array) -> Terms:
    """Return the terms of the margin `x`, given `e = exp(-|x|)`."""
    p, q, log1p = halves(x, e)
    n = log1p + jnp.where(x >= 0, 0, -x)
    return Terms(p, q, n, _log_q(x, log1p), _ratio(n, q))


def _along(t: Terms, dx: Array) -> Terms:
    # Autodiff of the formulas above would be wrong at x = 0, where |x| has a kink that
    # cancels only on paper, and would divide by q**2, which underflows long before the
    # derivatives do. Each rule here is bounded, and so is its own derivative.
    dp = t.p * t.q * dx
    return Terms(dp, -dp, -t.q * dx, -t.p * dx, (t.p * bounded(t.ratio) - 1) * dx)


@jax.custom_jvp
def sigmoid_terms(x: Array) -> Terms:
    """Return the terms of a logit, which is the margin itself."""
    return _terms(x, jnp.exp(-jnp.abs(x)))


@sigmoid_terms.defjvp
def _sigmoid_terms_jvp(primals, tangents):
    t = sigmoid_terms(*primals)
    return t, _along(t, *tangents)


def _margin(true: Array, rest: Array) -> tuple[Array, Array]:
    """Return the margin `x` and `exp(-|x|)`."""
    e = jnp.exp(true)
    return true - jnp.log(rest), jnp.minimum(e, rest) / jnp.maximum(e, rest)


def _along_margin(function, primals, tangents):
    t = function(*primals)
    return t, _along(t, tangents[0] - divide(tangents[1], primals[1]))


@jax.custom_jvp
def softmax_terms(true: Array, rest: Array) -> Terms:
    """Return the terms of the margin `x = true - log(rest)`.

    `true` is the true class's logit and `rest` the sum over the other classes of
    exp(logit), both less the largest logit of the position. `rest` is 0 where no other
    class is left, or where all of them underflow.
    """
    return _terms(*_margin(true, rest))


softmax_terms.defjvp(partial(_along_margin, softmax_terms))


@jax.custom_jvp
def class_terms(true: Array, rest: Array, whole: Array, log_whole: Array) -> Terms:
    """Return the terms with each class of a position in turn taken for the true one.

    `true` and `rest` are those of `softmax_terms`, `whole` is `exp(true) + rest`. That and
    its logarithm are one number for all the classes, and save each a logarithm and a
    quotient of its own where `log q` is not asked for.
    """
    x, small = _margin(true, rest)
    share = 1 / whole
    p, q, n = jnp.exp(true) * share, rest * share, log_whole - true
    return Terms(p, q, n, _log_q(x, _log1p(small)), _ratio(n, q))


class_terms.defjvp(partial(_along_margin, class_terms))


@jax.custom_jvp
def _reciprocal(x: Array) -> Array:
    return 1 / jnp.maximum(x, jnp.finfo(x.dtype).tiny)


@_reciprocal.defjvp
def _reciprocal_jvp(primals, tangents):
    # Never 1 / x**2, which overflows while the derivatives that it is part of do not.
    value = _reciprocal(*primals)
    return value, -(tangents[0] * value) * value


def divide(a: Array, b: Array) -> Array:
    """Return a / b for b >= 0, and 0 where both are 0, with finite derivatives of any order."""
    return a * _reciprocal(b)


def _large(x: Array) -> float:
    return math.sqrt(float(jnp.finfo(x.dtype).max))


def least_log(x: Array) -> float:
    """Return the bound that stands for log 0: 0 times it is 0, and so with its square."""
    return -math.sqrt(_large(x))


def bounded(x: Array) -> Array:
    """Return `x` with its infinities made finite, for products in which 0 must win."""
    return jnp.clip(x, -_large(x), _large(x))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _static_power(gamma: int | float, q: Array, log_q: Array) -> Array:
    if (2 * gamma) % 1:
        return jnp.exp(gamma * log_q)
    whole = lax.integer_pow(q, int(gamma))
    return whole * jnp.sqrt(q) if gamma % 1 else whole


@_static_power.defjvp
def _static_power_jvp(gamma, primals, tangents):
    # By way of log q, whose derivative is bounded where that of a root of q is not.
    value = _static_power(gamma, *primals)
    return value, gamma * value * tangents[1]


def power(q: Array, log_q: Array, gamma: int | float | Array) -> Array:
    """Return `q**gamma`, which is 1 at `gamma = 0` for every q.

    Halves of a whole Python number are products and a square root; the rest goes through
    the logarithm.
    """
    if isinstance(gamma, (int, float)):
        return _static_power(gamma, q, log_q)
    return jnp.exp(gamma * log_q)


def loss(weight: Array, q: Array, log_q: Array, n: Array, gamma: int | float | Array) -> Array:
    """Return `weight * q**gamma * n`; a weight of 0 gives 0, also where `n` is infinite."""
    value = power(q, log_q, gamma) * n
    return weight * jnp.where(weight == 0, bounded(value), value)


def slope(t: Terms, gamma: int | float | Array) -> Array:
    """Return `-d(q**gamma * n)/d(log p)`, free of the pole that `1/q` seems to have."""
    return power(t.q, t.log_q, gamma) * (1 + gamma * (t.p * bounded(t.ratio)))


def unweighted(t: Terms, gamma: int | float | Array) -> Array:
    """Return `q**gamma * n`, made finite for products with a cotangent of 0."""
    return power(t.q, t.log_q, gamma) * bounded(t.n)
