"""`compare_gradients` and the command line."""

import dataclasses
import functools
import importlib
import inspect
import io
import json
import math
import os
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from helpers import NOT_AN_OPTION, assert_errors_name

import focal_jax
from focal_jax import (
    InputError,
    catalogue,
    engine,
    reference,
    sigmoid_focal_loss,
    softmax_focal_loss,
    softmax_focal_loss_with_integer_labels,
)
from focal_jax.__main__ import main
from focal_jax.catalogue import LOSSES
from focal_jax.measure import command_line, compare, curves
from focal_jax.measure.compare import DTYPES, compare_gradients
from focal_jax.measure.evaluate import evaluate

pytestmark = pytest.mark.quick

FUNCTIONS = (sigmoid_focal_loss, softmax_focal_loss, softmax_focal_loss_with_integer_labels)
SIGMOID, SOFTMAX, INTEGER = NAMES = [function.__name__ for function in FUNCTIONS]
REGIMES = ("easy", "hard", "saturated")
PNG = b"\x89PNG\r\n"
# A small measurement for tests of the command line.
QUICK = ["compare", "--loss", SIGMOID, "--shape", "40", "--gamma", "0.5", "--repeats", "1"]


@functools.cache
def report_of(loss, **arguments):
    return compare_gradients(loss, **{"shape": (200, 6), "repeats": 1, **arguments})


def relative_errors(measurement):
    return [getattr(measurement, regime).relative for regime in REGIMES]


def count_not_finite(measurement):
    errors = [getattr(measurement, regime) for regime in REGIMES]
    return sum(error.nans + error.infinities for error in errors)


# ---------------------------------------------------------------- exact gradients


def mpmath_gradient(logits, label, weight, gamma):
    """Return the gradient of the softmax focal loss, derived by hand."""
    z = [mpmath.mpf(x) for x in logits]
    total = mpmath.fsum(mpmath.exp(x) for x in z)
    p = [mpmath.exp(x) / total for x in z]
    q = mpmath.fsum(x for j, x in enumerate(p) if j != label)
    slope = weight * (
        -(q**gamma) / p[label]
        + (gamma * q ** (mpmath.mpf(gamma) - 1) * mpmath.log(p[label]) if gamma else 0)
    )
    return [slope * p[label] * (q if j == label else -x) for j, x in enumerate(p)]


def test_exact_gradient_agrees_with_mpmath():
    rng = np.random.default_rng(3)
    margins = [-80, -40, -8, -2, -0.1, 0, 0.1, 2, 8, 18, 40, 80]
    logits, labels = rng.normal(size=(len(margins), 4)), rng.integers(4, size=len(margins))
    logits[np.arange(len(margins)), labels] = margins
    weights = np.array([0.25, 1, 2, 0.75])
    for gamma in (0, 0.5, 1, 1.5, 2, 5):
        with mpmath.workdps(100):
            expected = [mpmath_gradient(z, t, weights[t], gamma) for z, t in zip(logits, labels)]
            expected = np.array(expected, np.float64)
        options = {"alpha": tuple(weights), "gamma": gamma}
        got = compare._exact_gradient(LOSSES[INTEGER], (logits, labels), -1, options)
        np.testing.assert_allclose(got, expected, rtol=1e-15)


@pytest.mark.parametrize("name", [SOFTMAX, INTEGER])
def test_evaluate_multiplies_by_the_class_weight(name):
    rng = np.random.default_rng(0)
    logits, labels, alpha = rng.normal(size=(5, 3)), rng.integers(3, size=5), rng.uniform(size=3)
    one_hot = np.eye(3)[labels]
    arrays = {
        "logits": logits,
        "labels": one_hot if name == SOFTMAX else labels,
        "gamma": np.full(5, 1.5),
    }
    plain = evaluate(LOSSES[name], arrays)
    weighted = evaluate(LOSSES[name], arrays | {"alpha": np.broadcast_to(alpha, (5, 3))})

    def assert_equal(got, expected):
        np.testing.assert_allclose(got.astype(float), expected.astype(float), rtol=1e-14)

    weight = alpha[labels]
    assert_equal(weighted.losses, weight * plain.losses)
    assert_equal(weighted.slopes["alpha"], one_hot * plain.losses[:, None])
    assert_equal(weighted.slopes["logits"], weight[:, None] * plain.slopes["logits"])
    assert_equal(weighted.slopes["gamma"], weight * plain.slopes["gamma"])
    assert_equal(weighted.magnitudes["logits"], weight[:, None] * plain.magnitudes["logits"])


