"""Focal loss plus epsilon times the probability of an error, a loss of one softmax position.

It has no slopes: JAX differentiates the value inside the engine. It has a linear head.
"""

import inspect

import focal_jax
from focal_jax import engine


def _shifted(terms, gamma, epsilon):
    return engine.focal(terms, gamma) + epsilon * terms.q


SHIFTED = engine.position_loss(
    _shifted, gamma=engine.exponent(2.0), epsilon=engine.number(1.0, low=0.0)
)


def linear_shifted(features, kernel, labels, **options):
    return SHIFTED.linear(features, kernel, labels, **options)


# The arguments of the linear head of this package, and epsilon.
_signature = inspect.signature(focal_jax.linear_softmax_focal_loss_with_integer_labels)
_epsilon = inspect.Parameter("epsilon", inspect.Parameter.KEYWORD_ONLY, default=1.0)
linear_shifted.__signature__ = _signature.replace(
    parameters=[*_signature.parameters.values(), _epsilon]
)
LINEAR_SHIFTED = SHIFTED.declaration._replace(
    name="linear_shifted", kind="linear", function=linear_shifted
)


def shifted_formula(ops, log_p, gamma, epsilon):
    q = 1 - ops.exp(log_p)
    return q**gamma * -log_p + epsilon * q
