"""The softmax head for a distribution over the classes."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs, _scalar
from focal_jax._class_sums import classes_along, kept, picked, plain_class_sums, without
from focal_jax._cpu import compiled_apart
from focal_jax._varying import aligned_varying


class _Args(NamedTuple):
    """The arguments of the core, of one rank, labels as the logits."""

    logits: Array
    labels: Array
    alpha: Array  # a weight for each class
    gamma: _inputs.Exponent
    where: Array | None


class _Row(NamedTuple):
    """What the classes of a position share, each with a class axis of one.

    The class with the largest logit stands apart: only its own share may be all but the
    whole, so that only there "all less this one" would cancel.
    """

    largest: Array  # the class with the largest logit
    top: Array  # that logit
    own: Array  # exp(logit - top) of it: 1, but it has a derivative
    rest: Array  # the sum of exp(logit - top) over the others


class _Slopes(NamedTuple):
    """The derivatives of each class's term of the sum that is the loss."""

    minus_dlogp: Array
    labels: Array
    alpha: Array
    gamma: Array


def _largest(v: Array, axis: int) -> Array:
    """Return the place of the largest entry, with a class axis of one."""
    if not v.shape[axis]:
        return jnp.zeros_like(jnp.sum(v, axis, keepdims=True), jnp.int32)
    return jnp.argmax(v, axis, keepdims=True).astype(jnp.int32)


def _row(axis: int, args: _Args) -> _Row:
    largest = _largest(kept(args.logits, args.where), axis)
    sums = plain_class_sums(axis, False, args.logits, largest, args.where)
    top = jax.lax.stop_gradient(sums.top)
    return _Row(largest, top, jnp.exp(sums.true - top), sums.rest)


def _sum_without(v: Array, place: Array, axis: int) -> Array:
    """Return the sum of `v` over the classes but the one at `place`."""
    classes = classes_along(v, axis)
    if axis == v.ndim - 1:  # XLA's CPU backend adds up the last axis in passing: no select
        v = v * jnp.minimum(jnp.abs(classes - place), 1).astype(v.dtype)
    else:
        v = compiled_apart(without, v, classes, place)
    return jnp.sum(v, axis, keepdims=True)


def _others_of(v: Array, at: Array, own: Array, rest: Array) -> Array:
    """Return for each class the sum of `v` over the others, without cancellation.

    `at` marks the class that stands apart, whose `v` is `own`; the others add up to `rest`.
    """
    return jnp.where(at, rest, (rest - v) + own)


def _each_class(logits: Array, where, classes: Array, row: _Row) -> tuple[Array, Array]:
    """Return of each class logit - top, and the sum of exp of that over the others."""
    z = kept(logits, where) - row.top
    return z, _others_of(jnp.exp(z), classes == row.largest, row.own, row.rest)


def _parts(args: _Args, classes: Array, row: _Row):
    """Return the terms of each class, where labels are impossible, labels, alpha and gamma."""
    z, z_others = _each_class(args.logits, args.where, classes, row)
    # Never log(1 + rest): `own` is 1, and would round a small rest away.
    log_whole = jnp.log1p((row.own - 1) + row.rest)
    t = _scalar.class_terms(z, z_others, row.own + row.rest, log_whole)
    y, alpha, gamma = _inputs.Kept(t.p.dtype, args.where)((args.labels, args.alpha, args.gamma))
    impossible = ~(y >= 0)
    return t, impossible, jnp.where(impossible, 0, y), alpha, gamma.value


def _summands(*args) -> Array:
    """Return the terms of the sum that is the loss; NaN for a label that is no weight."""
    t, impossible, y, alpha, gamma = _parts(*args)
    term = _scalar.loss(alpha * y, t.q, t.log_q, t.n, gamma)
    return jnp.where(impossible, jnp.nan, term)


@partial(jax.jit, inline=True)
def _slopes(*args) -> _Slopes:
    t, _, y, alpha, gamma = _parts(*args)
    unweighted = _scalar.unweighted(t, gamma)
    return _Slopes(
        minus_dlogp=alpha * y * _scalar.minus_dloss_dlogp(t, gamma),
        labels=alpha * unweighted,
        alpha=y * unweighted,
        gamma=alpha * y * unweighted * t.log_q,
    )


