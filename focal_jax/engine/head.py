"""The head for class indices: one computation over two sources of logits.

The logits are an array, or `features @ kernel + bias` in chunks. In both cases the classes may be
sharded over devices. A position loss needs the class sums; label smoothing needs a sum over all
classes.
"""

import math
import numbers
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from focal_jax.engine import arguments, chunks, class_sums, every_class, rows
from focal_jax.engine.arguments import InputError
from focal_jax.engine.class_sums import AxisName, ClassSums
from focal_jax.engine.every_class import ClassArgs, Smoothing
from focal_jax.engine.options import CLASS_WEIGHTS, check_names
from focal_jax.engine.rows import Row
from focal_jax.engine.sharding import check_not_varying

# ---------------------------------------------------------------- two sources of logits


class DenseSource(NamedTuple):
    """Logits that are an array."""

    axis: int

    def local_classes(self, logits: Array) -> int:
        return logits.shape[self.axis]

    def for_two_cotangents(self, logits: Array) -> Array:
        # Two cotangents that may cancel are added before they are rounded to 16 bits.
        return logits.astype(arguments.compute_dtype(logits))

    def class_sums(self, logits: Array, place: Array, where: Array | None) -> ClassSums:
        sums = class_sums.class_sums(self.axis, logits, (place,), where)
        return sums._replace(label_logit=sums.label_logit[0])

    def row_sums(self, logits: Array, where: Array | None) -> Row:
        return rows.row_sums(self.axis, logits, where)

    def sum_over_classes(self, loss: Any, args: ClassArgs, smoothing: Smoothing) -> Array:
        others = [i for i in range(args.logits.ndim) if i != self.axis]
        args = args._replace(alpha=lax.expand_dims(args.alpha, others))
        return every_class.sum_over_classes(loss, self.axis, args, smoothing)


class LinearSource(NamedTuple):
    """Logits that are `features @ kernel + bias`."""

    spec: chunks.ChunkSpec
    axis: int  # of the classes in the logits: the last

    def local_classes(self, linear: chunks.Linear) -> int:
        return linear.kernel.shape[self.spec.class_axis]

    def for_two_cotangents(self, linear: chunks.Linear) -> chunks.Linear:
        return linear  # wider features would make the products slower

    def class_sums(self, linear: chunks.Linear, place: Array, where: Array | None) -> ClassSums:
        return chunks.class_sums(self.spec, linear, place, where)

    def row_sums(self, linear: chunks.Linear, where: Array | None) -> Row:
        return chunks.row_sums(self.spec, linear, where)

    def sum_over_classes(self, loss: Any, args: ClassArgs, smoothing: Smoothing) -> Array:
        # In the dtype of the loss, in which the chunks' cotangents are added up.
        dtype = arguments.compute_dtype(args.logits.features)
        options = arguments.cast_and_mask(args.options, dtype, None)
        args = args._replace(options=options, alpha=args.alpha.astype(dtype))
        return chunks.sum_over_classes(loss, self.spec, args, smoothing)


def linear_arrays(
    features: ArrayLike, kernel: ArrayLike, bias: ArrayLike | None, transpose_kernel: bool
) -> chunks.Linear:
    """Return the arrays of a linear source, checked."""
    features = arguments.floating_array("features", features)
    kernel = arguments.floating_array("kernel", kernel)
    depth_axis = 1 if transpose_kernel else 0
    if kernel.ndim != 2 or features.shape[-1:] != (kernel.shape[depth_axis],):
        wanted = "(C, D) with transpose_kernel=True" if transpose_kernel else "(D, C)"
        raise InputError(
            f"kernel: got shape {kernel.shape}, wanted {wanted}, with D the last axis of the "
            f"features, whose shape is {features.shape}"
        )
    num_classes = kernel.shape[1 - depth_axis]
    _check_classes_not_sharded("kernel", kernel, 1 - depth_axis)
    features = features.astype(jnp.promote_types(features.dtype, kernel.dtype))
    if bias is not None:
        bias = arguments.floating_array("bias", bias)
        arguments.check_shape("bias", bias, (num_classes,), "one number per class")
        _check_classes_not_sharded("bias", bias, 0)
        bias = _replicate_on_mesh(bias, features)
    return chunks.Linear(features, _replicate_on_mesh(kernel, features), bias)


