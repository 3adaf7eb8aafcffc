"""The comparison of gradients: its numbers are true, and the command line shows them."""

import dataclasses
import functools
import io
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import focal_jax
import focal_jax.__main__
from focal_jax import (
    _catalogue,
    _compare,
    reference,
    sigmoid_focal_loss,
    softmax_focal_loss,
    softmax_focal_loss_with_integer_labels,
)
from focal_jax.__main__ import main
from focal_jax._catalogue import LOSSES as CATALOGUE
from focal_jax._compare import DTYPES, NAMES, compare_gradients

LOSSES = (sigmoid_focal_loss, softmax_focal_loss, softmax_focal_loss_with_integer_labels)
SIGMOID, SOFTMAX, INTEGER = HEADS = [loss.__name__ for loss in LOSSES]
REGIMES = ("easy", "hard", "saturated")
PNG = b"\x89PNG\r\n"
# What the command line measures here: little.
QUICK = ["compare", "--loss", SIGMOID, "--shape", "40", "--gamma", "0.5", "--repeats", "1"]


@functools.cache
def compare(head, **options):
    return compare_gradients(head, **{"shape": (200, 6), "repeats": 1, **options})


def relative(measured):
    return {regime: getattr(measured, regime).relative for regime in REGIMES}


def not_finite(measured):
    found = [getattr(measured, regime) for regime in REGIMES]
    return sum(error.nans + error.infinities for error in found)


# ---------------------------------------------------------------- the truth


def mpmath_gradient(logits, label, weight, gamma):
    z = [mpmath.mpf(x) for x in logits]
    total = mpmath.fsum(mpmath.exp(x) for x in z)
    p = [mpmath.exp(x) / total for x in z]
    q = mpmath.fsum(x for j, x in enumerate(p) if j != label)
    slope = weight * (
        -(q**gamma) / p[label]
        + (gamma * q ** (mpmath.mpf(gamma) - 1) * mpmath.log(p[label]) if gamma else 0)
    )
    return [slope * p[label] * (q if j == label else -x) for j, x in enumerate(p)]


def test_the_truth_is_that_of_mpmath():
    rng = np.random.default_rng(3)
    margins = [-80, -40, -8, -2, -0.1, 0, 0.1, 2, 8, 18, 40, 80]
    logits, labels = rng.normal(size=(len(margins), 4)), rng.integers(4, size=len(margins))
    logits[np.arange(len(margins)), labels] = margins
    weights = np.array([0.25, 1, 2, 0.75])
    loss = next(loss for loss in CATALOGUE if loss.name == INTEGER)
    for gamma in (0, 0.5, 1, 1.5, 2, 5):
        with mpmath.workdps(100):
            expected = [mpmath_gradient(z, t, weights[t], gamma) for z, t in zip(logits, labels)]
            expected = np.array(expected, np.float64)
        case = _compare._Case(logits, labels)
        got = _compare._truth(loss, case, -1, {"alpha": tuple(weights), "gamma": gamma})
        np.testing.assert_allclose(got, expected, rtol=1e-15)


# ---------------------------------------------------------------- what is reported


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_custom_gradients_are_exact_and_autodiff_is_not(head, gamma):
    report = compare(head, gamma=gamma, alpha=0.25)
    assert max(relative(report.custom).values()) < 1e-5
    assert not_finite(report.custom) == 0
    assert report.autodiff.easy.relative > 1e-5
    if gamma == 0.5:
        assert report.autodiff.saturated.nans > 0
    else:  # 1 - p is 0: finite, and no digit of it right
        assert report.autodiff.saturated.relative == 1
        assert not_finite(report.autodiff) == 0


