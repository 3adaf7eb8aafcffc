"""Tests of the examples: they train, and they write their tables and figures."""

import gzip
import importlib
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from figure_checks import saved_figures_are_checked
from pages import code_blocks, jax_defaults

from examples import (
    calibration,
    common,
    imbalanced_data,
    many_labels,
    three_lines,
    training_race,
)
from focal_jax import sigmoid_focal_loss

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
PHONE = (
    1060  # the width of a figure with 200 dots per inch, whose text is 10 pixels high on a phone
)


@pytest.fixture(autouse=True, scope="module")
def _readable_figures():
    with saved_figures_are_checked():
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    main = runpy.run_path(str(EXAMPLES / "imbalanced_digits.py"))["main"]
    # Adam of optax needs the standard dtype promotion.
    with jax.numpy_dtype_promotion("standard"):
        return main(["--seeds=2", "--rounds=3", "--steps=15", f"--out={out}"]), out


def test_imbalanced_digits_trains_with_every_loss(digits):
    results, _ = digits
    assert len(results) == 4
    for result in results.values():
        loss = result["curves"]["loss"]
        assert loss.shape == (3, 2)
        assert (loss[-1] < 0.7 * loss[0]).all()
        assert (result["macro_f1"] > 0.15).all()


def test_imbalanced_digits_reports_valid_metrics(digits):
    for result in digits[0].values():
        assert result["recall"].shape == (2, 10)
        for measure in ("recall", "macro_f1", "ece"):
            assert ((result[measure] >= 0) & (result[measure] <= 1)).all()
        np.testing.assert_allclose(result["probabilities"].sum(-1), 1, rtol=1e-5)
        np.testing.assert_array_equal(result["macro_f1"], result["curves"]["macro_f1"][-1])


def test_imbalanced_digits_writes_figures(digits):
    for name in ("curves.png", "reliability.png"):
        height, width, _ = plt.imread(digits[1] / name).shape
        assert height > 400
        assert 1000 < width <= PHONE


