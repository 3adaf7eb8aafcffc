"""What label smoothing adds to a loss of a position: its sum over all the classes.

Smoothed labels are `(1 - s) * onehot + s / C`, and each class counts with its own probability.
The loss is then `(1 - s)` times that of the label, plus `s / C` times the sum of what every class
would have as the label. A class's part of that sum needs its logit and the position's
log-sum-exp, nothing else: one more pass over the logits, and nothing of their size is kept.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from focal_jax import _inputs, _scalar
from focal_jax._class_sums import kept
from focal_jax._cpu import compiled_apart
from focal_jax._position import PositionLoss
from focal_jax._scalar import Terms
from focal_jax._varying import aligned_varying


@jax.custom_jvp
def _terms(n: Array) -> Terms:
    """Return the terms of a class from its `n = -log p` alone."""
    n = jnp.maximum(n, 0)
    p, q = jnp.exp(-n), -jnp.expm1(-n)
    # Where p is small, q is 1 to the last digit and its logarithm is -p, not 0.
    log_q = jnp.where(p < 0.5, _scalar.log1p(-jnp.minimum(p, 0.5)), jnp.log(q))
    n_over_q = jnp.where(q == 0, 1, _scalar.divide(n, q))
    return Terms(p, q, n, jnp.maximum(log_q, _scalar.least_log(n)), n_over_q)


@_terms.defjvp
def _terms_jvp(primals, tangents):
    t, dn = _terms(*primals), tangents[0]
    dp = t.p * dn
    # (1 - p n / q) / q cancels for a small n: there its series takes over.
    near = 0.5 + t.n / 6 - t.n**3 / 180
    far = _scalar.divide(1 - t.p * _scalar.bounded(t.n_over_q), t.q)
    return t, Terms(-dp, dp, dn, _scalar.divide(dp, t.q), jnp.where(t.n < 0.1, near, far) * dn)


def values(loss: PositionLoss, z: Array, log_whole: Array, options: tuple) -> Array:
    """Return the losses that all the classes have, each as the label.

    `z` is the logit less the largest one, `log_whole` the logarithm of the sum of its
    exponentials; the options are those of the loss, with a weight for each class.
    """
    return loss.value(_terms(log_whole - z), *options)


def slopes(loss: PositionLoss, z: Array, log_whole: Array, options: tuple) -> tuple[Any, ...]:
    """Return the derivatives of the losses in `-log p`, and in each option."""
    return loss.slopes(_terms(log_whole - z), *options)


def _prepared(logits: Array, top: Array, log_whole: Array, options: Any, where: Array | None):
    z = kept(logits, where)
    return z - top, log_whole, _inputs.Kept(z.dtype, where)(options)


def _values(loss, logits, top, log_whole, options, where):
    return _inputs.keep(values(loss, *_prepared(logits, top, log_whole, options, where)), where)


def _by_n(loss, logits, top, log_whole, options, where):
    by_n, *_ = slopes(loss, *_prepared(logits, top, log_whole, options, where))
    return _inputs.keep(by_n, where)


@partial(jax.jit, static_argnums=(0, 1))
def _primal(loss, axis, *args):
    return jnp.sum(compiled_apart(partial(_values, loss), *args), axis, keepdims=True)


def _forward(loss, axis, *args):
    return _primal(loss, axis, *args), args


@partial(jax.jit, static_argnums=(0, 1))
def _backward(loss, axis, args, ct):
    logits, *_, options, where = args
    by_n = compiled_apart(partial(_by_n, loss), *args)
    _, *by_options = slopes(loss, *_prepared(*args))

    def of_tree(slope, tree):
        slope = _inputs.keep(slope, where)
        return jax.tree.map(lambda x: _inputs.cotangent_of(x, ct * slope), tree)

    of_log_whole = ct * jnp.sum(by_n, axis, keepdims=True)
    of_options = tuple(map(of_tree, by_options, options))
    return (-ct * by_n).astype(logits.dtype), None, of_log_whole, of_options, None


_core = jax.custom_vjp(_primal, nondiff_argnums=(0, 1))
_core.defvjp(_forward, _backward)


def over_classes(
    loss: PositionLoss,
    axis: int,
    logits: Array,
    top: Array,
    log_whole: Array,
    options: tuple,
    where: Array | None,
) -> Array:
    """Return the sum over the classes of the loss that each has as the label.

    The logits, and the weights that are the first option, may be a slice of the classes;
    `top` and `log_whole` are of them all. All of one rank. The derivative in the
    log-sum-exp is that of `log_whole`; in `top`, which stands on both sides, there is none.
    """
    args = aligned_varying(logits, jax.lax.stop_gradient(top), log_whole, options, where)
    return _core(loss, axis, *args)


def weights_of_slice(alpha: Array, size: int, start: Array | None) -> Array:
    """Return one weight for each class of a slice that begins at `start`, or for all of them."""
    if alpha.ndim and start is not None:
        return jax.lax.dynamic_slice_in_dim(alpha, start, size)
    return jnp.broadcast_to(alpha, (size,))


def smoothed(losses: Array, every: Array, smoothing: float, classes: int) -> Array:
    """Return the losses of smoothed labels, from those of the labels and the sum over all."""
    return (1 - smoothing) * losses + smoothing / classes * every
