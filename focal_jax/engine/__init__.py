"""Make your own focal loss from a value, its slopes (derivatives) and its options.

`elementwise_loss` makes a loss of one logit and its label, `position_loss` a loss of one softmax
position and its class index. Both have the conventions in `focal_jax.__doc__`. Both have a
memory-efficient linear head, and a loss of a position also has label smoothing and sharded classes.
"""

from typing import TYPE_CHECKING

from focal_jax.engine.arguments import InputError
from focal_jax.engine.declaration import Loss
from focal_jax.engine.elementwise import ElementwiseLoss, elementwise_loss
from focal_jax.engine.options import Option, exponent, flag, mask, number
from focal_jax.engine.position import PositionLoss, position_loss
from focal_jax.engine.scalar import (
    Terms,
    abs_power,
    clip_inf,
    cross_entropy,
    divide,
    focal,
    log1p,
    log_abs,
    minus_dfocal_dlog_p,
    power,
    sigmoid_terms,
    signed_abs_power,
    softmax_terms,
    weigh,
)

__all__ = [
    "ElementwiseLoss",
    "InputError",
    "Loss",
    "Option",
    "PositionLoss",
    "Terms",
    "abs_power",
    "clip_inf",
    "cross_entropy",
    "divide",
    "elementwise_loss",
    "exponent",
    "flag",
    "focal",
    "log1p",
    "log_abs",
    "mask",
    "minus_dfocal_dlog_p",
    "number",
    "of_log_probability",
    "position_loss",
    "power",
    "sigmoid_terms",
    "signed_abs_power",
    "softmax_terms",
    "weigh",
]


if TYPE_CHECKING:
    from focal_jax.engine.log_probability import of_log_probability as of_log_probability
else:

    def __getattr__(name):  # loaded on first use
        if name == "of_log_probability":
            from focal_jax.engine.log_probability import of_log_probability

            return of_log_probability
        raise AttributeError(f"module 'focal_jax.engine' has no attribute {name!r}")
