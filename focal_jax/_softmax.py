"""Softmax focal losses: integer labels, and a distribution over the classes."""

import operator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _arrays, _checks, _modulation
from focal_jax._varying import aligned_varying


class _Static(NamedTuple):
    """What the compiler may know: the class axis, and gamma where it is a Python number."""

    axis: int
    exponent: int | float | None


def _classes(logits: Array, axis: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, logits.shape, axis)


def _is_largest(z: Array, axis: int) -> Array:
    return _classes(z, axis) == jnp.argmax(z, axis, keepdims=True).astype(jnp.int32)


def _masked(logits: Array, where: Array | None, axis: int) -> tuple[Array, Array]:
    """Return the logits, 0 where the mask is False, and the largest of each position."""
    z = _arrays.keep(logits.astype(_arrays.compute_dtype(logits)), where)
    top = jnp.max(z, axis, keepdims=True, initial=-jnp.inf)
    # Finite also where no class is left: -inf less -inf would be NaN.
    return z, lax.stop_gradient(jnp.maximum(top, jnp.finfo(z.dtype).min))


# ---------------------------------------------------------------- integer labels


def _terms(logits: Array, labels: Array, where: Array | None, axis: int):
    """Return a mask of the true class, exp(logit) of the others, their sum, the true logit."""
    z, top = _masked(logits, where, axis)
    true = _classes(logits, axis) == labels
    # Two users, the sum here and the gradient: written out once, in the gradient's place.
    others = jnp.where(true, 0, jnp.exp(z - top))
    rest = jnp.sum(others, axis, keepdims=True)
    return true, others, rest, jnp.take_along_axis(z, labels, axis) - top


def _int_primal(static, logits, labels, alpha, gamma, where):
    return _int_fwd(static, logits, labels, alpha, gamma, where)[0]


@partial(jax.jit, static_argnums=0)
def _int_fwd(static, logits, labels, alpha, gamma, where):
    _, _, rest, margin = _terms(logits, labels, where, static.axis)
    t = _modulation.softmax_terms(margin, rest)
    weight = _arrays.label_weight(alpha, labels, logits.shape[static.axis], t.p.dtype)
    g = _arrays.gamma_of(static.exponent, gamma, t.p.dtype)
    losses = _modulation.loss(weight, t.q, t.log_q, t.n, g)
    return _arrays.keep(losses, where), (logits, labels, alpha, gamma, where)


@partial(jax.jit, static_argnums=0)
def _int_bwd(static, args, ct):
    logits, labels, alpha, gamma, where = args
    true, others, rest, margin = _terms(logits, labels, where, static.axis)
    t = _modulation.softmax_terms(margin, rest)
    weight = _arrays.label_weight(alpha, labels, logits.shape[static.axis], t.p.dtype)
    g = _arrays.gamma_of(static.exponent, gamma, t.p.dtype)
    # d loss/d log p through the softmax: times p_j for the others; for the true class times
    # -q, where the division by q that is in the one slope is not done at all.
    other = ct * weight * _modulation.log_slope(t, g) / (jnp.exp(margin) + rest)
    own = ct * weight * _modulation.slope(t, g)
    unweighted = ct * (_modulation.power(t.q, t.log_q, g) * _modulation.bounded(t.n))

    cotangent = partial(_arrays.cotangent_of, where=where)
    return (
        cotangent(logits, jnp.where(true, -own, other * others)),
        None,
        cotangent(alpha, unweighted),
        cotangent(gamma, weight * unweighted * t.log_q),
        None,
    )


_int_core = jax.custom_vjp(_int_primal, nondiff_argnums=(0,))
_int_core.defvjp(_int_fwd, _int_bwd)


# ---------------------------------------------------------------- a distribution


def _sum_of_others(v: Array, largest: Array, axis: int) -> Array:
    """Return for each class the sum of `v` over the other classes, without cancellation.

    `largest` marks the class whose `v` is largest in size. Only there would `sum - v`
    cancel, so only there the others are added up by themselves.
    """
    rest = jnp.sum(jnp.where(largest, 0, v), axis, keepdims=True)
    top = jnp.sum(jnp.where(largest, v, 0), axis, keepdims=True)
    return rest + jnp.where(largest, 0, top - v)


