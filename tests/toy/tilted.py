"""Focal loss times `1 + epsilon * p`, a loss of one softmax position.

It has no slopes: JAX differentiates the value inside the engine. It also has a linear head.
"""

import inspect

import focal_jax
from focal_jax import engine


def _tilted(terms, gamma, epsilon):
    return engine.focal(terms, gamma) * (1 + epsilon * terms.p)


TILTED = engine.position_loss(
    _tilted, gamma=engine.exponent(2.0), epsilon=engine.number(1.0, low=0.0)
)


def linear_tilted(features, kernel, labels, **options):
    return TILTED.linear(features, kernel, labels, **options)


# The arguments of the linear head of the package, and epsilon.
_signature = inspect.signature(focal_jax.linear_softmax_focal_loss_with_integer_labels)
_epsilon = inspect.Parameter("epsilon", inspect.Parameter.KEYWORD_ONLY, default=1.0)
linear_tilted.__signature__ = _signature.replace(
    parameters=[*_signature.parameters.values(), _epsilon]
)
LINEAR_TILTED = TILTED.declaration._replace(
    name="linear_tilted", kind="linear", function=linear_tilted
)


def tilted_formula(ops, log_p, gamma, epsilon):
    p = ops.exp(log_p)
    return (1 - p) ** gamma * -log_p * (1 + epsilon * p)
