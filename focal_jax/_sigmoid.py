"""Sigmoid focal loss: every logit a binary classification of its own."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _arrays, _checks, _modulation


class _SoftTerms(NamedTuple):
    """The scalar's terms for a label that is not quite hard, and two ratios of them."""

    q: Array  # 1 - p_t
    n: Array  # binary cross entropy
    log_q: Array
    share: Array  # Q / q: 1 for a hard label, also where both underflow
    ratio: Array  # n / q


@jax.custom_jvp
def _soft_terms(x: Array, u: Array) -> _SoftTerms:
    """Return the terms for margin `x` and softness `u`, the weight of the unlikelier class.

    With `P, Q, N` the hard terms of `x`, `q = Q + u (P - Q)` and `n = N + u x`: sums of
    products without cancellation, and exactly the hard terms at `u = 0`.
    """
    t = _modulation.terms(x, jnp.ones((), x.dtype))
    hard = u == 0
    q = t.q + u * (t.p - t.q)
    n = jnp.where(hard, t.n, t.n + u * x)
    safe = q + (q == 0).astype(q.dtype)
    p = t.p - u * (t.p - t.q)
    log_q = jnp.where(q < 0.5, jnp.log(safe), jnp.log1p(-p))
    return _SoftTerms(
        q,
        n,
        jnp.where(hard, t.log_q, log_q),
        jnp.where(hard, 1, t.q / safe),
        jnp.where(hard, t.ratio, n / safe),
    )


@_soft_terms.defjvp
def _soft_terms_jvp(primals, tangents):
    (x, u), (dx, du) = primals, tangents
    hard = _modulation.terms(x, jnp.ones((), x.dtype))
    s = _soft_terms(x, u)
    x, ratio = _modulation.bounded(x), _modulation.bounded(s.ratio)
    inverse = 1 / (s.q + (s.q == 0).astype(s.q.dtype))
    softness, lean = u * inverse, (hard.p - hard.q) * inverse
    fall = (1 - 2 * u) * hard.p * s.share  # -d(log q)/dx
    return s, _SoftTerms(
        q=-(1 - 2 * u) * hard.p * hard.q * dx + (hard.p - hard.q) * du,
        n=-(hard.q - u) * dx + x * du,
        log_q=-fall * dx + lean * du,
        share=-s.share * (hard.p * softness * dx + lean * du),
        ratio=(softness - s.share + ratio * fall) * dx + (x * inverse - ratio * lean) * du,
    )


def _terms(logits: Array, labels: Array, where: Array | None):
    """Return the label in float, the sign of the likelier class, x, u and the terms."""
    dtype = _arrays.compute_dtype(logits)
    z = _arrays.keep(logits.astype(dtype), where)
    y = _arrays.keep(labels.astype(dtype), where)
    likely = y >= 0.5
    sign = jnp.where(likely, 1, -1).astype(dtype)
    x, u = sign * z, jnp.where(likely, 1 - y, y)
    return y, sign, x, u, _soft_terms(x, u)


def _weight(y: Array, u: Array, positive: Array, negative: Array) -> Array:
    # A label outside [0, 1] has u < 0: it is an error in the data, so NaN and not an
    # extrapolation.
    weight = y * positive.astype(y.dtype) + (1 - y) * negative.astype(y.dtype)
    return jnp.where(u < 0, jnp.nan, weight)


def _primal(exponent, logits, labels, positive, negative, gamma, where):
    y, _, _, u, s = _terms(logits, labels, where)
    gamma = gamma.astype(y.dtype) if exponent is None else exponent
    weight = _weight(y, u, positive, negative)
    return _arrays.keep(_modulation.loss(weight, s.q, s.log_q, s.n, gamma), where)


def _fwd(exponent, *args):
    # The residuals are the inputs themselves: they cost no memory, and recomputing an
    # exponential costs less than reading it back.
    return _primal(exponent, *args), args


