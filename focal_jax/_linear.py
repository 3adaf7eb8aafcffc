"""The linear head: a softmax loss of `features @ kernel + bias`, whose logits are never held."""

import numbers
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs, _position
from focal_jax._class_sums import ClassSums, picked
from focal_jax._varying import aligned_varying


class _Args(NamedTuple):
    """The arguments of the core; `labels` and `where` have a class axis of one."""

    features: Array  # [..., D]
    kernel: Array  # [D, C]
    bias: Array | None  # [C]
    labels: Array
    where: Array | None


class _Chunk(NamedTuple):
    """The logits of some classes at every position."""

    start: Array  # the first class
    kernel: Array  # [D, chunk]
    logits: Array  # [..., chunk]
    place: Array  # of the true class in the chunk, or beyond it
    own: Array  # where that is


def _starts(size: int, kernel: Array) -> Array:
    return jnp.arange(0, kernel.shape[1], max(1, size), dtype=jnp.int32)


def _product(features: Array, kernel: Array) -> Array:
    """Return `features @ kernel`, multiplied in the features' dtype, added up in the loss's."""
    wide = _inputs.compute_dtype(features)
    return jnp.matmul(features, kernel.astype(features.dtype), preferred_element_type=wide)


def _chunk(size: int, args: _Args, first: Array) -> _Chunk:
    """Return the chunk of the classes from `first` on.

    The last chunk is as wide as the others and so begins before `first`: classes that
    another chunk has are -inf in it, and true nowhere.
    """
    start = jnp.minimum(first, args.kernel.shape[1] - size)
    cut = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=-1)
    kernel = cut(args.kernel)
    logits = _product(args.features, kernel)
    within = jnp.arange(size, dtype=jnp.int32)
    dtype = logits.dtype
    shift = jnp.zeros((), dtype) if args.bias is None else cut(args.bias).astype(dtype)
    shift = jnp.where(start + within >= first, shift, -jnp.inf)
    inside = (args.labels >= first) & (args.labels < start + size)
    place = jnp.where(inside, args.labels - start, size)
    shift, within = (_inputs.aligned(x, logits.shape) for x in (shift, within))
    return _Chunk(start, kernel, logits + shift, place, within == place)


def _sums(size: int, args: _Args) -> ClassSums:
    # Recomputed, not kept, should this be differentiated in its turn; and so below.
    @partial(jax.checkpoint, prevent_cse=False)
    def step(sums, first):
        chunk = _chunk(size, args, first)
        z = chunk.logits
        largest = lax.stop_gradient(jnp.max(z, -1, keepdims=True, initial=-jnp.inf))
        top = jnp.maximum(sums.top, largest)
        others = jnp.where(chunk.own, 0, jnp.exp(z - top))
        return ClassSums(
            top,
            sums.true + picked(z, chunk.place, z.ndim - 1),
            sums.rest * jnp.exp(sums.top - top) + jnp.sum(others, -1, keepdims=True),
        ), None

    # Made from an argument, so that under shard_map they vary over the axes that it does.
    zero = jnp.zeros_like(args.labels, _inputs.compute_dtype(args.features))
    # The least top is finite, for where no class is left: -inf less -inf would be NaN.
    start = ClassSums(jnp.full_like(zero, jnp.finfo(zero.dtype).min), zero, zero)
    return lax.scan(step, start, _starts(size, args.kernel))[0]


def _kept(args: _Args) -> _Args:
    return args._replace(features=_inputs.keep(args.features, args.where))


def _primal(size, *args):
    return _forward(size, *args)[0]


@partial(jax.jit, static_argnums=0)
def _forward(size, *args):
    sums = _sums(size, _kept(_Args(*args)))
    return (sums.true - sums.top, sums.rest), (_Args(*args), sums.top)


@partial(jax.jit, static_argnums=0)
def _backward(size, residuals, cts):
    args, top = residuals
    of_true, of_rest = cts
    kept = _kept(args)

    @partial(jax.checkpoint, prevent_cse=False)
    def of_chunk(first):
        chunk = _chunk(size, kept, first)
        slope = jnp.where(chunk.own, of_true, of_rest * jnp.exp(chunk.logits - top))
        slope = _inputs.keep(slope, args.where)
        _, transpose = jax.vjp(partial(_product, kept.features), chunk.kernel)
        return chunk.start, _product(slope, chunk.kernel.T), *transpose(slope), slope

    def step(totals, first):
        start, of_features, of_kernel, slope = of_chunk(first)
        by_features, by_kernel, by_bias = totals
        by_features += of_features
        by_kernel = _add_at(by_kernel, start, of_kernel)
        if args.bias is not None:
            by_bias = _add_at(by_bias, start, jnp.sum(slope, range(slope.ndim - 1)))
        return (by_features, by_kernel, by_bias), None

    zeros = jax.tree.map(jnp.zeros_like, (args.kernel, args.bias))
    totals = jnp.zeros_like(args.features, top.dtype), *zeros
    (by_features, *by_parameters), _ = lax.scan(step, totals, _starts(size, args.kernel))
    by_features = _inputs.keep(by_features, args.where).astype(args.features.dtype)
    return by_features, *by_parameters, None, None


def _add_at(total: Array, start: Array, part: Array) -> Array:
    """Add `part` to the classes of `total` from `start` on."""
    old = lax.dynamic_slice_in_dim(total, start, part.shape[-1], -1)
    new = old + part.astype(total.dtype)
    return lax.dynamic_update_slice_in_dim(total, new, start, -1)


_core = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_core.defvjp(_forward, _backward)


