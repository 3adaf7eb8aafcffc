"""Poly focal loss: the focal loss with a larger first coefficient of its power series."""

from typing import Any

from jax import Array
from jax.typing import ArrayLike

from focal_jax.catalogue import declare
from focal_jax.engine import elementwise_loss, exponent, number, position_loss, scalar
from focal_jax.engine.options import POSITIVE_WEIGHT
from focal_jax.losses.sigmoid import label_weight, soft_slopes, soft_terms


def _sigmoid_value(z, y, epsilon, alpha, gamma):
    t = soft_terms(z, y)
    value = scalar.power(t.q, t.log_q, gamma) * (t.n + epsilon * t.q)
    return scalar.weigh(label_weight(y, alpha), value)


def _sigmoid_slopes(z, y, epsilon, alpha, gamma):
    s, t = scalar.sigmoid_terms(z), soft_terms(z, y)
    weight, power = label_weight(y, alpha), scalar.power(t.q, t.log_q, gamma)
    by_logit, by_label, _, by_gamma = soft_slopes(z, y, None, gamma)
    by_q, term = epsilon * (gamma + 1) * power, power * t.q
    value = power * t.n + epsilon * term
    by_label = weight * (by_label - by_q * scalar.p_minus_q(z))
    return (
        weight * (by_logit + by_q * ((1 - 2 * y) * (s.p * s.q))),
        by_label if alpha is None else by_label + value * (2 * alpha - 1),
        weight * term,
        value * (2 * y - 1),
        weight * (by_gamma + epsilon * (term * t.log_q)),
    )


_sigmoid = elementwise_loss(
    _sigmoid_value,
    _sigmoid_slopes,
    epsilon=number(1.0),
    alpha=POSITIVE_WEIGHT,
    gamma=exponent(2.0),
)


def _softmax_value(terms, epsilon, gamma):
    power = scalar.power(terms.q, terms.log_q, gamma)
    return power * (terms.n + epsilon * terms.q)


def _softmax_slopes(terms, epsilon, gamma):
    power, focal = scalar.power(terms.q, terms.log_q, gamma), scalar.focal(terms, gamma)
    term = power * terms.q
    by_n = scalar.minus_dfocal_dlog_p(terms, gamma) + epsilon * (gamma + 1) * (power * terms.p)
    return by_n, term, focal * terms.log_q + epsilon * (term * terms.log_q)


_softmax = position_loss(_softmax_value, _softmax_slopes, epsilon=number(1.0), gamma=exponent(2.0))


@declare("elementwise", ("hard", "soft"), _sigmoid)
def sigmoid_poly_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    epsilon: ArrayLike = 1.0,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Compute the poly focal loss of independent binary classifications.

    With `p_t` and `alpha_t` as in `sigmoid_focal_loss`:

        loss = alpha_t * ((1 - p_t)**gamma * BCE(y, p) + epsilon * (1 - p_t)**(gamma + 1))

    The power series of the focal loss in `1 - p_t` begins with `(1 - p_t)**(gamma + 1)`; `epsilon`
    is added to the coefficient of that term.

    The other arguments are those of `sigmoid_focal_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import sigmoid_poly_focal_loss
      >>> losses = sigmoid_poly_focal_loss(jnp.array([-20.0, 0.0, 20.0]), jnp.array([0, 1, 1]))
      >>> [f"{x:.2e}" for x in losses.tolist()]
      ['1.75e-26', '2.98e-01', '1.75e-26']

    Args:
      epsilon: weight of the added term. 0 is `sigmoid_focal_loss`.

    Returns:
      The losses, `[...]`.

    References:
      [Leng et al. 2022, PolyLoss: A Polynomial Expansion Perspective of Classification Loss
      Functions](https://arxiv.org/abs/2204.12511).
    """
    return _sigmoid(**locals())


@declare("position", ("integer",), _softmax)
def softmax_poly_focal_loss_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    epsilon: ArrayLike = 1.0,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    axis: int = -1,
    label_smoothing: float = 0.0,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    return_logsumexp: bool = False,
) -> Any:
    r"""Compute the poly focal loss of a softmax and one class index per position.

    With `p_t` the softmax probability of the label's class:

        loss = alpha_t * ((1 - p_t)**gamma * (-log p_t) + epsilon * (1 - p_t)**(gamma + 1))

    With `gamma=0` it is optax's `poly_loss_cross_entropy`.

    The other arguments are those of `softmax_focal_loss_with_integer_labels`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import softmax_poly_focal_loss_with_integer_labels
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
      >>> losses = softmax_poly_focal_loss_with_integer_labels(logits, jnp.array([0, 1]))
      >>> [round(x, 4) for x in losses.tolist()]
      [0.0205, 0.7846]

    Args:
      epsilon: weight of the added term. 0 is the focal loss.

    Returns:
      The losses, of the labels' shape; or with `return_logsumexp` a pair with the log-sum-exp.

    References:
      [Leng et al. 2022, PolyLoss: A Polynomial Expansion Perspective of Classification Loss
      Functions](https://arxiv.org/abs/2204.12511).
    """
    return _softmax(**locals())
