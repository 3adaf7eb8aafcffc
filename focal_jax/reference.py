"""The same losses as plain textbook formulas, differentiated by JAX.

For reading, for forward mode, and for comparison: what autodiff makes of these formulas
is what `focal_jax.compare_gradients` measures the hand-derived gradients against. They
share nothing with the other implementation but the checks, so that a bug cannot hide in
both; and they have the textbook's weaknesses, which are the reason for the rest of the
package: `1 - p` cancels for a confident prediction, `(1 - p)**gamma` has a pole in its
derivative for gamma < 1, intermediates are kept for the backward pass.

Each formula takes the functions that it needs from a namespace, so that the tests evaluate
the very same lines to 60 digits.
"""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _checks

__all__ = [
    "asymmetric_loss",
    "distribution_focal_loss",
    "dual_focal_loss_with_integer_labels",
    "focal_tversky_loss",
    "gaussian_focal_loss",
    "linear_softmax_focal_loss_with_integer_labels",
    "matchability_aware_loss",
    "quality_focal_loss",
    "reduce_loss",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_star",
    "sigmoid_poly_focal_loss",
    "softmax_focal_loss",
    "softmax_focal_loss_with_integer_labels",
    "softmax_poly_focal_loss_with_integer_labels",
    "softmax_probability_weighted_loss_with_integer_labels",
    "varifocal_loss",
]

# ---------------------------------------------------------------- the formulas


class Operations(NamedTuple):
    """What a formula needs beyond arithmetic and powers."""

    exp: Callable[[Any], Any]
    log: Callable[[Any], Any]
    sigmoid: Callable[[Any], Any]
    log_sigmoid: Callable[[Any], Any]
    where: Callable[[Any, Any, Any], Any]
    held: Callable[[Any], Any]  # the value, as a constant: without derivatives


_JAX = Operations(
    jnp.exp, jnp.log, jax.nn.sigmoid, jax.nn.log_sigmoid, jnp.where, lax.stop_gradient
)


def _cross_entropy(ops: Operations, z, y):
    return -(y * ops.log_sigmoid(z) + (1 - y) * ops.log_sigmoid(-z))


def _sigmoid_focal(ops: Operations, z, y, alpha, gamma):
    """Return the loss of the logit `z` and the label `y`."""
    p = ops.sigmoid(z)
    p_t = p * y + (1 - p) * (1 - y)
    loss = (1 - p_t) ** gamma * _cross_entropy(ops, z, y)
    return loss if alpha is None else (alpha * y + (1 - alpha) * (1 - y)) * loss


def _quality(ops: Operations, z, y, beta):
    return abs(y - ops.sigmoid(z)) ** beta * _cross_entropy(ops, z, y)


def _gaussian(ops: Operations, z, y, alpha, beta):
    peak = y == 1
    weight = (1 - ops.where(peak, 0, y)) ** beta
    positive = -((1 - ops.sigmoid(z)) ** alpha) * ops.log_sigmoid(z)
    negative = -weight * ops.sigmoid(z) ** alpha * ops.log_sigmoid(-z)
    return ops.where(peak, positive, negative)


def _is_positive(y, positive):
    return y > 0 if positive is None else positive


def _varifocal(ops: Operations, z, y, alpha, gamma, positive=None, stop_weight_gradient=False):
    score = ops.held(ops.sigmoid(z)) if stop_weight_gradient else ops.sigmoid(z)
    negative = alpha * score**gamma * _cross_entropy(ops, z, 0)
    return ops.where(_is_positive(y, positive), y * _cross_entropy(ops, z, y), negative)


def _matchability(ops: Operations, z, y, gamma, alpha, positive=None):
    weight = ops.held(ops.sigmoid(z)) ** gamma
    weight = weight if alpha is None else alpha * weight
    target = y**gamma
    return ops.where(_is_positive(y, positive), 1, weight) * _cross_entropy(ops, z, target)


