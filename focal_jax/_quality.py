"""Quality focal loss: a sigmoid that learns a score between 0 and 1."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _inputs, _scalar
from focal_jax._elementwise import elementwise
from focal_jax._scalar import Logit, Terms


def _excess(t: Terms, y: Array) -> tuple[Array, Array]:
    """Return `s - y` and the logarithm of its size."""
    excess = (1 - y) * t.p - y * t.q
    rest = jnp.where(excess >= 0, t.q + y, (1 - y) + t.p)
    return excess, _scalar.log_size(excess, rest)


def _value(x: Logit, y: Array, beta: _inputs.Exponent) -> Array:
    excess, log_size = _excess(_scalar.sigmoid_terms(x), y)
    weight = _scalar.power_of_size(excess, log_size, beta)
    return weight * _scalar.cross_entropy(x, y, 1 - y)


def _slopes(x: Logit, y: Array, beta: _inputs.Exponent):
    t = _scalar.sigmoid_terms(x)
    excess, log_size = _excess(t, y)
    n, z = (_scalar.bounded(v) for v in (_scalar.cross_entropy(x, y, 1 - y), x.z))
    weight = _scalar.power_of_size(excess, log_size, beta)
    one_less = _inputs.Exponent(beta.value - 1)
    by_excess = beta.value * _scalar.signed_power(excess, log_size, one_less) * n
    # At beta = 0 the weight is 1 at every excess, 0 too, where its logarithm is none.
    by_beta = weight * n * jnp.where(excess == 0, 0, log_size)
    return by_excess * (t.p * t.q) + weight * excess, -by_excess - weight * z, by_beta


_losses = elementwise(_value, _slopes)


def quality_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    beta: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Compute the quality focal loss of independent scores between 0 and 1.

    With `s = sigmoid(logits)` and the label `y`, the quality that the score is to predict
    (such as the IoU of a box; 0 for a negative), each element's loss is

        abs(y - s)**beta * BCE(y, s)

    where BCE is the binary cross entropy, `-y log s - (1 - y) log(1 - s)`. It is 0 only at
    `s = y`. The weight is differentiated, as in mmdetection. For labels of 0 and 1 it is
    `sigmoid_focal_loss`.

    Args:
      logits: `[...]`, floating: log-odds.
      labels: real or bool, of a shape that broadcasts to the logits': the qualities. One
        outside `[0, 1]` gives NaN at its position.
      beta: exponent of the weight, 0 or more; 0 is the cross entropy. A Python number or an
        array that broadcasts to the losses.
      where: bool, broadcasts to the losses: positions where it is False have loss 0 and
        gradient 0, whatever the inputs hold there.

    Returns:
      The losses, `[...]` as the logits, not reduced. float32 for 16-bit logits (which
      are computed in float32), else of the logits' dtype.

    Raises:
      ValueError: for logits that are not floating, shapes that do not broadcast to the
        logits', a `where` that is not bool, or a negative Python `beta`.

    Differentiation: reverse mode in logits, labels and beta, any number of times, and
      forward over reverse. For `beta < 1` the weight has a cusp at `s = y`; the derivative
      there is 0. Forward mode alone is refused by `jax.custom_vjp`;
      `focal_jax.reference.quality_focal_loss` has it.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import quality_focal_loss
      >>> losses = quality_focal_loss(jnp.array([-2.0, 0.0, 2.0]), jnp.array([0.0, 0.8, 0.8]))
      >>> [f"{x:.2e}" for x in losses.tolist()]
      ['1.80e-03', '6.24e-02', '3.44e-03']

    References:
      Li, Wang, Wu, Chen, Hu, Li, Tang, Yang. [Generalized Focal Loss: Learning Qualified and
      Distributed Bounding Boxes for Dense Object
      Detection](https://arxiv.org/abs/2006.04388). NeurIPS 2020.
    """
    return _losses(logits, labels, beta=_inputs.exponent("beta", beta), where=where)
