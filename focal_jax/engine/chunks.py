"""The linear head: computes `features @ kernel + bias` for one chunk of classes at a time.

`fold` is a loop over the chunks, `gradients` the loop of a backward pass, which computes the logits
of each chunk again.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from focal_jax.engine import arguments, batching, scalar
from focal_jax.engine.sharding import cast_to_common_varying

# Up to this number of given classes per position, comparisons with the class index of a chunk
# replace a gather or a scatter.
MAX_COMPARISONS = 16


class ChunkSpec(NamedTuple):
    """The static description of the logits."""

    size: int | None  # classes per chunk; None for `default_chunk_size`
    softcap: float | None
    class_axis: int  # of the kernel: -1, or 0 for a transposed kernel
    layout: Any = None  # a `layout.Layout`; None on one device and inside `jax.shard_map`


class Linear(NamedTuple):
    """The arrays that the logits are computed from."""

    features: Array  # [..., D]
    kernel: Array  # [D, C], or [C, D] for a transposed kernel
    bias: Array | None  # [C]
    temperature: Array | None = None  # broadcasts to the positions, with a class axis of size 1
    alpha: Array | None = None  # [C], class weights of the sum over all classes

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
        return jnp.zeros_like(
            jnp.sum(self.features, -1, keepdims=True), arguments.compute_dtype(self.features)
        )


class Chunk(NamedTuple):
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


def scale_logits(z: Array, factor: Array) -> Array:
    """Return `z * factor`. A logit of -inf stays as it is, and has no derivative in the factor."""
    is_off = z == -jnp.inf
    return jnp.where(is_off, z, jnp.where(is_off, 0, z) * factor)


def fold(step: Callable[..., Any], carry: Any, spec: ChunkSpec, linear: Linear) -> Any:
    """Return the carry after `carry = step(size, carry, start)` for every chunk.

    The last chunk is smaller if the chunk size does not divide the number of classes. It runs
    before the loop. After the loop, XLA could start its products early and keep them in memory
    while the loop runs.
    """
    num_classes = linear.kernel.shape[spec.class_axis]
    size = spec.size or default_chunk_size(math.prod(linear.features.shape[:-1]), num_classes)
    size = min(size, num_classes)
    whole, rest = divmod(num_classes, max(1, size))
    if rest:
        carry = step(rest, carry, jnp.int32(whole * size))
    if not size:  # `lax.scan` would trace the step, which takes a maximum over no classes
        return carry
    starts = size * jnp.arange(whole, dtype=jnp.int32)
    carry, _ = lax.scan(lambda carry, start: (step(size, carry, start), None), carry, starts)
    return carry


def default_chunk_size(positions: int, num_classes: int) -> int:
    """Return the number of classes per chunk; the public function documents the default."""
    unit = 16 if num_classes < 40 * 128 else 128
    fortieth = unit * -(-num_classes // (40 * unit))
    known = positions if isinstance(positions, int) else 1  # a symbolic size is not known
    return min(fortieth, max(1024, 128 * (2**23 // (128 * max(1, known)))))


@partial(jax.jit, static_argnums=(0, 1))
def call(core: Callable[..., Any], spec: Any, linear: Linear, *positions: Any) -> Any:
    """Return `core(spec, linear, *positions)` for a `custom_vjp` of arrays of positions.

    `jax.vmap` over the positions is one call for all examples, see `batching.call`.
    """
    linear, positions = cast_to_common_varying(linear, positions)

    def function(shared, features, temperature, *positions):
        kernel, bias, alpha = shared
        return core(spec, Linear(features, kernel, bias, temperature, alpha), *positions)

    shared = linear.kernel, linear.bias, linear.alpha
    return batching.call(function, shared, linear.features, linear.temperature, *positions)


def chunk_of(spec: ChunkSpec, linear: Linear, size: int, start: Array) -> Chunk:
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
        logits = scale_logits(logits, factors[-1])
    return Chunk(kernel, logits, class_index, lambda slope: math.prod(factors, start=slope), take)


# A step is recomputed, not stored, if a gradient is differentiated again.
recomputed = partial(jax.checkpoint, prevent_cse=False, static_argnums=(0,))


def gradients(
    spec: ChunkSpec,
    linear: Linear,
    where: Array | None,
    of_chunk: Callable[[Chunk], tuple[Array, Any, Array | None]],
    totals: Any = (),
) -> tuple[Linear, Any]:
    """Return the cotangents of the arrays, and the totals.

    `of_chunk` returns the gradient of a chunk's logits, terms that are added to `totals`, and the
    gradient of the chunk's class weights.
    """
    masked = linear.mask(where)

    @recomputed
    def parts(size, start):
        chunk = chunk_of(spec, masked, size, start)
        slope, terms, of_alpha = of_chunk(chunk)
        of_temperature = None
        if linear.temperature is not None:
            moved = arguments.mask_to_zero(slope * scalar.clip_inf(chunk.logits), where)
            of_temperature = -jnp.sum(moved, -1, keepdims=True)
        slope = arguments.mask_to_zero(chunk.through(slope), where)
        _, transpose = jax.vjp(partial(_matmul, spec.class_axis, masked.features), chunk.kernel)
        of_bias = None if linear.bias is None else jnp.sum(slope, range(slope.ndim - 1))
        of_features = _matmul(-1 - spec.class_axis, slope, chunk.kernel)
        return of_features, (*transpose(slope), of_bias, of_alpha), (terms, of_temperature)

    def step(size, carry, start):
        def put(whole, part):
            part = part.astype(whole.dtype)
            return lax.dynamic_update_slice_in_dim(whole, part, start, spec.class_axis)

        features, parameters, totals = carry
        of_features, of_parameters, terms = parts(size, start)
        return (
            features + of_features,
            jax.tree.map(put, parameters, of_parameters),
            jax.tree.map(jnp.add, totals, terms),
        )

    # The loop overwrites every entry, so any initial value works. Using the parameters themselves
    # takes less TPU memory than zeros.
    initial = linear.kernel, linear.bias, linear.alpha
    parameters = jax.tree.map(lax.stop_gradient, initial)
    features = jnp.zeros_like(linear.features, arguments.compute_dtype(linear.features))
    temperature = None if linear.temperature is None else linear.zeros()
    carry = features, parameters, (totals, temperature)
    features, (kernel, bias, alpha), (totals, temperature) = fold(step, carry, spec, linear)
    features = arguments.mask_to_zero(features, where).astype(linear.features.dtype)
    if linear.temperature is not None:
        of_temperature = temperature / masked.temperature
        temperature = arguments.cotangent_like(linear.temperature, of_temperature)
    return Linear(features, kernel, bias, temperature, alpha), totals