def test_imbalanced_digits_calibration_error_of_known_predictions():
    calibration_error = runpy.run_path(str(EXAMPLES / "imbalanced_digits.py"))["calibration_error"]
    confident = np.array([[0.75, 0.25]] * 4 + [[0.05, 0.95]] * 4)
    # 3 of 4 are correct at confidence 0.75: error 0. 2 of 4 are correct at 0.95: 0.45.
    labels = np.array([0, 0, 0, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(calibration_error(labels, confident), 0.225)


# ---------------------------------------------------------------- calibration


def test_calibration_measures_before_and_after_temperature_scaling(tmp_path):
    options = ["--seeds=2", "--steps=600", "--images=100", f"--out={tmp_path}"]
    with jax.numpy_dtype_promotion("standard"):  # for optax's adam
        results = calibration.main(options)
    assert list(results) == list(calibration.LOSSES)
    for result in results.values():
        assert all(values.shape == (2,) for values in result.values())
        assert (result["train error"] < 0.02).all()
        assert (result["NLL, scaled"] <= result["NLL"] + 0.05).all()
    # The focal loss gives better calibrated predictions.
    assert results["focal, gamma 3"]["ECE"].mean() < results["cross entropy"]["ECE"].mean()
    height, width, _ = plt.imread(tmp_path / "reliability.png").shape
    assert height > 800
    assert 1000 < width <= PHONE


def test_fitted_temperature_of_scaled_logits():
    random = np.random.default_rng(0)
    calibrated = 3 * random.normal(size=(20_000, calibration.CLASSES)).astype(np.float32)
    labels = (calibrated + random.gumbel(size=calibrated.shape)).argmax(-1).astype(np.int32)
    temperature = calibration.fitted_temperature(labels, 4 * calibrated)
    np.testing.assert_allclose(temperature, 4, rtol=0.06)
    assert calibration.calibration_error(labels, calibrated) < 0.02
    assert calibration.calibration_error(labels, 4 * calibrated) > 0.1


def test_negative_log_likelihood_and_calibration_error_of_known_predictions():
    logits = np.log(np.float32([[0.75, 0.25]] * 4 + [[0.05, 0.95]] * 4))
    labels = np.array([0, 0, 0, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(calibration.calibration_error(labels, logits), 0.225, rtol=1e-5)
    expected = -np.mean(np.log([0.75] * 3 + [0.25] + [0.95] * 2 + [0.05] * 2))
    likelihood = calibration.negative_log_likelihood(labels, logits)
    np.testing.assert_allclose(likelihood, expected, rtol=1e-5)


# ---------------------------------------------------------------- many labels


def test_many_labels_trains_and_reports(tmp_path, capsys):
    with jax_defaults():
        curves, results = many_labels.main(["--quick", f"--out={tmp_path}"])
    assert list(curves) == list(many_labels.LOSSES)
    assert list(results) == ["frequency", *curves]
    for curve in curves.values():
        assert len(curve) == 60
        assert np.mean(curve[-10:]) < 0.8 * np.mean(curve[:3])
    for name, (at, groups) in results.items():
        assert at.shape == (many_labels.RANKS,)
        assert groups.shape == (len(many_labels.EDGES),)
        assert ((at >= 0) & (at <= 100)).all()
        assert (np.diff(at) < 1).all()  # the first label is the surest
        assert groups[-1] > groups[1]
        assert name == "frequency" or at[4] > results["frequency"][0][4]
    assert "Figure" in capsys.readouterr().out
    height, width, _ = plt.imread(tmp_path / "many_labels.png").shape
    assert height > 400
    assert 1000 < width <= PHONE


def test_many_labels_measures_of_known_predictions():
    scores = jnp.arange(20.0)[None]
    # The best label, 19, is given. Of the candidates 18, 17, ... the labels are 18 and 15.
    words, labels = jnp.array([[19, -1]]), jnp.array([[18, 15]])
    correct, groups = many_labels.hits(scores, words, labels, jnp.arange(20) // 5)
    assert correct[0].tolist() == [True, False, False, True] + 6 * [False]
    np.testing.assert_array_equal(groups, [[np.nan, np.nan, np.nan, 1]])
    at, of_groups = many_labels.precision([(np.asarray(correct), np.asarray(groups))])
    np.testing.assert_allclose(at[[0, 1, 4]], [100, 50, 40])
    assert of_groups[-1] == 100


def test_many_labels_splits_words_into_halves():
    rows = np.array([[5, 6, 7, 8, -1, -1], [1, 2, 3, 4, 9, -1]])
    words, labels = many_labels.split(rows, np.random.default_rng(0))
    for row, a, b in zip(rows, words, labels):
        assert sorted([*a[a >= 0], *b[b >= 0]]) == row[row >= 0].tolist()
        assert 0 <= (a >= 0).sum() - (b >= 0).sum() <= 1


def test_many_labels_help_states_what_runs(capsys):
    with pytest.raises(SystemExit, match="0"):
        many_labels.main(["--help"])
    text = capsys.readouterr().out
    assert "about a minute" in text
    assert text.count("default: ") >= 6


# ---------------------------------------------------------------- help

MODULES = (
    "calibration", "imbalanced_data", "imbalanced_digits", "language_model", "many_labels",
    "multi_host", "retinanet_digits.__main__", "retinanet_digits.ablation",
    "retinanet_digits.pretrain", "segmentation", "three_lines", "training_race",
)  # fmt: skip


def test_all_examples_are_listed():
    files = {path.stem for path in EXAMPLES.glob("*.py")} - {"__init__", "common", "quickstart"}
    assert files == {name for name in MODULES if "." not in name}


@pytest.mark.parametrize("name", MODULES)
def test_help_states_duration_and_defaults(name, capsys):
    module = importlib.import_module(f"examples.{name}")
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    text = capsys.readouterr().out
    assert "__main__" not in text
    assert re.search(r"\b(seconds?|minutes?)\b", text)
    options = text.partition("options:\n")[2]
    values = re.findall(r"^  --([\w-]+)[ ,]+(?!.*BooleanOptional)[A-Z{]", options, re.MULTILINE)
    assert len(re.findall(r"default:", options)) >= len(set(values) - {"join"})


def test_quickstart_help_does_not_train(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["quickstart.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(EXAMPLES / "quickstart.py"))
    assert "seconds" in capsys.readouterr().out


def test_missing_packages_are_one_line():
    done = subprocess.run(
        [sys.executable, "-c", MISSING], cwd=EXAMPLES.parent, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "The examples need rich, sklearn: pip install '.[examples]'\n"


MISSING = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda x, *a: None if x in ("rich", "sklearn") else find_spec(x, *a)
import examples
"""


# ---------------------------------------------------------------- training race


@pytest.fixture
def defaults_of_jax():
    # `update` sets the options for all threads, in which the examples train.
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


def test_plain_formulas_are_nan_in_bfloat16_and_focal_jax_is_not(defaults_of_jax, tmp_path, capsys):
    options = ["--dtypes", "bfloat16", "--steps=200", f"--out={tmp_path}"]
    curves = training_race.main(options)
    ends = {run.name: curve.nan_step for run, curve in curves.items()}
    focal_jax, *plain = curves.values()
    assert [*ends] == [*training_race.FORMULAS]
    assert ends[training_race.FOCAL_JAX] is None
    assert np.isfinite(focal_jax.losses).all()
    assert len(focal_jax.losses) == 200
    assert focal_jax.accuracies[0] > 0.97
    for curve in plain:
        assert 10 < curve.nan_step < 150
        assert np.isfinite(curve.losses[:-1]).all()
        assert np.isnan(curve.losses[-1])
        # Until then the formula trains as focal_jax does.
        compared = slice(0, curve.nan_step // 2)
        np.testing.assert_allclose(curve.losses[compared], focal_jax.losses[compared], rtol=0.05)
    printed = capsys.readouterr().out
    last_line = printed.splitlines()[-1]
    assert re.search(r"bfloat16, focal_jax +│ +none │ +\de-\d\d │", printed)  # a finite loss
    for name, end in ends.items():
        assert f"{name} in bfloat16" + (f" at step {end}" if end else "") in last_line
    height, width, _ = plt.imread(tmp_path / "training_race.png").shape
    assert height > 400
    assert 1000 < width <= PHONE
    assert not [*tmp_path.glob(".new*")]


def test_an_error_stops_the_other_threads():
    started = []

    def job(number):
        started.append(number)
        if number == 0:
            raise KeyboardInterrupt
        for _ in range(1000):  # as the segments of a run
            common.stop_if_interrupted()
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        common.in_threads(job, range(5))
    assert started in ([0], [0, 1])
    assert common.in_threads(lambda x: 2 * x, range(3)) == [0, 2, 4]  # starts anew


def test_an_interrupted_file_leaves_the_old_one(tmp_path):
    path = common.write(tmp_path / "folder" / "table", lambda new: new.write_text("old"))

    def interrupted(new):
        new.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        common.write(path, interrupted)
    assert path.read_text() == "old"
    assert [*path.parent.iterdir()] == [path]


def test_make_demo_begins_with_the_race():
    recipe = (EXAMPLES.parent / "Makefile").read_text().partition("\ndemo:")[2].partition("\n\n")[0]
    modules = re.findall(r"-m examples\.(\w+)", recipe)
    assert modules == ["training_race", "retinanet_digits"]


def test_race_rejects_invalid_options(capsys):
    for option in ("--steps=30", "--steps=0", "--gamma=-1", "--gamma=nan"):
        with pytest.raises(SystemExit, match="2"):
            training_race.main([option])
        assert "got" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["plain JAX (log_softmax)", *three_lines.EPSILON])
def test_gradient_at_a_wide_margin_is_nan_without_epsilon(name):
    formula = (training_race.FORMULAS | three_lines.EPSILON)[name]
    labels = jnp.zeros(3, jnp.int32)
    logits = jnp.pad(jnp.full((3, 1), 20.0), ((0, 0), (0, 9)))
    gradient = jax.jit(jax.grad(lambda z: formula(z, labels, 0.5).sum()))(logits)
    assert bool(jnp.isfinite(gradient).all()) == (name in three_lines.EPSILON)


# ---------------------------------------------------------------- three lines of JAX


def _rows(table):
    head, rows = table
    return [dict(zip(head, row)) for row in rows]


def test_fine_tuning_is_nan_in_plain_formulas_only(defaults_of_jax, monkeypatch):
    monkeypatch.setattr(three_lines, "DTYPES", ("bfloat16",))
    monkeypatch.setattr(three_lines, "TWO_GAMMAS", (0.5,))
    plain = "plain JAX (log_softmax)"
    formulas = {x: training_race.FORMULAS[x] for x in (training_race.FOCAL_JAX, plain)}
    monkeypatch.setattr(three_lines, "FORMULAS", formulas)
    rows = _rows(three_lines.main(["fine-tuning", "--seeds=1", "--steps=200"])["fine-tuning"])
    assert [row["implementation"] for row in rows] == [*formulas, *three_lines.EPSILON]
    assert [row["NaN runs"] for row in rows] == ["0 of 1", "1 of 1", "0 of 1"]
    assert "epsilon" not in " ".join(three_lines.formulas(2.0))


def test_detector_data_is_imbalanced():
    data = three_lines.detector_data()
    assert data.images.shape == (21_000, 64)
    assert (data.labels == -1).sum() == 20_000
    assert data.test_labels.min() >= 0
    gradient = jax.grad(lambda z: three_lines.torchvision_steps(z, jnp.array([-1, 3]), 2.0).sum())(
        jnp.zeros((2, 10))
    )
    assert (gradient > 0).sum() == 19  # all negatives


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_limited_process_runs_out_of_memory():
    assert three_lines.fits("plain JAX (optax)", 32_000, 64)
    assert not three_lines.fits("plain JAX (optax)", 131_072, 1 << 14)  # 8 GiB of logits


def test_page_has_the_rows_of_the_commands():
    page = (EXAMPLES.parent / "docs" / "why.md").read_text()
    for name in three_lines.SECTIONS:
        table = page.partition(f"<!-- {name}: python -m examples.three_lines {name} -->")[2]
        lines = table.strip().splitlines()[2:]
        rows = [line.strip("| ").split(" | ") for line in lines[: lines.index("")]]
        if name == "memory":
            wanted = len(three_lines.CLASSES) * len(three_lines.HEADS)
            positions = [int(row[2].split()[0].replace(",", "")) for row in rows]
            assert len(rows) == wanted
            assert positions[1] > 2 * positions[0]
            assert positions[3] > 2 * positions[2]
            continue
        for gamma, _, implementation, nan_runs, *_ in rows:
            is_exact = not implementation.startswith("plain JAX") or "epsilon" in implementation
            if is_exact or float(gamma) >= 1:
                assert nan_runs == "0 of 5", implementation


# ---------------------------------------------------------------- imbalanced data


@pytest.fixture
def rare_labels(tmp_path, monkeypatch):
    """A file in the format of the package river, with labels of 50, 10 and 3 %."""
    random = np.random.default_rng(0)
    x = random.normal(size=(1000, 6))
    labels = x[:, :3] + 0.5 * random.normal(size=(1000, 3)) > [0, 1.45, 2.1]
    folder = tmp_path / "river" / "datasets"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    with gzip.open(folder / "toy.csv.gz", "wt") as file:
        print(*(f"a{i}" for i in range(9)), sep=",", file=file)
        for row in np.hstack([x, labels]):
            print(*row, sep=",", file=file)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(imbalanced_data.LABELS, "toy", 3)


def test_imbalanced_data_trains(rare_labels, defaults_of_jax, tmp_path, capsys, monkeypatch):
    # Compilation takes most of the time. The other losses call the same functions.
    losses = {x: imbalanced_data.LOSSES[x] for x in ("class weights", "asymmetric loss")}
    monkeypatch.setattr(imbalanced_data, "LOSSES", losses)
    options = ["--data", "toy", "--seeds=2", "--steps=150", f"--out={tmp_path}", "--markdown"]
    results = imbalanced_data.main(options)["toy"]
    assert list(results) == list(losses)
    printed = capsys.readouterr().out
    for name, runs in results.items():
        assert f"| {name} | " in printed
        assert len(runs) == 2
        for run in runs:
            assert run["mean AP"] > 42  # chance is 21
            assert run["mean AP, rare labels"] > 20  # chance is 7
            assert 0 <= run["ECE, scaled"] <= 100
            assert run["rate"] in imbalanced_data.RATES
    assert 1000 < plt.imread(tmp_path / "imbalanced_data.png").shape[1] <= PHONE


def test_every_loss_has_the_same_rates_and_decays():
    tried = [imbalanced_data.trials(options) for _, options in imbalanced_data.LOSSES.values()]
    pairs = [{(trial.rate, trial.decay) for trial in each} for each in tried]
    assert pairs == [pairs[0]] * 4
    assert [len({*each}) for each in tried] == [12, 24, 24, 24]


def test_class_weights_are_those_of_the_positives(defaults_of_jax):
    logits, labels = jnp.array([[0.3], [0.3]]), jnp.array([[1.0], [0.0]])
    plain = imbalanced_data.cross_entropy(logits, labels, 0.0, None)
    weighted = imbalanced_data.class_weights(logits, labels, jnp.array(0.5), jnp.array([9.0]))
    np.testing.assert_allclose(weighted, plain * np.array([[3.0], [1.0]]), rtol=1e-5)


def test_imbalanced_data_names_the_missing_package(monkeypatch):
    monkeypatch.setattr(imbalanced_data, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install river"):
        imbalanced_data.main(["--seeds=1"])


def test_calibration_error_of_known_probabilities():
    p, labels = np.float32([0.75] * 4 + [0.05] * 4), np.float32([1, 1, 1, 0] + [1, 1, 0, 0])
    np.testing.assert_allclose(imbalanced_data.calibration_error(labels, p), 0.225, rtol=1e-5)


# ---------------------------------------------------------------- quickstart


def test_quickstart_is_short_and_trains(monkeypatch):
    path = EXAMPLES / "quickstart.py"
    monkeypatch.setattr("sys.argv", [str(path)])
    assert len(path.read_text().splitlines()) < 50
    with jax.numpy_dtype_promotion("standard"):
        assert runpy.run_path(str(path))["accuracy"] > 0.9


# ---------------------------------------------------------------- docs/choosing.md


def test_code_and_links_of_the_choosing_page():
    page = EXAMPLES.parent / "docs" / "choosing.md"
    (block,) = code_blocks(page.read_text())
    namespace = {}
    with jax_defaults():
        exec(compile(block, str(page), "exec"), namespace)
    for name in ("detector", "calibrated", "weighted"):
        assert (namespace[name] > 0).all()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    assert links
    for link in links:
        assert (page.parent / link).exists(), link


def test_focal_loss_is_not_a_proper_scoring_rule():
    # docs/choosing.md: if the true probability is 0.9, the focal loss is smallest at 0.69.
    p = jnp.linspace(0.001, 0.999, 999)
    logits = jnp.log(p) - jnp.log1p(-p)
    positive, negative = (
        sigmoid_focal_loss(logits, jnp.full_like(p, y), gamma=2.0) for y in (1, 0)
    )
    assert abs(p[(0.9 * positive + 0.1 * negative).argmin()] - 0.69) < 0.01
