"""The focal loss's opposite: what the model already believes in weighs more, not less."""

from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _scalar
from focal_jax._position import position
from focal_jax._scalar import Terms
from focal_jax._softmax_integer import integer_head


def _value(t: Terms, weight: Array) -> Array:
    return weight * (t.p * _scalar.bounded(t.n))


def _slopes(t: Terms, weight: Array):
    p = lax.stop_gradient(t.p)
    return weight * p, p * _scalar.bounded(t.n)


probability_weighted = position(_value, _slopes)


def softmax_probability_weighted_loss_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    axis: int = -1,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    r"""Compute the cross entropy weighted by the probability of the position's own class.

    With `p_t` the softmax probability of the position's own class, each loss is

        alpha_t * p_t * (-log p_t)

    where `p_t` as the weight is a constant to differentiation: dynamic fine-tuning, which
    leaves alone what a language model finds improbable, where supervised fine-tuning learns
    from it most. The gradient of the logits is `p_t` times that of the cross entropy.

    Args:
      logits: `[..., C, ...]`, floating, as in `softmax_focal_loss_with_integer_labels`.
      labels: of the logits' shape without the class axis, any integer dtype: class
        indices. One outside `[0, C)` that is not `ignore_label` gives a NaN loss and a
        NaN gradient at its position only.
      alpha: None, a scalar, or `[C]`, one weight per class, picked by the label.
      axis: the class axis.
      ignore_label: positions with this label have loss 0 and gradient 0, whatever their
        logits hold.
      where: bool, broadcasts to the losses: likewise where it is False.
      class_axis_name: mapped axes that the classes are spread over, as in
        `softmax_focal_loss_with_integer_labels`.

    Returns:
      The losses, of the labels' shape, not reduced. float32 for 16-bit logits (which are
      computed in float32), else of the logits' dtype.

    Raises:
      ValueError: as `softmax_focal_loss_with_integer_labels`.
      NameError: for a `class_axis_name` that is not bound here.

    Differentiation: reverse mode in logits and alpha, any number of times, and forward over
      reverse. Forward mode alone is refused by `jax.custom_vjp`;
      `focal_jax.reference.softmax_probability_weighted_loss_with_integer_labels` has it.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import softmax_probability_weighted_loss_with_integer_labels
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-9.0, 0.0, 0.0]])
      >>> labels = jnp.array([0, 1, 0])
      >>> losses = softmax_probability_weighted_loss_with_integer_labels(logits, labels)
      >>> [round(x, 4) for x in losses.tolist()]
      [0.1887, 0.3662, 0.0006]

    References:
      Wu, Zhou, Ziheng, Peng, Ye, Hu, Zhu, Qi, Yang, Yang. [On the Generalization of SFT: A
      Reinforcement Learning Perspective with Reward
      Rectification](https://arxiv.org/abs/2508.05629). 2025.
    """
    return integer_head(
        probability_weighted,
        logits,
        labels,
        alpha=alpha,
        axis=axis,
        ignore_label=ignore_label,
        where=where,
        class_axis_name=class_axis_name,
    )
