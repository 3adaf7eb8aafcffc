"""Saturated, infinite, missing, masked and impossible inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXPONENTS, LOSSES, PROGRAMS, assert_close, gradients, jit, total

import focal_jax

pytestmark = pytest.mark.quick

HARD = [row for row in LOSSES if not row.soft]
SOFTMAX = [row for row in LOSSES if row.softmax]
POISONS = [jnp.nan, jnp.inf, -jnp.inf]


def _finite(tree):
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


def _numbers(row, exponent):
    return dict.fromkeys(row.exponents, exponent)


def _orders(function, inside):
    """Return the first derivatives, and the second and the third along all ones.

    The second is forward over reverse, the third reverse over reverse over reverse.
    """
    ones = jax.tree.map(jnp.ones_like, inside)

    def along(gradient):
        return lambda x: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(gradient(x)))

    first = jax.grad(function)
    forward = jax.jvp(first, (inside,), (ones,))[1]
    third = jax.grad(along(jax.grad(along(first))))
    return first(inside), forward, third(inside)


# ---------------------------------------------------------------- saturation


@pytest.mark.parametrize("row", HARD, ids=str)
def test_derivatives_are_finite_at_saturation(row):
    # The second not in hard labels, where it is infinite in truth.
    margins = [-1e4, -100, -60, -20, 0, 20, 45, 60, 100, 1e4]
    inside, fixed = row.split(row.at(margins))
    moved, rest = row.split(row.at(margins), movable=True)

    @jit
    def all_of_them(inside, moved):
        out = []
        for exponent in (0, 0.5, 1, 2):
            options = _numbers(row, exponent)
            first = jax.grad(total(row.eager, **fixed, **options))(inside)
            gradient = jax.grad(total(row.eager, **rest, **options))
            second = jax.jvp(gradient, (moved,), (jax.tree.map(jnp.ones_like, moved),))[1]
            out.append((row.eager(**inside, **fixed, **options), first, second))
        return out

    derivatives = all_of_them(inside, moved)
    assert _finite(derivatives)
    # The far wrong side keeps its gradient, which clipping would have taken away: what the plain
    # formula has at a margin of -30, where it still has its digits and the slope is at its end.
    with jax.enable_x64(True):
        wide = row.at([-30, -30], dtype=np.float64)
        own = {row.first: wide.pop(row.first)}

        @jit
        def plain(own):
            functions = [
                total(row.reference, **wide, **_numbers(row, exponent))
                for exponent in (0, 0.5, 1, 2)
            ]
            return [jax.grad(function)(own)[row.first] for function in functions]

        for (_, first, _), want in zip(derivatives, plain(own)):
            np.testing.assert_allclose(first[row.first][:2], want, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("row", HARD, ids=str)
def test_every_derivative_is_finite_at_saturation_to_third_order(row):
    margins = [-1e4, -100, -60, 0, 45, 60, 100, 1e4]
    n = len(margins)
    options = {
        k: jnp.full((3,) if option.per_class else (n,), option.low + 0.5, jnp.float32)
        for k, option in row.options.items()
    }
    inside, fixed = row.split(row.at(margins) | options)
    hard = {k: inside.pop(k) for k in ("labels",) if k in inside}

    @jit
    def derivatives(inside, exponent):
        inside = inside | {k: jnp.full((n,), exponent) for k in row.exponents}
        labels = jax.grad(lambda y: jnp.sum(row.eager(**inside, **fixed, **y)))(hard)
        return labels, _orders(total(row.eager, **fixed, **hard), inside)

    for exponent in EXPONENTS:
        assert _finite(derivatives(inside, jnp.float32(exponent))), exponent


# ---------------------------------------------------------------- infinities


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


@pytest.mark.parametrize("gamma", [0, 1.5, 2])
def test_soft_sigmoid_labels_at_infinity(gamma):
    logits = jnp.array([jnp.inf, -jnp.inf] * 2)
    labels = jnp.array([0.3, 0.3, 0.5, 0.5])

    def losses(z, y):
        return focal_jax.sigmoid_focal_loss(z, y, gamma=gamma)

    assert losses(logits, labels).tolist() == [np.inf] * 4
    assert _finite(jax.grad(lambda *args: jnp.sum(losses(*args)), (0, 1))(logits, labels))


@pytest.mark.parametrize("row", SOFTMAX, ids=str)
def test_a_class_at_minus_infinity_is_switched_off(row):
    logits = 3 * np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    labels = row.arguments(1, (4, 3))["labels"]
    cut = np.concatenate([logits, np.full((4, 1), -np.inf, np.float32)], 1)
    wide = labels if row.integer else np.pad(labels, ((0, 0), (0, 1)))
    # A linear head switches a class off by its bias: 0 times an infinite feature is NaN.
    few, many = row.of_logits(logits, labels), row.of_logits(cut, wide)
    if row.linear:
        many |= {
            "features": np.pad(logits, ((0, 0), (0, 1))),
            "bias": np.float32([0, 0, 0, -np.inf]),
        }
    inside, fixed = row.split(many)

    @jit
    def derivatives(inside):
        out = []
        for exponent in (0, 0.5, 2):
            first = jax.grad(total(row.eager, **fixed, **_numbers(row, exponent)))
            direction = {k: jnp.ones_like(v) for k, v in inside.items()}
            out.append((first(inside), jax.jvp(first, (inside,), (direction,))[1]))
        return out

    for exponent, (first, second) in zip((0, 0.5, 2), derivatives(inside)):
        options = _numbers(row, exponent)
        assert_close(row.ours(**many, **options), row.ours(**few, **options), 1e-6)
        own, rest = row.split(few)
        want = gradients(row.eager, **rest, **options)(own)[1][row.first]
        assert_close(first[row.first][:, :3], want, 1e-6)
        assert np.all(first[row.first][:, 3] == 0)
        assert np.all(first["bias"][3] == 0) if row.linear else True
        assert _finite((first, second))


@pytest.mark.parametrize("row", [row for row in SOFTMAX if not row.soft], ids=str)
def test_the_true_class_at_minus_infinity(row):
    if row.linear:
        arguments = row.at([0.0, 0.0, 0.0]) | {"labels": jnp.zeros(3, jnp.int32)}
        arguments["bias"] = jnp.array([-jnp.inf, 0, 0])
    else:
        arguments = row.at([-np.inf] * 3)

    def all_of_them(function, arguments):
        inside, fixed = row.split(arguments)

        @jit
        def each(inside):
            out = []
            for exponent in (0, 0.5, 2):
                options = fixed | _numbers(row, exponent)
                slopes = jax.grad(total(function, **options))(inside)
                out.append((function(**inside, **options), slopes))
            return out

        return each(inside)

    # The limits: of a loss that still grows it is infinite, and p log p goes to 0.
    with jax.enable_x64(True):
        far = row.at([-30.0, -60.0, -60.0], dtype=np.float64)
        limits = all_of_them(row.reference, far)
    for (losses, gradient), (far, limit) in zip(all_of_them(row.eager, arguments), limits):
        assert np.all(losses == (np.inf if far[1] > far[0] else 0))
        got, want = np.sort(gradient[row.first], 1), np.sort(limit[row.first][1:], 1)
        np.testing.assert_allclose(got, want[[0, 0, 1]], rtol=1e-6, atol=1e-20)
        assert _finite(gradient)


@pytest.mark.parametrize("row", [row for row in SOFTMAX if not row.soft], ids=str)
def test_only_the_true_class_is_left(row):
    for logits in (jnp.zeros((3, 1)), jnp.where(jnp.eye(3) == 1, 2.0, -1e30)):
        classes = logits.shape[1]
        labels = jnp.arange(3) % classes
        labels = labels if row.integer else jnp.eye(classes)[labels]
        inside, fixed = row.split(row.of_logits(logits, labels))

        @jit
        def all_of_them(inside, row=row, fixed=fixed):
            functions = [
                total(row.eager, **fixed, **_numbers(row, exponent))
                for exponent in (0, 0.5, 2, jnp.float32(0))
            ]
            return [jax.value_and_grad(f)(inside) for f in functions]

        for value, gradient in all_of_them(inside):
            assert value == 0
            assert np.all(gradient[row.first] == 0)


# ---------------------------------------------------------------- masks


def _masked(row, how, poison):
    """Return clean arguments, the same with poison under the mask, and the mask."""
    shape = (4, 3)
    arguments = row.all(2, shape)
    where = np.array([True, False, True, False])
    soiled = dict(arguments)
    along = where if row.softmax else where[:, None]
    for name, x in arguments.items():
        if name in (row.first, "labels", *row.options) and x.shape[:1] == (4,):
            inside = np.reshape(where, (4,) + (1,) * (x.ndim - 1))
            bad = {"i": 99, "f": poison}[x.dtype.kind]
            soiled[name] = jnp.where(inside, x, bad)
    if how == "where":
        return arguments | {"where": along}, soiled | {"where": along}, where
    ignored = {"labels": jnp.where(where, arguments["labels"], -7), "ignore_label": -7}
    return arguments | ignored, soiled | ignored, where


_HOW = [
    (row, how)
    for row in PROGRAMS
    for how in ("where", "ignore_label")
    if how == "where" or row.integer
]


@pytest.mark.parametrize(("row", "how"), _HOW, ids=lambda x: str(x))
def test_masked_means_masked_to_third_order(row, how):
    # Whatever stands under the mask, in logits, labels and in options that have an entry there.
    clean, _, _ = _masked(row, how, 0.0)
    static = row.axis(-1) | ({"ignore_label": -7} if how == "ignore_label" else {})

    @jit
    def derivatives(inside, fixed):
        function = total(row.eager, **fixed, **static)
        return row.eager(**inside, **fixed, **static), _orders(function, inside)

    def of(arguments):
        return derivatives(*row.split({k: v for k, v in arguments.items() if k not in static}))

    want = of(clean)
    assert _finite(want)
    for poison in POISONS:
        _, soiled, where = _masked(row, how, poison)
        got = of(soiled)
        assert_close(got, want, 1e-6)
        losses, (first, *_) = got
        assert np.all(losses[~where] == 0)
        assert np.all(first[row.first][~where] == 0)


@pytest.mark.parametrize(("row", "how"), _HOW, ids=lambda x: str(x))
def test_masked_means_masked_with_python_numbers(row, how):
    static = row.axis(-1) | ({"ignore_label": -7} if how == "ignore_label" else {})

    def orders(exponent, inside, fixed):
        return _orders(total(row.eager, **fixed, **static, **_numbers(row, exponent)), inside)[:2]

    @jit
    def derivatives(inside, fixed):
        return [orders(exponent, inside, fixed) for exponent in (0.5, 2)]

    def of(arguments):
        kept = {k: v for k, v in arguments.items() if k not in (*row.options, *static)}
        return derivatives(*row.split(kept))

    want = of(_masked(row, how, 0.0)[0])
    assert _finite(want)
    for poison in POISONS:
        assert_close(of(_masked(row, how, poison)[1]), want, 1e-6)


@pytest.mark.parametrize(("row", "how"), _HOW, ids=lambda x: str(x))
def test_valid_data_with_masks_is_nothing_to_a_debugger_of_nans(row, how):
    # The label to ignore is valid data, and so is whatever a mask hides but NaN itself.
    arguments, _, _ = _masked(row, how, 0.0)
    inside, fixed = row.split(arguments)
    function = jax.value_and_grad(total(row.eager, **fixed))
    with jax.debug_nans(True):
        assert _finite(jit(function)(inside))
        assert _finite(function(inside))
        second = jax.grad(lambda x: sum(jnp.sum(v) for v in jax.tree.leaves(function(x)[1])))
        assert _finite(jit(second)(inside))


@pytest.mark.parametrize("row", [row for row in LOSSES if row.integer], ids=str)
@pytest.mark.parametrize("ignored", [-1, -100, 255, 1])
def test_ignore_label(row, ignored):
    logits = np.random.default_rng(3).normal(size=(5, 3)).astype(np.float32)
    labels = np.array([0, ignored, 2, ignored, 0])
    kept, gone = [0, 2, 4], [1, 3]
    want = row.ours(**row.of_logits(logits[kept], labels[kept]))
    logits[gone] = np.nan
    inside, fixed = row.split(row.of_logits(jnp.asarray(logits), jnp.asarray(labels)))
    fixed["ignore_label"] = ignored
    losses = row.ours(**inside, **fixed)
    assert losses[jnp.array(gone)].tolist() == [0, 0]
    assert_close(losses[jnp.array(kept)], want, 1e-6)
    gradient = gradients(row.eager, **fixed)(inside)[1][row.first]
    assert np.all(gradient[jnp.array(gone)] == 0)
    both = row.ours(**inside, **fixed, where=jnp.array([False, True, True, True, True]))
    assert both.tolist() == [0, 0, losses[2], 0, losses[4]]


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_nothing_valid_is_zero(row):
    arguments = row.all(4, (4, 3))
    inside, fixed = row.split(arguments)
    inside = {k: jnp.full_like(v, jnp.nan) for k, v in inside.items()}
    got = gradients(row.eager, **fixed, where=jnp.zeros((), bool))(inside)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(got))


# ---------------------------------------------------------------- impossible labels


def _impossible(row):
    """Return arguments whose labels are impossible at some positions, and which those are."""
    if row.integer:
        labels = jnp.array([0, -1, 3, 2**31 - 1, -(2**31), 2])
        bad = np.array([False, True, True, True, True, False])
    elif row.softmax:  # what does not add up to 1 is allowed, a negative weight is not
        labels = jnp.array(
            [[1, 0, 0], [1.1, -0.1, 0], [0.5, 0.5, 0.5], [0, 0, jnp.nan], [-1e-6, 1, 0], [0, 0, 0]]
        )
        bad = np.array([False, True, False, True, True, False])
    else:
        labels = jnp.array([0.5, -1.0, 2.0, 1 + 1e-6, -1e-6, 1.0])
        bad = np.array([False, True, True, True, True, False])
        return row.all(5, (6,)) | {"labels": labels}, bad
    return row.all(5, (6, 3)) | {"labels": labels}, bad


def _entries(row, arguments, bad):
    """Return which entries of each argument belong to the positions that are bad."""
    out = {}
    for name, x in row.split(arguments)[0].items():
        own = name in (row.first, "labels") or (
            name in row.options and not row.options[name].per_class
        )
        out[name] = (
            np.broadcast_to(bad.reshape((-1,) + (1,) * (x.ndim - 1)), x.shape) if own else None
        )
    return out


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_an_impossible_label_is_nan_at_its_position_and_only_there(row):
    arguments, bad = _impossible(row)
    inside, fixed = row.split(arguments)
    rest = {k: v for k, v in inside.items() if k not in row.exponents}
    entries = _entries(row, arguments, bad)

    @jit
    def derivatives(inside, rest):
        out = [(row.eager(**inside, **fixed), jax.grad(total(row.eager, **fixed))(inside))]
        for exponent in (0, 2):
            options = fixed | _numbers(row, exponent)
            out.append((row.eager(**rest, **options), jax.grad(total(row.eager, **options))(rest)))
        return out

    for losses, gradient in derivatives(inside, rest):
        assert np.isnan(losses).tolist() == bad.tolist()
        for name, slope in gradient.items():
            if entries[name] is not None:
                assert np.array_equal(np.isnan(slope), entries[name]), name
    # What all the positions share is loud too.
    for name in ("kernel", "bias"):
        assert name not in gradient or np.all(np.isnan(gradient[name]))
    # No weight silences it.
    for alpha in (0.0, jnp.zeros(3)) if row.softmax else (0.0,):
        weighted = {k: v for k, v in arguments.items() if k not in row.options}
        if "alpha" in row.options:
            assert np.isnan(row.ours(**weighted, alpha=alpha)).tolist() == bad.tolist()


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_an_impossible_label_that_is_not_used_has_no_gradient(row):
    # As where the label to ignore is said to the reduction alone. To second order too.
    arguments, bad = _impossible(row)
    inside, fixed = row.split(arguments)
    clean = dict(arguments, where=~bad)

    def reduced(inside, fixed, **options):
        return jnp.sum(jnp.where(bad, 0, row.eager(**inside, **fixed, **options)))

    @jit
    def derivatives(inside):
        function = jax.grad(lambda x: reduced(x, fixed))
        second = jax.grad(lambda x: sum(jnp.sum(v) for v in jax.tree.leaves(function(x))))
        return function(inside), second(inside)

    first, second = derivatives(inside)
    own, rest = row.split(clean)
    want = gradients(row.eager, **rest)(own)[1]
    assert_close(first, want, 1e-6)
    assert _finite(second)
    for tree in (first, second):
        for name, mask in _entries(row, arguments, bad).items():
            if mask is not None:
                assert np.all(np.asarray(tree[name])[mask] == 0), name


# ---------------------------------------------------------------- nothing there


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_empty_batches(row, shape):
    inside, fixed = row.split(row.all(7, shape))
    assert row.ours(**inside, **fixed).shape == row.positions(shape)
    _, gradient = gradients(row.eager, **fixed)(inside)
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, inside)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_vmap_over_an_empty_axis(row):
    inside, fixed = row.split(row.all(7, (4, 3)))
    labels = {k: v for k, v in fixed.items() if k == "labels"}
    static = {k: v for k, v in fixed.items() if k != "labels"}
    none = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), (inside, labels))

    def one(inside, labels):
        return jax.value_and_grad(total(row.eager, **static, **labels))(inside)

    value, gradient = jax.vmap(one)(*none)
    assert value.shape == (0,)
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, none[0])
    assert jit(jax.vmap(one))(*none)[0].shape == (0,)


@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.softmax], ids=str)
def test_no_class_at_all(row):
    arguments = row.of_logits(jnp.zeros((3, 0)), jnp.zeros((3, 0)))
    if row.linear:
        arguments = {"features": jnp.ones((3, 2)), "kernel": jnp.zeros((2, 0))}
    if row.integer:  # then no label is possible, and what is masked is 0
        arguments |= {"labels": jnp.zeros(3, jnp.int32)}
        assert np.all(np.isnan(row.ours(**arguments)))
        arguments |= {"where": jnp.zeros(3, bool)}
    assert row.ours(**arguments).tolist() == [0, 0, 0]
    assert row.plain(**arguments).tolist() == [0, 0, 0]
    inside, fixed = row.split(arguments)
    value, gradient = gradients(row.eager, **fixed)(inside)
    assert value == 0
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, inside)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("row", LOSSES, ids=str)
def test_a_zero_dimensional_position(row):
    shape = (2,) if row.softmax else ()
    arguments = row.all(8, shape, scale=1.0)
    got = row.ours(**arguments)
    assert got.shape == ()
    assert_close(got, row.plain(**arguments), 1e-5)
