"""Varifocal loss: positives are weighted by their quality, negatives as in a focal loss."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax.catalogue import declare
from focal_jax.engine import elementwise_loss, exponent, flag, mask, number, scalar


def is_positive(y: Array, positive: Array | None) -> Array:
    """Return which elements are positives: by the mask, else those with a label above 0."""
    return y > 0 if positive is None else positive != 0


def _value(z, y, alpha, gamma, positive, stop_weight_gradient):
    del stop_weight_gradient  # the value is the same
    positive = is_positive(y, positive)
    y = jnp.where(positive, y, 0)
    s = scalar.sigmoid_terms(-z)  # s.q is the score
    power = jnp.where(positive, 1, scalar.power(s.q, s.log_q, gamma))
    return scalar.weigh(jnp.where(positive, y, alpha), power * scalar.cross_entropy(z, y))


def _slopes(z, y, alpha, gamma, positive, stop_weight_gradient):
    positive = is_positive(y, positive)
    y = jnp.where(positive, y, 0)
    s, n = scalar.sigmoid_terms(-z), scalar.cross_entropy(z, y)
    q, log_q = s.q, s.log_q
    rise = s.q + gamma * (s.p * n)
    if stop_weight_gradient:
        q, log_q, rise = lax.stop_gradient(q), lax.stop_gradient(log_q), s.q
    power = scalar.power(q, log_q, gamma)
    by_logit = jnp.where(positive, y * ((1 - y) * s.q - y * s.p), alpha * (power * rise))
    # The derivative of `y n` is `n - y z`, without the cancellation at large logits.
    by_label = jnp.where(positive, scalar.cross_entropy(z, 2 * y, 1 - 2 * y), 0)
    by_alpha = jnp.where(positive, 0, power * n)
    return by_logit, by_label, by_alpha, alpha * (by_alpha * log_q)


_loss = elementwise_loss(
    _value,
    _slopes,
    alpha=number(0.75, low=0.0),
    gamma=exponent(2.0),
    positive=mask(),
    stop_weight_gradient=flag(False),
)


@declare("elementwise", ("hard", "soft"), _loss)
def varifocal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike = 0.75,
    gamma: ArrayLike = 2.0,
    positive: ArrayLike | None = None,
    stop_weight_gradient: bool = False,
    where: ArrayLike | None = None,
) -> Array:
    r"""Compute the varifocal loss of independent scores between 0 and 1.

    With `s = sigmoid(logits)` and the label `y`, the quality that the score of a positive predicts:

        loss = y * BCE(y, s)                     for a positive
        loss = alpha * s**gamma * BCE(0, s)      for a negative

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import varifocal_loss
      >>> losses = varifocal_loss(jnp.array([-2.0, 0.0, 2.0]), jnp.array([0.0, 0.0, 0.8]))
      >>> [f"{x:.2e}" for x in losses.tolist()]
      ['1.35e-03', '1.30e-01', '4.22e-01']

    Args:
      logits: `[...]`: log-odds.
      labels: the qualities in [0, 1]; broadcast to the logits. The labels of negatives are not
        used, but have to be in [0, 1].
      alpha: weight of the negatives, at least 0.
      gamma: focusing exponent of the negatives, at least 0.
      positive: bool, broadcasts to the losses: which elements are positives. By default those with
        a label above 0, as in mmdetection. With the mask, a positive of quality 0 has weight 0, as
        in RT-DETR.
      stop_weight_gradient: whether the weight of the negatives is constant under differentiation,
        as in RT-DETR and D-FINE in transformers. mmdetection differentiates it.
      where: mask of the losses.

    Returns:
      The losses, `[...]`. Their sum is usually divided by the number of positives or by the sum of
      their qualities.

    References:
      [Zhang et al. 2021, VarifocalNet: An IoU-aware Dense Object
      Detector](https://arxiv.org/abs/2008.13367).
    """
    return _loss(**locals())
