"""Statistics of tokens: log-probability, log-sum-exp, entropy and argmax of a softmax."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax.engine import arguments, row_statistics
from focal_jax.engine.chunks import scale_logits
from focal_jax.engine.class_axis import cast_logits
from focal_jax.engine.head import DenseSource, labels_and_mask
from focal_jax.engine.linear import linear_source, prepare_temperature
from focal_jax.engine.options import check_call
from focal_jax.engine.rules import keep_rules
from focal_jax.engine.sharding import check_not_varying, place_like

__all__ = ["TokenStatistics", "linear_token_statistics", "token_statistics"]


class TokenStatistics(NamedTuple):
    """Statistics of the softmax of each position, in the shape of the labels.

    Attributes:
      log_probability: the logarithm of the probability of the label's class.
      logsumexp: `log(sum(exp(logits)))`.
      entropy: `-sum(p * log(p))`, in nats, at least 0.
      argmax: int32, the index of the first class with the largest logit. It has no derivative.
    """

    log_probability: Array
    logsumexp: Array
    entropy: Array
    argmax: Array


@check_call
def token_statistics(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    temperature: ArrayLike = 1.0,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
) -> TokenStatistics:
    r"""Compute log-probability, log-sum-exp, entropy and argmax of each position.

    With `z = logits / temperature`, `p = softmax(z)` and the label `t`:

        log_probability = log p_t
        logsumexp       = log(sum over c of exp(z_c))
        entropy         = -sum over c of p_c log p_c

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import token_statistics
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
      >>> found = token_statistics(logits, jnp.array([0, 2]))
      >>> [[round(x, 4) for x in row.tolist()] for row in found[:3]]
      [[-0.2395, -1.0986], [2.2395, 1.0986], [0.6656, 1.0986]]
      >>> found.argmax.tolist()
      [0, 0]

    Args:
      logits: `[..., C, ...]`: unnormalized log-probabilities.
      labels: class indices, of the logits' shape without the class axis. An invalid label makes
        the log-probability NaN; the other statistics do not depend on it.
      axis: the class axis.
      temperature: a number > 0, or an array that broadcasts to the labels.
      ignore_label: all statistics of positions with this label are 0.
      where: mask of the statistics.
      class_axis_name: as in `softmax_focal_loss_with_integer_labels`. `argmax` refers to all
        classes.

    Returns:
      `TokenStatistics`, with arrays of the labels' shape.
    """
    logits = arguments.floating_array("logits", logits)
    axis = arguments.static_axis(axis, logits.ndim)
    positions = logits.shape[:axis] + logits.shape[axis + 1 :]
    dtype = arguments.compute_dtype(logits)
    divisor = prepare_temperature(temperature, positions, dtype, axis, logits.shape[axis])
    source = DenseSource(axis)
    return _statistics(source, logits, labels, ignore_label, where, class_axis_name, divisor)


@check_call
def linear_token_statistics(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    logit_softcap: float | None = None,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    mesh: Any = None,
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
) -> TokenStatistics:
    r"""Compute the statistics of a linear layer's softmax without storing its logits.

    The logits are `features @ kernel + bias`; then the softcap applies, then the temperature. One
    pass over the chunks of classes computes all statistics, a second pass their gradient. The
    arguments that are not listed are those of `linear_softmax_focal_loss_with_integer_labels`.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import linear_token_statistics
      >>> features, kernel = jnp.array([[1.0, 0.0]]), jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
      >>> found = linear_token_statistics(features, kernel, jnp.array([0]), temperature=2.0)
      >>> [round(x.item(), 4) for x in found]
      [-0.5514, 1.5514, 0.9753, 0]

    Args:
      labels: class indices, `[...]`.
      temperature: a number > 0, or an array that broadcasts to the labels.
      ignore_label: all statistics of positions with this label are 0.
      where: mask of the statistics.

    Returns:
      `TokenStatistics`, with arrays `[...]`.
    """
    of_logits = bias, transpose_kernel, logit_softcap, chunk_size, mesh, class_axis_name
    source, arrays, name = linear_source(features, kernel, *of_logits, temperature)
    return _statistics(source, arrays, labels, ignore_label, where, name)


def _statistics(
    source: Any, logits: Any, labels, ignore_label, where, class_axis_name, divisor=None
) -> TokenStatistics:
    """Return the statistics; `divisor` is the temperature of an array of logits."""
    axis = source.axis(logits)
    labels, mask, num_classes = labels_and_mask(
        source, logits, labels, ignore_label, where, class_axis_name
    )
    check_not_varying({} if divisor is None else {"temperature": divisor}, class_axis_name)
    labels, mask, divisor = place_like(jax.tree.leaves(logits)[0], (labels, mask, divisor))
    if divisor is not None:  # XLA fuses the division into the reductions
        divisor = divisor if mask is None else jnp.where(mask, divisor, 1)
        logits = scale_logits(cast_logits(logits, mask), 1 / divisor)
    row = row_statistics.of_source(source, logits, class_axis_name, labels, mask)
    invalid = (labels < 0) | (labels >= num_classes)
    return TokenStatistics(*(y.squeeze(axis) for y in _of_row(row, labels, invalid, mask)))


@keep_rules  # jitted, so that `jax_debug_nans` sees no NaN of a masked position
def _of_row(row: Any, labels: Array, invalid: Array, mask: Array | None) -> list[Array]:
    """Return the statistics with a class axis of size 1."""
    total_minus_1 = (row.at_max - 1) + row.rest
    log_probability = _log_probability(*row_statistics.of_picked(row, labels), total_minus_1)
    log_probability = jnp.where(invalid, jnp.nan, log_probability)
    is_finite = row.top > jnp.finfo(row.top.dtype).min  # else every logit is -inf
    logsumexp = row.top + jnp.log1p(total_minus_1)
    logsumexp = jnp.where(is_finite, logsumexp, -jnp.inf)
    found = log_probability, logsumexp, row_statistics.entropy(row), row.max_class
    return [arguments.mask_to_zero(y, mask) for y in found]


@jax.custom_jvp
def _log_probability(x: Array, others: Array, total_minus_1: Array) -> Array:
    """Return `x - log(total)`; `others` is the total without the exponential of x."""
    del others  # for the derivative
    return x - jnp.log1p(total_minus_1)


@_log_probability.defjvp
def _log_probability_jvp(primals, tangents):
    # The derivative in x of the two terms, `1 - p`, would cancel for a probability near 1.
    (_, others, total_minus_1), (dx, d_others, _) = primals, tangents
    return _log_probability(*primals), (others * dx - d_others) / (1 + total_minus_1)
