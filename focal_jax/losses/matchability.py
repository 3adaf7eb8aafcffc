"""Matchability-aware loss: the target is a power of the quality, the weight is constant."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax.catalogue import declare
from focal_jax.engine import elementwise_loss, exponent, mask, number, scalar
from focal_jax.losses.varifocal import is_positive


def _target(y: Array, gamma: int | float | Array) -> tuple[Array, Array, Array]:
    """Return `y**gamma`, `1 - y**gamma` without cancellation, and `log y`."""
    log_y = scalar.log_abs(y, 1 - y)
    target = scalar.abs_power(y, log_y, gamma)
    # The derivatives of expm1 would underflow for a tiny y before those of the power do.
    value = lax.stop_gradient(-jnp.expm1(gamma * log_y))
    return target, value - (target - lax.stop_gradient(target)), log_y


def _weight(z: Array, positive: Array, gamma: int | float | Array) -> tuple[Array, Array]:
    """Return `s**gamma` for negatives and 1 for positives, and `log s`, as constants."""
    s = lax.stop_gradient(scalar.sigmoid_terms(-z))
    return jnp.where(positive, 1, scalar.power(s.q, s.log_q, gamma)), s.log_q


def _value(z, y, gamma, alpha, positive):
    positive = is_positive(y, positive)
    target, one_minus_target, _ = _target(y, gamma)
    weight, _ = _weight(z, positive, gamma)
    if alpha is not None:
        weight = jnp.where(positive, 1, alpha) * weight
    return scalar.weigh(weight, scalar.cross_entropy(z, target, one_minus_target))


def _slopes(z, y, gamma, alpha, positive):
    positive = is_positive(y, positive)
    t = scalar.sigmoid_terms(z)
    target, one_minus_target, log_y = _target(y, gamma)
    power, log_s = _weight(z, positive, gamma)
    n = scalar.cross_entropy(z, target, one_minus_target)
    weight = power if alpha is None else jnp.where(positive, 1, alpha) * power
    target_by_label = gamma * scalar.abs_power(y, log_y, gamma - 1)
    target_by_gamma = scalar.abs_power(y, log_y, gamma, logs=1)
    by_gamma = jnp.where(positive, 0, n * log_s) - z * target_by_gamma
    return (
        weight * (one_minus_target * t.p - target * t.q),
        -weight * z * target_by_label,
        weight * by_gamma,
        jnp.where(positive, 0, power * n),
    )


_loss = elementwise_loss(
    _value, _slopes, gamma=exponent(1.5), alpha=number(None, low=0.0), positive=mask()
)


@declare("elementwise", ("hard", "soft"), _loss.options, stop_gradient_weight=True)
def matchability_aware_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 1.5,
    alpha: ArrayLike | None = None,
    positive: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""Compute the matchability-aware loss of independent scores between 0 and 1.

    With `s = sigmoid(logits)` and the label `y`, the quality of a match (its IoU; 0 for a
    negative):

        loss = BCE(y**gamma, s)                       for a positive
        loss = alpha * s**gamma * BCE(y**gamma, s)    for a negative

    Unlike in `varifocal_loss`, a positive of low quality weighs as much as one of high quality. The
    weight of the negatives is constant under differentiation.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import matchability_aware_loss
      >>> losses = matchability_aware_loss(jnp.array([-2.0, 0.0, 2.0]), jnp.array([0, 0.4, 0.8]))
      >>> [f"{x:.2e}" for x in losses.tolist()]
      ['5.22e-03', '6.93e-01', '6.96e-01']

    Args:
      logits: `[...]`: log-odds.
      labels: the qualities in [0, 1]; broadcast to the logits.
      gamma: exponent of the qualities and of the weight of the negatives, at least 0. With 0 the
        target of a negative is 1.
      alpha: weight of the negatives, at least 0. None means 1.
      positive: bool, broadcasts to the losses: which elements are positives. By default those with
        a label above 0. With the mask, a positive of quality 0 remains a positive, as in DEIM.
      where: mask of the losses.

    Returns:
      The losses, `[...]`.

    References:
      [Huang et al. 2025, DEIM: DETR with Improved Matching for Fast
      Convergence](https://arxiv.org/abs/2412.04234).
    """
    return _loss(**locals())
