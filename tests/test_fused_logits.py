"""Losses whose logits XLA computes again inside a fusion, possibly with another rounding.

A scale before the loss (a temperature, a cosine classifier) fuses into it. Then a logit minus the
largest logit is not exactly 0 for the class with the largest logit.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import focal_jax
from focal_jax.engine.platform import forced_form

pytestmark = pytest.mark.slow

SCALES = {
    "product": lambda z: z * 3.3,
    "quotient": lambda z: z / 0.3,
    "cosine": lambda z: 30 * z / jnp.linalg.norm(z, axis=-1, keepdims=True),
}


# On CPU the form depends on the number of classes.
@pytest.mark.parametrize(("form", "num_classes"), [("cpu", 10), ("cpu", 65), ("accelerator", 65)])
@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_before_a_sum_over_all_classes(form, scale, num_classes):
    logits = jnp.zeros((16, num_classes)).at[:, 3].set(jnp.linspace(1.5, 2, 16))
    labels = jax.nn.one_hot(jnp.full(16, 3), num_classes) * 0.9 + 0.1 / num_classes

    def total(module):
        def summed(logits):
            scaled = SCALES[scale](logits)
            soft = module.softmax_focal_loss(scaled, labels).sum()
            smoothed = module.softmax_focal_loss_with_integer_labels(
                scaled, jnp.full(16, 3), label_smoothing=0.1
            )
            return soft + smoothed.sum() + module.focal_tversky_loss(scaled, labels).sum()

        return summed

    with forced_form(form):
        value, gradient = jax.jit(jax.value_and_grad(total(focal_jax)))(logits)
    want, want_gradient = jax.jit(jax.value_and_grad(total(focal_jax.reference)))(logits)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    atol = 1e-5 * np.abs(want_gradient).max()
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-4, atol=atol)
