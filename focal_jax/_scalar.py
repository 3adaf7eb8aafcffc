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

from focal_jax._inputs import Exponent


class Terms(NamedTuple):
    """What the scalar needs of a position, each computed without cancellation."""

    p: Array  # sigmoid(x)
    q: Array  # sigmoid(-x)
    n: Array  # -log p = softplus(-x)
    log_q: Array  # -softplus(x), bounded below so that 0 * log q is 0
    n_over_q: Array  # which tends to 1 as q tends to 0


class Logit(NamedTuple):
    """A logit, and what everything else about its sigmoid is made of."""

    z: Array
    size: Array  # |z|
    e: Array  # exp(-|z|)


def logit(z: Array, *, again: bool) -> Logit:
    """Return a logit for the forward pass, or once more, `again`, for the backward pass.

    The same numbers in other words. An accelerator's compiler takes the same words for one
    intermediate with two users, and writes it out to memory, which costs more than all the
    arithmetic; of these it makes one kernel that reads the logits once.
    """
    size = -jnp.minimum(z, -z) if again else jnp.abs(z)
    return Logit(z, size, jnp.exp(-size))


@jax.custom_jvp
def in_other_words(x: Array) -> Array:
    """Return the same number, but for -inf, by a way of its own: see `logit`."""
    return jnp.maximum(x, jnp.finfo(x.dtype).min)


@in_other_words.defjvp
def _in_other_words_jvp(primals, tangents):
    return in_other_words(*primals), tangents[0]


def negated(x: Logit) -> Logit:
    """Return the logit of the other side."""
    return x._replace(z=-x.z)


# artanh(x) / x in powers of x**2, for |x| up to 1/3: its series for float64; for float32 the
# polynomial that agrees with it at five Chebyshev nodes, to 4e-9, where the series needs seven.
_ARTANH = {
    4: (1.000000004, 0.333331608, 0.200122976, 0.139825789, 0.140788891),
    8: tuple(1 / (2 * k + 1) for k in range(16)),
}


def log1p(e: Array) -> Array:
    """Return log(1 + e) for e in [-1/2, 1], as 2 artanh(e / (2 + e)).

    Sums and products only, which every compiler makes a loop of that is faster than its own
    log1p. Written with the reciprocal, which is fused where a quotient of two arrays is
    written out to memory.
    """
    twice = e * (2 / (2 + e))
    square = twice * twice
    *others, series = (c / 4**k for k, c in enumerate(_ARTANH[e.dtype.itemsize]))
    for coefficient in reversed(others):
        series = series * square + coefficient
    return twice * series


def halves(x: Logit) -> tuple[Array, Array, Array]:
    """Return sigmoid(z), sigmoid(-z) and log(1 + exp(-|z|))."""
    right = x.z >= 0
    inverse = 1 / (1 + x.e)
    near, far = inverse, x.e * inverse
    return jnp.where(right, near, far), jnp.where(right, far, near), log1p(x.e)


def _log_q(x: Array, log1p_e: Array) -> Array:
    return jnp.maximum(-(log1p_e + jnp.where(x >= 0, x, 0)), least_log(x))


def _n_over_q(n: Array, q: Array) -> Array:
    return jnp.where(q == 0, 1, divide(n, q))


def _terms(x: Logit) -> Terms:
    p, q, log1p_e = halves(x)
    n = log1p_e + jnp.where(x.z >= 0, 0, -x.z)
    return Terms(p, q, n, _log_q(x.z, log1p_e), _n_over_q(n, q))


def _tangents(t: Terms, dx: Array) -> Terms:
    # Autodiff of the formulas above would be wrong at x = 0, where |x| has a kink that
    # cancels only on paper, and would divide by q**2, which underflows long before the
    # derivatives do. Each rule here is bounded, and so is its own derivative.
    dp = t.p * t.q * dx
    return Terms(dp, -dp, -t.q * dx, -t.p * dx, (t.p * bounded(t.n_over_q) - 1) * dx)


@jax.custom_jvp
def sigmoid_terms(x: Logit) -> Terms:
    """Return the terms of a logit, which is the margin itself."""
    return _terms(x)


@sigmoid_terms.defjvp
def _sigmoid_terms_jvp(primals, tangents):
    t = sigmoid_terms(*primals)
    return t, _tangents(t, tangents[0].z)


@jax.custom_jvp
def p_minus_q(x: Logit) -> Array:
    """Return `sigmoid(z) - sigmoid(-z)` without cancellation."""
    return jnp.tanh(0.5 * x.z)


@p_minus_q.defjvp
def _p_minus_q_jvp(primals, tangents):
    t = sigmoid_terms(*primals)
    return p_minus_q(*primals), 2 * t.p * t.q * tangents[0].z


@jax.custom_jvp
def cross_entropy(x: Logit, y: Array, not_y: Array) -> Array:
    """Return `-y log sigmoid(z) - not_y log sigmoid(-z)`, where `not_y` is `1 - y`.

    It is given apart for labels so near 1 that the difference would be lost.
    """
    wrong = jnp.where(x.z >= 0, not_y, y)  # the weight of the side that the logit is not on
    return log1p(x.e) + jnp.where(wrong == 0, 0, wrong * x.size)


@cross_entropy.defjvp
def _cross_entropy_jvp(primals, tangents):
    (x, y, not_y), (dx, dy, _) = primals, tangents
    t = sigmoid_terms(x)
    slope = not_y * t.p - y * t.q
    return cross_entropy(*primals), slope * dx.z - bounded(x.z) * dy


