"""Tests of lowered programs, and of the residuals between forward and backward pass."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXPONENTS, PROGRAMS, gradients, total

pytestmark = pytest.mark.slow


def _abstract_arguments(row, shape, axis=-1, dtype=jnp.float32):
    """Return shapes and dtypes of the arguments, and the static arguments.

    The first result has the differentiated arguments and the other arrays, in two dictionaries.
    """
    arguments = row.arguments(0, shape, axis) | row.scalars()
    inside, fixed = row.split(arguments)
    static = row.axis(axis) | ({"chunk_size": None} if row.linear else {})
    arrays = {k: v for k, v in fixed.items() if k not in static}
    inside = {k: v.astype(dtype) if k in (row.first, "kernel") else v for k, v in inside.items()}
    return jax.tree.map(jax.typeof, (inside, arrays)), static


def _gradients_for_all_exponents(row, static, wrt):
    """Return one program with the gradients for several Python exponents."""

    def function(inside, arrays):
        rest = {k: v for k, v in inside.items() if k not in row.exponents}
        wanted = {k: rest.pop(k) for k in wrt}

        def gradient(exponent):
            options = dict.fromkeys(row.exponents, exponent)
            return jax.grad(total(row.eager, **rest, **arrays, **static, **options))(wanted)

        return [gradient(exponent) for exponent in EXPONENTS if not 2 * exponent % 1]

    return jax.jit(function)


def _count(text, op):
    return len(re.findall(rf"= \S+ {op}\(", text))


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((64, 21), -1), ((4, 21, 8, 8), 1)])
def test_programs_have_no_scatter_power_or_transpose(row, shape, axis):
    if axis % len(shape) not in row.axes(len(shape)):
        pytest.skip("the loss requires the class axis to be the last")
    abstract, static = _abstract_arguments(row, shape, axis)
    lowered = _gradients_for_all_exponents(row, static, [row.first]).lower(*abstract)
    # The linear head transposes the kernel.
    forbidden = {"scatter", "power"} if row.linear else {"scatter", "power", "transpose"}
    stablehlo, hlo = lowered.as_text(), lowered.compile().as_text()
    for op in forbidden:
        assert f"stablehlo.{op}" not in stablehlo, op
        assert _count(hlo, op) == 0, op
    assert _count(hlo, "exponential") > 0


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_residuals_are_the_inputs_and_a_few_numbers_per_position(row, dtype):
    shape = 512, 21
    (inside, arrays), static = _abstract_arguments(row, shape, dtype=dtype)
    # Eight numbers per position with a class axis, three times as many if two cross entropies are
    # interpolated. An elementwise loss stores its value only.
    count = {"elementwise": 1, "interval": 24}.get(row.kind, 8)
    numbers = count * 4 * np.prod(row.positions(shape))
    size = sum(x.size * x.dtype.itemsize for x in (inside | arrays).values())
    if row.name == "dual_focal_loss_with_integer_labels":
        # The logits have two cotangents. Their sum is rounded once, so the loss stores float32
        # logits.
        size += 4 * np.prod(shape)
    if row.region:  # four float32 arrays and one bool array of the shape of the logits
        size += 17 * np.prod(shape)

    def forward(options, inside, arrays):
        return jax.vjp(lambda x: row.eager(**x, **arrays, **static, **options), inside)[1]

    for options in ({}, dict.fromkeys(row.exponents, 2)):
        primals = {k: v for k, v in inside.items() if k not in options}
        outputs = jax.make_jaxpr(partial(forward, options))(primals, arrays).jaxpr.outvars
        residuals = [x.aval for x in {id(x): x for x in outputs}.values()]  # without duplicates
        assert sum(x.size * x.dtype.itemsize for x in residuals) <= size + numbers + 64


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_programs_lower_for_accelerators(row):
    (inside, arrays), static = _abstract_arguments(row, (64, 21))
    zeros = {k: jnp.zeros(v.shape, v.dtype) for k, v in arrays.items()}
    traced = gradients(row.eager, **zeros, **static).trace(inside)
    for platform in ("cuda", "tpu", "rocm"):
        assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()
