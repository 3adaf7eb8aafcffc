"""Sums over the classes of `features @ kernel + bias` in chunks, and their gradients.

The class sums and the sums over all classes (label smoothing) are loops over the chunks. The
backward pass computes the logits of each chunk again.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from focal_jax.engine import arguments, every_class, row_statistics, rows
from focal_jax.engine.chunks import (
    Chunk,
    ChunkSpec,
    Linear,
    call,
    chunk_of,
    fold,
    gradients,
    recomputed,
)
from focal_jax.engine.class_axis import ClassSums, pick_class
from focal_jax.engine.every_class import ClassArgs, Smoothing
from focal_jax.engine.options import unwrap
from focal_jax.engine.platform import by_platform
from focal_jax.engine.rows import RowSums, Split

# ---------------------------------------------------------------- class sums


def _no_sums(linear: Linear) -> ClassSums:
    zero = linear.zeros()
    # The initial maximum is finite: if every logit is -inf, -inf - -inf would be NaN.
    return ClassSums(jnp.full_like(zero, jnp.finfo(zero.dtype).min), zero, zero)


def _max_logit(z: Array) -> Array:
    return lax.stop_gradient(jnp.max(z, -1, keepdims=True, initial=-jnp.inf))


def _sums_in_passes(spec: ChunkSpec, linear: Linear, labels: Array) -> ClassSums:
    """Return the class sums by one pass over each chunk for the maximum and one for the sum."""

    @recomputed
    def step(size, sums, start):
        chunk = chunk_of(spec, linear, size, start)
        z = chunk.logits
        top = jnp.maximum(sums.max_logit, _max_logit(z))
        e = jnp.where(chunk.class_index == labels, 0, jnp.exp(z - top))
        return ClassSums(
            top,
            sums.label_logit + pick_class(z, labels - chunk.class_index[..., :1], z.ndim - 1),
            sums.rest * jnp.exp(sums.max_logit - top) + jnp.sum(e, -1, keepdims=True),
        )

    return fold(step, _no_sums(linear), spec, linear)


# In one pass, a logit may exceed the largest logit of the earlier chunks by at most this.
_MAX_JUMP = 64.0


@custom_vmap
def _all_small(jump: Array) -> Array:
    """Return whether all jumps are within the bound. A NaN is not."""
    return jnp.all(jump <= _MAX_JUMP)


@_all_small.def_vmap
def _(size, batched, jump):
    # One unbatched predicate: `vmap` turns a `cond` with a batched predicate into a `select`, which
    # would always compute both branches.
    del size, batched
    return _all_small(jump), False


def _sums_in_one_pass(spec: ChunkSpec, linear: Linear, labels: Array) -> ClassSums:
    """Return the class sums by one pass, which an accelerator computes during the product.

    The exponentials are relative to the largest logit of the earlier chunks, so that they do not
    wait for the maximum of their own chunk, and the logits are not written to memory. If a chunk
    exceeds the earlier ones by so much that exponentials could overflow, everything is computed
    again in passes.
    """

    @recomputed
    def step(size, carry, start):
        sums, jump = carry
        chunk = chunk_of(spec, linear, size, start)
        z, is_label = chunk.logits, chunk.class_index == labels
        top = jnp.maximum(sums.max_logit, _max_logit(z))
        e = jnp.where(is_label, 0, jnp.exp(jnp.minimum(z - sums.max_logit, _MAX_JUMP)))
        rest = sums.rest + jnp.sum(e, -1, keepdims=True)
        label_logit = jnp.sum(jnp.where(is_label, z, 0), -1, keepdims=True)
        factor = jnp.exp(sums.max_logit - top)
        sums = ClassSums(top, sums.label_logit + label_logit, rest * factor)
        return sums, jnp.maximum(jump, top - carry[0].max_logit)

    # The first chunk has no earlier chunk. Its largest logit is estimated from a few classes.
    initial = _no_sums(linear)
    few = chunk_of(spec, linear, min(128, linear.kernel.shape[spec.class_axis]), jnp.int32(0))
    sums = initial._replace(max_logit=jnp.maximum(initial.max_logit, _max_logit(few.logits)))
    sums, jump = fold(step, (sums, jnp.zeros_like(sums.max_logit)), spec, linear)
    all_small = _all_small(lax.stop_gradient(jump))
    # A select outside the `cond`: the results of a conditional stay in a TPU's slow memory.
    in_passes = partial(_sums_in_passes, spec)
    again = lax.cond(all_small, lambda linear, _: _no_sums(linear), in_passes, linear, labels)
    return jax.tree.map(partial(jnp.where, all_small), sums, again)


def _sums(spec: ChunkSpec, linear: Linear, labels: Array, where: Array | None) -> ClassSums:
    on_cpu, elsewhere = (partial(form, spec) for form in (_sums_in_passes, _sums_in_one_pass))
    return by_platform(on_cpu, elsewhere, linear.mask(where), labels)


def _sums_forward(spec, *args):
    sums = _sums(spec, *args)
    return sums, (args, lax.stop_gradient(sums.max_logit))


def _sums_backward(spec, residuals, cts: ClassSums):
    (linear, labels, where), top = residuals

    def of_chunk(chunk):
        e = jnp.exp(chunk.logits - top)
        return jnp.where(chunk.class_index == labels, cts.label_logit, cts.rest * e), (), None

    return gradients(spec, linear, where, of_chunk)[0], None, None


_class_sums = jax.custom_vjp(_sums, nondiff_argnums=(0,))
_class_sums.defvjp(_sums_forward, _sums_backward)


def class_sums(spec: ChunkSpec, linear: Linear, labels: Array, where: Array | None) -> ClassSums:
    """Return the class sums of `features @ kernel + bias`."""
    return call(_class_sums, spec, linear, labels, where)


# ---------------------------------------------------------------- sums over all classes


class _Spec(NamedTuple):
    """The static arguments of the sum over all classes."""

    loss: Any  # a PositionLoss
    chunks: ChunkSpec
    smoothing: Smoothing


def _inputs(spec: _Spec, args: ClassArgs, row: RowSums, chunk: Chunk):
    """Return the arguments of `every_class.class_values` and `class_slopes` for a chunk."""
    x = chunk.logits - row.max_logit
    y = spec.smoothing.weights(chunk.class_index == args.labels, x.dtype)
    alpha = arguments.align(chunk.take(args.logits.alpha), x.shape).astype(x.dtype)
    options = arguments.cast_and_mask(args.options, x.dtype, args.where)
    return spec.loss, x, row.exps, y, alpha, {k: unwrap(v) for k, v in options.items()}


def _row_of(spec: _Spec, args: ClassArgs) -> RowSums:
    row = args.row
    if row is None:
        row = row_statistics.row_of(
            row_statistics.of_chunks(spec.chunks, args.logits, None, args.where)
        )
    return row._replace(max_logit=lax.stop_gradient(row.max_logit))


def _losses(spec: _Spec, with_slopes: bool, args: ClassArgs, row: RowSums) -> tuple[Array, Split]:
    """Return the losses and, if asked for, the sums of the slopes."""
    masked = args.logits.mask(args.where)

    @recomputed
    def step(size, carry, start):
        inputs = _inputs(spec, args, row, chunk_of(spec.chunks, masked, size, start))
        arrays = [every_class.class_values(*inputs)]
        if with_slopes:
            by_n = every_class.class_slopes(*inputs).by_n
            arrays += [by_n, rows.zero_near_max(inputs[1], by_n)]
        return [total + jnp.sum(x, -1, keepdims=True) for total, x in zip(carry, arrays)]

    zero = masked.zeros()
    losses, *slopes = fold(step, [zero] * (3 if with_slopes else 1), spec.chunks, masked)
    invalid = jnp.array(False) if args.invalid is None else args.invalid
    losses = arguments.mask_and_invalidate(losses, invalid, args.where)
    total, rest = slopes or (zero, zero)
    return losses, Split(total - rest, rest)


def _smoothed(spec: _Spec, linear: Linear, others: ClassArgs) -> Array:
    args = others._replace(logits=linear)
    return _losses(spec, False, args, _row_of(spec, args))[0]


def _smoothed_forward(spec: _Spec, linear: Linear, others: ClassArgs):
    args = others._replace(logits=linear)
    row = _row_of(spec, args)
    losses, slopes = _losses(spec, True, args, row)
    return losses, (args, row, slopes, losses)


def _smoothed_backward(spec: _Spec, residuals, ct: Array):
    args, row, slopes, losses = residuals
    # A NaN cotangent makes every gradient NaN to which an invalid label contributes.
    one = arguments.mask_and_invalidate(jnp.ones_like(losses), jnp.isnan(losses), args.where)
    ct = arguments.scale_cotangent(ct, one)

    def of_chunk(chunk):
        inputs = _inputs(spec, args, row, chunk)
        x, found = inputs[1], every_class.class_slopes(*inputs)
        if args.row is None:
            dz = rows.whole_gradient(x, row.exps, found.by_n, slopes)
        else:
            dz = rows.direct_gradient(x, row.exps, found.by_n)

        def of_option(name):
            of_leaf = lambda leaf: arguments.cotangent_like(leaf, ct * found.options[name])  # noqa: E731
            return jax.tree.map(of_leaf, args.options[name])

        of_alpha = jnp.sum(ct * found.alpha, range(dz.ndim - 1))
        return ct * dz, {name: of_option(name) for name in args.options}, of_alpha

    totals = jax.tree.map(jnp.zeros_like, args.options)
    of_linear, of_options = gradients(spec.chunks, args.logits, args.where, of_chunk, totals)
    of_row = None
    if args.row is not None:
        of_exps = rows.row_cotangent(row.exps, slopes)
        of_exps = jax.tree.map(lambda slope: ct * slope, of_exps)
        of_row = RowSums(jnp.zeros_like(row.max_logit), of_exps)
    return of_linear, ClassArgs(None, None, None, of_options, None, None, of_row)


_smoothed_core = jax.custom_vjp(_smoothed, nondiff_argnums=(0,))
_smoothed_core.defvjp(_smoothed_forward, _smoothed_backward)


def sum_over_classes(loss: Any, chunks: ChunkSpec, args: ClassArgs, smoothing: Smoothing) -> Array:
    """Return the loss of smoothed labels for each position, with a class axis of size 1.

    Like `every_class.sum_over_classes`, but `args.logits` is a `Linear`, with `alpha`.
    """
    others = args._replace(logits=None)
    return call(_smoothed_core, _Spec(loss, chunks, smoothing), args.logits, others)
