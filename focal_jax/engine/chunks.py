"""The linear head: computes `features @ kernel + bias` for one chunk of classes at a time.

The class sums, the sums over all classes (label smoothing) and their gradients are loops over the
chunks. The backward pass computes the logits of each chunk again.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from focal_jax.engine import arguments, every_class, rows, scalar
from focal_jax.engine.class_sums import ClassSums, pick_class
from focal_jax.engine.every_class import ClassArgs, Smoothing
from focal_jax.engine.options import unwrap
from focal_jax.engine.platform import by_platform
from focal_jax.engine.rows import Row, SlopeSums, Split
from focal_jax.engine.sharding import cast_to_common_varying


class ChunkSpec(NamedTuple):
    """The static description of the logits."""

    size: int  # classes per chunk
    softcap: float | None
    class_axis: int  # of the kernel: -1, or 0 for a transposed kernel


class Linear(NamedTuple):
    """The arrays that the logits are computed from."""

    features: Array  # [..., D]
    kernel: Array  # [D, C], or [C, D] for a transposed kernel
    bias: Array | None  # [C]
    temperature: Array | None = None  # broadcasts to the positions, with a class axis of size 1

    def mask(self, where: Array | None) -> "Linear":
        """Return the arrays with features 0 and temperature 1 where the mask is False."""
        if where is None:
            return self
        divisor = None if self.temperature is None else jnp.where(where, self.temperature, 1)
        features = arguments.mask_to_zero(self.features, where)
        return self._replace(features=features, temperature=divisor)

    def zeros(self) -> Array:
        """Return 0 for each position, with a class axis of size 1.

        Made from the features, so that inside `shard_map` it varies over the same mesh axes.
        """
        return jnp.zeros_like(self.features[..., :1], arguments.compute_dtype(self.features))


class _Chunk(NamedTuple):
    """The logits of some classes at every position."""

    kernel: Array  # [D, size], or [size, D]
    logits: Array  # [..., size]
    class_index: Array  # aligned with the logits
    through: Callable[[Array], Array]  # from their gradient to that of `features @ kernel + bias`
    take: Callable[[Array], Array]  # slices an array of all classes


def _matmul(class_axis: int, x: Array, kernel: Array) -> Array:
    """Return `x @ kernel`, where `class_axis` is the output axis of the kernel.

    The factors have the dtype of `x`; the sum is accumulated in the dtype of the loss.
    """
    kernel = (kernel if class_axis else kernel.T).astype(x.dtype)
    return jnp.matmul(x, kernel, preferred_element_type=arguments.compute_dtype(x))


@jax.custom_jvp
def _tanh_slope(x: Array) -> Array:
    """Return the derivative of tanh. `1 - tanh(x)**2` would cancel for large x."""
    e = jnp.exp(-2 * jnp.abs(x))
    return 4 * e / (1 + e) ** 2


@_tanh_slope.defjvp
def _tanh_slope_jvp(primals, tangents):
    slope = _tanh_slope(*primals)
    return slope, -2 * jnp.tanh(primals[0]) * slope * tangents[0]


def _apply_softcap(softcap: float, x: Array) -> tuple[Array, Array]:
    """Return the capped logits and their derivative. A logit of -inf stays -inf."""
    scaled = x / softcap
    # A small logit is returned as it is: divided by a huge softcap it would underflow.
    unchanged = (jnp.abs(scaled) < jnp.finfo(x.dtype).eps ** 0.5) | (x == -jnp.inf)
    return jnp.where(unchanged, x, softcap * jnp.tanh(scaled)), _tanh_slope(scaled)


def _fold(step: Callable[..., Any], carry: Any, spec: ChunkSpec, linear: Linear) -> Any:
    """Return the carry after `carry = step(size, carry, start)` for every chunk.

    The last chunk is smaller if the chunk size does not divide the number of classes. It is
    computed first: the loop depends on it, so XLA frees its arrays before the loop. After the
    loop, XLA could compute the chunk's products early and keep them during the loop.
    """
    whole, rest = divmod(linear.kernel.shape[spec.class_axis], max(1, spec.size))
    if rest:
        carry = step(rest, carry, jnp.int32(whole * spec.size))
    starts = spec.size * jnp.arange(whole, dtype=jnp.int32)
    carry, _ = lax.scan(lambda carry, start: (step(spec.size, carry, start), None), carry, starts)
    return carry


def _chunk(spec: ChunkSpec, linear: Linear, size: int, start: Array) -> _Chunk:
    """Return the chunk of `size` classes from `start` on."""
    take = partial(
        lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=spec.class_axis
    )
    kernel = take(linear.kernel)
    logits = _matmul(spec.class_axis, linear.features, kernel)
    if linear.bias is not None:
        logits += arguments.align(take(linear.bias).astype(logits.dtype), logits.shape)
    class_index = arguments.align(start + jnp.arange(size, dtype=jnp.int32), logits.shape)
    factors = []
    if spec.softcap is not None:
        logits, factor = _apply_softcap(spec.softcap, logits)
        factors.append(factor)
    if linear.temperature is not None:
        factors.append(1 / linear.temperature)
        logits = logits * factors[-1]
    return _Chunk(kernel, logits, class_index, lambda slope: math.prod(factors, start=slope), take)


# A step is recomputed, not stored, if a gradient is differentiated again.
_recomputed = partial(jax.checkpoint, prevent_cse=False, static_argnums=(0,))


def _gradients(
    spec: ChunkSpec,
    linear: Linear,
    where: Array | None,
    of_chunk: Callable[[_Chunk], tuple[Array, Any, Any]],
    totals: Any,
    per_class: Any,
) -> tuple[Linear, Any, Any]:
    """Return the cotangents of the arrays, the totals and the arrays per class.

    `of_chunk` returns the gradient of a chunk's logits, terms that are added to `totals`, and the
    chunk's entries of the arrays `per_class`.
    """
    masked = linear.mask(where)

    @_recomputed
    def parts(size, start):
        chunk = _chunk(spec, masked, size, start)
        slope, terms, of_classes = of_chunk(chunk)
        of_temperature = None
        if linear.temperature is not None:
            moved = arguments.mask_to_zero(slope * scalar.clip_inf(chunk.logits), where)
            of_temperature = -jnp.sum(moved, -1, keepdims=True)
        slope = arguments.mask_to_zero(chunk.through(slope), where)
        _, transpose = jax.vjp(partial(_matmul, spec.class_axis, masked.features), chunk.kernel)
        of_bias = None if linear.bias is None else jnp.sum(slope, range(slope.ndim - 1))
        of_features = _matmul(-1 - spec.class_axis, slope, chunk.kernel)
        return of_features, (*transpose(slope), of_bias), (terms, of_temperature), of_classes

    def step(size, carry, start):
        def put(whole, part):
            part = part.astype(whole.dtype)
            return lax.dynamic_update_slice_in_dim(whole, part, start, spec.class_axis)

        features, parameters, totals, per_class = carry
        of_features, of_parameters, terms, of_classes = parts(size, start)
        return (
            features + of_features,
            jax.tree.map(put, parameters, of_parameters),
            jax.tree.map(jnp.add, totals, terms),
            jax.tree.map(put, per_class, of_classes),
        )

    # Every entry per class is written once, so the initial values do not matter. The arguments'
    # own values as initial values take less memory on a TPU than zeros.
    initial = (linear.kernel, linear.bias), per_class
    parameters, per_class = jax.tree.map(lax.stop_gradient, initial)
    features = jnp.zeros_like(linear.features, arguments.compute_dtype(linear.features))
    temperature = None if linear.temperature is None else linear.zeros()
    carry = features, parameters, (totals, temperature), per_class
    carry = _fold(step, carry, spec, linear)
    features, (kernel, bias), (totals, temperature), per_class = carry
    features = arguments.mask_to_zero(features, where).astype(linear.features.dtype)
    if linear.temperature is not None:
        of_temperature = temperature / linear.temperature
        temperature = arguments.cotangent_like(linear.temperature, of_temperature)
    return Linear(features, kernel, bias, temperature), totals, per_class


# ---------------------------------------------------------------- class sums


def _no_sums(linear: Linear) -> ClassSums:
    zero = linear.zeros()
    # Finite, because -inf - -inf would be NaN if no class is left.
    return ClassSums(jnp.full_like(zero, jnp.finfo(zero.dtype).min), zero, zero)


def _max_logit(z: Array) -> Array:
    return lax.stop_gradient(jnp.max(z, -1, keepdims=True, initial=-jnp.inf))


def _sums_in_passes(spec: ChunkSpec, linear: Linear, place: Array) -> ClassSums:
    """Return the class sums by one pass over each chunk for the maximum and one for the sum."""

    @_recomputed
    def step(size, sums, start):
        chunk = _chunk(spec, linear, size, start)
        z = chunk.logits
        top = jnp.maximum(sums.max_logit, _max_logit(z))
        e = jnp.where(chunk.class_index == place, 0, jnp.exp(z - top))
        return ClassSums(
            top,
            sums.label_logit + pick_class(z, _place_in(chunk, place), z.ndim - 1),
            sums.rest * jnp.exp(sums.max_logit - top) + jnp.sum(e, -1, keepdims=True),
        )

    return _fold(step, _no_sums(linear), spec, linear)


def _place_in(chunk: _Chunk, place: Array) -> Array:
    """Return the class index within the chunk."""
    return place - chunk.class_index[..., :1]


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


def _sums_in_one_pass(spec: ChunkSpec, linear: Linear, place: Array) -> ClassSums:
    """Return the class sums by one pass, which an accelerator computes during the product.

    The exponentials are relative to the largest logit of the earlier chunks, so that they do not
    wait for the maximum of their own chunk, and the logits are not written to memory. If a chunk
    exceeds the earlier ones by so much that exponentials could overflow, everything is computed
    again in passes.
    """

    @_recomputed
    def step(size, carry, start):
        sums, jump = carry
        chunk = _chunk(spec, linear, size, start)
        z, is_label = chunk.logits, chunk.class_index == place
        top = jnp.maximum(sums.max_logit, _max_logit(z))
        e = jnp.where(is_label, 0, jnp.exp(jnp.minimum(z - sums.max_logit, _MAX_JUMP)))
        rest = sums.rest + jnp.sum(e, -1, keepdims=True)
        label_logit = jnp.sum(jnp.where(is_label, z, 0), -1, keepdims=True)
        factor = jnp.exp(sums.max_logit - top)
        sums = ClassSums(top, sums.label_logit + label_logit, rest * factor)
        return sums, jnp.maximum(jump, top - carry[0].max_logit)

    # The first chunk has no earlier chunk. Its largest logit is estimated from a few classes.
    initial = _no_sums(linear)
    few = _chunk(spec, linear, min(128, linear.kernel.shape[spec.class_axis]), jnp.int32(0))
    sums = initial._replace(max_logit=jnp.maximum(initial.max_logit, _max_logit(few.logits)))
    sums, jump = _fold(step, (sums, jnp.zeros_like(sums.max_logit)), spec, linear)
    all_small = _all_small(lax.stop_gradient(jump))
    # A select outside the `cond`: the results of a conditional stay in a TPU's slow memory.
    in_passes = partial(_sums_in_passes, spec)
    again = lax.cond(all_small, lambda linear, _: _no_sums(linear), in_passes, linear, place)
    return jax.tree.map(partial(jnp.where, all_small), sums, again)


@partial(jax.jit, static_argnums=0)
def _sums(spec: ChunkSpec, linear: Linear, place: Array, where: Array | None) -> ClassSums:
    on_cpu, elsewhere = (partial(form, spec) for form in (_sums_in_passes, _sums_in_one_pass))
    return by_platform(on_cpu, elsewhere, linear.mask(where), place)


def _sums_forward(spec, *args):
    sums = _sums(spec, *args)
    return sums, (args, lax.stop_gradient(sums.max_logit))


@partial(jax.jit, static_argnums=0)
def _sums_backward(spec, residuals, cts: ClassSums):
    (linear, place, where), top = residuals

    def of_chunk(chunk):
        e = jnp.exp(chunk.logits - top)
        return jnp.where(chunk.class_index == place, cts.label_logit, cts.rest * e), (), ()

    return _gradients(spec, linear, where, of_chunk, (), ())[0], None, None


_class_sums = jax.custom_vjp(_sums, nondiff_argnums=(0,))
_class_sums.defvjp(_sums_forward, _sums_backward)


def class_sums(spec: ChunkSpec, linear: Linear, place: Array, where: Array | None) -> ClassSums:
    """Return the class sums of `features @ kernel + bias`."""
    return _class_sums(spec, *cast_to_common_varying(linear, place, where))


# ---------------------------------------------------------------- sums over all classes


@partial(jax.jit, static_argnums=0)
def _row(spec: ChunkSpec, linear: Linear, where: Array | None) -> Row:
    masked = linear.mask(where)

    @_recomputed
    def step(size, row, start):
        z = _chunk(spec, masked, size, start).logits
        top = jnp.maximum(row.max_logit, _max_logit(z))
        x = z - top
        e, near = jnp.exp(x), rows.is_near_max(x)
        before = rows.rescale(row.exps, row.max_logit - top)
        return Row(
            top,
            Split(
                before.at_max + jnp.sum(jnp.where(near, e, 0), -1, keepdims=True),
                before.rest + jnp.sum(jnp.where(near, 0, e), -1, keepdims=True),
            ),
        )

    zero = linear.zeros()
    initial = Row(jnp.full_like(zero, jnp.finfo(zero.dtype).min), Split(zero, zero))
    row = _fold(step, initial, spec, masked)
    return row._replace(exps=rows.normalize(row.exps))


def _row_forward(spec, *args):
    row = _row(spec, *args)
    return row, (args, lax.stop_gradient(row.max_logit))


@partial(jax.jit, static_argnums=0)
def _row_backward(spec, residuals, cts: Row):
    (linear, where), top = residuals

    def of_chunk(chunk):
        return rows.row_gradient(chunk.logits - top, cts.exps), (), ()

    return _gradients(spec, linear, where, of_chunk, (), ())[0], None


_row_core = jax.custom_vjp(_row, nondiff_argnums=(0,))
_row_core.defvjp(_row_forward, _row_backward)


def row_sums(spec: ChunkSpec, linear: Linear, where: Array | None) -> Row:
    """Return the sums of the exponentials of each position."""
    return _row_core(spec, *cast_to_common_varying(linear, where))


class _Spec(NamedTuple):
    """The static arguments of the sum over all classes."""

    loss: Any  # a PositionLoss
    chunks: ChunkSpec
    smoothing: Smoothing


def _inputs(spec: _Spec, args: ClassArgs, row: Row, chunk: _Chunk):
    """Return the arguments of `every_class.class_values` and `class_slopes` for a chunk."""
    x = chunk.logits - row.max_logit
    y = spec.smoothing.weights(chunk.class_index == args.labels, x.dtype)
    alpha = arguments.align(chunk.take(args.alpha), x.shape).astype(x.dtype)
    options = arguments.cast_and_mask(args.options, x.dtype, args.where)
    return spec.loss, x, row.exps, y, alpha, {k: unwrap(v) for k, v in options.items()}


def _row_of(spec: _Spec, args: ClassArgs) -> Row:
    row = _row(spec.chunks, args.logits, args.where) if args.row is None else args.row
    return row._replace(max_logit=lax.stop_gradient(row.max_logit))


def _losses(spec: _Spec, with_slopes: bool, args: ClassArgs, row: Row) -> tuple[Array, SlopeSums]:
    """Return the losses and, if asked for, the sums of the slopes."""
    masked = args.logits.mask(args.where)

    @_recomputed
    def step(size, carry, start):
        inputs = _inputs(spec, args, row, _chunk(spec.chunks, masked, size, start))
        arrays = [every_class.class_values(*inputs)]
        if with_slopes:
            by_n = every_class.class_slopes(*inputs).by_n
            arrays += [by_n, rows.zero_near_max(inputs[1], by_n)]
        return [total + jnp.sum(x, -1, keepdims=True) for total, x in zip(carry, arrays)]

    zero = masked.zeros()
    losses, *slopes = _fold(step, [zero] * (3 if with_slopes else 1), spec.chunks, masked)
    invalid = jnp.array(False) if args.invalid is None else args.invalid
    losses = arguments.mask_and_invalidate(losses, invalid, args.where)
    total, rest = slopes or (zero, zero)
    return losses, SlopeSums(total - rest, rest)


@partial(jax.jit, static_argnums=0)
def _smoothed(spec: _Spec, args: ClassArgs) -> Array:
    return _losses(spec, False, args, _row_of(spec, args))[0]


@partial(jax.jit, static_argnums=0)
def _values_and_sums(spec: _Spec, args: ClassArgs):
    row = _row_of(spec, args)
    return *_losses(spec, True, args, row), row


def _smoothed_forward(spec: _Spec, args: ClassArgs):
    losses, slopes, row = _values_and_sums(spec, args)  # not the arguments, see `every_class`
    return losses, (args, row, slopes, losses)


@partial(jax.jit, static_argnums=0)
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
    found = _gradients(spec.chunks, args.logits, args.where, of_chunk, totals, args.alpha)
    of_linear, of_options, of_alpha = found
    of_row = None
    if args.row is not None:
        of_exps = rows.row_cotangent(row.exps, slopes)
        of_exps = jax.tree.map(lambda slope: ct * slope, of_exps)
        of_row = Row(jnp.zeros_like(row.max_logit), of_exps)
    return (ClassArgs(of_linear, None, of_alpha, of_options, None, None, of_row),)


_smoothed_core = jax.custom_vjp(_smoothed, nondiff_argnums=(0,))
_smoothed_core.defvjp(_smoothed_forward, _smoothed_backward)


def sum_over_classes(loss: Any, chunks: ChunkSpec, args: ClassArgs, smoothing: Smoothing) -> Array:
    """Return the loss of smoothed labels for each position, with a class axis of size 1.

    Like `every_class.sum_over_classes`, but `args.logits` is a `Linear` and `args.alpha` is `[C]`.
    """
    return _smoothed_core(_Spec(loss, chunks, smoothing), cast_to_common_varying(args)[0])
