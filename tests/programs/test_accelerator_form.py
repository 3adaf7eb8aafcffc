"""Tests that the accelerator form of every loss computes the numbers of the CPU form."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_gradients
import test_values
from helpers import LOSSES, PROGRAMS, assert_close, gradients

from focal_jax import catalogue
from focal_jax.engine.platform import forced_form

pytestmark = [pytest.mark.quick, pytest.mark.every_form, pytest.mark.slow]

# Rows for the tests against the formulas. One elementwise loss is enough, because elementwise
# losses have no accelerator form of their own.
ROWS = [row for row in PROGRAMS if row.softmax or row.name == "sigmoid_focal_loss"]
# Rows with an array of logits that has a class axis.
SOFTMAX = [row for row in LOSSES if row.softmax and not row.linear]


@pytest.fixture(autouse=True, scope="module")
def _accelerator_form():
    with forced_form("accelerator"):
        yield


# ---------------------------------------------------------------- comparison with the CPU form


def _outputs_and_gradients(function, static, arrays):
    """Return outputs without differentiation, outputs with differentiation, and gradients.

    The gradients are those of a weighted sum of all outputs, in all floating arrays.
    """
    wrt = {k: x for k, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    rest = {k: x for k, x in arrays.items() if k not in wrt}

    def total(wrt):
        outputs = function(**static, **rest, **wrt)
        weighted = [
            jnp.sum(jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) * x)
            for x in jax.tree.leaves(outputs)
        ]
        return sum(weighted), outputs

    return function(**static, **arrays), jax.value_and_grad(total, has_aux=True)(wrt)


def _run(function, arguments):
    """Compile and run a loss and its gradients in the form that is selected at the moment."""
    arrays = {k: x for k, x in arguments.items() if hasattr(x, "dtype")}
    static = {k: x for k, x in arguments.items() if k not in arrays}
    return jax.jit(partial(_outputs_and_gradients, function, static))(arrays)


# A case has a name, a loss and a function that makes the arguments. JAX does not start before the
# tests run.


def _mask(shape):
    return jnp.asarray(np.random.default_rng(9).random(shape) < 0.8)


def _arguments(row, seed, options=None, *, defaults=False, masked=False, transposed=False):
    """Return random arguments of a row.

    Args:
      row: the loss and its kind of labels.
      seed: the seed.
      options: replace and add arguments.
      defaults: whether to leave out all options.
      masked: whether to add a random mask.
      transposed: whether to pass the kernel of a linear head as `[C, D]`.
    """
    shape, axis = ((6, 5), -1) if row.linear or not row.softmax else ((3, 5, 2), 1)
    arguments = (row.arguments if defaults else row.all)(seed, shape, axis)
    if masked:
        arguments["where"] = _mask(row.positions(shape, axis))
    if transposed:
        arguments |= {"kernel": arguments["kernel"].T, "transpose_kernel": True}
    return arguments | (options or {})


def _row_cases():
    """Yield every loss with default options, and with arrays as options and a mask."""
    for row in LOSSES:
        yield f"{row} defaults", row.eager, partial(_arguments, row, 1, defaults=True)
        yield f"{row} arrays", row.eager, partial(_arguments, row, 2, masked=True)


def _integer_cases():
    """Yield the options that only losses of integer labels have."""
    for row in (row for row in LOSSES if row.integer):
        parameters = inspect.signature(row.loss.function).parameters
        for options in (
            {"label_smoothing": 0.1},
            {"return_logsumexp": True},
            {"ignore_label": 1},
            {"label_smoothing": 0.1, "return_logsumexp": True, "ignore_label": 1},
        ):
            if options.keys() <= parameters.keys():
                yield f"{row} {' '.join(options)}", row.eager, partial(_arguments, row, 4, options)


def _linear_cases():
    """Yield the options that only the linear head has."""
    for row in (row for row in LOSSES if row.linear):
        for options in (
            *({"chunk_size": size} for size in (1, 2, 3, 5, None)),
            {"logit_softcap": 2.0},
            {"logit_softcap": 2.0, "label_smoothing": 0.1, "return_logsumexp": True},
            {"chunk_size": 3, "label_smoothing": 0.1},
            {"bias": None},
            {"transpose_kernel": True},
            {"transpose_kernel": True, "chunk_size": 3, "logit_softcap": 2.0},
        ):
            name = " ".join(f"{k}={x}" for k, x in options.items())
            transposed = "transpose_kernel" in options
            make = partial(_arguments, row, 5, options, transposed=transposed)
            yield f"{row} {name}", row.eager, make


CASES = [*_row_cases(), *_integer_cases(), *_linear_cases()]


def test_every_loss_of_the_catalogue_is_compared():
    compared = {name.partition(" ")[0].partition("-")[0] for name, _, _ in CASES}
    assert compared >= set(catalogue.LOSSES)


@pytest.mark.parametrize(
    ("function", "make_arguments"), [x[1:] for x in CASES], ids=[x[0] for x in CASES]
)
def test_values_and_gradients_equal_those_of_the_cpu_form(function, make_arguments):
    arguments = make_arguments()
    got = _run(function, arguments)
    with forced_form("cpu"):
        want = _run(function, arguments)
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize("row", SOFTMAX, ids=str)
def test_program_has_no_conditional(row):
    inside, fixed = row.split(row.arguments(0, (4, 3)))
    text = gradients(row.eager, **fixed).lower(inside).compile().as_text()
    assert " conditional(" not in text
    assert text.count(" reduce(") > 0


# ---------------------------------------------------------------- comparison with the formulas


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_float32_to_60_digits(row):
    test_values.test_float32_to_60_digits(row)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_second_derivatives(row, x64):
    test_gradients.test_second_derivatives(row, x64)


@pytest.mark.parametrize("row", SOFTMAX, ids=str)
@pytest.mark.parametrize("classes", [1000, 32_000])
def test_many_classes(row, classes):
    # XLA:CPU runs the reduction of the accelerator form sequentially. This order of summation has
    # the largest rounding error.
    arguments = row.arguments(1, (4, classes), scale=2.0)
    inside, fixed = row.split(arguments)
    got = gradients(row.eager, **fixed)(inside)
    with jax.enable_x64(True):
        wide = {k: np.asarray(v, np.float64) for k, v in inside.items()}
        assert_close(got, gradients(row.reference, **fixed)(wide), 1e-5)


@pytest.mark.parametrize("row", SOFTMAX, ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis(row, axis):
    shape = (4, 3, 5)
    inside, fixed = row.split(row.all(2, shape, axis))
    want = gradients(row.reference, **fixed)(inside)
    assert_close(gradients(row.eager, **fixed)(inside), want, 1e-4)


@pytest.mark.parametrize("row", SOFTMAX, ids=str)
def test_equal_logits_and_masked_classes(row):
    # Of several largest logits the first is the maximum of the row. A logit of -inf has no effect.
    logits = jnp.array([[2.0, 2.0, 2.0], [-jnp.inf, 1.0, 1.0], [0.0, -jnp.inf, -jnp.inf]])
    labels = jnp.asarray(row.labels_of([1, 2, 0], 3))
    fixed = {"labels": labels}
    got = gradients(row.eager, **fixed)({"logits": logits})
    with jax.enable_x64(True):
        wide = {"labels": np.asarray(labels)}
        finite = np.where(np.isfinite(logits), np.float64(logits), -600.0)
        assert_close(got, gradients(row.reference, **wide)({"logits": finite}), 1e-5)