# ---------------------------------------------------------------- the report


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_jax_is_accurate_and_plain_jax_is_not(name, gamma):
    report = report_of(name, gamma=gamma, alpha=0.25)
    assert max(relative_errors(report.focal_jax)) < 1e-5
    assert count_not_finite(report.focal_jax) == 0
    assert report.plain_jax.easy.relative > 1e-5
    if gamma == 0.5:
        assert report.plain_jax.saturated.nans > 0
    else:  # 1 - p rounds to 0, so the gradient is 0
        assert report.plain_jax.saturated.relative == 1
        assert count_not_finite(report.plain_jax) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "dtype", "limit"),
    [(function, "float64", 1e-12) for function in FUNCTIONS]
    + [(sigmoid_focal_loss, "bfloat16", 2**-8), (sigmoid_focal_loss, "float16", 2**-11)],
)
def test_functions_and_dtypes(function, dtype, limit):
    report = report_of(function, dtype=dtype, gamma=1.5)
    assert (report.loss, report.dtype) == (function.__name__, dtype)
    assert 0 < max(relative_errors(report.focal_jax)) < limit
    assert count_not_finite(report.focal_jax) == 0


def test_float64_does_not_change_the_configuration():
    compare_gradients(SIGMOID, shape=(3,), dtype=jnp.float64, repeats=1)
    assert jnp.asarray(1.0).dtype == jnp.float32


@pytest.mark.parametrize("name", [SOFTMAX, INTEGER])
def test_axis_and_class_weights(name):
    report = report_of(name, shape=(5, 3, 40), axis=1, alpha=(0.5, 1.0, 3.0))
    assert report.axis == 1
    assert report.options == {"alpha": (0.5, 1.0, 3.0), "gamma": 2.0}
    assert max(relative_errors(report.focal_jax)) < 1e-5


def test_flags_are_options():
    report = report_of("varifocal_loss", shape=(50,), stop_weight_gradient=True)
    assert report.options == {"alpha": 0.75, "gamma": 2.0, "stop_weight_gradient": True}
    assert max(relative_errors(report.focal_jax)) < 1e-5
    assert "stop_weight_gradient" in report._repr_html_()


def test_underflow_is_not_an_error():
    report = report_of(SIGMOID, gamma=5.0)  # the smallest exact gradient is about exp(-480)
    assert report.focal_jax.saturated.relative < 1e-5


def test_equal_seeds_give_equal_reports():
    first, other = report_of(SIGMOID), report_of(SIGMOID, seed=1)
    again = compare_gradients(SIGMOID, shape=(200, 6), repeats=1)
    assert again.focal_jax.easy == first.focal_jax.easy
    assert other.focal_jax.easy != first.focal_jax.easy


def test_report_is_frozen_and_complete():
    report = report_of(SIGMOID)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.gamma = 1.0
    for measurement in (report.focal_jax, report.plain_jax):
        assert measurement.seconds > 0
        assert isinstance(measurement.temporary_bytes, int)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("shape", [(5000, 4), (4, 5000), (1, 4, 5000)])
def test_errors_are_measured_on_a_sample(shape):
    report = compare_gradients(INTEGER, shape=shape, axis=shape.index(4), repeats=1)
    assert math.prod(report.sample_shape) == 4 * 1024
    assert report.shape == shape
    assert max(relative_errors(report.focal_jax)) < 1e-5


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in NAMES])
def test_every_loss_of_the_catalogue(name):
    report = compare_gradients(name, shape=(20, 5), repeats=1)
    loss = LOSSES[name]
    assert set(report.options) == set(loss.options) - set(loss.masks)
    assert max(relative_errors(report.focal_jax)) < 1e-5
    assert count_not_finite(report.focal_jax) == 0


def test_progress_is_called_before_each_step():
    steps = []
    compare_gradients(SIGMOID, shape=(5000,), repeats=1, progress=steps.append)
    assert len(steps) == 3 + len(REGIMES)
    assert steps[-1] == "measure the time"


# ---------------------------------------------------------------- losses of focal_jax.engine


def cross_entropy_value(logit, label, scale):
    return scale * engine.cross_entropy(logit, label)


def cross_entropy_slopes(factor):
    """Return slopes that are right for the factor 1."""

    def slopes(logit, label, scale):
        in_logit = jax.nn.sigmoid(-jnp.where(label == 1, logit, -logit))
        in_logit = jnp.where(label == 1, -in_logit, in_logit)
        return factor * scale * in_logit, -scale * logit, engine.cross_entropy(logit, label)

    return slopes


def cross_entropy_formula(ops, logit, label, scale):
    return -scale * (label * ops.log_sigmoid(logit) + (1 - label) * ops.log_sigmoid(-logit))


def cross_entropy_loss(slopes=None):
    return engine.elementwise_loss(cross_entropy_value, slopes, scale=1.0)


def generalized_cross_entropy(terms, q):
    return -jnp.expm1(-q * terms.n) / q


def generalized_cross_entropy_slopes(terms, q):
    power = jnp.exp(-q * terms.n)
    return power, terms.n * power / q + jnp.expm1(-q * terms.n) / q**2


def generalized_cross_entropy_formula(ops, log_p, q):
    return (1 - ops.exp(q * log_p)) / q


