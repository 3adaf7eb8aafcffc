"""Scalar functions that focal losses are made of, accurate and with finite derivatives.

Every hard-label focal loss is `weight * q**gamma * n` of one position, with `p` the probability of
the true class, `q = 1 - p` and `n = -log p`. The margin `x` is the logit of the true class minus
the log-sum-exp of the other logits, so that `p = sigmoid(x)`. The margin of a sigmoid is its logit;
the margin of a softmax is computed from a row of logits.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from focal_jax.engine.options import MaybeStatic


class Terms(NamedTuple):
    """The terms of one position, each computed without cancellation.

    Attributes:
      p: the probability of the true class, `sigmoid(x)`.
      q: `1 - p`, as `sigmoid(-x)`.
      n: `-log p`.
      log_q: `log q`, bounded below so that `0 * log q` is 0.
      n_over_q: `n / q`, which tends to 1 as q tends to 0.
    """

    p: Array
    q: Array
    n: Array
    log_q: Array
    n_over_q: Array


# ---------------------------------------------------------------- infinities


def max_finite(x: Array) -> float:
    """Return the square root of the largest number of the dtype: its square is finite."""
    return math.sqrt(float(jnp.finfo(x.dtype).max))


def min_log(x: Array) -> float:
    """Return the finite number that replaces `log 0`, so that 0 times its square is 0."""
    return -math.sqrt(max_finite(x))


def clip_inf(x: Array) -> Array:
    """Return `x` with infinities replaced by large finite numbers, so that `0 * x` is 0."""
    return jnp.clip(x, -max_finite(x), max_finite(x))


@jax.custom_jvp
def prevent_cse(x: Array) -> Array:
    """Return `x` for the backward pass, in a form that XLA does not merge with the forward pass.

    On CPUs and GPUs, XLA's common-subexpression elimination (CSE) would write an expensive
    expression of both passes to memory, and computing it twice is faster. Infinities become finite.
    """
    return clip_inf(x)


@prevent_cse.defjvp
def _prevent_cse_jvp(primals, tangents):
    return prevent_cse(*primals), tangents[0]


# ---------------------------------------------------------------- terms of a logit


# Coefficients of artanh(x) / x in powers of x**2 for |x| <= 1/3, by the item size of the dtype. For
# float64 they are the Taylor series. For float32 they are the polynomial that interpolates the
# function at five Chebyshev nodes, with an error of 4e-9; the series would need seven terms.
_ARTANH = {
    4: (1.000000004, 0.333331608, 0.200122976, 0.139825789, 0.140788891),
    8: tuple(1 / (2 * k + 1) for k in range(16)),
}


def log1p(e: Array) -> Array:
    """Return `log(1 + e)` for e in [-1/2, 1], as `2 artanh(e / (2 + e))`.

    A polynomial vectorizes on every backend and is faster than XLA's own log1p. The quotient is
    written with a reciprocal: XLA:CPU writes a quotient of two arrays to memory.
    """
    twice = e * (2 / (2 + e))
    return twice * _series(
        twice * twice, (c / 4**k for k, c in enumerate(_ARTANH[e.dtype.itemsize]))
    )


def _series(x: Array, coefficients: Iterable[float]) -> Any:
    *others, series = coefficients
    for coefficient in reversed(others):
        series = series * x + coefficient
    return series


def artanh_remainder(square: Array) -> Array:
    """Return `(artanh(x) / x - 1) / x**2` for `x**2` in [0, 1/9]."""
    return _series(square, _ARTANH[square.dtype.itemsize][1:])


def expm1(x: Array) -> Array:
    """Return `exp(x) - 1`. JAX's derivative, `expm1(x) + 1`, cancels for a large negative x."""
    e = jnp.exp(x)
    return jnp.expm1(lax.stop_gradient(x)) + (e - lax.stop_gradient(e))


def exp_neg_abs(z: Array) -> Array:
    """Return `exp(-|z|)`."""
    return jnp.exp(-jnp.abs(z))


