"""Asymmetric loss: separate exponents for positives and negatives, no loss of easy negatives."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax.catalogue import declare
from focal_jax.engine import elementwise_loss, exponent, flag, number, scalar
from focal_jax.engine.scalar import Terms


@jax.custom_jvp
def _shifted_terms(z: Array, margin: Array) -> Terms:
    """Return the terms of a negative whose score is reduced by the margin.

    Here `q = max(s - margin, 0)` and `p = 1 - q`.
    """
    t = scalar.sigmoid_terms(z)
    q, p = jnp.maximum(t.p - margin, 0), jnp.minimum(t.q + margin, 1)
    # If p underflows, the margin is 0 or subnormal, and -log p is the logit.
    log_p = jnp.where(p < jnp.finfo(z.dtype).tiny, -z, jnp.log(p))
    n = -jnp.where(q < 0.5, scalar.log1p(-jnp.minimum(q, 0.5)), log_p)
    near_one = scalar.log1p(-jnp.minimum(p, 0.5))
    log_q = jnp.where(p < 0.5, near_one, jnp.maximum(jnp.log(q), scalar.min_log(q)))
    return Terms(p, q, n, log_q, scalar.n_over_q(n, q))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _quotient(a: int, b: int, k: int, z: Array, margin: Array) -> Array:
    """Return `(1 - s)**a * margin**b / (1 - s + margin)**(a + b + k)`.

    The derivatives are sums of such quotients. Every quotient is bounded, so that their sums are
    finite. Autodiff would multiply reciprocals that overflow.
    """
    not_s, tiny = scalar.sigmoid_terms(z).q, float(jnp.finfo(z.dtype).tiny)
    share = 1 / (1 + scalar.divide(margin, not_s))
    inverse = 1 / jnp.maximum(not_s + margin, 64 * tiny)
    bounded = jnp.minimum(lax.integer_pow(inverse, k), 1 / (16 * tiny))
    return lax.integer_pow(share, a) * lax.integer_pow(margin * inverse, b) * bounded


@_quotient.defjvp
def _quotient_jvp(a, b, k, primals, tangents):
    s = scalar.sigmoid_terms(primals[0]).p
    by_z = (b + k) * _quotient(a + 1, b, k, *primals) - a * _quotient(a, b + 1, k, *primals)
    by_margin = -(a + k) * _quotient(a, b, k + 1, *primals)
    if b:
        by_margin += b * _quotient(a + 1, b - 1, k + 1, *primals)
    return _quotient(a, b, k, *primals), s * by_z * tangents[0] + by_margin * tangents[1]


_share, _one_over_p = partial(_quotient, 1, 0, 0), partial(_quotient, 0, 0, 1)


@_shifted_terms.defjvp
def _shifted_terms_jvp(primals, tangents):
    (z, margin), (dz, dmargin) = primals, tangents
    t, m = scalar.sigmoid_terms(z), _shifted_terms(*primals)
    above = m.q > 0
    dq = jnp.where(above, t.p * t.q * dz - dmargin, 0)
    dn = jnp.where(above, t.p * _share(z, margin) * dz - _one_over_p(*primals) * dmargin, 0)
    dlog_q = scalar.divide(dq, m.q)
    dn_over_q = scalar.divide(dn, m.q) - scalar.clip_inf(m.n_over_q) * dlog_q
    # This difference cancels for a small q, where n / q = 1 + q / 2 + q**2 / 3 + ...
    dn_over_q = jnp.where(m.q < 0.5, scalar.n_over_q_slope(jnp.minimum(m.q, 0.5)) * dq, dn_over_q)
    return m, Terms(-dq, dq, dn, dlog_q, dn_over_q)


def _near_zero(z: Array, margin: Array, t: Terms) -> tuple[Array, Array, Array]:
    """Return where the logit is near 0, and `log(t.q / m.q)` and `t.n - m.n`, valid only there.

    `t` has the terms of a positive and `m` the terms of a negative. With a small margin both are
    almost equal near the logit 0, so that differences of the terms would cancel.
    """
    near = (jnp.abs(z) < 0.5) & (margin < 0.125)
    z, margin = jnp.where(near, z, 0), jnp.where(near, margin, 0)
    log_ratio = -z - scalar.log1p(-margin / jnp.where(near, t.p, 1))
    return near, log_ratio, scalar.log1p(margin / jnp.where(near, t.q, 1)) - z


def _value(z, y, gamma_positive, gamma_negative, margin, stop_weight_gradient):
    del stop_weight_gradient  # the value is the same
    t, m = scalar.sigmoid_terms(z), _shifted_terms(z, margin)
    positive = scalar.weigh(y, scalar.focal(t, gamma_positive))
    return positive + scalar.weigh(1 - y, scalar.focal(m, gamma_negative))


def _slopes(z, y, gamma_positive, gamma_negative, margin, stop_weight_gradient):
    t, m, not_y = scalar.sigmoid_terms(z), _shifted_terms(z, margin), 1 - y
    near, log_ratio, n_difference = _near_zero(z, margin, t)

    # The terms and exponents in the derivatives of the weights; constant weights have none.
    of_weights = (t.q, t.log_q), (m.q, m.log_q, log_ratio)
    g_positive, g_negative = gamma_positive, gamma_negative
    if stop_weight_gradient:
        of_weights, g_positive, g_negative = lax.stop_gradient(of_weights), 0, 0
    (t_q, t_log_q), (m_q, m_log_q, log_ratio) = of_weights
    w_positive = scalar.power(t_q, t_log_q, gamma_positive)
    w_negative = scalar.abs_power(m_q, m_log_q, gamma_negative)
    n_over_q, n_negative = scalar.clip_inf(m.n_over_q), scalar.clip_inf(m.n)
    log_w_ratio = gamma_positive * log_ratio + (gamma_positive - gamma_negative) * m_log_q
    near &= jnp.abs(log_w_ratio) < 1
    difference = jnp.expm1(jnp.where(near, log_w_ratio, 0)) * t.n + n_difference
    falls = w_positive * t.q
    if not isinstance(g_positive, int | float) or g_positive:  # XLA computes a product with 0
        falls += g_positive * (w_positive * (t.p * t.n))
    of_negative = jnp.where(m.q > 0, not_y * w_negative, 0)
    by_margin = of_negative * (_one_over_p(z, margin) + g_negative * n_over_q)
    # 1 / p is bounded for the sake of higher derivatives.
    tiny = jnp.finfo(z.dtype).tiny
    excess = 1 / jnp.maximum(t.q + margin, tiny) - _one_over_p(z, margin)
    rises = of_negative * (t.p * (_share(z, margin) + g_negative * (n_over_q * t.q)))
    return (
        rises - y * falls,
        jnp.where(near, w_negative * difference, w_positive * t.n - w_negative * n_negative),
        # Multiply the large factors first, because the small ones alone may underflow.
        y * (w_positive * (t.n * t_log_q)),
        not_y * (w_negative * (n_negative * m_log_q)),
        -(by_margin + lax.stop_gradient(of_negative * excess)),
    )


_loss = elementwise_loss(
    _value,
    _slopes,
    gamma_positive=exponent(0.0),
    gamma_negative=exponent(4.0),
    margin=number(0.05, low=0.0, high=1.0, below_high=True),
    stop_weight_gradient=flag(False),
)


@declare("elementwise", ("hard", "soft"), _loss)
def asymmetric_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma_positive: ArrayLike = 0.0,
    gamma_negative: ArrayLike = 4.0,
    margin: ArrayLike = 0.05,
    stop_weight_gradient: bool = False,
    where: ArrayLike | None = None,
) -> Array:
    r"""Compute the asymmetric loss for multi-label classification with few positives.

    With `s = sigmoid(logits)` and the label `y`:

        m    = max(s - margin, 0)
        loss = -y (1 - s)**gamma_positive * log s - (1 - y) m**gamma_negative * log(1 - m)

    A negative whose score is below the margin has loss 0. With `margin=0` this is a focal loss with
    separate exponents for positives and negatives.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import asymmetric_loss
      >>> losses = asymmetric_loss(jnp.array([-3.0, 0.0, 0.0]), jnp.array([0, 0, 1]))
      >>> [f"{x:.2e}" for x in losses.tolist()]
      ['0.00e+00', '2.45e-02', '6.93e-01']

    Args:
      logits: `[...]`: log-odds.
      labels: `y` in [0, 1]; broadcasts to the logits.
      gamma_positive: focusing exponent of the positives, at least 0.
      gamma_negative: focusing exponent of the negatives, at least 0.
      margin: number in [0, 1) that the score of a negative is reduced by. At `s = margin` the
        derivative is 0, like that of relu at 0.
      stop_weight_gradient: whether the weights are constant under differentiation. The authors'
        code calls this `disable_torch_grad_focal_loss`.
      where: mask of the losses.

    Returns:
      The losses, `[...]`.

    References:
      [Ridnik et al. 2021, Asymmetric Loss For Multi-Label
      Classification](https://arxiv.org/abs/2009.14119).
    """
    return _loss(**locals())
