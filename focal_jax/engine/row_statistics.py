"""The largest class of each row of logits, and sums over all other classes.

Only the class with the largest logit can have a probability above 1/2. All results are functions
of that class and of sums over the others, so none of them is a difference of nearly equal numbers:

    1 - p of the largest class = rest / (1 + rest)
    log-sum-exp                = max_logit + log1p(rest)
    entropy                    = log1p(rest) + spread / (1 + rest)

In `x = logit - max_logit` the largest logit is a constant: the results do not depend on the number
that is subtracted, and so their derivatives do not cancel. The rows are an array of logits, or
`features @ kernel` in chunks. In both cases the classes may be sharded over devices.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from focal_jax.engine import arguments, chunks, scalar
from focal_jax.engine.chunks import ChunkSpec, Linear
from focal_jax.engine.class_axis import argmax, cast_logits, class_index, pick_class
from focal_jax.engine.cpu import compile_separately
from focal_jax.engine.cpu_sums import MAX_FLOAT_INDEX, is_at_most, minimum_with_distance
from focal_jax.engine.next_class import is_first_with
from focal_jax.engine.platform import by_platform
from focal_jax.engine.rows import RowSums, Split
from focal_jax.engine.rules import with_gradient
from focal_jax.engine.sharding import AxisName, cast_to_common_varying, class_range, place_like


def _x_at_max(max_logit: Array) -> Array:
    """Return `x` of the largest class: 0, with the derivative of its logit."""
    return max_logit - lax.stop_gradient(max_logit)


class RowStatistics(NamedTuple):
    """Statistics of each row, with a class axis of size 1.

    Attributes:
      max_logit: the largest logit; finite even if every logit is -inf.
      max_class: the index of the first class with that logit; -1 if there is no class.
      rest: the sum over the other classes of `exp(x)`, with `x = logit - max_logit`.
      spread: the sum over all classes of `-x * exp(x)`. The derivative of the entropy uses that of
        `moment` instead.
      moment: the sum over all classes of `(1 - x) * exp(x)`, minus 1. Its derivative in a logit is
        `-x * exp(x)`.
      picked: the logits of K given classes, with a class axis of size K; 0 for an index that is
        not one of the classes; None if no classes are given.
    """

    max_logit: Array
    max_class: Array
    rest: Array
    spread: Array
    moment: Array
    picked: Any

    @property
    def top(self) -> Array:
        """The largest logit as a constant."""
        return lax.stop_gradient(self.max_logit)

    @property
    def at_max(self) -> Array:
        """`exp(x)` of the largest class: 1, with the derivative of the largest logit."""
        return jnp.exp(_x_at_max(self.max_logit))


def row_of(found: RowStatistics) -> RowSums:
    """Return the sums of the exponentials."""
    at_max = jnp.where(found.top > jnp.finfo(found.top.dtype).min, found.at_max, 0)
    return RowSums(found.top, Split(at_max, found.rest))


def entropy(row: RowStatistics) -> Array:
    """Return the entropy of the softmax of each row."""
    return _entropy(row.at_max, row.rest, row.spread, row.moment)


@jax.custom_jvp
def _entropy(at_max: Array, rest: Array, spread: Array, moment: Array) -> Array:
    del moment  # for the derivative
    return jnp.log1p((at_max - 1) + rest) + spread / (at_max + rest)


@_entropy.defjvp
def _entropy_jvp(primals, tangents):
    # With the derivative of the spread, the derivatives of the two terms in a logit would cancel.
    (at_max, rest, *_), (d_at_max, d_rest, _, d_moment) = primals, tangents
    share = 1 / (at_max + rest)
    mean = _spread(*primals) * share  # of max_logit - logit
    return _entropy(*primals), share * (d_moment - mean * (d_at_max + d_rest))


@jax.custom_jvp
def _spread(at_max: Array, rest: Array, spread: Array, moment: Array) -> Array:
    del at_max, rest, moment  # for the derivative
    return spread


@_spread.defjvp
def _spread_jvp(primals, tangents):
    d_at_max, d_rest, _, d_moment = tangents
    return _spread(*primals), d_moment - d_at_max - d_rest


def _columns(indices: Array | None, axis: int) -> list[Array]:
    """Return the indices one by one if there are few."""
    if indices is None or not is_at_most(indices.shape[axis], chunks.MAX_COMPARISONS):
        return []
    return [lax.index_in_dim(indices, k, axis) for k in range(indices.shape[axis])]


def _pick(z: Array, indices: Array | None, start: Any, axis: int) -> Array | None:
    if indices is None:
        return None
    columns = [pick_class(z, label - start, axis) for label in _columns(indices, axis)]
    return jnp.concatenate(columns, axis) if columns else pick_class(z, indices - start, axis)


def of_classes(axis: int, z: Array, start: Array | int, indices: Array | None) -> RowStatistics:
    """Return the statistics of the classes whose logits are `z`, of which the first is `start`."""
    index = class_index(z, axis)
    own = argmax(z, axis)
    largest = jnp.maximum(pick_class(z, own, axis), jnp.finfo(z.dtype).min)
    top = lax.stop_gradient(largest)
    # XLA:CPU does not vectorize a sum that is fused with a select or a clamp, so a minimum excludes
    # the class. XLA:CPU writes a subexpression to memory if both sums use it; the barrier keeps the
    # sums apart. It also writes integer distances, so they are floats if those are exact.
    exact = z.dtype if is_at_most(z.shape[axis], MAX_FLOAT_INDEX) else jnp.int32
    again = by_platform(lax.optimization_barrier, lambda same: same, (own, top))
    is_last = axis == z.ndim - 1  # the sum along another axis is not fused

    def exponentials(z, index, own, top):
        distance = jnp.abs(index.astype(exact) - own.astype(exact)).astype(z.dtype)
        return minimum_with_distance(jnp.exp(z - top), distance)

    def spreads(z, index, own, top):
        x = jnp.maximum(z - top, -scalar.max_finite(z))  # finite, so that the product is
        return exponentials(z, index, own, top) * -x

    def total(function, own, top):
        compute = function if is_last else partial(compile_separately, function)
        return jnp.sum(compute(z, index, own, top), axis, keepdims=True)

    rest = total(exponentials, own, top)
    x = _x_at_max(largest)
    spread = total(spreads, *again) - x * jnp.exp(x)
    moment = rest + spread + (jnp.exp(x) - 1)
    picked = _pick(z, indices, start, axis)
    return RowStatistics(largest, own + start, rest, spread, moment, picked)


def _elementwise_gradient(z, index, row, cts, picked):
    """Return the gradient of the logits; `picked` has pairs of a class index and a cotangent."""
    (top, max_class), (of_max, of_rest, of_moment) = row, cts
    x = scalar.clip_inf(z - top)
    e = jnp.exp(x)
    dz = jnp.where(index == max_class, of_max, e * of_rest) - x * e * of_moment
    for label, ct in picked:
        dz = dz + jnp.where(index == label, ct, 0)
    return dz


def _gradient(compute: Any, axis: int, z: Array, index: Array, indices: Any, row, cts) -> Array:
    """Return the gradient of the logits."""
    pairs = list(zip(_columns(indices, axis), _columns(cts.picked, axis)))
    of_sums = cts.max_logit, cts.rest, cts.moment
    dz = compute(_elementwise_gradient, z, index, (row.top, row.max_class), of_sums, pairs)
    if indices is None or pairs:
        return dz
    local = indices - lax.index_in_dim(index, 0, axis)
    return dz + jax.linear_transpose(lambda z: pick_class(z, local, axis), z)(cts.picked)[0]


def _rescaled(row: RowStatistics, shift: Array, largest: Array) -> tuple[Array, ...]:
    """Return `rest`, `spread` and `moment` for a largest logit that is higher by `-shift`.

    `largest` marks the rows that keep their largest class; otherwise it joins the other classes.
    """
    joins = ~(largest | (row.max_class < 0))
    rest = row.rest + jnp.where(joins, row.at_max, 0)
    moment = row.moment + jnp.where(joins, jnp.ones_like(rest), 0)
    shift = jnp.where(largest, 0, scalar.clip_inf(shift))
    factor, moved = jnp.exp(shift), shift * rest
    return factor * rest, factor * (row.spread - moved), factor * (moment - moved)


def _merge(a: RowStatistics, b: RowStatistics) -> RowStatistics:
    """Return the statistics of the classes of `a` and, with larger indices, of `b`."""
    first = a.max_logit >= b.max_logit
    largest, max_class = (jnp.where(first, *pair) for pair in zip(a[:2], b[:2]))
    top = lax.stop_gradient(largest)
    sums = _rescaled(a, a.top - top, first), _rescaled(b, b.top - top, ~first)
    rest, spread, moment = (x + y for x, y in zip(*sums))
    picked = jax.tree.map(jnp.add, a.picked, b.picked)
    return RowStatistics(largest, max_class, rest, spread, moment, picked)


def over_shards(row: RowStatistics, name: AxisName, start: Array) -> RowStatistics:
    """Return the statistics of all classes from those of this device's classes.

    The collectives exchange five numbers per row, two indices, and K logits.
    """
    top = lax.pmax(row.top, name)
    largest = is_first_with(row.top, top, name)
    mine = jnp.where(largest, row.max_logit, 0), jnp.where(largest, row.max_class + start, 0)
    sums = _rescaled(row, row.top - top, largest)
    return RowStatistics(*lax.psum((*mine, *sums, row.picked), name))


def of_source(
    source: Any, logits: Any, class_axis_name: AxisName | None, indices: Array, where: Array | None
) -> RowStatistics:
    """Return the statistics of all classes, of all shards."""
    num_classes = source.logits_shape(logits)[source.axis(logits)]
    arguments.require(num_classes, "logits: got 0 classes, wanted at least one")
    row = source.on_shards(_of_shards, source, logits, class_axis_name, indices, where)
    return place_like(jax.tree.leaves(logits)[0], row)


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
    # Exactly 0 for the largest class, whose logit XLA may compute twice with different roundings.
    x = row.picked - jnp.where(is_max, lax.stop_gradient(row.picked), row.top)
    # Only the largest class can be more than half of the sum, so this difference does not cancel.
    others = (row.rest - jnp.exp(jnp.where(x <= 0, x, 0))) + row.at_max
    return x, jnp.where(is_max, row.rest, others)


# ---------------------------------------------------------------- an array of logits


@partial(jax.jit, static_argnums=0)
def _dense(axis: int, logits: Array, indices: Array | None, where: Array | None) -> RowStatistics:
    z = cast_logits(logits, where)
    return of_classes(axis, z, 0, indices)


def _dense_backward(axis, residuals, cts):
    (logits, indices, where), row = residuals
    z = cast_logits(logits, where)
    dz = _gradient(compile_separately, axis, z, class_index(z, axis), indices, row, cts)
    return arguments.mask_to_zero(dz, where).astype(logits.dtype), None, None


def _forward(function, static, *args):
    row = function(static, *args)
    return row, (args, row)


_dense_core = with_gradient(_dense, partial(_forward, _dense), _dense_backward, num_static=1)


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
    initial = RowStatistics(*nothing, zero, zero, zero, picked)
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
