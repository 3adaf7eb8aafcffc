"""Focal losses as Flax linen modules: the options are fields, the result is reduced."""

from flax import linen as nn

from focal_jax import _modules

__all__ = ["SigmoidFocalLoss", "SoftmaxFocalLoss"]


class SigmoidFocalLoss(_modules.SigmoidFocalLoss, nn.Module):
    """Reduced sigmoid focal loss, a linen module without parameters.

    The fields `alpha` and `gamma` are options of `focal_jax.sigmoid_focal_loss`,
    `normalization` and `axis_name` of `focal_jax.reduce_loss`; the result is multiplied
    by `loss_weight`. They are constants, never parameters: an array is held as a tuple, so
    that the module hashes and compares; one that is traced is used as it is.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.linen import SigmoidFocalLoss
      >>> loss = SigmoidFocalLoss(alpha=0.25, normalization="full")
      >>> f"{loss(jnp.array([0.0, 20.0]), jnp.array([1, 1])):.4f}"
      '0.0217'
    """

    # linen wraps the methods that a class itself defines, not the ones it inherits.
    __call__ = _modules.SigmoidFocalLoss.__call__


class SoftmaxFocalLoss(_modules.SoftmaxFocalLoss, nn.Module):
    """Reduced softmax focal loss, a linen module without parameters.

    The fields `alpha`, `gamma`, `axis` and `ignore_label` are options of
    `focal_jax.softmax_focal_loss_with_integer_labels`, for integer labels, and but for
    `ignore_label` of `focal_jax.softmax_focal_loss`, for a distribution over the classes;
    `normalization` and `axis_name` are those of `focal_jax.reduce_loss`; the result is
    multiplied by `loss_weight`. They are constants, never parameters: an array is held as a
    tuple, so that the module hashes and compares; one that is traced is used as it is.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.linen import SoftmaxFocalLoss
      >>> loss = SoftmaxFocalLoss(ignore_label=-1)
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
      >>> f"{loss(logits, jnp.array([0, 1, -1])):.4f}"
      '0.2496'
    """

    __call__ = _modules.SoftmaxFocalLoss.__call__
