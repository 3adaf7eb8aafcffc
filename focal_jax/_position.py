"""The engine of the losses of one softmax position.

A loss is two functions of the true class's probability: its value, and its slopes. It works
from the true logit and the sum over the other classes, which is all that a position is to it;
the heads differ in how they come by the two numbers, and between the two stands whatever adds
up the numbers of several devices.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from focal_jax import _inputs, _scalar
from focal_jax._cpu import compiled_apart
from focal_jax._scalar import Terms
from focal_jax._varying import aligned_varying


class PositionLoss(NamedTuple):
    """A loss of a softmax position: its two functions, and the losses that are made of them."""

    value: Callable[..., Array]
    slopes: Callable[..., tuple[Array | None, ...]]
    losses: Callable[..., Array]

    def __call__(self, *args) -> Array:
        """Return `losses(*args)`."""
        return self.losses(*args)


def position(
    value: Callable[..., Array], slopes: Callable[..., tuple[Array | None, ...]]
) -> PositionLoss:
    """Make a loss of a position of its value and its slopes.

    Args:
      value: `(terms, *options) -> losses`, of the `Terms` of the true class and options that
        broadcast to them, all in the dtype of the loss.
      slopes: of the same arguments, a tuple: minus the derivative of the value in `log p`,
        then the derivative in each option. JAX differentiates these for the higher ones.

    Returns:
      The loss, which is called as `loss(true, rest, options, where, impossible)`. `true` and
      `rest` are the true class's logit and the sum over the other classes of exp(logit),
      both less the largest logit of the position; the options are None, an `Exponent` or an
      array each; `impossible` marks labels that are no class, whose loss and slopes are NaN.
      All of one rank.
    """

    def losses(true, rest, options, where, impossible):
        true, rest, options = _inputs.Kept(true.dtype, where)((true, rest, options))
        result = value(_scalar.softmax_terms(true, rest), *options)
        return _inputs.finished(result, impossible, where)

    @jax.jit
    def primal(*args):
        return compiled_apart(losses, *args)

    def forward(*args):
        return primal(*args), args

    @jax.jit
    def backward(args, ct):
        *primals, where, impossible = args
        true, rest, options = _inputs.Kept(args[0].dtype, where)(tuple(primals))
        minus_dlogp, *of_options = slopes(_scalar.softmax_terms(true, rest), *options)

        def times(slope):
            return _inputs.times(ct, _inputs.finished(slope, impossible, where))

        def of_tree(slope, tree):
            return jax.tree.map(lambda leaf: _inputs.cotangent_of(leaf, times(slope)), tree)

        # log p = true - log(exp(true) + rest), so d log p/d rest is -1 over the sum, and
        # d log p/d true is rest over the sum.
        of_rest = times(minus_dlogp / (jnp.exp(true) + rest))
        by_options = tuple(map(of_tree, of_options, primals[2]))
        return (
            *map(_inputs.cotangent_of, primals, (-rest * of_rest, of_rest)),
            by_options,
            None,
            None,
        )

    core = jax.custom_vjp(primal)
    core.defvjp(forward, backward)
    return PositionLoss(value, slopes, lambda *args: core(*aligned_varying(*args)))


def _focal_value(t: Terms, weight: Array, gamma: _inputs.Exponent) -> Array:
    return _scalar.loss(weight, t.q, t.log_q, t.n, gamma.value)


def _focal_slopes(t: Terms, weight: Array, gamma: _inputs.Exponent):
    unweighted = _scalar.unweighted(t, gamma.value)
    minus_dlogp = weight * _scalar.minus_dloss_dlogp(t, gamma.value)
    return minus_dlogp, unweighted, weight * unweighted * t.log_q


focal = position(_focal_value, _focal_slopes)


def label_weight(alpha: Array, labels: Array, classes: int) -> tuple[Array, Array]:
    """Return each position's weight, and where its label is none of the classes.

    `alpha` is a scalar or has one weight per class. What is no class has no weight of a class.
    """
    impossible = (labels < 0) | (labels >= classes)
    if alpha.ndim:
        # One more class, of weight 0, for what is none. Sharded as the labels are: on a mesh
        # with explicit axes that has to be said.
        place = jnp.where(impossible, classes, labels)
        sharding = jax.typeof(labels).sharding
        return jnp.pad(alpha, (0, 1)).at[place].get(out_sharding=sharding), impossible
    return _inputs.aligned(alpha, labels.shape), impossible
