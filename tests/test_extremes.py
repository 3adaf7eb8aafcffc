"""Saturated and infinite logits, masks, invalid labels, and empty arrays."""

import inspect
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    EXPONENTS,
    KINDS,
    LOSSES,
    PROGRAMS,
    assert_close,
    gradients,
    range_of,
    total,
)
from jax.experimental import checkify

import focal_jax
from focal_jax import engine
from focal_jax.engine.platform import forced_form

pytestmark = pytest.mark.quick

ELEMENTWISE = [row for row in PROGRAMS if row.kind == "elementwise"]
SOFTMAX = [row for row in LOSSES if row.softmax]
# Labels that are one class: hard, one-hot, integer, or a real number that is a class index.
ONE_CLASS = [row for row in LOSSES if row.hard or row.integer or row.labels == "real"]
INVALID = [jnp.nan, jnp.inf, -jnp.inf]


def _all_finite(tree):
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


def _all_zero(tree):
    return all(np.all(leaf == 0) for leaf in jax.tree.leaves(tree))


def _static(row, *exponents):
    """Return settings of the exponents to Python numbers; one setting if there are none."""
    return [dict.fromkeys(row.exponents, x) for x in exponents[: None if row.exponents else 1]]


def _ones_like(tree):
    return jax.tree.map(jnp.ones_like, tree)


def _first_and_second(function, inside):
    """Return the first derivatives, and the second along a direction of ones."""
    first = jax.grad(function)
    return jax.jvp(first, (inside,), (_ones_like(inside),))


def _first_to_third(function, inside, *, forward):
    """Return the first derivatives, and the second and third along directions of ones.

    The first two are reverse over reverse. The third is forward or reverse over these.
    """

    def sum_of(derivatives):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(derivatives))

    def first(x):
        gradient = jax.grad(function)(x)
        return sum_of(gradient), gradient

    def second(x):
        return jax.grad(first, has_aux=True)(x)

    def sum_of_second(x):
        derivatives = second(x)
        return sum_of(derivatives[0]), derivatives

    if forward:
        derivatives, (third, _) = jax.jvp(second, (inside,), (_ones_like(inside),))
    else:
        third, derivatives = jax.grad(sum_of_second, has_aux=True)(inside)
    return derivatives[1], derivatives[0], third


# ---------------------------------------------------------------- saturation