def _asymmetric(
    ops: Operations, z, y, gamma_positive, gamma_negative, margin, stop_weight_gradient=False
):
    weight = ops.held if stop_weight_gradient else lambda x: x
    s = ops.sigmoid(z)
    counts = s > margin
    m = ops.where(counts, s - margin, 0.5)  # whatever: a root of 0 has no derivative
    positive = -(weight(1 - s) ** gamma_positive) * ops.log_sigmoid(z)
    negative = ops.where(counts, -(weight(m) ** gamma_negative) * ops.log(1 - m), 0)
    return y * positive + (1 - y) * negative


def _star(ops: Operations, z, y, gamma, beta):
    return -ops.log_sigmoid(gamma * ((2 * y - 1) * z) + beta) / gamma


def _sigmoid_poly(ops: Operations, z, y, epsilon, alpha, gamma):
    p = ops.sigmoid(z)
    p_t = p * y + (1 - p) * (1 - y)
    loss = (1 - p_t) ** gamma * _cross_entropy(ops, z, y) + epsilon * (1 - p_t) ** (gamma + 1)
    return loss if alpha is None else (alpha * y + (1 - alpha) * (1 - y)) * loss


def _weighted(alpha, loss):
    return loss if alpha is None else alpha * loss


def _softmax_focal(ops: Operations, log_p, alpha, gamma):
    """Return the loss of a class with the logarithmic probability `log_p`."""
    return _weighted(alpha, (1 - ops.exp(log_p)) ** gamma * -log_p)


def _softmax_poly(ops: Operations, log_p, alpha, epsilon, gamma):
    q = 1 - ops.exp(log_p)
    return _weighted(alpha, q**gamma * -log_p + epsilon * q ** (gamma + 1))


def _probability_weighted(ops: Operations, log_p, alpha):
    return _weighted(alpha, ops.held(ops.exp(log_p)) * -log_p)


def _dual(ops: Operations, log_p, alpha, gamma, row):
    """Return the loss of a class in a row of logarithmic probabilities, the last axis."""
    below = ops.where(row < log_p[..., None], row, -math.inf).max(-1, initial=-math.inf)
    return _weighted(alpha, (1 - ops.exp(log_p) + ops.exp(below)) ** gamma * -log_p)


def _distribution(ops: Operations, y, left, log_p_left, log_p_right):
    """Return the loss of `y` between the class `left` and the next."""
    del ops
    return -((left + 1 - y) * log_p_left + (y - left) * log_p_right)


def _tversky(ops: Operations, tp, fn, fp, alpha, beta, gamma, smooth):
    del ops
    return (1 - (tp + smooth) / (tp + alpha * fn + beta * fp + smooth)) ** gamma


# By the name of the loss. What a formula is given: of an elementwise loss the logit and the
# label, of the others the logarithm of the class's probability; then the options in the
# order of the catalogue, None where there is none, and its masks and flags by name. The loss
# of a distribution is the sum of that over the classes, each weighted by its label. The last
# two are given what they need.
FORMULAS: dict[str, Callable[..., Any]] = {
    "sigmoid_focal_loss": _sigmoid_focal,
    "softmax_focal_loss": _softmax_focal,
    "softmax_focal_loss_with_integer_labels": _softmax_focal,
    "linear_softmax_focal_loss_with_integer_labels": _softmax_focal,
    "quality_focal_loss": _quality,
    "gaussian_focal_loss": _gaussian,
    "varifocal_loss": _varifocal,
    "matchability_aware_loss": _matchability,
    "asymmetric_loss": _asymmetric,
    "sigmoid_focal_loss_star": _star,
    "sigmoid_poly_focal_loss": _sigmoid_poly,
    "softmax_poly_focal_loss_with_integer_labels": _softmax_poly,
    "softmax_probability_weighted_loss_with_integer_labels": _probability_weighted,
    "dual_focal_loss_with_integer_labels": _dual,
    "distribution_focal_loss": _distribution,
    "focal_tversky_loss": _tversky,
}

# Losses whose formula also takes the logarithmic probabilities of all the classes, as `row`.
OF_A_ROW = frozenset({"dual_focal_loss_with_integer_labels"})


# ---------------------------------------------------------------- arguments


def _float(name: str, x: ArrayLike) -> Array:
    x = _checks.array(name, x)
    _checks.floating(name, x)
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def _mask(where: ArrayLike | None, losses: tuple[int, ...], name: str = "where") -> Array:
    where = _checks.array(name, True if where is None else where)
    _checks.boolean(name, where)
    _checks.broadcastable(name, where, losses, "the losses")
    return jnp.broadcast_to(where, losses)


