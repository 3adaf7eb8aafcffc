"""Tests of the examples: they train, and they write their tables and figures."""

import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from pages import code_blocks

from examples import calibration, many_labels
from focal_jax import sigmoid_focal_loss

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


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
        assert width > 1000


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
    assert width >= 1400


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
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
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
    assert width > 1000


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


# ---------------------------------------------------------------- quickstart


def test_quickstart_is_short_and_trains():
    path = EXAMPLES / "quickstart.py"
    assert len(path.read_text().splitlines()) < 50
    with jax.numpy_dtype_promotion("standard"):
        assert runpy.run_path(str(path))["accuracy"] > 0.9


# ---------------------------------------------------------------- docs/choosing.md


def test_code_and_links_of_the_choosing_page():
    page = EXAMPLES.parent / "docs" / "choosing.md"
    (block,) = code_blocks(page.read_text())
    namespace = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
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