def linear_source(
    linear: chunks.Linear,
    transpose_kernel: bool,
    logit_softcap: float | None,
    chunk_size: int | None,
) -> LinearSource:
    """Return the static description of a linear source."""
    class_axis, losses = 0 if transpose_kernel else -1, linear.features.shape[:-1]
    size = _chunk_size(chunk_size, math.prod(losses), linear.kernel.shape[class_axis])
    softcap = arguments.static_logit_softcap(logit_softcap)
    return LinearSource(chunks.ChunkSpec(size, softcap, class_axis), len(losses))


def _check_classes_not_sharded(name: str, x: Array, axis: int) -> None:
    """Raise if the type of `x` shards the classes. With automatic axes, XLA gathers them."""
    mesh_axis = jax.typeof(x).sharding.spec[axis]
    if mesh_axis is not None:
        raise InputError(
            f"{name}: got classes that are sharded over the mesh axis {mesh_axis!r}, wanted all "
            "classes on every device, or a slice of them inside jax.shard_map, with "
            "class_axis_name"
        )


def _replicate_on_mesh(x: Array, like: Array) -> Array:
    """Return `x` replicated over the mesh of `like`.

    On an explicit mesh the carry of a scan must not mix arrays of different meshes.
    """
    mesh = jax.typeof(like).sharding.mesh
    if mesh.empty or jax.typeof(x).sharding.mesh == mesh:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))