def sigmoid_pair(z: Array, exp_neg_abs_z: Array) -> tuple[Array, Array, Array]:
    """Return `sigmoid(z)`, `sigmoid(-z)` and `log(1 + exp(-|z|))`."""
    is_positive = z >= 0
    inverse = 1 / (1 + exp_neg_abs_z)
    larger, smaller = inverse, exp_neg_abs_z * inverse
    p, q = jnp.where(is_positive, larger, smaller), jnp.where(is_positive, smaller, larger)
    return p, q, log1p(exp_neg_abs_z)


def _terms(x: Array, exp_neg_abs_x: Array) -> Terms:
    p, q, log1p_e = sigmoid_pair(x, exp_neg_abs_x)
    n = log1p_e + jnp.where(x >= 0, 0, -x)
    log_q = jnp.maximum(-(log1p_e + jnp.where(x >= 0, x, 0)), min_log(x))
    return Terms(p, q, n, log_q, n_over_q(n, q))


def n_over_q(n: Array, q: Array) -> Array:
    """Return `n / q`, and its limit 1 at q = 0."""
    return jnp.where(q == 0, 1, divide(n, q))


def n_over_q_slope(q: Array) -> Array:
    """Return the derivative of `-log(1 - q) / q` for q in [0, 1/2]."""
    u = q / (2 - q)
    return 0.5 * (1 + u) * (1 + u) * (1 / (1 - u) - u * artanh_remainder(u * u))


def _one_minus_p_n_over_q(t: Terms) -> Array:
    """Return `1 - p * n / q`, which is about q / 2 for a small q."""
    of_small_q = t.p * t.q * n_over_q_slope(jnp.minimum(t.q, 0.5))
    return jnp.where(t.q < 0.5, of_small_q, 1 - t.p * clip_inf(t.n_over_q))


def terms_tangents(t: Terms, dx: Array) -> Terms:
    """Return the tangents of the terms for the tangent of the margin.

    Autodiff of the formulas fails twice: it has a wrong derivative at x = 0, the kink of |x|, and
    it divides by q**2, which underflows before the derivatives do. Every tangent here, and every
    derivative of it, is bounded.
    """
    dp = t.p * t.q * dx
    return Terms(dp, -dp, -t.q * dx, -t.p * dx, -_one_minus_p_n_over_q(t) * dx)


def sigmoid_terms(logit: Array, positive: Array | None = None) -> Terms:
    """Return the terms of a sigmoid: `p = sigmoid(logit)`, or `sigmoid(-logit)` for negatives.

    `positive` marks the positive labels; None means that all are positive.
    """
    return _sigmoid_terms(logit, positive)


def _margin(z: Array, positive: Array | None) -> Array:
    return z if positive is None else jnp.where(positive, z, -z)


@jax.custom_jvp
def _sigmoid_terms(z: Array, positive: Array | None) -> Terms:
    # The exponential is computed from z and not from the margin, so that it does not wait for the
    # label: XLA:CPU would write the comparison of the label to memory.
    return _terms(_margin(z, positive), exp_neg_abs(z))


@_sigmoid_terms.defjvp
def _sigmoid_terms_jvp(primals, tangents):
    t = _sigmoid_terms(*primals)
    return t, terms_tangents(t, _margin(tangents[0], primals[1]))


@jax.custom_jvp
def p_minus_q(z: Array) -> Array:
    """Return `sigmoid(z) - sigmoid(-z)` without cancellation."""
    return jnp.tanh(0.5 * z)


@p_minus_q.defjvp
def _p_minus_q_jvp(primals, tangents):
    t = sigmoid_terms(*primals)
    return p_minus_q(*primals), 2 * t.p * t.q * tangents[0]


def cross_entropy(logit: Array, label: Array, one_minus_label: Array | None = None) -> Array:
    """Return the binary cross entropy, `-y log sigmoid(z) - (1 - y) log sigmoid(-z)`.

    Give `one_minus_label` if `1 - label` in floating point would lose digits.
    """
    return _cross_entropy(logit, label, 1 - label if one_minus_label is None else one_minus_label)


