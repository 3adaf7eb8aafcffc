"""Distribution focal loss: a real number is learned as a distribution over integers."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax.catalogue import declare
from focal_jax.engine import arguments, position_loss
from focal_jax.engine.class_sums import class_sums
from focal_jax.engine.sharding import place_like

_cross_entropy = position_loss(lambda terms: terms.n, lambda terms: (jnp.ones_like(terms.n),))


@partial(jax.jit, static_argnums=0)
def _losses(axis: int, logits: Array, labels: Array, where: Array | None) -> Array:
    """Return the losses. Labels, mask and losses have a class axis of size 1."""
    last, dtype = logits.shape[axis] - 1, arguments.compute_dtype(logits)
    y = arguments.cast_and_mask(labels, dtype, where)
    y, invalid = arguments.clip_labels(labels, y, last)
    left = jnp.minimum(jnp.floor(y), jnp.asarray(last - 1, dtype))  # `last` may be symbolic
    left = lax.stop_gradient(jnp.maximum(left, 0))
    index = jnp.where(invalid, -1, left).astype(jnp.int32)
    neighbors = index, jnp.where(invalid, -1, jnp.minimum(index + 1, last))
    sums = class_sums(axis, logits, neighbors, where)

    def summand(weight, i):
        # The rest excludes both classes, so the exponential of the other one is added.
        no_other = invalid | (neighbors[0] == neighbors[1])
        other = jnp.where(no_other, -jnp.inf, sums.label_logit[1 - i] - sums.max_logit)
        label_logit, rest = sums.label_logit[i] - sums.max_logit, sums.rest + jnp.exp(other)
        return _cross_entropy.of_sums(label_logit, rest, weight, {}, where, invalid)

    return summand(left + 1 - y, 0) + summand(y - left, 1)


@declare("interval", ("real",), {})
def distribution_focal_loss(
    logits: ArrayLike, labels: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    r"""Compute the distribution focal loss of real numbers between two class indices.

    With `CE(c)` the cross entropy of the softmax and class `c`, and `c = floor(y)` for a label `y`:

        loss = (c + 1 - y) * CE(c) + (y - c) * CE(c + 1)

    The loss is smallest if only these two classes have a positive probability and the mean is `y`.
    A distance is predicted as the mean of a distribution over `0, 1, ..., n - 1`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import distribution_focal_loss
      >>> logits = jnp.array([[0.0, 4.0, 4.0, 0.0], [0.0, 4.0, 4.0, 0.0]])
      >>> losses = distribution_focal_loss(logits, jnp.array([1.5, 3.0]))
      >>> [round(x, 4) for x in losses.tolist()]
      [0.7113, 4.7113]

    Args:
      logits: `[..., n, ...]`: unnormalized log-probabilities of the integers.
      labels: real numbers in [0, n - 1], of the logits' shape without the class axis. At an
        integer the derivative in the label is the one from the right; at `n - 1`, from the left.
      axis: the class axis.
      where: mask of the losses.

    Returns:
      The losses, of the labels' shape.

    References:
      [Li et al. 2020, Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes for
      Dense Object Detection](https://arxiv.org/abs/2006.04388).
    """
    logits = arguments.floating_array("logits", logits)
    axis = arguments.static_axis(axis, logits.ndim)
    labels = arguments.real_array("labels", labels)
    arguments.check_label_shape(labels, logits.shape, axis)
    arguments.warn_of_one_class(logits.shape[axis])
    mask = arguments.mask_array(where, labels.shape, axis)
    with jax.debug_nans(False):  # the mask is applied in `_losses`
        labels, mask = place_like(logits, (jnp.expand_dims(labels, axis), mask))
    return jnp.squeeze(_losses(axis, logits, labels, mask), axis)