@pytest.mark.parametrize("row", ONE_CLASS, ids=str)
def test_derivatives_are_finite_at_saturation(row):
    # Without second derivatives in hard labels, which are infinite.
    margins = [-1e4, -100, -60, -20, 0, 20, 45, 60, 100, 1e4]
    inside, fixed = row.split(row.with_margins(margins))
    moved, rest = row.split(row.with_margins(margins), movable=True)
    settings = _static(row, 0, 0.5, 1, 2)

    @jax.jit
    def derivatives(inside, moved):
        out = []
        for options in settings:
            first = jax.grad(total(row.eager, **fixed, **options))(inside)
            second = _first_and_second(total(row.eager, **rest, **options), moved)[1]
            out.append((row.eager(**inside, **fixed, **options), first, second))
        return out

    found = derivatives(inside, moved)
    assert _all_finite(found)
    if row.region:
        return  # its gradient vanishes at saturation, as that of the softmax does
    # A large negative margin keeps its gradient: clipping of logits or probabilities would set it
    # to 0. The reference is still accurate at a margin of -30, where the gradient has its limit.
    with jax.enable_x64(True):
        wide = row.with_margins([-30, -30], dtype=np.float64)
        own = {row.first: wide.pop(row.first)}

        @jax.jit
        def reference(own):
            functions = [total(row.reference, **wide, **options) for options in settings]
            return [jax.grad(function)(own)[row.first] for function in functions]

        for (_, first, _), want in zip(found, reference(own)):
            np.testing.assert_allclose(first[row.first][:2], want, rtol=1e-6, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("row", ONE_CLASS, ids=str)
def test_derivatives_to_third_order_are_finite_at_saturation(row):
    margins = [-1e4, -100, -60, 0, 45, 60, 100, 1e4]
    n = len(margins)
    options = {
        k: jnp.full((3,) if option.per_class else (n,), range_of(option)[0] + 0.5, jnp.float32)
        for k, option in row.numbers.items()
    }
    inside, fixed = row.split(row.with_margins(margins) | options)
    labels = {k: inside.pop(k) for k in ("labels",) if k in inside}

    @jax.jit
    def derivatives(inside, exponent):
        inside = inside | {k: jnp.full(inside[k].shape, exponent) for k in row.exponents}
        of_labels = jax.grad(lambda y: jnp.sum(row.eager(**inside, **fixed, **y)))(labels)
        function = total(row.eager, **fixed, **labels)
        return of_labels, _first_to_third(function, inside, forward=True)

    for exponent in EXPONENTS if row.exponents else (0,):
        assert _all_finite(derivatives(inside, jnp.float32(exponent))), exponent


@pytest.mark.slow
@pytest.mark.parametrize("row", ELEMENTWISE, ids=str)
def test_derivatives_to_third_order_are_finite_for_soft_labels(row):
    logits = [-1e4, -100, -60, -45, -8, -3, -1, -0.2, 0, 0.3, 2, 4, 20, 45, 70, 100, 1e4]
    z, y = (x.ravel() for x in np.meshgrid(logits, [0.0, 0.05, 0.3, 0.6, 1.0]))
    z, y = jnp.asarray(z, jnp.float32), jnp.asarray(y, jnp.float32)
    options = {k: jnp.full(z.shape, range_of(x)[0] + 0.5) for k, x in row.numbers.items()}

    def derivatives(z, y, options, static):
        """Return the first derivatives in all arguments, those of their sum, and so on."""

        def first(z, y, options):
            def summed(z, y, options):
                return jnp.sum(row.eager(logits=z, labels=y, **options, **static))

            return jax.value_and_grad(summed, (0, 1, 2))(z, y, options)

        def with_sum(slopes):
            return jnp.sum(slopes[1][0]), slopes

        second = jax.value_and_grad(
            lambda z, y: with_sum(first(z, y, options)), (0, 1), has_aux=True
        )
        return jax.value_and_grad(lambda z: with_sum(second(z, y)), has_aux=True)(z)

    @jax.jit
    def traced(z, y, options, exponent):
        exponents = {k: jnp.full(z.shape, exponent) for k in row.exponents}
        return derivatives(z, y, options | exponents, {})

    for exponent in (0, 0.5, 1, 2, 4) if row.exponents else (0,):
        assert _all_finite(traced(z, y, options, jnp.float32(exponent))), exponent
    rest = {k: x for k, x in options.items() if k not in row.exponents}
    for static in _static(row, 2.0) if row.exponents else []:
        assert _all_finite(jax.jit(derivatives)(z, y, rest, static)), static


@pytest.mark.parametrize("row", [row for row in ELEMENTWISE if row.soft], ids=str)
def test_derivatives_to_third_order_are_finite_for_extreme_inputs(row):
    # Labels near 0, huge logits, and options at the lower end of their range.
    size = [0, 1e-30, 0.3, 8, 45, 79, 88, 104, 1e10, 1e30]
    logits, labels = [-x for x in size] + size, [0, 1e-30, 1e-5, 0.5, 1 - 2**-24, 1]
    z, y = (jnp.asarray(x.ravel(), jnp.float32) for x in np.meshgrid(logits, labels))
    names = ["logits", *row.numbers, *(["labels"] if row.name in _FINITE_IN_LABELS else [])]

    @jax.jit
    def derivatives(inside):
        def first(x):
            return jax.grad(total(row.eager))(x)

        def second(x, name):
            return jax.grad(lambda x: jnp.sum(first(x)[name]))(x)

        def sum_of_second(z):
            return jnp.sum(second(inside | {"logits": z}, "logits")["logits"])

        of_names = [second(inside, name) for name in names]
        if "labels" not in names:
            of_names = [{k: x for k, x in found.items() if k != "labels"} for found in of_names]
        return first(inside), of_names, jax.grad(sum_of_second)(z)

    for above, exponent in itertools.product((0, 1e-30), (0, 0.5, 1, 2, 4)):
        options = {
            k: jnp.full(z.shape, range_of(x)[0] + above, jnp.float32)
            for k, x in row.numbers.items()
        }
        options |= {k: jnp.full(z.shape, exponent, jnp.float32) for k in row.exponents}
        assert _all_finite(derivatives({"logits": z, "labels": y} | options)), options


@pytest.mark.parametrize("row", [row for row in ELEMENTWISE if row.soft], ids=str)
def test_second_derivatives_at_tiny_labels(row):
    # A power of such a label underflows before the derivatives of the power do.
    logits = np.array([-20, -3, 0.5, 4, 20], np.float32)
    labels, n = np.repeat(np.float32([1.2e-38, 1e-30]), 5), 10
    arrays = {"logits": np.tile(logits, 2), "labels": labels}
    arrays |= {k: np.full(n, range_of(x)[0] + 0.5, np.float32) for k, x in row.numbers.items()}

    def by_labels(function):
        def second(inside):
            first = jax.grad(total(function))
            return [jax.grad(lambda x: jnp.sum(first(x)[k]))(inside)["labels"] for k in arrays]  # noqa: B023

        return jax.jit(second)

    got = by_labels(row.eager)(jax.tree.map(jnp.asarray, arrays))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x.astype(np.float64)), arrays)
        want = by_labels(row.reference)(wide)
    for a, b in zip(got, want):
        assert not np.any(np.isnan(a))
        held = np.abs(b) < np.finfo(np.float32).max
        np.testing.assert_allclose(a[held], b[held], rtol=1e-4, atol=1e-14)


