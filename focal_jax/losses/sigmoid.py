"""Sigmoid focal loss: every logit is an independent binary classification."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax.catalogue import declare
from focal_jax.engine import arguments, elementwise_loss, exponent, scalar
from focal_jax.engine.options import POSITIVE_WEIGHT

# ---------------------------------------------------------------- labels in [0, 1]


class SoftTerms(NamedTuple):
    """The terms of a logit and a label in [0, 1], and quotients that their slopes need."""

    q: Array  # 1 - p_t
    n: Array  # binary cross entropy
    log_q: Array
    pq_over_q: Array  # sigmoid(z) sigmoid(-z) / q
    n_over_q: Array


@jax.custom_jvp
def soft_terms(z: Array, y: Array) -> SoftTerms:
    """Return the terms, computed from sums of products without cancellation."""
    s, not_s, log1p_e = scalar.sigmoid_pair(z, scalar.exp_neg_abs(z))
    p, q = y * s + (1 - y) * not_s, y * not_s + (1 - y) * s
    wrong = jnp.where(z >= 0, 1 - y, y)  # the label's weight on the side opposite to the logit

    def cross_entropy(weight):
        return log1p_e + jnp.where(weight == 0, 0, weight * jnp.abs(z))

    n = cross_entropy(wrong)
    # For a hard label, log q is a log-sigmoid, which does not underflow. For a soft label q is a
    # sum; near 1 its logarithm is computed from 1 - q.
    soft = jnp.where(p < 0.5, scalar.log1p(-jnp.minimum(p, 0.5)), jnp.log(q))
    log_q = jnp.where((y == 0) | (y == 1), -cross_entropy(1 - wrong), soft)
    log_q = jnp.maximum(log_q, scalar.min_log(q))
    return SoftTerms(q, n, log_q, scalar.divide(s * not_s, q), scalar.divide(n, q))


@soft_terms.defjvp
def _soft_terms_jvp(primals, tangents):
    (z, y), (dz, dy) = primals, tangents
    t, s = scalar.sigmoid_terms(z), soft_terms(z, y)
    n_over_q = scalar.clip_inf(s.n_over_q)
    dq_dy = -scalar.p_minus_q(z)
    dn_dz = (1 - y) * t.p - y * t.q
    dlogq_dz = (1 - 2 * y) * s.pq_over_q
    # The bound is finite, so that its product with 0 is 0. Where q underflows, third derivatives
    # multiply by the square of the bound, which is finite there too.
    largest = float(jnp.finfo(z.dtype).max)
    large = 1e-3 * jnp.where(s.q == 0, largest**0.5, largest).astype(z.dtype)
    dlogq_dy = jnp.clip(scalar.divide(dq_dy, s.q), -large, large)
    dratio_dy = jnp.clip(-scalar.divide(scalar.clip_inf(z) + n_over_q * dq_dy, s.q), -large, large)
    return s, SoftTerms(
        q=(1 - 2 * y) * t.p * t.q * dz + dq_dy * dy,
        n=dn_dz * dz - z * dy,
        log_q=dlogq_dz * dz + dlogq_dy * dy,
        pq_over_q=s.pq_over_q * ((dq_dy - dlogq_dz) * dz - dlogq_dy * dy),
        n_over_q=(scalar.divide(dn_dz, s.q) - n_over_q * dlogq_dz) * dz + dratio_dy * dy,
    )


def label_weight(y: Array, alpha: Array | None) -> Array:
    """Return `alpha y + (1 - alpha)(1 - y)`, or 1 without alpha."""
    return jnp.ones((), y.dtype) if alpha is None else y * alpha + (1 - y) * (1 - alpha)


def soft_value(z, y, alpha, gamma):
    """Return the loss of a label in [0, 1]."""
    t = soft_terms(z, y)
    value = scalar.power(t.q, t.log_q, gamma) * t.n
    return scalar.weigh(label_weight(y, alpha), value)


def soft_slopes(z, y, alpha, gamma):
    """Return the derivatives in the logit, the label, alpha and gamma."""
    s, t = scalar.sigmoid_terms(z), soft_terms(z, y)
    n_over_q = scalar.clip_inf(t.n_over_q)
    weight, m = label_weight(y, alpha), scalar.power(t.q, t.log_q, gamma)
    # d(q**g n) = q**g (dn + g n dq / q). Neither dq / q nor n / q has a pole.
    by_logit = (1 - y) * s.p - y * s.q + gamma * ((1 - 2 * y) * t.pq_over_q * t.n)
    by_label = weight * m * (-gamma * (n_over_q * scalar.p_minus_q(z)) - z)
    if alpha is not None:
        by_label = by_label + m * t.n * (2 * alpha - 1)
    return weight * m * by_logit, by_label, m * t.n * (2 * y - 1), weight * m * t.n * t.log_q


_soft = elementwise_loss(soft_value, soft_slopes, alpha=POSITIVE_WEIGHT, gamma=exponent(2.0))


# ---------------------------------------------------------------- labels 0 and 1


def _hard_weight(y: Array, alpha: Array | None) -> Array:
    return jnp.ones((), y.dtype) if alpha is None else jnp.where(y == 1, alpha, 1 - alpha)


def hard_value(z, y, alpha, gamma):
    """Return the loss of a positive, whose label is 1, or of a negative."""
    t = scalar.sigmoid_terms(z, y == 1)
    return scalar.weigh(_hard_weight(y, alpha), scalar.focal(t, gamma))


def hard_slopes(z, y, alpha, gamma):
    """Return the derivatives in the logit, the label (None), alpha and gamma."""
    t, weight = scalar.sigmoid_terms(z, y == 1), _hard_weight(y, alpha)
    focal = scalar.focal(t, gamma)
    by_margin = -weight * (scalar.minus_dfocal_dlog_p(t, gamma) * t.q)
    sign = jnp.where(y == 1, 1, -jnp.ones_like(y))
    return sign * by_margin, None, sign * focal, weight * focal * t.log_q


# For bool and integer labels the loss is a function of the margin, with fewer operations.
hard_loss = elementwise_loss(
    hard_value,
    hard_slopes,
    label_is_invalid=lambda y: (y != 0) & (y != 1),
    alpha=POSITIVE_WEIGHT,
    gamma=exponent(2.0),
)


@declare("elementwise", ("hard", "soft"), _soft)
def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Compute the focal loss of independent binary classifications.

    With `p = sigmoid(logits)` and the binary cross entropy
    `BCE(y, p) = -y log p - (1 - y) log(1 - p)`:

        p_t     = y p + (1 - y)(1 - p)
        alpha_t = alpha y + (1 - alpha)(1 - y)
        loss    = alpha_t * (1 - p_t)**gamma * BCE(y, p)

    For hard labels this is `-alpha_t (1 - p_t)**gamma log p_t`, the formula of the paper. It is a
    drop-in replacement for `optax.losses.sigmoid_focal_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import sigmoid_focal_loss
      >>> losses = sigmoid_focal_loss(jnp.array([-20.0, 0.0, 20.0]), jnp.array([0, 1, 1]))
      >>> [f"{x:.2e}" for x in losses.tolist()]
      ['8.76e-27', '1.73e-01', '8.76e-27']

    Args:
      logits: `[...]`: log-odds of the positive class.
      labels: `y`, broadcasts to the logits: 1 or True for a positive, 0 for a negative, or a
        probability.
      alpha: weight of the positives in [0, 1]; negatives weigh `1 - alpha`. None weighs both 1.
        The paper uses 0.25 with gamma 2.
      gamma: focusing exponent, at least 0. 0 is the weighted cross entropy.
      where: mask of the losses.

    Returns:
      The losses, `[...]`.

    References:
      [Lin et al. 2017, Focal Loss for Dense Object Detection](https://arxiv.org/abs/1708.02002).
    """
    labels = arguments.as_array("labels", labels)
    loss = _soft if jnp.issubdtype(labels.dtype, jnp.floating) else hard_loss
    return loss(logits, labels, alpha=alpha, gamma=gamma, where=where)
