"""The focal loss of the paper's appendix: a cross entropy of a logit that is stretched."""

import numbers

import jax
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _checks, _scalar
from focal_jax._elementwise import elementwise
from focal_jax._scalar import Logit


def _stretched(x: Logit, y: Array, gamma: Array, beta: Array) -> Array:
    return gamma * ((2 * y - 1) * x.z) + beta


@jax.custom_jvp
def _entropy(x: Logit) -> Array:
    """Return the entropy of a binary distribution with these log-odds."""
    far = x.e / (1 + x.e)
    return _scalar.log1p(x.e) + far * _scalar.bounded(x.size)


@_entropy.defjvp
def _entropy_jvp(primals, tangents):
    t = _scalar.sigmoid_terms(*primals)
    return _entropy(*primals), -_scalar.bounded(primals[0].z) * (t.p * t.q) * tangents[0].z


def _value(x: Logit, y: Array, gamma: Array, beta: Array) -> Array:
    u = _scalar.logit(_stretched(x, y, gamma, beta), again=False)
    return _scalar.sigmoid_terms(u).n / gamma


def _slopes(x: Logit, y: Array, gamma: Array, beta: Array):
    u = _scalar.logit(_stretched(x, y, gamma, beta), again=True)
    q, inverse = _scalar.sigmoid_terms(u).q, 1 / gamma
    # With x = (u - beta) / gamma the derivative in gamma has the entropy, which is what is
    # left of the loss and the logit where these cancel.
    return (
        (1 - 2 * y) * q,
        -2 * _scalar.bounded(x.z) * q,
        -(_entropy(u) - beta * q) * inverse * inverse,
        -q * inverse,
    )


_losses = elementwise(_value, _slopes)


def sigmoid_focal_loss_star(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 2.0,
    beta: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Compute the alternate form of the focal loss, of independent binary classifications.

    With `x_t` the logit of a positive and minus that of a negative, each element's loss is

        -log sigmoid(gamma * x_t + beta) / gamma

    With `beta = 0` it is fvcore's `sigmoid_focal_loss_star` without weights, with
    `gamma = 1` as well the binary cross entropy.

    Args:
      logits: `[...]`, floating: log-odds of the positive class.
      labels: real or bool, of a shape that broadcasts to the logits': 1 or True for a
        positive, 0 for a negative. In between `x_t` is `(2 y - 1)` times the logit, as in
        fvcore. A label outside `[0, 1]` gives NaN at its position.
      gamma: how much steeper the loss is, more than 0. A number or an array that broadcasts
        to the losses.
      beta: how far it is shifted. Likewise.
      where: bool, broadcasts to the losses: positions where it is False have loss 0 and
        gradient 0, whatever the inputs hold there.

    Returns:
      The losses, `[...]` as the logits, not reduced. float32 for 16-bit logits (which are
      computed in float32), else of the logits' dtype.

    Raises:
      ValueError: for logits that are not floating, shapes that do not broadcast to the
        logits', a `where` that is not bool, or a Python `gamma` that is not above 0.

    Differentiation: reverse mode in logits, labels, gamma and beta, any number of times, and
      forward over reverse. Forward mode alone is refused by `jax.custom_vjp`;
      `focal_jax.reference.sigmoid_focal_loss_star` has it.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import sigmoid_focal_loss_star
      >>> losses = sigmoid_focal_loss_star(jnp.array([-20.0, 0.0, 20.0]), jnp.array([0, 1, 1]))
      >>> [f"{x:.2e}" for x in losses.tolist()]
      ['7.81e-19', '1.57e-01', '7.81e-19']

    References:
      Lin, Goyal, Girshick, He, Dollar. [Focal Loss for Dense Object
      Detection](https://arxiv.org/abs/1708.02002), appendix A. ICCV 2017.
    """
    if isinstance(gamma, numbers.Real):
        _checks.static_stretch("gamma", gamma)
    return _losses(logits, labels, gamma=gamma, beta=beta, where=where)
