"""Sums over all classes, `sum over c of w_c f(p_c)`: soft labels, label smoothing, region losses.

`f` is the value of a position loss with class c as the true class. Label smoothing and soft labels
differ in the weights only.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax.engine import arguments, checks, scalar
from focal_jax.engine.blocks import in_blocks
from focal_jax.engine.class_axis import cast_logits, class_index, pick_class, reduce_classes
from focal_jax.engine.cpu import compile_separately
from focal_jax.engine.cpu_sums import is_at_most
from focal_jax.engine.options import CLASS_WEIGHTS, check_names, prepare_options, unwrap
from focal_jax.engine.platform import by_platform
from focal_jax.engine.rows import (
    RowSums,
    Split,
    class_terms,
    direct_gradient,
    is_near_max,
    log_total,
    max_class_on_cpu,
    plain_row,
    row_cotangent,
    row_over_shards,
    shift_logits,
    whole_gradient,
    zero_near_max,
)
from focal_jax.engine.rules import with_gradient
from focal_jax.engine.sharding import cast_to_common_varying, place_like


class ClassArgs(NamedTuple):
    """Arguments of the sum over the classes. All arrays have the rank of the logits."""

    logits: Any  # an array, or a `chunks.Linear`
    # The weights of the classes; or the label's class index, for smoothed labels.
    labels: Any
    alpha: Any  # part of a `chunks.Linear`, where it is None here
    options: dict[str, Any]
    where: Array | None
    invalid: Array | None = None  # invalid class indices, for smoothed labels
    # The row sums over all classes, if the logits are a slice or the sums are used elsewhere.
    row: RowSums | None = None
    class_index: Array | None = None  # for smoothed labels


class Smoothing(NamedTuple):
    """Label smoothing: the label's class has the weight `1 - s + s / C`, the others `s / C`."""

    s: float
    num_classes: int

    def weights(self, is_label: Array, dtype: jnp.dtype) -> Array:
        """Return the weight of each class."""
        one_hot = jnp.where(is_label, jnp.ones((), dtype), 0)
        share = 0 if self.num_classes == 0 else self.s / self.num_classes
        return (1 - self.s) * one_hot + share


class ClassSlopes(NamedTuple):
    """Derivatives of each class's summand."""

    by_n: Array
    labels: Array
    alpha: Array
    options: dict[str, Any]


def class_values(loss: Any, x: Array, exps: Split, y: Array, alpha: Array, options: Any) -> Array:
    """Return each class's summand, `alpha_c y_c f(p_c)`."""
    weight, t = alpha * y, class_terms(x, exps)
    # Higher derivatives multiply n by slopes of 0, so it is finite where the weight is 0.
    t = t._replace(n=jnp.where(weight == 0, scalar.clip_inf(t.n), t.n))
    return scalar.weigh(weight, loss.value_of(t, options))


def class_slopes(
    loss: Any, x: Array, exps: Split, y: Array, alpha: Array, options: Any
) -> ClassSlopes:
    """Return the derivatives of each class's summand."""
    t = scalar.finite(class_terms(x, exps))
    value = loss.value_of(t, options)
    by_n, of_options = loss.slopes_of(t, options)
    weight = alpha * y
    scaled = {k: None if slope is None else weight * slope for k, slope in of_options.items()}
    return ClassSlopes(weight * by_n, alpha * value, y * value, scaled)


# ---------------------------------------------------------------- dense logits


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_in_one_pass(axis: int, at_max: Array, by_n: Array, *others: Array):
    """Return the sums of the slopes, and a tuple of the sums of the others, by one reduction.

    XLA:GPU writes the slopes to memory if the operands of the reduction use them twice. So they
    are one operand, and the combination selects the classes with the largest logit.
    """

    def select(at_max, v, rest):
        return jnp.where(at_max, v, 0), jnp.where(at_max, rest, rest + v)

    def combine(a, b):
        slopes = jax.tree.map(jnp.add, select(*a[:3]), select(*b[:3]))
        return jnp.ones_like(a[0]), *slopes, jax.tree.map(jnp.add, a[3], b[3])

    zero = jnp.zeros((), by_n.dtype)
    initial = jnp.array(True), zero, zero, (zero,) * len(others)
    operands = at_max, by_n, jnp.zeros_like(by_n), others
    *slopes, sums = reduce_classes(axis, operands, initial, combine)
    # With one class, XLA may return the operand without calling `combine`.
    own, rest = select(*slopes) if is_at_most(by_n.shape[axis], 1) else slopes[1:]
    return Split(own, rest), sums


