"""The alternate focal loss of the paper's appendix: a cross entropy of a scaled, shifted logit."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax.catalogue import declare
from focal_jax.engine import elementwise_loss, number, scalar


def _margin(z: Array, y: Array, gamma: Array, beta: Array) -> Array:
    return gamma * ((2 * y - 1) * z) + beta


@jax.custom_jvp
def _entropy(u: Array) -> Array:
    """Return the entropy of a binary distribution with the log-odds `u`."""
    e = jnp.exp(-jnp.abs(u))
    return scalar.log1p(e) + e / (1 + e) * scalar.clip_inf(jnp.abs(u))


@_entropy.defjvp
def _entropy_jvp(primals, tangents):
    t = scalar.sigmoid_terms(*primals)
    return _entropy(*primals), -scalar.clip_inf(primals[0]) * (t.p * t.q) * tangents[0]


def _value(z, y, gamma, beta):
    return scalar.divide(scalar.sigmoid_terms(_margin(z, y, gamma, beta)).n, gamma)


def _slopes(z, y, gamma, beta):
    u = _margin(z, y, gamma, beta)
    q, inverse = scalar.sigmoid_terms(u).q, scalar.divide(jnp.ones_like(gamma), gamma)
    # The derivative in gamma is -(n + q * (u - beta)) / gamma**2. The sum n + q * u cancels; it is
    # the entropy, which is computed without cancellation.
    by_gamma = -(_entropy(u) - beta * q) * inverse * inverse
    return (1 - 2 * y) * q, -2 * z * q, by_gamma, -q * inverse


_loss = elementwise_loss(
    _value, _slopes, gamma=number(2.0, low=0.0, above_low=True), beta=number(1.0)
)


@declare("elementwise", ("hard",), _loss)
def sigmoid_focal_loss_star(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 2.0,
    beta: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Compute the alternate form of the focal loss (FL*) of the paper's appendix.

    With `x_t` the logit of a positive, and minus the logit of a negative:

        loss = -log sigmoid(gamma * x_t + beta) / gamma

    With `beta=0` it is fvcore's `sigmoid_focal_loss_star` without weights. With `gamma=1` and
    `beta=0` it is the binary cross entropy.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import sigmoid_focal_loss_star
      >>> losses = sigmoid_focal_loss_star(jnp.array([-20.0, 0.0, 20.0]), jnp.array([0, 1, 1]))
      >>> [f"{x:.2e}" for x in losses.tolist()]
      ['7.81e-19', '1.57e-01', '7.81e-19']

    Args:
      logits: `[...]`: log-odds of the positive class.
      labels: 1 or True for a positive, 0 for a negative; broadcast to the logits. For a label `y`
        between, `x_t` is `(2 y - 1)` times the logit, as in fvcore.
      gamma: scale of the logit, above 0. The paper uses 2 to 4.
      beta: shift of the scaled logit.
      where: mask of the losses.

    Returns:
      The losses, `[...]`.

    References:
      [Lin et al. 2017, Focal Loss for Dense Object Detection](https://arxiv.org/abs/1708.02002),
      appendix A.
    """
    return _loss(**locals())
