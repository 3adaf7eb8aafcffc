"""The hand-derived cotangents, of every order, against autodiff and finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXPONENTS, LOSSES, PROGRAMS, assert_close, jit, total

import focal_jax

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("row", LOSSES, ids=str)
def test_every_cotangent_is_autodiffs(row, x64):
    # Of every rank, the class axis each in its turn, the options in every shape that broadcasts.
    turn, cases = LOSSES.index(row), []
    for rank, shape in enumerate([(3,), (2, 3), (4, 3, 2), (2, 3, 2, 5)]):
        axes = row.axes(len(shape))
        axis = axes[(turn + rank) % len(axes)]
        arguments = row.all(rank, shape, axis, dtype=np.float64)
        for i, (name, option) in enumerate(row.options.items()):
            x = arguments[name]
            smaller = [x.shape, ()] if option.per_class else [x.shape, x.shape[1:], ()]
            keep = smaller[(i + rank) % len(smaller)]
            arguments[name] = x[(0,) * (x.ndim - len(keep))]
        cotangent = np.random.default_rng(rank).normal(size=row.positions(shape, axis))
        cases.append((cotangent, *row.split(arguments)))

    def all_of_them(function):
        def each(insides):
            return [
                jax.value_and_grad(total(function, cotangent, **fixed))(inside)
                for inside, (cotangent, _, fixed) in zip(insides, cases)
            ]

        return jit(each)([inside for _, inside, _ in cases])

    got, want = all_of_them(row.eager), all_of_them(row.reference)
    if row.labels in ("hard", "one-hot"):  # the plain formula may divide 0 by 0 at a hard label
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got))
        for _, gradient in got + want:
            del gradient["labels"]
    for one, other in zip(got, want):
        assert_close(one, other, 1e-9)


@pytest.mark.parametrize("row", LOSSES, ids=str)
def test_python_exponents(row, x64):
    arguments = row.all(2, (5, 4), scale=1.0, dtype=np.float64)
    inside, fixed = row.split(arguments)
    if row.labels in ("hard", "one-hot"):  # the plain formula may divide 0 by 0 in the labels
        fixed["labels"] = inside.pop("labels")
    cotangent = np.random.default_rng(2).normal(size=row.positions((5, 4)))
    rest = {k: v for k, v in inside.items() if k not in row.exponents}

    def all_of_them(function):
        def slopes(exponent):
            static = dict.fromkeys(row.exponents, exponent)
            return jax.grad(total(function, cotangent, **fixed, **static))(rest)

        return jit(lambda: [slopes(exponent) for exponent in EXPONENTS])()

    assert_close(all_of_them(row.eager), all_of_them(row.reference), 1e-10)


@pytest.mark.parametrize("row", [row for row in PROGRAMS if not row.loss.held], ids=str)
def test_finite_differences_to_second_order(row, x64):
    arguments = row.arguments(3, (2, 3), scale=1.0, dtype=np.float64)
    inside, fixed = row.split(arguments | row.scalars(np.float64), movable=True)
    rest = {k: v for k, v in inside.items() if k not in row.exponents}
    rng = np.random.default_rng(3)
    point, static = (inside, rest), dict.fromkeys(row.exponents, 0.5)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), point)
    weights = rng.normal(size=(2, *row.positions((2, 3))))

    def weighted(point):  # with exponents that are arrays, and Python numbers
        traced = total(row.eager, weights[0], **fixed)
        return traced(point[0]) + total(row.eager, weights[1], **fixed, **static)(point[1])

    @jit
    def orders(step):
        at = jax.tree.map(lambda x, d: x + step * d, point, direction)
        _, reverse = _along(weighted, direction)
        return *jax.value_and_grad(weighted)(at), reverse(at)

    step = 1e-5
    _, gradient, second = orders(0.0)
    ahead, behind = orders(step), orders(-step)
    by_value, by_gradient, _ = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
    along = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction)))
    assert_close(by_value, along, 1e-5, 1e-5)
    assert_close(by_gradient, second, 1e-5, 1e-5)


def _along(function, direction):
    """Return the second derivative along a direction: forward over reverse, and twice reverse."""
    gradient = jax.grad(function)

    def forward(x):
        return jax.jvp(gradient, (x,), (direction,))[1]

    def reverse(x):
        return jax.grad(
            lambda x: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient(x), direction)))
        )(x)

    return forward, reverse


@pytest.mark.parametrize("row", LOSSES, ids=str)
def test_second_derivatives(row, x64):
    # Of everything in everything, against autodiff of the plain formula, which is right at
    # moderate float64 logits; 0 is there because |x| has its kink there.
    arguments = row.arguments(4, (3, 3), scale=1.0, dtype=np.float64)
    arguments[row.first] = arguments[row.first].at[0, 0].set(0.0)
    # The plain formula may divide 0 by 0 in hard labels.
    inside, fixed = row.split(arguments | row.scalars(np.float64), movable=True)
    rng = np.random.default_rng(4)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), inside)

    def products(function):
        out = [way(inside) for way in _along(total(function, **fixed), direction)]
        for exponent in (0, 0.5, 1, 1.3, 2) if row.exponents else ():
            static = dict.fromkeys(row.exponents, exponent)
            rest, part = (
                {k: v for k, v in x.items() if k not in static} for x in (inside, direction)
            )
            forward, _ = _along(total(function, **fixed, **static), part)
            out.append(forward(rest))
        return out

    got, want = (jit(partial(products, f))() for f in (row.eager, row.reference))
    assert_close(got, want, 1e-9)


def test_one_hot_is_the_integer_loss():
    logits = 3 * np.random.default_rng(7).normal(size=(6, 5)).astype(np.float32)
    labels = np.arange(6) % 5
    alpha = jnp.linspace(0.1, 0.9, 5)

    def both(function, labels):
        def summed(logits, alpha):
            return jnp.sum(function(logits, labels, alpha=alpha, gamma=1.5))

        return jax.value_and_grad(summed, (0, 1))(logits, alpha)

    got = both(focal_jax.softmax_focal_loss, jax.nn.one_hot(labels, 5))
    assert_close(got, both(focal_jax.softmax_focal_loss_with_integer_labels, labels), 1e-6)


def test_two_classes_are_the_sigmoid():
    logits = 3 * jnp.asarray(np.random.default_rng(8).normal(size=9), jnp.float32)
    pair = jnp.stack([jnp.zeros(9), logits], -1)
    labels = jnp.arange(9) % 2
    want = focal_jax.sigmoid_focal_loss(logits, labels, alpha=0.3)
    got = focal_jax.softmax_focal_loss_with_integer_labels(
        pair, labels, alpha=jnp.array([0.7, 0.3])
    )
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_unit_weights_change_nothing(row):
    # A class weight that is absent, the scalar 1 and 1 for every class are one loss.
    weights = [name for name, option in row.options.items() if option.per_class]
    if not weights:
        pytest.skip("no class weights")
    arguments = row.arguments(6, (4, 3))
    want = row.ours(**arguments)
    for weight in (1.0, jnp.ones(3)):
        assert_close(row.ours(**arguments, **dict.fromkeys(weights, weight)), want, 0)


def test_half_for_both_sides_is_half_the_sigmoid_loss():
    logits, labels = jnp.linspace(-9, 9, 7), jnp.arange(7) % 2
    want = focal_jax.sigmoid_focal_loss(logits, labels)
    assert_close(focal_jax.sigmoid_focal_loss(logits, labels, alpha=0.5), 0.5 * want, 1e-7)
