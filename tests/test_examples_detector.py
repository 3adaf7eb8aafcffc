"""The detector and the segmenter learn, resume, and are judged rightly."""

import json
from dataclasses import replace
from functools import partial

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

from examples import segmentation
from examples.retinanet_digits import __main__ as demo, ablation, train as training
from examples.retinanet_digits.data import CLASSES, SIZE, Canvases, canvases, digits
from examples.retinanet_digits.evaluate import Detections, average_precision, suppress
from examples.retinanet_digits.experiment import place
from examples.retinanet_digits.model import anchors
from examples.retinanet_digits.train import Budget, Recipe
from focal_jax.detection import BACKGROUND, match_anchors

pytestmark = pytest.mark.slow

BUDGET = Budget(steps=16, batch=4, canvases=40, test_canvases=10, save_every=5)
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in vars(BUDGET).items()]


@pytest.fixture(autouse=True, scope="module")
def _promotion():
    # optax's adam, not this library, needs the standard promotion.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return demo.main([*OPTIONS, f"--out={out}"]), out


# ------------------------------------------------------------------------------ data


def test_test_digits_are_never_trained_on():
    train, test = ({image.tobytes() for image in digits(part)[0]} for part in ("train", "test"))
    assert len(train) > 800
    assert len(test) > 800
    assert not train & test


def test_the_canvases_are_those_of_dense_detection():
    data = canvases("train", 200, 3)
    assert data.images.shape == (200, SIZE, SIZE, 1)
    boxes, labels = data.annotations[..., :4], data.annotations[..., 4]
    whole = boxes[labels >= 0]
    assert (whole[:, :2] < whole[:, 2:]).all()
    assert (whole >= 0).all()
    assert (whole <= SIZE).all()
    assert set(labels.ravel()) == set(range(-1, CLASSES))

    match = jax.jit(jax.vmap(partial(match_anchors, anchors())))
    matches = np.asarray(match(data.annotations))
    positive = (matches >= 0).sum()
    assert len(anchors()) > 4000
    assert 300 < (matches == BACKGROUND).sum() / positive < 1000
    found = sum(len(set(row[row >= 0])) for row in matches)
    assert found > 0.95 * len(whole)


def test_a_seed_is_a_set():
    again = canvases.__wrapped__("train", 5, 3)
    np.testing.assert_array_equal(again.images, canvases("train", 200, 3).images[:5])
    assert (canvases("train", 5, 4).images != again.images).any()
    assert (canvases("test", 5, 3).images != again.images).any()


# -------------------------------------------------------------------------- training


def test_the_demo_learns_and_is_scored(demonstration):
    outcomes, _ = demonstration
    assert list(outcomes) == ["cross entropy", "focal loss"]
    for outcome in outcomes.values():
        assert outcome.losses.shape == (BUDGET.steps,)
        assert outcome.losses[-4:].mean() < 0.7 * outcome.losses[:4].mean()
        assert list(outcome.scores) == ["AP", "AP50", "AP75"]
        assert all(0 <= score <= 1 for score in outcome.scores.values())


def test_the_demo_draws(demonstration):
    for name in ("detections", "losses", "loss_spread"):
        height, width, _ = plt.imread(demonstration[1] / f"{name}.png").shape
        assert height > 300
        assert width > 500


def test_a_run_goes_on_where_it_was_stopped(demonstration, tmp_path):
    def stop(done):
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(Recipe(), BUDGET, 0, tmp_path, stop)
    steps = []
    _, losses = training.train(Recipe(), BUDGET, 0, tmp_path, steps.append)
    assert steps == list(range(10, BUDGET.steps + 1))
    np.testing.assert_allclose(losses, demonstration[0]["focal loss"].losses, rtol=1e-3)


@pytest.mark.parametrize(
    "boxes",
    [
        pytest.param([[-1, -1, -1, -1, -1]], id="no object"),
        pytest.param([[SIZE + 20, 9, SIZE + 60, 60, 3], [-90, -80, -50, -20, 4]], id="outside"),
        pytest.param([[60, 60, 61, 61, 3]], id="no anchor matches"),
        pytest.param([[40, 40, 40, 40, 2]], id="no area"),
    ],
)
def test_odd_boxes_do_no_harm(boxes):
    annotations = np.full((BUDGET.batch, 3, 5), -1, np.float32)
    annotations[:, : len(boxes)] = boxes
    images = canvases("train", BUDGET.canvases, 0).images[: BUDGET.batch]
    model, optimizer = training.start(Recipe(), BUDGET, 0)
    step = training.make_step(Recipe())
    losses = [float(step(model, optimizer, images, annotations)) for _ in range(6)]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(training.nnx.state(model)))


# ------------------------------------------------------------------------ evaluation


def test_suppression_keeps_the_best_of_each_class():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9], [0, 0, 10, 4]], np.float32)
    classes, scores = np.array([1, 1, 2, 1]), np.array([0.9, 0.8, 0.7, 0.6], np.float32)
    kept = suppress(boxes, classes, scores)
    np.testing.assert_array_equal(kept, np.float32([0.9, 0, 0.7, 0.6]))