@pytest.mark.parametrize("slopes", [None, cross_entropy_slopes(1)])
def test_elementwise_loss_with_formula(slopes):
    report = compare_gradients(
        cross_entropy_loss(slopes),
        formula=cross_entropy_formula,
        shape=(100,),
        repeats=1,
        scale=3.0,
    )
    assert report.loss == "cross_entropy_value"
    assert report.options == {"scale": 3.0}
    assert max(relative_errors(report.focal_jax)) < 1e-5
    assert max(relative_errors(report.plain_jax)) < 1e-5


def test_position_loss_with_formula():
    functions = generalized_cross_entropy, generalized_cross_entropy_slopes
    loss = engine.position_loss(*functions, q=engine.number(0.7, low=0, high=1))
    report = compare_gradients(
        loss,
        formula=generalized_cross_entropy_formula,
        shape=(3, 50),
        axis=0,
        repeats=1,
        alpha=(0.5, 1.0, 3.0),
    )
    assert report.options == {"alpha": (0.5, 1.0, 3.0), "q": 0.7}
    assert max(relative_errors(report.focal_jax)) < 1e-5
    assert report.plain_jax.hard.relative < 1e-4


def test_options_with_masks_flags_and_constant_weights():
    def value(logit, label, gamma, skip, constant):
        weight = jax.nn.sigmoid(logit) ** gamma
        weight = jax.lax.stop_gradient(weight) if constant else weight
        losses = weight * engine.cross_entropy(logit, label)
        return losses if skip is None else jnp.where(skip, 0, losses)

    def formula(ops, logit, label, gamma, skip, constant):
        weight = ops.sigmoid(logit) ** gamma
        weight = ops.stop_gradient(weight) if constant else weight
        losses = weight * cross_entropy_formula(ops, logit, label, 1)
        return losses if skip is None else ops.where(skip, 0, losses)

    declared = {"gamma": engine.exponent(2.0), "skip": engine.mask()}
    loss = engine.elementwise_loss(value, **declared, constant=engine.flag(False))
    for constant in (False, True):
        report = compare_gradients(loss, formula=formula, shape=(60,), repeats=1, constant=constant)
        assert report.options == {"gamma": 2.0, "constant": constant}
        assert max(relative_errors(report.focal_jax)) < 1e-5


def test_wrong_slopes_show_in_the_relative_error():
    loss = cross_entropy_loss(cross_entropy_slopes(1.5))
    report = compare_gradients(loss, formula=cross_entropy_formula, shape=(100,), repeats=1)
    assert relative_errors(report.focal_jax) == pytest.approx([0.5] * 3, rel=1e-5)
    assert max(relative_errors(report.plain_jax)) < 1e-5
    assert "5.0e-01" in report._repr_html_()


def test_wrong_value_shows_in_the_relative_error():
    loss = engine.position_loss(lambda terms, q: terms.n, q=0.7)  # cross entropy
    formula = generalized_cross_entropy_formula
    report = compare_gradients(loss, formula=formula, shape=(100, 4), repeats=1)
    assert report.focal_jax.hard.relative > 0.5
    assert report.plain_jax.hard.relative < 1e-4


@pytest.mark.parametrize(
    ("loss", "formula", "message"),
    [
        (
            cross_entropy_loss(),
            None,
            r"got None, wanted .* cross_entropy_value: formula\(ops, logit, label, scale\)",
        ),
        (
            engine.position_loss(generalized_cross_entropy, q=0.7),
            None,
            r"wanted the formula of generalized_cross_entropy: formula\(ops, log_p, q\)",
        ),
        (SIGMOID, cross_entropy_formula, f"formula: got a function, wanted None: {SIGMOID} has"),
        (
            cross_entropy_loss(),
            lambda ops, logit, label: logit,
            r"formula: got an unexpected keyword argument 'scale', wanted formula\(ops, logit,",
        ),
        (cross_entropy_loss(), 3, r"formula: 3 is not a callable object, wanted formula\("),
        (
            cross_entropy_loss(),
            lambda ops, logit, label, scale: ops.log_sigmoid(logit).sum(),
            r"formula: got .*shape \(\), wanted .*\(7,\)",
        ),
    ],
)
def test_invalid_formulas(loss, formula, message):
    with pytest.raises(focal_jax.InputError, match=message):
        compare_gradients(loss, formula=formula, shape=(7,), repeats=1)


# ---------------------------------------------------------------- errors of known size


def compare_with_scaled_loss(monkeypatch, factors):
    """Compare with plain JAX replaced by the sigmoid loss, whose entries are scaled."""

    def scaled(logits, labels, **options):
        return jnp.asarray(factors, jnp.float32) * sigmoid_focal_loss(logits, labels, **options)

    monkeypatch.setattr(reference, SIGMOID, scaled)
    return compare_gradients(SIGMOID, shape=(4,), gamma=0.0, repeats=1)


def test_size_of_an_error(monkeypatch):
    report = compare_with_scaled_loss(monkeypatch, [1, 1, 1.5, 1])
    for regime in REGIMES:
        error = getattr(report.plain_jax, regime)
        assert error.relative == pytest.approx(0.5, rel=1e-5)
        assert (error.nans, error.infinities) == (0, 0)
    # With gamma 0 the gradient is q, and q is above 1/4 in the hard regime.
    assert 0.125 < report.plain_jax.hard.absolute <= 0.5


