"""The same numbers on one device and on several."""

import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KINDS, PROGRAMS, assert_close, jit
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

import focal_jax

SHAPE = (16, 8, 4)


def _mesh(kind=jax.sharding.AxisType.Auto, shape=(4, 2)):
    names = ("data", "model", "other")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def _inputs(row, shape=SHAPE, dtype=np.float32):
    """Return what has the positions and what all share, each a dictionary, and statics."""
    arguments = row.arguments(0, shape, dtype=dtype) | row.scalars(dtype)
    static = row.axis(-1)
    own = {k: arguments.pop(k) for k in (row.first, "labels")}
    return own, {k: v for k, v in arguments.items() if k not in static}


def _reduced(row, axis_name=None):
    """Return the mean loss of (differentiable, shared, the rest)."""

    def reduced(own, shared, fixed):
        losses = row.eager(**own, **shared, **fixed)
        return focal_jax.reduce_loss(losses, axis_name=axis_name)

    return reduced


def _mean_over_data(row):
    return lambda *args: lax.pmean(_reduced(row, "data")(*args), "data")


def _arguments(row, shape=SHAPE, dtype=np.float32):
    """Return arrays by position that are differentiable, shared ones, and the labels if not."""
    own, shared = _inputs(row, shape, dtype)
    fixed = {"labels": own.pop("labels")} if row.integer else {}
    return own, shared, fixed


def _value_and_grad(mean):
    return jax.value_and_grad(mean, (0, 1))


@functools.cache
def _on_one_device(row, *shape_and_dtype):
    """Return what the same arguments give without a mesh."""
    return jit(_value_and_grad(_reduced(row)))(*_arguments(row, *shape_and_dtype))


@pytest.mark.quick
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_the_gradient_outside(row, check_vma):
    args = _arguments(row)
    mapped = jax.shard_map(
        _mean_over_data(row),
        mesh=_mesh(),
        in_specs=(P("data"), P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    assert_close(jit(_value_and_grad(mapped))(*args), _on_one_device(row), 1e-5)


def _gradient_inside(mean, names, check_vma):
    """Return value and gradients as one device has them, for use inside the mapped function.

    The first argument is spread over the devices, the second is on all of them. Without
    JAX's account of what varies, a gradient is that of the sum of what all the devices
    return.
    """

    def local(*args):
        value, (own, shared) = _value_and_grad(mean)(*args)
        if not check_vma:
            own = jax.tree.map(lambda x: x / lax.axis_size(names), own)
            shared = lax.pmean(shared, names)
        return value, (own, shared)

    return local


@pytest.mark.quick
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_the_gradient_inside(row, check_vma):
    args = _arguments(row)
    mapped = jax.shard_map(
        _gradient_inside(_mean_over_data(row), "data", check_vma),
        mesh=_mesh(),
        in_specs=(P("data"), P(), P("data")),
        out_specs=(P(), (P("data"), P())),
        check_vma=check_vma,
    )
    assert_close(jit(mapped)(*args), _on_one_device(row), 1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_pmap(row):
    own, shared, fixed = _arguments(row)
    local = _gradient_inside(_mean_over_data(row), "data", check_vma=False)
    split = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), (own, fixed))
    everywhere = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), shared)
    value, (by_own, by_shared) = jax.pmap(local, "data")(split[0], everywhere, split[1])
    want = _on_one_device(row)
    by_own = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), by_own)
    for i in range(8):
        of_device = {k: x[i] for k, x in by_shared.items()}
        assert_close((value[i], (by_own, of_device)), want, 1e-5)


def _placed(mesh, spec, args):
    """Return the arguments with the positions, and the classes, spread over the mesh."""
    own, shared, fixed = args

    def place(x):
        return jax.device_put(x, NamedSharding(mesh, P(*spec[: x.ndim])))

    return *jax.tree.map(place, (own,)), shared, jax.tree.map(place, fixed)


_SPECS = {
    "batch": P("data"),
    "space": P(None, "data"),
    "both": P("data", "model"),
    "classes": P("data", None, "model"),
}
# The last axis of a linear head's features is no class axis. What axes of positions are spread
# is for the engine that a kind of losses shares: one loss of each kind has all the layouts, the
# others those that spread the most.
_LAYOUTS = [
    pytest.param(row, spec, id=f"{row}-{name}")
    for row in PROGRAMS
    for name, spec in _SPECS.items()
    if not (row.linear and name == "classes") and (row in KINDS or "model" in spec)
]


