"""Gaussian focal loss: negatives near a peak of a heat map weigh less."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax.catalogue import declare
from focal_jax.engine import elementwise_loss, exponent, scalar
from focal_jax.engine.options import POSITIVE_WEIGHT
from focal_jax.losses.sigmoid import hard_slopes, hard_value


def _decay(y: Array, beta: int | float | Array) -> tuple[Array, Array, Array]:
    """Return `(1 - y)**beta`, `1 - y` and `log(1 - y)`, for a peak those of the label 0."""
    y = jnp.where(y == 1, 0, y)
    not_y, log_not_y = 1 - y, jnp.log1p(-y)
    return scalar.power(not_y, log_not_y, beta), not_y, log_not_y


def _value(z, y, alpha, gamma, beta):
    return scalar.weigh(_decay(y, beta)[0], hard_value(z, y, alpha, gamma))


def _slopes(z, y, alpha, gamma, beta):
    decay, not_y, log_not_y = _decay(y, beta)
    value = hard_value(z, y, alpha, gamma)
    by_logit, _, by_alpha, by_gamma = hard_slopes(z, y, alpha, gamma)
    by_label = jnp.where(y == 1, 0, -beta * (decay / not_y) * value)
    by_beta = decay * value * log_not_y
    return decay * by_logit, by_label, decay * by_alpha, decay * by_gamma, by_beta


_loss = elementwise_loss(
    _value, _slopes, alpha=POSITIVE_WEIGHT, gamma=exponent(2.0), beta=exponent(4.0)
)


@declare("elementwise", ("hard", "soft"), _loss)
def gaussian_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    beta: ArrayLike = 4.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Compute the focal loss of a heat map, as CornerNet, CenterNet and CenterPoint use it.

    With `s = sigmoid(logits)` and the label `y`, 1 at a peak and smaller around it (usually a
    Gaussian):

        loss = -alpha * (1 - s)**gamma * log s                                where y = 1
        loss = -(1 - alpha) * (1 - y)**beta * s**gamma * log(1 - s)           elsewhere

    CornerNet calls gamma `alpha`; mmdetection calls beta `gamma`. For labels 0 and 1 the loss is
    `sigmoid_focal_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import gaussian_focal_loss
      >>> losses = gaussian_focal_loss(jnp.array([0.0, 0.0, 0.0]), jnp.array([0.0, 0.8, 1.0]))
      >>> [f"{x:.2e}" for x in losses.tolist()]
      ['1.73e-01', '2.77e-04', '1.73e-01']

    Args:
      logits: `[...]`: log-odds of a peak.
      labels: the heat map in [0, 1]; broadcasts to the logits. Exactly 1 is a peak. The derivative
        in the label of a peak is 0.
      alpha: weight of the peaks in [0, 1]; the other elements weigh `1 - alpha`. None weighs both
        1, as CornerNet and CenterNet do.
      gamma: focusing exponent, at least 0.
      beta: exponent of `1 - y`, at least 0: how fast the weight of negatives falls near a peak. 0
        weighs all negatives alike.
      where: mask of the losses.

    Returns:
      The losses, `[...]`. Their sum is usually divided by the number of peaks.

    References:
      [Law et al. 2018, CornerNet: Detecting Objects as Paired
      Keypoints](https://arxiv.org/abs/1808.01244).
      [Zhou et al. 2019, Objects as Points](https://arxiv.org/abs/1904.07850).
    """
    return _loss(**locals())