@jax.custom_jvp
def _cross_entropy(z: Array, y: Array, not_y: Array) -> Array:
    wrong = jnp.where(z >= 0, not_y, y)  # the weight of the class that the sign contradicts
    return log1p(exp_neg_abs(z)) + jnp.where(wrong == 0, 0, wrong * jnp.abs(z))


@_cross_entropy.defjvp
def _cross_entropy_jvp(primals, tangents):
    (z, y, not_y), (dz, dy, _) = primals, tangents
    t = sigmoid_terms(z)
    slope = not_y * t.p - y * t.q
    return _cross_entropy(*primals), slope * dz - clip_inf(z) * dy


# ---------------------------------------------------------------- terms of a softmax


@jax.custom_jvp
def softmax_terms(label_logit: Array, rest: Array) -> Terms:
    """Return the terms of a softmax.

    Args:
      label_logit: the logit of the label's class minus the largest logit of the position.
      rest: the sum over the other classes of `exp(logit - largest logit)`. It is 0 if there is no
        other class, or if all of them underflow.
    """
    e, x = jnp.exp(label_logit), label_logit - jnp.log(rest)
    return _terms(x, jnp.minimum(e, rest) / jnp.maximum(e, rest))


@softmax_terms.defjvp
def _softmax_terms_jvp(primals, tangents):
    t = softmax_terms(*primals)
    return t, terms_tangents(t, tangents[0] - divide(tangents[1], primals[1]))


@jax.custom_jvp
def shift_log_p(t: Terms, shift: Array) -> Terms:
    """Return the terms; their derivative in `shift` is their derivative in `log p`."""
    del shift
    return t


@shift_log_p.defjvp
def _shift_log_p_jvp(primals, tangents):
    (t, _), (dt, shift) = primals, tangents
    dp, dlog_q = t.p * shift, -divide(t.p, t.q) * shift
    dn_over_q = -divide(_one_minus_p_n_over_q(t), t.q) * shift
    by_shift = Terms(dp, -dp, -shift, dlog_q, dn_over_q)
    return t, jax.tree.map(jnp.add, dt, by_shift)


def finite(t: Terms) -> Terms:
    """Return the terms with infinities clipped, so that a slope times a weight of 0 is 0."""
    return t._replace(n=clip_inf(t.n), n_over_q=clip_inf(t.n_over_q))


# ---------------------------------------------------------------- quotients and powers


@jax.custom_jvp
def _reciprocal(x: Array) -> Array:
    return 1 / jnp.maximum(x, jnp.finfo(x.dtype).tiny)


@_reciprocal.defjvp
def _reciprocal_jvp(primals, tangents):
    # 1 / x**2 would overflow where the derivatives that it is a factor of do not.
    value = _reciprocal(*primals)
    return value, -(tangents[0] * value) * value


def divide(a: Array, b: Array) -> Array:
    """Return `a / b` for b >= 0, 0 for 0 / 0, with finite derivatives of every order."""
    return a * _reciprocal(b)


# Up to this exponent `power` uses at most five squarings and five other products.
_MAX_PRODUCT_EXPONENT = 32


def power(q: Array, log_q: Array, gamma: int | float | Array) -> Array:
    """Return `q**gamma` for q >= 0, which is 1 at `gamma = 0` for every q.

    Small Python exponents that are multiples of 1/2 are products and a square root. Others are
    `exp(gamma * log_q)`.
    """
    if isinstance(gamma, int | float):
        return _static_power(gamma, q, log_q)
    return jnp.exp(gamma * log_q)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _static_power(gamma: int | float, q: Array, log_q: Array) -> Array:
    if (2 * gamma) % 1 or gamma > _MAX_PRODUCT_EXPONENT:
        return jnp.exp(gamma * log_q)
    whole = lax.integer_pow(q, int(gamma))
    return whole * jnp.sqrt(q) if gamma % 1 else whole


@_static_power.defjvp
def _static_power_jvp(gamma, primals, tangents):
    # Differentiate through log q, because the derivative of a root of q is unbounded.
    value = _static_power(gamma, *primals)
    return value, gamma * value * tangents[1]