def _bwd(exponent, args, ct):
    logits, labels, positive, negative, gamma, where = args
    y, sign, x, u, s = _terms(logits, labels, where)
    hard = _modulation.terms(x, jnp.ones((), x.dtype))
    g = gamma.astype(y.dtype) if exponent is None else exponent
    weight = _weight(y, u, positive, negative)
    n, x = _modulation.bounded(s.n), _modulation.bounded(x)
    m = ct * _modulation.power(s.q, s.log_q, g)

    # d loss/dx = weight q^g (dn/dx + g n/q dq/dx), and n/q dq/dx has no pole
    dx = -weight * m * ((hard.q - u) + g * ((1 - 2 * u) * hard.p * n * s.share))
    du = weight * m * (x + g * (_modulation.bounded(s.ratio) * (hard.p - hard.q)))
    dy = m * n * (positive - negative).astype(y.dtype) - sign * du

    def cotangent(primal, value):
        return _arrays.cotangent_of(primal, _arrays.keep(value, where))

    return (
        cotangent(logits, sign * dx),
        cotangent(labels, dy),
        cotangent(positive, m * n * y),
        cotangent(negative, m * n * (1 - y)),
        cotangent(gamma, weight * m * n * s.log_q),
        None,
    )


_core = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_core.defvjp(_fwd, _bwd)


def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Compute the focal loss of independent binary classifications.

    With `p = sigmoid(logits)`, `p_t = y p + (1 - y)(1 - p)` and
    `alpha_t = alpha y + (1 - alpha)(1 - y)`, each element's loss is

        alpha_t * (1 - p_t)**gamma * BCE(y, p)

    where BCE is the binary cross entropy, `-y log p - (1 - y) log(1 - p)`. For a hard
    label this is the paper's `-alpha_t (1 - p_t)**gamma log p_t`; for a soft one it is
    the definition of `optax.losses.sigmoid_focal_loss`, for which this is a drop-in.

    Args:
      logits: `[...]`, floating: log-odds of the positive class.
      labels: real or bool, of a shape that broadcasts to the logits': 1 or True for a
        positive, 0 for a negative, or a probability in between. A label outside
        `[0, 1]` gives NaN at its position.
      alpha: weight of the positives, negatives weigh `1 - alpha`; None weighs both 1.
        Broadcasts to the losses.
      gamma: focusing exponent, 0 or more; 0 is the weighted cross entropy. A Python
        number or an array that broadcasts to the losses.
      where: bool, broadcasts to the losses: positions where it is False have loss 0 and
        gradient 0, whatever the inputs hold there.

    Returns:
      The losses, `[...]` as the logits, not reduced. float32 for 16-bit logits (which
      are computed in float32), else of the logits' dtype.

    Raises:
      ValueError: for logits that are not floating, shapes that do not broadcast to the
        logits', a `where` that is not bool, or a negative Python `gamma`.

    Differentiation: reverse mode in logits, labels, alpha and gamma, any number of
      times, and forward over reverse. Forward mode alone is refused by
      `jax.custom_vjp`; `focal_jax.reference.sigmoid_focal_loss` has it.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import sigmoid_focal_loss
      >>> losses = sigmoid_focal_loss(jnp.array([-20.0, 0.0, 20.0]), jnp.array([0, 1, 1]))
      >>> [f"{x:.2e}" for x in losses.tolist()]
      ['8.76e-27', '1.73e-01', '8.76e-27']

    References:
      Lin, Goyal, Girshick, He, Dollar. [Focal Loss for Dense Object
      Detection](https://arxiv.org/abs/1708.02002). ICCV 2017.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    _checks.floating("logits", logits)
    _checks.real("labels", labels)
    _checks.broadcastable("labels", labels, logits.shape, "the logits")
    dtype = _arrays.compute_dtype(logits)
    exponent, gamma = _arrays.split_gamma(gamma, logits.shape, dtype)
    where = _arrays.mask(where, logits.shape)
    if alpha is None:
        positive = negative = jnp.ones((), dtype)
    else:
        positive = _arrays.option("alpha", alpha, dtype)
        _checks.broadcastable("alpha", positive, logits.shape, "the losses")
        negative = 1 - positive
    align = partial(jax.tree.map, lambda x: _arrays.aligned(x, logits.shape))
    return _core(exponent, logits, *align((labels, positive, negative, gamma, where)))
