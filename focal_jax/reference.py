"""The same losses as plain textbook formulas, differentiated by JAX.

They support forward mode, and `focal_jax.compare_gradients` measures the hand-derived gradients
against autodiff of these formulas. The formulas and the engine share only the declared options and
the argument checks, so the same bug is unlikely in both. The formulas are not numerically stable:
`1 - p` cancels for a confident prediction, and the derivative of `(1 - p)**gamma` has a pole for
gamma < 1. Autodiff stores intermediates for the backward pass.

A formula takes its functions from `ops`, so that the tests can evaluate it to 60 digits.
`reduce_loss` is `focal_jax.reduce_loss`, which has no hand-derived gradient.
"""

import math
from collections.abc import Callable
from typing import Any

from focal_jax import catalogue
from focal_jax.plain import Operations as Operations, from_formula
from focal_jax.reduction import reduce_loss as reduce_loss

FORMULAS: dict[str, Callable[..., Any]] = {}


def plain(formula: Callable[..., Any], name: str = "") -> Callable[..., Any]:
    """Make a public function from the formula of the loss with the same name (decorator).

    The formula of a loss of one logit is `formula(ops, logit, label, **options)`. The formula of a
    softmax loss is `formula(ops, log_p, **options)`, where `log_p` is the log-probability of one
    class. The class weight alpha multiplies the result.
    """
    name = name or formula.__name__
    FORMULAS[name] = formula
    return from_formula(catalogue.LOSSES[name], formula)


def _cross_entropy(ops, z, y):
    return -(y * ops.log_sigmoid(z) + (1 - y) * ops.log_sigmoid(-z))


def _alpha_t(y, alpha):
    return 1 if alpha is None else alpha * y + (1 - alpha) * (1 - y)


def _p_t(ops, z, y):
    p = ops.sigmoid(z)
    return p * y + (1 - p) * (1 - y)


@plain
def sigmoid_focal_loss(ops, logit, label, alpha, gamma):
    focal = (1 - _p_t(ops, logit, label)) ** gamma * _cross_entropy(ops, logit, label)
    return _alpha_t(label, alpha) * focal


@plain
def sigmoid_poly_focal_loss(ops, logit, label, epsilon, alpha, gamma):
    q = 1 - _p_t(ops, logit, label)
    poly = q**gamma * _cross_entropy(ops, logit, label) + epsilon * q ** (gamma + 1)
    return _alpha_t(label, alpha) * poly


@plain
def quality_focal_loss(ops, logit, label, beta):
    return abs(label - ops.sigmoid(logit)) ** beta * _cross_entropy(ops, logit, label)


@plain
def gaussian_focal_loss(ops, logit, label, alpha, gamma, beta):
    peak, s = label == 1, ops.sigmoid(logit)
    decay = (1 - ops.where(peak, 0, label)) ** beta
    positive = -((1 - s) ** gamma) * ops.log_sigmoid(logit)
    negative = -decay * s**gamma * ops.log_sigmoid(-logit)
    if alpha is not None:
        positive, negative = alpha * positive, (1 - alpha) * negative
    return ops.where(peak, positive, negative)


def _is_positive(label, positive):
    return label > 0 if positive is None else positive


@plain
def varifocal_loss(ops, logit, label, alpha, gamma, positive=None, stop_weight_gradient=False):
    s = ops.sigmoid(logit)
    score = ops.stop_gradient(s) if stop_weight_gradient else s
    negative = alpha * score**gamma * _cross_entropy(ops, logit, 0)
    quality = label * _cross_entropy(ops, logit, label)
    return ops.where(_is_positive(label, positive), quality, negative)


@plain
def matchability_aware_loss(ops, logit, label, gamma, alpha, positive=None):
    weight = ops.stop_gradient(ops.sigmoid(logit)) ** gamma
    weight = weight if alpha is None else alpha * weight
    weight = ops.where(_is_positive(label, positive), 1, weight)
    return weight * _cross_entropy(ops, logit, label**gamma)


@plain
def asymmetric_loss(
    ops, logit, label, gamma_positive, gamma_negative, margin, stop_weight_gradient=False
):
    weight = ops.stop_gradient if stop_weight_gradient else lambda x: x
    s = ops.sigmoid(logit)
    above = s > margin
    m = ops.where(above, s - margin, 0.5)  # not 0, where a root has no derivative
    positive = -(weight(1 - s) ** gamma_positive) * ops.log_sigmoid(logit)
    negative = ops.where(above, -(weight(m) ** gamma_negative) * ops.log(1 - m), 0)
    return label * positive + (1 - label) * negative


@plain
def sigmoid_focal_loss_star(ops, logit, label, gamma, beta):
    return -ops.log_sigmoid(gamma * ((2 * label - 1) * logit) + beta) / gamma


def _softmax_focal(ops, log_p, gamma):
    return (1 - ops.exp(log_p)) ** gamma * -log_p


softmax_focal_loss = plain(_softmax_focal, "softmax_focal_loss")
softmax_focal_loss_with_integer_labels = plain(
    _softmax_focal, "softmax_focal_loss_with_integer_labels"
)
linear_softmax_focal_loss_with_integer_labels = plain(
    _softmax_focal, "linear_softmax_focal_loss_with_integer_labels"
)


@plain
def softmax_poly_focal_loss_with_integer_labels(ops, log_p, epsilon, gamma):
    q = 1 - ops.exp(log_p)
    return q**gamma * -log_p + epsilon * q ** (gamma + 1)


@plain
def softmax_probability_weighted_loss_with_integer_labels(ops, log_p):
    return ops.stop_gradient(ops.exp(log_p)) * -log_p


@plain
def dual_focal_loss_with_integer_labels(ops, log_p, gamma, log_probabilities):
    below = ops.where(log_probabilities < log_p[..., None], log_probabilities, -math.inf)
    p_j = ops.exp(below.max(-1, initial=-math.inf))
    return (1 - ops.exp(log_p) + p_j) ** gamma * -log_p


@plain
def distribution_focal_loss(ops, label, left, log_p_left, log_p_right):
    del ops
    return -((left + 1 - label) * log_p_left + (label - left) * log_p_right)


@plain
def focal_tversky_loss(ops, tp, fn, fp, alpha, beta, gamma, smooth):
    del ops
    return (1 - (tp + smooth) / (tp + alpha * fn + beta * fp + smooth)) ** gamma


__all__ = [*FORMULAS, "reduce_loss"]  # pyright: ignore[reportUnsupportedDunderAll]
