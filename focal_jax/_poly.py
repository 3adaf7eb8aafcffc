"""Poly focal loss: the focal loss with more of the first term of its power series."""

from jax import Array
from jax.typing import ArrayLike

from focal_jax import _inputs, _scalar, _sigmoid
from focal_jax._elementwise import elementwise
from focal_jax._position import position
from focal_jax._scalar import Logit, Terms
from focal_jax._softmax_integer import integer_head


def _sigmoid_value(
    x: Logit, y: Array, epsilon: Array, alpha: Array | None, gamma: _inputs.Exponent
) -> Array:
    t, weight = _sigmoid.soft_terms(x, y), _sigmoid.label_weight(y, alpha)
    # q**gamma is common to both terms.
    return _scalar.loss(weight, t.q, t.log_q, t.n + epsilon * t.q, gamma.value)


def _sigmoid_slopes(
    x: Logit, y: Array, epsilon: Array, alpha: Array | None, gamma: _inputs.Exponent
):
    s, t, g = _scalar.sigmoid_terms(x), _sigmoid.soft_terms(x, y), gamma.value
    weight, power = _sigmoid.label_weight(y, alpha), _scalar.power(t.q, t.log_q, g)
    dz, dy, _, _ = _sigmoid.slopes(x, y, None, gamma)
    by_q, term = epsilon * (g + 1) * power, power * t.q
    unweighted = power * _scalar.bounded(t.n) + epsilon * term
    dy = weight * (dy - by_q * _scalar.p_minus_q(x))
    return (
        weight * (dz + by_q * ((1 - 2 * y) * (s.p * s.q))),
        dy if alpha is None else dy + unweighted * (2 * alpha - 1),
        weight * term,
        unweighted * (2 * y - 1),
        weight * (unweighted * t.log_q),
    )


_sigmoid_losses = elementwise(_sigmoid_value, _sigmoid_slopes)


def _softmax_value(t: Terms, weight: Array, epsilon: Array, gamma: _inputs.Exponent) -> Array:
    return _scalar.loss(weight, t.q, t.log_q, t.n + epsilon * t.q, gamma.value)


def _softmax_slopes(t: Terms, weight: Array, epsilon: Array, gamma: _inputs.Exponent):
    g, power = gamma.value, _scalar.power(t.q, t.log_q, gamma.value)
    term = power * t.q
    unweighted = _scalar.unweighted(t, g) + epsilon * term
    minus_dlogp = _scalar.minus_dloss_dlogp(t, g) + epsilon * (g + 1) * (power * t.p)
    return weight * minus_dlogp, unweighted, weight * term, weight * (unweighted * t.log_q)


poly = position(_softmax_value, _softmax_slopes)


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

    With `p = sigmoid(logits)`, `p_t = y p + (1 - y)(1 - p)` and
    `alpha_t = alpha y + (1 - alpha)(1 - y)`, each element's loss is

        alpha_t * ((1 - p_t)**gamma * BCE(y, p) + epsilon * (1 - p_t)**(gamma + 1))

    where BCE is the binary cross entropy, `-y log p - (1 - y) log(1 - p)`: the focal loss,
    whose power series in `1 - p_t` begins with `(1 - p_t)**(gamma + 1)`, and `epsilon` times
    that once more.

    Args:
      logits: `[...]`, floating: log-odds of the positive class.
      labels: real or bool, of a shape that broadcasts to the logits': 1 or True for a
        positive, 0 for a negative, or a probability in between. A label outside `[0, 1]`
        gives NaN at its position.
      epsilon: weight of the added term; 0 is `sigmoid_focal_loss`. A number or an array that
        broadcasts to the losses.
      alpha: weight of the positives, negatives weigh `1 - alpha`; None weighs both 1.
        Likewise.
      gamma: focusing exponent, 0 or more. A Python number or an array that broadcasts to the
        losses.
      where: bool, broadcasts to the losses: positions where it is False have loss 0 and
        gradient 0, whatever the inputs hold there.

    Returns:
      The losses, `[...]` as the logits, not reduced. float32 for 16-bit logits (which are
      computed in float32), else of the logits' dtype.

    Raises:
      ValueError: for logits that are not floating, shapes that do not broadcast to the
        logits', a `where` that is not bool, or a negative Python `gamma`.

    Differentiation: reverse mode in logits, labels, epsilon, alpha and gamma, any number of
      times, and forward over reverse. Forward mode alone is refused by `jax.custom_vjp`;
      `focal_jax.reference.sigmoid_poly_focal_loss` has it.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import sigmoid_poly_focal_loss
      >>> losses = sigmoid_poly_focal_loss(jnp.array([-20.0, 0.0, 20.0]), jnp.array([0, 1, 1]))
      >>> [f"{x:.2e}" for x in losses.tolist()]
      ['1.75e-26', '2.98e-01', '1.75e-26']

    References:
      Leng, Tan, Liu, Cubuk, Shi, Cheng, Anguelov. [PolyLoss: A Polynomial Expansion
      Perspective of Classification Loss Functions](https://arxiv.org/abs/2204.12511). ICLR
      2022.
    """
    return _sigmoid_losses(
        logits,
        labels,
        epsilon=epsilon,
        alpha=alpha,
        gamma=_inputs.exponent("gamma", gamma),
        where=where,
    )


def softmax_poly_focal_loss_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    epsilon: ArrayLike = 1.0,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    axis: int = -1,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    r"""Compute the poly focal loss of a softmax against one class index per position.

    With `p_t` the softmax probability of the position's own class, each loss is

        alpha_t * ((1 - p_t)**gamma * (-log p_t) + epsilon * (1 - p_t)**(gamma + 1))

    With `gamma = 0` it is optax's `poly_loss_cross_entropy` with its `epsilon`.

    Args:
      logits: `[..., C, ...]`, floating, as in `softmax_focal_loss_with_integer_labels`.
      labels: of the logits' shape without the class axis, any integer dtype: class
        indices. One outside `[0, C)` that is not `ignore_label` gives a NaN loss and a
        NaN gradient at its position only.
      epsilon: weight of the added term; 0 is the focal loss. A number or an array that
        broadcasts to the losses.
      alpha: None, a scalar, or `[C]`, one weight per class, picked by the label.
      gamma: focusing exponent, 0 or more. A Python number or an array that broadcasts to
        the losses.
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
      ValueError: as `softmax_focal_loss_with_integer_labels`, and for an `epsilon` that does
        not broadcast to the losses.
      NameError: for a `class_axis_name` that is not bound here.

    Differentiation: reverse mode in logits, epsilon, alpha and gamma, any number of times,
      and forward over reverse. Forward mode alone is refused by `jax.custom_vjp`;
      `focal_jax.reference.softmax_poly_focal_loss_with_integer_labels` has it.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import softmax_poly_focal_loss_with_integer_labels
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
      >>> losses = softmax_poly_focal_loss_with_integer_labels(logits, jnp.array([0, 1]))
      >>> [round(x, 4) for x in losses.tolist()]
      [0.0206, 0.7846]

    References:
      Leng, Tan, Liu, Cubuk, Shi, Cheng, Anguelov. [PolyLoss: A Polynomial Expansion
      Perspective of Classification Loss Functions](https://arxiv.org/abs/2204.12511). ICLR
      2022.
    """
    return integer_head(
        poly,
        logits,
        labels,
        alpha=alpha,
        axis=axis,
        ignore_label=ignore_label,
        where=where,
        class_axis_name=class_axis_name,
        epsilon=epsilon,
        gamma=_inputs.exponent("gamma", gamma),
    )
