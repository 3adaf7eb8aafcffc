"""Losses of many labels per position, whose logits `features @ kernel` are never stored."""

from typing import Any

from jax import Array
from jax.typing import ArrayLike

from focal_jax.engine.options import check_call
from focal_jax.losses.asymmetric import asymmetric_loss
from focal_jax.losses.sigmoid import hard_loss

_ASYMMETRIC: Any = asymmetric_loss.declaration.engine_loss  # pyright: ignore[reportFunctionMemberAccess]


@check_call
def linear_sigmoid_focal_loss(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    mesh: Any = None,
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
) -> Array:
    r"""Compute the sigmoid focal loss of many labels without storing the logits.

    With `logits = features @ kernel + bias`, and `y_c = 1` for the classes in `labels`, else 0:

        loss = sum over c of sigmoid_focal_loss(logits_c, y_c)

    Taggers, recommenders and extreme multi-label classifiers have many classes, of which a few are
    positive. The logits are computed for one chunk of classes at a time, once for the loss and
    again for the gradient. The arguments that are not listed are those of
    `linear_softmax_focal_loss_with_integer_labels`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import linear_sigmoid_focal_loss
      >>> features = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> kernel = jnp.array([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]])
      >>> labels = jnp.array([[0, -1], [1, 2]])
      >>> [round(x, 4) for x in linear_sigmoid_focal_loss(features, kernel, labels).tolist()]
      [0.1769, 0.3692]

    Args:
      labels: `[..., L]`, integer: the indices of the positive classes, padded with -1. A class that
        is given twice counts once. Any other index outside `[0, C)` makes its position NaN.
      alpha: weight of the positives in [0, 1], a number or `[...]`; negatives weigh `1 - alpha`.
      gamma: focusing exponent, at least 0, a number or `[...]`.
      where: mask of the positions.

    Returns:
      The sums of the losses over the classes, `[...]`.

    References:
      [Lin et al. 2017, Focal Loss for Dense Object Detection](https://arxiv.org/abs/1708.02002).
    """
    return hard_loss.linear(**locals())


@check_call
def linear_asymmetric_loss(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    gamma_positive: ArrayLike = 0.0,
    gamma_negative: ArrayLike = 4.0,
    margin: ArrayLike = 0.05,
    stop_weight_gradient: bool = False,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    mesh: Any = None,
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
) -> Array:
    r"""Compute the asymmetric loss of many labels without storing the logits.

    With `logits = features @ kernel + bias`, and `y_c = 1` for the classes in `labels`, else 0:

        loss = sum over c of asymmetric_loss(logits_c, y_c)

    The other arguments are those of `linear_softmax_focal_loss_with_integer_labels`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import linear_asymmetric_loss
      >>> kernel = jnp.array([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]])
      >>> losses = linear_asymmetric_loss(jnp.array([[1.0, 0.0]]), kernel, jnp.array([[0]]))
      >>> [round(x, 4) for x in losses.tolist()]
      [0.1514]

    Args:
      labels: `[..., L]`, integer: the indices of the positive classes, padded with -1.
      gamma_positive: focusing exponent of the positives, at least 0; see `asymmetric_loss`.
      gamma_negative: focusing exponent of the negatives, at least 0.
      margin: number in [0, 1) that the score of a negative is reduced by.
      stop_weight_gradient: whether the weights are constant under differentiation.

    Returns:
      The sums of the losses over the classes, `[...]`.

    References:
      [Ridnik et al. 2021, Asymmetric Loss For Multi-Label
      Classification](https://arxiv.org/abs/2009.14119).
    """
    return _ASYMMETRIC.linear(**locals())
