"""The same losses as plain textbook formulas, differentiated by JAX.

For reading, for forward mode, and for comparison: what autodiff makes of these formulas
is what `focal_jax.compare_gradients` measures the hand-derived gradients against. They
share nothing with the other implementation but the checks, so that a bug cannot hide in
both; and they have the textbook's weaknesses, which are the reason for the rest of the
package: `1 - p` cancels for a confident prediction, `(1 - p)**gamma` has a pole in its
derivative for gamma < 1, intermediates are kept for the backward pass.
"""

import numbers

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _checks


def _float(name: str, x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    _checks.floating(name, x)
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def _over(name: str, x: ArrayLike, losses: tuple[int, ...], dtype: jnp.dtype) -> Array:
    x = jnp.asarray(x)
    _checks.real(name, x)
    _checks.broadcastable(name, x, losses, "the losses")
    return jnp.broadcast_to(x, losses).astype(dtype)


def _mask(where: ArrayLike | None, losses: tuple[int, ...]) -> Array:
    where = jnp.asarray(True if where is None else where)
    _checks.boolean("where", where)
    _checks.broadcastable("where", where, losses, "the losses")
    return jnp.broadcast_to(where, losses)


def _indices(
    labels: ArrayLike, ignore_label: int | None, where: ArrayLike | None, losses: tuple[int, ...]
) -> tuple[Array, Array]:
    """Return integer labels and the mask of those that count."""
    labels = jnp.asarray(labels)
    _checks.integer("labels", labels)
    _checks.shape("labels", labels, losses, "the logits' without the class axis")
    labels = labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels
    where = _mask(where, losses)
    return labels, where if ignore_label is None else where & (labels != ignore_label)


def _modulation(q: Array, gamma: ArrayLike, losses: tuple[int, ...]) -> Array:
    """Return `q**gamma`, gamma a Python number or an array of the losses' shape."""
    if isinstance(gamma, numbers.Real):
        _checks.static_gamma(gamma)
        return q ** float(gamma)
    return q ** _over("gamma", gamma, losses, q.dtype)


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
    y = jnp.asarray(labels)
    _checks.real("labels", y)
    _checks.broadcastable("labels", y, z.shape, "the logits")
    where = _mask(where, z.shape)
    y = jnp.broadcast_to(y, z.shape).astype(z.dtype)
    z, y = jnp.where(where, z, 0), jnp.where(where, y, 0)

    p = jax.nn.sigmoid(z)
    p_t = p * y + (1 - p) * (1 - y)
    cross_entropy = -(y * jax.nn.log_sigmoid(z) + (1 - y) * jax.nn.log_sigmoid(-z))
    losses = _modulation(1 - p_t, gamma, z.shape) * cross_entropy
    if alpha is not None:
        alpha = _over("alpha", alpha, z.shape, z.dtype)
        losses = (alpha * y + (1 - alpha) * (1 - y)) * losses
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
    y = jnp.asarray(labels)
    _checks.real("labels", y)
    _checks.shape("labels", y, z.shape, "a distribution over the classes, as the logits")
    shape = z.shape[:axis] + z.shape[axis + 1 :]
    where = _mask(where, shape)
    inside = jnp.expand_dims(where, axis)
    z, y = jnp.where(inside, z, 0), jnp.where(inside, y.astype(z.dtype), 0)

    log_p = jax.nn.log_softmax(z, axis)
    if not isinstance(gamma, numbers.Real):
        gamma = jnp.expand_dims(_over("gamma", gamma, shape, z.dtype), axis)
        gamma = jnp.broadcast_to(gamma, z.shape)
    weight = y if alpha is None else y * _per_class(alpha, z, axis)
    # A class without weight contributes nothing, also where log p is -inf.
    log_p = jnp.where((weight == 0) & (log_p == -jnp.inf), 0, log_p)
    losses = weight * _modulation(1 - jnp.exp(log_p), gamma, z.shape) * -log_p
    return jnp.where(where, jnp.sum(losses, axis), 0)


def softmax_focal_loss_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    axis: int = -1,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Compute `focal_jax.softmax_focal_loss_with_integer_labels` from its formula.

    Arguments, results and errors are those of
    `focal_jax.softmax_focal_loss_with_integer_labels`.

    Differentiation: every mode of JAX, forward mode alone included.
    """
    z = _float("logits", logits)
    axis = _checks.axis(axis, z.ndim)
    slices = 1 if class_axis_name is None else lax.axis_size(class_axis_name)
    classes = slices * z.shape[axis]
    shape = z.shape[:axis] + z.shape[axis + 1 :]
    labels, where = _indices(labels, ignore_label, where, shape)
    z = jnp.where(jnp.expand_dims(where, axis), z, 0)

    known = (labels >= 0) & (labels < classes)
    index = jnp.where(known, labels, 0).astype(jnp.int32)
    pick = _picked_log_softmax if class_axis_name is None else _picked_from_slices(class_axis_name)
    log_p = pick(z, jnp.expand_dims(index, axis), axis).squeeze(axis)
    losses = _modulation(1 - jnp.exp(log_p), gamma, shape) * -log_p
    if alpha is not None:
        weights = jnp.asarray(alpha, z.dtype)
        _checks.class_weights(weights, classes)
        losses = (weights[index] if weights.ndim else weights) * losses
    return jnp.where(where, jnp.where(known, losses, jnp.nan), 0)


def _picked_log_softmax(z: Array, index: Array, axis: int) -> Array:
    return jnp.take_along_axis(jax.nn.log_softmax(z, axis), index, axis)


def _picked_from_slices(name: str | tuple[str, ...]):
    """Return the same for logits that are a slice of the classes of a mapped axis."""

    def pick(z: Array, index: Array, axis: int) -> Array:
        top = lax.pmax(lax.stop_gradient(jnp.max(z, axis, keepdims=True)), name)
        total = lax.psum(jnp.sum(jnp.exp(z - top), axis, keepdims=True), name)
        place = lax.broadcasted_iota(jnp.int32, z.shape, axis)
        true = place + z.shape[axis] * lax.axis_index(name) == index
        own = lax.psum(jnp.sum(jnp.where(true, z, 0), axis, keepdims=True), name)
        return own - top - jnp.log(total)

    return pick


def linear_softmax_focal_loss_with_integer_labels(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
    chunk_size: int | None = None,
) -> Array:
    """Compute `focal_jax.linear_softmax_focal_loss_with_integer_labels` from its formula.

    Arguments, results and errors are those of
    `focal_jax.linear_softmax_focal_loss_with_integer_labels`. All the logits are made at
    once, whatever `chunk_size` is.

    Differentiation: every mode of JAX, forward mode alone included.
    """
    features, kernel = _float("features", features), _float("kernel", kernel)
    fits = (*features.shape[-1:], *kernel.shape[-1:])
    _checks.shape("kernel", kernel, fits, "(D, C), with D the last axis of the features")
    labels, where = _indices(labels, ignore_label, where, features.shape[:-1])
    logits = jnp.where(where[..., None], features, 0) @ kernel
    if bias is not None:
        bias = _float("bias", bias)
        _checks.shape("bias", bias, kernel.shape[1:], "one number per class")
        logits = logits + jnp.broadcast_to(bias.astype(logits.dtype), logits.shape)
    return softmax_focal_loss_with_integer_labels(
        logits, labels, alpha=alpha, gamma=gamma, where=where
    )


def _per_class(alpha: ArrayLike, z: Array, axis: int) -> Array:
    alpha = jnp.asarray(alpha, z.dtype)
    _checks.class_weights(alpha, z.shape[axis])
    return lax.broadcast_in_dim(alpha, z.shape, (axis,) if alpha.ndim else ())


def reduce_loss(
    losses: ArrayLike,
    *,
    normalization: str | ArrayLike = "valid",
    where: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    """Compute `focal_jax.reduce_loss` from its formula.

    Arguments, results and errors are those of `focal_jax.reduce_loss`.
    """
    losses = _float("losses", losses)
    counts = _mask(where, losses.shape)
    divisors = {
        "none": lambda: 1,
        "full": lambda: losses.size,
        "valid": lambda: counts.sum(),
        "batch_size": lambda: losses.shape[0],
    }
    divisor, devices = normalization, 1
    if isinstance(normalization, str):
        _checks.normalization(normalization, losses)
        divisor = divisors[normalization]()
        if axis_name is not None and normalization != "none":
            divisor = lax.psum(divisor, axis_name)
    if axis_name is not None:
        devices = lax.psum(1, axis_name)
    divisor = jnp.asarray(divisor).astype(losses.dtype)
    _checks.shape("normalization", divisor, (), "one divisor for all the losses")
    total = jnp.sum(jnp.where(counts, losses, 0))
    return total * devices / jnp.maximum(1, divisor)