def _chunk_size(chunk_size: int | None, classes: int) -> int:
    """Return the classes of a step, by default a fortieth of all, in multiples of 16.

    A step holds its logits twice: so it stays below a tenth of them all. Multiples of 16
    are what matrix units are fast at.
    """
    if chunk_size is None:
        chunk_size = 16 * -(-classes // 640)
    elif not isinstance(chunk_size, numbers.Integral) or chunk_size < 1:
        raise _checks.InputError(
            f"chunk_size: got {chunk_size!r}, wanted None or an integer of at least 1"
        )
    return min(int(chunk_size), classes)


def linear_head(
    loss: Callable[..., Array],
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None,
    alpha: ArrayLike | None,
    ignore_label: int | None,
    where: ArrayLike | None,
    chunk_size: int | None,
    **options: Any,
) -> Array:
    """Return the losses of a `position` loss, whose first option is the weight of the label.

    The other options come by name, in the order in which the loss takes them. What every
    argument means is said in `linear_softmax_focal_loss_with_integer_labels`.
    """
    features, kernel = _inputs.floating("features", features), _inputs.floating("kernel", kernel)
    if kernel.ndim != 2 or features.shape[-1:] != kernel.shape[:1]:
        raise _checks.InputError(
            f"kernel: got shape {kernel.shape}, wanted (D, C) with D the last axis of the "
            f"features, whose shape is {features.shape}"
        )
    features = features.astype(jnp.promote_types(features.dtype, kernel.dtype))
    losses, classes = features.shape[:-1], kernel.shape[1]
    size = _chunk_size(chunk_size, classes)
    if bias is not None:
        bias = _inputs.floating("bias", bias)
        _checks.shape("bias", bias, (classes,), "one number per class")
    axis = len(losses)
    labels = jnp.expand_dims(_inputs.int32_labels(labels, (*losses, classes), axis), axis)
    dtype = _inputs.compute_dtype(features)
    alpha = _inputs.class_weights(alpha, classes, dtype)
    prepared = _inputs.options(options, losses, dtype, axis)
    mask = _inputs.aligned_mask(where, losses, axis)
    mask = _inputs.not_ignored(labels, ignore_label, mask)
    true, rest = _core(size, *aligned_varying(features, kernel, bias, labels, mask))
    weight, impossible = _position.label_weight(alpha, labels, classes)
    return jnp.squeeze(loss(true, rest, (weight, *prepared), mask, impossible), axis)


def linear_softmax_focal_loss_with_integer_labels(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
    chunk_size: int | None = None,
) -> Array:
    r"""Compute the focal loss of a linear layer's softmax without holding the logits.

    With `logits = features @ kernel + bias` and `p_t` the softmax probability of the
    position's own class, each loss is

        alpha_t * (1 - p_t)**gamma * (-log p_t)

    the same as `softmax_focal_loss_with_integer_labels` of these logits, which for a
    vocabulary of 100,000 and more are the largest array of the whole training step. Here
    they are made a chunk of the classes at a time, once for the loss and once more for the
    gradient: four matrix products where the layer and the loss apart take three.

    Args:
      features: `[..., D]`, floating.
      kernel: `[D, C]`, floating. If its dtype is not the features', the products are in
        the wider of the two.
      labels: `[...]`, any integer dtype: class indices. One outside `[0, C)` that is not
        `ignore_label` gives a NaN loss and a NaN gradient of the features at its position
        only; and NaN gradients of the kernel and the bias, which are sums over the
        positions.
      bias: None or `[C]`, floating. -inf switches a class off.
      alpha: None, a scalar, or `[C]`, one weight per class, picked by the label.
      gamma: focusing exponent, 0 or more. A Python number or an array that broadcasts to
        the losses.
      ignore_label: positions with this label have loss 0 and add 0 to every gradient,
        whatever their features hold.
      where: bool, broadcasts to the losses: likewise where it is False.
      chunk_size: how many classes to take per step, or None for a fortieth of them, in
        multiples of 16: a step has its logits in memory twice, and a slice of the kernel
        and of its gradient, which with no more than D positions in all weigh the most.

    Returns:
      The losses, `[...]` as the labels, not reduced. float32 for 16-bit features and
      kernel (whose products are added up in float32), else of their dtype.

    Raises:
      ValueError: for features, a kernel or a bias that are not floating or do not fit one
        another, labels that are not integers or do not have the features' shape without
        the last axis, an alpha of the wrong length, a gamma or `where` that does not
        broadcast to the losses, a `where` that is not bool, a negative Python `gamma`, a
        `chunk_size` that is not an integer of at least 1.

    Differentiation: reverse mode in features, kernel, bias, alpha and gamma, any number of
      times, and forward over reverse. Forward mode alone is refused by `jax.custom_vjp`;
      `focal_jax.reference.linear_softmax_focal_loss_with_integer_labels` has it.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import linear_softmax_focal_loss_with_integer_labels
      >>> features = jnp.array([[1.0, 0.0], [0.0, 0.0], [2.0, 3.0]])
      >>> kernel = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
      >>> labels = jnp.array([0, 1, -1])
      >>> losses = linear_softmax_focal_loss_with_integer_labels(
      ...     features, kernel, labels, ignore_label=-1
      ... )
      >>> [round(x, 4) for x in losses.tolist()]
      [0.0109, 0.4883, 0.0]

    References:
      Lin, Goyal, Girshick, He, Dollar. [Focal Loss for Dense Object
      Detection](https://arxiv.org/abs/1708.02002). ICCV 2017.
      Milakov, Gimelshein. [Online normalizer calculation for
      softmax](https://arxiv.org/abs/1805.02867). 2018.
    """
    return linear_head(
        _position.focal,
        features,
        kernel,
        labels,
        bias=bias,
        alpha=alpha,
        ignore_label=ignore_label,
        where=where,
        chunk_size=chunk_size,
        gamma=_inputs.exponent("gamma", gamma),
    )
