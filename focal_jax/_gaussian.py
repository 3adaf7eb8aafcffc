"""Gaussian focal loss: the peaks of a heat map, and a slope of lesser negatives around each."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _inputs, _scalar
from focal_jax._elementwise import elementwise
from focal_jax._scalar import Logit, Terms


def _parts(x: Logit, y: Array) -> tuple[Array, Terms, Array, Array]:
    """Return the sign of the logit, the terms, and for a negative `1 - y` and its logarithm.

    The weight of a peak is 1 whatever beta is: it is the power of 1.
    """
    sign = jnp.where(y == 1, 1, -jnp.ones_like(y))
    below = jnp.where(y == 1, 0, y)
    t = _scalar.sigmoid_terms(x._replace(z=sign * x.z))
    return sign, t, 1 - below, jnp.log1p(-below)


def _value(x: Logit, y: Array, alpha: _inputs.Exponent, beta: _inputs.Exponent) -> Array:
    _, t, not_y, log_not_y = _parts(x, y)
    weight = _scalar.power(not_y, log_not_y, beta.value)
    return _scalar.loss(weight, t.q, t.log_q, t.n, alpha.value)


def _slopes(x: Logit, y: Array, alpha: _inputs.Exponent, beta: _inputs.Exponent):
    sign, t, not_y, log_not_y = _parts(x, y)
    weight = _scalar.power(not_y, log_not_y, beta.value)
    unweighted = _scalar.unweighted(t, alpha.value)
    dz = -sign * weight * (_scalar.minus_dloss_dlogp(t, alpha.value) * t.q)
    dy = jnp.where(y == 1, 0, -beta.value * weight / not_y * unweighted)
    return dz, dy, weight * (unweighted * t.log_q), weight * unweighted * log_not_y


_losses = elementwise(_value, _slopes)


def gaussian_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike = 2.0,
    beta: ArrayLike = 4.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Compute the focal loss of a heat map whose negatives weigh less close to a peak.

    With `s = sigmoid(logits)` and the label `y`, 1 at a peak and less around it (a Gaussian,
    usually), each element's loss is

        -(1 - s)**alpha * log s                            where y = 1
        -(1 - y)**beta * s**alpha * log(1 - s)             elsewhere

    as CornerNet, CenterNet and CenterPoint have it, here from logits and without their
    clamps. The names are CornerNet's: `alpha` is the focusing exponent, `beta` is how fast
    the weight falls towards a peak. mmdetection calls this beta `gamma`. With labels of 0
    and 1 it is `sigmoid_focal_loss` with `gamma=alpha`.

    Args:
      logits: `[...]`, floating: log-odds of a peak.
      labels: real or bool, of a shape that broadcasts to the logits': the heat map. Only
        exactly 1 is a peak. A label outside `[0, 1]` gives NaN at its position.
      alpha: focusing exponent, 0 or more. A Python number or an array that broadcasts to
        the losses.
      beta: exponent of the negatives' weight, 0 or more; 0 weighs all 1. Likewise.
      where: bool, broadcasts to the losses: positions where it is False have loss 0 and
        gradient 0, whatever the inputs hold there.

    Returns:
      The losses, `[...]` as the logits, not reduced; divide their sum by the number of
      peaks. float32 for 16-bit logits (which are computed in float32), else of the logits'
      dtype.

    Raises:
      ValueError: for logits that are not floating, shapes that do not broadcast to the
        logits', a `where` that is not bool, or a negative Python `alpha` or `beta`.

    Differentiation: reverse mode in logits, labels, alpha and beta, any number of times, and
      forward over reverse; the derivative in the label of a peak is 0. Forward mode alone is
      refused by `jax.custom_vjp`; `focal_jax.reference.gaussian_focal_loss` has it.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import gaussian_focal_loss
      >>> losses = gaussian_focal_loss(jnp.array([0.0, 0.0, 0.0]), jnp.array([0.0, 0.8, 1.0]))
      >>> [f"{x:.2e}" for x in losses.tolist()]
      ['1.73e-01', '2.77e-04', '1.73e-01']

    References:
      Law, Deng. [CornerNet: Detecting Objects as Paired
      Keypoints](https://arxiv.org/abs/1808.01244). ECCV 2018.
      Zhou, Wang, Kraehenbuehl. [Objects as Points](https://arxiv.org/abs/1904.07850). 2019.
    """
    exponents = {
        "alpha": _inputs.exponent("alpha", alpha),
        "beta": _inputs.exponent("beta", beta),
    }
    return _losses(logits, labels, where=where, **exponents)