# Losses whose second derivatives in labels are finite.
_FINITE_IN_LABELS = {"sigmoid_focal_loss", "sigmoid_poly_focal_loss", "asymmetric_loss"}


# ---------------------------------------------------------------- infinite logits


@pytest.mark.parametrize("gamma", [0, 0.5, 2.0, jnp.float32(0), jnp.float32(2)])
def test_sigmoid_at_infinity(gamma):
    logits = jnp.array([jnp.inf, -jnp.inf, jnp.inf, -jnp.inf])
    labels = jnp.array([1.0, 0.0, 0.0, 1.0])
    for alpha, weight in {None: (1, 1), 0.25: (0.75, 0.25), 0.0: (1, 0), 1.0: (0, 1)}.items():

        def losses(z, alpha=alpha):
            return focal_jax.sigmoid_focal_loss(z, labels, gamma=gamma, alpha=alpha)

        assert losses(logits).tolist() == [0, 0, *(np.inf if w else 0 for w in weight)]
        gradient = jax.grad(lambda z, f=losses: jnp.sum(f(z)))(logits)
        assert gradient.tolist() == [0, 0, weight[0], -weight[1]]


@pytest.mark.parametrize("row", ELEMENTWISE, ids=str)
def test_infinite_logits(row):
    z, y = jnp.array([jnp.inf, -jnp.inf]), jnp.array([1.0, 0.0])
    assert row.compiled(logits=z, labels=y).tolist() == [0, 0]
    wrong = row.compiled(logits=-z, labels=y)
    assert wrong[0] == np.inf
    # With a margin the loss of a negative has a limit.
    limit = -np.log(0.05) * 0.95**4 if row.name == "asymmetric_loss" else np.inf
    np.testing.assert_allclose(wrong[1], limit, rtol=1e-5)
    slopes = gradients(row.eager)
    for sign, label in itertools.product((1, -1), (0.0, 0.4, 1.0)):
        _, gradient = slopes({"logits": sign * z, "labels": jnp.full(2, label)})
        assert _all_finite(gradient)


@pytest.mark.parametrize("row", ELEMENTWISE, ids=str)
def test_tpu_form_has_the_numbers_of_the_cpu_form(row):
    # On a TPU the losses with a gradient are computed from finite logits.
    logits, labels = np.meshgrid(
        [0, 0.3, -0.3, 5, -5, 40, -40, 1e4, -1e4, 1e15, -1e15, 1e30, -1e30, *INVALID], [0, 0.3, 1]
    )
    labels = np.float32(labels if row.soft else np.round(labels))
    options = {k: np.float32(v) for k, v in row.scalars().items()}
    arrays = {row.first: np.float32(logits), "labels": labels} | options

    def losses_and_gradients(arrays):
        losses, gradient = jax.vjp(lambda kw: row.eager(**kw), arrays)
        return losses, gradient(jnp.ones_like(losses))[0]

    found = []
    for form in ("tpu", "cpu"):
        with forced_form(form):
            found.append(jax.jit(losses_and_gradients)(arrays))
    got, want = found
    assert np.any(np.isinf(want[0]))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_tpu_form_of_a_loss_that_overflows():
    exponential = engine.elementwise_loss(
        lambda z, y: jnp.exp(z) + y, label_is_invalid=lambda y: jnp.isinf(y)
    )
    logits, labels = jnp.array([1.0, 100.0, jnp.inf, 0.0]), jnp.array([0.0, 0, 0, jnp.inf])
    with forced_form("tpu"):
        losses, _ = jax.vjp(exponential, logits, labels)
    np.testing.assert_allclose(losses, exponential(logits, labels), rtol=1e-6)
    assert jnp.isinf(losses[1:3]).all()
    assert jnp.isnan(losses[3])


@pytest.mark.parametrize("gamma", [0, 1.5, 2])
def test_soft_sigmoid_labels_at_infinity(gamma):
    logits = jnp.array([jnp.inf, -jnp.inf] * 2)
    labels = jnp.array([0.3, 0.3, 0.5, 0.5])

    def losses(z, y):
        return focal_jax.sigmoid_focal_loss(z, y, gamma=gamma)

    assert losses(logits, labels).tolist() == [np.inf] * 4
    assert _all_finite(jax.grad(lambda *args: jnp.sum(losses(*args)), (0, 1))(logits, labels))


