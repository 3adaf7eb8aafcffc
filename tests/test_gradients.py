"""The hand-derived cotangents, of every order, against autodiff and finite differences."""

from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXPONENTS, LOSSES, PROGRAMS, assert_close, gradients, total
from jax.test_util import check_grads

import focal_jax

PLAIN_CALLS = True


@pytest.mark.parametrize("row", LOSSES, ids=str)
@hypothesis.settings(max_examples=6)
@hypothesis.given(data=st.data())
def test_every_cotangent_is_autodiffs(row, data):
    shape = data.draw(st.sampled_from([(3,), (2, 3), (4, 3, 2), (2, 3, 2, 5)]), "shape")
    axis = data.draw(st.sampled_from(row.axes(len(shape))), "axis")
    seed = data.draw(st.integers(0, 2**16), "seed")
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        arguments = row.all(seed, shape, axis, dtype=np.float64)
        for name, option in row.options.items():  # in every shape that broadcasts
            x = arguments[name]
            smaller = [x.shape, ()] if option.per_class else [x.shape, x.shape[1:], ()]
            keep = data.draw(st.sampled_from(smaller), name)
            arguments[name] = x[(0,) * (x.ndim - len(keep))]
        inside, fixed = row.split(arguments)
        cotangent = jnp.asarray(rng.normal(size=row.positions(shape, axis)))
        got = gradients(row.eager, cotangent, **fixed)(inside)
        want = gradients(row.reference, cotangent, **fixed)(inside)
    if row.labels in ("hard", "one-hot"):  # the plain formula may divide 0 by 0 at a hard label
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got))
        del got[1]["labels"], want[1]["labels"]
    assert_close(got, want, 1e-9)


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

        return jax.jit(lambda: [slopes(exponent) for exponent in EXPONENTS])()

    assert_close(all_of_them(row.eager), all_of_them(row.reference), 1e-10)


@pytest.mark.parametrize("row", [row for row in PROGRAMS if not row.loss.held], ids=str)
def test_finite_differences_to_second_order(row, x64):
    arguments = row.arguments(3, (2, 3), scale=1.0, dtype=np.float64)
    inside, fixed = row.split(arguments | row.scalars(np.float64), movable=True)
    rest = {k: v for k, v in inside.items() if k not in row.exponents}

    @jax.jit
    def function(inside, rest):
        static = dict.fromkeys(row.exponents, 0.5)
        return row.eager(**inside, **fixed), row.eager(**rest, **fixed, **static)

    check_grads(function, (inside, rest), order=2, modes=["rev"], atol=1e-5, rtol=1e-5)


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
        for exponent in (0, 0.5, 1, 1.3, 2):
            static = dict.fromkeys(row.exponents, exponent)
            rest, part = (
                {k: v for k, v in x.items() if k not in static} for x in (inside, direction)
            )
            forward, _ = _along(total(function, **fixed, **static), part)
            out.append(forward(rest))
        return out

    got, want = (jax.jit(partial(products, f))() for f in (row.eager, row.reference))
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
