"""Sigmoid focal loss: every logit a binary classification of its own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _inputs, _scalar
from focal_jax._elementwise import elementwise
from focal_jax._scalar import Logit


class SoftTerms(NamedTuple):
    """The scalar's terms for a label that may be soft, and what their slopes need."""

    q: Array  # 1 - p_t
    n: Array  # binary cross entropy
    log_q: Array
    pq_over_q: Array  # sigmoid(z) sigmoid(-z) / q
    n_over_q: Array


@jax.custom_jvp
def soft_terms(x: Logit, y: Array) -> SoftTerms:
    """Return the terms of a logit and a label: sums of products, no cancellation."""
    s, not_s, log1p_e = _scalar.halves(x)
    p, q = y * s + (1 - y) * not_s, y * not_s + (1 - y) * s
    wrong = jnp.where(x.z >= 0, 1 - y, y)  # the weight of the side that the logit is not on

    def cross_entropy(weight):
        return log1p_e + jnp.where(weight == 0, 0, weight * x.size)

    n = cross_entropy(wrong)
    # Of a hard label q is the other side's probability, whose logarithm never underflows.
    # Of a soft one it is a sum of both; and near 1 it is known by what it lacks of 1.
    soft = jnp.where(p < 0.5, _scalar.log1p(-jnp.minimum(p, 0.5)), jnp.log(q))
    log_q = jnp.where((y == 0) | (y == 1), -cross_entropy(1 - wrong), soft)
    log_q = jnp.maximum(log_q, _scalar.least_log(q))
    return SoftTerms(q, n, log_q, _scalar.divide(s * not_s, q), _scalar.divide(n, q))


@soft_terms.defjvp
def _soft_terms_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    dz = dx.z
    t, s = _scalar.sigmoid_terms(x), soft_terms(x, y)
    n_over_q, z = _scalar.bounded(s.n_over_q), _scalar.bounded(x.z)
    dq_dy = -_scalar.p_minus_q(x)
    dn_dz = (1 - y) * t.p - y * t.q
    dlogq_dz = (1 - 2 * y) * s.pq_over_q
    dlogq_dy = _scalar.divide(dq_dy, s.q)
    return s, SoftTerms(
        q=(1 - 2 * y) * t.p * t.q * dz + dq_dy * dy,
        n=dn_dz * dz - z * dy,
        log_q=dlogq_dz * dz + dlogq_dy * dy,
        pq_over_q=s.pq_over_q * ((dq_dy - dlogq_dz) * dz - dlogq_dy * dy),
        n_over_q=(_scalar.divide(dn_dz, s.q) - n_over_q * dlogq_dz) * dz
        - (_scalar.divide(z, s.q) + n_over_q * dlogq_dy) * dy,
    )


def label_weight(y: Array, alpha: Array | None) -> Array:
    return jnp.ones((), y.dtype) if alpha is None else y * alpha + (1 - y) * (1 - alpha)


def value(x: Logit, y: Array, alpha: Array | None, gamma: _inputs.Exponent) -> Array:
    t = soft_terms(x, y)
    return _scalar.loss(label_weight(y, alpha), t.q, t.log_q, t.n, gamma.value)


def slopes(x: Logit, y: Array, alpha: Array | None, gamma: _inputs.Exponent):
    s, t, g = _scalar.sigmoid_terms(x), soft_terms(x, y), gamma.value
    z, n, n_over_q = (_scalar.bounded(v) for v in (x.z, t.n, t.n_over_q))
    weight, m = label_weight(y, alpha), _scalar.power(t.q, t.log_q, g)

    # d(q^g n) = q^g (dn + g n dq/q); dq/q and n/q have no pole
    dz = weight * m * ((1 - y) * s.p - y * s.q + g * ((1 - 2 * y) * t.pq_over_q * n))
    dy = weight * m * (-g * (n_over_q * _scalar.p_minus_q(x)) - z)
    if alpha is not None:
        dy = dy + m * n * (2 * alpha - 1)
    return dz, dy, m * n * (2 * y - 1), weight * m * n * t.log_q


_losses = elementwise(value, slopes)


def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Compute the focal loss of independent binary classifications.

    With `p = sigmoid(logits)`, `p_t = y p + (1 - y)(1 - p)` and
    `alpha_t = alpha y + (1 - alpha)(1 - y)`, each element's loss is

        alpha_t * (1 - p_t)**gamma * BCE(y, p)

    where BCE is the binary cross entropy, `-y log p - (1 - y) log(1 - p)`. For a hard
    label this is the paper's `-alpha_t (1 - p_t)**gamma log p_t`; for a soft one it is
    the definition of `optax.losses.sigmoid_focal_loss`, for which this is a drop-in.

    Args:
      logits: `[...]`, floating: log-odds of the positive class.
      labels: real or bool, of a shape that broadcasts to the logits': 1 or True for a
        positive, 0 for a negative, or a probability in between. A label outside
        `[0, 1]` gives NaN at its position.
      alpha: weight of the positives, negatives weigh `1 - alpha`; None weighs both 1.
        Broadcasts to the losses.
      gamma: focusing exponent, 0 or more; 0 is the weighted cross entropy. A Python
        number or an array that broadcasts to the losses.
      where: bool, broadcasts to the losses: positions where it is False have loss 0 and
        gradient 0, whatever the inputs hold there.

    Returns:
      The losses, `[...]` as the logits, not reduced. float32 for 16-bit logits (which
      are computed in float32), else of the logits' dtype.

    Raises:
      ValueError: for logits that are not floating, shapes that do not broadcast to the
        logits', a `where` that is not bool, or a negative Python `gamma`.

    Differentiation: reverse mode in logits, labels, alpha and gamma, any number of
      times, and forward over reverse. Forward mode alone is refused by
      `jax.custom_vjp`; `focal_jax.reference.sigmoid_focal_loss` has it.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import sigmoid_focal_loss
      >>> losses = sigmoid_focal_loss(jnp.array([-20.0, 0.0, 20.0]), jnp.array([0, 1, 1]))
      >>> [f"{x:.2e}" for x in losses.tolist()]
      ['8.76e-27', '1.73e-01', '8.76e-27']

    References:
      Lin, Goyal, Girshick, He, Dollar. [Focal Loss for Dense Object
      Detection](https://arxiv.org/abs/1708.02002). ICCV 2017.
    """
    return _losses(logits, labels, alpha=alpha, gamma=_inputs.exponent("gamma", gamma), where=where)
