"""The linear head: a softmax loss of `features @ kernel + bias`, whose logits are never held."""

import math
import numbers
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs, _position, _smoothing
from focal_jax._class_sums import ClassSums, log_whole, logsumexp, over_slices, picked
from focal_jax._varying import aligned_varying, not_varying


class _How(NamedTuple):
    """What is known of a head before there are arrays."""

    size: int  # classes of a chunk
    softcap: float | None
    axis: int = -1  # of the classes in the kernel; the first where that is an embedding


class _Args(NamedTuple):
    """The arrays that the logits are made of; `place` and `where` have a class axis of one."""

    features: Array  # [..., D]
    kernel: Array  # [D, C], or [C, D]
    bias: Array | None  # [C]
    place: Array  # of the true class in the kernel, or no place in it
    where: Array | None


class _Chunk(NamedTuple):
    """The logits of some classes at every position."""

    kernel: Array  # [D, size], or [size, D]
    logits: Array  # [..., size]
    place: Array  # of the true class in the chunk, or no place in it
    own: Array  # where that is
    through_cap: Callable[[Array], Array]  # from slopes of the logits to those of the product
    cut: Callable[[Array], Array]  # from all the classes, on the kernel's axis, to those


def _product(axis: int, x: Array, kernel: Array) -> Array:
    """Return `x` times the kernel, whose `axis` is that of the products.

    Multiplied in the dtype of `x`, added up in that of the loss.
    """
    kernel = (kernel if axis else kernel.T).astype(x.dtype)
    return jnp.matmul(x, kernel, preferred_element_type=_inputs.compute_dtype(x))


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


def _fold(step: Callable[..., Any], carry: Any, how: _How, classes: int) -> Any:
    """Return what `carry = step(size, carry, start)` makes of it, chunk after chunk.

    What whole chunks leave over of the classes is a chunk of its own.
    """
    whole, rest = divmod(classes, max(1, how.size))
    starts = how.size * jnp.arange(whole, dtype=jnp.int32)
    carry, _ = lax.scan(lambda carry, start: (step(how.size, carry, start), None), carry, starts)
    return step(rest, carry, jnp.int32(whole * how.size)) if rest else carry


def _chunk(how: _How, args: _Args, size: int, start: Array) -> _Chunk:
    """Return the chunk of `size` classes from `start` on."""
    cut = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=how.axis)
    kernel, place = cut(args.kernel), args.place - start
    logits = _product(how.axis, args.features, kernel)
    if args.bias is not None:
        logits += _inputs.aligned(cut(args.bias).astype(logits.dtype), logits.shape)
    own = _inputs.aligned(jnp.arange(size, dtype=jnp.int32), logits.shape) == place
    if how.softcap is None:
        return _Chunk(kernel, logits, place, own, lambda slope: slope, cut)
    logits, factor = _capped(how.softcap, logits)
    return _Chunk(kernel, logits, place, own, lambda slope: slope * factor, cut)


def _kept(args: _Args) -> _Args:
    return args._replace(features=_inputs.keep(args.features, args.where))


def _nothing(args: _Args) -> Array:
    """Return a zero for each position, which under shard_map varies over what the args do."""
    return jnp.zeros_like(args.place, _inputs.compute_dtype(args.features))


# Recomputed, not kept, should a gradient be differentiated in its turn.
_again = partial(jax.checkpoint, prevent_cse=False, static_argnums=(0,))


# ---------------------------------------------------------------- the gradients of a core


