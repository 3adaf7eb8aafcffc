"""Sums over the class axis: the largest logit, the label's logit, and the rest of the softmax.

Two forms compute the same numbers. An accelerator is limited by the bytes that it reads, so one
reduction computes everything in one pass. The form for CPUs is in `cpu_sums.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from focal_jax.engine import arguments, scalar
from focal_jax.engine.class_axis import (
    ClassSums,
    Labels,
    cast_logits,
    class_index,
    exp_excluding,
    pick_class,
    reduce_classes,
    zero_at,
)
from focal_jax.engine.platform import by_platform
from focal_jax.engine.rules import with_gradient
from focal_jax.engine.sharding import AxisName, cast_to_common_varying

# ---------------------------------------------------------------- the form for accelerators


def _in_one_pass(axis: int, gradient: bool, logits: Array, labels: Labels, where) -> ClassSums:
    """Return the class sums by one reduction that reads the logits once, for accelerators."""
    del gradient
    z = cast_logits(logits, where)
    least, index = jnp.finfo(z.dtype).min, class_index(logits, axis)
    label_logits = tuple(jnp.where(index == label, z, 0) for label in labels)
    # With a single class, exp(logit - max) is 1, or 0 if the logit is -inf.
    one = zero_at(jnp.where(z == -jnp.inf, 0, jnp.ones_like(z)), index, *labels)

    def combine(a, b):
        top = jnp.maximum(a.max_logit, b.max_logit)
        rest = a.rest * jnp.exp(a.max_logit - top) + b.rest * jnp.exp(b.max_logit - top)
        return ClassSums(top, jax.tree.map(jnp.add, a.label_logit, b.label_logit), rest)

    zero = jnp.zeros((), z.dtype)
    initial = ClassSums(zero + least, (zero,) * len(labels), zero)
    return reduce_classes(
        axis, ClassSums(jnp.maximum(z, least), label_logits, one), initial, combine
    )


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _plain_class_sums(
    axis: int, gradient: bool, logits: Array, labels: Labels, where: Array | None
) -> ClassSums:
    """Return the class sums for use in `custom_vjp` rules; differentiable in both modes."""
    from focal_jax.engine import cpu_sums  # not loaded with the package

    forms = (partial(form, axis, gradient) for form in (cpu_sums.class_sums, _in_one_pass))
    return by_platform(*forms, logits, labels, where)


@_plain_class_sums.defjvp
def _plain_class_sums_jvp(axis, gradient, primals, tangents):
    logits, labels, where = primals
    sums = _plain_class_sums(axis, gradient, *primals)
    dz, top = cast_logits(tangents[0], where), lax.stop_gradient(sums.max_logit)
    e = exp_excluding(logits, class_index(logits, axis), labels, top, where)
    of_labels = tuple(pick_class(dz, label, axis) for label in labels)
    return sums, ClassSums(jnp.zeros_like(top), of_labels, jnp.sum(e * dz, axis, keepdims=True))


# ---------------------------------------------------------------- the custom_vjp

_jitted = jax.jit(_plain_class_sums, static_argnums=(0, 1))


def _primal(axis, *args):
    return _jitted(axis, False, *args)


def _forward(axis, *args):
    sums = _jitted(axis, True, *args)
    return sums, (args, lax.stop_gradient(sums.max_logit))


def _backward(axis, residuals, cts):
    from focal_jax.engine import cpu_sums

    (logits, labels, where), top = residuals
    index = class_index(logits, axis)
    args = logits, index, labels, top, where
    on_cpu = cpu_sums.exponentials(axis, True, logits)
    dz = cts.rest * by_platform(on_cpu, exp_excluding, *args)
    finish = partial(arguments.mask_to_zero, where=where)
    dz, *of_labels = (finish(x).astype(logits.dtype) for x in (dz, *cts.label_logit))

    def select(dz, labels, of_labels):
        for label, of_label in zip(labels, of_labels):
            dz = jnp.where(index == label, of_label, dz)
        return dz

    on_cpu = partial(cpu_sums.write_at_labels, axis, select)
    return by_platform(on_cpu, select, dz, labels, of_labels), None, None


_core = with_gradient(_primal, _forward, _backward, num_static=1)


def class_sums(axis: int, logits: Array, labels: Labels, where: Array | None) -> ClassSums:
    """Return the class sums; `rest` excludes the classes at all labels.

    The exponentials are recomputed in the backward pass and not stored.
    """
    return _core(axis, *cast_to_common_varying(logits, labels, where))


def sum_over_shards(sums: ClassSums, class_axis_name: AxisName | None) -> ClassSums:
    """Return the sums over all classes from the sums of this device's classes.

    The collectives stand outside the `custom_vjp`: there JAX transposes them correctly in every
    mode of `jax.shard_map`. They exchange three numbers per position.
    """
    if class_axis_name is None:
        return sums
    own_top = lax.stop_gradient(sums.max_logit)
    top = lax.pmax(own_top, class_axis_name)
    rest = sums.rest * jnp.exp(own_top - top)
    label_logit, rest = lax.psum((sums.label_logit, rest), class_axis_name)
    return ClassSums(top, label_logit, rest)


def log_sum_exp(sums: ClassSums, invalid: Array, where: Array | None) -> Array:
    """Return the log-sum-exp of the logits, 0 where masked; also correct for invalid labels.

    The sum of `exp(logit - max)` is at least 1. Its excess over 1 is computed without cancellation
    if the label's class dominates. An invalid label adds nothing to the sum.
    """
    top = lax.stop_gradient(sums.max_logit)
    label_logit = jnp.where(invalid, -jnp.inf, sums.label_logit - top)
    excess = scalar.expm1(label_logit)
    return arguments.mask_to_zero(top + jnp.log1p(excess + sums.rest), where)
