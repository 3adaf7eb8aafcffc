"""Distribution focal loss: a real number learned as a distribution over the integers."""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs, _position, _scalar
from focal_jax._softmax_integer import integer_head


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
    last = logits.shape[axis] - 1
    mask = _inputs.mask(where, labels.shape)
    y = _inputs.Kept(_inputs.compute_dtype(logits), mask)(labels)
    left = lax.stop_gradient(jnp.clip(jnp.floor(y), 0, max(last - 1, 0)))
    # What is no number of the interval is no class: its cross entropies are NaN.
    index = jnp.where((y >= 0) & (y <= last), left, -1).astype(jnp.int32)
    cross_entropy = partial(
        integer_head,
        _position.focal,
        logits,
        alpha=None,
        axis=axis,
        ignore_label=None,
        where=mask,
        class_axis_name=None,
        gamma=_inputs.exponent("gamma", 0),
    )

    def part(weight, index):
        # A weight of 0 wins over a class that is switched off.
        loss = cross_entropy(index)
        return weight * jnp.where(weight == 0, _scalar.bounded(loss), loss)

    right = jnp.where(index < 0, index, jnp.minimum(index + 1, last))
    return part(left + 1 - y, index) + part(y - left, right)
