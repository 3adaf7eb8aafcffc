"""Focal Tversky loss: the overlap of each class with its region, over all positions."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax.catalogue import declare
from focal_jax.engine import arguments, exponent, number, scalar
from focal_jax.engine.options import prepare_options, unwrap
from focal_jax.engine.rules import keep_rules
from focal_jax.engine.sharding import cast_to_common_varying, place_like

_OPTIONS = {
    "alpha": number(0.7, low=0.0, per_class=True),
    "beta": number(0.3, low=0.0, per_class=True),
    "gamma": exponent(0.75, per_class=True),
    "smooth": number(1.0, low=0.0, per_class=True),
}


@jax.custom_jvp
def _shares(wrong: Array, right: Array) -> tuple[Array, Array]:
    """Return 1 - TI and TI. Each is a quotient, because the difference of 1 and TI would cancel."""
    total = right + wrong
    # If the total is 0, the class is absent and not predicted.
    return scalar.divide(wrong, total), jnp.where(total == 0, 1, scalar.divide(right, total))


@_shares.defjvp
def _shares_jvp(primals, tangents):
    # Autodiff of the quotient would form TI as 1 - (1 - TI), which cancels if the class is absent.
    (wrong, right), (one_minus_index, index) = primals, _shares(*primals)
    change = index * tangents[0] - one_minus_index * tangents[1]
    slope = scalar.divide(change, right + wrong)
    return (one_minus_index, index), (slope, -slope)


@partial(jax.jit, static_argnums=(0, 1))
def _losses(axis, axis_name, logits, labels, options, where):
    from focal_jax.engine.every_class import class_probabilities  # most programs do not use it

    dtype = arguments.compute_dtype(logits)
    y = arguments.cast_and_mask(labels, dtype, where)
    _, invalid = arguments.clip_labels(labels, y, 1)
    # The derivative is 1, also at the bounds. XLA:GPU does not fuse the result of `clip_labels`.
    y = y + lax.stop_gradient(jnp.clip(y, 0, 1) - y)
    y = jnp.where(invalid, jnp.nan, y)
    p, q = class_probabilities(axis, logits, where)
    positions = tuple(i for i in range(logits.ndim) if i != axis)
    counts = [
        jnp.sum(arguments.mask_to_zero(x, where), positions) for x in (y * p, y * q, (1 - y) * p)
    ]
    tp, fn, fp = counts if axis_name is None else lax.psum(counts, axis_name)
    options = place_like(tp, arguments.cast_and_mask(options, dtype, None))
    alpha, beta, gamma, smooth = (unwrap(options[name]) for name in _OPTIONS)
    one_minus_index, index = keep_rules(_shares)(alpha * fn + beta * fp, tp + smooth)
    log_abs = scalar.log_abs(one_minus_index, index)
    return scalar.abs_power(one_minus_index, log_abs, gamma)


@declare("region", ("one-hot", "distribution"), _OPTIONS)
def focal_tversky_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike = 0.7,
    beta: ArrayLike = 0.3,
    gamma: ArrayLike = 0.75,
    axis: int = -1,
    smooth: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    r"""Compute the focal Tversky loss of each class, over all positions together.

    With `p` the softmax of the logits along the class axis, `y` the labels, and TP, FN and FP the
    sums of `y p`, `y (1 - p)` and `(1 - y) p` over all positions:

        TI   = (TP + smooth) / (TP + alpha FN + beta FP + smooth)
        loss = (1 - TI)**gamma

    With `alpha = beta = 0.5` the index TI is Dice's. MONAI's `TverskyLoss` weights the false
    positives by its alpha. Abraham and Khan write the exponent as `1 / gamma`, with gamma 4/3.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from focal_jax import focal_tversky_loss
      >>> logits = jnp.array([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
      >>> labels = jax.nn.one_hot(jnp.array([0, 1, 1]), 2)
      >>> [round(x, 4) for x in focal_tversky_loss(logits, labels).tolist()]
      [0.234, 0.3071]

    Args:
      logits: `[..., C, ...]`: unnormalized log-probabilities.
      labels: `[..., C, ...]`: one-hot or class probabilities; `jax.nn.one_hot` converts class
        indices. A label outside [0, 1] makes the loss of its class NaN.
      alpha: weight of the false negatives, at least 0: a number or `[C]`.
      beta: weight of the false positives, at least 0: a number or `[C]`.
      gamma: exponent, at least 0: a number or `[C]`.
      axis: the class axis. All other axes are summed over, also the batch axis. `jax.vmap` gives
        one loss per image.
      smooth: number or `[C]` that is added to numerator and denominator. With 0, a class that is
        absent and not predicted has loss 0.
      where: bool, broadcasts to the logits' shape without the class axis: the positions that count.
      axis_name: mapped axes over which the positions are sharded. The counts are summed over them.

    Returns:
      The losses, `[C]`.

    References:
      [Abraham et al. 2019, A Novel Focal Tversky loss function with improved Attention U-Net for
      lesion segmentation](https://arxiv.org/abs/1810.07842).
      [Salehi et al. 2017, Tversky loss function for image segmentation using 3D fully convolutional
      deep networks](https://arxiv.org/abs/1706.05721).
    """
    from focal_jax.engine import checks  # not loaded with the package

    logits, labels, axis, positions = checks.distribution_over_classes(logits, labels, axis)
    arguments.check_axis_name("axis_name", axis_name)
    given = {"alpha": alpha, "beta": beta, "gamma": gamma, "smooth": smooth}
    dtype, num_classes = arguments.compute_dtype(logits), logits.shape[axis]
    options = prepare_options(_OPTIONS, given, (num_classes,), dtype)
    mask = arguments.mask_array(where, positions, axis)
    # The options are not cast, because the sums over the devices do not vary over the mesh axes.
    placed = place_like(logits, (labels, mask))
    logits, labels, mask = cast_to_common_varying(logits, *placed)
    return _losses(axis, axis_name, logits, labels, options, mask)
