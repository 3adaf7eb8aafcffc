"""Dual focal loss: the weight depends on the label's class and on the next less probable class."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax.catalogue import declare
from focal_jax.engine import exponent, scalar
from focal_jax.engine.class_axis import ClassSums
from focal_jax.engine.position import PositionLoss
from focal_jax.engine.scalar import Terms
from focal_jax.engine.sharding import AxisName


def _gap(
    axis: int,
    class_axis_name: AxisName | None,
    logits: Array,
    sums: ClassSums,
    where: Array | None,
) -> Array:
    """Return `log(p_j / p_t)`, the largest logit below that of the label's class minus the latter.

    It is a large negative number if no logit is below.
    """
    from focal_jax.engine.next_class import largest_below  # most programs do not use it

    below = largest_below(axis, logits, sums.label_logit, where, class_axis_name)
    return jnp.where(below == -jnp.inf, -scalar.max_finite(below), below - sums.label_logit)


def _shifted(t: Terms, gap: Array) -> tuple[Terms, Array]:
    """Return the terms with `p_t - p_j` for p and `1 - p_t + p_j` for q, and `p_j`.

    Minus the derivative of the returned q in `log p_t` is the returned p, for a constant gap.
    """
    next_p = t.p * jnp.exp(gap)
    p, q = -t.p * jnp.expm1(gap), t.q + next_p
    n_over_q = t.n_over_q * scalar.divide(t.q, q)
    return Terms(p, q, t.n, scalar.log_abs(q, p), n_over_q), next_p


def _value(terms, gamma, gap):
    return scalar.focal(_shifted(terms, gap)[0], gamma)


def _slopes(terms, gamma, gap):
    t, next_p = _shifted(terms, gap)
    focal = scalar.focal(t, gamma)
    by_gap = gamma * focal * scalar.divide(next_p, t.q)
    return scalar.minus_dfocal_dlog_p(t, gamma), focal * t.log_q, by_gap


_loss = PositionLoss(_value, _slopes, {"gamma": exponent(5.0)}, row_option=("gap", _gap))


@declare("position", ("integer",), _loss)
def dual_focal_loss_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 5.0,
    axis: int = -1,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    return_logsumexp: bool = False,
) -> Any:
    r"""Compute the dual focal loss of a softmax and one class index per position.

    With `p_t` the softmax probability of the label's class and `p_j` the largest probability below
    `p_t` (0 if there is none):

        loss = alpha_t * (1 - p_t + p_j)**gamma * (-log p_t)

    The loss improves calibration: its weight decreases with `p_t - p_j`, not with
    `p_t` alone. `p_j` is differentiated. If several classes have the probability `p_j`, the first
    gets the derivative.

    The other arguments are those of `softmax_focal_loss_with_integer_labels`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import dual_focal_loss_with_integer_labels
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.5]])
      >>> losses = dual_focal_loss_with_integer_labels(logits, jnp.array([0, 0]), gamma=2.0)
      >>> [round(x, 4) for x in losses.tolist()]
      [0.0245, 1.1125]

    Args:
      gamma: focusing exponent, at least 0.

    Returns:
      The losses, of the labels' shape; or with `return_logsumexp` a pair with the log-sum-exp.

    References:
      [Tao et al. 2023, Dual Focal Loss for Calibration](https://arxiv.org/abs/2305.13665).
    """
    return _loss(**locals())
