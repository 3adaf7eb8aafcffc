"""The old name of two rooms."""

from focal_jax._softmax_integer import (
    softmax_focal_loss_with_integer_labels as softmax_focal_loss_with_integer_labels,
)
from focal_jax._softmax_soft import softmax_focal_loss as softmax_focal_loss
