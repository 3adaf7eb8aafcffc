"""The linear head: a softmax loss of `features @ kernel + bias`, whose logits are never held."""

import numbers
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs, _position
from focal_jax._class_sums import ClassSums, logsumexp, over_slices, picked
from focal_jax._varying import aligned_varying, not_varying


class _How(NamedTuple):
    """What is known of a head before there are arrays."""

    size: int  # classes of a chunk
    softcap: float | None


class _Args(NamedTuple):
    """The arguments of the core; `place` and `where` have a class axis of one."""

    features: Array  # [..., D]
    kernel: Array  # [D, C]
    bias: Array | None  # [C]
    place: Array  # of the true class in the kernel, or no place in it
    where: Array | None


class _Chunk(NamedTuple):
    """The logits of some classes at every position."""

    start: Array  # the first class
    kernel: Array  # [D, chunk]
    logits: Array  # [..., chunk]
    place: Array  # of the true class in the chunk, or beyond it
    own: Array  # where that is
    through_cap: Callable[[Array], Array]  # from slopes of the logits to those of the product


def _starts(how: _How, kernel: Array) -> Array:
    return jnp.arange(0, kernel.shape[1], max(1, how.size), dtype=jnp.int32)


def _product(features: Array, kernel: Array) -> Array:
    """Return `features @ kernel`, multiplied in the features' dtype, added up in the loss's."""
    wide = _inputs.compute_dtype(features)
    return jnp.matmul(features, kernel.astype(features.dtype), preferred_element_type=wide)


@jax.custom_jvp
def _tanh_slope(x: Array) -> Array:
    """Return the derivative of tanh, with all its digits where tanh is 1 but for the last."""
    e = jnp.exp(-2 * jnp.abs(x))
    return 4 * e / (1 + e) ** 2


@_tanh_slope.defjvp
def _tanh_slope_jvp(primals, tangents):
    slope = _tanh_slope(*primals)
    return slope, -2 * jnp.tanh(primals[0]) * slope * tangents[0]


def _capped(softcap: float, x: Array) -> tuple[Array, Array]:
    """Return the logits capped, and their derivative. What is switched off stays off."""
    scaled = x / softcap
    return jnp.where(x == -jnp.inf, x, softcap * jnp.tanh(scaled)), _tanh_slope(scaled)


def _chunk(how: _How, args: _Args, first: Array) -> _Chunk:
    """Return the chunk of the classes from `first` on.

    The last chunk is as wide as the others and so begins before `first`: classes that
    another chunk has are -inf in it, and true nowhere.
    """
    size = how.size
    start = jnp.minimum(first, args.kernel.shape[1] - size)
    cut = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=-1)
    kernel = cut(args.kernel)
    logits = _product(args.features, kernel)
    within = jnp.arange(size, dtype=jnp.int32)
    dtype = logits.dtype
    shift = jnp.zeros((), dtype) if args.bias is None else cut(args.bias).astype(dtype)
    shift = jnp.where(start + within >= first, shift, -jnp.inf)
    inside = (args.place >= first) & (args.place < start + size)
    place = jnp.where(inside, args.place - start, size)
    shift, within = (_inputs.aligned(x, logits.shape) for x in (shift, within))
    logits += shift
    if how.softcap is None:
        return _Chunk(start, kernel, logits, place, within == place, lambda slope: slope)
    logits, factor = _capped(how.softcap, logits)
    return _Chunk(start, kernel, logits, place, within == place, lambda slope: slope * factor)


def _sums(how: _How, args: _Args) -> ClassSums:
    # Recomputed, not kept, should this be differentiated in its turn; and so below.
    @partial(jax.checkpoint, prevent_cse=False)
    def step(sums, first):
        chunk = _chunk(how, args, first)
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
    zero = jnp.zeros_like(args.place, _inputs.compute_dtype(args.features))
    # The least top is finite, for where no class is left: -inf less -inf would be NaN.
    start = ClassSums(jnp.full_like(zero, jnp.finfo(zero.dtype).min), zero, zero)
    return lax.scan(step, start, _starts(how, args.kernel))[0]


def _kept(args: _Args) -> _Args:
    return args._replace(features=_inputs.keep(args.features, args.where))


@partial(jax.jit, static_argnums=0)
def _primal(how, *args):
    return _sums(how, _kept(_Args(*args)))


@partial(jax.jit, static_argnums=0)
def _forward(how, *args):
    sums = _primal(how, *args)
    return sums, (_Args(*args), lax.stop_gradient(sums.top))


@partial(jax.jit, static_argnums=0)
def _backward(how, residuals, cts):
    args, top = residuals
    kept = _kept(args)

    @partial(jax.checkpoint, prevent_cse=False)
    def of_chunk(first):
        chunk = _chunk(how, kept, first)
        slope = jnp.where(chunk.own, cts.true, cts.rest * jnp.exp(chunk.logits - top))
        slope = _inputs.keep(chunk.through_cap(slope), args.where)
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
    (by_features, *by_parameters), _ = lax.scan(step, totals, _starts(how, args.kernel))
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