@pytest.mark.parametrize("row", SOFTMAX, ids=str)
def test_a_logit_of_minus_infinity_switches_its_class_off(row):
    logits = 3 * np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    labels = row.arguments(1, (4, 3))["labels"]
    four = np.concatenate([logits, np.full((4, 1), -np.inf, np.float32)], 1)
    four_labels = np.pad(labels, ((0, 0), (0, 1))) if labels.ndim == 2 else labels
    few, many = row.of_logits(logits, labels), row.of_logits(four, four_labels)
    if row.linear:  # the bias switches the class off: 0 times an infinite feature is NaN
        many |= {
            "features": np.pad(logits, ((0, 0), (0, 1))),
            "bias": np.float32([0, 0, 0, -np.inf]),
        }
    inside, fixed = row.split(many)
    settings = _static(row, 0, 0.5, 2)

    @jax.jit
    def derivatives(inside):
        out = []
        for options in settings:
            losses = row.eager(**inside, **fixed, **options)
            out.append((losses, *_first_and_second(total(row.eager, **fixed, **options), inside)))
        return out

    @jax.jit
    def without_the_class(inside, fixed):
        return [
            (
                row.eager(**inside, **fixed, **options),
                jax.grad(total(row.eager, **fixed, **options))(inside)[row.first],
            )
            for options in settings
        ]

    for (losses, first, second), want in zip(
        derivatives(inside), without_the_class(*row.split(few))
    ):
        losses = losses[:3] if row.region else losses  # without the loss of the class
        assert_close((losses, first[row.first][:, :3]), want, 1e-6)
        assert np.all(first[row.first][:, 3] == 0)
        assert np.all(first["bias"][3] == 0) if row.linear else True
        assert _all_finite((first, second))


# The loss of a region is bounded, so it has no infinite value.
@pytest.mark.parametrize(
    "row", [row for row in ONE_CLASS if row.softmax and not row.region], ids=str
)
def test_the_true_class_at_minus_infinity(row):
    if row.linear:
        arguments = row.with_margins([0.0, 0.0, 0.0]) | {"labels": jnp.zeros(3, jnp.int32)}
        arguments["bias"] = jnp.array([-jnp.inf, 0, 0])
    else:
        arguments = row.with_margins([-np.inf] * 3)

    def all_of_them(function, arguments):
        inside, fixed = row.split(arguments)

        @jax.jit
        def each(inside):
            out = []
            for options in _static(row, 0, 0.5, 2):
                slopes = jax.grad(total(function, **fixed, **options))(inside)
                out.append((function(**inside, **fixed, **options), slopes))
            return out

        return each(inside)

    # The loss is infinite if it still grows at margins of -30 to -60. The gradient has its limit.
    with jax.enable_x64(True):
        far = row.with_margins([-30.0, -60.0, -60.0], dtype=np.float64)
        limits = all_of_them(row.reference, far)
    for (losses, gradient), (far, limit) in zip(all_of_them(row.eager, arguments), limits):
        assert np.all(losses == (np.inf if far[1] > far[0] else 0))
        got, want = np.sort(gradient[row.first], 1), np.sort(limit[row.first][1:], 1)
        np.testing.assert_allclose(got, want[[0, 0, 1]], rtol=1e-6, atol=1e-20)
        assert _all_finite(gradient)


@pytest.mark.parametrize("row", [row for row in ONE_CLASS if row.softmax], ids=str)
@pytest.mark.filterwarnings("ignore:logits. got one class")
def test_only_the_true_class_is_left(row):
    exponents = (0.5, 2) if row.region else (0, 0.5, 2)  # a region has the loss 0**gamma
    traced = [dict.fromkeys(row.exponents, jnp.float32(exponents[0]))]
    for logits in (jnp.zeros((3, 1)), jnp.where(jnp.eye(3) == 1, 2.0, -1e30)):
        classes = logits.shape[1]
        labels = jnp.asarray(row.labels_of(np.arange(3) % classes, classes))
        inside, fixed = row.split(row.of_logits(logits, labels))

        @jax.jit
        def all_of_them(inside, row=row, fixed=fixed):
            settings = [*_static(row, *exponents), *traced]
            functions = [total(row.eager, **fixed, **options) for options in settings]
            return [jax.value_and_grad(f)(inside) for f in functions]

        for value, gradient in all_of_them(inside):
            assert value == 0
            assert np.all(gradient[row.first] == 0)


# ---------------------------------------------------------------- masks

_IGNORED = -7


def _masked(row, how, invalid):
    """Return arguments, the same with invalid numbers at masked positions, and the mask.

    Losses of integer labels have both masks, so that one program serves both cases: `where` masks
    positions or nothing, and `ignore_label` is set.
    """
    arguments = row.all(2, (4, 3))
    valid = np.array([True, False, True, False])
    changed = dict(arguments)
    for name, x in arguments.items():
        if name in (row.first, "labels", *row.options) and x.shape[:1] == (4,):
            inside = np.reshape(valid, (4,) + (1,) * (x.ndim - 1))
            changed[name] = jnp.where(inside, x, {"i": 99, "f": invalid}[x.dtype.kind])
    along = valid if row.softmax else valid[:, None]
    if how == "where":
        masks = {"where": along} | ({"ignore_label": _IGNORED} if row.integer else {})
    else:
        labels = jnp.where(valid, arguments["labels"], _IGNORED)
        masks = {"labels": labels, "ignore_label": _IGNORED, "where": np.ones(4, bool)}
    return arguments | masks, changed | masks, valid


