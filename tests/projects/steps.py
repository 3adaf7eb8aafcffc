"""Three steps of training, and the comparison of two trainings."""

import jax
import numpy as np
import optax


def three_steps(loss, params, learning_rate=0.1):
    """Return the parameters and losses of three steps of gradient descent with momentum."""
    optimizer = optax.sgd(learning_rate, momentum=0.9)

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for _ in range(3):
        params, state, value = step(params, state)
        values.append(value)
    assert values[-1] < values[0]
    return params, values


def assert_equal_trainings(*trainings, tolerance=1e-5):
    """Assert that trees of results agree, relative to the largest entry of each array."""
    first, *others = trainings
    for other in others:
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * max(1e-3, np.abs(a).max()))
