"""Sigmoid focal loss: every logit a binary classification of its own."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _arrays, _checks, _modulation
from focal_jax._island import island
from focal_jax._varying import aligned_varying


class _Terms(NamedTuple):
    """The scalar's terms for a label that may be soft, and what their slopes need."""

    q: Array  # 1 - p_t
    n: Array  # binary cross entropy
    log_q: Array
    fall: Array  # P Q / q, with P = sigmoid(z) and Q = sigmoid(-z)
    ratio: Array  # n / q


@jax.custom_jvp
def _terms(z: Array, y: Array) -> _Terms:
    """Return the terms of logit `z` and label `y`: sums of products, no cancellation."""
    size = jnp.abs(z)
    p1, p0, log1p = _modulation.halves(z, jnp.exp(-size))
    q = y * p0 + (1 - y) * p1
    wrong = jnp.where(z >= 0, 1 - y, y)  # the weight of the side that z is not on

    def cross_entropy(weight):
        return log1p + jnp.where(weight == 0, 0, weight * size)

    n = cross_entropy(wrong)
    # Of a hard label 1 - p_t is the other side's probability, known to the last digit.
    log_q = jnp.where((y == 0) | (y == 1), -cross_entropy(1 - wrong), jnp.log(q))
    log_q = jnp.maximum(log_q, _modulation.least_log(q))
    return _Terms(q, n, log_q, _modulation.divide(p1 * p0, q), _modulation.divide(n, q))


@_terms.defjvp
def _terms_jvp(primals, tangents):
    (z, y), (dz, dy) = primals, tangents
    t, s = _modulation.sigmoid_terms(z), _terms(z, y)
    ratio, steep = _modulation.bounded(s.ratio), (1 - 2 * y) * s.fall
    tilt, dn = t.q - t.p, (1 - y) * t.p - y * t.q
    z = _modulation.bounded(z)
    lean = _modulation.divide(tilt, s.q)
    return s, _Terms(
        q=(1 - 2 * y) * t.p * t.q * dz + tilt * dy,
        n=dn * dz - z * dy,
        log_q=steep * dz + lean * dy,
        fall=s.fall * ((tilt - steep) * dz - lean * dy),
        ratio=(_modulation.divide(dn, s.q) - ratio * steep) * dz
        - (_modulation.divide(z, s.q) + ratio * lean) * dy,
    )


def _inputs(logits: Array, labels: Array, where: Array | None) -> tuple[Array, Array]:
    dtype = _arrays.compute_dtype(logits)
    z, y = (_arrays.keep(x.astype(dtype), where) for x in (logits, labels))
    return z, y


def _weight(y: Array, positive: Array | None, negative: Array | None) -> Array:
    if positive is None or negative is None:
        return jnp.ones((), y.dtype)
    return y * positive.astype(y.dtype) + (1 - y) * negative.astype(y.dtype)


def _invalid(y: Array) -> Array:
    # A label outside [0, 1] is an error in the data: NaN, and not an extrapolation.
    return y * (1 - y) < 0


def _losses(exponent, logits, labels, positive, negative, gamma, where):
    z, y = _inputs(logits, labels, where)
    s = _terms(z, y)
    gamma = _arrays.gamma_of(exponent, gamma, y.dtype)
    losses = _modulation.loss(_weight(y, positive, negative), s.q, s.log_q, s.n, gamma)
    return _arrays.keep(jnp.where(_invalid(y), jnp.nan, losses), where)


@partial(jax.jit, static_argnums=0, inline=True)
def _slopes(exponent, logits, labels, positive, negative, gamma, where):
    """Return the derivatives of the losses in every argument but the last."""
    z, y = _inputs(logits, labels, where)
    t, s = _modulation.sigmoid_terms(z), _terms(z, y)
    gamma = _arrays.gamma_of(exponent, gamma, y.dtype)
    weight = _weight(y, positive, negative)
    z, n, ratio = (_modulation.bounded(x) for x in (z, s.n, s.ratio))
    m = _modulation.power(s.q, s.log_q, gamma)

    # d(q^g n) = q^g (dn + g n dq/q); dq/q and n/q have no pole
    dz = weight * m * ((1 - y) * t.p - y * t.q + gamma * ((1 - 2 * y) * s.fall * n))
    dy = weight * m * (gamma * (ratio * (t.q - t.p)) - z)
    if positive is not None:
        dy = dy + m * n * (positive - negative).astype(y.dtype)
    dz = jnp.where(_invalid(y), jnp.nan, dz)
    return dz, dy, m * n * y, m * n * (1 - y), weight * m * n * s.log_q


@partial(jax.jit, static_argnums=0)
def _primal(exponent, *args):
    return island(partial(_losses, exponent), *args)


def _fwd(exponent, *args):
    losses = _primal(exponent, *args)
    return losses, (args, losses)


@partial(jax.jit, static_argnums=0)
def _bwd(exponent, residuals, ct):
    args, losses = residuals
    *differentiable, where = args

    def cotangent(i, primal):
        if not _arrays.differentiable(primal):
            return None
        # The losses are not needed again, but their memory is: on CPU a fresh array costs
        # more than the arithmetic.
        slope = island(lambda *args: _slopes(exponent, *args)[i], *args, after=losses)
        return _arrays.cotangent_of(primal, ct * slope, where)

    return *(cotangent(*x) for x in enumerate(differentiable)), None


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
    exponent, dynamic = _arrays.split_gamma(gamma, logits.shape, dtype)
    mask = _arrays.mask(where, logits.shape)
    if alpha is None:
        positive = negative = None
    else:
        positive = _arrays.option("alpha", alpha, dtype)
        _checks.broadcastable("alpha", positive, logits.shape, "the losses")
        negative = 1 - positive
    align = partial(jax.tree.map, lambda x: _arrays.aligned(x, logits.shape))
    args = aligned_varying(logits, *align((labels, positive, negative, dynamic, mask)))
    return _core(exponent, *args)