def abs_power(x: Array, log_abs_x: Array, gamma: int | float | Array, logs: int = 0) -> Array:
    """Return `|x|**gamma * log(|x|)**logs`; with logs it is 0 at x = 0.

    Without logs its derivative is `gamma * signed_abs_power(x, ..., gamma - 1)`.
    """
    return _abs_power(False, logs, x, log_abs_x, MaybeStatic(gamma))


def signed_abs_power(x: Array, log_abs_x: Array, gamma: int | float | Array) -> Array:
    """Return `sign(x) |x|**gamma`. Its derivative is `gamma * abs_power(x, ..., gamma - 1)`."""
    return _abs_power(True, 0, x, log_abs_x, MaybeStatic(gamma))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _abs_power(signed: bool, logs: int, x: Array, log_abs_x: Array, gamma: MaybeStatic) -> Array:
    g, abs_x, largest = gamma.value, jnp.abs(x), float(jnp.finfo(x.dtype).tiny) ** -0.95
    if isinstance(g, int | float) and g >= 0:
        value = power(abs_x, log_abs_x, g)
    else:
        # Exponents are negative in derivatives only. To keep the derivatives finite, the power is
        # 0 at the pole x = 0 and bounded near the pole.
        at_pole = (abs_x == 0) & (g < 0)
        exponent = jnp.minimum(g * log_abs_x, math.log(largest))
        value = jnp.where(at_pole, 0, jnp.exp(exponent))
    if logs:
        product = value * lax.integer_pow(log_abs_x, logs)
        value = jnp.where(x == 0, 0, jnp.clip(product, -largest, largest))
    return jnp.sign(x) * value if signed else value


@_abs_power.defjvp
def _abs_power_jvp(signed, logs, primals, tangents):
    # Do not differentiate through log|x|: at x = 0 the derivatives of x**2 are 0 and 2, and a
    # product with the derivative of the logarithm gives 0 for both.
    (x, log_abs_x, gamma), (dx, _, dgamma) = primals, tangents
    one_less = x, log_abs_x, MaybeStatic(gamma.value - 1)
    slope = gamma.value * _abs_power(not signed, logs, *one_less)
    if logs:
        slope = slope + logs * _abs_power(not signed, logs - 1, *one_less)
    tangent = slope * dx
    if isinstance(gamma.value, Array):
        tangent = tangent + _abs_power(signed, logs + 1, *primals) * dgamma.value
    return _abs_power(signed, logs, *primals), tangent


@jax.custom_jvp
def log_abs(x: Array, one_minus_abs_x: Array) -> Array:
    """Return `log|x|`, bounded below, for |x| <= 1.

    `one_minus_abs_x` is `1 - |x|`, computed without cancellation.
    """
    near_one = log1p(-jnp.minimum(one_minus_abs_x, 0.5))
    value = jnp.where(one_minus_abs_x < 0.5, near_one, jnp.log(jnp.abs(x)))
    return jnp.maximum(value, min_log(x))


@log_abs.defjvp
def _log_abs_jvp(primals, tangents):
    (x, _), (dx, _) = primals, tangents
    return log_abs(*primals), divide(jnp.sign(x) * dx, jnp.abs(x))


# ---------------------------------------------------------------- the focal loss of one position


def weigh(weight: Array, value: Array) -> Array:
    """Return `weight * value`, and 0 for a weight of 0 even if the value is infinite."""
    return weight * jnp.where(weight == 0, clip_inf(value), value)


def focal(t: Terms, gamma: int | float | Array) -> Array:
    """Return `q**gamma * n`."""
    return power(t.q, t.log_q, gamma) * t.n


def minus_dfocal_dlog_p(t: Terms, gamma: int | float | Array) -> Array:
    """Return minus the derivative of `q**gamma * n` in `log p`, for finite terms.

    It is `q**gamma * (1 + gamma * p * n / q)`. For a static gamma of at least 1, a factor of
    `q**gamma` cancels the division.
    """
    if isinstance(gamma, int | float) and gamma >= 1:
        return power(t.q, t.log_q, gamma - 1) * (t.q + gamma * (t.p * t.n))
    return power(t.q, t.log_q, gamma) * (1 + gamma * (t.p * t.n_over_q))
