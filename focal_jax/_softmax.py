"""Softmax focal losses: integer labels, and a distribution over the classes."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _arrays, _checks, _modulation, _position
from focal_jax._island import island
from focal_jax._varying import aligned_varying, not_varying


class _Static(NamedTuple):
    """What the compiler may know: the class axis, and gamma where it is a Python number."""

    axis: int
    exponent: int | float | None


def _classes(logits: Array, axis: int) -> Array:
    """Return 0, 1, ... along the class axis, of size 1 along the others."""
    shape = [1] * logits.ndim
    shape[axis] = logits.shape[axis]
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _kept(logits: Array, where: Array | None) -> Array:
    """Return the logits in the dtype of the loss, 0 where the mask is False."""
    return _arrays.keep(logits.astype(_arrays.compute_dtype(logits)), where)


def _masked(logits: Array, where: Array | None, axis: int) -> tuple[Array, Array]:
    """Return the logits, 0 where the mask is False, and the largest of each position."""
    z = _kept(logits, where)
    top = jnp.max(z, axis, keepdims=True, initial=-jnp.inf)
    # Finite also where no class is left: -inf less -inf would be NaN.
    return z, lax.stop_gradient(jnp.maximum(top, jnp.finfo(z.dtype).min))


# ---------------------------------------------------------------- integer labels


def _true_logit(z: Array, place: Array, axis: int) -> Array:
    """Return the true class's logit, or 0 where the true class is not one of these."""
    if jax.typeof(z).sharding.spec[axis] is None:
        return jnp.take_along_axis(z, place, axis, mode="fill", fill_value=0)
    # The classes are spread over an explicit mesh axis, which no gather reaches across.
    return jnp.sum(jnp.where(_classes(z, axis) == place, z, 0), axis, keepdims=True)


def _without(v, classes, place):
    """Return `v`, 0 for the class at `place`."""
    return jnp.where(classes == place, 0, v)


def _others(logits, classes, place, top, where):
    """Return exp(logit - top) of every class, 0 for the one at `place`."""
    return _without(jnp.exp(_kept(logits, where) - top), classes, place)


@jax.custom_jvp
def _others_in_passing(logits, classes, place, top, where):
    # No exponential here is above 1, and only the class at `place` is less than 1 away from it.
    e = jnp.exp(_kept(logits, where) - top)
    return jnp.minimum(e, jnp.abs(classes.astype(e.dtype) - place.astype(e.dtype)))


@_others_in_passing.defjvp
def _others_in_passing_jvp(primals, tangents):
    # Not the minimum's: where the two are equal it has half the derivative of each.
    return _others_in_passing(*primals), jax.jvp(_others, primals, tangents)[1]


def _sums(others, axis, logits, place, top, where):
    e = others(logits, _classes(logits, axis), place, top, where)
    return _true_logit(_kept(logits, where), place, axis), jnp.sum(e, axis, keepdims=True)


@partial(jax.jit, static_argnums=0)
def _sums_primal(axis, *args):
    # Without a gradient there is no use for the exponentials: nothing is to be written out.
    # XLA's CPU backend sums the last axis in passing where it meets no select, and others
    # are quicker apart. Elsewhere the forms are one.
    last = axis == args[0].ndim - 1
    return _sums(_others_in_passing if last else partial(island, _others), axis, *args)


@partial(jax.jit, static_argnums=0)
def _sums_fwd(axis, *args):
    # Two users, this sum and the gradient: written out once, in the gradient's place.
    return _sums(_others, axis, *args), args


@partial(jax.jit, static_argnums=0)
def _sums_bwd(axis, args, cts):
    logits, place, top, where = args
    of_true, of_rest = cts
    classes = _classes(logits, axis)
    others = _others(logits, classes, place, top, where)
    ct = jnp.where(classes == place, of_true, of_rest * others)
    return ct.astype(logits.dtype), None, None, None


_sums_core = jax.custom_vjp(_sums_primal, nondiff_argnums=(0,))
_sums_core.defvjp(_sums_fwd, _sums_bwd)