def _class_terms(logits: Array, where: Array | None, axis: int):
    """Return the softmax and, with each class taken for the true one, its terms."""
    z, top = _masked(logits, where, axis)
    z = z - top
    exp = jnp.exp(z)
    t = _modulation.softmax_terms(z, _sum_of_others(exp, _is_largest(z, axis), axis))
    return exp / jnp.sum(exp, axis, keepdims=True), t


@partial(jax.jit, static_argnums=0)
def _soft_primal(static, logits, labels, alpha, gamma, where):
    _, t = _class_terms(logits, where, static.axis)
    dtype = t.p.dtype
    weight = alpha.astype(dtype) * _arrays.keep(labels.astype(dtype), where)
    g = _arrays.gamma_of(static.exponent, gamma, dtype)
    losses = _modulation.loss(weight, t.q, t.log_q, t.n, g)
    return _arrays.keep(jnp.sum(losses, static.axis, keepdims=True), where)


def _soft_fwd(static, *args):
    return _soft_primal(static, *args), args


@partial(jax.jit, static_argnums=0)
def _soft_bwd(static, args, ct):
    logits, labels, alpha, gamma, where = args
    axis = static.axis
    p, t = _class_terms(logits, where, axis)
    dtype = t.p.dtype
    y = _arrays.keep(labels.astype(dtype), where)
    a, g = alpha.astype(dtype), _arrays.gamma_of(static.exponent, gamma, dtype)
    # G_c = d loss/d log p_c; the chain through the softmax is G_j q_j - p_j sum_{c != j} G_c.
    steep = a * y * _modulation.log_slope(t, g)
    others = _sum_of_others(steep, _is_largest(jnp.abs(steep), axis), axis)
    unweighted = ct * (_modulation.power(t.q, t.log_q, g) * _modulation.bounded(t.n))

    cotangent = partial(_arrays.cotangent_of, where=where)
    return (
        cotangent(logits, ct * (p * others - t.q * steep)),
        cotangent(labels, a * unweighted),
        cotangent(alpha, y * unweighted),
        cotangent(gamma, a * y * unweighted * t.log_q),
        None,
    )


_soft_core = jax.custom_vjp(_soft_primal, nondiff_argnums=(0,))
_soft_core.defvjp(_soft_fwd, _soft_bwd)


# ---------------------------------------------------------------- public functions


def _checked(logits, alpha, gamma, axis, where):
    """Check what both heads share; return logits, losses' shape, statics and arrays."""
    logits = jnp.asarray(logits)
    _checks.floating("logits", logits)
    axis = _checks.axis(axis, logits.ndim)
    losses = logits.shape[:axis] + logits.shape[axis + 1 :]
    dtype = _arrays.compute_dtype(logits)
    exponent, gamma = _arrays.split_gamma(gamma, losses, dtype)
    where = _arrays.mask(where, losses)
    alpha = _arrays.option("alpha", 1.0 if alpha is None else alpha, dtype)
    _checks.class_weights(alpha, logits.shape[axis])
    align = partial(jax.tree.map, lambda x: _arrays.aligned(x, losses, axis))
    gamma, where = align((gamma, where))
    return logits, losses, _Static(axis, exponent), alpha, gamma, where