def _ways(row):
    return ("where", "ignore_label") if row.integer else ("where",)


def _static_arguments(row):
    return row.axis(-1) | ({"ignore_label": _IGNORED} if row.integer else {})


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_masked_positions_have_no_effect_to_third_order(row):
    # Logits, labels and options at masked positions may be anything.
    static = _static_arguments(row)

    @jax.jit
    def derivatives(inside, fixed):
        function = total(row.eager, **fixed, **static)
        losses = row.eager(**inside, **fixed, **static)
        return losses, _first_to_third(function, inside, forward=False)

    def call(arguments):
        return derivatives(*row.split({k: v for k, v in arguments.items() if k not in static}))

    for how in _ways(row):
        want = call(_masked(row, how, 0.0)[0])
        assert _all_finite(want)
        for invalid in INVALID:
            _, changed, valid = _masked(row, how, invalid)
            got = call(changed)
            assert_close(got, want, 1e-6)
            losses, (first, *_) = got
            assert np.all(first[row.first][~valid] == 0)
            assert row.region or np.all(losses[~valid] == 0)


@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.exponents], ids=str)
def test_masked_positions_have_no_effect_with_python_exponents(row):
    static = _static_arguments(row)

    def orders(options, inside, fixed):
        return _first_and_second(total(row.eager, **fixed, **static, **options), inside)

    @jax.jit
    def derivatives(inside, fixed):
        return [orders(options, inside, fixed) for options in _static(row, 0.5, 2)]

    def call(arguments):
        without = (*row.options, *static)
        return derivatives(*row.split({k: v for k, v in arguments.items() if k not in without}))

    for how in _ways(row):
        want = call(_masked(row, how, 0.0)[0])
        assert _all_finite(want)
        for invalid in INVALID:
            assert_close(call(_masked(row, how, invalid)[1]), want, 1e-6)


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_masks_of_valid_data_do_not_trigger_debug_nans(row):
    # The label to ignore is valid data, and so is every finite number at a masked position. Within
    # `jit`, JAX checks the results only, which are finite in the tests above.
    arguments, _, valid = _masked(row, "where", 0.0)
    if row.integer:
        arguments["labels"] = jnp.where(valid, arguments["labels"], _IGNORED)
    inside, fixed = row.split(arguments)
    with jax.debug_nans(True):
        assert _all_finite(jax.value_and_grad(total(row.eager, **fixed))(inside))


@pytest.mark.parametrize("row", [row for row in LOSSES if row.integer], ids=str)
@pytest.mark.parametrize("ignored", [-1, -100, 255, 1])
def test_ignore_label(row, ignored):
    logits = np.random.default_rng(3).normal(size=(5, 3)).astype(np.float32)
    labels = np.array([0, ignored, 2, ignored, 0])
    kept, gone = np.array([0, 2, 4]), np.array([1, 3])
    want = row.compiled(**row.of_logits(logits[kept], labels[kept]))
    logits[gone] = np.nan
    inside, fixed = row.split(row.of_logits(jnp.asarray(logits), jnp.asarray(labels)))
    where = jnp.array([False, True, True, True, True])

    @jax.jit
    def outputs(inside, fixed):
        losses = lambda **x: row.eager(**inside, **fixed, ignore_label=ignored, **x)  # noqa: E731
        gradient = jax.grad(total(row.eager, **fixed, ignore_label=ignored))(inside)
        return losses(), losses(where=where), gradient[row.first]

    losses, with_mask, gradient = outputs(inside, fixed)
    assert losses[gone].tolist() == [0, 0]
    assert_close(losses[kept], want, 1e-6)
    assert np.all(gradient[gone] == 0)
    assert with_mask.tolist() == [0, 0, losses[2], 0, losses[4]]


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_without_valid_positions_all_is_zero(row):
    arguments = row.all(4, (4, 3))
    inside, fixed = row.split(arguments)
    inside = {k: jnp.full_like(v, jnp.nan) for k, v in inside.items()}
    if row.region:  # options of a class are not at a position
        inside |= {k: arguments[k] for k in row.options}
    assert _all_zero(gradients(row.eager, **fixed, where=jnp.zeros((), bool))(inside))


@pytest.mark.parametrize("row", KINDS, ids=str)
def test_masked_nans_do_not_trigger_debug_nans_in_eager_calls(row):
    arguments = row.all(1, (3, 2))
    arguments[row.first] = arguments[row.first].at[1].set(jnp.nan)
    if row.integer:
        changes = {"labels": arguments["labels"].at[1].set(255), "ignore_label": 255}
    else:
        where = np.array([True, False, True])
        changes = {"where": where if row.softmax else np.stack([where, where], -1)}
        changes["labels"] = arguments["labels"].at[1].set(jnp.nan)
    inside, fixed = row.split(arguments | changes)
    with jax.debug_nans(True):
        jax.grad(total(row.eager, **fixed))(inside)