def test_nans_and_infinities_are_counted(monkeypatch):
    factors = [math.nan, math.inf, math.nan, 1.25]
    error = compare_with_scaled_loss(monkeypatch, factors).plain_jax.hard
    assert (error.nans, error.infinities) == (2, 1)
    assert error.relative == pytest.approx(0.25, rel=1e-5)


def test_errors_are_nan_without_a_finite_entry(monkeypatch):
    error = compare_with_scaled_loss(monkeypatch, [math.nan] * 4).plain_jax.easy
    assert math.isnan(error.absolute)
    assert math.isnan(error.relative)
    assert error.nans == 4


@pytest.mark.parametrize(
    ("got", "exact", "expected"),
    [
        (0, 1e-50, 0),  # underflow
        (0, 1e-37, 0),  # a factor of a normal number may underflow
        (0, 1e-30, 1),
        (1e-30, 0, 1e-32 / np.finfo(np.float32).tiny),
        (-3, 2, 2.5),
    ],
)
def test_relative_error(got, exact, expected):
    value = jnp.float32(0), jnp.asarray([got], jnp.float32)
    error = compare._error(value, np.array([exact]))
    assert error.relative == pytest.approx(expected, rel=1e-6)
    assert error.absolute == pytest.approx(abs(got - exact), rel=1e-6)


def test_relative_error_of_entries_that_cancel():
    got, exact = jnp.array([[1e-3, 2.0], [3e-9, 1e-9]]), np.array([[2e-3, 2.0], [2e-9, 1e-9]])
    assert compare._error((jnp.float32(0), got), exact, 1).relative == pytest.approx(0.5)
    assert compare._error((jnp.float32(0), got), exact).relative == pytest.approx(0.5)
    assert compare._error((jnp.float32(0), got[:1]), exact[:1], 1).relative < 1e-3


def test_timed_calls_alternate(monkeypatch):
    clock, order = [0.0], []
    durations = {"a": iter([1, 9, 1, 1]), "b": iter([3, 3, 3, 0])}

    def call(name, case):
        order.append((name, case))
        clock[0] += next(durations[name])
        return jnp.zeros(())

    monkeypatch.setattr(compare.time, "perf_counter", lambda: clock[0])
    calls = [functools.partial(call, name) for name in "ab"]
    assert compare._median_seconds(calls, [("x",), ("y",)], repeats=2) == [1, 3]
    assert order == [("a", "x"), ("b", "x"), ("a", "y"), ("b", "y")] * 2


# ---------------------------------------------------------------- invalid arguments


@pytest.mark.parametrize(
    ("loss", "arguments", "message"),
    [
        ("focal", {}, "loss: got 'focal', wanted one of"),
        (jax.nn.softmax, {}, "loss: got .*, wanted one of"),
        (SIGMOID, {"shape": (3, 0)}, "shape: got 0"),
        (SIGMOID, {"shape": (3.0,)}, "shape: got 3.0"),
        (SIGMOID, {"seed": np.timedelta64(3)}, "seed: got"),
        (INTEGER, {"shape": (7, 1)}, "shape along the class axis: got 1"),
        (INTEGER, {"axis": 2}, "axis: got 2"),
        (INTEGER, {"shape": ()}, "axis: got -1"),
        (SIGMOID, {"gamma": -1.0}, "gamma: got -1"),
        (SIGMOID, {"gamma": "2"}, "gamma: got '2'"),
        (SIGMOID, {"gamma": None}, "gamma: got None"),
        (INTEGER, {"alpha": [0.5, 0.5]}, r"alpha: got shape \(2,\), wanted one number, or 21"),
        (SIGMOID, {"alpha": [0.5, 0.5]}, r"alpha: got shape \(2,\), wanted one number"),
        (SIGMOID, {"dtype": "int8"}, "dtype: got 'int8'"),
        (SIGMOID, {"dtype": "real"}, "dtype: got 'real'"),
        (SIGMOID, {"epsilon": 1.0}, r"epsilon: got an option that sigmoid_focal_loss does not"),
        (SIGMOID, {"shape": (10**6, 10**6)}, "shape: got 1,000,000,000,000 logits, which need"),
        ("linear_" + INTEGER, {"axis": 0}, "axis: got 0, wanted the last"),
        (SIGMOID, {"shape": 5}, "shape: got 5, wanted a sequence of integers"),
        (SIGMOID, {"alpha": 1j}, "alpha: got 1j, wanted one number"),
        (SIGMOID, {"dtype": None}, "dtype: got None"),
        (SIGMOID, {"seed": -1}, "seed: got -1"),
        (SIGMOID, {"repeats": 0}, "repeats: got 0"),
        ("varifocal_loss", {"stop_weight_gradient": 1}, "stop_weight_gradient: got 1"),
        ("varifocal_loss", {"positive": True}, "positive: got an option that varifocal_loss does"),
    ],
)
def test_invalid_arguments(loss, arguments, message):
    with pytest.raises(ValueError, match=message):
        compare_gradients(loss, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "invalid choice: 'train'"),
        (["compare", "--loss", "focal"], "loss: invalid choice: 'focal'; did you mean "),
        (["compare", "--loss", "sigmoid_focal_los"], "did you mean 'sigmoid_focal_loss'?"),
        (["compare", "--loss", "varifokal"], "did you mean 'varifocal_loss'?"),
        (["compare", "--loss", "sigmoid"], "did you mean 'sigmoid_focal_loss'?"),
        (["comapre"], "did you mean 'compare'?"),
        (["compare", "--gama-negative", "2"], "did you mean '--gamma-negative'?"),
        (
            ["compare", "--shape", "99999999", "999999"],
            "shape: got 99,999,899,000,001 logits, which",
        ),
        (["compare", "--gamma", "-1"], "gamma: got -1, wanted a finite number >= 0"),
        (["compare", "--gamma", "two"], "invalid float value: 'two'"),
        (["compare", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["compare", "--axis", "5"], "axis: got 5"),
        (["compare", "--alpha", ".5", ".5"], "alpha: got shape (2,)"),
        ([*QUICK, "--json", "/nowhere/report.json"], "/nowhere/report.json"),
        ([*QUICK, "--plot", "figure"], "--plot: got 'figure', wanted a name that ends with a form"),
        (["plot", "--out", "a.b/figure."], "--out: got 'a.b/figure.', wanted a name that ends"),
        (["plot", "--out", "figure.pgf"], "figure.pgf: got the format 'pgf', wanted one of"),
        ([*QUICK[:-1], "9" * 20], f"repeats: got {'9' * 20}, wanted at most 1000000"),
        (["plot", "--gamma", "-1"], "gamma: got [-1.0], wanted numbers in [0, 1000]"),
        (["plot", "--gamma", "1", "--family"], "not allowed with"),
        (
            ["plot", "--out", "figure.nonsense"],
            "figure.nonsense: got the format 'nonsense', wanted",
        ),
        (["plot", "--out", "/nowhere/figure.png"], "/nowhere/figure.png"),
    ],
)
def test_invalid_command_lines_exit_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