def _real(name: str, x: ArrayLike, where: Array, dtype: jnp.dtype) -> Array:
    """Return `x` at every position, 1 where the mask is False."""
    x = _checks.array(name, x)
    _checks.real(name, x)
    _checks.broadcastable(name, x, where.shape, "the losses")
    return jnp.where(where, jnp.broadcast_to(x, where.shape).astype(dtype), 1)


def _exponent(name: str, x: ArrayLike, where: Array, dtype: jnp.dtype) -> float | Array:
    """Return an exponent at every position, a Python number as it is."""
    if isinstance(x, numbers.Real):
        _checks.static_exponent(name, x)
        return float(x)
    return _real(name, x, where, dtype)


def _elementwise(
    formula: Callable[..., Array],
    logits: ArrayLike,
    labels: ArrayLike,
    where: ArrayLike | None,
    options: Mapping[str, ArrayLike | None],
    exponents: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    positive: ArrayLike | None = None,
    **flags: bool,
) -> Array:
    """Return the losses of one logit each, NaN where the label is none, 0 where masked.

    The options come by name, in the order in which the formula takes them; `exponents` names
    those that are, and only `optional` ones may be None. The flags are the formula's.
    """
    z = _float("logits", logits)
    where = _mask(where, z.shape)
    y = _real("labels", labels, where, z.dtype)
    z = jnp.where(where, z, 0)

    def prepared(name: str, x: Any) -> Any:
        read: Callable[..., Any] = _exponent if name in exponents else _real
        return None if x is None and name in optional else read(name, x, where, z.dtype)

    given = [prepared(*option) for option in options.items()]
    masks = {} if positive is None else {"positive": _mask(positive, z.shape, "positive")}
    losses = formula(_JAX, z, y, *given, **masks, **flags)
    losses = jnp.where((y < 0) | (y > 1), jnp.nan, losses)
    return jnp.where(where, losses, 0)


def _class_weights(alpha: ArrayLike, dtype: jnp.dtype, classes: int) -> Array:
    alpha = _checks.array("alpha", alpha)
    _checks.real("alpha", alpha)
    _checks.class_weights(alpha, classes)
    return alpha.astype(dtype)


def _indices(labels: ArrayLike, losses: tuple[int, ...], why: str) -> Array:
    """Return integer labels in 32 bits; a wider one stays beyond all the classes."""
    labels = _checks.array("labels", labels)
    _checks.integer("labels", labels)
    _checks.shape("labels", labels, losses, why)
    return _checks.saturated(labels)


def _not_ignored(labels: Array, ignore_label: int | None, where: Array) -> Array:
    ignore_label = _checks.ignore_label(ignore_label)
    return where if ignore_label is None else where & (labels != ignore_label)


# ---------------------------------------------------------------- the losses


def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> Array:
    """Compute `focal_jax.sigmoid_focal_loss` from its formula.

    Arguments, results and errors are those of `focal_jax.sigmoid_focal_loss`.

    Differentiation: every mode of JAX, forward mode alone included.
    """
    options = {"alpha": alpha, "gamma": gamma}
    return _elementwise(
        _sigmoid_focal, logits, labels, where, options, exponents=("gamma",), optional=("alpha",)
    )


def quality_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    beta: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> Array:
    """Compute `focal_jax.quality_focal_loss` from its formula."""
    return _elementwise(_quality, logits, labels, where, {"beta": beta}, exponents=("beta",))


def gaussian_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike = 2.0,
    beta: ArrayLike = 4.0,
    where: ArrayLike | None = None,
) -> Array:
    """Compute `focal_jax.gaussian_focal_loss` from its formula."""
    options = {"alpha": alpha, "beta": beta}
    return _elementwise(_gaussian, logits, labels, where, options, exponents=("alpha", "beta"))


