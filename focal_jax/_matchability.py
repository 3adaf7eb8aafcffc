"""Matchability-aware loss: the quality of a match is raised to a power, the weight is constant."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _inputs, _scalar
from focal_jax._elementwise import elementwise
from focal_jax._scalar import Logit
from focal_jax._varifocal import is_positive


def _target(y: Array, gamma: _inputs.Exponent) -> tuple[Array, Array, Array]:
    """Return `y**gamma`, what it lacks of 1, and the logarithm of y."""
    log_y = _scalar.log_size(y, 1 - y)
    target = _scalar.power_of_size(y, log_y, gamma)
    return target, -jnp.expm1(gamma.value * log_y), log_y


def _weight(x: Logit, positive: Array, gamma: _inputs.Exponent) -> tuple[Array, Array]:
    """Return `s**gamma` for the negatives, 1 for the positives, and the logarithm of s."""
    s = lax.stop_gradient(_scalar.sigmoid_terms(_scalar.negated(x)))
    return jnp.where(positive, 1, _scalar.power(s.q, s.log_q, gamma.value)), s.log_q


def _value(
    x: Logit,
    y: Array,
    gamma: _inputs.Exponent,
    alpha: Array | None,
    positive: Array | None,
) -> Array:
    positive = is_positive(y, positive)
    target, rest, _ = _target(y, gamma)
    weight, _ = _weight(x, positive, gamma)
    if alpha is not None:
        weight = jnp.where(positive, 1, alpha) * weight
    n = _scalar.cross_entropy(x, target, rest)
    return weight * jnp.where(weight == 0, _scalar.bounded(n), n)


def _slopes(
    x: Logit,
    y: Array,
    gamma: _inputs.Exponent,
    alpha: Array | None,
    positive: Array | None,
):
    positive = is_positive(y, positive)
    t, z = _scalar.sigmoid_terms(x), _scalar.bounded(x.z)
    target, rest, log_y = _target(y, gamma)
    power, log_s = _weight(x, positive, gamma)
    n = _scalar.bounded(_scalar.cross_entropy(x, target, rest))
    weight = power if alpha is None else jnp.where(positive, 1, alpha) * power
    one_less = _inputs.Exponent(gamma.value - 1)
    by_label = gamma.value * _scalar.power_of_size(y, log_y, one_less)
    # At gamma = 0 the target is 1 for a label of 0 too, which has no logarithm.
    by_target = target * jnp.where(y == 0, 0, log_y)
    by_gamma = jnp.where(positive, 0, n * log_s) - z * by_target
    return (
        weight * (rest * t.p - target * t.q),
        -weight * z * by_label,
        weight * by_gamma,
        jnp.where(positive, 0, power * n),
    )


_losses = elementwise(_value, _slopes)


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
    negative), each element's loss is

        BCE(y**gamma, s)                          for a positive
        alpha * s**gamma * BCE(y**gamma, s)       for a negative

    where BCE is the binary cross entropy, `-y log s - (1 - y) log(1 - s)`. Unlike in
    `varifocal_loss`, a poor match weighs as much as a good one. The score in the weight is a
    constant to differentiation.

    Args:
      logits: `[...]`, floating: log-odds.
      labels: real or bool, of a shape that broadcasts to the logits': the qualities. One
        outside `[0, 1]` gives NaN at its position.
      gamma: exponent of the qualities and of the negatives' weight, 0 or more (0 makes the
        target of a negative 1). A Python number or an array that broadcasts to the losses.
      alpha: weight of the negatives, None for 1. Broadcasts to the losses.
      positive: bool, broadcasts to the losses: which elements are positives. None takes
        those with a label above 0; with the mask, a positive of quality 0 remains one, as in
        DEIM.
      where: bool, broadcasts to the losses: positions where it is False have loss 0 and
        gradient 0, whatever the inputs hold there.

    Returns:
      The losses, `[...]` as the logits, not reduced. float32 for 16-bit logits (which are
      computed in float32), else of the logits' dtype.

    Raises:
      ValueError: for logits that are not floating, shapes that do not broadcast to the
        logits', a `where` or `positive` that is not bool, or a negative Python `gamma`.

    Differentiation: reverse mode in logits, labels, gamma and alpha, any number of times, and
      forward over reverse. Forward mode alone is refused by `jax.custom_vjp`;
      `focal_jax.reference.matchability_aware_loss` has it.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import matchability_aware_loss
      >>> losses = matchability_aware_loss(jnp.array([-2.0, 0.0, 2.0]), jnp.array([0, 0.4, 0.8]))
      >>> [f"{x:.2e}" for x in losses.tolist()]
      ['5.22e-03', '6.93e-01', '6.96e-01']

    References:
      Huang, Lu, Cun, Yu, Zhou, Shen. [DEIM: DETR with Improved Matching for Fast
      Convergence](https://arxiv.org/abs/2412.04234). CVPR 2025.
    """
    return _losses(
        logits,
        labels,
        gamma=_inputs.exponent("gamma", gamma),
        alpha=alpha,
        positive=_inputs.mask(positive, jnp.shape(logits), "positive"),
        where=where,
    )