@pytest.mark.parametrize(
    ("loss", "dtype", "limit"),
    [(loss, "float64", 1e-12) for loss in LOSSES]
    + [(sigmoid_focal_loss, "bfloat16", 2**-8), (sigmoid_focal_loss, "float16", 2**-11)],
)
def test_functions_and_dtypes(loss, dtype, limit):
    report = compare(loss, dtype=dtype, gamma=1.5)
    assert (report.loss, report.dtype) == (loss.__name__, dtype)
    assert 0 < max(relative(report.custom).values()) < limit
    assert not_finite(report.custom) == 0


def test_a_float64_comparison_leaves_the_configuration_alone():
    compare_gradients(SIGMOID, shape=(3,), dtype=jnp.float64, repeats=1)
    assert jnp.asarray(1.0).dtype == jnp.float32


@pytest.mark.parametrize("head", [SOFTMAX, INTEGER])
def test_axis_and_class_weights(head):
    report = compare(head, shape=(5, 3, 40), axis=1, alpha=(0.5, 1.0, 3.0))
    assert report.axis == 1
    assert report.options == {"alpha": (0.5, 1.0, 3.0), "gamma": 2.0}
    assert max(relative(report.custom).values()) < 1e-5


def test_a_vanished_gradient_is_no_error():
    report = compare(SIGMOID, gamma=5.0)  # down to exp(-480)
    assert report.custom.saturated.relative < 1e-5


def test_the_seed_decides():
    one, other = compare(SIGMOID), compare(SIGMOID, seed=1)
    assert compare_gradients(SIGMOID, shape=(200, 6), repeats=1).custom.easy == one.custom.easy
    assert other.custom.easy != one.custom.easy


def test_the_report_is_frozen_and_complete():
    report = compare(SIGMOID)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.gamma = 1.0
    for measured in (report.custom, report.autodiff):
        assert measured.seconds > 0
        assert isinstance(measured.temporary_bytes, int)


# ---------------------------------------------------------------- planted errors


def plant(monkeypatch, factors):
    """Make "autodiff" the exact sigmoid loss, its elements multiplied by `factors`."""

    def planted(logits, labels, **options):
        return jnp.asarray(factors, jnp.float32) * sigmoid_focal_loss(logits, labels, **options)

    monkeypatch.setattr(reference, SIGMOID, planted)
    return compare_gradients(SIGMOID, shape=(4,), gamma=0.0, repeats=1)


def test_a_planted_error_is_reported_in_its_size(monkeypatch):
    report = plant(monkeypatch, [1, 1, 1.5, 1])
    for regime in REGIMES:
        error = getattr(report.autodiff, regime)
        assert error.relative == pytest.approx(0.5, rel=1e-5)
        assert (error.nans, error.infinities) == (0, 0)
    # At gamma 0 the gradient is q, and q is above 1/4 in the hard regime.
    assert 0.125 < report.autodiff.hard.absolute <= 0.5


def test_planted_nans_and_infinities_are_counted(monkeypatch):
    error = plant(monkeypatch, [math.nan, math.inf, math.nan, 1.25]).autodiff.hard
    assert (error.nans, error.infinities) == (2, 1)
    assert error.relative == pytest.approx(0.25, rel=1e-5)


def test_without_a_finite_gradient_there_is_no_difference(monkeypatch):
    error = plant(monkeypatch, [math.nan] * 4).autodiff.easy
    assert math.isnan(error.absolute)
    assert math.isnan(error.relative)
    assert error.nans == 4


@pytest.mark.parametrize(
    ("got", "truth", "expected"),
    [
        (0, 1e-50, 0),  # underflow
        (0, 1e-37, 0),  # near the smallest normal number, as a factor of it may be below
        (0, 1e-30, 1),
        (1e-30, 0, 1e-32 / np.finfo(np.float32).tiny),
        (-3, 2, 2.5),
    ],
)
def test_relative_difference(got, truth, expected):
    value = jnp.float32(0), jnp.asarray([got], jnp.float32)
    error = _compare._error(value, np.array([truth]))
    assert error.relative == pytest.approx(expected, rel=1e-6)
    assert error.absolute == pytest.approx(abs(got - truth), rel=1e-6)