def varifocal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike = 0.75,
    gamma: ArrayLike = 2.0,
    positive: ArrayLike | None = None,
    stop_weight_gradient: bool = False,
    where: ArrayLike | None = None,
) -> Array:
    """Compute `focal_jax.varifocal_loss` from its formula."""
    return _elementwise(
        _varifocal,
        logits,
        labels,
        where,
        {"alpha": alpha, "gamma": gamma},
        exponents=("gamma",),
        positive=positive,
        stop_weight_gradient=_checks.flag("stop_weight_gradient", stop_weight_gradient),
    )


def matchability_aware_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 1.5,
    alpha: ArrayLike | None = None,
    positive: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Compute `focal_jax.matchability_aware_loss` from its formula."""
    return _elementwise(
        _matchability,
        logits,
        labels,
        where,
        {"gamma": gamma, "alpha": alpha},
        exponents=("gamma",),
        optional=("alpha",),
        positive=positive,
    )


def asymmetric_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma_positive: ArrayLike = 0.0,
    gamma_negative: ArrayLike = 4.0,
    margin: ArrayLike = 0.05,
    stop_weight_gradient: bool = False,
    where: ArrayLike | None = None,
) -> Array:
    """Compute `focal_jax.asymmetric_loss` from its formula."""
    if isinstance(margin, numbers.Real):
        _checks.static_margin("margin", margin)
    return _elementwise(
        _asymmetric,
        logits,
        labels,
        where,
        {"gamma_positive": gamma_positive, "gamma_negative": gamma_negative, "margin": margin},
        exponents=("gamma_positive", "gamma_negative"),
        stop_weight_gradient=_checks.flag("stop_weight_gradient", stop_weight_gradient),
    )


def sigmoid_focal_loss_star(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 2.0,
    beta: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    """Compute `focal_jax.sigmoid_focal_loss_star` from its formula."""
    if isinstance(gamma, numbers.Real):
        _checks.static_stretch("gamma", gamma)
    return _elementwise(_star, logits, labels, where, {"gamma": gamma, "beta": beta})


def sigmoid_poly_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    epsilon: ArrayLike = 1.0,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> Array:
    """Compute `focal_jax.sigmoid_poly_focal_loss` from its formula."""
    options = {"epsilon": epsilon, "alpha": alpha, "gamma": gamma}
    return _elementwise(
        _sigmoid_poly, logits, labels, where, options, exponents=("gamma",), optional=("alpha",)
    )


def softmax_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Compute `focal_jax.softmax_focal_loss` from its formula.

    Arguments, results and errors are those of `focal_jax.softmax_focal_loss`.

    Differentiation: every mode of JAX, forward mode alone included.
    """
    z = _float("logits", logits)
    axis = _checks.axis(axis, z.ndim)
    y = _checks.array("labels", labels)
    _checks.real("labels", y)
    _checks.shape("labels", y, z.shape, "a distribution over the classes, as the logits")
    where = _mask(where, z.shape[:axis] + z.shape[axis + 1 :])
    inside = jnp.broadcast_to(jnp.expand_dims(where, axis), z.shape)
    z, y = jnp.where(inside, z, 0), jnp.where(inside, y.astype(z.dtype), 0)
    gamma = _exponent("gamma", gamma, where, z.dtype)
    if isinstance(gamma, Array):
        gamma = jnp.broadcast_to(jnp.expand_dims(gamma, axis), z.shape)
    if alpha is not None:
        alpha = _class_weights(alpha, z.dtype, z.shape[axis])
        alpha = lax.broadcast_in_dim(alpha, z.shape, (axis,) if alpha.ndim else ())
        alpha = jnp.where(inside, alpha, 1)

    log_p = jax.nn.log_softmax(z, axis)
    # A class without weight contributes nothing, also where log p is -inf.
    weightless = (y == 0) | (alpha == 0) if alpha is not None else y == 0
    log_p = jnp.where(weightless & (log_p == -jnp.inf), 0, log_p)
    losses = jnp.sum(y * _softmax_focal(_JAX, log_p, alpha, gamma), axis)
    losses = jnp.where(jnp.min(y, axis, initial=0) < 0, jnp.nan, losses)
    return jnp.where(where, losses, 0)