FILES = [
    ("--json", "/nowhere/report.json", "can be written: No such file or directory"),
    ("--json", "/proc/report.json", "can be written: No such file or directory"),
    ("--json", "/", "can be written: Is a directory"),
]
FILES += [
    ("--plot", "/nowhere/a.png", "can be written: No such file or directory"),
    ("--plot", "a.zip", "the format 'zip'"),
]


@pytest.mark.parametrize(("option", "path", "message"), FILES)
def test_files_are_checked_before_the_measurement(option, path, message, capsys, monkeypatch):
    monkeypatch.setattr(compare, "_cases", None)
    with pytest.raises(SystemExit) as stopped:
        main([*QUICK, option, path])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_encoding_without_the_characters_of_the_tables():
    command = [sys.executable, "-m", "focal_jax", *QUICK]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "float32 40, gamma 0.5" in done.stdout


def test_unknown_backend_is_one_line():
    command = [sys.executable, "-m", "focal_jax", "doctor"]
    environment = os.environ | {"JAX_PLATFORMS": "nothing"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(r"focal-jax: Unable to initialize backend 'nothing'.*\n", done.stderr)


def test_unknown_backend_of_matplotlib(tmp_path):
    command = [sys.executable, "-m", "focal_jax", "plot", "--out", str(tmp_path / "x.png")]
    environment = os.environ | {"MPLBACKEND": "nothing"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(r"focal-jax: .*backend: 'nothing' is not a valid value.*\n", done.stderr)


def test_compares_compiled_programs_where_jit_is_disabled():
    with jax.disable_jit():
        report = compare_gradients("sigmoid_focal_loss", shape=(8,), repeats=1)
    assert report.focal_jax.saturated.relative < 1e-5


def test_default_figure_is_checked_before_the_drawing(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "focal_loss.png").mkdir()
    monkeypatch.setattr(command_line, "_plot", None)
    with pytest.raises(SystemExit) as stopped:
        main(["plot"])
    assert stopped.value.code == 2
    assert "'focal_loss.png', wanted a file that can be written" in capsys.readouterr().err


def test_without_a_command_the_help_is_printed(capsys):
    main([])
    assert "COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt, 130, "focal-jax: interrupted\n"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB"), None, "use a smaller --shape"),
        (MemoryError("9 GB"), None, "use a smaller --shape"),
    ],
)
def test_interrupts_and_missing_memory_are_one_line(error, code, message, monkeypatch, capsys):
    def measure(*_):
        raise error

    monkeypatch.setattr(compare, "_cases", measure)
    with pytest.raises(SystemExit) as stopped:
        main(QUICK)
    assert code in (None, stopped.value.code)
    assert message in capsys.readouterr().err + str(stopped.value)


