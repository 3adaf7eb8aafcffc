"""Tests of programs that are compiled for CPUs, and of `engine.cpu.compile_separately`."""

import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KINDS, PROGRAMS, assert_close, gradients, near_labels, total
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import focal_jax
from focal_jax.engine import cpu
from focal_jax.engine.cpu import compile_separately

pytestmark = pytest.mark.slow

SHAPE = (4000, 20)
ELEMENTWISE = [row for row in PROGRAMS if row.kind == "elementwise"]


def _mean_and_gradient(row, static=None, **options):
    """Return a function of logits and labels: the mean loss and its gradient in the logits."""
    static = {} if static is None else static
    return jax.value_and_grad(
        lambda z, y: jnp.mean(row.eager(**{row.first: z, "labels": y}, **static, **options))
    )


def _inputs(row, seed, shape):
    """Return logits, labels and the other arguments."""
    arguments = row.arguments(seed, shape)
    return arguments.pop(row.first), arguments.pop("labels"), arguments


def _compiled(function, *args, **options):
    return jax.jit(function, **options).lower(*args).compile()


# ---------------------------------------------------------------- memory

# XLA:CPU writes a mask of the labels to memory for these losses, one byte per element.
_MASK_IN_MEMORY = ("gaussian_focal_loss", "sigmoid_poly_focal_loss", "sigmoid_focal_loss_star")


def _max_temporaries(row):
    """Return the allowed temporaries / logits of an elementwise loss."""
    return 0.26 if row.name in _MASK_IN_MEMORY else 0.1


@pytest.mark.parametrize("row", ELEMENTWISE, ids=str)
def test_elementwise_losses_run_on_flat_arrays_without_temporaries(row):
    logits, labels, _ = _inputs(row, 0, SHAPE)
    for options in ({}, {k: float(v) for k, v in row.scalars().items()}):
        compiled = _compiled(_mean_and_gradient(row, **options), logits, labels)
        text = compiled.as_text()
        assert text.count(" conditional(") == 4
        assert len(re.findall(r"= f32\[80000\]\S* fusion\(", text)) == 2
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        assert temporaries < _max_temporaries(row) * logits.nbytes


@pytest.mark.parametrize("row", [row for row in PROGRAMS if not row.linear], ids=str)
def test_temporaries(row):
    logits, labels, static = _inputs(row, 0, SHAPE)
    compiled = _compiled(_mean_and_gradient(row, static), logits, labels)
    # A loss with a class axis needs one array of the size of the logits and eleven numbers per
    # position. A region loss needs five arrays.
    numbers = 11 * 4 * np.prod(row.positions(SHAPE))
    arrays = (5 if row.region else 1) * logits.nbytes
    limit = numbers + arrays if row.softmax else _max_temporaries(row) * logits.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes <= limit


def test_xla_cpu_still_needs_compile_separately(monkeypatch):
    # If this test fails, XLA:CPU no longer needs the workaround for memory. Compare the times with
    # `make bench` before deleting engine/cpu.py.
    logits, labels = jnp.zeros(SHAPE), jnp.zeros(SHAPE)

    def temporaries():
        jax.clear_caches()
        function = jax.value_and_grad(
            lambda z, y: jnp.sum(focal_jax.sigmoid_focal_loss(z, y, gamma=1.5))
        )
        return _compiled(function, logits, labels).memory_analysis().temp_size_in_bytes

    with_workaround = temporaries()
    monkeypatch.setattr(cpu, "single_device_primitive", None)
    without_workaround = temporaries()
    jax.clear_caches()
    assert with_workaround < 0.1 * logits.nbytes
    assert without_workaround > 0.9 * logits.nbytes


# ---------------------------------------------------------------- values


@pytest.mark.filterwarnings("ignore:logits. got one class")
@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.softmax], ids=str)
def test_single_class_on_any_axis(row):
    # With one class, logits and sums have the same shape, so they may be flattened together.
    for axis in row.axes(3):
        arguments = row.arguments(1, np.insert([4, 3], axis, 1), axis)
        label = 0 if row.labels in ("integer", "real") else 1
        arguments["labels"] = jnp.full_like(arguments["labels"], label)
        inside, fixed = row.split(arguments)
        value, gradient = gradients(row.eager, **fixed)(inside)
        assert value == 0
        assert not np.any(gradient[row.first])
        assert not np.any(row.compiled(**arguments))


@pytest.mark.parametrize("row", KINDS, ids=str)
def test_without_jit(row):
    inside, fixed = row.split(row.all(4, (3, 2)))
    want = gradients(row.eager, **fixed)(inside)
    with jax.disable_jit():
        assert_close(jax.value_and_grad(total(row.eager, **fixed))(inside), want, 1e-6)


@pytest.mark.parametrize("row", KINDS, ids=str)
def test_export_for_two_platforms(row):
    inside, fixed = row.split(row.all(5, (6, 5)))
    function = gradients(row.eager, **fixed)
    exported = jax.export.export(function, platforms=("cpu", "cuda"))(inside)
    assert_close(exported.call(inside), function(inside), 1e-6)