def softmax_focal_loss_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    axis: int = -1,
    label_smoothing: float = 0.0,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    return_logsumexp: bool = False,
) -> Any:
    """Compute `focal_jax.softmax_focal_loss_with_integer_labels` from its formula.

    Arguments, results and errors are those of
    `focal_jax.softmax_focal_loss_with_integer_labels`.

    Differentiation: every mode of JAX, forward mode alone included.
    """
    options = {"gamma": gamma}
    return _integer(
        *(_softmax_focal, logits, labels, alpha, axis, ignore_label, where, class_axis_name),
        options,
        label_smoothing=label_smoothing,
        return_logsumexp=return_logsumexp,
    )


def _integer(
    formula: Callable[..., Array],
    logits: ArrayLike,
    labels: ArrayLike,
    alpha: ArrayLike | None,
    axis: int,
    ignore_label: int | None,
    where: ArrayLike | None,
    class_axis_name: str | tuple[str, ...] | None,
    options: Mapping[str, ArrayLike],
    of_a_row: bool = False,
    label_smoothing: float = 0.0,
    return_logsumexp: bool = False,
) -> Any:
    """Return the losses of one class index a position.

    Besides the weight of the label, the formula takes the options; gamma is an exponent.
    """
    z = _float("logits", logits)
    axis = _checks.axis(axis, z.ndim)
    smoothing = _checks.label_smoothing(label_smoothing)
    slices = 1 if class_axis_name is None else lax.axis_size(class_axis_name)
    classes = slices * z.shape[axis]
    losses = z.shape[:axis] + z.shape[axis + 1 :]
    labels = _indices(labels, losses, "the logits' without the class axis")
    where = _not_ignored(labels, ignore_label, _mask(where, losses))
    z = jnp.where(jnp.expand_dims(where, axis), z, 0)
    given = [
        (_exponent if name == "gamma" else _real)(name, x, where, z.dtype)
        for name, x in options.items()
    ]
    known = (labels >= 0) & (labels < classes)
    index = jnp.expand_dims(jnp.where(known & where, labels, 0), axis)
    if alpha is not None:
        alpha = _class_weights(alpha, z.dtype, classes)

    total = _logsumexp(z, axis, class_axis_name)
    pick = _picked if class_axis_name is None else _picked_from_slices(class_axis_name)
    log_p = pick(z, index, axis) - total
    weight = alpha
    if alpha is not None:
        weight = jnp.where(where, alpha[index.squeeze(axis)] if alpha.ndim else alpha, 1)
    row = {}
    if of_a_row:
        whole = z if class_axis_name is None else _gathered(z, axis, class_axis_name)
        row = {"row": jnp.moveaxis(whole - total, axis, -1)}  # the true class's is `log_p`
    losses = formula(_JAX, log_p.squeeze(axis), weight, *given, **row)
    if smoothing:
        every = _every_class(formula, z - total, alpha, given, axis, class_axis_name)
        losses = (1 - smoothing) * losses + smoothing / classes * every
    losses = jnp.where(where, jnp.where(known, losses, jnp.nan), 0)
    return (losses, jnp.where(where, total.squeeze(axis), 0)) if return_logsumexp else losses


def _gathered(z: Array, axis: int, name: str | tuple[str, ...]) -> Array:
    """Return the logits of all the slices of a mapped axis."""
    own = jnp.arange(lax.axis_size(name)) == lax.axis_index(name)
    own = lax.broadcast_in_dim(own, (own.size, *z.shape), (0,))
    slices = lax.psum(jnp.where(own, jnp.broadcast_to(z, own.shape), 0), name)
    return jnp.concatenate(list(slices), axis)


def _logsumexp(z: Array, axis: int, name: str | tuple[str, ...] | None) -> Array:
    """Return the log-sum-exp of the logits, which may be a slice of a mapped axis's classes."""
    if name is None:
        return jax.nn.logsumexp(z, axis, keepdims=True)
    top = lax.pmax(lax.stop_gradient(jnp.max(z, axis, keepdims=True)), name)
    return top + jnp.log(lax.psum(jnp.sum(jnp.exp(z - top), axis, keepdims=True), name))


