"""What XLA is given, and what is kept between the forward and the backward pass."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import LOSSES, ids

SHAPES = [((64, 21), -1), ((4, 21, 8, 8), 1)]


def _value_and_grad(loss, labels, gamma, axis):
    def total(z):
        return jnp.sum(loss.ours(z, labels, gamma=gamma, alpha=0.3, **loss.axis(axis)))

    return jax.jit(jax.value_and_grad(total))


def _count(text, op):
    return len(re.findall(rf"= \S+ {op}\(", text))


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_no_scatter_no_power_no_transpose(loss, shape, axis):
    logits, labels = loss.inputs(0, shape, axis)
    for gamma in (0, 1, 2, 5.0):
        lowered = _value_and_grad(loss, labels, gamma, axis).lower(logits)
        stable = lowered.as_text()
        assert "stablehlo.scatter" not in stable
        assert "stablehlo.power" not in stable
        assert "stablehlo.transpose" not in stable
        text = lowered.compile().as_text()
        for op in ("scatter", "power", "transpose"):
            assert _count(text, op) == 0, op
        assert _count(text, "exponential") > 0  # that the count counts


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("gamma", [2, "traced"])
def test_residuals_are_the_inputs_and_a_few_numbers_a_position(loss, dtype, gamma):
    logits, labels = loss.inputs(1, (512, 21))
    logits = logits.astype(dtype)
    exponent = jnp.float32(1.5) if gamma == "traced" else gamma

    @jax.jit
    def forward(z):
        return jax.vjp(lambda z: loss.ours(z, labels, gamma=exponent, alpha=0.3), z)

    residuals = jax.tree.leaves(forward(logits)[1])
    inputs = logits.nbytes + np.asarray(labels).nbytes
    # Five numbers a position; a sigmoid's position is a logit, and it keeps the loss.
    numbers = (5 if loss.softmax else 1) * 4 * np.prod(loss.positions(logits.shape))
    assert sum(r.nbytes for r in residuals) <= inputs + numbers + 64


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize("platform", ["cuda", "tpu", "rocm"])
def test_lowers_for_accelerators(loss, platform):
    logits, labels = loss.inputs(2, (64, 21))
    traced = _value_and_grad(loss, labels, 2, -1).trace(logits)
    assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()
