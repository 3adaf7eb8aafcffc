"""Distribution focal loss: a real number learned as a distribution over the integers."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs, _position, _scalar
from focal_jax._class_sums import sums_between


@partial(jax.jit, static_argnums=0)
def _losses(axis: int, logits: Array, labels: Array, where: Array | None) -> Array:
    """Return the losses, with a class axis of one as the labels."""
    last, dtype = logits.shape[axis] - 1, _inputs.compute_dtype(logits)
    y = _inputs.Kept(dtype, where)(labels)
    left = lax.stop_gradient(jnp.clip(jnp.floor(y), 0, max(last - 1, 0)))
    # What is no number of the interval is no class: its cross entropies are NaN.
    impossible = ~((y >= 0) & (y <= last))
    index = jnp.where(impossible, -1, left).astype(jnp.int32)
    places = index, jnp.where(impossible, -1, jnp.minimum(index + 1, last))
    sums = sums_between(axis, logits, places, where)

    def part(weight, i):
        # The class on the other side is one of the others, but for a row of one class.
        alone = impossible | (places[0] == places[1])
        other = jnp.exp(jnp.where(alone, -jnp.inf, sums.true[1 - i] - sums.top))
        true, options = sums.true[i] - sums.top, (jnp.ones_like(y), _inputs.Exponent(0))
        loss = _position.focal(true, sums.rest + other, options, where, impossible)
        # A weight of 0 wins over a class that is switched off.
        return weight * jnp.where(weight == 0, _scalar.bounded(loss), loss)

    return part(left + 1 - y, 0) + part(y - left, 1)


def distribution_focal_loss(
    logits: ArrayLike, labels: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    r"""Compute the distribution focal loss of real numbers, each between two of the classes.

    With CE(c) the cross entropy of the softmax against the class `c`, and `c` the whole part
    of the label `y`, each position's loss is

        (c + 1 - y) * CE(c) + (y - c) * CE(c + 1)

    It is least where the softmax has no more than these two classes, and the mean `y`: a
    distance is learned as a distribution over `0, 1, ..., n - 1`, of which it is the mean.

    Args:
      logits: `[..., n, ...]`, floating: unnormalized log-probabilities of the whole numbers.
      labels: of the logits' shape without the class axis, real: numbers in `[0, n - 1]`. One
        outside gives a NaN loss and NaN gradients at its position only.
      axis: the class axis.
      where: bool, broadcasts to the losses: positions where it is False have loss 0 and
        gradient 0, whatever the inputs hold there.

    Returns:
      The losses, of the labels' shape, not reduced. float32 for 16-bit logits (which are
      computed in float32), else of the logits' dtype.

    Raises:
      ValueError: for logits that are not floating, labels that are not real or have another
        shape, an axis out of range, or a `where` that is not bool or does not broadcast to
        the losses.

    Differentiation: reverse mode in logits and labels, any number of times, and forward over
      reverse. At a whole number the derivative in the label is that to its right, at `n - 1`
      that to its left. Forward mode alone is refused by `jax.custom_vjp`;
      `focal_jax.reference.distribution_focal_loss` has it.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import distribution_focal_loss
      >>> logits = jnp.array([[0.0, 4.0, 4.0, 0.0], [0.0, 4.0, 4.0, 0.0]])
      >>> losses = distribution_focal_loss(logits, jnp.array([1.5, 3.0]))
      >>> [round(x, 4) for x in losses.tolist()]
      [0.7113, 4.7113]

    References:
      Li, Wang, Wu, Chen, Hu, Li, Tang, Yang. [Generalized Focal Loss: Learning Qualified and
      Distributed Bounding Boxes for Dense Object
      Detection](https://arxiv.org/abs/2006.04388). NeurIPS 2020.
    """
    logits = _inputs.floating("logits", logits)
    axis = _checks.axis(axis, logits.ndim)
    labels = _checks.array("labels", labels)
    _checks.real("labels", labels)
    _checks.index_shape(labels, logits.shape, axis)
    mask = _inputs.aligned_mask(where, labels.shape, axis)
    return jnp.squeeze(_losses(axis, logits, jnp.expand_dims(labels, axis), mask), axis)