def _unspread(name: str, x: Array) -> None:
    """Check that the classes, the last axis of `x`, are whole on every device.

    Where types say so: on a mesh with automatic axes the partitioner gathers what is not.
    """
    spread = jax.typeof(x).sharding.spec[-1]
    if spread is not None:
        raise _checks.InputError(
            f"{name}: got classes that are spread over the mesh axis {spread!r}, wanted all of "
            "them on every device, or a slice of them inside jax.shard_map, with "
            "class_axis_name"
        )


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
    class_axis_name: str | tuple[str, ...] | None = None,
    logit_softcap: float | None = None,
    return_logsumexp: bool = False,
    **options: Any,
) -> Any:
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
    _unspread("kernel", kernel)
    features = features.astype(jnp.promote_types(features.dtype, kernel.dtype))
    losses, slice_size = features.shape[:-1], kernel.shape[1]
    slices = 1 if class_axis_name is None else lax.axis_size(class_axis_name)
    classes = slices * slice_size
    how = _How(_chunk_size(chunk_size, slice_size), _checks.logit_softcap(logit_softcap))
    if bias is not None:
        bias = _inputs.floating("bias", bias)
        _checks.shape("bias", bias, (slice_size,), "one number per class")
        _unspread("bias", bias)
    axis = len(losses)
    labels = _inputs.int32_labels(labels, (*losses, classes), axis)
    dtype = _inputs.compute_dtype(features)
    alpha = _inputs.class_weights(alpha, classes, dtype)
    prepared = _inputs.options(options, losses, dtype, axis)
    mask = _inputs.aligned_mask(where, losses, axis)
    offset = 0
    if class_axis_name is not None:
        offset = slice_size * lax.axis_index(class_axis_name)
        same = {"features": features, "labels": labels, "alpha": alpha, "where": mask}
        for name, x in (same | dict(zip(options, prepared))).items():
            not_varying(name, x, class_axis_name)
    labels = jnp.expand_dims(labels, axis)
    mask = _inputs.not_ignored(labels, ignore_label, mask)
    sums = _core(how, *aligned_varying(features, kernel, bias, labels - offset, mask))
    sums = over_slices(sums, class_axis_name)
    weight, impossible = _position.label_weight(alpha, labels, classes)
    losses = loss(sums.true - sums.top, sums.rest, (weight, *prepared), mask, impossible)
    losses = jnp.squeeze(losses, axis)
    if return_logsumexp:
        return losses, jnp.squeeze(logsumexp(sums, impossible, mask), axis)
    return losses


@overload
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
    logit_softcap: float | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    return_logsumexp: Literal[True],
    chunk_size: int | None = None,
) -> tuple[Array, Array]: ...


@overload
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
    logit_softcap: float | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    return_logsumexp: Literal[False] = False,
    chunk_size: int | None = None,
) -> Array: ...


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
    logit_softcap: float | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    return_logsumexp: bool = False,
    chunk_size: int | None = None,
) -> Any:
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
      logit_softcap: None or a number > 0: the logits are then
        `cap * tanh((features @ kernel + bias) / cap)`, before all else. A class that the
        bias switches off stays off.
      class_axis_name: one name or several of mapped axes (`shard_map`, `pmap`, `vmap`)
        that the classes are spread over: kernel and bias then hold this device's slice of
        them, all slices equally long and in the order of the devices. Labels count through
        all the classes and alpha has a weight for each; they, the features, gamma and
        `where` are the same on every device of these axes, and so are the losses. What the
        devices exchange is three numbers a position, and the features' gradient.
      return_logsumexp: whether to return `(losses, logsumexp)`, the second being the
        logarithm of the sum over the classes of `exp(logit)`. A z-loss is one line then:
        `losses + 1e-4 * logsumexp**2`.
      chunk_size: how many classes to take per step, or None for a fortieth of them, in
        multiples of 16: a step has its logits in memory twice, and a slice of the kernel
        and of its gradient, which with no more than D positions in all weigh the most.

    Returns:
      The losses, `[...]` as the labels, not reduced. float32 for 16-bit features and
      kernel (whose products are added up in float32), else of their dtype. With
      `return_logsumexp` a pair, the log-sum-exp of the losses' shape and dtype: 0, with
      gradient 0, where the losses are masked, and what it is whatever the label where
      that is none of the classes.

    Raises:
      ValueError: for features, a kernel or a bias that are not floating or do not fit one
        another, labels that are not integers or do not have the features' shape without
        the last axis, an alpha of the wrong length, a gamma or `where` that does not
        broadcast to the losses, a `where` that is not bool, a negative Python `gamma`, a
        `chunk_size` that is not an integer of at least 1, a `logit_softcap` that is not a
        finite number > 0; for a kernel or a bias whose classes are spread over an explicit
        axis of a mesh outside of `shard_map`; for arguments that vary over
        `class_axis_name` and should not, where `shard_map` keeps account of that
        (`check_vma=True`).
      NameError: for a `class_axis_name` that is not bound here.

    Differentiation: reverse mode in features, kernel, bias, alpha and gamma, any number of
      times, and forward over reverse. Forward mode alone is refused by `jax.custom_vjp`;
      `focal_jax.reference.linear_softmax_focal_loss_with_integer_labels` has it. With
      `class_axis_name`, a gradient taken inside `pmap`, or inside `shard_map` with
      `check_vma=False`, is that of the sum of what all the devices return, as JAX has it
      for every collective: divide it by the number of slices.

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
        logit_softcap=logit_softcap,
        class_axis_name=class_axis_name,
        return_logsumexp=return_logsumexp,
        chunk_size=chunk_size,
        gamma=_inputs.exponent("gamma", gamma),
    )
