"""Asymmetric loss: a focusing exponent for each label, and easy negatives that do not count."""

import numbers
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs, _scalar
from focal_jax._elementwise import elementwise
from focal_jax._scalar import Logit, Terms


@jax.custom_jvp
def _shifted(x: Logit, margin: Array) -> Terms:
    """Return the terms of a negative whose score is less by the margin: `q = max(s - margin, 0)`.

    With a margin of 0 they are those of the negated logit.
    """
    t = _scalar.sigmoid_terms(x)
    m, p = jnp.maximum(t.p - margin, 0), jnp.minimum(t.q + margin, 1)
    near_one = _scalar.log1p(-jnp.minimum(p, 0.5))
    near_zero = -_scalar.log1p(-jnp.minimum(m, 0.5))
    # Where p underflows there is no margin, and the logit itself is left.
    n = jnp.where(m < 0.5, near_zero, jnp.minimum(-jnp.log(p), -t.log_q))
    log_m = jnp.where(p < 0.5, near_one, jnp.maximum(jnp.log(m), _scalar.least_log(m)))
    return Terms(p, m, n, log_m, jnp.where(m == 0, 1, _scalar.divide(n, m)))


def _share(t: Terms, margin: Array) -> Array:
    """Return `(1 - s) / (1 - s + margin)`, which is 1 without a margin."""
    return 1 / (1 + _scalar.divide(margin, t.q))


@_shifted.defjvp
def _shifted_jvp(primals, tangents):
    (x, margin), (dx, dmargin) = primals, tangents
    t, m = _scalar.sigmoid_terms(x), _shifted(*primals)
    counts = m.q > 0
    dm = jnp.where(counts, t.p * t.q * dx.z - dmargin, 0)
    dn = jnp.where(counts, t.p * _share(t, margin) * dx.z - _scalar.divide(dmargin, m.p), 0)
    dlog_m = _scalar.divide(dm, m.q)
    n_over_m = _scalar.divide(dn, m.q) - _scalar.bounded(m.n_over_q) * dlog_m
    return m, Terms(-dm, dm, dn, dlog_m, n_over_m)


def _value(
    x: Logit,
    y: Array,
    gamma_positive: _inputs.Exponent,
    gamma_negative: _inputs.Exponent,
    margin: Array,
) -> Array:
    t, m = _scalar.sigmoid_terms(x), _shifted(x, margin)
    positive = _scalar.loss(y, t.q, t.log_q, t.n, gamma_positive.value)
    return positive + _scalar.loss(1 - y, m.q, m.log_q, m.n, gamma_negative.value)


def _slopes(
    held: bool,
    x: Logit,
    y: Array,
    gamma_positive: _inputs.Exponent,
    gamma_negative: _inputs.Exponent,
    margin: Array,
):
    t, m, not_y = _scalar.sigmoid_terms(x), _shifted(x, margin), 1 - y

    # What the weights are made of, and how much of the derivative is theirs.
    of_weights = (t.q, t.log_q), (m.q, m.log_q)
    of_positive, of_negative = lax.stop_gradient(of_weights) if held else of_weights
    g_positive, g_negative = (0 if held else g.value for g in (gamma_positive, gamma_negative))
    w_positive = _scalar.power(*of_positive, gamma_positive.value)
    w_negative = _scalar.power(*of_negative, gamma_negative.value)
    n_over_m = _scalar.bounded(m.n_over_q)
    falls = w_positive * (t.q + g_positive * (t.p * _scalar.bounded(t.n)))
    rises = w_negative * (t.p * (_share(t, margin) + g_negative * (n_over_m * t.q)))
    by_margin = w_negative * (1 / jnp.maximum(m.p, jnp.finfo(y.dtype).tiny))
    by_margin = by_margin + w_negative * (g_negative * n_over_m)
    counts = m.q > 0
    n_positive, n_negative = _scalar.bounded(t.n), _scalar.bounded(m.n)
    return (
        jnp.where(counts, not_y * rises, 0) - y * falls,
        w_positive * n_positive - w_negative * n_negative,
        # The larger factors first: the others alone may underflow.
        y * (w_positive * (n_positive * of_positive[1])),
        not_y * (w_negative * (n_negative * of_negative[1])),
        jnp.where(counts, -not_y * by_margin, 0),
    )


_LOSSES = {held: elementwise(_value, partial(_slopes, held)) for held in (False, True)}


def asymmetric_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma_positive: ArrayLike = 0.0,
    gamma_negative: ArrayLike = 4.0,
    margin: ArrayLike = 0.05,
    stop_weight_gradient: bool = False,
    where: ArrayLike | None = None,
) -> Array:
    r"""Compute the asymmetric loss of many labels of which few are present.

    With `s = sigmoid(logits)`, the label `y` and `m = max(s - margin, 0)`, each element's
    loss is

        -y (1 - s)**gamma_positive * log s - (1 - y) m**gamma_negative * log(1 - m)

    so that a negative whose score is below the margin does not count at all. Without a margin
    this is a focal loss with an exponent for each label.

    Args:
      logits: `[...]`, floating: log-odds.
      labels: real or bool, of a shape that broadcasts to the logits': 1 or True for a
        positive, 0 for a negative, or a probability in between. A label outside `[0, 1]`
        gives NaN at its position.
      gamma_positive: focusing exponent of the positives, 0 or more. A Python number or an
        array that broadcasts to the losses.
      gamma_negative: that of the negatives. Likewise.
      margin: what the score of a negative is reduced by, in [0, 1). A number or an array
        that broadcasts to the losses.
      stop_weight_gradient: whether the scores in the weights are constants to
        differentiation; in the authors' code, `disable_torch_grad_focal_loss`.
      where: bool, broadcasts to the losses: positions where it is False have loss 0 and
        gradient 0, whatever the inputs hold there.

    Returns:
      The losses, `[...]` as the logits, not reduced. float32 for 16-bit logits (which are
      computed in float32), else of the logits' dtype.

    Raises:
      ValueError: for logits that are not floating, shapes that do not broadcast to the
        logits', a `where` that is not bool, a negative Python exponent, a Python margin
        outside [0, 1), or a `stop_weight_gradient` that is not a Python bool.

    Differentiation: reverse mode in logits, labels, the exponents and the margin, any number
      of times, and forward over reverse. Where the score is the margin, the derivative is
      that of `m = 0`, as relu's. Forward mode alone is refused by `jax.custom_vjp`;
      `focal_jax.reference.asymmetric_loss` has it.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import asymmetric_loss
      >>> losses = asymmetric_loss(jnp.array([-3.0, 0.0, 0.0]), jnp.array([0, 0, 1]))
      >>> [f"{x:.2e}" for x in losses.tolist()]
      ['0.00e+00', '2.45e-02', '6.93e-01']

    References:
      Ridnik, Ben-Baruch, Zamir, Noy, Friedman, Protter, Zelnik-Manor. [Asymmetric Loss For
      Multi-Label Classification](https://arxiv.org/abs/2009.14119). ICCV 2021.
    """
    if isinstance(margin, numbers.Real):
        _checks.static_margin("margin", margin)
    return _LOSSES[_checks.flag("stop_weight_gradient", stop_weight_gradient)](
        logits,
        labels,
        gamma_positive=_inputs.exponent("gamma_positive", gamma_positive),
        gamma_negative=_inputs.exponent("gamma_negative", gamma_negative),
        margin=_checks.given("margin", margin),
        where=where,
    )
