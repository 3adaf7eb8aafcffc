"""First and second derivatives agree with autodiff of the reference and with finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads import formula, inputs, softmax
from helpers import EXPONENTS, KINDS, PROGRAMS, assert_close, total

import focal_jax
from focal_jax.engine.options import CLASS_WEIGHTS

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_gradients_equal_autodiff_of_the_reference(row, x64):
    # For every rank, with a different class axis for each, and with options of every shape that
    # broadcasts. One program serves all kinds of labels.
    turn = PROGRAMS.index(row)
    axes = [row.axes(rank)[(turn + rank) % len(row.axes(rank))] for rank in range(1, 5)]

    def arguments_of_rank(variant, rank, shape, axis):
        arguments = variant.all(rank, shape, axis, dtype=np.float64)
        for i, (name, option) in enumerate(row.numbers.items()):
            x = arguments[name]
            shapes = [x.shape, ()] if option.per_class else [x.shape, x.shape[1:], ()]
            smaller = shapes[(i + rank) % len(shapes)]
            arguments[name] = x[(0,) * (x.ndim - len(smaller))]
        cotangent = np.random.default_rng(rank).normal(size=row.losses_shape(shape, axis))
        static = row.axis(axis)
        inside, fixed = row.split({k: x for k, x in arguments.items() if k not in static})
        return inside, fixed, cotangent

    def value_and_gradients(function):
        def each(cases):
            return [
                jax.value_and_grad(total(function, cotangent, **fixed, **row.axis(axis)))(inside)
                for axis, (inside, fixed, cotangent) in zip(axes, cases)
            ]

        return jax.jit(each)

    compiled, reference = value_and_gradients(row.eager), value_and_gradients(row.reference)
    for variant in row.variants:
        shapes = zip([(3,), (2, 3), (4, 3, 2), (2, 3, 2, 5)], axes)
        cases = [arguments_of_rank(variant, i, *each) for i, each in enumerate(shapes)]
        got, want = compiled(cases), reference(cases)
        if variant.hard:  # the reference may divide 0 by 0 in the labels
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got))
            for _, gradient in got + want:
                del gradient["labels"]
        for one, other in zip(got, want):
            assert_close(one, other, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.exponents], ids=str)
def test_python_exponents(row, x64):
    cotangent = np.random.default_rng(2).normal(size=row.losses_shape((5, 4)))

    def all_of_them(function):
        def slopes(exponent, inside, fixed):
            static = row.axis(-1) | dict.fromkeys(row.exponents, exponent)
            return jax.grad(total(function, cotangent, **fixed, **static))(inside)

        return jax.jit(lambda *args: [slopes(exponent, *args) for exponent in EXPONENTS])

    compiled, reference = all_of_them(row.eager), all_of_them(row.reference)
    for variant in row.variants:
        arguments = variant.all(2, (5, 4), scale=1.0, dtype=np.float64)
        static = (*row.exponents, *row.axis(-1))
        args = row.split({k: x for k, x in arguments.items() if k not in static})
        got, want = compiled(*args), reference(*args)
        if variant.hard:  # the reference may divide 0 by 0 in the labels
            for gradient in got + want:
                gradient.pop("labels")
        assert_close(got, want, 1e-10)


@pytest.mark.slow
# With a constant weight, the gradient is not the derivative of the value.
@pytest.mark.parametrize(
    "row", [row for row in PROGRAMS if not row.loss.stop_gradient_weight], ids=str
)
def test_finite_differences_to_second_order(row, x64):
    arguments = row.arguments(3, (2, 3), scale=1.0, dtype=np.float64)
    inside, fixed = row.split(arguments | row.scalars(np.float64), movable=True)
    rest = {k: v for k, v in inside.items() if k not in row.exponents}
    rng = np.random.default_rng(3)
    point, static = (inside, rest), dict.fromkeys(row.exponents, 0.5)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), point)
    weights = rng.normal(size=(2, *row.losses_shape((2, 3))))

    def weighted(point):  # once with arrays as exponents, once with Python numbers
        traced = total(row.eager, weights[0], **fixed)
        return traced(point[0]) + total(row.eager, weights[1], **fixed, **static)(point[1])

    @jax.jit
    def orders(step):
        at = jax.tree.map(lambda x, d: x + step * d, point, direction)
        _, reverse = _second_derivatives(weighted, direction)
        return *jax.value_and_grad(weighted)(at), reverse(at)

    step = 1e-5
    _, gradient, second = orders(0.0)
    ahead, behind = orders(step), orders(-step)
    by_value, by_gradient, _ = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
    along = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction)))
    assert_close(by_value, along, 1e-5, 1e-5)
    assert_close(by_gradient, second, 1e-5, 1e-5)


def _second_derivatives(function, direction):
    """Return two functions for the derivative of the gradient along a direction.

    The first is forward over reverse, the second reverse over reverse.
    """
    gradient = jax.grad(function)

    def forward(x):
        return jax.jvp(gradient, (x,), (direction,))[1]

    def reverse(x):
        return jax.grad(
            lambda x: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient(x), direction)))
        )(x)

    return forward, reverse


# Losses whose reference has no derivative at hard labels, not even in the other arguments.
_SINGULAR_REFERENCE = {"matchability_aware_loss"}


def _second_order_cases(row):
    """Yield differentiable arguments, other arguments, and which labels are hard."""
    separate = row.name in _SINGULAR_REFERENCE
    for variants in [[x] for x in row.variants] if separate else [row.variants]:
        cases = [x.arguments(4, (3, 3), scale=1.0, dtype=np.float64) for x in variants]
        arguments = {k: jnp.concatenate([x[k] for x in cases]) for k in (row.first, "labels")}
        arguments[row.first] = arguments[row.first].at[0, 0].set(0.0)
        arguments = cases[0] | arguments | row.scalars(np.float64)
        hard = [np.full(x["labels"].shape, v.hard) for v, x in zip(variants, cases)]
        yield *variants[0].split(arguments, movable=separate), np.concatenate(hard)


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_second_derivatives(row, x64):
    # The derivatives in all arguments of the derivatives in all arguments. At moderate logits in
    # float64, autodiff of the reference is accurate. One logit is 0, the kink of |x|.
    for inside, fixed, hard in _second_order_cases(row):
        rng = np.random.default_rng(4)
        direction = jax.tree.map(lambda x, rng=rng: rng.normal(size=x.shape), inside)
        if "labels" in inside:  # hard labels are not moved
            direction["labels"] = np.where(hard, 0, direction["labels"])

        def products(function, inside=inside, fixed=fixed, direction=direction):
            both = _second_derivatives(total(function, **fixed), direction)
            out = [derivative(inside) for derivative in both]
            for exponent in (0, 0.5, 1, 1.3, 2) if row.exponents else ():
                static = dict.fromkeys(row.exponents, exponent)
                rest, part = (
                    {k: v for k, v in x.items() if k not in static} for x in (inside, direction)
                )
                forward, _ = _second_derivatives(total(function, **fixed, **static), part)
                out.append(forward(rest))
            return out

        got, want = (jax.jit(partial(products, f))() for f in (row.eager, row.reference))
        for tree in (*got, *want):  # the reference may divide 0 by 0
            if "labels" in tree:
                tree["labels"] = np.where(hard, 0, tree["labels"])
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(want))
        assert_close(got, want, 1e-9)


def _orders(loss, dtype, logits, margins, gammas, label):
    """Return the derivatives in logit and margin to third order, by name."""
    z, m, gamma = (jnp.asarray(x, jnp.float32).astype(dtype) for x in (logits, margins, gammas))
    one, zero = jnp.ones_like(z), jnp.zeros_like(z)
    label, gamma_positive = jnp.full_like(z, label), one

    def first(z, m):
        options = {"gamma_positive": gamma_positive, "gamma_negative": gamma}
        return jax.grad(lambda z, m: jnp.sum(loss(z, label, margin=m, **options)), (0, 1))(z, m)

    def second(z, m):
        slopes, transpose = jax.vjp(first, z, m)
        return slopes, *transpose((one, zero)), transpose((zero, one))[1]

    (slopes, zz, zm, mm), transpose = jax.vjp(second, z, m)
    in_zz, in_mm = (transpose(((zero, zero), *x)) for x in ((one, zero, zero), (zero, zero, one)))
    return *slopes, zz, zm, mm, *in_zz, *in_mm


def test_third_derivatives_of_the_asymmetric_loss():
    orders = jax.jit(_orders, static_argnums=(0, 1))
    logits, gammas = [-20, -3, -1, 0.5, 3, 8, 14, 20], [0, 0.5, 1, 2, 4]
    points = np.meshgrid(logits, [0, 1e-8, 1e-3, 0.05, 0.3], gammas)
    points = [x.ravel().astype(np.float32) for x in points]
    got = orders(focal_jax.asymmetric_loss, jnp.float32, *points, 0.0)
    with jax.enable_x64(True):
        want = orders(focal_jax.reference.asymmetric_loss, jnp.float64, *points, 0.0)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-33)
    # Where the exact derivatives are beyond float32, the computed ones are large and finite.
    logits = [43, 60, 85, 86.5, 87, 88, 104, 1e30]
    points = np.meshgrid(logits, [0, 1e-38, 1e-30, 1e-15, 0.05], gammas)
    points = [x.ravel().astype(np.float32) for x in points]
    for label in (0.0, 0.3, 1.0):
        assert np.all(np.isfinite(orders(focal_jax.asymmetric_loss, jnp.float32, *points, label)))


# ---------------------------------------------------------------- relations


def test_one_hot_labels_equal_integer_labels():
    logits = 3 * np.random.default_rng(7).normal(size=(6, 5)).astype(np.float32)
    labels = np.arange(6) % 5
    alpha = jnp.linspace(0.1, 0.9, 5)

    def value_and_slopes(function, labels):
        def summed(logits, alpha):
            return jnp.sum(function(logits, labels, alpha=alpha, gamma=1.5))

        return jax.value_and_grad(summed, (0, 1))(logits, alpha)

    got = value_and_slopes(focal_jax.softmax_focal_loss, jax.nn.one_hot(labels, 5))
    want = value_and_slopes(focal_jax.softmax_focal_loss_with_integer_labels, labels)
    assert_close(got, want, 1e-6)


def test_softmax_of_two_classes_equals_the_sigmoid():
    logits = 3 * jnp.asarray(np.random.default_rng(8).normal(size=9), jnp.float32)
    pair = jnp.stack([jnp.zeros(9), logits], -1)
    labels = jnp.arange(9) % 2
    want = focal_jax.sigmoid_focal_loss(logits, labels, alpha=0.3)
    got = focal_jax.softmax_focal_loss_with_integer_labels(
        pair, labels, alpha=jnp.array([0.7, 0.3])
    )
    assert_close(got, want, 1e-6)


_OPTIONAL_CLASS_WEIGHTS = [row for row in PROGRAMS if row.options.get("alpha") == CLASS_WEIGHTS]


@pytest.mark.parametrize("row", _OPTIONAL_CLASS_WEIGHTS, ids=str)
def test_class_weights_of_one_change_nothing(row):
    # None, the scalar 1 and 1 for every class give the same losses.
    arguments = row.arguments(6, (4, 3))
    want = row.compiled(**arguments)
    for weight in (1.0, jnp.ones(3)):
        assert_close(row.compiled(**arguments, alpha=weight), want, 0)


def test_alpha_of_one_half_halves_the_sigmoid_loss():
    logits, labels = jnp.linspace(-9, 9, 7), jnp.arange(7) % 2
    want = focal_jax.sigmoid_focal_loss(logits, labels)
    assert_close(focal_jax.sigmoid_focal_loss(logits, labels, alpha=0.5), 0.5 * want, 1e-7)


# ---------------------------------------------------------------- sums over many positions


def _mean_gradients(row, n, dtype, **static):
    """Return the gradients of the mean of n equal losses in the arguments that they share."""
    arguments = row.arguments(0, (1, 2), scale=0.5, dtype=dtype) | row.scalars(dtype)
    if row.options.get("alpha") == CLASS_WEIGHTS:
        arguments["alpha"] = jnp.array([0.25, 0.75], dtype)
    static |= row.axis(-1)
    shared = {k: arguments[k] for k in ("bias", *row.numbers) if k in arguments}
    each = {k: jnp.repeat(arguments[k], n, 0) for k in (row.first, "labels")}
    fixed = each | {k: arguments[k] for k in ("kernel",) if k in arguments}

    def mean(shared, fixed):
        return jnp.mean(row.eager(**fixed, **shared, **static))

    return jax.jit(jax.grad(mean))(shared, fixed)


def _assert_mean_does_not_drift(row, n, dtype, **static):
    got, want = (_mean_gradients(row, count, dtype, **static) for count in (n, 1))
    assert_close(got, want, max(1e-5, float(jnp.finfo(dtype).eps)), 1e-12)


@pytest.mark.parametrize("row", [row for row in PROGRAMS if not row.region], ids=str)
def test_gradients_of_shared_arguments_do_not_drift(row):
    _assert_mean_does_not_drift(row, 50_000, jnp.float32)
    if row.integer and row in KINDS:
        for dtype in (jnp.bfloat16, jnp.float16):
            _assert_mean_does_not_drift(row, 50_000, dtype)
        _assert_mean_does_not_drift(row, 2**22 + 3, jnp.float32)


@pytest.mark.parametrize("row", [row for row in KINDS if row.integer], ids=str)
def test_gradients_of_smoothed_losses_do_not_drift(row):
    _assert_mean_does_not_drift(row, 50_000, jnp.bfloat16, label_smoothing=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_gradients_do_not_drift_at_four_million_positions(dtype):
    n = 2**22 + 3
    for row in (row for row in KINDS if row.integer):
        _assert_mean_does_not_drift(row, n, dtype, label_smoothing=0.1)
        if dtype != jnp.float32 and not row.linear:  # float32 is tested above
            _assert_mean_does_not_drift(row, n, dtype)

    def of_region(options, logits, labels):
        return jnp.sum(focal_jax.focal_tversky_loss(logits, labels, smooth=0.0, **options))

    options = {"alpha": [0.7, 0.6], "beta": [0.3, 0.4], "gamma": [0.75, 0.5]}
    options = {name: jnp.array(x, dtype) for name, x in options.items()}
    pair = jnp.array([[0.3, -0.2]], dtype), jnp.array([[0.7, 0.3]], dtype)
    got, want = (
        jax.jit(jax.grad(of_region))(options, *(jnp.repeat(x, count, 0) for x in pair))
        for count in (n, 1)
    )
    assert_close(got, want, max(1e-5, float(jnp.finfo(dtype).eps)), 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_of_class_weights_does_not_drift_under_vmap(dtype):
    def mean(alpha, positions):
        logits = jnp.zeros((50_000 // positions, positions, 2))
        labels = jnp.zeros(logits.shape[:-1], jnp.int32)
        loss = partial(focal_jax.softmax_focal_loss_with_integer_labels, alpha=alpha, gamma=0)
        return jnp.mean(jax.vmap(loss)(logits, labels))

    for positions in (1, 500):  # for each example
        got = jax.jit(jax.grad(mean), static_argnums=1)(jnp.ones(2, dtype), positions)
        assert_close(got, np.array([np.log(2), 0]), max(1e-5, float(jnp.finfo(dtype).eps)), 0)


def test_derivatives_of_class_weights_to_third_order(x64):
    (features, kernel, bias, alpha, gamma), labels = inputs(dtype=np.float64)
    options = {"labels": labels.at[0, 0].set(-1), "gamma": gamma, "ignore_label": -1}

    def power_of(head):
        return lambda a: jnp.sum(head(features, kernel, bias, alpha=a, **options) ** 3)

    def third(function):
        first = jax.grad(lambda a: jnp.sum(jnp.sin(function(a))))
        second = jax.grad(lambda a: jnp.vdot(first(a), alpha))
        return jax.jit(
            lambda a: (jax.hessian(function)(a), jax.grad(lambda a: jnp.vdot(second(a), a))(a))
        )

    assert_close(third(power_of(softmax))(alpha), third(power_of(formula))(alpha), 1e-10)