def _gradients(how: _How, args: _Args, of_chunk: Callable[..., Any], totals: Any, by_class: Any):
    """Return the cotangents of the arguments, and what else adds up over the chunks.

    `of_chunk` makes of a chunk the slopes of its logits, terms to add to the `totals` and
    the classes' own parts of the arrays `by_class`.
    """
    kept = _kept(args)

    @_again
    def parts(size, start):
        chunk = _chunk(how, kept, size, start)
        slope, *more = of_chunk(chunk)
        slope = _inputs.keep(chunk.through_cap(slope), args.where)
        _, transpose = jax.vjp(partial(_product, how.axis, kept.features), chunk.kernel)
        of_bias = None if args.bias is None else jnp.sum(slope, range(slope.ndim - 1))
        of_features = _product(-1 - how.axis, slope, chunk.kernel)
        return of_features, (*transpose(slope), of_bias), *more

    def step(size, carry, start):
        def put(whole, part):
            part = part.astype(whole.dtype)
            return lax.dynamic_update_slice_in_dim(whole, part, start, how.axis)

        by_features, parameters, totals, by_class = carry
        of_features, of_parameters, terms, of_classes = parts(size, start)
        return (
            by_features + of_features,
            jax.tree.map(put, parameters, of_parameters),
            jax.tree.map(jnp.add, totals, terms),
            jax.tree.map(put, by_class, of_classes),
        )

    # Every class is put in its place once, so it does not matter what was there: from the
    # arguments' own values a TPU's compiler makes less of them than of zeros.
    whole = (args.kernel, args.bias), by_class
    parameters, by_class = jax.tree.map(lax.stop_gradient, whole)
    features = jnp.zeros_like(args.features, _inputs.compute_dtype(args.features))
    carry = features, parameters, totals, by_class
    features, parameters, totals, by_class = _fold(step, carry, how, args.kernel.shape[how.axis])
    features = _inputs.keep(features, args.where).astype(args.features.dtype)
    kernel, bias = parameters
    of_args = args._replace(features=features, kernel=kernel, bias=bias, place=None, where=None)
    return of_args, totals, by_class


# ---------------------------------------------------------------- the sums of the classes


# In one pass an exponential may be of at most this, above the largest logit of earlier chunks.
_JUMP = 64.0


@custom_vmap
def _within(jump: Array) -> Array:
    """Return whether no jump is too high; one that is NaN is."""
    return jnp.all(jump <= _JUMP)


@_within.def_vmap
def _(size, batched, jump):
    # One condition for all the examples: each its own would make a select of the conditional,
    # and everything would always be done again.
    del size, batched
    return _within(jump), False


def _no_sums(args: _Args) -> ClassSums:
    zero = _nothing(args)
    # The least top is finite, for where no class is left: -inf less -inf would be NaN.
    return ClassSums(jnp.full_like(zero, jnp.finfo(zero.dtype).min), zero, zero)


def _largest(z: Array) -> Array:
    return lax.stop_gradient(jnp.max(z, -1, keepdims=True, initial=-jnp.inf))


def _in_passes(how: _How, args: _Args) -> ClassSums:
    """Return the sums by a pass over each chunk for the maximum, and one for the sum."""

    @_again
    def step(size, sums, start):
        chunk = _chunk(how, args, size, start)
        z = chunk.logits
        top = jnp.maximum(sums.top, _largest(z))
        others = jnp.where(chunk.own, 0, jnp.exp(z - top))
        return ClassSums(
            top,
            sums.true + picked(z, chunk.place, z.ndim - 1),
            sums.rest * jnp.exp(sums.top - top) + jnp.sum(others, -1, keepdims=True),
        )

    return _fold(step, _no_sums(args), how, args.kernel.shape[how.axis])


def _in_one_pass(how: _How, args: _Args) -> ClassSums:
    """Return the sums by one pass, which an accelerator takes while it multiplies.

    The exponentials are relative to the largest logit of the chunks before, so that nothing
    waits for the maximum of this one, and the logits are not written out at all. It serves as
    well unless a chunk exceeds all before it by so much that they would overflow: then, and
    only then, everything is done again in passes.
    """

    @_again
    def step(size, carry, start):
        sums, jump = carry
        chunk = _chunk(how, args, size, start)
        z = chunk.logits
        top = jnp.maximum(sums.top, _largest(z))
        others = jnp.where(chunk.own, 0, jnp.exp(jnp.minimum(z - sums.top, _JUMP)))
        rest = sums.rest + jnp.sum(others, -1, keepdims=True)
        own = jnp.sum(jnp.where(chunk.own, z, 0), -1, keepdims=True)
        sums = ClassSums(top, sums.true + own, rest * jnp.exp(sums.top - top))
        return sums, jnp.maximum(jump, top - carry[0].top)

    classes, nothing = args.kernel.shape[how.axis], _no_sums(args)
    # A few classes give the first chunk what the chunks before give to the others.
    few = _chunk(how, args, min(128, classes), jnp.int32(0))
    sums = nothing._replace(top=jnp.maximum(nothing.top, _largest(few.logits)))
    sums, jump = _fold(step, (sums, jnp.zeros_like(sums.top)), how, classes)
    within = _within(lax.stop_gradient(jump))
    # Selected out here: a conditional's own results stay in a TPU's slow memory.
    again = lax.cond(within, _no_sums, partial(_in_passes, how), args)
    return jax.tree.map(partial(jnp.where, within), sums, again)