def softmax_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Compute the focal loss of a softmax against a distribution over the classes.

    With `p = softmax(logits)` along the class axis, each position's loss is

        sum over c of alpha_c y_c * (1 - p_c)**gamma * (-log p_c)

    For one-hot labels this is `softmax_focal_loss_with_integer_labels`. For soft ones
    every class is modulated by its own `p_c`, as Keras and MindSpore have it: not by one
    `p_t` for the whole position, and not by the cross entropy.

    Args:
      logits: `[..., C, ...]`, floating: unnormalized log-probabilities. -inf switches a
        class off.
      labels: of the logits' shape, real or bool: `y`, usually a distribution along the
        class axis (it is not normalized here). A class with `y = 0` contributes exactly
        nothing, also at a logit of -inf.
      alpha: None, a scalar, or `[C]`, one weight per class.
      gamma: focusing exponent, 0 or more. A Python number or an array that broadcasts to
        the losses.
      axis: the class axis.
      where: bool, broadcasts to the losses: positions where it is False have loss 0 and
        gradient 0, whatever the inputs hold there.

    Returns:
      The losses, of the logits' shape without the class axis, not reduced. float32 for
      16-bit logits (which are computed in float32), else of the logits' dtype.

    Raises:
      ValueError: for logits that are not floating, labels of another shape, an axis out
        of range, an alpha of the wrong length, a gamma or `where` that does not
        broadcast to the losses, a `where` that is not bool, a negative Python `gamma`.

    Differentiation: reverse mode in logits, labels, alpha and gamma, any number of
      times, and forward over reverse. Forward mode alone is refused by
      `jax.custom_vjp`; `focal_jax.reference.softmax_focal_loss` has it.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import softmax_focal_loss
      >>> logits = jnp.array([[2.0, 0.0, -jnp.inf], [0.0, 0.0, 0.0]])
      >>> labels = jnp.array([[0.9, 0.1, 0.0], [0.0, 0.5, 0.5]])
      >>> [round(x, 4) for x in softmax_focal_loss(logits, labels).tolist()]
      [0.1666, 0.4883]

    References:
      Lin, Goyal, Girshick, He, Dollar. [Focal Loss for Dense Object
      Detection](https://arxiv.org/abs/1708.02002). ICCV 2017.
    """
    logits, _, static, alpha, gamma, where = _checked(logits, alpha, gamma, axis, where)
    labels = jnp.asarray(labels)
    _checks.real("labels", labels)
    _checks.shape("labels", labels, logits.shape, "a distribution over the classes, as the logits")
    per_class = [1] * logits.ndim
    per_class[static.axis] = alpha.size
    args = aligned_varying(logits, labels, alpha.reshape(per_class), gamma, where)
    return jnp.squeeze(_soft_core(static, *args), static.axis)


def softmax_focal_loss_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    axis: int = -1,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
) -> Array:
    r"""Compute the focal loss of a softmax against one class index per position.

    With `p_t` the softmax probability of the position's own class, each loss is

        alpha_t * (1 - p_t)**gamma * (-log p_t)

    Args:
      logits: `[..., C, ...]`, floating: unnormalized log-probabilities. -inf switches a
        class off: probability 0, gradient 0.
      labels: of the logits' shape without the class axis, any integer dtype: class
        indices. One outside `[0, C)` that is not `ignore_label` gives a NaN loss and a
        NaN gradient at its position only.
      alpha: None, a scalar, or `[C]`, one weight per class, picked by the label.
      gamma: focusing exponent, 0 or more. A Python number or an array that broadcasts to
        the losses.
      axis: the class axis.
      ignore_label: positions with this label have loss 0 and gradient 0, whatever their
        logits hold.
      where: bool, broadcasts to the losses: likewise where it is False.

    Returns:
      The losses, of the labels' shape, not reduced. float32 for 16-bit logits (which are
      computed in float32), else of the logits' dtype.

    Raises:
      ValueError: for logits that are not floating, labels that are not integers or have
        another shape, an axis out of range, an alpha of the wrong length, a gamma or
        `where` that does not broadcast to the losses, a `where` that is not bool, a
        negative Python `gamma`.

    Differentiation: reverse mode in logits, alpha and gamma, any number of times, and
      forward over reverse. Forward mode alone is refused by `jax.custom_vjp`;
      `focal_jax.reference.softmax_focal_loss_with_integer_labels` has it.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import softmax_focal_loss_with_integer_labels
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
      >>> labels = jnp.array([0, 1, -1])
      >>> losses = softmax_focal_loss_with_integer_labels(logits, labels, ignore_label=-1)
      >>> [round(x, 4) for x in losses.tolist()]
      [0.0109, 0.4883, 0.0]

    References:
      Lin, Goyal, Girshick, He, Dollar. [Focal Loss for Dense Object
      Detection](https://arxiv.org/abs/1708.02002). ICCV 2017.
    """
    logits, losses, static, alpha, gamma, where = _checked(logits, alpha, gamma, axis, where)
    labels = _arrays.int32_labels(labels, losses)
    if ignore_label is not None:
        counts = jnp.expand_dims(labels != operator.index(ignore_label), static.axis)
        where = counts if where is None else counts & where
    labels = jnp.expand_dims(labels, static.axis)
    if alpha.ndim:
        alpha = jnp.take(alpha, labels, mode="clip")
    else:
        alpha = alpha.reshape((1,) * logits.ndim)
    args = aligned_varying(logits, labels, alpha, gamma, where)
    return jnp.squeeze(_int_core(static, *args), static.axis)
