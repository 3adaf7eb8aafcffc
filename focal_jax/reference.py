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

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _checks

# ---------------------------------------------------------------- the formulas


class Operations(NamedTuple):
    """What a formula needs beyond arithmetic and powers."""

    exp: Callable[[Any], Any]
    sigmoid: Callable[[Any], Any]
    log_sigmoid: Callable[[Any], Any]


_JAX = Operations(jnp.exp, jax.nn.sigmoid, jax.nn.log_sigmoid)


def _sigmoid_focal(ops: Operations, z, y, alpha, gamma):
    """Return the loss of the logit `z` and the label `y`."""
    p = ops.sigmoid(z)
    p_t = p * y + (1 - p) * (1 - y)
    cross_entropy = -(y * ops.log_sigmoid(z) + (1 - y) * ops.log_sigmoid(-z))
    loss = (1 - p_t) ** gamma * cross_entropy
    return loss if alpha is None else (alpha * y + (1 - alpha) * (1 - y)) * loss


def _softmax_focal(ops: Operations, log_p, alpha, gamma):
    """Return the loss of a class with the logarithmic probability `log_p`."""
    loss = (1 - ops.exp(log_p)) ** gamma * -log_p
    return loss if alpha is None else alpha * loss


# By the name of the loss. What a formula is given: of an elementwise loss the logit and the
# label, of the others the logarithm of the class's probability; then the options in the
# order of the catalogue, None where there is none. The loss of a distribution is the sum of
# that over the classes, each weighted by its label.
FORMULAS: dict[str, Callable[..., Any]] = {
    "sigmoid_focal_loss": _sigmoid_focal,
    "softmax_focal_loss": _softmax_focal,
    "softmax_focal_loss_with_integer_labels": _softmax_focal,
    "linear_softmax_focal_loss_with_integer_labels": _softmax_focal,
}


# ---------------------------------------------------------------- arguments


def _float(name: str, x: ArrayLike) -> Array:
    x = _checks.array(name, x)
    _checks.floating(name, x)
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def _mask(where: ArrayLike | None, losses: tuple[int, ...]) -> Array:
    where = _checks.array("where", True if where is None else where)
    _checks.boolean("where", where)
    _checks.broadcastable("where", where, losses, "the losses")
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


def _class_weights(alpha: ArrayLike, dtype: jnp.dtype, classes: int) -> Array:
    alpha = _checks.array("alpha", alpha).astype(dtype)
    _checks.class_weights(alpha, classes)
    return alpha


def _indices(labels: ArrayLike, losses: tuple[int, ...], why: str) -> Array:
    """Return integer labels in 32 bits; a wider one stays beyond all the classes."""
    labels = _checks.array("labels", labels)
    _checks.integer("labels", labels)
    _checks.shape("labels", labels, losses, why)
    own, wanted = jnp.iinfo(labels.dtype), _checks.INT32
    return labels.clip(max(own.min, wanted.min), min(own.max, wanted.max)).astype(jnp.int32)


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
    z = _float("logits", logits)
    where = _mask(where, z.shape)
    y = _real("labels", labels, where, z.dtype)
    z = jnp.where(where, z, 0)
    if alpha is not None:
        alpha = _real("alpha", alpha, where, z.dtype)
    losses = _sigmoid_focal(_JAX, z, y, alpha, _exponent("gamma", gamma, where, z.dtype))
    losses = jnp.where((y < 0) | (y > 1), jnp.nan, losses)
    return jnp.where(where, losses, 0)


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
    z = _float("logits", logits)
    axis = _checks.axis(axis, z.ndim)
    smoothing = _checks.label_smoothing(label_smoothing)
    slices = 1 if class_axis_name is None else lax.axis_size(class_axis_name)
    classes = slices * z.shape[axis]
    losses = z.shape[:axis] + z.shape[axis + 1 :]
    labels = _indices(labels, losses, "the logits' without the class axis")
    where = _not_ignored(labels, ignore_label, _mask(where, losses))
    z = jnp.where(jnp.expand_dims(where, axis), z, 0)
    gamma = _exponent("gamma", gamma, where, z.dtype)
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
    losses = _softmax_focal(_JAX, log_p.squeeze(axis), weight, gamma)
    if smoothing:
        every = _every_class(z - total, alpha, gamma, axis, class_axis_name)
        losses = (1 - smoothing) * losses + smoothing / classes * every
    losses = jnp.where(where, jnp.where(known, losses, jnp.nan), 0)
    return (losses, jnp.where(where, total.squeeze(axis), 0)) if return_logsumexp else losses


def _logsumexp(z: Array, axis: int, name: str | tuple[str, ...] | None) -> Array:
    """Return the log-sum-exp of the logits, which may be a slice of a mapped axis's classes."""
    if name is None:
        return jax.nn.logsumexp(z, axis, keepdims=True)
    top = lax.pmax(lax.stop_gradient(jnp.max(z, axis, keepdims=True)), name)
    return top + jnp.log(lax.psum(jnp.sum(jnp.exp(z - top), axis, keepdims=True), name))


def _every_class(log_p: Array, alpha: Array | None, gamma, axis: int, name) -> Array:
    """Return the sum over all the classes of the loss that each would have as the label."""
    if isinstance(gamma, Array):
        gamma = jnp.broadcast_to(jnp.expand_dims(gamma, axis), log_p.shape)
    if alpha is not None:
        if alpha.ndim and name is not None:
            own = log_p.shape[axis]
            alpha = lax.dynamic_slice_in_dim(alpha, own * lax.axis_index(name), own)
        alpha = lax.broadcast_in_dim(alpha, log_p.shape, (axis,) if alpha.ndim else ())
        log_p = jnp.where((alpha == 0) & (log_p == -jnp.inf), 0, log_p)
    every = jnp.sum(_softmax_focal(_JAX, log_p, alpha, gamma), axis)
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
    names = {"sum": "none", "mean": "full"}
    divisors = {
        "none": lambda: 1.0,
        "full": lambda: float(losses.size),
        "valid": lambda: counts.sum(),
        "batch_size": lambda: float(losses.shape[0]),
    }
    divisor, devices = normalization, 1
    if isinstance(normalization, str):
        name = names.get(normalization, normalization)
        _checks.normalization(name, losses)
        divisor = jnp.asarray(divisors[name](), losses.dtype)
        if axis_name is not None and name != "none":
            divisor = lax.psum(divisor, axis_name)
    if axis_name is not None:
        devices = lax.psum(1, axis_name)
    divisor = jnp.asarray(divisor).astype(losses.dtype)
    _checks.shape("normalization", divisor, (), "one divisor for all the losses")
    total = jnp.sum(jnp.where(counts, losses, 0))
    return total * devices / jnp.maximum(1, divisor)
