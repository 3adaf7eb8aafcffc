"""Softmax focal loss of a few weighted classes per position, in place of a dense distribution."""

from typing import Any

from jax import Array
from jax.typing import ArrayLike

from focal_jax.engine import sparse
from focal_jax.engine.options import check_call
from focal_jax.losses.softmax import softmax_focal_loss

_LOSS: Any = softmax_focal_loss.declaration.engine_loss  # pyright: ignore[reportFunctionMemberAccess]


@check_call
def softmax_focal_loss_with_sparse_labels(
    logits: ArrayLike,
    indices: ArrayLike,
    weights: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    axis: int = -1,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    r"""Compute the focal loss of a softmax and a few weighted classes per position.

    With `p = softmax(logits)` along the class axis and K pairs of a class `c_k` and a weight `w_k`:

        loss = sum over k of alpha_c_k w_k * (1 - p_c_k)**gamma * (-log p_c_k)

    This is `softmax_focal_loss` of the distribution that has these weights, without an array of the
    distribution. Distillation from the K most probable classes of a teacher is `gamma=0`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import softmax_focal_loss_with_sparse_labels
      >>> logits = jnp.array([[2.0, 0.0, -jnp.inf]])
      >>> indices, weights = jnp.array([[0, 1, -1]]), jnp.array([[0.9, 0.1, 0.0]])
      >>> losses = softmax_focal_loss_with_sparse_labels(logits, indices, weights)
      >>> [round(x, 4) for x in losses.tolist()]
      [0.1666]

    Args:
      logits: `[..., C, ...]`: unnormalized log-probabilities.
      indices: `[..., K]`, integer: class indices of each position, on the last axis, padded with
        -1. Equal indices add up. Any other index outside `[0, C)` makes its position NaN.
      weights: of the shape of `indices`, at least 0; a negative weight makes its position NaN.
      alpha: class weights: None, a scalar or `[C]`.
      gamma: focusing exponent, at least 0.
      axis: the class axis of the logits.
      where: mask of the losses.
      class_axis_name: as in `softmax_focal_loss_with_integer_labels`.

    Returns:
      The losses, of the logits' shape without the class axis.
    """
    return sparse.of_array(_LOSS, **locals())


@check_call
def linear_softmax_focal_loss_with_sparse_labels(
    features: ArrayLike,
    kernel: ArrayLike,
    indices: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    logit_softcap: float | None = None,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    mesh: Any = None,
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
) -> Array:
    r"""Compute the focal loss of a few weighted classes without storing the logits.

    The loss is that of `softmax_focal_loss_with_sparse_labels` for `features @ kernel + bias`. The
    other arguments are those of `linear_softmax_focal_loss_with_integer_labels`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import linear_softmax_focal_loss_with_sparse_labels
      >>> features, kernel = jnp.array([[1.0, 0.0]]), jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> pairs = jnp.array([[0, 1]]), jnp.array([[0.9, 0.1]])
      >>> losses = linear_softmax_focal_loss_with_sparse_labels(features, kernel, *pairs)
      >>> [round(x, 4) for x in losses.tolist()]
      [0.1666]

    Args:
      indices: `[..., K]`, integer: class indices, padded with -1.
      weights: of the shape of `indices`, at least 0.

    Returns:
      The losses, `[...]`.
    """
    return sparse.of_linear(_LOSS, **locals())