@pytest.mark.parametrize(("row", "spec"), _LAYOUTS)
def test_jit_over_a_mesh_gathers_nothing(row, spec, x64):
    # In float64, since the order in which an option's gradient is added up is another one.
    shape = (16, 8, 64 if not row.linear else 16)
    args = _arguments(row, shape, np.float64)
    mesh = _mesh()
    placed = _placed(mesh, spec, args)
    function = jax.jit(_value_and_grad(_reduced(row)))
    compiled = function.lower(*placed).compile()
    # At most a number or two of each position: where a device has its largest logit.
    assert max(_gathered(compiled.as_text()), default=0) <= 16 * 8
    got = compiled(*placed)
    assert_close(got, _on_one_device(row, shape, np.float64), 1e-10)
    assert got[1][0][row.first].sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)


def _sizes(text, operation):
    """Return the sizes of the results of an operation in compiled HLO."""
    results = re.findall(rf"= (.*?) (?:{operation})(?:-start)?\(", text)
    shapes = [s for result in results for s in re.findall(r"\w+\[([\d,]*)\]", result)]
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]


def _gathered(text):
    return _sizes(text, "all-gather|all-to-all|collective-permute")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("row", "spec"),
    [layout for layout in _LAYOUTS if "model" in layout.values[1]],
)
def test_an_explicit_mesh(row, spec):
    own, shared, fixed = _arguments(row)
    if not row.linear:  # the weights of the classes are picked by labels that are spread
        shared |= {k: v for k, v in row.drawn(0, SHAPE).items() if row.options[k].per_class}
    mesh = _mesh(jax.sharding.AxisType.Explicit)
    function = jit(_value_and_grad(_reduced(row)))
    want = function(own, shared, fixed)
    with jax.set_mesh(mesh):
        placed = _placed(mesh, spec, (own, shared, fixed))
        got = function(*placed)
        sharding = jax.typeof(placed[0][row.first]).sharding.spec
        assert jax.typeof(got[1][0][row.first]).sharding.spec == sharding
    assert_close(jax.tree.map(np.asarray, got), want, 1e-5)


# ------------------------------------------------------------------- class parallel

CLASSES = 12
# Each slice has some; one is ignored, and two are no classes.
LABELS = np.array([[0, 1, 3, 4, 6, 7, 9, 11], [2, 5, 8, 10, 12, -1, 99, 0]], np.int32)


def _class_inputs():
    rng = np.random.default_rng(7)
    logits = (5 * rng.normal(size=(*LABELS.shape, CLASSES))).astype(np.float32)
    logits[0, 1, 3:9] = -np.inf  # some devices have no class left for this position
    alpha = rng.random(CLASSES).astype(np.float32)
    return jnp.asarray(logits), jnp.asarray(LABELS), jnp.asarray(alpha), jnp.float32(1.5)


def _mean(axis_name=None, class_axis_name=None, axis=-1):
    def mean(logits, labels, alpha, gamma):
        losses = focal_jax.softmax_focal_loss_with_integer_labels(
            logits,
            labels,
            alpha=alpha,
            gamma=gamma,
            axis=axis,
            ignore_label=99,
            class_axis_name=class_axis_name,
        )
        counts = (labels >= 0) & (labels < CLASSES)
        total = focal_jax.reduce_loss(losses, where=counts, axis_name=axis_name)
        return total if axis_name is None else lax.pmean(total, axis_name)

    return mean


@pytest.mark.quick
@pytest.mark.parametrize("names", ["model", ("model", "other")], ids=["one_axis", "two_axes"])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_classes_spread_over_devices(inside, check_vma, names):
    args, wrt = _class_inputs(), (0, 2, 3)
    mesh = _mesh(shape=(2, 4) if names == "model" else (2, 2, 2))
    spread = _mean("data", names)

    def local(*args):
        value, (own, *shared) = jax.value_and_grad(spread, wrt)(*args)
        if not check_vma:
            own = own / lax.axis_size(mesh.axis_names)
            shared = lax.pmean(shared, mesh.axis_names)
        return value, (own, *shared)

    specs = P("data", None, names), P("data"), P(), P()
    mapped = jax.shard_map(
        local if inside else spread,
        mesh=mesh,
        in_specs=specs,
        out_specs=(P(), (specs[0], P(), P())) if inside else P(),
        check_vma=check_vma,
    )
    got = jit(mapped if inside else jax.value_and_grad(mapped, wrt))(*args)
    assert_close(got, jit(jax.value_and_grad(_mean(), wrt))(*args), 1e-5)


