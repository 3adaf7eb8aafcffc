"""Softmax focal loss: of class indices, of a distribution, and of a linear layer."""

from typing import Any

from jax import Array
from jax.typing import ArrayLike

from focal_jax.catalogue import declare
from focal_jax.engine import exponent, position_loss, scalar


def _value(terms, gamma):
    return scalar.focal(terms, gamma)


def _slopes(terms, gamma):
    return scalar.minus_dfocal_dlog_p(terms, gamma), scalar.focal(terms, gamma) * terms.log_q


_loss = position_loss(_value, _slopes, gamma=exponent(2.0))


@declare("distribution", ("one-hot", "distribution"), _loss)
def softmax_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Compute the focal loss of a softmax and a distribution over the classes.

    With `p = softmax(logits)` along the class axis and the labels `y`:

        loss = sum over c of alpha_c y_c * (1 - p_c)**gamma * (-log p_c)

    For one-hot labels this is `softmax_focal_loss_with_integer_labels`. For soft labels every class
    has its own factor `(1 - p_c)**gamma`, as in Keras and MindSpore.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import softmax_focal_loss
      >>> logits = jnp.array([[2.0, 0.0, -jnp.inf], [0.0, 0.0, 0.0]])
      >>> labels = jnp.array([[0.9, 0.1, 0.0], [0.0, 0.5, 0.5]])
      >>> [round(x, 4) for x in softmax_focal_loss(logits, labels).tolist()]
      [0.1666, 0.4883]

    Args:
      logits: `[..., C, ...]`: unnormalized log-probabilities.
      labels: `[..., C, ...]`: the weight of each class, at least 0, usually with the sum 1 (labels
        are not normalized). A class with `y_c = 0` contributes 0, also if its logit is -inf.
      alpha: class weights: None, a scalar or `[C]`.
      gamma: focusing exponent, at least 0.
      axis: the class axis.
      where: mask of the losses.

    Returns:
      The losses, of the logits' shape without the class axis.

    References:
      [Lin et al. 2017, Focal Loss for Dense Object Detection](https://arxiv.org/abs/1708.02002).
    """
    return _loss.of_distribution(**locals())


@declare("position", ("integer",), _loss)
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
    r"""Compute the focal loss of a softmax and one class index per position.

    With `p_t` the softmax probability of the label's class:

        loss = alpha_t * (1 - p_t)**gamma * (-log p_t)

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax import softmax_focal_loss_with_integer_labels
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
      >>> labels = jnp.array([0, 1, -1])
      >>> losses = softmax_focal_loss_with_integer_labels(logits, labels, ignore_label=-1)
      >>> [round(x, 4) for x in losses.tolist()]
      [0.0109, 0.4883, 0.0]

    Args:
      logits: `[..., C, ...]`: unnormalized log-probabilities.
      labels: class indices, of the logits' shape without the class axis.
      alpha: class weights: None, a scalar, or `[C]`, from which the label selects.
      gamma: focusing exponent, at least 0.
      axis: the class axis.
      label_smoothing: Python number `s` in [0, 1). The losses are those of `softmax_focal_loss`
        for the labels `(1 - s) * one_hot + s / C`. A class with the logit -inf makes the losses
        infinite unless its class weight is 0.
      ignore_label: positions with this label have loss 0 and gradient 0.
      where: mask of the losses.
      class_axis_name: mapped axes (`shard_map`, `pmap`, `vmap`) over which the classes are
        sharded: the logits are this device's slice of the classes, all slices have one length and
        are in the order of the devices. Labels and alpha refer to all classes. All arguments
        except the logits must be equal on all devices of these axes. The losses are then equal on
        these devices. The devices exchange three numbers per position, four with label smoothing.
      return_logsumexp: whether to return `(losses, logsumexp)`. A z-loss is then
        `losses + 1e-4 * logsumexp**2`.

    Returns:
      The losses, of the labels' shape; or with `return_logsumexp` a pair with the logarithm of
      `sum(exp(logits))`, of the same shape. The log-sum-exp is 0 where masked, and correct for
      invalid labels.

    References:
      [Lin et al. 2017, Focal Loss for Dense Object Detection](https://arxiv.org/abs/1708.02002).
    """
    return _loss(**locals())


@declare("linear", ("integer",), _loss)
def linear_softmax_focal_loss_with_integer_labels(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    label_smoothing: float = 0.0,
    logit_softcap: float | None = None,
    temperature: ArrayLike = 1.0,
    ignore_label: int | None = None,
    where: ArrayLike | None = None,
    class_axis_name: str | tuple[str, ...] | None = None,
    mesh: Any = None,
    return_logsumexp: bool = False,
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
) -> Any:
    r"""Compute the focal loss of a linear layer's softmax without storing its logits.

    With `logits = features @ kernel + bias` and `p_t` the softmax probability of the label's class:

        loss = alpha_t * (1 - p_t)**gamma * (-log p_t)

    For a large vocabulary the logits are the largest array of a training step. This loss computes
    one chunk of classes at a time, once for the loss and again for the gradient, with four matrix
    products. A linear layer followed by a loss takes three. The arguments that are not listed are
    those of `softmax_focal_loss_with_integer_labels`.

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

    Args:
      features: `[..., D]`.
      kernel: `[D, C]`, or `[C, D]` with `transpose_kernel`. The products have the wider dtype of
        features and kernel, and are accumulated in float32 at least.
      labels: class indices, `[...]`. An invalid label makes the gradients of the kernel and the
        bias NaN, because they are sums over the positions.
      bias: None or `[C]`.
      label_smoothing: as in `softmax_focal_loss_with_integer_labels`, with five matrix products, or
        eight with `class_axis_name` or `return_logsumexp`.
      logit_softcap: None or a number > 0: the logits are `cap * tanh(logits / cap)`. A logit of
        -inf stays -inf.
      temperature: number > 0, or an array that broadcasts to the losses, that the logits are
        divided by, after the softcap.
      class_axis_name: as in `softmax_focal_loss_with_integer_labels`. Kernel and bias are then
        this device's slice of the classes, and the features have to be equal on all devices. The
        devices also exchange the features' gradient.
      mesh: a `jax.sharding.Mesh` with automatic axes, outside of `shard_map`. The head then runs in
        `shard_map` itself: the classes of kernel and bias are sharded over `class_axis_name`, and
        the first axis of the positions over all other axes of the mesh. For another layout of the
        positions, pass the `NamedSharding` of the features instead. On an explicit mesh the type of
        the kernel states that its classes are sharded, and neither argument is needed.
      transpose_kernel: whether the kernel is `[C, D]`, such as a tied embedding. Neither the kernel
        nor its gradient is then transposed in memory.
      chunk_size: classes per chunk. By default a fortieth of the classes: the logits of a chunk and
        their gradient take about a twentieth of the memory of all logits. A chunk has at most
        2**23 logits, which fit into a TPU's on-chip memory, unless it has 1,024 classes or fewer.
        The default is a multiple of 128, or of 16 if there are fewer than 5,120 classes.

    Returns:
      The losses, `[...]`; or with `return_logsumexp` a pair with the log-sum-exp, as in
      `softmax_focal_loss_with_integer_labels`.

    References:
      [Lin et al. 2017, Focal Loss for Dense Object Detection](https://arxiv.org/abs/1708.02002).
      [Milakov et al. 2018, Online normalizer calculation for
      softmax](https://arxiv.org/abs/1805.02867).
    """
    return _loss.linear(**locals())
