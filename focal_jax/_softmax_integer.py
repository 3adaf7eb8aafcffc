"""The softmax head for integer labels: one class index for each position."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs, _position, _smoothing
from focal_jax._class_sums import class_sums, log_whole, logsumexp
from focal_jax._varying import not_varying


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _losses(
    loss,
    of_row,
    axis,
    class_axis_name,
    smoothing,
    return_logsumexp,
    logits,
    labels,
    alpha,
    options,
    where,
):
    """Return the losses, and the log-sum-exp if wanted, with a class axis of one."""
    if smoothing or of_row is not None:
        # Two cotangents, which may cancel, are added up before they are rounded.
        logits = logits.astype(_inputs.compute_dtype(logits))
    place, slice_size = labels, logits.shape[axis]
    classes, start = slice_size, None
    if class_axis_name is not None:
        start = slice_size * lax.axis_index(class_axis_name)
        place, classes = labels - start, slice_size * lax.axis_size(class_axis_name)
    sums = class_sums(axis, logits, place, where, class_axis_name)
    weight, impossible = _position.label_weight(alpha, labels, classes)
    if of_row is not None:
        options = *options, of_row(axis, class_axis_name, logits, sums, where)
    losses = loss(sums.true - sums.top, sums.rest, (weight, *options), where, impossible)
    if smoothing:
        weights = _smoothing.weights_of_slice(alpha, slice_size, start)
        weights = lax.expand_dims(weights, [i for i in range(logits.ndim) if i != axis])
        every = _smoothing.over_classes(
            *(loss, axis, logits, sums.top, log_whole(sums, impossible)),
            *((weights, *options), where),
        )
        every = every if class_axis_name is None else lax.psum(every, class_axis_name)
        losses = _smoothing.smoothed(losses, every, smoothing, classes)
    return (losses, logsumexp(sums, impossible, where)) if return_logsumexp else losses


def integer_head(
    loss: Callable[..., Array],
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None,
    axis: int,
    ignore_label: int | None,
    where: ArrayLike | None,
    class_axis_name: str | tuple[str, ...] | None,
    label_smoothing: float = 0.0,
    return_logsumexp: bool = False,
    of_row: Callable[..., Array] | None = None,
    **options: Any,
) -> Any:
    """Return the losses of a `position` loss, whose first option is the weight of the label.

    The other options come by name, in the order in which the loss takes them. What every
    argument means is said in `softmax_focal_loss_with_integer_labels`. A loss of more than a
    row's sums has one option more, which `of_row` makes of the axis, the mapped axes, the
    logits, the sums and the mask.
    """
    logits = _inputs.floating("logits", logits)
    axis = _checks.axis(axis, logits.ndim)
    smoothing = _checks.label_smoothing(label_smoothing)
    labels = _inputs.int32_labels(labels, logits.shape, axis)
    _checks.axis_name("class_axis_name", class_axis_name)
    slices = 1 if class_axis_name is None else lax.axis_size(class_axis_name)
    dtype = _inputs.compute_dtype(logits)
    alpha = _inputs.class_weights(alpha, slices * logits.shape[axis], dtype)
    prepared = _inputs.options(options, labels.shape, dtype, axis)
    mask = _inputs.aligned_mask(where, labels.shape, axis)
    if class_axis_name is not None:
        same = {"labels": labels, "alpha": alpha, "where": mask} | dict(zip(options, prepared))
        for name, x in same.items():
            not_varying(name, x, class_axis_name)
    labels = jnp.expand_dims(labels, axis)
    mask = _inputs.not_ignored(labels, ignore_label, mask)
    pair = _checks.flag("return_logsumexp", return_logsumexp)
    static = loss, of_row, axis, class_axis_name, smoothing, pair
    found = _losses(*static, logits, labels, alpha, prepared, mask)
    return jax.tree.map(lambda x: jnp.squeeze(x, axis), found)


@overload
def softmax_focal_loss_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    axis: int = -1,
    label_smoothing: float = 0.0,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    return_logsumexp: Literal[True],
) -> tuple[Array, Array]: ...


@overload
def softmax_focal_loss_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    axis: int = -1,
    label_smoothing: float = 0.0,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    return_logsumexp: Literal[False] = False,
) -> Array: ...


def softmax_focal_loss_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    axis: int = -1,
    label_smoothing: float = 0.0,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    return_logsumexp: bool = False,
) -> Any:
    r"""Compute the focal loss of a softmax against one class index per position.

    With `p_t` the softmax probability of the position's own class, each loss is

        alpha_t * (1 - p_t)**gamma * (-log p_t)

    Args:
      logits: `[..., C, ...]`, floating: unnormalized log-probabilities. -inf switches a
        class off: probability 0, gradient 0.
      labels: of the logits' shape without the class axis, any integer dtype: class
        indices. One outside `[0, C)` that is not `ignore_label` gives a NaN loss and a
        NaN gradient at its position only.
      alpha: None, a scalar, or `[C]`, one weight per class, picked by the label.
      gamma: focusing exponent, 0 or more. A Python number or an array that broadcasts to
        the losses.
      axis: the class axis.
      label_smoothing: a Python number `s` in [0, 1). The losses are then those of
        `softmax_focal_loss` for the labels `(1 - s) * onehot + s / C`: each class counts
        with its own weight and its own probability. One that is switched off makes them
        infinite unless its weight is 0.
      ignore_label: positions with this label have loss 0 and gradient 0, whatever their
        logits hold.
      where: bool, broadcasts to the losses: likewise where it is False.
      class_axis_name: one name or several of mapped axes (`shard_map`, `pmap`, `vmap`)
        that the classes are spread over: the logits then hold this device's slice of them,
        all slices equally long and in the order of the devices. Labels count through all
        the classes and alpha has a weight for each; they, gamma and `where` are the same
        on every device of these axes, and so are the losses. What the devices exchange is
        a few numbers a position: the largest logit, the true one and the sum.
      return_logsumexp: whether to return `(losses, logsumexp)`, the second being the
        logarithm of the sum over the classes of `exp(logit)`. A z-loss is one line then:
        `losses + 1e-4 * logsumexp**2`.

    Returns:
      The losses, of the labels' shape, not reduced. float32 for 16-bit logits (which are
      computed in float32), else of the logits' dtype. With `return_logsumexp` a pair, the
      log-sum-exp of the losses' shape and dtype: 0, with gradient 0, where the losses are
      masked, and what it is whatever the label where that is none of the classes.

    Raises:
      ValueError: for logits that are not floating, labels that are not integers or have
        another shape, an axis out of range, an alpha of the wrong length, a gamma or
        `where` that does not broadcast to the losses, a `where` that is not bool, a
        negative Python `gamma`, a `label_smoothing` outside [0, 1); for arguments that
        vary over `class_axis_name` and should not, where `shard_map` keeps account of that
        (`check_vma=True`).
      NameError: for a `class_axis_name` that is not bound here.

    Differentiation: reverse mode in logits, alpha and gamma, any number of times, and
      forward over reverse. Forward mode alone is refused by `jax.custom_vjp`;
      `focal_jax.reference.softmax_focal_loss_with_integer_labels` has it. A gradient taken
      inside `pmap`, or inside `shard_map` with `check_vma=False`, is that of the sum of
      what all the devices return, as JAX has it for every collective: with
      `class_axis_name`, divide it by the number of slices.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import softmax_focal_loss_with_integer_labels
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
      >>> labels = jnp.array([0, 1, -1])
      >>> losses = softmax_focal_loss_with_integer_labels(logits, labels, ignore_label=-1)
      >>> [round(x, 4) for x in losses.tolist()]
      [0.0109, 0.4883, 0.0]

    References:
      Lin, Goyal, Girshick, He, Dollar. [Focal Loss for Dense Object
      Detection](https://arxiv.org/abs/1708.02002). ICCV 2017.
    """
    return integer_head(
        _position.focal,
        logits,
        labels,
        alpha=alpha,
        axis=axis,
        ignore_label=ignore_label,
        where=where,
        class_axis_name=class_axis_name,
        label_smoothing=label_smoothing,
        return_logsumexp=return_logsumexp,
        gamma=_inputs.exponent("gamma", gamma),
    )
