"""How the CPU backend is handled, and that it changes no number."""

import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KINDS, PROGRAMS, assert_close, gradients, near_labels, total
from jax.sharding import NamedSharding, PartitionSpec as P

import focal_jax
from focal_jax import _cpu
from focal_jax._cpu import compiled_apart

SHAPE = (4000, 20)
ELEMENTWISE = [row for row in PROGRAMS if row.loss.kind == "elementwise"]


def _function(row, static=None, **options):
    """Return value and gradient of the mean, in the logits alone, of logits and labels."""
    static = {} if static is None else static
    return jax.value_and_grad(
        lambda z, y: jnp.mean(row.eager(**{row.first: z, "labels": y}, **static, **options))
    )


def _inputs(row, seed, shape):
    arguments = row.arguments(seed, shape)
    pair = arguments.pop(row.first), arguments.pop("labels")
    return *pair, arguments


def _compiled(function, *args, **options):
    return jax.jit(function, **options).lower(*args).compile()


# Of these XLA's CPU backend writes out a mask of the labels, a byte an element.
_MASKED = ("gaussian_focal_loss", "sigmoid_poly_focal_loss", "sigmoid_focal_loss_star")


def _at_most(row):
    """Return the temporaries over the logits that an elementwise loss may need."""
    return 0.26 if row.name in _MASKED else 0.1


@pytest.mark.parametrize("row", ELEMENTWISE, ids=str)
def test_on_one_device_the_losses_are_flat_and_nothing_but_the_gradient_is_kept(row):
    logits, labels, _ = _inputs(row, 0, SHAPE)
    for options in ({}, {k: float(v) for k, v in row.scalars().items()}):
        compiled = _compiled(_function(row, **options), logits, labels)
        text = compiled.as_text()
        assert text.count(" conditional(") == 4
        assert len(re.findall(r"= f32\[80000\]\S* fusion\(", text)) == 2
        assert compiled.memory_analysis().temp_size_in_bytes < _at_most(row) * logits.nbytes


@pytest.mark.parametrize("row", [row for row in PROGRAMS if not row.linear], ids=str)
def test_temporaries(row):
    logits, labels, static = _inputs(row, 0, SHAPE)
    compiled = _compiled(_function(row, static), logits, labels)
    # One array of the logits' size at most, and a few numbers a position: eleven where the
    # largest of the others is looked for as well.
    numbers = 11 * 4 * np.prod(row.positions(SHAPE))
    at_most = numbers + logits.nbytes if row.softmax else _at_most(row) * logits.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes <= at_most


@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.softmax], ids=str)
def test_one_class_on_any_axis(row):
    # All arrays then have the same shape, and may be laid flat.
    for axis in row.axes(3):
        arguments = row.arguments(1, np.insert([4, 3], axis, 1), axis)
        labels = arguments["labels"]  # all of the one class
        arguments["labels"] = jnp.full_like(labels, 0 if row.integer else 1)
        inside, fixed = row.split(arguments)
        value, gradient = gradients(row.eager, **fixed)(inside)
        assert value == 0
        assert not np.any(gradient[row.first])
        assert not np.any(row.ours(**arguments))


@pytest.mark.parametrize("row", ELEMENTWISE, ids=str)
def test_on_several_devices_the_axes_stay(row):
    # Plain arrays: that they will be spread is not known before the lowering.
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    *args, _ = _inputs(row, 1, SHAPE)
    spread = (NamedSharding(mesh, P("a", "b")),) * 2
    function = _function(row)
    compiled = _compiled(function, *args, in_shardings=spread)
    text = compiled.as_text()
    assert "f32[1000,10]" in text  # a device's own
    assert not re.search(r"f32\[\d{4,}\]", text)
    assert not re.search("all-gather|all-to-all|collective-permute", text)
    placed = jax.device_put(args, list(spread))
    assert_close(compiled(*placed), jax.jit(function)(*args))


@pytest.mark.parametrize("row", ELEMENTWISE, ids=str)
@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map_each_device_has_its_own_flat_array(row, check_vma):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
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
def test_vmap_keeps_it_apart(row):
    # A predicate for each example would make a select of the conditional.
    *args, _ = _inputs(row, 3, SHAPE)
    text = _compiled(jax.vmap(_function(row)), *args).as_text()
    assert text.count(" conditional(") == 4


