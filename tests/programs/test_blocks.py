"""Tests that blocks of positions compute the numbers of the whole array, with less memory."""

import contextlib
import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import LOSSES, assert_close, gradients
from jax.sharding import AxisType, PartitionSpec as P

import focal_jax
from focal_jax.engine import blocks

# Three blocks of 128 positions, of which the last two overlap.
SHAPE, AXIS = (2, 5, 20, 17), 1
# Every test compiles blocks and the whole array.
pytestmark = pytest.mark.slow

ROWS = [row for row in LOSSES if row.softmax and AXIS in row.axes(len(SHAPE)) and not row.linear]
INTEGER = [row for row in ROWS if row.integer]


@contextlib.contextmanager
def sizes(min_example_bytes, block_bytes=0):
    """Trace programs with other sizes. The keys of JAX's caches do not contain them."""
    names = "MIN_EXAMPLE_BYTES", "_BLOCK_BYTES"
    usual = [getattr(blocks, name) for name in names]
    try:
        for name, size in zip(names, (min_example_bytes, block_bytes)):
            setattr(blocks, name, size)
        jax.clear_caches()
        yield
    finally:
        for name, size in zip(names, usual):
            setattr(blocks, name, size)
        jax.clear_caches()


def assert_blocks_equal_the_whole(function, *args, tolerance=1e-6):
    with sizes(np.inf):
        want = jax.jit(function)(*args)
    with sizes(0):
        compiled = jax.jit(function).lower(*args).compile()
        got = compiled(*args)
    assert " while(" in str(compiled.as_text())
    assert_close(got, want, tolerance)
    return want


def _random(row, dtype=np.float32, masked=True, **options):
    arguments = row.all(3, SHAPE, AXIS)
    if masked:
        arguments["where"] = np.random.default_rng(3).random(row.positions(SHAPE, AXIS)) < 0.8
    inside, fixed = row.split(arguments | options)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), inside), fixed


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients(row, dtype):
    inside, fixed = _random(row, dtype)

    def function(inside):
        return row.eager(**inside, **fixed), gradients(row.eager, **fixed)(inside)

    # Another order of the sums may round a 16-bit gradient to its neighbor.
    tolerance = 1e-5 if dtype == jnp.float32 else 2 * jnp.finfo(dtype).eps
    assert_blocks_equal_the_whole(function, inside, tolerance=tolerance)


@pytest.mark.parametrize("row", INTEGER, ids=str)
@pytest.mark.parametrize(
    "options", [{"label_smoothing": 0.1, "ignore_label": 1}, {"return_logsumexp": True}], ids=str
)
def test_options_of_integer_labels(row, options):
    if options.keys() - inspect.signature(row.loss.function).parameters.keys():
        pytest.skip("the loss does not have the option")
    inside, fixed = _random(row, **options)

    def total(inside):
        return sum(jnp.sum(x) for x in jax.tree.leaves(row.eager(**inside, **fixed)))

    assert_blocks_equal_the_whole(jax.value_and_grad(total), inside, tolerance=1e-5)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_second_derivatives(row):
    inside, fixed = _random(row, masked=False)

    def total(logits):
        return jnp.sum(row.eager(**(inside | {"logits": logits}), **fixed))

    def forward_and_reverse(logits):
        ones = jnp.ones_like(logits)
        reverse = jax.grad(lambda z: jnp.sum(jax.grad(total)(z) ** 2))(logits)
        return jax.jvp(jax.grad(total), (logits,), (ones,)), reverse

    assert_blocks_equal_the_whole(forward_and_reverse, inside["logits"], tolerance=1e-5)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_vmap_and_shard_map(row):
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(4)
    images = row.all(4, (4, *SHAPE), AXIS + 1)
    logits, labels = images["logits"], images["labels"]
    where = rng.random((4, *row.positions(SHAPE, AXIS))) < 0.8

    def gradient(logits, labels, where):
        def total(logits):
            loss = partial(row.eager, axis=AXIS)
            return jnp.sum(jax.vmap(lambda *x: loss(**dict(zip(names, x))))(logits, labels, where))

        return jax.grad(total)(logits)

    names, spec = ("logits", "labels", "where"), P("a")
    want = assert_blocks_equal_the_whole(gradient, logits, labels, where, tolerance=1e-5)
    # A loss of softmax and class indices is enough for the other mode of `shard_map`.
    for check_vma in (True, False) if row is INTEGER[0] else (True,):
        mapped = partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
        with sizes(0):
            found = jax.jit(mapped(gradient, check_vma=check_vma))(logits, labels, where)
        assert_close(found, want, 1e-5)


def test_sharded_arrays_are_not_sliced():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    placed = [jax.NamedSharding(mesh, P(*spec)) for spec in (("a", None, "b"), ("a", "b"))]
    loss = focal_jax.softmax_focal_loss_with_integer_labels

    def mean(logits, labels):
        return jnp.mean(loss(logits, labels, axis=1))

    shapes = (
        jax.ShapeDtypeStruct((2, 21, 512, 512), jnp.float32, sharding=placed[0]),
        jax.ShapeDtypeStruct((2, 512, 512), jnp.int32, sharding=placed[1]),
    )
    text = jax.jit(jax.value_and_grad(mean)).lower(*shapes).compile().as_text()
    assert text
    assert "all-gather" not in text
    assert "dynamic-slice" not in text


@pytest.mark.parametrize(
    ("soft", "dtype", "limit"),
    # Without blocks: 1.4 and 2.5 of the logits.
    [(True, jnp.float32, 0.42), (False, jnp.bfloat16, 1.0)],
)
def test_temporaries_of_images(soft, dtype, limit):
    logits = jax.ShapeDtypeStruct((4, 21, 256, 256), dtype)
    labels = logits if soft else jax.ShapeDtypeStruct((4, 256, 256), jnp.int32)
    loss = "softmax_focal_loss" if soft else "softmax_focal_loss_with_integer_labels"

    def total(logits, labels):
        return jnp.sum(getattr(focal_jax, loss)(logits, labels, axis=1))

    compiled = jax.jit(jax.value_and_grad(total)).lower(logits, labels).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes <= limit * logits.size * jnp.dtype(dtype).itemsize