def _through_softmax(logits, where, classes, row, minus_dlogp, largest, own, rest):
    """Return the gradient of the logits, of the slopes in -log p of all the classes.

    `own` is the slope of largest size, at the class `largest`; the others add up to `rest`.
    """
    z, z_others = _each_class(logits, where, classes, row)
    others = _others_of(minus_dlogp, classes == largest, own, rest)
    return (jnp.exp(z) * others - z_others * minus_dlogp) * (1 / (row.own + row.rest))


def _losses(axis: int, args: _Args) -> tuple[Array, _Row]:
    row = _row(axis, args)
    # The first of what is set apart gives the shape: the logits, flattened as they come.
    summands = compiled_apart(
        lambda logits, rest, *more: _summands(_Args(logits, *rest), *more),
        args.logits,
        args[1:],
        classes_along(args.logits, axis),
        row,
    )
    return _inputs.keep(jnp.sum(summands, axis, keepdims=True), args.where), row


@partial(jax.jit, static_argnums=0)
def _primal(axis, *args):
    return _losses(axis, _Args(*args))[0]


@partial(jax.jit, static_argnums=0)
def _forward(axis, *args):
    losses, row = _losses(axis, _Args(*args))
    return losses, (_Args(*args), row, losses)


@partial(jax.jit, static_argnums=0)
def _backward(axis, residuals, ct):
    args, row, losses = residuals
    classes = classes_along(args.logits, axis)

    # G_c = -d loss/d log p_c; the chain through the softmax is p_j sum_{c != j} G_c - G_j q_j.
    minus_dlogp = compiled_apart(
        lambda logits, rest, *more: _slopes(_Args(logits, *rest), *more).minus_dlogp,
        args.logits,
        args[1:],
        classes,
        row,
        after=losses,
    )
    largest = _largest(jnp.abs(minus_dlogp), axis)
    own, rest = picked(minus_dlogp, largest, axis), _sum_without(minus_dlogp, largest, axis)
    dz = compiled_apart(
        _through_softmax, args.logits, args.where, classes, row, minus_dlogp, largest, own, rest
    )
    slopes = _slopes(args, classes, row)

    def cotangent(slope, primal):
        # One impossible label makes its whole position NaN, as it does the loss.
        slope = _inputs.finished(slope, jnp.isnan(losses), args.where)
        return _inputs.cotangent_of(primal, _inputs.times(ct, slope))

    gamma = jax.tree.map(partial(cotangent, slopes.gamma), args.gamma)
    pairs = (dz, args.logits), (slopes.labels, args.labels), (slopes.alpha, args.alpha)
    return *(cotangent(*pair) for pair in pairs), gamma, None


_core = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_core.defvjp(_forward, _backward)


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
        class off. The others may be as far apart as the dtype has numbers: to +-1.7e38 in
        float32.
      labels: of the logits' shape, real or bool: `y`, usually a distribution along the
        class axis (it is not normalized here). A class with `y = 0` contributes exactly
        nothing, also at a logit of -inf. A negative label gives a NaN loss and a NaN
        gradient at its position.
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
    logits = _inputs.floating("logits", logits)
    axis = _checks.axis(axis, logits.ndim)
    labels = _checks.array("labels", labels)
    _checks.real("labels", labels)
    _checks.shape("labels", labels, logits.shape, "a distribution over the classes, as the logits")
    losses = logits.shape[:axis] + logits.shape[axis + 1 :]
    dtype = _inputs.compute_dtype(logits)
    alpha = _inputs.class_weights(alpha, logits.shape[axis], dtype)
    alpha = alpha.reshape([alpha.size if i == axis else 1 for i in range(logits.ndim)])
    (gamma,) = _inputs.options({"gamma": _inputs.exponent("gamma", gamma)}, losses, dtype, axis)
    mask = _inputs.aligned_mask(where, losses, axis)
    return jnp.squeeze(_core(axis, *aligned_varying(logits, labels, alpha, gamma, mask)), axis)
