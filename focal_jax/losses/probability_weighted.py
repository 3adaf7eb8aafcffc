"""Probability-weighted cross entropy: confident predictions weigh more, not less."""

from typing import Any

from jax import lax
from jax.typing import ArrayLike

from focal_jax.catalogue import declare
from focal_jax.engine import position_loss, scalar


def _value(terms):
    return lax.stop_gradient(terms.p) * scalar.clip_inf(terms.n)


def _slopes(terms):
    return (lax.stop_gradient(terms.p),)


_loss = position_loss(_value, _slopes)


@declare("position", ("integer",), _loss, stop_gradient_weight=True)
def softmax_probability_weighted_loss_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    axis: int = -1,
    label_smoothing: float = 0.0,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    return_logsumexp: bool = False,
) -> Any:
    r"""Compute the cross entropy weighted by the probability of the label's class.

    With `p_t` the softmax probability of the label's class:

        loss = alpha_t * p_t * (-log p_t)

    The weight `p_t` is constant under differentiation, so the gradient of the logits is `p_t` times
    that of the cross entropy. For language models this is dynamic fine-tuning: improbable
    tokens have small gradients, while in supervised fine-tuning their gradients are the largest.

    The arguments are those of `softmax_focal_loss_with_integer_labels`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import softmax_probability_weighted_loss_with_integer_labels
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-9.0, 0.0, 0.0]])
      >>> labels = jnp.array([0, 1, 0])
      >>> losses = softmax_probability_weighted_loss_with_integer_labels(logits, labels)
      >>> [round(x, 4) for x in losses.tolist()]
      [0.1885, 0.3662, 0.0006]

    Returns:
      The losses, of the labels' shape; or with `return_logsumexp` a pair with the log-sum-exp.

    References:
      [Wu et al. 2025, On the Generalization of SFT: A Reinforcement Learning Perspective with
      Reward Rectification](https://arxiv.org/abs/2508.05629).
    """
    return _loss(**locals())