@_sum_in_one_pass.defjvp
def _sum_in_one_pass_jvp(axis, primals, tangents):
    _, dv, *d_others = tangents
    total = partial(jnp.sum, axis=axis, keepdims=True)
    slopes = Split(total(jnp.where(primals[0], dv, 0)), total(jnp.where(primals[0], 0, dv)))
    return _sum_in_one_pass(axis, *primals), (slopes, tuple(map(total, d_others)))


class _Spec(NamedTuple):
    """The static arguments of the core."""

    loss: Any  # a PositionLoss
    axis: int
    smoothing: Smoothing | None


def _with_index(spec: _Spec, args: ClassArgs) -> ClassArgs:
    """Return the arguments with the class indices."""
    # Computed here, because the arrays may be flat inside `compile_separately`.
    if spec.smoothing is None:
        return args
    return args._replace(class_index=class_index(args.logits, spec.axis))


def _row(spec: _Spec, args: ClassArgs) -> RowSums:
    """Return the row sums."""
    row = plain_row(spec.axis, args.logits, args.where) if args.row is None else args.row
    return row._replace(max_logit=lax.stop_gradient(row.max_logit))


def _prepare(spec: _Spec, args: ClassArgs, row: RowSums, for_backward: bool):
    """Return the shifted logits, the weights, alpha, the options, and where labels are invalid."""
    z = cast_logits(args.logits, args.where)
    x = shift_logits(z, row.max_logit, for_backward=for_backward)
    cast = partial(arguments.cast_and_mask, dtype=z.dtype, where=args.where)
    alpha, options = cast(args.alpha), {k: unwrap(v) for k, v in cast(args.options).items()}
    if spec.smoothing is not None:
        is_label = args.class_index == args.labels
        return x, spec.smoothing.weights(is_label, z.dtype), alpha, options, jnp.array(False)
    y, invalid = arguments.clip_labels(args.labels, cast(args.labels), jnp.inf)
    return x, y, alpha, options, invalid


def _summands(spec: _Spec, args: ClassArgs, row: RowSums) -> Array:
    x, y, alpha, options, invalid = _prepare(spec, args, row, False)
    return jnp.where(invalid, jnp.nan, class_values(spec.loss, x, row.exps, y, alpha, options))


def _slopes(spec: _Spec, args: ClassArgs, row: RowSums, *, for_backward: bool) -> ClassSlopes:
    x, y, alpha, options, _ = _prepare(spec, args, row, for_backward)
    return class_slopes(spec.loss, x, row.exps, y, alpha, options)


def _by_logits(function: Any) -> Any:
    """Return a function of `ClassArgs` with the logits first, for `compile_separately`."""
    return lambda logits, args, *more: function(args._replace(logits=logits), *more)


def _losses_on_cpu(spec: _Spec, args: ClassArgs, row: RowSums) -> Array:
    others = args._replace(logits=None, row=None, invalid=None)
    summands = _by_logits(partial(_summands, spec))

    def losses(*args):
        return jnp.sum(compile_separately(summands, *args), spec.axis, keepdims=True)

    return in_blocks(losses, spec.axis, args.logits, others, row)


def _finish(losses: Array, args: ClassArgs) -> Array:
    invalid = jnp.array(False) if args.invalid is None else args.invalid
    return arguments.mask_and_invalidate(losses, invalid, args.where)


def _forward_on_cpu(spec: _Spec, args: ClassArgs, row: RowSums):
    # The sums of the slopes are left to the backward pass, which writes the slopes to memory.
    zero = jnp.zeros_like(row.max_logit)
    return _losses_on_cpu(spec, args, row), Split(zero, zero)


def _forward_elsewhere(spec: _Spec, args: ClassArgs, row: RowSums):
    by_n = _slopes(spec, args, row, for_backward=False).by_n
    near = is_near_max(cast_logits(args.logits, args.where) - row.max_logit)
    slopes, (losses,) = _sum_in_one_pass(spec.axis, near, by_n, _summands(spec, args, row))
    return losses, slopes


def _gradient(spec: _Spec, args: ClassArgs, row: RowSums, by_n: Array, slopes: Split) -> Array:
    z = cast_logits(args.logits, args.where)
    x = shift_logits(z, row.max_logit, for_backward=True)
    if args.row is not None:
        return direct_gradient(x, row.exps, by_n)
    return whole_gradient(x, row.exps, by_n, slopes)


def _zero_at_index(by_n: Array, index: Array, max_index: Array) -> Array:
    return by_n * jnp.minimum(jnp.abs(index - max_index), 1).astype(by_n.dtype)