@partial(jax.jit, static_argnums=0)
def _sums(how: _How, args: _Args) -> ClassSums:
    on_cpu, elsewhere = partial(_in_passes, how), partial(_in_one_pass, how)
    return lax.platform_dependent(_kept(args), cpu=on_cpu, default=elsewhere)


def _sums_forward(how, args):
    sums = _sums(how, args)
    return sums, (args, lax.stop_gradient(sums.top))


@partial(jax.jit, static_argnums=0)
def _sums_backward(how, residuals, cts):
    args, top = residuals

    def of_chunk(chunk):
        slope = jnp.where(chunk.own, cts.true, cts.rest * jnp.exp(chunk.logits - top))
        return slope, (), ()

    return (_gradients(how, args, of_chunk, (), ())[0],)


_class_sums = jax.custom_vjp(_sums, nondiff_argnums=(0,))
_class_sums.defvjp(_sums_forward, _sums_backward)


# ---------------------------------------------------------------- the loss of every class


class _Every(NamedTuple):
    """What the sum over the classes needs besides the logits; positions have a class axis."""

    top: Array
    log_whole: Array
    weights: Array  # [C]
    options: tuple[Any, ...]  # the others, in the dtype of the loss


@partial(jax.jit, static_argnums=(0, 1))
def _every(loss, how, args: _Args, every: _Every) -> Array:
    """Return the sum over the classes of the loss that each has as the label."""
    kept = _kept(args)

    @_again
    def step(size, total, start):
        chunk = _chunk(how, kept, size, start)
        weights = _inputs.aligned(chunk.cut(every.weights), chunk.logits.shape)
        options = weights, *every.options
        values = _smoothing.values(loss, chunk.logits - every.top, every.log_whole, options)
        return total + jnp.sum(values, -1, keepdims=True)

    return _inputs.keep(_fold(step, _nothing(args), how, args.kernel.shape[how.axis]), args.where)


def _every_forward(loss, how, args, every):
    return _every(loss, how, args, every), (args, every)


@partial(jax.jit, static_argnums=(0, 1))
def _every_backward(loss, how, residuals, ct):
    args, every = residuals
    ct = _inputs.keep(ct, args.where)

    def of_chunk(chunk):
        weights = _inputs.aligned(chunk.cut(every.weights), chunk.logits.shape)
        options = weights, *every.options
        z = chunk.logits - every.top
        by_n, by_weight, *by_options = _smoothing.slopes(loss, z, every.log_whole, options)

        def of_tree(slope, tree):
            return jax.tree.map(lambda x: _inputs.cotangent_of(x, ct * slope), tree)

        of_weights = jnp.sum(ct * by_weight, range(by_n.ndim - 1))
        of_positions = (
            ct * jnp.sum(by_n, -1, keepdims=True),
            tuple(map(of_tree, by_options, every.options)),
        )
        return -ct * by_n, of_positions, of_weights

    nothing = jax.tree.map(jnp.zeros_like, (every.log_whole, every.options))
    of_args, of_positions, of_weights = _gradients(how, args, of_chunk, nothing, every.weights)
    of_log_whole, of_options = of_positions
    of_every = every._replace(
        top=None, log_whole=of_log_whole, weights=of_weights, options=of_options
    )
    return of_args, of_every


_every_class = jax.custom_vjp(_every, nondiff_argnums=(0, 1))
_every_class.defvjp(_every_forward, _every_backward)


# ---------------------------------------------------------------- the head