def test_calls_are_timed_in_turns(monkeypatch):
    clock, order = [0.0], []
    durations = {"a": iter([1, 9, 1, 1]), "b": iter([3, 3, 3, 0])}

    def call(name, case):
        order.append((name, case))
        clock[0] += next(durations[name])
        return jnp.zeros(())

    monkeypatch.setattr(_compare.time, "perf_counter", lambda: clock[0])
    calls = [functools.partial(call, name) for name in "ab"]
    assert _compare._seconds(calls, [("x",), ("y",)], repeats=2) == [1, 3]
    assert order == [("a", "x"), ("b", "x"), ("a", "y"), ("b", "y")] * 2


# ---------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        ("focal", {}, "loss: got 'focal', wanted one of"),
        (jax.nn.softmax, {}, "loss: got .*, wanted one of"),
        (SIGMOID, {"shape": (3, 0)}, "shape: got 0"),
        (SIGMOID, {"shape": (3.0,)}, "shape: got 3.0"),
        (INTEGER, {"shape": (7, 1)}, "shape along the class axis: got 1"),
        (INTEGER, {"axis": 2}, "axis: got 2"),
        (INTEGER, {"shape": ()}, "axis: got -1"),
        (SIGMOID, {"gamma": -1.0}, "gamma: got -1.0"),
        (SIGMOID, {"gamma": "2"}, "gamma: got '2'"),
        (INTEGER, {"alpha": [0.5, 0.5]}, r"alpha: got shape \(2,\)"),
        (SIGMOID, {"alpha": [0.5, 0.5]}, r"alpha: got \[0.5, 0.5\]"),
        (SIGMOID, {"dtype": "int8"}, "dtype: got 'int8'"),
        (SIGMOID, {"dtype": "real"}, "dtype: got 'real'"),
        (SIGMOID, {"epsilon": 1.0}, r"epsilon: got an option that sigmoid_focal_loss does not"),
        (SIGMOID, {"shape": (10**6, 10**6)}, "shape: got 1,000,000,000,000 logits, for which"),
        ("linear_" + INTEGER, {"axis": 0}, "axis: got 0, wanted the last"),
        (SIGMOID, {"shape": 5}, "shape: got 5, wanted several integers"),
        (SIGMOID, {"alpha": 1j}, "alpha: got dtype complex64, wanted real"),
        (SIGMOID, {"dtype": None}, "dtype: got None"),
        (SIGMOID, {"seed": -1}, "seed: got -1"),
        (SIGMOID, {"repeats": 0}, "repeats: got 0"),
    ],
)
def test_bad_arguments(head, options, message):
    with pytest.raises(ValueError, match=message):
        compare_gradients(head, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["compare", "--loss", "focal"], "--loss: got 'focal', wanted one of: sigmoid_focal_loss,"),
        (["compare", "--gamma", "-1"], "gamma: got -1.0, wanted a finite number >= 0"),
        (["compare", "--gamma", "two"], "invalid float value: 'two'"),
        (["compare", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["compare", "--axis", "5"], "axis: got 5"),
        (["compare", "--alpha", ".5", ".5"], "alpha: got shape (2,)"),
        ([*QUICK, "--json", "/nowhere/report.json"], "/nowhere/report.json"),
        ([*QUICK, "--plot", "figure"], "--plot: got 'figure', wanted a name that ends as a format"),
        (["plot", "--out", "a.b/figure."], "--out: got 'a.b/figure.', wanted a name that ends"),
        (["plot", "--gamma", "-1"], "gamma: got [-1.0], wanted finite numbers >= 0"),
        (["plot", "--gamma", "1", "--family"], "not allowed with"),
        (["plot", "--out", "figure.nonsense"], "figure.nonsense: Format 'nonsense'"),
        (["plot", "--out", "/nowhere/figure.png"], "/nowhere/figure.png"),
    ],
)
def test_bad_command_lines_end_with_a_message_and_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