def test_classes_spread_over_devices_by_pmap_and_vmap():
    logits, labels, alpha, gamma = _class_inputs()
    slices = jnp.stack(jnp.split(logits, 4, -1))
    want = focal_jax.softmax_focal_loss_with_integer_labels(
        logits, labels, alpha=alpha, gamma=gamma
    )
    for mapped in (jax.pmap, jax.vmap):
        losses = mapped(
            lambda z: focal_jax.softmax_focal_loss_with_integer_labels(
                z, labels, alpha=alpha, gamma=gamma, class_axis_name="model"
            ),
            axis_name="model",
        )(slices)
        for of_device in losses:
            assert_close(of_device, want, 1e-6)
            assert np.isnan(of_device[1, 4:7]).all()


def test_classes_spread_along_any_axis():
    logits, *others = _class_inputs()
    moved = jnp.moveaxis(logits, -1, 0)
    mapped = jax.shard_map(
        jax.value_and_grad(_mean("data", "model", axis=0)),
        mesh=_mesh(shape=(2, 4)),
        in_specs=(P("model", None, "data"), P(None, "data"), P(), P()),
        out_specs=(P(), P("model", None, "data")),
    )
    want = jax.value_and_grad(_mean())(logits, *others)
    value, gradient = jax.jit(mapped)(moved, *others)
    assert_close((value, jnp.moveaxis(gradient, 0, -1)), want, 1e-5)


def test_spread_classes_cross_the_network_as_numbers_per_position():
    args = jnp.zeros((64, 1024)), jnp.zeros(64, jnp.int32), jnp.ones(1024), jnp.float32(2)
    mapped = jax.shard_map(
        jax.value_and_grad(_mean("data", "model")),
        mesh=_mesh(),
        in_specs=(P("data", "model"), P("data"), P(), P()),
        out_specs=(P(), P("data", "model")),
    )
    text = jax.jit(mapped).lower(*args).compile().as_text()
    assert not _gathered(text)
    reduced = _sizes(text, "all-reduce")
    assert reduced
    assert max(reduced) <= 64 // 4


@pytest.mark.quick
def test_second_derivatives_with_the_classes_spread():
    logits, labels, alpha, gamma = _class_inputs()
    logits = jnp.maximum(logits, -20)

    def product(mean):
        def along(z, v):
            gradient = jax.grad(lambda z: mean(z, labels, alpha, gamma))
            return jax.jvp(gradient, (z,), (v,))[1]

        return along

    spread = jax.shard_map(
        _mean("data", "model"),
        mesh=_mesh(shape=(1, 4)),
        in_specs=(P(None, None, "model"), P(), P(), P()),
        out_specs=P(),
    )
    v = jnp.cos(jnp.arange(logits.size, dtype=jnp.float32)).reshape(logits.shape)
    got, want = (jit(product(mean))(logits, v) for mean in (spread, _mean()))
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize(
    ("specs", "length", "message"),
    [
        ((P("data", None, "model"), P("data"), P()), 3, r"alpha: got shape \(3,\), wanted"),
        ((P("data", None, "model"), P("data"), P("model")), CLASSES, r"alpha: got shape \(3,\)"),
        ((P("data", None, "model"), P(None, "model"), P()), CLASSES, r"labels: got shape \(2, 2\)"),
        (
            (P("data", "model"), P("data", "model"), P()),
            4 * CLASSES,
            "labels: got values that vary",
        ),
    ],
)
def test_classes_spread_wrongly(specs, length, message):
    logits, labels, _, gamma = _class_inputs()
    mapped = jax.shard_map(
        lambda z, y, a: _mean("data", "model")(z, y, a, gamma),
        mesh=_mesh(shape=(2, 4)),
        in_specs=specs,
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=message):
        mapped(logits, labels, jnp.ones(length))


def test_a_class_axis_that_is_not_bound():
    logits, labels, *_ = _class_inputs()
    for module in (focal_jax, focal_jax.reference):
        with pytest.raises(NameError, match="vocabulary"):
            module.softmax_focal_loss_with_integer_labels(
                logits, labels, class_axis_name="vocabulary"
            )


def test_the_reference_spreads_the_classes_too():
    logits, labels, alpha, gamma = _class_inputs()

    def losses(z, **options):
        return focal_jax.reference.softmax_focal_loss_with_integer_labels(
            z, labels, alpha=alpha, gamma=gamma, **options
        )

    spread = jax.shard_map(
        partial(losses, class_axis_name="model"),
        mesh=_mesh(),
        in_specs=P(None, None, "model"),
        out_specs=P(),
    )
    assert_close(jax.jit(spread)(logits), losses(logits), 1e-5)