def _chunk_size(chunk_size: int | None, positions: int, classes: int) -> int:
    """Return the classes of a step, by default as the public function says."""
    if chunk_size is None:
        unit = 16 if classes < 40 * 128 else 128
        fortieth = unit * -(-classes // (40 * unit))
        most = 128 * (2**23 // (128 * max(1, positions)))
        chunk_size = min(fortieth, max(1024, most))
    elif not isinstance(chunk_size, numbers.Integral) or chunk_size < 1:
        raise _checks.InputError(
            f"chunk_size: got {chunk_size!r}, wanted None or an integer of at least 1"
        )
    return min(int(chunk_size), classes)


def _transposed(x: Any) -> bool:
    """Return whether `x` is known to be another array transposed, such as an embedding.

    A loop over chunks wants its kernel as it is in memory: transposed before the loop it would
    be a copy, and its gradient another. What an array was made of only its tracers know, by
    names that are JAX's own: where they have moved, or nothing is traced, the answer is no.
    """
    passes_on = "convert_element_type", "pvary", "reshard", "sharding_constraint"
    while True:
        while hasattr(x, "primal"):  # under differentiation
            x = x.primal
        made: Any = getattr(x, "parent", None)
        name = str(getattr(made, "primitive", None))
        if name not in passes_on:
            return name == "transpose"
        x = made.in_tracers[0]


def _on_the_mesh(x: Array, of: Array) -> Array:
    """Return `x` as an array of the mesh that `of` is spread over, whole on each device.

    On a mesh with explicit axes a loop adds up only what is of one mesh.
    """
    mesh = jax.typeof(of).sharding.mesh
    if mesh.empty or jax.typeof(x).sharding.mesh == mesh:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))


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
    label_smoothing: float = 0.0,
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
    smoothing = _checks.label_smoothing(label_smoothing)
    return_logsumexp = _checks.flag("return_logsumexp", return_logsumexp)
    _checks.axis_name("class_axis_name", class_axis_name)
    slices = 1 if class_axis_name is None else lax.axis_size(class_axis_name)
    classes = slices * slice_size
    positions = math.prod(losses)
    embedding = _transposed(kernel)
    how = _How(
        _chunk_size(chunk_size, positions, slice_size),
        _checks.logit_softcap(logit_softcap),
        0 if embedding else -1,
    )
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
    start = None
    if class_axis_name is not None:
        start = slice_size * lax.axis_index(class_axis_name)
        same = {"features": features, "labels": labels, "alpha": alpha, "where": mask}
        for name, x in (same | dict(zip(options, prepared))).items():
            not_varying(name, x, class_axis_name)
    labels = jnp.expand_dims(labels, axis)
    mask = _inputs.not_ignored(labels, ignore_label, mask)
    place = labels if start is None else labels - start
    kernel = _on_the_mesh(kernel, features)
    bias = None if bias is None else _on_the_mesh(bias, features)
    # As it is in memory: the two transposes cancel.
    stored = kernel.T if embedding else kernel
    args = aligned_varying(_Args(features, stored, bias, place, mask))[0]
    sums = over_slices(_class_sums(how, args), class_axis_name)
    weight, impossible = _position.label_weight(alpha, labels, classes)
    losses = loss(sums.true - sums.top, sums.rest, (weight, *prepared), mask, impossible)
    if smoothing:
        every = _Every(
            lax.stop_gradient(sums.top),
            log_whole(sums, impossible),
            _smoothing.weights_of_slice(alpha, slice_size, start).astype(dtype),
            _inputs.Kept(dtype, mask)(prepared),
        )
        every = _every_class(loss, how, *aligned_varying(args, every))
        every = every if class_axis_name is None else lax.psum(every, class_axis_name)
        losses = _smoothing.smoothed(losses, every, smoothing, classes)
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
    label_smoothing: float = 0.0,
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
    label_smoothing: float = 0.0,
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
    label_smoothing: float = 0.0,
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
        the wider of the two. An embedding `[C, D]` that is tied to the head is given as
        `embedding.T`, transposed under the same `jit`: then neither it nor its gradient is
        transposed in memory.
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
      label_smoothing: a Python number `s` in [0, 1). The losses are then those of
        `softmax_focal_loss` for the labels `(1 - s) * onehot + s / C`: each class counts
        with its own weight and its own probability. One that is switched off makes them
        infinite unless its weight is 0. It takes four matrix products more: the sum over
        the classes needs the log-sum-exp first. In 16 bits the gradients of features and
        kernel are then sums of two, the label's and that of all the classes, each rounded.
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
      chunk_size: how many classes to take per step. None takes a fortieth of them, so that
        a step's logits, which are in memory twice, stay below a tenth of all; or fewer, for
        many positions: as many as have 2**23 logits (32 MiB, which a TPU holds on the
        chip), but not below 1,024, since every step reads all the features. In multiples of
        128, which fill the matrix units, or of 16 where there are less than 5,120 classes.

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
        `chunk_size` that is not an integer of at least 1, a `label_smoothing` outside
        [0, 1), a `logit_softcap` that is not a finite number > 0; for a kernel or a bias
        whose classes are spread over an explicit axis of a mesh outside of `shard_map`; for
        arguments that vary over `class_axis_name` and should not, where `shard_map` keeps
        account of that (`check_vma=True`).
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
        label_smoothing=label_smoothing,
        logit_softcap=logit_softcap,
        class_axis_name=class_axis_name,
        return_logsumexp=return_logsumexp,
        chunk_size=chunk_size,
        gamma=_inputs.exponent("gamma", gamma),
    )
