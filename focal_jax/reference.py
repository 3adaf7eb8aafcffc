"""The same losses as plain textbook formulas, differentiated by JAX.

They support forward mode, and `focal_jax.compare_gradients` measures the hand-derived gradients
against autodiff of these formulas. The formulas and the engine share only the declared options and
the argument checks, so the same bug is unlikely in both. The formulas are not numerically stable:
`1 - p` cancels for a confident prediction, and the derivative of `(1 - p)**gamma` has a pole for
gamma < 1. Autodiff stores intermediates for the backward pass.

A formula takes its functions from `ops`, so that the tests can evaluate it to 60 digits.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import catalogue
from focal_jax.engine import arguments, checks
from focal_jax.engine.arguments import InputError
from focal_jax.engine.options import check_call
from focal_jax.plain import Operations as Operations, from_formula, mask_of, not_ignored, real_of
from focal_jax.reduction import check_normalization, weight_array

FORMULAS: dict[str, Callable[..., Any]] = {}


def plain(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Make a public function from the formula of the loss with the same name (decorator).

    The formula of a loss of one logit is `formula(ops, logit, label, **options)`. The formula of a
    softmax loss is `formula(ops, log_p, **options)`, where `log_p` is the log-probability of one
    class. The class weight alpha multiplies the result.
    """
    FORMULAS[formula.__name__] = formula
    return from_formula(catalogue.LOSSES[formula.__name__], formula)


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


@plain
def softmax_focal_loss(ops, log_p, gamma):
    return _softmax_focal(ops, log_p, gamma)


@plain
def softmax_focal_loss_with_integer_labels(ops, log_p, gamma):
    return _softmax_focal(ops, log_p, gamma)


@plain
def linear_softmax_focal_loss_with_integer_labels(ops, log_p, gamma):
    return _softmax_focal(ops, log_p, gamma)


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


# ---------------------------------------------------------------- the reduction


@check_call
def reduce_loss(
    losses: ArrayLike,
    *,
    normalization: str | ArrayLike = "valid",
    where: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    ignore_label: int | None = None,
    weights: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Compute `focal_jax.reduce_loss` from its formula.

    Arguments, results and errors are the same.
    """
    losses = arguments.floating_array("losses", losses)
    losses = losses.astype(arguments.compute_dtype(losses))
    valid = mask_of(where, losses.shape)
    if labels is not None:
        labels = arguments.integer_labels(labels, losses.shape, None, ignore_label)
        valid = not_ignored(labels, ignore_label, valid)
    elif ignore_label is not None:
        raise InputError(f"ignore_label: got {ignore_label} without labels, wanted labels too")
    arguments.check_axis_name("axis_name", axis_name)
    weight = weight_array(1.0 if weights is None else weights, losses)
    weight = real_of("weights", weight, valid, losses.dtype)
    weight = jnp.where(valid, jnp.where(weight < 0, jnp.nan, weight), 0)
    if normalization is None or isinstance(normalization, str):
        check_normalization(normalization, losses)
        denominator = {
            "valid": jnp.sum(weight),
            "mean": jnp.float32(losses.size),
            "sum": jnp.float32(1),
            "batch_size": jnp.float32(losses.shape[0] if losses.ndim else 1),
        }[normalization]
        if axis_name is not None and normalization != "sum":
            denominator = lax.psum(denominator, axis_name)
    else:
        denominator = arguments.number_array("normalization", normalization, losses.dtype)
        arguments.check_shape("normalization", denominator, (), "one denominator for all losses")
        checks.check_known_numbers("normalization", normalization)
    denominator = denominator.astype(losses.dtype)
    too_small = denominator < 1 if weights is None else denominator <= 0
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    total = jnp.sum(weight * jnp.where(valid, losses, 0))
    return devices * total / jnp.where(too_small, 1, denominator)
