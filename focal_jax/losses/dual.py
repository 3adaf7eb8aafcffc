"""Dual focal loss: its weight also depends on the most probable class below the label's class."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax.catalogue import declare
from focal_jax.engine import exponent, scalar
from focal_jax.engine.arguments import INT32, mask_to_zero
from focal_jax.engine.class_sums import (
    AxisName,
    ClassSums,
    cast_logits,
    class_index,
    pick_class,
    reduce_classes,
)
from focal_jax.engine.options import CLASS_WEIGHTS
from focal_jax.engine.platform import by_platform
from focal_jax.engine.position import PositionLoss
from focal_jax.engine.scalar import Terms
from focal_jax.engine.sharding import cast_to_common_varying

# ---------------------------------------------------------------- the next class below


class _Next(NamedTuple):
    """The largest logit below the label's logit, or -inf, and the index of its first class."""

    z: Array
    place: Any


def _largest_in_passes(axis: int, z: Array) -> _Next:
    if not z.shape[axis]:
        nothing = jnp.zeros_like(jnp.sum(z, axis, keepdims=True))
        return _Next(nothing - jnp.inf, nothing.astype(jnp.int32))
    index = jnp.argmax(z, axis, keepdims=True).astype(jnp.int32)
    return _Next(pick_class(z, index, axis), index)


def _largest_in_one_pass(axis: int, z: Array) -> _Next:
    def combine(a, b):
        first = (a.z > b.z) | ((a.z == b.z) & (a.place < b.place))
        return jax.tree.map(partial(jnp.where, first), a, b)

    # Added to an array of zeros, the index is sharded as the logits are.
    index = class_index(z, axis) + jnp.zeros_like(z, jnp.int32)
    initial = _Next(jnp.asarray(-jnp.inf, z.dtype), jnp.int32(INT32.max))
    return reduce_classes(axis, _Next(z, index), initial, combine)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _next_below(axis: int, logits: Array, label_logit: Array, where: Array | None) -> _Next:
    z = cast_logits(logits, where)
    below = jnp.where(z < label_logit, z, -jnp.inf)
    forms = (partial(form, axis) for form in (_largest_in_passes, _largest_in_one_pass))
    return by_platform(*forms, below)


@_next_below.defjvp
def _next_below_jvp(axis, primals, tangents):
    found, dz = _next_below(axis, *primals), cast_logits(tangents[0], primals[2])
    dz = jnp.where(found.z == -jnp.inf, 0, pick_class(dz, found.place, axis))
    return found, _Next(dz, np.zeros(found.place.shape, jax.dtypes.float0))


def _below_primal(axis: int, *args) -> Array:
    return _next_below(axis, *args).z


def _below_forward(axis, *args):
    return _below_primal(axis, *args), args


def _below_backward(axis, args, ct):
    # A comparison with the index: the derivative of a gather is a scatter.
    logits, label_logit, where = args
    is_next = class_index(logits, axis) == _next_below(axis, *args).place
    ct = jnp.where(is_next & (cast_logits(logits, where) < label_logit), ct, 0)
    return mask_to_zero(ct, where).astype(logits.dtype), jnp.zeros_like(label_logit), None


_below = jax.custom_vjp(_below_primal, nondiff_argnums=(0,))
_below.defvjp(_below_forward, _below_backward)


def _share(
    axis: int,
    class_axis_name: AxisName | None,
    logits: Array,
    sums: ClassSums,
    where: Array | None,
) -> Array:
    """Return `p_j / (1 - p_t)`, the share of the next class below among the other classes."""
    label_logit = lax.stop_gradient(sums.label_logit)
    below: Array = _below(axis, *cast_to_common_varying(logits, label_logit, where))
    if class_axis_name is not None:
        # The largest over the shards, taken from the first device that has it.
        own = lax.stop_gradient(below)
        index, size = lax.axis_index(class_axis_name), lax.axis_size(class_axis_name)
        holds = jnp.where(own == lax.pmax(own, class_axis_name), index, size)
        is_first = lax.pmin(holds, class_axis_name) == index
        below = lax.psum(jnp.where(is_first, below, 0), class_axis_name)
    return jnp.exp(below - sums.max_logit - _log(sums.rest))


@jax.custom_jvp
def _log(x: Array) -> Array:
    return jnp.log(jnp.maximum(x, jnp.finfo(x.dtype).tiny))


@_log.defjvp
def _log_jvp(primals, tangents):
    # 1 / x**2 would be infinite where the derivatives that it is a factor of are finite.
    return _log(*primals), scalar.divide(tangents[0], primals[0])


# ---------------------------------------------------------------- the loss


def _enlarge(t: Terms, share: Array) -> Terms:
    """Return the terms with `1 - p_t + p_j` for q, where `p_j = share * (1 - p_t)`.

    p becomes minus the derivative of that q in `log p_t`.
    """
    factor = 1 + share
    log_q = t.log_q + scalar.log1p(share)
    return Terms(t.p * factor, t.q * factor, t.n, log_q, t.n_over_q / factor)


def _value(terms, gamma, share):
    return scalar.focal(_enlarge(terms, share), gamma)


def _slopes(terms, gamma, share):
    t = _enlarge(terms, share)
    focal = scalar.focal(t, gamma)
    return scalar.minus_dfocal_dlog_p(t, gamma), focal * t.log_q, gamma * focal / (1 + share)


_loss = PositionLoss(_value, _slopes, {"gamma": exponent(5.0)}, row_option=("share", _share))


@declare("position", ("integer",), {"alpha": CLASS_WEIGHTS} | _loss.options)
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
    return_logsumexp: bool = False,
) -> Any:
    r"""Compute the dual focal loss of a softmax and one class index per position.

    With `p_t` the softmax probability of the label's class and `p_j` the largest probability below
    `p_t` (0 if there is none):

        loss = alpha_t * (1 - p_t + p_j)**gamma * (-log p_t)

    The loss calibrates: its weight falls with the distance between `p_t` and `p_j`, and not with
    `p_t` alone. `p_j` is differentiated. If several classes have the probability `p_j`, the first
    gets the derivative.

    The other arguments are those of `softmax_focal_loss_with_integer_labels`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import dual_focal_loss_with_integer_labels
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.5]])
      >>> losses = dual_focal_loss_with_integer_labels(logits, jnp.array([0, 0]), gamma=2.0)
      >>> [round(x, 4) for x in losses.tolist()]
      [0.0245, 1.1125]

    Args:
      gamma: focusing exponent, at least 0.

    Returns:
      The losses, of the labels' shape; or with `return_logsumexp` a pair with the log-sum-exp.

    References:
      [Tao et al. 2023, Dual Focal Loss for Calibration](https://arxiv.org/abs/2305.13665).
    """
    return _loss(**locals())
