"""Varifocal loss: positives that weigh as much as they are good, negatives as in a focal loss."""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs, _scalar
from focal_jax._elementwise import elementwise
from focal_jax._scalar import Logit


def is_positive(y: Array, positive: Array | None) -> Array:
    """Return which labels are of positives: those above 0, if nobody says otherwise."""
    return y > 0 if positive is None else positive != 0


def _value(
    x: Logit, y: Array, alpha: Array, gamma: _inputs.Exponent, positive: Array | None
) -> Array:
    positive = is_positive(y, positive)
    y = jnp.where(positive, y, 0)
    s = _scalar.sigmoid_terms(_scalar.negated(x))  # whose q is the score
    power = jnp.where(positive, 1, _scalar.power(s.q, s.log_q, gamma.value))
    weight = jnp.where(positive, y, alpha)
    n = power * _scalar.cross_entropy(x, y, 1 - y)
    return weight * jnp.where(weight == 0, _scalar.bounded(n), n)


def _slopes(
    held: bool,
    x: Logit,
    y: Array,
    alpha: Array,
    gamma: _inputs.Exponent,
    positive: Array | None,
):
    positive, g = is_positive(y, positive), gamma.value
    y = jnp.where(positive, y, 0)
    s = _scalar.sigmoid_terms(_scalar.negated(x))
    n, z = (_scalar.bounded(v) for v in (_scalar.cross_entropy(x, y, 1 - y), x.z))
    q, log_q = lax.stop_gradient((s.q, s.log_q)) if held else (s.q, s.log_q)
    power = _scalar.power(q, log_q, g)
    rise = s.q if held else s.q + g * (s.p * n)
    dz = jnp.where(positive, y * ((1 - y) * s.q - y * s.p), alpha * (power * rise))
    unweighted = jnp.where(positive, 0, power * n)
    return dz, jnp.where(positive, n - y * z, 0), unweighted, alpha * (unweighted * log_q)


_LOSSES = {held: elementwise(_value, partial(_slopes, held)) for held in (False, True)}


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

    With `s = sigmoid(logits)` and the label `y`, the quality that a positive's score is to
    predict, each element's loss is

        y * BCE(y, s)                          for a positive
        alpha * s**gamma * BCE(0, s)           for a negative

    where BCE is the binary cross entropy, `-y log s - (1 - y) log(1 - s)`.

    Args:
      logits: `[...]`, floating: log-odds.
      labels: real or bool, of a shape that broadcasts to the logits': the qualities. Those
        of negatives are not looked at, but one outside `[0, 1]` gives NaN at its position.
      alpha: weight of the negatives, a number or an array that broadcasts to the losses.
      gamma: focusing exponent of the negatives, 0 or more. Likewise.
      positive: bool, broadcasts to the losses: which elements are positives. None takes
        those with a label above 0, so that a positive of quality 0 counts as a negative, as
        in mmdetection; with the mask it has the weight 0, as in RT-DETR.
      stop_weight_gradient: whether the score in the negatives' weight is a constant to
        differentiation, as in transformers' RT-DETR and D-FINE; mmdetection differentiates
        it.
      where: bool, broadcasts to the losses: positions where it is False have loss 0 and
        gradient 0, whatever the inputs hold there.

    Returns:
      The losses, `[...]` as the logits, not reduced; their sum is usually divided by the
      number of positives or the sum of their qualities. float32 for 16-bit logits (which are
      computed in float32), else of the logits' dtype.

    Raises:
      ValueError: for logits that are not floating, shapes that do not broadcast to the
        logits', a `where` or `positive` that is not bool, a negative Python `gamma`, or a
        `stop_weight_gradient` that is not a Python bool.

    Differentiation: reverse mode in logits, labels, alpha and gamma, any number of times, and
      forward over reverse. Forward mode alone is refused by `jax.custom_vjp`;
      `focal_jax.reference.varifocal_loss` has it.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import varifocal_loss
      >>> losses = varifocal_loss(jnp.array([-2.0, 0.0, 2.0]), jnp.array([0.0, 0.0, 0.8]))
      >>> [f"{x:.2e}" for x in losses.tolist()]
      ['1.35e-03', '1.30e-01', '4.22e-01']

    References:
      Zhang, Wang, Dayoub, Suenderhauf. [VarifocalNet: An IoU-aware Dense Object
      Detector](https://arxiv.org/abs/2008.13367). CVPR 2021.
    """
    logits = _inputs.floating("logits", logits)
    return _LOSSES[_checks.flag("stop_weight_gradient", stop_weight_gradient)](
        logits,
        labels,
        alpha=_checks.given("alpha", alpha),
        gamma=_inputs.exponent("gamma", gamma),
        positive=_inputs.mask(positive, logits.shape, "positive"),
        where=where,
    )