def test_arguments_of_any_type_are_used_or_an_error_that_names_them():
    arguments = {"loss": SIGMOID, "shape": (4,), "dtype": "float32", "seed": 0, "repeats": 1}
    arguments |= {"progress": None, "gamma": 2.0, "formula": None}
    invalid: dict = dict.fromkeys(arguments, (*NOT_AN_OPTION, True))
    for name in ("seed", "repeats"):  # a large integer is valid
        invalid[name] = [x for x in invalid[name] if type(x) is not int]
    invalid["shape"] = [x for x in invalid["shape"] if str(x) not in ("[1 2]", "()", "[]")]
    invalid["dtype"] = [x for x in invalid["dtype"] if not hasattr(x, "dtype")]
    invalid["dtype"] = [x for x in invalid["dtype"] if not isinstance(x, str | bytes)]
    invalid["progress"] = [x for x in invalid["progress"] if not callable(x)]
    invalid["gamma"] = NOT_AN_OPTION
    assert_errors_name(compare_gradients, arguments, invalid)


# ---------------------------------------------------------------- tables and summary


def test_compare_prints_tables(capsys):
    main(QUICK)
    printed = capsys.readouterr().out
    title = (SIGMOID, "float32 40, gamma 0.5")
    for part in (*title, *REGIMES, "focal_jax", "plain JAX", "MB", "ms", "fast"):
        assert part in " ".join(printed.split())


@pytest.mark.parametrize("width", [40, 50, 60])
def test_tables_fit_narrow_terminals(width):
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    report = report_of(INTEGER)
    console.print(report)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in text  # rich truncates with it
    for measured in (report.focal_jax, report.plain_jax):
        for regime in REGIMES:
            assert f"{getattr(measured, regime).relative:.1e}" in text


def test_notebook_shows_tables():
    shown = report_of(SIGMOID)._repr_html_()
    assert shown.count("<table>") == shown.count("</table>") == 2
    assert all(part in shown for part in (SIGMOID, *REGIMES, "focal_jax", "plain JAX"))


@pytest.mark.parametrize(("size", "seconds"), [(10, 2.0), (10**7, 2.0), (10, 0.5)])
def test_summary_names_the_faster_implementation(size, seconds):
    report = report_of(SIGMOID)
    report = dataclasses.replace(
        report,
        shape=(size,),
        focal_jax=dataclasses.replace(report.focal_jax, seconds=seconds),
        plain_jax=dataclasses.replace(report.plain_jax, seconds=1.0),
    )
    names = ("focal_jax", "plain JAX")
    slow, fast = names if seconds > 1 else names[::-1]
    assert report.summary.startswith(f"{fast} is 2.0 times as fast as {slow}.")
    assert ("try a larger shape" in report.summary) == (fast == "plain JAX" and size == 10)


def test_summary_ignores_small_differences():
    report = report_of(SIGMOID)
    plain = dataclasses.replace(report.focal_jax, seconds=1.04 * report.focal_jax.seconds)
    report = dataclasses.replace(report, plain_jax=plain)
    assert report.summary.startswith("focal_jax and plain JAX are about equally fast.")


# ---------------------------------------------------------------- the command line


def test_doctor_reports_correct_gradients(capsys, monkeypatch):
    monkeypatch.setattr(catalogue, "LOSSES", {SIGMOID: LOSSES[SIGMOID]})
    main(["doctor"])
    printed = capsys.readouterr().out
    for part in (jax.__version__, "cpu", "jax_enable_x64", SIGMOID, "All gradients are correct"):
        assert part in printed


def test_doctor_reports_wrong_gradients(capsys, monkeypatch):
    wrong = LOSSES[SIGMOID]._replace(function=getattr(reference, SIGMOID))
    monkeypatch.setattr(catalogue, "LOSSES", {SIGMOID: wrong})
    with pytest.raises(SystemExit, match=f"gradient is wrong on this device: {SIGMOID}"):
        main(["doctor"])
    assert "FAILED" in capsys.readouterr().out