def test_a_box_that_is_suppressed_suppresses_none():
    boxes = np.array([[0, 0, 10, 10], [3, 0, 13, 10], [6, 0, 16, 10]], np.float32)
    one_class = np.zeros(3, int)
    kept = suppress(boxes, one_class, np.float32([0.9, 0.8, 0.7]))
    np.testing.assert_array_equal(kept, np.float32([0.9, 0, 0.7]))
    # Nor does one without a score.
    kept = suppress(boxes, one_class, np.float32([0, 0.8, 0.7]))
    np.testing.assert_array_equal(kept, np.float32([0, 0.8, 0]))


def test_average_precision_of_known_detections():
    data = Canvases(*(x[:8] for x in canvases("train", 200, 3)))
    boxes, labels = data.annotations[..., :4], data.annotations[..., 4].astype(int)
    perfect = Detections(boxes, labels, (labels >= 0).astype(np.float32))
    np.testing.assert_allclose(list(average_precision(data, perfect).values()), 1)

    shifted = boxes + 0.2 * (boxes[..., 2:3] - boxes[..., :1]) * [1, 0, 1, 0]  # IoU 0.8 / 1.2
    scores = average_precision(data, perfect._replace(boxes=shifted))
    np.testing.assert_allclose(list(scores.values()), [0.4, 1, 0], atol=1e-6)
    nothing = perfect._replace(scores=np.zeros_like(perfect.scores))
    assert set(average_precision(data, nothing).values()) == {0}


# -------------------------------------------------------------------------- ablation


def test_the_ablation_goes_on_and_writes_its_table(demonstration, tmp_path, monkeypatch):
    recipes = {"CE": (demo.RECIPES["cross entropy"], 30.2), "FL": (Recipe(), None)}
    monkeypatch.setattr(ablation, "RECIPES", recipes)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{ablation.BEGIN}stale\n{ablation.END}after\n")
    options = [*OPTIONS, f"--out={tmp_path}", "--seeds=2", f"--readme={readme}"]

    runs, experiment = [], ablation.experiment

    def stopped(name, *args):
        if len(runs) == 3:
            raise KeyboardInterrupt
        runs.append(name)
        return experiment(name, *args)

    monkeypatch.setattr(ablation, "experiment", stopped)
    with pytest.raises(KeyboardInterrupt):
        ablation.main(options)
    assert runs == ["CE, seed 0", "FL, seed 0", "CE, seed 1"]
    assert "stale" in readme.read_text()

    runs.clear()
    results = ablation.main(options)
    assert runs == ["FL, seed 1"]
    assert {name: [run["seed"] for run in rows] for name, rows in results.items()} == {
        "CE": [0, 1],
        "FL": [0, 1],
    }
    before, *table, after = readme.read_text().splitlines()
    assert (before, after) == ("before", "after")
    assert "stale" not in table
    assert table[3].startswith("| CE | ")
    assert table[3].endswith("| 0 of 2 | 30.2 |")
    assert plt.imread(tmp_path / "ablation.png").shape[1] > 500

    first = json.loads(place(tmp_path, Recipe(), BUDGET, 0).with_suffix(".json").read_text())
    np.testing.assert_allclose(
        first["loss"], demonstration[0]["focal loss"].losses.tolist(), rtol=1e-3
    )


def test_the_table_says_mean_spread_and_divergence():
    runs = [
        {"AP": 0.2, "AP50": 0.5, "AP75": 0.1, "loss": [1.0, 0.5]},
        {"AP": 0.4, "AP50": 0.5, "AP75": 0.1, "loss": [1.0, float("nan")]},
    ]
    assert ablation.table({"CE": runs}).splitlines()[2] == (
        "| CE | 30.0 ± 14.1 | 50.0 ± 0.0 | 10.0 ± 0.0 | 1 of 2 | 30.2 |"
    )


def test_a_run_is_named_by_all_that_it_depends_on(tmp_path):
    runs = [
        (Recipe(), BUDGET, 0),
        (Recipe(gamma=1), BUDGET, 0),
        (Recipe(), replace(BUDGET, steps=17), 0),
        (Recipe(), BUDGET, 1),
    ]
    assert len({place(tmp_path, *run) for run in runs}) == 4


def test_the_committed_readme_has_its_table():
    text = ablation.README.read_text()
    table = text.split(ablation.BEGIN)[1].split(ablation.END)[0]
    assert [row.split(" | ")[0] for row in table.splitlines()[2:]] == [
        f"| {name}" for name in ablation.RECIPES
    ]
    assert (ablation.README.parent / "ablation.png").exists()


# ---------------------------------------------------------------------- segmentation


def test_the_segmenter_learns(tmp_path):
    options = ["--scenes=40", "--test-scenes=10", "--steps=16", "--batch=4", f"--out={tmp_path}"]
    results = segmentation.main(options)
    assert len(results) == 3
    for losses, score in results.values():
        assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
        assert 0 < score < 1
    assert plt.imread(tmp_path / "segmentation.png").shape[1] > 500


def test_mean_iou_of_a_known_answer():
    truth = np.array([0, 0, 1, 1, segmentation.VOID])
    predicted = np.array([0, 1, 1, 1, 5])
    expected = (1 / 2 + 2 / 3) / segmentation.CLASSES  # the other classes are nowhere
    np.testing.assert_allclose(segmentation.mean_iou(truth, predicted), expected)
