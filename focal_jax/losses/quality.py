"""Quality focal loss: a sigmoid that predicts a score between 0 and 1."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax.catalogue import declare
from focal_jax.engine import elementwise_loss, exponent, scalar


def _difference(t: scalar.Terms, y: Array) -> tuple[Array, Array]:
    """Return `s - y` and `log|s - y|`, without cancellation near |s - y| = 1."""
    difference = (1 - y) * t.p - y * t.q
    one_minus_abs = jnp.where(difference >= 0, t.q + y, (1 - y) + t.p)
    return difference, scalar.log_abs(difference, one_minus_abs)


def _value(z, y, beta):
    weight = scalar.abs_power(*_difference(scalar.sigmoid_terms(z), y), beta)
    return weight * scalar.cross_entropy(z, y)


def _slopes(z, y, beta):
    t, n = scalar.sigmoid_terms(z), scalar.cross_entropy(z, y)
    difference, log_abs = _difference(t, y)
    weight = scalar.abs_power(difference, log_abs, beta)
    by_difference = beta * scalar.signed_abs_power(difference, log_abs, beta - 1) * n
    by_logit = by_difference * (t.p * t.q) + weight * difference
    by_beta = scalar.abs_power(difference, log_abs, beta, logs=1) * n
    return by_logit, -by_difference - weight * z, by_beta


_loss = elementwise_loss(_value, _slopes, beta=exponent(2.0))


@declare("elementwise", ("hard", "soft"), _loss)
def quality_focal_loss(
    logits: ArrayLike, labels: ArrayLike, *, beta: ArrayLike = 2.0, where: ArrayLike | None = None
) -> Array:
    r"""Compute the quality focal loss of independent scores between 0 and 1.

    With `s = sigmoid(logits)` and the label `y`, the quality that the score predicts (such as the
    IoU of a box; 0 for a negative):

        loss = abs(y - s)**beta * BCE(y, s)

    The loss is 0 at `s = y` only. The weight is differentiated, as in mmdetection. For labels 0 and
    1 it is `sigmoid_focal_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import quality_focal_loss
      >>> losses = quality_focal_loss(jnp.array([-2.0, 0.0, 2.0]), jnp.array([0.0, 0.8, 0.8]))
      >>> [f"{x:.2e}" for x in losses.tolist()]
      ['1.80e-03', '6.24e-02', '3.44e-03']

    Args:
      logits: `[...]`: log-odds.
      labels: the qualities in [0, 1]; broadcast to the logits.
      beta: exponent of the weight, at least 0. 0 is the cross entropy. For `beta < 1` the weight
        has a cusp at `s = y`; the derivative there is 0.
      where: mask of the losses.

    Returns:
      The losses, `[...]`.

    References:
      [Li et al. 2020, Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes for
      Dense Object Detection](https://arxiv.org/abs/2006.04388).
    """
    return _loss(**locals())