@partial(jax.jit, static_argnums=(0, 1))
def _int_losses(static, class_axis_name, logits, labels, alpha, gamma, where):
    """Return the losses, with a class axis of one.

    With `class_axis_name` the logits are a slice of the classes. The largest logit and the
    two sums then meet those of the other slices: out here, where JAX transposes the
    collectives rightly in every mode of `shard_map`, and a number a position each.
    """
    axis, exponent = static
    _, top = _masked(logits, where, axis)
    first, classes = 0, logits.shape[axis]
    if class_axis_name is not None:
        top = lax.pmax(top, class_axis_name)
        first = classes * lax.axis_index(class_axis_name)
        classes *= lax.axis_size(class_axis_name)
    # A label that is not one of these classes is one beyond them: -1 would be the last.
    place = jnp.where(labels >= first, labels - first, logits.shape[axis])
    true, rest = _sums_core(axis, *aligned_varying(logits, place, top, where))
    if class_axis_name is not None:
        true, rest = lax.psum((true, rest), class_axis_name)
    weight = _position.label_weight(alpha.astype(top.dtype), labels, classes)
    return _position.losses(exponent, true - top, rest, weight, gamma, where)


# ---------------------------------------------------------------- a distribution


class _Row(NamedTuple):
    """What the classes of a position share, each with a class axis of one.

    The class with the largest logit stands apart: only its own share may be all but the
    whole, so that only there "all less this one" would cancel.
    """

    largest: Array  # the class with the largest logit
    top: Array  # that logit
    own: Array  # exp(logit - top) of it: 1, but it has a derivative
    rest: Array  # the sum of exp(logit - top) over the others


def _largest(v: Array, axis: int) -> Array:
    return jnp.argmax(v, axis, keepdims=True).astype(jnp.int32)


def _row(axis, logits, where) -> _Row:
    z, top = _masked(logits, where, axis)
    largest = _largest(z, axis)
    true, rest = _sums_primal(axis, logits, largest, top, where)
    return _Row(largest, top, jnp.exp(true - top), rest)


def _sum_without(v: Array, place: Array, axis: int) -> Array:
    """Return the sum of `v` over the classes but the one at `place`."""
    classes = _classes(v, axis)
    if axis == v.ndim - 1:  # as in `_sums_primal`
        v = v * jnp.minimum(jnp.abs(classes - place), 1).astype(v.dtype)
    else:
        v = island(_without, v, classes, place)
    return jnp.sum(v, axis, keepdims=True)


def _others_of(v: Array, at: Array, own: Array, rest: Array) -> Array:
    """Return for each class the sum of `v` over the others, without cancellation.

    `at` marks the class that stands apart, whose `v` is `own`; the others add up to `rest`.
    """
    return jnp.where(at, rest, (rest - v) + own)


def _each_class(
    logits: Array, where: Array | None, classes: Array, row: _Row
) -> tuple[Array, Array]:
    """Return of each class logit - top, and the sum of exp of that over the others."""
    z = _kept(logits, where) - row.top
    return z, _others_of(jnp.exp(z), classes == row.largest, row.own, row.rest)


def _class_terms(logits, where, classes, row) -> _modulation.Terms:
    # Never log(1 + rest): `own` is 1, and would round a small rest away.
    log_whole = jnp.log1p((row.own - 1) + row.rest)
    return _modulation.class_terms(
        *_each_class(logits, where, classes, row), row.own + row.rest, log_whole
    )


def _soft_parts(exponent, logits, labels, alpha, gamma, where, classes, row):
    """Return the terms of each class, and labels, alpha and gamma in their dtype."""
    t = _class_terms(logits, where, classes, row)
    dtype = t.p.dtype
    y = _arrays.keep(labels.astype(dtype), where)
    return t, y, alpha.astype(dtype), _arrays.gamma_of(exponent, gamma, dtype)


def _soft_terms(exponent, *args):
    """Return the terms of the sum that is the loss."""
    t, y, a, g = _soft_parts(exponent, *args)
    return _modulation.loss(a * y, t.q, t.log_q, t.n, g)


@partial(jax.jit, static_argnums=0, inline=True)
def _soft_slopes(exponent, *args):
    """Return for each class its term's derivatives: in -log p, and in y, alpha and gamma."""
    t, y, a, g = _soft_parts(exponent, *args)
    unweighted = _modulation.unweighted(t, g)
    steep = a * y * _modulation.slope(t, g)
    return steep, a * unweighted, y * unweighted, a * y * unweighted * t.log_q


def _soft_chain(logits, where, classes, row, steep, steepest, own, rest):
    """Return the gradient of the logits, of the slopes in -log p of all the classes."""
    z, z_others = _each_class(logits, where, classes, row)
    others = _others_of(steep, classes == steepest, own, rest)
    return (jnp.exp(z) * others - z_others * steep) * (1 / (row.own + row.rest))


def _soft_losses(static, *args):
    logits, *_, where = args
    axis, exponent = static
    row = _row(axis, logits, where)
    terms = island(partial(_soft_terms, exponent), *args, _classes(logits, axis), row)
    return _arrays.keep(jnp.sum(terms, axis, keepdims=True), where), row