# ---------------------------------------------------------------- the command line


def test_table(capsys):
    main(QUICK)
    shown = capsys.readouterr().out
    question = (SIGMOID, "float32 40, gamma 0.5")
    for part in (*question, *REGIMES, "custom", "autodiff", "MB", "ms", "as fast"):
        assert part in shown


def test_tables_fit_sixty_columns():
    from rich.console import Console

    console = Console(width=60, record=True, file=io.StringIO())
    console.print(compare(INTEGER))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 60
    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)  # nothing is cut


def test_a_notebook_shows_tables():
    shown = compare(SIGMOID)._repr_html_()
    assert shown.count("<table>") == shown.count("</table>") == 2
    assert all(part in shown for part in (SIGMOID, *REGIMES, "custom", "autodiff"))


@pytest.mark.parametrize(("size", "seconds"), [(10, 2.0), (10**7, 2.0), (10, 0.5)])
def test_the_verdict_names_the_faster_and_why(size, seconds):
    report = compare(SIGMOID)
    plain = dataclasses.replace(report.autodiff, seconds=1.0)
    report = dataclasses.replace(
        report,
        shape=(size,),
        custom=dataclasses.replace(report.custom, seconds=seconds),
        autodiff=plain,
    )
    winner = "autodiff" if seconds > 1 else "custom"
    assert report.verdict.startswith(f"The {winner} gradient is 2.0 times as fast.")
    assert ("try a larger shape" in report.verdict) == (winner == "autodiff" and size == 10)


def test_the_verdict_makes_nothing_of_little():
    report = compare(SIGMOID)
    plain = dataclasses.replace(report.custom, seconds=1.04 * report.custom.seconds)
    same = dataclasses.replace(report, autodiff=plain)
    assert same.verdict.startswith("The two gradients are about as fast.")


def test_progress_is_said_before_each_step():
    said = []
    compare_gradients(SIGMOID, shape=(5000,), repeats=1, progress=said.append)
    assert len(said) == _compare.STEPS
    assert said[-1] == "timing"


@pytest.mark.parametrize("shape", [(5000, 4), (4, 5000), (1, 4, 5000)])
def test_of_many_positions_some_are_held_against_the_truth(shape):
    report = compare_gradients(INTEGER, shape=shape, axis=shape.index(4), repeats=1)
    assert math.prod(report.held_against_the_truth) == 4 * 1024
    assert report.shape == shape
    assert max(relative(report.custom).values()) < 1e-5


@pytest.mark.parametrize("name", [name for name in NAMES if name not in HEADS])
def test_every_loss_of_the_catalogue(name):
    report = compare_gradients(name, shape=(20, 5), repeats=1)
    entry = next(loss for loss in CATALOGUE if loss.name == name)
    assert set(report.options) == set(entry.options)
    if entry.kind in ("interval", "region"):  # the entries of their gradients may cancel
        assert max(getattr(report.custom, r).absolute for r in REGIMES) < 1e-6
    else:
        assert max(relative(report.custom).values()) < 1e-5
    assert not_finite(report.custom) == 0


def test_doctor_finds_the_gradients_right(capsys, monkeypatch):
    monkeypatch.setattr(_catalogue, "LOSSES", CATALOGUE[:1])
    main(["doctor"])
    shown = capsys.readouterr().out
    for part in (jax.__version__, "cpu", "64-bit numbers", SIGMOID, "All gradients are right"):
        assert part in shown


def test_doctor_finds_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(_catalogue, "LOSSES", CATALOGUE[:1])
    monkeypatch.setattr(_compare, "function_of", lambda name: getattr(reference, name))
    with pytest.raises(SystemExit, match=f"not right on this machine: {SIGMOID}"):
        main(["doctor"])
    assert "WRONG" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == f"focal_jax {focal_jax.__version__}"