def _sum_slopes_in_passes(axis: int, logits: Array, by_n: Array, top: Array, where) -> Split:
    z = cast_logits(logits, where)
    max_index = max_class_on_cpu(z, axis)
    if max_index is not None:
        # The largest logit of one shard of the classes may be below that of all shards.
        max_index = jnp.where(pick_class(z, max_index, axis) < top, -1, max_index)
        last = axis == logits.ndim - 1
        compute = _zero_at_index if last else partial(compile_separately, _zero_at_index)
        rest = jnp.sum(compute(by_n, class_index(z, axis), max_index), axis, keepdims=True)
        return Split(pick_class(by_n, max_index, axis), rest)
    total = jnp.sum(by_n, axis, keepdims=True)
    # XLA:CPU writes an expression that two sums share to memory, even a broadcast constant. The
    # barrier and the factor of 2 keep this sum different from the sums of the forward pass.
    top, _ = lax.optimization_barrier((top, lax.stop_gradient(total)))
    rest = 0.5 * jnp.sum(zero_near_max(z - top, by_n, scale=2.0), axis, keepdims=True)
    return Split(total - rest, rest)


def _gradient_on_cpu(spec: _Spec, args: ClassArgs, row: RowSums, slopes: Split, losses: Array):
    del slopes
    others = args._replace(logits=None, invalid=None)

    def by_n(args, row):
        return _slopes(spec, args, row, for_backward=False).by_n

    # The slopes are written to memory once, into the freed buffer of the losses' summands.
    found = compile_separately(_by_logits(by_n), args.logits, others, row, after=losses)
    slopes = _sum_slopes_in_passes(spec.axis, args.logits, found, row.max_logit, args.where)
    gradient = _by_logits(partial(_gradient, spec))
    return compile_separately(gradient, args.logits, others, row, found, slopes), slopes


def _gradient_elsewhere(spec: _Spec, args: ClassArgs, row: RowSums, slopes: Split, losses: Array):
    del losses
    found = _slopes(spec, args, row, for_backward=True).by_n
    return _gradient(spec, args, row, found, slopes), slopes


@partial(jax.jit, static_argnums=0)
def _primal(spec: _Spec, args: ClassArgs) -> Array:
    args, row = _with_index(spec, args), _row(spec, args)
    return _finish(_losses_on_cpu(spec, args, row), args)


@partial(jax.jit, static_argnums=0)
def _values_and_sums(spec: _Spec, args: ClassArgs):
    args, row = _with_index(spec, args), _row(spec, args)
    on_cpu, elsewhere = (partial(form, spec) for form in (_forward_on_cpu, _forward_elsewhere))
    losses, slopes = by_platform(on_cpu, elsewhere, args, row)
    return _finish(losses, args), row, slopes


def _forward(spec: _Spec, args: ClassArgs):
    # The arguments are no results of the compiled function: eager JAX would report a masked NaN
    # among them with `jax_debug_nans`.
    losses, row, slopes = _values_and_sums(spec, args)
    return losses, (args, row, slopes, losses)


def _backward(spec: _Spec, residuals, ct: Array):
    args, row, slopes, losses = residuals
    args = _with_index(spec, args)
    on_cpu, elsewhere = (partial(form, spec) for form in (_gradient_on_cpu, _gradient_elsewhere))

    def scaled(slope, losses=losses, ct=ct, where=args.where):
        # One invalid label makes the slopes of its whole position NaN, like the loss.
        slope = arguments.mask_and_invalidate(slope, jnp.isnan(losses), where)
        return arguments.scale_cotangent(ct, slope)

    def cotangent(slope, tree):
        return jax.tree.map(lambda x: arguments.cotangent_like(x, scaled(slope)), tree)

    def of_logits(form, logits, others, row, slopes, losses, ct):
        dz, slopes = form(others._replace(logits=logits), row, slopes, losses)
        return arguments.cotangent_like(logits, scaled(dz, losses, ct, others.where)), slopes

    in_passes = partial(in_blocks, partial(of_logits, on_cpu), spec.axis)
    arrays = args.logits, args._replace(logits=None, invalid=None), row, slopes, losses, ct
    dz, slopes = by_platform(in_passes, partial(of_logits, elsewhere), *arrays)
    found = _slopes(spec, args, row, for_backward=True)
    of_row = None
    if args.row is not None:
        of_exps = jax.tree.map(scaled, row_cotangent(row.exps, slopes))
        of_row = RowSums(jnp.zeros_like(row.max_logit), of_exps)
    of_args = ClassArgs(
        dz,
        None if spec.smoothing is not None else cotangent(found.labels, args.labels),
        cotangent(found.alpha, args.alpha),
        {name: cotangent(found.options[name], x) for name, x in args.options.items()},
        None,
        None,
        of_row,
    )
    return (of_args,)


_core = with_gradient(_primal, _forward, _backward, num_static=1)


