"""Focal losses as Flax NNX modules: the options are attributes, the result is reduced."""

from flax import nnx

from focal_jax import _modules

__all__ = ["SigmoidFocalLoss", "SoftmaxFocalLoss"]


class SigmoidFocalLoss(_modules.SigmoidFocalLoss, nnx.Module):
    """Reduced sigmoid focal loss, an nnx module without state.

    The attributes `alpha` and `gamma` are options of `focal_jax.sigmoid_focal_loss`,
    `normalization` and `axis_name` of `focal_jax.reduce_loss`; the result is multiplied
    by `loss_weight`. They are static, never parameters: an array is held as a tuple; one
    that is traced is used as it is.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.nnx import SigmoidFocalLoss
      >>> loss = SigmoidFocalLoss(alpha=0.25, normalization="full")
      >>> f"{loss(jnp.array([0.0, 20.0]), jnp.array([1, 1])):.4f}"
      '0.0217'
    """


class SoftmaxFocalLoss(_modules.SoftmaxFocalLoss, nnx.Module):
    """Reduced softmax focal loss, an nnx module without state.

    The attributes `alpha`, `gamma`, `axis` and `ignore_label` are options of
    `focal_jax.softmax_focal_loss_with_integer_labels`, for integer labels, and but for
    `ignore_label` of `focal_jax.softmax_focal_loss`, for a distribution over the classes;
    `normalization` and `axis_name` are those of `focal_jax.reduce_loss`; the result is
    multiplied by `loss_weight`. They are static, never parameters: an array is held as a
    tuple; one that is traced is used as it is.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.nnx import SoftmaxFocalLoss
      >>> loss = SoftmaxFocalLoss(ignore_label=-1)
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
      >>> f"{loss(logits, jnp.array([0, 1, -1])):.4f}"
      '0.2496'
    """
