"""The loss of a softmax at one position, from its true logit and the sum over the others.

What the heads with integer labels share. They differ in how they come by the two numbers,
and between the two stands whatever adds up the numbers of several devices.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from focal_jax import _arrays, _modulation
from focal_jax._island import island
from focal_jax._varying import aligned_varying


def _losses(exponent, true, rest, weight, gamma, where):
    t = _modulation.softmax_terms(true, rest)
    gamma = _arrays.gamma_of(exponent, gamma, t.p.dtype)
    return _arrays.keep(_modulation.loss(weight, t.q, t.log_q, t.n, gamma), where)


@partial(jax.jit, static_argnums=0)
def _primal(exponent, *args):
    return island(partial(_losses, exponent), *args)


def _fwd(exponent, *args):
    return _primal(exponent, *args), args


@partial(jax.jit, static_argnums=0)
def _bwd(exponent, args, ct):
    true, rest, weight, gamma, where = args
    t = _modulation.softmax_terms(true, rest)
    g = _arrays.gamma_of(exponent, gamma, t.p.dtype)
    # log p = true - log(exp(true) + rest), so d log p/d rest is -1 over the sum, and
    # d log p/d true is rest over the sum.
    of_rest = ct * weight * _modulation.slope(t, g) / (jnp.exp(true) + rest)
    unweighted = ct * _modulation.unweighted(t, g)
    values = -rest * of_rest, of_rest, unweighted, weight * unweighted * t.log_q
    return *map(partial(_arrays.cotangent_of, where=where), args, values), None


_core = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_core.defvjp(_fwd, _bwd)


def label_weight(alpha: Array, labels: Array, classes: int) -> Array:
    """Return each position's own weight, and NaN at an impossible label.

    `alpha` is a scalar or has one weight per class. NaN is loud, and never another class.
    """
    if alpha.ndim:
        # Sharded as the labels are: on a mesh with explicit axes that has to be said.
        alpha = alpha.at[labels].get(mode="clip", out_sharding=jax.typeof(labels).sharding)
    return jnp.where((labels >= 0) & (labels < classes), alpha, jnp.nan)


def losses(
    exponent: int | float | None,
    true: Array,
    rest: Array,
    weight: Array,
    gamma: Array | None,
    where: Array | None,
) -> Array:
    """Return the losses of the positions, of the shape of `true`.

    `true` and `rest` are the true class's logit and the sum over the other classes of
    exp(logit), both less the largest logit of the position; `exponent` and `gamma` what
    `_arrays.split_gamma` made of gamma. The arrays have one rank. Differentiable in
    `true`, `rest`, `weight` and `gamma`.
    """
    return _core(exponent, *aligned_varying(true, rest, weight, gamma, where))