@pytest.mark.parametrize("row", KINDS, ids=str)
def test_without_jit(row):
    inside, fixed = row.split(row.all(4, (3, 2)))
    want = gradients(row.eager, **fixed)(inside)
    with jax.disable_jit():
        assert_close(jax.value_and_grad(total(row.eager, **fixed))(inside), want, 1e-6)


@pytest.mark.parametrize("row", KINDS, ids=str)
def test_exported_for_two_platforms(row):
    inside, fixed = row.split(row.all(5, (6, 5)))
    function = gradients(row.eager, **fixed)
    exported = jax.export.export(function, platforms=("cpu", "cuda"))(inside)
    assert_close(exported.call(inside), function(inside), 1e-6)


@pytest.mark.parametrize("shapes", [[(6, 4)] * 2, [(6, 4), (6, 1)], [(6, 4), (1, 1)], [(0, 4)] * 2])
@pytest.mark.parametrize("waits", [False, True])
def test_the_result_is_the_functions(shapes, waits):
    arrays = [jnp.asarray(np.random.default_rng(6).normal(size=s)) for s in shapes]

    def total(function, x, *rest):
        after = 2 * x if waits else None
        return jnp.sum(function(lambda x, y: jnp.sin(x) * y, x, *rest, after=after) ** 2)

    def plainly(function, *args, after):
        del after
        return function(*args)

    for order in (jax.value_and_grad, jax.hessian):
        got, want = (jax.jit(order(partial(total, f)))(*arrays) for f in (compiled_apart, plainly))
        assert_close(got, want, 1e-6)


# Large enough that XLA compiles other loops and splits them over the cores.
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((30_000, 21), -1), ((2, 21, 128, 96), 1)])
def test_large_arrays(row, shape, axis):
    if axis % len(shape) not in row.axes(len(shape)):
        pytest.skip("the class axis is the last")
    positions = row.positions(shape, axis)
    arguments = row.all(6, shape, axis)
    arguments["where"] = np.random.default_rng(6).random(positions) < 0.9
    inside, fixed = row.split(arguments)
    if row.linear:  # all at once, and in float32 the sums over the positions are what they are
        fixed["chunk_size"] = None
        inside, fixed = {row.first: inside.pop(row.first)}, fixed | inside
    got = row.ours(**arguments), gradients(row.eager, **fixed)(inside)
    with jax.enable_x64(True):
        inside, fixed = jax.tree.map(
            lambda x: np.asarray(x, np.float64) if getattr(x, "dtype", 0) == np.float32 else x,
            (inside, fixed),
        )
        reference = gradients(row.reference, **fixed)

        def plain(inside):
            return row.plain(**inside, **fixed), reference(inside)

        want = plain(inside)
        near = [plain(inside | {"labels": y}) for y in near_labels(row, inside, np.float32)]
        leaves = (map(np.float64, jax.tree.leaves(tree)) for tree in (got, want, *near))
        for a, b, *others in zip(*leaves):
            error = np.max([np.abs(x - b) for x in others], 0, initial=0)
            assert_close(np.where(np.abs(a - b) <= error, b, a), b, 1e-5)
    assert not np.any(np.where(row.along(arguments["where"], axis), 0, got[1][1][row.first]))


# ------------------------------------------------------------ the room can be left


def test_without_jaxs_inner_names_it_is_a_plain_call():
    # What a JAX would look like that has moved them: the package imports, the numbers stay.
    code = (
        "import jax.extend.core as core\n"
        "del core.Primitive\n"
        "import jax, jax.numpy as jnp, focal_jax, focal_jax._cpu\n"
        "assert focal_jax._cpu._ONE_DEVICE is None\n"
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


def test_xla_still_needs_it(monkeypatch):
    # The day that this fails, XLA's plain program holds no more than ours, and `_cpu.py` can go:
    # first see with `make bench` that it is as fast too.
    logits, labels = jnp.zeros(SHAPE), jnp.zeros(SHAPE)

    def temporaries():
        jax.clear_caches()
        function = jax.value_and_grad(
            lambda z, y: jnp.sum(focal_jax.sigmoid_focal_loss(z, y, gamma=1.5))
        )
        return _compiled(function, logits, labels).memory_analysis().temp_size_in_bytes

    ours = temporaries()
    monkeypatch.setattr(_cpu, "_ONE_DEVICE", None)
    plain = temporaries()
    jax.clear_caches()
    assert ours < 0.1 * logits.nbytes
    assert plain > 0.9 * logits.nbytes