def sum_over_classes(loss: Any, axis: int, args: ClassArgs, smoothing: Smoothing | None) -> Array:
    """Return `sum over c of alpha_c y_c f(p_c)` for each position, with a class axis of size 1.

    `y_c` is the array `args.labels`, or with `smoothing` the smoothed one-hot distribution of the
    class index `args.labels`. If `args.row` is given, its derivative is returned separately: the
    logits may then be a slice of the classes, and the caller adds up the slices.
    """
    return _core(_Spec(loss, axis, smoothing), cast_to_common_varying(args)[0])


def smoothed_losses(
    head: Any, logits, name, local_labels, alpha: Array, start, options, where, invalid, num_classes
) -> Any:
    """Return the losses of smoothed labels and, if asked for, the log-sum-exp; see `head._run`."""
    from focal_jax.engine import row_statistics  # only for these sums

    source, row = head.source, None
    weights = jnp.broadcast_to(alpha, (num_classes,))
    if start is not None:  # those of this device's classes
        local = source.logits_shape(logits)[source.axis(logits)]
        weights = lax.dynamic_slice_in_dim(weights, start, local)
    if name is not None or head.return_logsumexp:
        logits = source.for_two_cotangents(logits)
        row = row_statistics.row_of(source.row_statistics(logits, None, where))
        row = row_over_shards(row, name)
    args = ClassArgs(logits, local_labels, weights, options, where, invalid, row)
    smoothing = Smoothing(head.label_smoothing, num_classes)
    losses = source.sum_over_classes(head.loss, args, smoothing)
    losses = losses if name is None else lax.psum(losses, name)
    if row is None or not head.return_logsumexp:
        return (losses,)
    return losses, arguments.mask_to_zero(row.max_logit + log_total(row.exps), where)


def distribution_losses(
    loss: Any, logits: ArrayLike, labels: ArrayLike, alpha: Any, axis: int, where: Any, options: Any
) -> Array:
    """Return `sum over c of alpha_c y_c f(p_c)`, see `PositionLoss.of_distribution`."""
    check_names(loss.__name__, loss.options, options)
    logits, labels, axis, losses = checks.distribution_over_classes(logits, labels, axis)
    dtype, num_classes = arguments.compute_dtype(logits), logits.shape[axis]
    alpha = arguments.class_weights(CLASS_WEIGHTS.check("alpha", alpha), num_classes, dtype)
    alpha = alpha.reshape([alpha.size if i == axis else 1 for i in range(logits.ndim)])
    prepared = prepare_options(loss.options, options, losses, dtype, axis, num_classes)
    mask = arguments.mask_array(where, losses, axis)
    args = ClassArgs(logits, *place_like(logits, (labels, alpha, prepared, mask)))
    return jnp.squeeze(sum_over_classes(loss, axis, args, None), axis)


# ---------------------------------------------------------------- probabilities of all classes


def _probabilities(axis: int, logits: Array, where: Array | None) -> tuple[Array, Array]:
    t, *_ = _probability_terms(axis, logits, where, for_backward=False)
    return t.p, t.q


def _probability_terms(axis: int, logits: Array, where: Array | None, *, for_backward: bool):
    row = plain_row(axis, logits, where)
    x = shift_logits(cast_logits(logits, where), row.max_logit, for_backward=for_backward)
    return class_terms(x, row.exps), x, row


def _probabilities_forward(axis, *args):
    return _probabilities(axis, *args), args


def _probabilities_backward(axis, args, cts):
    logits, where = args
    t, _, row = _probability_terms(axis, *args, for_backward=True)
    by_n = t.p * (cts[1] - cts[0])

    def in_one_pass(logits, by_n, top, where):
        return _sum_in_one_pass(axis, is_near_max(cast_logits(logits, where) - top), by_n)[0]

    sums = partial(_sum_slopes_in_passes, axis), in_one_pass
    slopes = by_platform(*sums, logits, by_n, lax.stop_gradient(row.max_logit), where)

    def gradient(logits, by_n, row, slopes, where):
        x = shift_logits(cast_logits(logits, where), row.max_logit, for_backward=True)
        return arguments.mask_to_zero(whole_gradient(x, row.exps, by_n, slopes), where)

    row = row._replace(max_logit=lax.stop_gradient(row.max_logit))
    dz = compile_separately(gradient, logits, by_n, row, slopes, where)
    return dz.astype(logits.dtype), None


_probabilities_core = with_gradient(
    _probabilities, _probabilities_forward, _probabilities_backward, num_static=1
)


def class_probabilities(axis: int, logits: Array, where: Array | None) -> tuple[Array, Array]:
    """Return the softmax probability p of each class, and `1 - p` without cancellation."""
    return _probabilities_core(axis, logits, where)
