"""What XLA is given, and what is kept between the forward and the backward pass."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXPONENTS, PROGRAMS, gradients, total


def _abstract(row, shape, axis=-1, dtype=jnp.float32):
    """Return the shapes of arguments and scalar options, and what is structure."""
    arguments = row.arguments(0, shape, axis) | row.scalars()
    inside, fixed = row.split(arguments)
    static = row.axis(axis) | ({"chunk_size": None} if row.linear else {})
    arrays = {k: v for k, v in fixed.items() if k not in static}
    inside = {k: v.astype(dtype) if k in (row.first, "kernel") else v for k, v in inside.items()}
    return jax.tree.map(jax.typeof, (inside, arrays)), static


def _every_exponent(row, static, wrt):
    """Return the gradients for all exponents at once: one program to look at."""

    def function(inside, arrays):
        rest = {k: v for k, v in inside.items() if k not in row.exponents}
        wanted = {k: rest.pop(k) for k in wrt}

        def of(exponent):
            options = dict.fromkeys(row.exponents, exponent)
            return jax.grad(total(row.eager, **rest, **arrays, **static, **options))(wanted)

        return [of(exponent) for exponent in EXPONENTS if not 2 * exponent % 1]

    return jax.jit(function)


def _count(text, op):
    return len(re.findall(rf"= \S+ {op}\(", text))


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((64, 21), -1), ((4, 21, 8, 8), 1)])
def test_no_scatter_no_power_no_transpose(row, shape, axis):
    if axis % len(shape) not in row.axes(len(shape)):
        pytest.skip("the class axis is the last")
    abstract, static = _abstract(row, shape, axis)
    lowered = _every_exponent(row, static, [row.first]).lower(*abstract)
    forbidden = {"scatter", "power", "transpose"} - ({"transpose"} if row.linear else set())
    stable, text = lowered.as_text(), lowered.compile().as_text()
    for op in forbidden:
        assert f"stablehlo.{op}" not in stable, op
        assert _count(text, op) == 0, op
    assert _count(text, "exponential") > 0  # that the count counts


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_residuals_are_the_inputs_and_a_few_numbers_a_position(row, dtype):
    shape = 512, 21
    (inside, arrays), static = _abstract(row, shape, dtype=dtype)
    # Eight numbers a position; an elementwise loss keeps its value alone.
    numbers = (8 if row.softmax else 1) * 4 * np.prod(row.positions(shape))
    size = sum(x.size * x.dtype.itemsize for x in (inside | arrays).values())
    if row.name == "dual_focal_loss_with_integer_labels":
        # Its logits have two cotangents, which are added up before they are rounded: it keeps
        # the logits in float32.
        size += 4 * np.prod(shape)

    def forward(options, inside, arrays):
        return jax.vjp(lambda x: row.eager(**x, **arrays, **static, **options), inside)[1]

    for options in ({}, dict.fromkeys(row.exponents, 2)):
        kept = {k: v for k, v in inside.items() if k not in options}
        outputs = jax.make_jaxpr(partial(forward, options))(kept, arrays).jaxpr.outvars
        residuals = [x.aval for x in {id(x): x for x in outputs}.values()]  # each array once
        assert sum(x.size * x.dtype.itemsize for x in residuals) <= size + numbers + 64


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_lowers_for_accelerators(row):
    (inside, arrays), static = _abstract(row, (64, 21))
    function = gradients(
        row.eager, **{k: jnp.zeros(v.shape, v.dtype) for k, v in arrays.items()}, **static
    )
    traced = function.trace(inside)
    for platform in ("cuda", "tpu", "rocm"):
        assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()
