"""The engine of the losses of one logit.

A loss is two functions of a logit and a label: its value, and its slopes. All else that a
loss needs is done here, once for all of them: dtypes, masks, impossible labels, the
custom_vjp, what is computed again in the backward pass, shapes and dtypes of the cotangents,
mesh axes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs, _scalar
from focal_jax._cpu import compiled_apart
from focal_jax._varying import aligned_varying


def not_a_probability(y: Array) -> Array:
    """Return where labels are outside [0, 1]: an error in the data, not an extrapolation."""
    return ~((y >= 0) & (y <= 1))


def elementwise(
    value: Callable[..., Array],
    slopes: Callable[..., tuple[Array | None, ...]],
    *,
    impossible: Callable[[Array], Array] = not_a_probability,
) -> Callable[..., Array]:
    """Make a loss of its value and its slopes.

    Args:
      value: `(x, y, *options) -> losses`, of a `Logit`, labels and options that broadcast
        to the logit, all in the dtype of the loss.
      slopes: of the same arguments, a tuple: the derivative of the value in the logit, in
        the label and in each option. JAX differentiates these for the higher derivatives.
        What is not asked for is not computed.
      impossible: says which labels are none. Loss and slopes are NaN there.

    Returns:
      `losses(logits, labels, *, where, **options)`: checks and prepares its arguments, then
      computes the losses. The options go to the two functions in the order of the call, each
      None, an `Exponent`, a number or an array.
    """

    def prepared(again, logits, labels, options, where):
        kept = _inputs.Kept(_inputs.compute_dtype(logits), where)
        z, y, options = kept((logits, labels, options))
        if again:  # in other words, as the logit: see `_scalar.logit`
            y = _scalar.in_other_words(y)
        wrong = jnp.array(False) if labels.dtype == bool else impossible(y)
        return _scalar.logit(z, again=again), jnp.where(wrong, 0, y), options, wrong

    def losses(*args):
        x, y, options, wrong = prepared(False, *args)
        return _inputs.finished(value(x, y, *options), wrong, args[-1])

    def every_slope(*args):
        x, y, options, wrong = prepared(True, *args)
        every = slopes(x, y, *options)
        return tuple(x if x is None else _inputs.finished(x, wrong, args[-1]) for x in every)

    @jax.jit
    def primal(*args):
        return compiled_apart(losses, *args)

    def forward(*args):
        result = primal(*args)
        return result, (args, result)

    @jax.jit
    def backward(residuals, ct):
        args, result = residuals
        logits, labels, options, _ = args
        traced = jax.jit(every_slope, inline=True)  # once for all the cotangents

        def cotangent(i, primal):
            if not _inputs.differentiable(primal):
                return None
            # The losses are not needed again, but their memory is: on CPU a fresh array costs
            # more than the arithmetic.
            slope = compiled_apart(lambda *args: traced(*args)[i], *args, after=result)
            return _inputs.cotangent_of(primal, _inputs.times(ct, slope))

        trees = enumerate((logits, labels, *options))
        logits, labels, *options = (jax.tree.map(partial(cotangent, i), tree) for i, tree in trees)
        return logits, labels, tuple(options), None

    core = jax.custom_vjp(primal)
    core.defvjp(forward, backward)

    def checked(logits: ArrayLike, labels: ArrayLike, *, where=None, **options: Any) -> Array:
        logits = _inputs.floating("logits", logits)
        labels = _checks.array("labels", labels)
        _checks.real("labels", labels)
        _checks.broadcastable("labels", labels, logits.shape, "the logits")
        dtype = _inputs.compute_dtype(logits)
        mask = _inputs.aligned_mask(where, logits.shape)
        labels = _inputs.aligned(labels, logits.shape)
        prepared = _inputs.options(options, logits.shape, dtype)
        return core(*aligned_varying(logits, labels, prepared, mask))

    return checked