def test_json_says_what_the_function_says(capsys):
    main([*QUICK, "--json"])
    shown = json.loads(capsys.readouterr().out)
    report = dataclasses.asdict(compare(SIGMOID, shape=(40,), gamma=0.5))
    assert shown["shape"] == [40]
    assert shown.keys() == report.keys()
    for name in ("custom", "autodiff"):
        for regime in REGIMES:
            assert shown[name][regime] == report[name][regime]


def test_files_and_absent_numbers(tmp_path, monkeypatch, capsys):
    compiled = _compare._compile

    class Silent:
        """A compiled function of a backend that does not tell its memory."""

        def __init__(self, *args):
            self.call = compiled(*args)

        def __call__(self, *args):
            return self.call(*args)

        def memory_analysis(self):
            return None

    monkeypatch.setattr(_compare, "_compile", Silent)
    monkeypatch.setattr(reference, SIGMOID, lambda logits, labels, **_: logits * jnp.nan)
    main([*QUICK, "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")])
    shown = capsys.readouterr().out
    assert "not known" in shown
    assert "none finite" in shown
    report = json.loads(
        (tmp_path / "r.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert report["autodiff"]["hard"] == {
        "absolute": None,
        "relative": None,
        "nans": 40,
        "infinities": 0,
    }
    assert report["custom"]["temporary_bytes"] is None
    assert (tmp_path / "r.png").read_bytes().startswith(PNG)


def test_plot_draws_the_curves_of_the_paper(tmp_path, monkeypatch):
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
        # By the logit: d p_t / d logit = p_t (1 - p_t).
        slope = np.gradient(expected, p_t, edge_order=2)[5:-5]
        _, drawn_slope = np.asarray(gradient.get_data(), np.float64)[:, 5:-5]
        p_t = p_t[5:-5]
        np.testing.assert_allclose(drawn_slope, -slope * p_t * (1 - p_t), atol=0.02)


def test_plot_draws_other_exponents_and_the_family(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(focal_jax.__main__, "_save", lambda figure, path: drawn.append(figure))
    main(["plot", "--gamma", "0.7", "3"])
    main(["plot", "--family"])
    exponents, family = drawn
    assert [line.get_label() for line in exponents.axes[0].lines] == [
        r"$\gamma$ = 0.7",
        r"$\gamma$ = 3",
    ]
    titles = [panel.get_title(loc="left").replace("\n", "_") for panel in family.axes]
    assert titles == [loss.name for loss in CATALOGUE]
    for entry, panel in zip(CATALOGUE, family.axes):
        loss, gradient = panel.lines[:2]
        x, y = np.asarray(loss.get_data(), np.float64)
        off = np.abs(np.gradient(y, x) - gradient.get_ydata())
        # Jumps apart, a gradient is the slope of its loss, if no weight of it is held.
        assert entry.held or np.quantile(off, 0.95) < 0.01, entry.name


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("rich.table", QUICK),
        ("mpmath", QUICK),
        ("matplotlib.figure", [*QUICK, "--plot", "figure.png"]),
        ("matplotlib.figure", ["plot"]),
    ],
)
def test_a_missing_extra_is_named(module, arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=r'pip install "focal_jax\[benchmarks\]"'):
        main(arguments)


def test_json_needs_no_presentation(monkeypatch, capsys):
    for module in ("rich", "rich.table", "rich.progress", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    main([*QUICK, "--json"])
    assert json.loads(capsys.readouterr().out)["loss"] == SIGMOID


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_module_runs():
    done = run("-m", "focal_jax", "compare", "--gamma", "-1")
    assert done.returncode == 2
    assert "gamma: got -1.0" in done.stderr
    assert "Traceback" not in done.stderr


def test_measuring_imports_no_presentation():
    code = "import sys, focal_jax._compare; print({'rich', 'matplotlib'} & sys.modules.keys())"
    assert run("-c", code).stdout.strip() == "set()"


def test_every_dtype_is_known():
    assert all(jnp.issubdtype(jnp.dtype(name), jnp.floating) for name in DTYPES)
