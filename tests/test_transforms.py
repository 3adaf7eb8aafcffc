"""The losses under the transformations of JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PROGRAMS, assert_close, gradients, total

import focal_jax

pytestmark = [pytest.mark.quick, pytest.mark.every_form]


@pytest.mark.each_kind
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_jit_changes_nothing(row):
    inside, fixed = row.split(row.all(0, (5, 3)))
    function = jax.value_and_grad(total(row.eager, **fixed))
    assert_close(jax.jit(function)(inside), function(inside), 1e-6)


def _slices(tree):
    """Return the slices of a tree of arrays along the first axis."""
    leaves, structure = jax.tree.flatten(tree)
    return [structure.unflatten([x[i] for x in leaves]) for i in range(len(leaves[0]))]


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_vmap_equals_a_loop(row):
    # Over the first and over the last axis. Arguments that all calls share are not mapped.
    inside, fixed = row.split(row.all(1, (4, 2, 3)))
    shared = {k: inside.pop(k) for k in list(inside) if inside[k].shape[:1] != (4,)}
    arrays = {k: fixed.pop(k) for k in ("labels",) if k in fixed}

    def one(inside, arrays, shared):
        function = total(row.eager, **fixed, **arrays)
        return jax.value_and_grad(function)(inside | shared)

    compiled = jax.jit(one)
    results = [compiled(*each, shared) for each in _slices((inside, arrays))]
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    @jax.jit
    def mapped(inside, arrays, shared):
        last = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), (inside, arrays))
        over_first = jax.vmap(one, (0, 0, None))(inside, arrays, shared)
        return over_first, jax.vmap(one, (-1, -1, None))(*last, shared)

    for got in mapped(inside, arrays, shared):
        assert_close(got, want, 1e-6)


@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.exponents], ids=str)
def test_vmap_over_one_option(row):
    # The residuals are not mapped, but the cotangents are.
    inside, fixed = row.split(row.arguments(2, (4, 3)))
    options = row.scalars()

    def each(value):
        gradient = jax.grad(total(row.eager, **fixed))
        return [gradient(inside | options | {name: value}) for name in row.exponents]

    values = jnp.array([0.5, 2.0])
    compiled = jax.jit(each)
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(compiled, values))
    assert_close(jax.jit(jax.vmap(each))(values), want, 1e-6)


@pytest.mark.each_kind
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_scan_and_checkpoint(row):
    arguments = row.all(3, (4, 5, 3))
    inside, fixed = row.split(arguments)
    static = row.axis(-1)
    mapped = {k for k, x in arguments.items() if k not in static and x.shape[:1] == (4,)}

    def of_slice(own, shared):
        return jax.checkpoint(lambda own: jnp.sum(row.eager(**own, **shared)))(own)

    def by_scan(inside):
        every = arguments | inside
        shared = {k: v for k, v in every.items() if k not in mapped}

        def step(total, own):
            return total + of_slice(own, shared), None

        return jax.lax.scan(step, jnp.float32(0), {k: every[k] for k in mapped})[0]

    def by_loop(inside):  # a region is not the sum of its slices
        every = arguments | inside
        shared = {k: v for k, v in every.items() if k not in mapped}
        slices = _slices({k: every[k] for k in mapped})
        return sum(jnp.sum(row.eager(**own, **shared)) for own in slices)

    whole = by_loop if row.region else total(row.eager, **fixed)
    want = jax.jit(jax.value_and_grad(whole))(inside)
    assert_close(jax.jit(jax.value_and_grad(by_scan))(inside), want, 1e-5)


def _along(x):
    return jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), x)


def _second(function, x):
    return jax.jvp(jax.grad(function), (x,), (_along(x),))[1]


def _second_and_third(function, x):
    """Return forward over reverse, and forward and reverse over reverse over reverse."""

    def along(x):
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(function)(x), _along(x))))

    return _second(function, x), _second(along, x), jax.grad(lambda x: along(x) ** 2)(x)


def _assert_equal_derivatives(derivatives, got, want, x):
    got, want = (jax.jit(partial(derivatives, f))(x) for f in (got, want))
    assert_close(got, want, 1e-9)


@pytest.mark.each_kind
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
@pytest.mark.parametrize(
    ("mapped", "derivatives"),
    [
        (False, _second),
        (True, _second),
        pytest.param(False, _second_and_third, marks=pytest.mark.slow),
    ],
    ids=["map", "vmap inside map", "map, third order"],
)
def test_derivatives_inside_a_loop(row, mapped, derivatives, x64):
    # To differentiate a loop, JAX splits its body, and drops the `custom_jvp` rules of one part.
    arguments = row.all(3, (2, 5, 3), dtype=np.float64)
    inside, _ = row.split(arguments)
    static = row.axis(-1)
    sliced = {k for k, x in arguments.items() if k not in static and x.shape[:1] == (2,)}

    def total_of_slices(map_slices):
        def function(inside):
            every = arguments | inside
            shared = {k: v for k, v in every.items() if k not in sliced}
            squares = lambda own: jnp.sum(row.eager(**own, **shared) ** 2)  # noqa: E731
            return jnp.sum(map_slices(squares, {k: every[k] for k in sliced}))

        return function

    def by_loop(squares, own):
        if not mapped:
            return jax.lax.map(squares, own)
        return jax.lax.map(jax.vmap(squares), {k: x[:, None] for k, x in own.items()})

    by_slices = total_of_slices(lambda f, own: sum(map(f, _slices(own))))
    _assert_equal_derivatives(derivatives, total_of_slices(by_loop), by_slices, inside)


_HEADS = {
    "smoothing": lambda z, w: focal_jax.softmax_focal_loss_with_integer_labels(
        z @ w, jnp.array([0, 1, 2]), label_smoothing=0.1
    ),
    "linear smoothing": lambda z, w: focal_jax.linear_softmax_focal_loss_with_integer_labels(
        z, w, jnp.array([0, 1, 2]), label_smoothing=0.1, chunk_size=2, return_logsumexp=True
    ),
    "linear sigmoid": lambda z, w: focal_jax.linear_sigmoid_focal_loss(
        z, w, jnp.array([[0, 2]] * 3), chunk_size=2
    ),
    "statistics": lambda z, w: focal_jax.token_statistics(z @ w, jnp.array([0, 1, 2]))[:3],
    "linear statistics": lambda z, w: focal_jax.linear_token_statistics(
        z, w, jnp.array([0, 1, 2]), chunk_size=2
    )[:3],
    "sparse labels": lambda z, w: focal_jax.softmax_focal_loss_with_sparse_labels(
        z @ w, jnp.array([[0, 2]] * 3), jnp.array([[0.75, 0.25]] * 3)
    ),
    "linear sparse labels": lambda z, w: focal_jax.linear_softmax_focal_loss_with_sparse_labels(
        z, w, jnp.array([[0, 2]] * 3), jnp.array([[0.75, 0.25]] * 3), chunk_size=2
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] * x.startswith("linear")) for x in _HEADS],
)
def test_derivatives_of_heads_inside_a_loop(name, x64):
    rng = np.random.default_rng(5)
    features, kernel = jnp.asarray(rng.normal(size=(2, 3, 4))), jnp.asarray(rng.normal(size=(4, 5)))

    def squares(z, w):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(_HEADS[name](z, w)))

    def by_loop(x):
        return jnp.sum(jax.lax.map(lambda z: squares(z, x[1]), x[0]))

    def by_slices(x):
        return sum(squares(z, x[1]) for z in x[0])

    _assert_equal_derivatives(_second_and_third, by_loop, by_slices, (features, kernel))


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_forward_mode_alone_raises_and_the_reference_has_it(row):
    inside, fixed = row.split(row.all(4, (4, 3)))
    with pytest.raises(TypeError, match="custom_vjp") as error:
        jax.jvp(total(row.eager, **fixed), (inside,), (inside,))
    assert "focal_jax.reference" in error.value.__notes__[0]
    reference = total(row.reference, **fixed)
    tangent = jax.jit(lambda x: jax.jvp(reference, (x,), (x,))[1])(inside)
    gradient = gradients(row.eager, **fixed)(inside)[1]
    assert_close(tangent, sum(jnp.vdot(gradient[k], inside[k]) for k in inside), 1e-4)


def test_only_losses_with_a_formula_refer_to_the_reference():
    def forward(function):
        with pytest.raises(TypeError, match="custom_vjp") as error:
            jax.jvp(lambda z: function(z, jnp.array([0])), (jnp.ones((1, 2)),), (jnp.ones((1, 2)),))
        return "focal_jax.reference" in str(getattr(error.value, "__notes__", []))

    assert forward(focal_jax.softmax_focal_loss_with_integer_labels)
    assert not forward(lambda z, y: focal_jax.token_statistics(z, y).entropy)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.numbers], ids=str)
def test_derivatives_in_a_closed_over_tracer(row):
    inside, fixed = row.split(row.arguments(5, (4, 3)))

    def gradient_of_penalty(function):
        def penalty(options):
            inner = total(function, **fixed, **options)
            return sum(jnp.sum(x**2) for x in jax.tree.leaves(jax.jit(jax.grad(inner))(inside)))

        return jax.jit(jax.grad(penalty))(row.scalars())

    assert_close(gradient_of_penalty(row.eager), gradient_of_penalty(row.reference), 1e-4)


@pytest.mark.parametrize("row", [row for row in PROGRAMS if len(row.axes(2)) > 1], ids=str)
def test_the_class_axis_may_be_any_axis(row):
    inside, fixed = row.split(row.arguments(6, (2, 3, 4)))

    def outputs(inside, axis):
        # Without differentiation the sums over the classes are computed differently.
        function, static = total(row.eager), fixed | row.axis(axis)
        moved = {k: jnp.moveaxis(x, -1, axis) if x.ndim == 3 else x for k, x in inside.items()}
        value, gradient = jax.value_and_grad(lambda x: function(x | static))(moved)
        back = {k: jnp.moveaxis(x, axis, -1) if x.ndim == 3 else x for k, x in gradient.items()}
        return function(moved | static), value, back

    of_all_axes = jax.jit(lambda inside: [outputs(inside, axis) for axis in (-1, 0, 1, -2, -3)])
    want, *others = of_all_axes(inside)
    assert_close(want[0], want[1], 1e-6)
    for got in others:
        assert_close(got, want, 1e-6)


@pytest.mark.each_kind
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_arguments_may_be_numpy_arrays_and_lists(row):
    arguments = row.arguments(7, (3, 2))
    want = row.eager(**arguments)

    def converted(convert):
        return {k: convert(x) if hasattr(x, "dtype") else x for k, x in arguments.items()}

    got = row.eager(**converted(np.asarray))
    assert isinstance(got, jax.Array)
    assert_close(got, want, 0)
    assert_close(row.eager(**converted(lambda x: x.tolist())), want, 1e-7)
    want = row.eager(**arguments, **dict.fromkeys(row.exponents, 2))
    for two in (np.float32(2), np.int64(2), 2.0, jnp.int32(2)) if row.exponents else ():
        got = row.eager(**arguments, **dict.fromkeys(row.exponents, two))
        assert_close(got, want, 1e-6)
