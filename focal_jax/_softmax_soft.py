"""The softmax head for a distribution over the classes."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs, _scalar
from focal_jax._class_sums import classes_along, kept
from focal_jax._cpu import compiled_apart
from focal_jax._largest_apart import Apart, Row, apart, in_one_pass, in_passes, row
from focal_jax._varying import aligned_varying


class _Args(NamedTuple):
    """The arguments of the core, of one rank, labels as the logits."""

    logits: Array
    labels: Array
    alpha: Array  # a weight for each class
    gamma: _inputs.Exponent
    where: Array | None


class _Slopes(NamedTuple):
    """The derivatives of each class's term of the sum that is the loss."""

    minus_dlogp: Array
    labels: Array
    alpha: Array
    gamma: Array


def _terms(args: _Args, classes: Array, row: Row, again: bool) -> _scalar.Terms:
    """Return the terms of each class."""
    # Never log(1 + rest): `own` is 1, and would round a small rest away.
    log_whole = jnp.log1p((row.apart.own - 1) + row.apart.rest)
    return row.terms(kept(args.logits, args.where), classes, log_whole, again=again)


def _parts(args: _Args, classes: Array, row: Row, again: bool):
    """Return the terms of each class, where labels are impossible, labels, alpha and gamma."""
    t = _terms(args, classes, row, again)
    y, alpha, gamma = _inputs.Kept(t.p.dtype, args.where)((args.labels, args.alpha, args.gamma))
    impossible = ~(y >= 0)
    return t, impossible, jnp.where(impossible, 0, y), alpha, gamma.value


def _summands(args: _Args, classes: Array, row: Row) -> Array:
    """Return the terms of the sum that is the loss; NaN for a label that is no weight."""
    t, impossible, y, alpha, gamma = _parts(args, classes, row, again=False)
    term = _scalar.loss(alpha * y, t.q, t.log_q, t.n, gamma)
    return jnp.where(impossible, jnp.nan, term)


@partial(jax.jit, static_argnames="again", inline=True)
def _slopes(args: _Args, classes: Array, row: Row, *, again: bool) -> _Slopes:
    t, _, y, alpha, gamma = _parts(args, classes, row, again)
    unweighted = _scalar.unweighted(t, gamma)
    return _Slopes(
        minus_dlogp=alpha * y * _scalar.minus_dloss_dlogp(t, gamma),
        labels=alpha * unweighted,
        alpha=y * unweighted,
        gamma=alpha * y * unweighted * t.log_q,
    )


def _through_softmax(args: _Args, classes: Array, row: Row, minus_dlogp: Array, sums: Apart):
    """Return the gradient of the logits, of the slopes in -log p of all the classes.

    With G_c for these slopes, and their `sums`: p_j sum_{c != j} G_c - G_j q_j.
    """
    t = _terms(args, classes, row, again=True)
    return t.p * sums.others_of(minus_dlogp, classes, again=True) - t.q * minus_dlogp


def _by_logits_first(function):
    """Return a function of `_Args` as one whose first argument gives the shape of the result."""
    return lambda logits, args, *more: function(args._replace(logits=logits), *more)


def _sum_on_cpu(axis: int, args: _Args, classes: Array, row: Row) -> tuple[Apart, Array]:
    """Return the losses. The slopes are left to the backward pass, which writes them out."""
    others = args._replace(logits=None)
    summands = compiled_apart(_by_logits_first(_summands), args.logits, others, classes, row)
    losses = jnp.sum(summands, axis, keepdims=True)
    return jax.tree.map(jnp.zeros_like, row.apart), losses


def _sums_elsewhere(axis: int, args: _Args, classes: Array, row: Row) -> tuple[Apart, Array]:
    """Return the losses and what the gradient needs of the slopes, of one reduction."""
    slopes = _slopes(args, classes, row, again=False).minus_dlogp
    return apart(in_one_pass, axis, row.apart.place, slopes, _summands(args, classes, row))


def _gradient_on_cpu(axis, args: _Args, classes, row: Row, sums: Apart, losses: Array) -> Array:
    """Return the gradient of the logits. The slopes are written out once, for two passes."""
    del sums
    others = args._replace(logits=None)

    def minus_dlogp(args, *more):
        return _slopes(args, *more, again=False).minus_dlogp

    # Their memory is that of the losses' summands, which are done with.
    slopes = compiled_apart(
        _by_logits_first(minus_dlogp), args.logits, others, classes, row, after=losses
    )
    of_slopes, _ = apart(in_passes, axis, row.apart.place, slopes)
    through = _by_logits_first(_through_softmax)
    return compiled_apart(through, args.logits, others, classes, row, slopes, of_slopes)


def _gradient_elsewhere(axis, args: _Args, classes, row: Row, sums: Apart, losses) -> Array:
    """Return the same. The slopes are computed once more, and never written out."""
    del axis, losses
    slopes = _slopes(args, classes, row, again=True).minus_dlogp
    return _through_softmax(args, classes, row, slopes, sums)


def _row(axis: int, args: _Args) -> Row:
    of_row = row(axis, args.logits, args.where)
    return of_row._replace(top=lax.stop_gradient(of_row.top))


@partial(jax.jit, static_argnums=0)
def _primal(axis, *args):
    args = _Args(*args)
    _, losses = _sum_on_cpu(axis, args, classes_along(args.logits, axis), _row(axis, args))
    return _inputs.keep(losses, args.where)


@partial(jax.jit, static_argnums=0)
def _forward(axis, *args):
    args = _Args(*args)
    of_row, classes = _row(axis, args), classes_along(args.logits, axis)
    on_cpu, elsewhere = (partial(form, axis) for form in (_sum_on_cpu, _sums_elsewhere))
    sums, losses = lax.platform_dependent(args, classes, of_row, cpu=on_cpu, default=elsewhere)
    return _inputs.keep(losses, args.where), (args, of_row, sums, losses)


@partial(jax.jit, static_argnums=0)
def _backward(axis, residuals, ct):
    args, of_row, sums, losses = residuals
    classes = classes_along(args.logits, axis)
    on_cpu, elsewhere = (partial(f, axis) for f in (_gradient_on_cpu, _gradient_elsewhere))
    dz = lax.platform_dependent(args, classes, of_row, sums, losses, cpu=on_cpu, default=elsewhere)
    slopes = _slopes(args, classes, of_row, again=True)

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