def _chunk_size(chunk_size: int | None, positions: int, num_classes: int) -> int:
    """Return the number of classes per chunk; the default is the public function's."""
    if chunk_size is None:
        unit = 16 if num_classes < 40 * 128 else 128
        fortieth = unit * -(-num_classes // (40 * unit))
        most = 128 * (2**23 // (128 * max(1, positions)))
        chunk_size = min(fortieth, max(1024, most))
    elif not isinstance(chunk_size, numbers.Integral) or chunk_size < 1:
        raise InputError(f"chunk_size: got {chunk_size!r}, wanted None or an integer of at least 1")
    return min(int(chunk_size), num_classes)


# ---------------------------------------------------------------- the head


class _Head(NamedTuple):
    """The static arguments of the head."""

    loss: Any  # a PositionLoss
    source: DenseSource | LinearSource
    class_axis_name: AxisName | None
    label_smoothing: float
    return_logsumexp: bool


def integer_losses(
    loss: Any,
    source: Any,
    logits: Any,
    labels: ArrayLike,
    *,
    losses: tuple[int, ...],
    num_classes: int,
    dtype: jnp.dtype,
    alpha: ArrayLike | None,
    label_smoothing: float,
    ignore_label: int | None,
    where: ArrayLike | None,
    class_axis_name: AxisName | None,
    return_logsumexp: bool,
    options: Mapping[str, Any],
    replicated: Mapping[str, Array] | None = None,
) -> Any:
    """Check and prepare the arguments, and return the losses, or a pair with the log-sum-exp."""
    check_names(loss.__name__, loss.options, options)
    smoothing = arguments.static_label_smoothing(label_smoothing)
    if smoothing and loss.row_option is not None:
        raise InputError(
            f"label_smoothing: got {smoothing}, wanted 0: {loss.__name__} compares the label's "
            "class with one other class, not every class with every other"
        )
    arguments.check_axis_name("class_axis_name", class_axis_name)
    shards = 1 if class_axis_name is None else lax.axis_size(class_axis_name)
    axis, num_classes = source.axis, shards * num_classes
    labels = arguments.integer_labels(labels, (*losses[:axis], num_classes, *losses[axis:]), axis)
    CLASS_WEIGHTS.check("alpha", alpha)
    alpha = arguments.class_weights(alpha, num_classes, dtype)
    prepared = {
        name: option.prepare(name, options.get(name, option.default), losses, dtype, axis)
        for name, option in loss.options.items()
    }
    mask = arguments.mask_array(where, losses, axis)
    if class_axis_name is not None:
        same = {**(replicated or {}), "labels": labels, "alpha": alpha, "where": mask, **prepared}
        for name, x in same.items():
            check_not_varying(name, x, class_axis_name)
    labels = jnp.expand_dims(labels, axis)
    mask = arguments.not_ignored(labels, ignore_label, mask)
    pair = arguments.static_bool("return_logsumexp", return_logsumexp)
    head = _Head(loss, source, class_axis_name, smoothing, pair)
    found = _run(head, logits, labels, alpha, prepared, mask)
    found = jax.tree.map(lambda x: jnp.squeeze(x, axis), found)
    return found if pair else found[0]


@partial(jax.jit, static_argnums=0)
def _run(head: _Head, logits: Any, labels: Array, alpha: Array, options: Any, where: Any) -> Any:
    """Return the losses and, if asked for, the log-sum-exp, with a class axis of size 1."""
    source, name = head.source, head.class_axis_name
    local, place, start = source.local_classes(logits), labels, None
    num_classes = local
    if name is not None:
        start = local * lax.axis_index(name)
        place, num_classes = labels - start, local * lax.axis_size(name)
    weight, invalid = _label_weight(alpha, labels, num_classes)
    if head.label_smoothing:
        row = None
        if name is not None or head.return_logsumexp:
            logits = source.for_two_cotangents(logits)
            row = rows.row_over_shards(source.row_sums(logits, where), name)
        weights = _local_weights(alpha, local, start)
        args = ClassArgs(logits, place, weights, options, where, invalid, row)
        smoothing = Smoothing(head.label_smoothing, num_classes)
        losses = source.sum_over_classes(head.loss, args, smoothing)
        losses = losses if name is None else lax.psum(losses, name)
        if not head.return_logsumexp:
            return (losses,)
        log_sum_exp = row.max_logit + rows.row_log_sum(row)
        return losses, arguments.mask_to_zero(log_sum_exp, where)
    if head.loss.row_option is not None or head.return_logsumexp:
        logits = source.for_two_cotangents(logits)
    sums = class_sums.sum_over_shards(source.class_sums(logits, place, where), name)
    if head.loss.row_option is not None:
        option, of_row = head.loss.row_option
        options = options | {option: of_row(source.axis, name, logits, sums, where)}
    label_logit = sums.label_logit - lax.stop_gradient(sums.max_logit)
    losses = head.loss.of_sums(label_logit, sums.rest, weight, options, where, invalid)
    if not head.return_logsumexp:
        return (losses,)
    return losses, class_sums.log_sum_exp(sums, invalid, where)


def _label_weight(alpha: Array, labels: Array, num_classes: int) -> tuple[Array, Array]:
    """Return the weight of each position's label, and where the label is not a class."""
    invalid = (labels < 0) | (labels >= num_classes)
    if not alpha.ndim:
        return arguments.align(alpha, labels.shape), invalid
    # One more class, with weight 0, for invalid labels. On an explicit mesh, a gather needs the
    # sharding of its result.
    place = jnp.where(invalid, num_classes, labels)
    sharding = jax.typeof(labels).sharding
    return jnp.pad(alpha, (0, 1)).at[place].get(out_sharding=sharding), invalid


def _local_weights(alpha: Array, local: int, start: Array | None) -> Array:
    """Return one weight for each of this device's classes."""
    if alpha.ndim and start is not None:
        return lax.dynamic_slice_in_dim(alpha, start, local)
    return jnp.broadcast_to(alpha, (local,))