@pytest.mark.parametrize("row", [x for x in KINDS if x.exponents and not x.region], ids=str)
def test_masked_options_of_nan_do_not_trigger_debug_nans_in_eager_calls(row):
    where, numbers = np.array([True, False, True]), jnp.array([1.0, jnp.nan, 2.0])
    names = [*row.exponents, *(["temperature"] if row.linear else [])]
    arguments = row.all(1, (3, 2)) | {"where": where if row.softmax else where[:, None]}
    arguments |= dict.fromkeys(names, numbers if row.softmax else numbers[:, None])
    if row.linear:
        arguments[row.first] = arguments[row.first].at[1].set(jnp.nan)
    fixed = {name: x for name, x in arguments.items() if name not in names}
    jax.clear_caches()  # JAX checks a cached program of one operation only once
    with jax.debug_nans(True):
        found = jax.grad(total(row.eager, **fixed))({name: arguments[name] for name in names})
    for name in names:
        assert (np.reshape(found[name], -1) != 0).tolist() == where.tolist()


def test_masked_nans_do_not_trigger_debug_nans_in_the_reduction():
    losses = jnp.array([1, jnp.nan, 2], jnp.bfloat16)
    weights = np.array([1, np.nan, 2], np.float32)
    with jax.debug_nans(True):
        for options in (
            {"where": np.array([True, False, True])},
            {"labels": jnp.array([0, 255, 1]), "ignore_label": 255},
        ):
            reduced = jax.grad(lambda x, **options: focal_jax.reduce_loss(x, **options))
            reduced(losses, **options)
            reduced(losses, **options, weights=weights)


def _checkify_supports_checkpoint():
    """Return whether JAX can check an index inside a `jax.checkpoint`; JAX 0.10 raises."""
    index = jax.checkpoint(lambda x: x[jnp.int32(1)])
    try:
        checkify.checkify(index, errors=checkify.index_checks)(jnp.ones(3))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.integer], ids=str)
def test_ignored_labels_pass_the_index_checks_of_checkify(row):
    if row.linear and not _checkify_supports_checkpoint():
        pytest.skip("the linear heads contain a jax.checkpoint")
    arguments = row.all(1, (3, 3))
    arguments["labels"] = jnp.array([0, 255, 1])
    inside, fixed = row.split(arguments | {"ignore_label": 255})
    both = jax.value_and_grad(total(row.eager, **fixed))
    error, _ = jax.jit(checkify.checkify(both, errors=checkify.index_checks))(inside)
    error.throw()


def test_a_masked_position_passes_the_float_checks_of_checkify():
    # The options of a masked position are 0, and the loss divides by gamma.
    where = jnp.array([True, False])
    loss = total(focal_jax.sigmoid_focal_loss_star, labels=jnp.array([1.0, 0.0]), where=where)
    error, _ = jax.jit(checkify.checkify(loss, errors=checkify.float_checks))(
        {"logits": jnp.array([1.0, 2.0])}
    )
    error.throw()


# ---------------------------------------------------------------- invalid labels


def _invalid_labels(row):
    """Return arguments with invalid labels at some positions, and which positions these are."""
    if row.integer:
        labels = jnp.array([0, -1, 3, 2**31 - 1, -(2**31), 2])
        invalid = np.array([False, True, True, True, True, False])
    elif row.kind == "interval":
        labels = jnp.array([0.5, -0.1, 2.1, jnp.nan, -1e-6, 2.0])
        invalid = np.array([False, True, True, True, True, False])
    elif row.softmax:  # the sum may differ from 1, but no weight may be negative
        labels = jnp.array(
            [[1, 0, 0], [1.1, -0.1, 0], [0.5, 0.5, 0.5], [0, 0, jnp.nan], [-1e-6, 1, 0], [0, 0, 0]]
        )
        invalid = np.array([False, True, False, True, True, False])
    else:
        labels = jnp.array([0.5, -1.0, 2.0, 1 + 1e-6, -1e-6, jnp.nan, 1.0])
        invalid = np.array([False, True, True, True, True, True, False])
        return row.all(5, (7,)) | {"labels": labels}, invalid
    return row.all(5, (6, 3)) | {"labels": labels}, invalid


def _entries(row, arguments, positions):
    """Return which entries of each differentiable argument belong to the positions."""
    out = {}
    for name, x in row.split(arguments)[0].items():
        own = name in (row.first, "labels") or (
            name in row.options and not row.options[name].per_class
        )
        if own:
            out[name] = np.broadcast_to(positions.reshape((-1,) + (1,) * (x.ndim - 1)), x.shape)
    return out


# A loss of a region has no value per position; see the test of its classes below.
PER_POSITION = [row for row in PROGRAMS if not row.region]


