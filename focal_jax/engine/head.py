"""The head for class indices: one computation over two sources of logits.

The logits are an array (`DenseSource`), or `features @ kernel + bias` in chunks (`LinearSource` in
`linear.py`). In both cases the classes may be sharded over devices. A position loss needs the class
sums; label smoothing needs a sum over all classes.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax.engine import arguments, class_sums
from focal_jax.engine.arguments import InputError
from focal_jax.engine.class_axis import ClassSums
from focal_jax.engine.options import CLASS_WEIGHTS, LABEL_SMOOTHING, check_names, prepare_options
from focal_jax.engine.sharding import AxisName, check_not_varying, class_range, place_like

_BLOCK = 256  # positions whose weights share a cotangent, see `_pick`


class DenseSource(NamedTuple):
    """Logits that are an array."""

    class_axis: int

    def on_shards(self, function: Any, static: Any, logits: Array, name: Any, *others: Any) -> Any:
        return function(static, logits, name, *others)

    def logits_shape(self, logits: Array) -> tuple[int, ...]:
        return logits.shape

    def axis(self, logits: Array) -> int:
        return self.class_axis

    def dtype(self, logits: Array) -> jnp.dtype:
        return arguments.compute_dtype(logits)

    def for_two_cotangents(self, logits: Array) -> Array:
        # Two cotangents that may cancel are added before they are rounded to 16 bits.
        return logits.astype(self.dtype(logits))

    def class_sums(self, logits: Array, labels: Array, where: Array | None) -> ClassSums:
        sums = class_sums.class_sums(self.class_axis, logits, (labels,), where)
        return sums._replace(label_logit=sums.label_logit[0])

    def row_statistics(self, logits: Array, indices: Array | None, where: Array | None) -> Any:
        from focal_jax.engine import row_statistics  # most programs do not use it

        return row_statistics.of_array(self.class_axis, logits, indices, where)

    def sum_over_classes(self, loss: Any, args: Any, smoothing: Any) -> Array:
        from focal_jax.engine import every_class

        others = [i for i in range(args.logits.ndim) if i != self.class_axis]
        alpha = place_like(args.logits, lax.expand_dims(args.alpha, others))
        args = args._replace(alpha=alpha)
        return every_class.sum_over_classes(loss, self.class_axis, args, smoothing)


class _Head(NamedTuple):
    """The static arguments of the head."""

    loss: Any  # a PositionLoss
    source: Any  # a DenseSource or a LinearSource
    label_smoothing: float
    return_logsumexp: bool


def integer_losses(
    loss: Any,
    source: Any,
    logits: Any,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
    class_axis_name: AxisName | None = None,
    return_logsumexp: bool = False,
    **options: Any,
) -> Any:
    """Check and prepare the arguments, and return the losses, or a pair with the log-sum-exp."""
    check_names(loss.__name__, loss.options, options)
    smoothing = LABEL_SMOOTHING.static("label_smoothing", label_smoothing)
    if smoothing and loss.row_option is not None:
        raise InputError(
            f"label_smoothing: got {smoothing}, wanted 0: {loss.__name__} is defined for the class "
            "of the label only, not for every class"
        )
    labels, mask, num_classes = labels_and_mask(
        source, logits, labels, ignore_label, where, class_axis_name
    )
    axis, shape, dtype = source.axis(logits), source.logits_shape(logits), source.dtype(logits)
    losses = shape[:axis] + shape[axis + 1 :]
    alpha = arguments.class_weights(CLASS_WEIGHTS.check("alpha", alpha), num_classes, dtype)
    alpha = alpha.astype(dtype)  # its cotangents are added up in the dtype of the loss
    prepared = prepare_options(loss.options, options, losses, dtype, axis, num_classes)
    check_not_varying({"alpha": alpha, **prepared}, class_axis_name)
    pair = arguments.static_bool("return_logsumexp", return_logsumexp)
    head = _Head(loss, source, smoothing, pair)
    found = source.on_shards(_run, head, logits, class_axis_name, labels, alpha, prepared, mask)
    found = jax.tree.map(lambda x: jnp.squeeze(x, axis), found)
    return found if pair else found[0]


def labels_and_mask(
    source: Any, logits: Any, labels: ArrayLike, ignore_label: int | None, where: Any, name: Any
) -> tuple[Array, Array | None, int]:
    """Return class indices and mask, checked, with a class axis of size 1, and the class count."""
    arguments.check_axis_name("class_axis_name", name)
    axis, shape = source.axis(logits), source.logits_shape(logits)
    num_classes, _ = class_range(shape[axis], name)
    whole = (*shape[:axis], num_classes, *shape[axis + 1 :])
    labels = arguments.integer_labels(labels, whole, axis, ignore_label)
    mask = arguments.mask_array(where, labels.shape, axis)
    check_not_varying({"labels": labels, "where": mask}, name)
    labels = jnp.expand_dims(labels, axis)
    return labels, arguments.not_ignored(labels, ignore_label, mask), num_classes


@partial(jax.jit, static_argnums=(0, 2))
def _run(
    head: _Head, logits: Any, name: AxisName | None, labels: Array, alpha: Array, options, where
) -> Any:
    """Return the losses and, if asked for, the log-sum-exp, with a class axis of size 1."""
    source = head.source
    axis = source.axis(logits)
    first = jax.tree.leaves(logits)[0]
    labels, alpha, options, where = place_like(first, (labels, alpha, options, where))
    local = source.logits_shape(logits)[axis]
    num_classes, start = class_range(local, name)
    local_labels = labels if start is None else labels - start
    weight, invalid = label_weight(alpha, labels, num_classes)
    if head.label_smoothing:
        from focal_jax.engine.every_class import smoothed_losses  # most programs do not use it

        args = local_labels, alpha, start, options, where, invalid, num_classes
        return smoothed_losses(head, logits, name, *args)
    if head.loss.row_option is not None or head.return_logsumexp:
        logits = source.for_two_cotangents(logits)
    sums = class_sums.sum_over_shards(source.class_sums(logits, local_labels, where), name)
    if head.loss.row_option is not None:
        option, of_row = head.loss.row_option
        options = options | {option: of_row(axis, name, logits, sums, where)}
    label_logit = sums.label_logit - lax.stop_gradient(sums.max_logit)
    losses = head.loss.of_sums(label_logit, sums.rest, weight, options, where, invalid)
    pair = (class_sums.log_sum_exp(sums, invalid, where),) if head.return_logsumexp else ()
    return losses, *pair


def label_weight(alpha: Array, labels: Array, num_classes: int) -> tuple[Array, Array]:
    """Return the weight of each position's label, and where the label is not a class."""
    invalid = (labels < 0) | (labels >= num_classes)
    if not alpha.ndim:
        return arguments.align(alpha, labels.shape), invalid
    # One more class, with weight 0, for invalid labels.
    return _pick(jnp.pad(alpha, (0, 1)), jnp.where(invalid, num_classes, labels)), invalid


@jax.custom_jvp
def _pick(weights: Array, labels: Array) -> Array:
    # On an explicit mesh, a gather needs the sharding of its result.
    return weights.at[labels].get(out_sharding=jax.typeof(labels).sharding)


@_pick.defjvp
def _pick_jvp(primals, tangents):
    # The transpose of a gather adds the cotangents one after another, which loses digits if there
    # are many. So each block of positions gets its own copy of the weights, and a reduction adds
    # the cotangents of the copies. The sum of zeros makes the copy depend on the labels, so that
    # under `vmap` every example has its own copy too.
    weights, labels = primals
    zero = 0 * labels  # so that the index of the block has the sharding of the labels
    block = jnp.arange(labels.size, dtype=labels.dtype).reshape(labels.shape) // _BLOCK + zero
    own = tangents[0] + jnp.sum(zero).astype(weights.dtype)
    own = jnp.broadcast_to(own, (labels.size // _BLOCK + 1, weights.size))
    sharding = jax.typeof(labels).sharding
    return _pick(*primals), own.at[block, labels].get(out_sharding=sharding)
