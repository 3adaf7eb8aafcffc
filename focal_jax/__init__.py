"""Focal losses for JAX: hand-derived gradients, right to the last digits."""

import importlib
from typing import TYPE_CHECKING

from focal_jax import reference as reference
from focal_jax._reduction import reduce_loss as reduce_loss
from focal_jax._sigmoid import sigmoid_focal_loss as sigmoid_focal_loss
from focal_jax._softmax import (
    softmax_focal_loss as softmax_focal_loss,
    softmax_focal_loss_with_integer_labels as softmax_focal_loss_with_integer_labels,
)