def test_doctor_without_extras_checks_easy_and_hard_logits(capsys, monkeypatch):
    for module in ("mpmath", "rich", "rich.console", "rich.status", "rich.table", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    names = (SIGMOID, INTEGER, "varifocal_loss", "distribution_focal_loss")
    monkeypatch.setattr(catalogue, "LOSSES", {name: LOSSES[name] for name in names})
    main(["doctor"])
    printed = capsys.readouterr().out
    assert "Saturated logits are not checked: mpmath is missing; install it in" in printed
    assert "All gradients are correct" in printed
    wrong = LOSSES[SIGMOID]._replace(function=lambda z, y: sigmoid_focal_loss(z, y, gamma=2.001))
    monkeypatch.setattr(catalogue, "LOSSES", {SIGMOID: wrong})
    with pytest.raises(SystemExit, match=f"gradient is wrong on this device: {SIGMOID}"):
        main(["doctor"])


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == f"focal_jax {focal_jax.__version__}"


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("command", [[], ["compare"], ["plot"], ["doctor"]])
def test_help(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: focal-jax" in printed
    for line in printed.partition("losses, with")[2].splitlines()[1:]:
        assert len(line) <= columns or line.strip() in LOSSES
    if command in ([], ["compare"]):
        for name, loss in LOSSES.items():
            entry = printed.partition(f"\n  {name}\n")[2].partition("\n  ")[0]
            text = " ".join(printed.partition(f"\n  {name}\n")[2].split())
            assert text.startswith(inspect.getdoc(loss.function).partition("\n")[0]), entry
            for option, declared in loss.options.items():
                wanted = f"{option}={declared.default}"
                assert (wanted in text) == (declared.kind != "mask"), wanted


def test_help_states_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    parameters = inspect.signature(compare_gradients).parameters
    for name in ("loss", "shape", "axis", "dtype", "seed", "repeats"):
        default = str(parameters[name].default).translate(str.maketrans("", "", "(),"))
        assert re.search(rf"--{name} [^-]*.*?\(default: {re.escape(default)}\)", text), name
    assert ",".join(DTYPES) in text.replace(" ", "")
    with pytest.raises(SystemExit):
        main(["plot", "--help"])
    gammas = " ".join(f"{gamma:g}" for gamma in curves.GAMMAS)
    assert f"(default: {gammas})" in " ".join(capsys.readouterr().out.split())


def test_options_are_those_of_the_losses(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    listed = capsys.readouterr().out.partition("options of a loss:")[2].partition("examples:")[0]
    declared = {
        f"--{name.replace('_', '-')}"
        for loss in LOSSES.values()
        for name, option in loss.options.items()
        if option.kind != "mask"
    }
    assert set(re.findall(r"--[\w-]+", listed)) == declared


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["compare", "--help"], []])
def test_help_does_not_import_jax(arguments):
    # JAX takes one to two seconds to import.
    code = f"import sys; from focal_jax.__main__ import main; main({arguments})"
    done = run("-X", "importtime", "-c", code)
    assert done.returncode == 0
    imported = set(re.findall(r"\|\s+(\S+)$", done.stderr, re.MULTILINE))
    assert "focal_jax.__main__" in imported
    assert not imported & {"jax", "numpy", "chex", "flax", "optax", "rich", "mpmath", "matplotlib"}
    total = re.findall(r"\|\s+(\d+) \|\s+focal_jax.__main__$", done.stderr, re.MULTILINE)
    assert int(total[0]) < 300_000  # microseconds


def test_interrupt_during_the_import_of_jax_is_one_line(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "focal-jax: interrupted\n"


def test_interrupt_of_the_program_is_one_line():
    command = [sys.executable, "-m", "focal_jax", "doctor"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **streams) as program:
        while " passed " not in program.stdout.readline():
            assert program.poll() is None
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=60)
    assert program.returncode == 130
    assert errors == "focal-jax: interrupted\n"


def test_colours_are_off_without_a_terminal_and_with_no_color(monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    main(QUICK)
    assert "\x1b" not in capsys.readouterr().out


def test_json_has_the_fields_of_the_report(capsys):
    main([*QUICK, "--json"])
    printed = json.loads(capsys.readouterr().out)
    report = dataclasses.asdict(report_of(SIGMOID, shape=(40,), gamma=0.5))
    assert printed["shape"] == [40]
    assert printed.keys() == report.keys()
    for name in ("focal_jax", "plain_jax"):
        for regime in REGIMES:
            assert printed[name][regime] == report[name][regime]


def test_command_line_takes_flags(capsys):
    arguments = ["--loss", "varifocal_loss", "--stop-weight-gradient", "--json"]
    main([*QUICK, *arguments])
    assert json.loads(capsys.readouterr().out)["options"]["stop_weight_gradient"] is True


def test_files_and_missing_numbers(tmp_path, monkeypatch, capsys):
    compiled = compare._compile

    class WithoutMemoryAnalysis:
        """A compiled function of a backend that does not report its memory."""

        def __init__(self, *args):
            self.call = compiled(*args)

        def __call__(self, *args):
            return self.call(*args)

        def memory_analysis(self):
            return None

    monkeypatch.setattr(compare, "_compile", WithoutMemoryAnalysis)
    monkeypatch.setattr(reference, SIGMOID, lambda logits, labels, **_: logits * jnp.nan)
    main([*QUICK, "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")])
    printed = capsys.readouterr().out
    assert "unknown" in printed
    assert "undefined" in printed
    report = json.loads(
        (tmp_path / "r.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert report["plain_jax"]["hard"] == {
        "absolute": None,
        "relative": None,
        "nans": 40,
        "infinities": 0,
    }
    assert report["focal_jax"]["temporary_bytes"] is None
    assert (tmp_path / "r.png").read_bytes().startswith(PNG)


def test_plot_draws_the_focal_loss(tmp_path, monkeypatch):
    import matplotlib.figure

    drawn = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda figure, path: (drawn.append(figure), save(figure, path)),
    )
    main(["plot", "--out", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)
    losses, gradients = drawn[0].axes
    gammas = [0, 0.5, 1, 2, 5]
    assert len(losses.lines) == len(gradients.lines) == len(gammas)
    for gamma, loss, gradient in zip(gammas, losses.lines, gradients.lines):
        p_t, drawn_loss = np.asarray(loss.get_data(), np.float64)
        expected = (1 - p_t) ** gamma * -np.log(p_t)
        np.testing.assert_allclose(drawn_loss, expected, rtol=1e-3, atol=1e-6)
        # The chain rule: d p_t / d logit = p_t (1 - p_t).
        slope = np.gradient(expected, p_t, edge_order=2)[5:-5]
        _, drawn_slope = np.asarray(gradient.get_data(), np.float64)[:, 5:-5]
        p_t = p_t[5:-5]
        np.testing.assert_allclose(drawn_slope, -slope * p_t * (1 - p_t), atol=0.02)


@pytest.mark.slow
def test_plot_draws_other_exponents_and_every_loss(monkeypatch):
    drawn = []
    monkeypatch.setattr(command_line, "_save", lambda figure, path: drawn.append(figure))
    main(["plot", "--gamma", "0.7", "3"])
    main(["plot", "--family"])
    exponents, family = drawn
    assert [line.get_label() for line in exponents.axes[0].lines] == [
        r"$\gamma$ = 0.7",
        r"$\gamma$ = 3",
    ]
    titles = [panel.get_title(loc="left").replace("\n", "_") for panel in family.axes]
    assert titles == list(LOSSES)
    for loss, panel in zip(LOSSES.values(), family.axes):
        values, gradient = panel.lines[:2]
        x, y = np.asarray(values.get_data(), np.float64)
        error = np.abs(np.gradient(y, x) - gradient.get_ydata())
        # The 95th percentile excludes jumps. A constant weight has no slope.
        assert loss.stop_gradient_weight or np.quantile(error, 0.95) < 0.01, loss.name


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("rich.table", QUICK),
        ("mpmath", QUICK),
        ("matplotlib.figure", [*QUICK, "--plot", "figure.png"]),
        ("matplotlib.figure", ["plot"]),
    ],
)
def test_missing_modules_are_named(module, arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=r"pip install '\.\[benchmarks\]'"):
        main(arguments)