def _every_class(formula, log_p: Array, alpha: Array | None, options, axis: int, name) -> Array:
    """Return the sum over all the classes of the loss that each would have as the label."""
    options = [
        jnp.broadcast_to(jnp.expand_dims(x, axis), log_p.shape) if isinstance(x, Array) else x
        for x in options
    ]
    if alpha is not None:
        if alpha.ndim and name is not None:
            own = log_p.shape[axis]
            alpha = lax.dynamic_slice_in_dim(alpha, own * lax.axis_index(name), own)
        alpha = lax.broadcast_in_dim(alpha, log_p.shape, (axis,) if alpha.ndim else ())
        log_p = jnp.where((alpha == 0) & (log_p == -jnp.inf), 0, log_p)
    every = jnp.sum(formula(_JAX, log_p, alpha, *options), axis)
    return every if name is None else lax.psum(every, name)


def _picked(z: Array, index: Array, axis: int) -> Array:
    return jnp.take_along_axis(z, index, axis)


def _picked_from_slices(name: str | tuple[str, ...]):
    """Return the same for logits that are a slice of the classes of a mapped axis."""

    def pick(z: Array, index: Array, axis: int) -> Array:
        place = lax.broadcasted_iota(jnp.int32, z.shape, axis)
        true = place + z.shape[axis] * lax.axis_index(name) == index
        return lax.psum(jnp.sum(jnp.where(true, z, 0), axis, keepdims=True), name)

    return pick


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
    """Compute `focal_jax.softmax_poly_focal_loss_with_integer_labels` from its formula."""
    options = {"epsilon": epsilon, "gamma": gamma}
    return _integer(
        _softmax_poly,
        logits,
        labels,
        alpha,
        axis,
        ignore_label,
        where,
        class_axis_name,
        options,
    )


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
    """Compute the loss of the same name in `focal_jax` from its formula."""
    options = {}
    return _integer(
        _probability_weighted,
        logits,
        labels,
        alpha,
        axis,
        ignore_label,
        where,
        class_axis_name,
        options,
    )


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
) -> Array:
    """Compute `focal_jax.dual_focal_loss_with_integer_labels` from its formula."""
    options = {"gamma": gamma}
    return _integer(
        _dual,
        logits,
        labels,
        alpha,
        axis,
        ignore_label,
        where,
        class_axis_name,
        options,
        of_a_row=True,
    )


