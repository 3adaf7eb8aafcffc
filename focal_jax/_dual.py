"""Dual focal loss: it also looks at the class that comes next below the true one."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs, _scalar
from focal_jax._class_sums import ClassSums, classes_along, kept, picked, reduced
from focal_jax._largest_apart import first_place, no_tangent, places
from focal_jax._position import position
from focal_jax._scalar import Terms
from focal_jax._softmax_integer import integer_head
from focal_jax._varying import aligned_varying


class _Next(NamedTuple):
    """The largest logit that is less than the true one's, -inf where there is none."""

    z: Array
    place: Array


def _below_in_passes(axis: int, z: Array) -> _Next:
    """Return the largest entry, the first of several, as a CPU likes it."""
    place = first_place(z, axis)
    return _Next(picked(z, place, axis), place)


def _below_in_one_pass(axis: int, z: Array) -> _Next:
    """Return the same by one reduction, which reads the logits once and looks nothing up."""

    def larger(a, b):
        first = (a.z > b.z) | ((a.z == b.z) & (a.place < b.place))
        return jax.tree.map(partial(jnp.where, first), a, b)

    nothing = _Next(jnp.asarray(-jnp.inf, z.dtype), jnp.int32(_checks.INT32.max))
    return reduced(axis, _Next(z, places(z, axis)), nothing, larger)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _next_below(axis: int, logits: Array, true: Array, where: Array | None) -> _Next:
    z = kept(logits, where)
    below = jnp.where(z < true, z, -jnp.inf)
    on_cpu, elsewhere = (partial(form, axis) for form in (_below_in_passes, _below_in_one_pass))
    return lax.platform_dependent(below, cpu=on_cpu, default=elsewhere)


@_next_below.defjvp
def _next_below_jvp(axis, primals, tangents):
    found, dz = _next_below(axis, *primals), kept(tangents[0], primals[2])
    dz = jnp.where(found.z == -jnp.inf, 0, picked(dz, found.place, axis))
    return found, _Next(dz, no_tangent(found.place))


def _largest_below(axis: int, *args) -> Array:
    return _next_below(axis, *args).z


def _below_forward(axis, *args):
    return _largest_below(axis, *args), args


def _below_backward(axis, args, ct):
    # A comparison with the place, where the derivative of picking is a scatter.
    logits, true, where = args
    at = classes_along(logits, axis) == _next_below(axis, logits, true, where).place
    ct = _inputs.keep(jnp.where(at & (kept(logits, where) < true), ct, 0), where)
    return ct.astype(logits.dtype), jnp.zeros_like(true), None


_below = jax.custom_vjp(_largest_below, nondiff_argnums=(0,))
_below.defvjp(_below_forward, _below_backward)


def _share_below(axis: int, class_axis_name, logits: Array, sums: ClassSums, where) -> Array:
    """Return the share that the next class below has of all the classes but the true one."""
    true = lax.stop_gradient(sums.true)
    below: Array = _below(axis, *aligned_varying(logits, true, where))
    if class_axis_name is not None:
        # The largest of the slices, taken from the first device that has it.
        own = lax.stop_gradient(below)
        index, size = lax.axis_index(class_axis_name), lax.axis_size(class_axis_name)
        holds = jnp.where(own == lax.pmax(own, class_axis_name), index, size)
        first = lax.pmin(holds, class_axis_name) == index
        below = lax.psum(jnp.where(first, below, 0), class_axis_name)
    # Of the sum's logarithm the derivative is never a product that underflows on the way.
    return jnp.exp(below - sums.top - _log(sums.rest))


@jax.custom_jvp
def _log(x: Array) -> Array:
    return jnp.log(jnp.maximum(x, jnp.finfo(x.dtype).tiny))


@_log.defjvp
def _log_jvp(primals, tangents):
    # Never 1 / x**2, which is infinite where the derivatives that it is part of are not.
    return _log(*primals), _scalar.divide(tangents[0], primals[0])


def _enlarged(t: Terms, share: Array) -> Terms:
    """Return the terms with `1 - p_t + p_j` for `q`, of which `p_j = share * (1 - p_t)`.

    `p` is then minus the derivative of `q` in `log p_t`, as it is without the share.
    """
    factor = 1 + share
    log_q = t.log_q + _scalar.log1p(share)
    return Terms(t.p * factor, t.q * factor, t.n, log_q, t.n_over_q / factor)


def _value(t: Terms, weight: Array, gamma: _inputs.Exponent, share: Array) -> Array:
    t = _enlarged(t, share)
    return _scalar.loss(weight, t.q, t.log_q, t.n, gamma.value)


def _slopes(t: Terms, weight: Array, gamma: _inputs.Exponent, share: Array):
    t = _enlarged(t, share)
    unweighted = _scalar.unweighted(t, gamma.value)
    return (
        weight * _scalar.minus_dloss_dlogp(t, gamma.value),
        unweighted,
        weight * (unweighted * t.log_q),
        gamma.value * (weight * unweighted) / (1 + share),
    )


dual_focal = position(_value, _slopes)


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
    r"""Compute the dual focal loss of a softmax against one class index per position.

    With `p_t` the softmax probability of the position's own class and `p_j` the largest
    probability that is below it (0 where there is none), each loss is

        alpha_t * (1 - p_t + p_j)**gamma * (-log p_t)

    which calibrates: the focal loss is content with a `p_t` that leads, this one with a lead.
    `p_j` is differentiated.

    Args:
      logits: `[..., C, ...]`, floating, as in `softmax_focal_loss_with_integer_labels`.
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
      class_axis_name: mapped axes that the classes are spread over, as in
        `softmax_focal_loss_with_integer_labels`.

    Returns:
      The losses, of the labels' shape, not reduced. float32 for 16-bit logits (which are
      computed in float32), else of the logits' dtype.

    Raises:
      ValueError: as `softmax_focal_loss_with_integer_labels`.
      NameError: for a `class_axis_name` that is not bound here.

    Differentiation: reverse mode in logits, alpha and gamma, any number of times, and forward
      over reverse. Of several classes that share `p_j`, the first has the derivative. Forward
      mode alone is refused by `jax.custom_vjp`;
      `focal_jax.reference.dual_focal_loss_with_integer_labels` has it.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import dual_focal_loss_with_integer_labels
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.5]])
      >>> losses = dual_focal_loss_with_integer_labels(logits, jnp.array([0, 0]), gamma=2.0)
      >>> [round(x, 4) for x in losses.tolist()]
      [0.0245, 1.1125]

    References:
      Tao, Dong, Xu. [Dual Focal Loss for Calibration](https://arxiv.org/abs/2305.13665). ICML
      2023.
    """
    return integer_head(
        dual_focal,
        logits,
        labels,
        alpha=alpha,
        axis=axis,
        ignore_label=ignore_label,
        where=where,
        class_axis_name=class_axis_name,
        of_row=_share_below,
        gamma=_inputs.exponent("gamma", gamma),
    )