def test_json_needs_neither_rich_nor_matplotlib(monkeypatch, capsys):
    modules = ("rich", "rich.console", "rich.status", "rich.table")
    for module in (*modules, "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    main([*QUICK, "--json"])
    assert json.loads(capsys.readouterr().out)["loss"] == SIGMOID


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_module_runs():
    done = run("-m", "focal_jax", "compare", "--gamma", "-1")
    assert done.returncode == 2
    assert "gamma: got -1" in done.stderr
    assert "Traceback" not in done.stderr


def test_measure_imports_neither_rich_nor_matplotlib_nor_mpmath():
    heavy = "{'rich', 'matplotlib', 'mpmath'}"
    code = f"import sys, focal_jax.measure.compare; print({heavy} & sys.modules.keys())"
    assert run("-c", code).stdout.strip() == "set()"


def test_dtypes_are_floating():
    assert all(jnp.issubdtype(jnp.dtype(name), jnp.floating) for name in DTYPES)


def test_formula_with_a_constant():
    loss = engine.elementwise_loss(lambda z, y: jnp.log(2.0) * engine.cross_entropy(z, y))

    def formula(ops, z, y):
        return ops.log(2.0) * cross_entropy_formula(ops, z, y, 1) + 0 * ops.stop_gradient(1)

    report = compare_gradients(loss, formula=formula, shape=(20,), repeats=1)
    assert report.focal_jax.saturated.relative < 1e-5


@pytest.mark.parametrize(
    "formula",
    [
        lambda ops, z, y: None,
        lambda ops, z, y: "a",
        lambda ops, z, y: [z],
        lambda ops, z, y: 1j * z,
        lambda ops, z, y: jnp.exp(z),  # not a function of ops
    ],
)
def test_formula_that_returns_no_array_of_numbers(formula):
    loss = engine.elementwise_loss(engine.cross_entropy)
    with pytest.raises(InputError, match=r"formula: got .*, wanted an array, computed by"):
        compare_gradients(loss, formula=formula, shape=(7,), repeats=1)


@pytest.mark.parametrize("margin", [60.0, 174.0, 700.0])
def test_digits_of_a_linear_loss_follow_its_logits(margin):
    arrays = {
        "features": np.ones((1, 2)),
        "kernel": np.array([[[margin, 0.0], [0.0, 0.0]]]),
        "labels": np.array([0]),
        "gamma": np.array([2.0]),
    }
    found = evaluate(LOSSES["linear_" + INTEGER], arrays).losses[0]
    with mpmath.workdps(400):
        e = mpmath.exp(-margin)
        want = (e / (1 + e)) ** 2 * mpmath.log1p(e)
        assert abs(found / want - 1) < 1e-30