def distribution_focal_loss(
    logits: ArrayLike, labels: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    """Compute `focal_jax.distribution_focal_loss` from its formula."""
    z = _float("logits", logits)
    axis = _checks.axis(axis, z.ndim)
    labels = _checks.array("labels", labels)
    _checks.index_shape(labels, z.shape, axis)
    where = _mask(where, labels.shape)
    y, z = _real("labels", labels, where, z.dtype), jnp.where(jnp.expand_dims(where, axis), z, 0)
    last = z.shape[axis] - 1
    y = jnp.where(where, y, 0)
    left = jnp.clip(jnp.floor(y), 0, max(last - 1, 0))
    index = jnp.where(jnp.isnan(left), 0, left).astype(jnp.int32)
    log_p = jax.nn.log_softmax(z, axis)

    def at(index):
        return jnp.take_along_axis(log_p, jnp.expand_dims(index, axis), axis).squeeze(axis)

    losses = _distribution(_JAX, y, left, at(index), at(jnp.minimum(index + 1, last)))
    losses = jnp.where((y < 0) | (y > last), jnp.nan, losses)
    return jnp.where(where, losses, 0)


def focal_tversky_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike = 0.7,
    beta: ArrayLike = 0.3,
    gamma: ArrayLike = 0.75,
    axis: int = -1,
    smooth: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Compute `focal_jax.focal_tversky_loss` from its formula."""
    z = _float("logits", logits)
    axis = _checks.axis(axis, z.ndim)
    y = _checks.array("labels", labels)
    _checks.shape("labels", y, z.shape, "one-hot, or a distribution over the classes")
    where = jnp.expand_dims(_mask(where, z.shape[:axis] + z.shape[axis + 1 :]), axis)
    where = jnp.broadcast_to(where, z.shape)
    z, y = jnp.where(where, z, 0), jnp.where(where, y.astype(z.dtype), 0)
    p = jnp.where(where, jax.nn.softmax(z, axis), 0)
    y = jnp.where((y < 0) | (y > 1), jnp.nan, y)
    positions = tuple(i for i in range(z.ndim) if i != axis)
    counts = [x.sum(positions) for x in (y * p, y * (1 - p), (1 - y) * p)]
    hit, missed, mistaken = counts if axis_name is None else lax.psum(counts, axis_name)
    every = jnp.ones(z.shape[axis], bool)
    alpha, beta, smooth = (
        _real(name, x, every, z.dtype)
        for name, x in (("alpha", alpha), ("beta", beta), ("smooth", smooth))
    )
    gamma = _exponent("gamma", gamma, every, z.dtype)
    # A class that is neither there nor predicted has all of its region right.
    nothing = hit + missed + mistaken + smooth == 0
    hit = jnp.where(nothing, 1, hit)
    return _tversky(_JAX, hit, missed, mistaken, alpha, beta, gamma, smooth)


def linear_softmax_focal_loss_with_integer_labels(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    label_smoothing: float = 0.0,
    logit_softcap: float | None = None,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    return_logsumexp: bool = False,
    chunk_size: int | None = None,
) -> Any:
    """Compute `focal_jax.linear_softmax_focal_loss_with_integer_labels` from its formula.

    Arguments, results and errors are those of
    `focal_jax.linear_softmax_focal_loss_with_integer_labels`. All the logits are made at
    once, whatever `chunk_size` is.

    Differentiation: every mode of JAX, forward mode alone included.
    """
    features, kernel = _float("features", features), _float("kernel", kernel)
    fits = (*features.shape[-1:], *kernel.shape[-1:])
    _checks.shape("kernel", kernel, fits, "(D, C), with D the last axis of the features")
    labels = _indices(labels, features.shape[:-1], "the features' without the last axis")
    where = _not_ignored(labels, ignore_label, _mask(where, features.shape[:-1]))
    logits = jnp.where(where[..., None], features, 0) @ kernel
    if bias is not None:
        bias = _float("bias", bias)
        _checks.shape("bias", bias, kernel.shape[1:], "one number per class")
        logits = logits + jnp.broadcast_to(bias.astype(logits.dtype), logits.shape)
    cap = _checks.logit_softcap(logit_softcap)
    if cap is not None:  # what is switched off stays off
        logits = jnp.where(logits == -jnp.inf, logits, cap * jnp.tanh(logits / cap))
    return softmax_focal_loss_with_integer_labels(
        logits,
        labels,
        alpha=alpha,
        gamma=gamma,
        label_smoothing=label_smoothing,
        where=where,
        class_axis_name=class_axis_name,
        return_logsumexp=return_logsumexp,
    )


# ---------------------------------------------------------------- the reduction


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

    Arguments, results and errors are those of `focal_jax.reduce_loss`.
    """
    losses = _float("losses", losses)
    counts = _mask(where, losses.shape)
    if labels is not None:
        labels = _indices(labels, losses.shape, "one for each loss")
        counts = _not_ignored(labels, ignore_label, counts)
    elif ignore_label is not None:
        raise _checks.InputError(
            f"ignore_label: got {ignore_label} and no labels, wanted the labels that it is one of"
        )
    weight = _real("weights", 1.0 if weights is None else weights, counts, losses.dtype)
    weight = jnp.where(counts, jnp.where(weight < 0, jnp.nan, weight), 0)
    if normalization is None or isinstance(normalization, str):
        _checks.normalization(normalization, losses)
        batch = losses.shape[0] if losses.ndim else 1
        divisor = {
            "valid": jnp.sum(weight),
            "mean": jnp.float32(losses.size),
            "sum": jnp.float32(1),
            "batch_size": jnp.float32(batch),
        }[{"none": "sum", "full": "mean"}.get(normalization, normalization)]
        if axis_name is not None and normalization not in ("sum", "none"):
            divisor = lax.psum(divisor, axis_name)
    else:
        divisor = _checks.array("normalization", normalization)
        _checks.shape("normalization", divisor, (), "one divisor for all the losses")
    divisor = divisor.astype(losses.dtype)
    least = divisor < 1 if weights is None else divisor <= 0
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    total = jnp.sum(weight * jnp.where(counts, losses, 0))
    return devices * total / jnp.where(least, 1, divisor)