@pytest.mark.parametrize("row", PER_POSITION, ids=str)
def test_an_invalid_label_is_nan_at_its_position_only(row):
    arguments, invalid = _invalid_labels(row)
    inside, fixed = row.split(arguments)
    rest = {k: v for k, v in inside.items() if k not in row.exponents}
    entries = _entries(row, arguments, invalid)
    weights = [jnp.float32(0), *([jnp.zeros(3)] if row.softmax else [])]
    weights = weights if "alpha" in row.options else []

    @jax.jit
    def derivatives(inside, rest):
        out = [(row.eager(**inside, **fixed), jax.grad(total(row.eager, **fixed))(inside))]
        for exponents in _static(row, 0, 2) if row.exponents else ():
            options = fixed | exponents
            out.append((row.eager(**rest, **options), jax.grad(total(row.eager, **options))(rest)))
        weighted = {k: v for k, v in inside.items() if k not in row.options}
        return out, [row.eager(**weighted, **fixed, alpha=alpha) for alpha in weights]

    found, weighted = derivatives(inside, rest)
    for losses, gradient in found:
        assert np.isnan(losses).tolist() == invalid.tolist()
        for name, slope in gradient.items():
            assert name not in entries or np.array_equal(np.isnan(slope), entries[name]), name
    # The derivatives in arguments that all positions share are NaN too.
    for name in ("kernel", "bias"):
        assert name not in gradient or np.all(np.isnan(gradient[name]))
    # A weight of 0 does not hide it.
    for losses in weighted:
        assert np.isnan(losses).tolist() == invalid.tolist()


@pytest.mark.each_kind
@pytest.mark.parametrize("row", PER_POSITION, ids=str)
def test_an_invalid_label_whose_loss_is_not_used_has_gradient_zero(row):
    # For example if only the reduction is told which label to ignore.
    arguments, invalid = _invalid_labels(row)
    inside, fixed = row.split(arguments)

    def reduced(inside):
        return jnp.sum(jnp.where(invalid, 0, row.eager(**inside, **fixed)))

    @jax.jit
    def derivatives(inside):
        first = jax.grad(reduced)
        second = jax.grad(lambda x: sum(jnp.sum(v) for v in jax.tree.leaves(first(x))))
        masked = jax.grad(total(row.eager, **fixed, where=~invalid))
        return first(inside), second(inside), masked(inside)

    first, second, want = derivatives(inside)
    assert_close(first, want, 1e-6)
    assert _all_finite(second)
    for tree in (first, second):
        for name, entries in _entries(row, arguments, invalid).items():
            assert np.all(np.asarray(tree[name])[entries] == 0), name


@pytest.mark.parametrize("row", [row for row in PROGRAMS if not row.integer], ids=str)
def test_labels_a_few_roundings_outside_their_range_count_as_the_bound(row):
    # Blurred masks, averaged votes and rotated IoUs have such labels. The dtype of the labels
    # determines the tolerance; a float64 label beside float32 logits becomes float32.
    high = 2 if row.kind == "interval" else 1
    arguments = row.all(7, (4, 3) if row.softmax else (4,))
    shape = arguments.pop("labels").shape
    inside, fixed = row.split(arguments)

    def labels(roundings, dtype):
        shift = roundings * float(jnp.finfo(dtype).eps)
        bounds = np.array([-shift, 0, high * (1 + shift), -shift])
        if row.kind == "distribution":  # no weight is too large
            bounds[2] = -shift
        rest = np.zeros((4, 2))
        columns = bounds if len(shape) == 1 else np.concatenate([bounds[:, None], rest], 1)
        return jnp.asarray(columns, dtype)

    @jax.jit
    def of_each(labels):
        given = {dtype: inside | {"labels": y} for dtype, y in labels.items()}
        gradient = jax.grad(total(row.eager, **fixed))(given["float32"])
        functions = row.eager, row.reference
        return [[f(**x, **fixed) for x in given.values()] for f in functions], gradient

    dtypes = "float32", "bfloat16", "float16"
    (got, _), gradient = found = of_each({x: labels(3, x) for x in dtypes})
    assert_close(found, of_each({x: labels(0, x) for x in dtypes}), 0, atol=0)
    assert _all_finite([got, gradient])
    outside = [True, False, False] if row.region else [True, False, True, True]
    for losses in of_each({x: labels(9, x) for x in dtypes})[0]:
        assert np.isnan(losses).tolist() == [outside] * 3


@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.region], ids=str)
def test_an_invalid_label_of_a_region_is_nan_for_its_class_only(row):
    for label in (-1e-6, 1 + 1e-6, 2.0, jnp.nan):
        arguments = row.arguments(5, (6, 3))
        arguments["labels"] = arguments["labels"].at[2, 1].set(label)
        assert np.isnan(row.compiled(**arguments)).tolist() == [False, True, False]
        assert _all_finite(row.compiled(**arguments, where=np.arange(6) != 2))