def _margin(true: Array, rest: Array) -> Logit:
    """Return the margin `x` with its `exp(-|x|)`."""
    e, x = jnp.exp(true), true - jnp.log(rest)
    return Logit(x, jnp.abs(x), jnp.minimum(e, rest) / jnp.maximum(e, rest))


def _along_margin(function, primals, tangents):
    t = function(*primals)
    return t, _tangents(t, tangents[0] - divide(tangents[1], primals[1]))


@jax.custom_jvp
def softmax_terms(true: Array, rest: Array) -> Terms:
    """Return the terms of the margin `x = true - log(rest)`.

    `true` is the true class's logit and `rest` the sum over the other classes of
    exp(logit), both less the largest logit of the position. `rest` is 0 where no other
    class is left, or where all of them underflow.
    """
    return _terms(_margin(true, rest))


softmax_terms.defjvp(partial(_along_margin, softmax_terms))


@jax.custom_jvp
def class_terms(true: Array, rest: Array, whole: Array, log_whole: Array, q: Array) -> Terms:
    """Return the terms with each class of a position in turn taken for the true one.

    `true` and `rest` are those of `softmax_terms`, `whole` is `exp(true) + rest`. That and
    its logarithm are one number for all the classes, and save each a logarithm and a
    quotient of its own where `log q` is not asked for. `q` is `rest / whole`, without
    cancellation and in fewer steps.
    """
    margin = _margin(true, rest)
    p, n = jnp.exp(true) * (1 / whole), log_whole - true
    return Terms(p, q, n, _log_q(margin.z, log1p(margin.e)), _n_over_q(n, q))


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


# The largest exponent that is taken by products: five squarings, and as many factors again.
_MOST_FACTORS = 32


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _static_power(gamma: int | float, q: Array, log_q: Array) -> Array:
    if (2 * gamma) % 1 or gamma > _MOST_FACTORS:
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

    Halves of a small whole Python number are products and a square root; the rest goes
    through the logarithm.
    """
    if isinstance(gamma, int | float):
        return _static_power(gamma, q, log_q)
    return jnp.exp(gamma * log_q)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _power_of_size(signed: bool, x: Array, log_size: Array, gamma: Exponent) -> Array:
    g, size = gamma.value, jnp.abs(x)
    if isinstance(g, int | float) and g >= 0:
        value = power(size, log_size, g)
    else:
        # Negative in derivatives only, which are to stay finite: at the pole they are 0.
        bound = -0.9 * math.log(jnp.finfo(x.dtype).tiny)
        pole = (size == 0) & (g < 0)
        value = jnp.where(pole, 0, jnp.exp(jnp.minimum(g * log_size, bound)))
    return jnp.sign(x) * value if signed else value


@_power_of_size.defjvp
def _power_of_size_jvp(signed, primals, tangents):
    # By way of the power that is one less, not of the logarithm: at x = 0 the derivatives of a
    # square are 0 and 2, where a product with a logarithm's derivative has 0 for both.
    (x, log_size, gamma), (dx, _, dgamma) = primals, tangents
    value = _power_of_size(signed, *primals)
    one_less = Exponent(gamma.value - 1)
    tangent = gamma.value * _power_of_size(not signed, x, log_size, one_less) * dx
    if isinstance(gamma.value, Array):
        tangent = tangent + value * log_size * dgamma.value
    return value, tangent


# Return `|x|**gamma` and `sign(x) |x|**gamma`; `log_size` is `log|x|`. The derivative of the
# one is gamma times the other with an exponent that is one less.
power_of_size = partial(_power_of_size, False)
signed_power = partial(_power_of_size, True)


@jax.custom_jvp
def log_size(x: Array, rest: Array) -> Array:
    """Return `log|x|`, bounded below, where `rest` is `1 - |x|` without cancellation."""
    near_one = log1p(-jnp.minimum(rest, 0.5))
    return jnp.maximum(jnp.where(rest < 0.5, near_one, jnp.log(jnp.abs(x))), least_log(x))


@log_size.defjvp
def _log_size_jvp(primals, tangents):
    (x, _), (dx, _) = primals, tangents
    return log_size(*primals), divide(jnp.sign(x) * dx, jnp.abs(x))


def loss(weight: Array, q: Array, log_q: Array, n: Array, gamma: int | float | Array) -> Array:
    """Return `weight * q**gamma * n`; a weight of 0 gives 0, also where `n` is infinite."""
    value = power(q, log_q, gamma) * n
    return weight * jnp.where(weight == 0, bounded(value), value)


def minus_dloss_dlogp(t: Terms, gamma: int | float | Array) -> Array:
    """Return `-d(q**gamma * n)/d(log p)`, free of the pole that `1/q` seems to have.

    From an exponent of 1 on, that is known beforehand, a factor of q cancels the pole and saves
    the quotient.
    """
    if isinstance(gamma, int | float) and gamma >= 1:
        return power(t.q, t.log_q, gamma - 1) * (t.q + gamma * (t.p * bounded(t.n)))
    return power(t.q, t.log_q, gamma) * (1 + gamma * (t.p * bounded(t.n_over_q)))


def unweighted(t: Terms, gamma: int | float | Array) -> Array:
    """Return `q**gamma * n`, made finite for products with a cotangent of 0."""
    return power(t.q, t.log_q, gamma) * bounded(t.n)
