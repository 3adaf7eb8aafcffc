"""Sums over the classes of a loss of one logit, with the logits `features @ kernel` in chunks."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax.engine import arguments, checks, chunks, scalar
from focal_jax.engine.chunks import ChunkSpec, Linear
from focal_jax.engine.cpu import compile_separately
from focal_jax.engine.cpu_sums import is_at_most
from focal_jax.engine.linear import linear_source
from focal_jax.engine.options import check_names, prepare_options, unwrap
from focal_jax.engine.sharding import AxisName, check_not_varying, class_range, place_like


class _Args(NamedTuple):
    """The arrays of the positions besides the features."""

    positives: Any  # [..., L]: the positive classes, as indices into the rows of this kernel
    options: dict[str, Any]  # aligned with the logits
    where: Array | None
    invalid: Any  # [..., 1]


class _Spec(NamedTuple):
    """The static arguments."""

    loss: Any  # an ElementwiseLoss
    chunks: ChunkSpec


def _is_positive(class_index: Array, positives: Array, z: Array) -> Array:
    """Return which classes of a chunk are labels, in the shape of the chunk's logits."""
    if not all(isinstance(n, int) for n in (*z.shape, *positives.shape)):  # symbolic
        return jnp.any(class_index[..., None] == positives[..., None, :], -1)
    if not is_at_most(positives.shape[-1], chunks.MAX_COMPARISONS):
        local = positives - class_index[..., :1]
        local = jnp.where(local < 0, z.shape[-1], local)  # -1 would be the last class
        labels = jnp.zeros(z.shape, bool)
        return jnp.put_along_axis(labels, local, True, -1, inplace=False, mode="drop")
    positive = jnp.zeros(z.shape, bool)
    for k in range(positives.shape[-1]):
        positive |= class_index == positives[..., k : k + 1]
    return positive


def _on_chunk(function: Callable[..., Array], args: _Args, chunk: Any) -> Array:
    """Return `function(logits, labels, options)` for the classes of a chunk."""
    z = chunk.logits
    positive = _is_positive(chunk.class_index, args.positives, z)
    options = arguments.cast_and_mask(args.options, z.dtype, args.where)

    def unwrapped(z, positive, options):
        options = {name: unwrap(x) for name, x in options.items()}
        return function(z, positive.astype(z.dtype), options)

    return compile_separately(unwrapped, z, positive, options)


def _losses(spec: _Spec, linear: Linear, args: _Args) -> Array:
    masked = linear.mask(args.where)

    @chunks.recomputed
    def step(size, total, start):
        chunk = chunks.chunk_of(spec.chunks, masked, size, start)
        values = _on_chunk(spec.loss.value_of, args, chunk)
        return total + jnp.sum(values, -1, keepdims=True)

    losses = chunks.fold(step, masked.zeros(), spec.chunks, masked)
    return arguments.mask_and_invalidate(losses, args.invalid, args.where)


def _forward(spec: _Spec, linear: Linear, args: _Args):
    return _losses(spec, linear, args), (linear, args)


def _backward(spec: _Spec, residuals, ct: Array):
    linear, args = residuals
    # A NaN cotangent makes every gradient NaN to which an invalid label contributes.
    one = arguments.mask_and_invalidate(jnp.ones_like(ct), args.invalid, args.where)
    ct = arguments.scale_cotangent(ct, one)
    names = [name for name, option in spec.loss.options.items() if option.differentiable]
    names = [name for name in names if jax.tree.leaves(args.options[name])]

    def of_chunk(chunk):
        chunk = chunk._replace(logits=scalar.prevent_cse(chunk.logits))  # makes them finite
        by_logit = _on_chunk(lambda *x: spec.loss.slopes_of(*x)[0], args, chunk)

        def in_option(name):
            slope = _on_chunk(lambda *x: spec.loss.slopes_of(*x)[2][name], args, chunk)
            return ct * jnp.sum(slope, -1, keepdims=True)

        return ct * by_logit, {name: in_option(name) for name in names}, None

    totals = {name: jnp.zeros_like(ct) for name in names}
    of_linear, sums = chunks.gradients(spec.chunks, linear, args.where, of_chunk, totals)
    of_options: dict[str, Any] = dict.fromkeys(args.options)
    for name, total in sums.items():
        like = partial(arguments.cotangent_like, ct=total)
        of_options[name] = jax.tree.map(like, args.options[name])
    return of_linear, _Args(None, of_options, None, None)


_core = jax.custom_vjp(_losses, nondiff_argnums=(0,))
_core.defvjp(_forward, _backward)


def linear_losses(
    loss: Any,
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    /,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    class_axis_name: AxisName | None = None,
    mesh: Any = None,
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
    **options: Any,
) -> Array:
    """Return the sum over the classes for each position; see `ElementwiseLoss.linear`."""
    check_names(loss.__name__, loss.options, options)
    if loss.label_is_invalid is not None:
        with jax.ensure_compile_time_eval():
            invalid = loss.label_is_invalid(jnp.array([0.0, 1.0]))
            invalid = jnp.any(arguments.bool_array("label_is_invalid", invalid)).item()
        got = "label_is_invalid: got True for the label 0 or 1"
        arguments.require(not invalid, f"{got}, wanted False: a linear head has these labels")
    of_logits = bias, transpose_kernel, None, chunk_size, mesh, class_axis_name
    source, linear, name = linear_source(features, kernel, *of_logits)
    *positions, local = source.logits_shape(linear)
    positives = checks.class_index_lists("labels", labels, tuple(positions))
    num_classes, _ = class_range(local, name)
    prepared = prepare_options(
        loss.options, options, tuple(positions), source.dtype(linear), len(positions), num_classes
    )
    mask = arguments.mask_array(where, tuple(positions), len(positions))
    check_not_varying({"labels": positives, "where": mask, **prepared}, name)
    spec = _Spec(loss, source)
    losses = source.on_shards(_all_classes, spec, linear, name, positives, prepared, mask)
    return jnp.squeeze(losses, -1)


def _all_classes(spec: _Spec, linear: Linear, name: AxisName | None, positives, options, where):
    """Return the sums over the classes of all shards."""
    source: Any = spec.chunks
    *_, local = source.logits_shape(linear)
    num_classes, start = class_range(local, name)
    invalid = jnp.any((positives < -1) | (positives >= num_classes), -1, keepdims=True)
    if start is not None:  # padding stays -1
        positives = jnp.where(positives < 0, -1, positives - start)
    others = place_like(linear.features, (positives, options, where, invalid))
    losses = chunks.call(_core, spec, linear, _Args(*others))
    return losses if name is None else lax.psum(losses, name)