# ---------------------------------------------------------------- empty arrays


@pytest.mark.each_kind
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_empty_batches(row):
    for shape in ((0, 3), (2, 0, 3)):
        inside, fixed = row.split(row.all(7, shape))

        @jax.jit
        def outputs(inside, fixed=fixed):
            return row.eager(**inside, **fixed), jax.grad(total(row.eager, **fixed))(inside)

        losses, gradient = outputs(inside)
        assert losses.shape == row.losses_shape(shape)
        assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, inside)
        assert _all_zero((losses, gradient))


@pytest.mark.each_kind
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_vmap_over_an_empty_axis(row):
    inside, fixed = row.split(row.all(7, (4, 3)))
    labels = {k: v for k, v in fixed.items() if k == "labels"}
    static = {k: v for k, v in fixed.items() if k != "labels"}
    empty = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), (inside, labels))

    def one(inside, labels):
        return jax.value_and_grad(total(row.eager, **static, **labels))(inside)

    value, gradient = jax.vmap(one)(*empty)
    assert value.shape == (0,)
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, empty[0])
    assert jax.jit(jax.vmap(one))(*empty)[0].shape == (0,)


@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.softmax], ids=str)
def test_no_classes(row):
    arguments = row.of_logits(jnp.zeros((3, 0)), jnp.zeros((3, 0)))
    if row.linear:
        arguments = {"features": jnp.ones((3, 2)), "kernel": jnp.zeros((2, 0))}
    if row.integer or row.kind == "interval":  # no label is valid; masked positions are 0
        arguments |= {"labels": jnp.asarray(row.labels_of(np.zeros(3), 0))}
        assert np.all(np.isnan(row.compiled(**arguments)))
        if "label_smoothing" in inspect.signature(row.loss.function).parameters:
            assert np.all(np.isnan(row.compiled(**arguments, label_smoothing=0.1)))
            assert np.all(np.isnan(row.reference_compiled(**arguments, label_smoothing=0.1)))
        arguments |= {"where": jnp.zeros(3, bool)}
    losses = [0] * row.losses_shape((3, 0))[0]
    assert row.compiled(**arguments).tolist() == losses
    assert row.reference_compiled(**arguments).tolist() == losses
    inside, fixed = row.split(arguments)
    value, gradient = gradients(row.eager, **fixed)(inside)
    assert value == 0
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, inside)
    assert _all_zero(gradient)


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_a_single_position_without_axes(row):
    for variant in row.variants:
        shape = (2,) if row.softmax else ()
        arguments = variant.all(8, shape, scale=1.0)
        got = row.compiled(**arguments)
        assert got.shape == row.losses_shape(shape)
        assert_close(got, row.reference_compiled(**arguments), 1e-5)


@pytest.mark.parametrize("gamma", [5.0, 20.0])
@pytest.mark.parametrize("name", ["sigmoid_focal_loss", "sigmoid_poly_focal_loss"])
def test_third_derivatives_in_soft_labels_whose_probability_underflows(name, gamma):
    def loss(z, y):
        return getattr(focal_jax, name)(z, y, gamma=gamma)

    in_label = jax.grad(jax.grad(loss, 1), 1)
    for argument in (0, 1):
        for logit, label in ((-200.0, 0.0), (-104.0, 0.0), (200.0, 1.0)):
            assert jax.jit(jax.grad(in_label, argument))(logit, label) == 0


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_third_derivatives_beside_a_class_of_probability_0(gamma):
    z, one_hot = jnp.array([1.0, -2.0, -jnp.inf]), jnp.array([1.0, 0.0, 0.0])

    def third(loss, labels):
        derivative = jax.jacrev(jax.jacrev(jax.grad(partial(loss, gamma=gamma))))
        return jax.jit(derivative)(z, labels)

    want = third(focal_jax.softmax_focal_loss_with_integer_labels, 0)
    assert _all_finite(want)
    assert_close(third(focal_jax.softmax_focal_loss, one_hot), want, 1e-5, atol=1e-7)


def test_dual_loss_of_the_least_probable_class_has_no_infinite_intermediate():
    loss = focal_jax.dual_focal_loss_with_integer_labels
    with jax.debug_infs(True):
        jax.grad(lambda z: loss(z, 2))(jnp.array([2.0, 0.0, -1.0]))


def test_dual_loss_is_differentiated_where_x64_is_turned_off_after_the_forward_pass():
    z, labels = jnp.array([[2.0, 0.0, 1.0]]), jnp.array([0])
    with jax.enable_x64(True):
        _, transpose = jax.vjp(
            lambda z: focal_jax.dual_focal_loss_with_integer_labels(z, labels), z
        )
    (got,) = transpose(jnp.ones(1, jnp.float32))
    want = jax.grad(lambda z: focal_jax.dual_focal_loss_with_integer_labels(z, labels).sum())(z)
    assert_close(got, want, 1e-6)