@partial(jax.jit, static_argnums=0)
def _soft_primal(static, *args):
    return _soft_losses(static, *args)[0]


@partial(jax.jit, static_argnums=0)
def _soft_fwd(static, *args):
    losses, row = _soft_losses(static, *args)
    return losses, (args, row, losses)


@partial(jax.jit, static_argnums=0)
def _soft_bwd(static, residuals, ct):
    args, row, losses = residuals
    logits, labels, alpha, gamma, where = args
    axis, exponent = static
    classes = _classes(logits, axis)
    inputs = (*args, classes, row)

    # G_c = -d loss/d log p_c; the chain through the softmax is p_j sum_{c != j} G_c - G_j q_j.
    steep = island(lambda *args: _soft_slopes(exponent, *args)[0], *inputs, after=losses)
    steepest = _largest(jnp.abs(steep), axis)
    own, rest = _true_logit(steep, steepest, axis), _sum_without(steep, steepest, axis)
    dz = island(_soft_chain, logits, where, classes, row, steep, steepest, own, rest)

    values = ct * dz, *(ct * slope for slope in _soft_slopes(exponent, *inputs)[1:])
    primals = logits, labels, alpha, gamma
    return *map(partial(_arrays.cotangent_of, where=where), primals, values), None


_soft_core = jax.custom_vjp(_soft_primal, nondiff_argnums=(0,))
_soft_core.defvjp(_soft_fwd, _soft_bwd)


# ---------------------------------------------------------------- public functions


def _checked(logits, alpha, gamma, axis, where, slices=1):
    """Check what both heads share; return logits, losses' shape, statics and arrays."""
    logits = jnp.asarray(logits)
    _checks.floating("logits", logits)
    axis = _checks.axis(axis, logits.ndim)
    losses = logits.shape[:axis] + logits.shape[axis + 1 :]
    dtype = _arrays.compute_dtype(logits)
    exponent, gamma = _arrays.split_gamma(gamma, losses, dtype)
    where = _arrays.mask(where, losses)
    alpha = _arrays.option("alpha", 1.0 if alpha is None else alpha, dtype)
    _checks.class_weights(alpha, slices * logits.shape[axis])
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
    class_axis_name: str | tuple[str, ...] | None = None,
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
      class_axis_name: one name or several of mapped axes (`shard_map`, `pmap`, `vmap`)
        that the classes are spread over: the logits then hold this device's slice of them,
        all slices equally long and in the order of the devices. Labels count through all
        the classes and alpha has a weight for each; they, gamma and `where` are the same
        on every device of these axes, and so are the losses. What the devices exchange is
        a few numbers a position: the largest logit, the true one and the sum.

    Returns:
      The losses, of the labels' shape, not reduced. float32 for 16-bit logits (which are
      computed in float32), else of the logits' dtype.

    Raises:
      ValueError: for logits that are not floating, labels that are not integers or have
        another shape, an axis out of range, an alpha of the wrong length, a gamma or
        `where` that does not broadcast to the losses, a `where` that is not bool, a
        negative Python `gamma`; for arguments that vary over `class_axis_name` and should
        not, where `shard_map` keeps account of that (`check_vma=True`).
      NameError: for a `class_axis_name` that is not bound here.

    Differentiation: reverse mode in logits, alpha and gamma, any number of times, and
      forward over reverse. Forward mode alone is refused by `jax.custom_vjp`;
      `focal_jax.reference.softmax_focal_loss_with_integer_labels` has it. A gradient taken
      inside `pmap`, or inside `shard_map` with `check_vma=False`, is that of the sum of
      what all the devices return, as JAX has it for every collective: with
      `class_axis_name`, divide it by the number of slices.

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
    slices = 1 if class_axis_name is None else lax.axis_size(class_axis_name)
    logits, losses, static, alpha, dynamic, mask = _checked(
        logits, alpha, gamma, axis, where, slices
    )
    index = _arrays.int32_labels(labels, losses)
    if class_axis_name is not None:
        same = {"labels": index, "alpha": alpha, "gamma": dynamic, "where": mask}
        for name, x in same.items():
            not_varying(name, x, class_axis_name)
    index = jnp.expand_dims(index, static.axis)
    mask = _arrays.not_ignored(index, ignore_label, mask)
    losses = _int_losses(static, class_axis_name, logits, index, alpha, dynamic, mask)
    return jnp.squeeze(losses, static.axis)