# XLA:CPU compiles arrays of these sizes to parallel loops.
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((30_000, 21), -1), ((2, 21, 128, 96), 1)])
def test_large_arrays(row, shape, axis):
    if axis % len(shape) not in row.axes(len(shape)):
        pytest.skip("the loss requires the class axis to be the last")
    positions = row.positions(shape, axis)
    arguments = row.all(6, shape, axis)
    arguments["where"] = np.random.default_rng(6).random(positions) < 0.9
    inside, fixed = row.split(arguments)
    if row.linear:
        # One chunk. The gradients of kernel and bias are sums over all positions, whose rounding
        # errors in float32 exceed the tolerance.
        fixed["chunk_size"] = None
        inside, fixed = {row.first: inside.pop(row.first)}, fixed | inside
    got = row.compiled(**arguments), gradients(row.eager, **fixed)(inside)
    with jax.enable_x64(True):
        inside, fixed = jax.tree.map(
            lambda x: np.asarray(x, np.float64) if getattr(x, "dtype", 0) == np.float32 else x,
            (inside, fixed),
        )
        reference = gradients(row.reference, **fixed)

        def plain(inside):
            return row.reference_compiled(**inside, **fixed), reference(inside)

        want = plain(inside)
        near = [plain(inside | {"labels": y}) for y in near_labels(row, inside, np.float32)]
        leaves = (map(np.float64, jax.tree.leaves(tree)) for tree in (got, want, *near))
        for a, b, *others in zip(*leaves):
            # An error is allowed if rounding the labels causes one of the same size.
            error = np.max([np.abs(x - b) for x in others], 0, initial=0)
            assert_close(np.where(np.abs(a - b) <= error, b, a), b, 1e-5)
    assert not np.any(np.where(row.expand_mask(arguments["where"], axis), 0, got[1][1][row.first]))


# ---------------------------------------------------------------- sharding and vmap


@pytest.mark.parametrize("row", ELEMENTWISE, ids=str)
def test_sharded_arrays_are_not_flattened(row):
    # With automatic axes the sharding is known only when the program is lowered.
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    *args, _ = _inputs(row, 1, SHAPE)
    shardings = (NamedSharding(mesh, P("a", "b")),) * 2
    function = _mean_and_gradient(row)
    compiled = _compiled(function, *args, in_shardings=shardings)
    text = compiled.as_text()
    assert "f32[1000,10]" in text  # the shard of a device
    assert not re.search(r"f32\[\d{4,}\]", text)
    assert not re.search("all-gather|all-to-all|collective-permute", text)
    placed = jax.device_put(args, list(shardings))
    assert_close(compiled(*placed), jax.jit(function)(*args))


@pytest.mark.parametrize("row", ELEMENTWISE, ids=str)
@pytest.mark.parametrize("check_vma", [True, False])
def test_shards_are_flattened_in_shard_map(row, check_vma):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    *args, _ = _inputs(row, 2, SHAPE)

    def gradient(z, y):
        return jax.grad(lambda z: jnp.sum(row.eager(logits=z, labels=y)))(z)

    mapped = jax.shard_map(
        gradient, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=check_vma
    )
    compiled = _compiled(mapped, *args)
    assert "f32[10000]" in compiled.as_text()
    placed = jax.device_put(args, NamedSharding(mesh, P("a")))
    assert_close(jax.jit(mapped)(*placed), jax.jit(gradient)(*args), 1e-6)


@pytest.mark.parametrize("row", ELEMENTWISE, ids=str)
def test_vmap_keeps_the_conditionals(row):
    # A batched predicate would turn each `cond` into a `select`.
    *args, _ = _inputs(row, 3, SHAPE)
    text = _compiled(jax.vmap(_mean_and_gradient(row)), *args).as_text()
    assert text.count(" conditional(") == 4


# ---------------------------------------------------------------- compile_separately


@pytest.mark.parametrize("shapes", [[(6, 4)] * 2, [(6, 4), (6, 1)], [(6, 4), (1, 1)], [(0, 4)] * 2])
@pytest.mark.parametrize("waits", [False, True])
def test_compile_separately_is_a_call(shapes, waits):
    arrays = [jnp.asarray(np.random.default_rng(6).normal(size=s)) for s in shapes]

    def summed(call, x, *rest):
        after = 2 * x if waits else None
        return jnp.sum(call(lambda x, y: jnp.sin(x) * y, x, *rest, after=after) ** 2)

    def plain_call(function, *args, after):
        del after
        return function(*args)

    for transform in (jax.value_and_grad, jax.hessian):
        got, want = (
            jax.jit(transform(partial(summed, call)))(*arrays)
            for call in (compile_separately, plain_call)
        )
        assert_close(got, want, 1e-6)


def test_compile_separately_without_jax_internals():
    # A JAX version that has moved the internal names: the package works without the workaround.
    code = (
        "import jax.extend.core as core\n"
        "primitive = core.Primitive\n"
        "del core.Primitive\n"
        "import jax, jax.numpy as jnp, focal_jax, focal_jax.engine.cpu\n"
        "core.Primitive = primitive\n"
        "assert focal_jax.engine.cpu.single_device_primitive is None\n"
        "loss = lambda z: jnp.sum(focal_jax.sigmoid_focal_loss(z, jnp.ones(3)))\n"
        "print(*jax.jit(jax.grad(loss))(jnp.array([-1.0, 0.0, 2.0])).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    want = jax.grad(lambda z: jnp.sum(focal_jax.sigmoid_focal_loss(z, jnp.ones(3))))
    got = np.array(done.stdout.split(), np.float32)
    assert_close(got, want(jnp.array([-1.0, 0.0, 2.0])), 1e-6)
