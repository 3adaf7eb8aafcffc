"""Losses of a softmax position as functions of the log-probability of the true class."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax.engine import arguments, scalar
from focal_jax.engine.arguments import shown
from focal_jax.engine.options import check_call, check_names, prepare_options
from focal_jax.engine.position import PositionLoss
from focal_jax.engine.sharding import place_like


@check_call
def of_log_probability(
    loss: Callable[..., Any],
    log_probability: ArrayLike,
    *,
    where: ArrayLike | None = None,
    **options: Any,
) -> Array:
    """Compute a loss of a softmax position from the log-probability of the true class.

    `p = exp(log_probability)`, and `1 - p` is computed without cancellation. The log-probability
    can come from any head, for example from `focal_jax.linear_token_statistics`.

    Example:
      >>> import jax.numpy as jnp
      >>> import focal_jax
      >>> loss = focal_jax.softmax_focal_loss_with_integer_labels
      >>> found = focal_jax.token_statistics(jnp.array([[2.0, 0.0, 0.0]]), jnp.array([0]))
      >>> losses = focal_jax.engine.of_log_probability(loss, found.log_probability, gamma=2.0)
      >>> [round(x, 4) for x in losses.tolist()]
      [0.0109]

    Args:
      loss: a loss of `position_loss`, or a function of this package with integer labels.
      log_probability: `[...]`, floating, at most 0; NaN gives NaN.
      where: mask of the losses.
      **options: the options of the loss besides `alpha`.

    Returns:
      The losses, `[...]`.

    Raises:
      InputError: for a loss that is not a function of the log-probability alone.
    """
    declaration: Any = getattr(loss, "declaration", None)
    position: Any = getattr(declaration, "engine_loss", None)
    wanted = "a loss of a softmax and class indices"
    arguments.require(
        isinstance(position, PositionLoss), f"loss: got {shown(loss)}, wanted {wanted}"
    )
    name = declaration.name
    got = f"loss: got {name}, which needs a whole row of logits"
    wanted = "a loss of the log-probability of the label's class alone"
    arguments.require(position.row_option is None, f"{got}, wanted {wanted}")
    check_names(name, position.options, options)
    log_p = arguments.floating_array("log_probability", log_probability)
    dtype = arguments.compute_dtype(log_p)
    prepared = prepare_options(position.options, options, log_p.shape, dtype)
    mask = arguments.mask_array(where, log_p.shape)
    prepared, mask = place_like(log_p, (prepared, mask))
    log_p = arguments.mask_to_zero(log_p.astype(dtype), mask)
    one = jnp.ones((1,) * log_p.ndim, dtype)
    return position.of_sums(log_p, -scalar.expm1(log_p), one, prepared, mask, ~(log_p <= 0))
