"""The largest class of each row of logits, and sums over all other classes.

Only the class with the largest logit can have a probability above 1/2. All results are functions
of that class and of sums over the others, so none of them is a difference of nearly equal numbers:

    1 - p of the largest class = rest / (1 + rest)
    log-sum-exp                = max_logit + log1p(rest)
    entropy                    = log1p(rest) + spread / (1 + rest)

The rows are an array of logits, or `features @ kernel` in chunks. In both cases the classes may be
sharded over devices.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from focal_jax.engine import arguments, chunks, scalar
from focal_jax.engine.chunks import ChunkSpec, Linear
from focal_jax.engine.class_axis import cast_logits, class_index, pick_class
from focal_jax.engine.cpu import compile_separately
from focal_jax.engine.cpu_sums import MAX_FLOAT_INDEX, is_at_most
from focal_jax.engine.platform import by_platform
from focal_jax.engine.rows import RowSums, Split
from focal_jax.engine.sharding import AxisName, cast_to_common_varying, class_range, place_like


class RowStatistics(NamedTuple):
    """Statistics of each row, with a class axis of size 1.

    Attributes:
      max_logit: the largest logit; finite even if every logit is -inf.
      max_class: the index of the first class with that logit; -1 if there is no class.
      rest: the sum over the other classes of `exp(x)`, with `x = logit - max_logit`.
      spread: the sum over the other classes of `-x * exp(x)`.
      picked: the logits of K given classes, with a class axis of size K; 0 for an index that is
        not one of the classes; None if no classes are given.
    """

    max_logit: Array
    max_class: Array
    rest: Array
    spread: Array
    picked: Any


def row_of(found: RowStatistics) -> RowSums:
    """Return the sums of the exponentials, with the derivative in all logits."""
    top = lax.stop_gradient(found.max_logit)
    one = jnp.exp(found.max_logit - top)  # with the derivative of the largest logit
    at_max = jnp.where(top > jnp.finfo(top.dtype).min, one, 0)
    return RowSums(top, Split(at_max, found.rest * one))


def _columns(indices: Array | None, axis: int) -> list[Array]:
    """Return the indices one by one if there are few."""
    if indices is None or indices.shape[axis] > chunks.MAX_COMPARISONS:
        return []
    return [lax.index_in_dim(indices, k, axis) for k in range(indices.shape[axis])]


def _pick(z: Array, indices: Array | None, start: Any, axis: int) -> Array | None:
    if indices is None:
        return None
    columns = [pick_class(z, label - start, axis) for label in _columns(indices, axis)]
    return jnp.concatenate(columns, axis) if columns else pick_class(z, indices - start, axis)


@jax.custom_jvp
def _minimum(e: Array, distance: Array) -> Array:
    """Return `e`, which is at most 1, and 0 for a distance of 0."""
    return jnp.minimum(e, distance)


@_minimum.defjvp
def _minimum_jvp(primals, tangents):
    # The derivative of `jnp.minimum` would be 1/2 where both are 1.
    return _minimum(*primals), jnp.where(primals[1] > 0, tangents[0], 0)


def of_classes(axis: int, z: Array, start: Array | int, indices: Array | None) -> RowStatistics:
    """Return the statistics of the classes whose logits are `z`, of which the first is `start`."""
    index = class_index(z, axis)
    own = jnp.argmax(z, axis, keepdims=True).astype(jnp.int32)
    top = jnp.maximum(pick_class(z, own, axis), jnp.finfo(z.dtype).min)
    # XLA:CPU does not vectorize a sum that is fused with a select or a clamp, so a minimum excludes
    # the class. XLA:CPU writes a subexpression that both sums share to memory, and a distance
    # between integers; floats are exact for few classes.
    exact = z.dtype if is_at_most(z.shape[axis], MAX_FLOAT_INDEX) else jnp.int32
    again = by_platform(lax.optimization_barrier, lambda same: same, (own, top))
    is_last = axis == z.ndim - 1  # the sum along another axis is not fused

    def exponentials(z, index, own, top):
        distance = jnp.abs(index.astype(exact) - own.astype(exact)).astype(z.dtype)
        return _minimum(jnp.exp(z - top), distance)

    def spreads(z, index, own, top):
        x = jnp.maximum(z - top, -scalar.max_finite(z))  # finite, so that the product is
        return exponentials(z, index, own, top) * -x

    def total(function, own, top):
        compute = function if is_last else partial(compile_separately, function)
        return jnp.sum(compute(z, index, own, top), axis, keepdims=True)

    sums = total(exponentials, own, top), total(spreads, *again)
    return RowStatistics(top, own + start, *sums, _pick(z, indices, start, axis))


def _elementwise_gradient(z, index, row, cts, picked):
    """Return the gradient of the logits; `picked` has pairs of a class index and a cotangent."""
    (top, max_class, rest, spread), (of_top, of_rest, of_spread) = row, cts
    x = scalar.clip_inf(z - top)
    of_others = jnp.exp(x) * (of_rest - (1 + x) * of_spread)
    # The largest class moves the `x` of all others.
    of_max = of_top - rest * of_rest + (rest - spread) * of_spread
    dz = jnp.where(index == max_class, of_max, of_others)
    for label, ct in picked:
        dz = dz + jnp.where(index == label, ct, 0)
    return dz


def _gradient(compute: Any, axis: int, z: Array, index: Array, indices: Any, row, cts) -> Array:
    """Return the gradient of the logits."""
    pairs = list(zip(_columns(indices, axis), _columns(cts.picked, axis)))
    of_sums = cts.max_logit, cts.rest, cts.spread
    dz = compute(_elementwise_gradient, z, index, row[:4], of_sums, pairs)
    if indices is None or pairs:
        return dz
    local = indices - lax.index_in_dim(index, 0, axis)
    return dz + jax.linear_transpose(lambda z: pick_class(z, local, axis), z)(cts.picked)[0]


def _rescaled(row: RowStatistics, shift: Array, largest: Array) -> tuple[Array, Array]:
    """Return `rest` and `spread` for a largest logit that is higher by `-shift`.

    `largest` marks the rows that keep their largest class; otherwise it joins the other classes.
    """
    others = row.rest + jnp.where(largest | (row.max_class < 0), 0, jnp.ones_like(row.rest))
    shift = jnp.where(largest, 0, scalar.clip_inf(shift))
    return jnp.exp(shift) * others, jnp.exp(shift) * (row.spread - shift * others)


def _merge(a: RowStatistics, b: RowStatistics) -> RowStatistics:
    """Return the statistics of the classes of `a` and, with larger indices, of `b`."""
    first = a.max_logit >= b.max_logit
    top, max_class = (jnp.where(first, *pair) for pair in zip(a[:2], b[:2]))
    sums = _rescaled(a, a.max_logit - top, first), _rescaled(b, b.max_logit - top, ~first)
    rest, spread = jax.tree.map(jnp.add, *sums)
    return RowStatistics(top, max_class, rest, spread, jax.tree.map(jnp.add, a.picked, b.picked))


def over_shards(row: RowStatistics, name: AxisName, start: Array) -> RowStatistics:
    """Return the statistics of all classes from those of this device's classes.

    The collectives exchange four numbers per row, an index, and K logits.
    """
    own, device = lax.stop_gradient(row.max_logit), lax.axis_index(name)
    holds = jnp.where(own == lax.pmax(own, name), device, lax.axis_size(name))
    largest = lax.pmin(holds, name) == device
    mine = jnp.where(largest, row.max_logit, 0), jnp.where(largest, row.max_class + start, 0)
    top, max_class = lax.psum(mine, name)
    sums = _rescaled(row, row.max_logit - top, largest)
    return RowStatistics(top, max_class, *lax.psum((*sums, row.picked), name))


def of_source(
    source: Any, logits: Any, class_axis_name: AxisName | None, indices: Array, where: Array | None
) -> RowStatistics:
    """Return the statistics of all classes, of all shards."""
    return source.on_shards(_of_shards, source, logits, class_axis_name, indices, where)


def _of_shards(source: Any, logits: Any, class_axis_name, indices: Array, where) -> RowStatistics:
    indices, where = place_like(jax.tree.leaves(logits)[0], (indices, where))
    _, start = class_range(source.logits_shape(logits)[source.axis(logits)], class_axis_name)
    if class_axis_name is None or start is None:
        return source.row_statistics(logits, indices, where)
    return over_shards(
        source.row_statistics(logits, indices - start, where), class_axis_name, start
    )


def of_picked(row: RowStatistics, indices: Array) -> tuple[Array, Array]:
    """Return `logit - max_logit` of each picked class, and the sum of the other exponentials."""
    is_max = indices == row.max_class
    x = jnp.where(is_max, 0, row.picked - row.max_logit)
    # Only the largest class can be more than half of the sum, so this difference does not cancel.
    others = (row.rest - jnp.exp(jnp.minimum(x, 0))) + 1
    return x, jnp.where(is_max, row.rest, others)


# ---------------------------------------------------------------- an array of logits


@partial(jax.jit, static_argnums=0)
def _dense(axis: int, logits: Array, indices: Array | None, where: Array | None) -> RowStatistics:
    z = cast_logits(logits, where)
    return of_classes(axis, z, 0, indices)


@partial(jax.jit, static_argnums=0)
def _dense_backward(axis, residuals, cts):
    (logits, indices, where), row = residuals
    z = cast_logits(logits, where)
    dz = _gradient(compile_separately, axis, z, class_index(z, axis), indices, row, cts)
    return arguments.mask_to_zero(dz, where).astype(logits.dtype), None, None


def _forward(function, static, *args):
    row = function(static, *args)
    return row, (args, row)


_dense_core = jax.custom_vjp(_dense, nondiff_argnums=(0,))
_dense_core.defvjp(partial(_forward, _dense), _dense_backward)


def of_array(axis: int, logits: Array, indices: Any, where: Array | None) -> RowStatistics:
    """Return the statistics of an array of logits; `indices` has K along the class axis."""
    return _dense_core(axis, *cast_to_common_varying(logits, indices, where))


# ---------------------------------------------------------------- features @ kernel


def of_chunks(
    spec: ChunkSpec, linear: Linear, indices: Array | None, where: Array | None
) -> RowStatistics:
    """Return the statistics for use in `custom_vjp` rules; see `of_linear`."""
    masked = linear.mask(where)

    @chunks.recomputed
    def step(size, row, start):
        chunk = chunks.chunk_of(spec, masked, size, start)
        start = chunk.class_index[..., :1]
        return _merge(row, of_classes(chunk.logits.ndim - 1, chunk.logits, start, indices))

    zero = masked.zeros()
    nothing = jnp.full_like(zero, jnp.finfo(zero.dtype).min), zero.astype(jnp.int32) - 1
    # A sum with zeros, so that inside `shard_map` the carry varies over the axes of the features.
    picked = None if indices is None else zero + jnp.zeros(indices.shape, zero.dtype)
    initial = RowStatistics(*nothing, zero, zero, picked)
    return chunks.fold(step, initial, spec, masked)


def _linear_backward(spec, residuals, cts):
    (linear, indices, where), row = residuals

    def of_chunk(chunk):
        inline = lambda function, *args: function(*args)  # noqa: E731
        axis, z, index = chunk.logits.ndim - 1, chunk.logits, chunk.class_index
        return _gradient(inline, axis, z, index, indices, row, cts), (), None

    return chunks.gradients(spec, linear, where, of_chunk)[0], None, None


_linear_core = jax.custom_vjp(of_chunks, nondiff_argnums=(0,))
_linear_core.defvjp(partial(_forward, of_chunks), _linear_backward)


def of_linear(spec: ChunkSpec, linear: Linear, indices: Any, where: Any) -> RowStatistics:
    """Return the statistics of `features @ kernel`; `indices` is `[..., K]`."""
    return chunks.call(_linear_core, spec, linear, indices, where)
