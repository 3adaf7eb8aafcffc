"""Tests of the detector and the segmentation examples: data, training, resuming, evaluation."""

import re
from dataclasses import replace
from itertools import combinations

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from figure_checks import saved_figures_are_checked

from examples import segmentation
from examples.retinanet_digits import (
    __main__ as demo,
    ablation,
    experiment as experiments,
    figures,
    pretrain,
    train as training,
)
from examples.retinanet_digits.data import CLASSES, OBJECTS, PARTS, SIZE, Canvases, canvases, digits
from examples.retinanet_digits.evaluate import Detections, average_precision, correct, suppress
from examples.retinanet_digits.experiment import Outcome, Run, run_folder
from examples.retinanet_digits.model import anchors
from examples.retinanet_digits.pretrain import ADAM
from examples.retinanet_digits.train import Budget, Recipe
from focal_jax.detection import BACKGROUND

pytestmark = pytest.mark.slow

BUDGET = Budget(steps=24, batch=4, canvases=40, test_canvases=10, save_every=5)
OPTIONS = [
    f"--{name.replace('_', '-')}={value}"
    for name, value in vars(BUDGET).items()
    if not isinstance(value, bool)
]
FOCAL = demo.RECIPES[demo.FOCAL]


@pytest.fixture(autouse=True, scope="module")
def _promotion():
    # Adam of optax needs the standard dtype promotion. `update` sets it for all threads.
    before = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", before)


@pytest.fixture(autouse=True, scope="module")
def _readable_figures():
    with saved_figures_are_checked():
        yield


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return demo.main([*OPTIONS, "--seeds=2", f"--out={out}"]), out


def train(recipe, folder, on_step=lambda done, loss: None):
    return training.train(recipe, BUDGET, 0, folder, on_step)


# ---------------------------------------------------------------- data


def test_parts_are_disjoint():
    parts = [{image.tobytes() for image in digits(part)[0]} for part in PARTS]
    assert [len(part) > 150 for part in parts] == [True] * 3
    for first, second in combinations(parts, 2):
        assert not first & second


@pytest.mark.parametrize(("objects", "least", "most"), [(4.0, 300, 600), (1.0, 1200, 2000)])
def test_canvases_have_the_imbalance_of_dense_detection(objects, least, most):
    data = canvases("train", 150, 3, objects)
    assert data.images.shape == (150, SIZE, SIZE, 1)
    boxes, labels = data.annotations[..., :4], data.annotations[..., 4]
    boxes = boxes[labels >= 0]
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert (boxes >= 0).all()
    assert (boxes <= SIZE).all()
    assert set(labels.ravel()) == set(range(-1, CLASSES))

    matches = figures.match_all(data.annotations)
    positive = (matches >= 0).sum()
    assert len(anchors()) > 12_000
    assert least < (matches == BACKGROUND).sum() / positive < most
    matched = sum(len(set(row[row >= 0])) for row in matches)
    assert matched > 0.95 * len(boxes)


def test_less_than_one_object_per_canvas():
    labels = canvases("train", 60, 0, 0.25).annotations[..., 4]
    counts = (labels >= 0).sum(1)
    assert set(counts) == {0, 1}
    assert 5 < counts.sum() < 25


def test_canvases_depend_on_part_and_seed_only():
    again = canvases.__wrapped__("train", 5, 3, 4.0)
    np.testing.assert_array_equal(again.images, canvases("train", 150, 3, 4.0).images[:5])
    assert (canvases("train", 5, 4).images != again.images).any()
    assert (canvases("test", 5, 3).images != again.images).any()


# ---------------------------------------------------------------- training


def test_demo_trains_and_evaluates(demonstration):
    outcomes, _ = demonstration
    assert list(outcomes) == [demo.PLAIN, demo.BALANCED, demo.SMALL_PRIOR, demo.FOCAL]
    for runs in outcomes.values():
        for outcome in runs:
            assert outcome.losses.shape == (BUDGET.steps, 2)
            total = outcome.losses.sum(1)
            assert total[-4:].mean() < 0.9 * total[:4].mean()
            assert list(outcome.scores) == ["AP", "AP50", "AP75"]
            assert all(0 <= score <= 1 for score in outcome.scores.values())


def test_demo_writes_figures(demonstration):
    for name in ("detections", "losses", "loss_spread", "precision_recall"):
        height, width, _ = plt.imread(demonstration[1] / f"{name}.png").shape
        assert height >= 600
        assert 1000 <= width <= 1060  # text of 10 pixels on a phone


def test_summary_gives_difference_and_significance():
    def outcomes(focal):
        def runs(scores):
            return [Outcome(None, None, None, {"AP": score}) for score in scores]

        baseline = runs([0.30, 0.32, 0.31])
        return {demo.BALANCED: baseline, demo.SMALL_PRIOR: baseline, demo.FOCAL: runs(focal)}

    better, worse, unclear, single = (
        demo.summary(outcomes(focal))
        for focal in ([0.35, 0.37, 0.36], [0.25, 0.27, 0.26], [0.25, 0.42, 0.30], [0.35])
    )
    assert "AP of focal loss minus AP of balanced cross entropy: +5.0" in better
    assert "(significant)" in better
    assert ": -5.0" in worse
    assert "(not significant)" in unclear
    assert "one seed" in single


def test_interrupted_run_resumes_from_its_checkpoint(demonstration, tmp_path):
    def stop(done, loss):
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(FOCAL, tmp_path, stop)
    steps = []
    _, losses = train(FOCAL, tmp_path, lambda done, loss: steps.append(done))
    assert steps == list(range(10, BUDGET.steps + 1))
    np.testing.assert_allclose(losses, demonstration[0][demo.FOCAL][0].losses, rtol=1e-3)


def test_run_with_a_corrupt_checkpoint_warns_and_restarts(demonstration, tmp_path):
    train(FOCAL, tmp_path)
    for file in tmp_path.rglob("*"):
        if file.is_file():
            file.write_bytes(b"no checkpoint")
    steps = []
    with pytest.warns(UserWarning, match=f"{tmp_path}: .*starts from step 0"):
        _, losses = train(FOCAL, tmp_path, lambda done, loss: steps.append(done))
    assert steps == list(range(BUDGET.steps + 1))
    np.testing.assert_allclose(losses, demonstration[0][demo.FOCAL][0].losses, rtol=1e-3)


@pytest.mark.parametrize(
    "boxes",
    [
        pytest.param([[-1, -1, -1, -1, -1]], id="no object"),
        pytest.param([[SIZE + 20, 9, SIZE + 60, 60, 3], [-90, -80, -50, -20, 4]], id="outside"),
        pytest.param([[60, 60, 61, 61, 3]], id="no anchor matches"),
        pytest.param([[40, 40, 40, 40, 2]], id="no area"),
    ],
)
def test_training_is_finite_with_unusual_boxes(boxes):
    annotations = np.full((BUDGET.batch, OBJECTS, 5), -1, np.float32)
    annotations[:, : len(boxes)] = boxes
    images = canvases("train", BUDGET.canvases, 0).images[: BUDGET.batch]
    parameters = training.start(FOCAL, BUDGET, 0)
    adam, step, losses = ADAM.init(parameters), training.make_step(FOCAL.gamma, FOCAL.alpha), []
    for _ in range(6):
        parameters, adam, last = step(parameters, adam, images, annotations, 0.003, 1.0)
        losses.append(float(sum(last)))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(parameters))


# ---------------------------------------------------------------- pretraining


def test_pretraining_writes_the_arrays_of_the_backbone_file(tmp_path):
    path = tmp_path / "backbone.npz"
    accuracy = pretrain.main(["--steps=150", "--images=600", f"--out={path}"])
    assert accuracy > 0.15  # chance is 0.1
    with np.load(pretrain.FILE) as saved, np.load(path) as new:
        assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in new.items()}
    assert pretrain.FILE.stat().st_size < 300_000

    random, pretrained = (
        training.start(FOCAL, replace(BUDGET, pretrained=x), 0)["pyramid"]["backbone"]
        for x in (False, True)
    )
    assert (random["stem"]["kernel"][...] != pretrained["stem"]["kernel"][...]).any()


# ---------------------------------------------------------------- evaluation


def test_suppression_keeps_the_best_detection_of_each_class():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9], [0, 0, 10, 4]], np.float32)
    classes, scores = np.array([1, 1, 2, 1]), np.array([0.9, 0.8, 0.7, 0.6], np.float32)
    kept = suppress(boxes, classes, scores)
    np.testing.assert_array_equal(kept, np.float32([0.9, 0, 0.7, 0.6]))


def test_suppressed_boxes_do_not_suppress_others():
    boxes = np.array([[0, 0, 10, 10], [3, 0, 13, 10], [6, 0, 16, 10]], np.float32)
    one_class = np.zeros(3, int)
    kept = suppress(boxes, one_class, np.float32([0.9, 0.8, 0.7]))
    np.testing.assert_array_equal(kept, np.float32([0.9, 0, 0.7]))
    # Neither does a box with score 0.
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


def test_correct_and_missed_detections():
    rows = np.float32([[0, 0, 10, 10, 1], [20, 0, 30, 10, 2], [40, 0, 50, 10, 3], [-1] * 5])
    boxes = np.float32(
        [[0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 10], [0, 40, 9, 50], [40, 0, 50, 10]]
    )
    classes, scores = np.array([1, 1, 4, 2, 3]), np.float32([0.9, 0.8, 0.7, 0.6, 0])
    is_correct, is_detected = correct(rows, boxes, classes, scores)
    # Correct, a repetition, a wrong class, no object at this place, suppressed.
    assert is_correct.tolist() == [True, False, False, False, False]
    assert is_detected.tolist() == [True, False, False, False]


def test_labels_of_boxes_do_not_overlap():
    boxes = [(10, 20, 40, 60), (12, 22, 40, 60), (11, 18, 38, 61), (0, 0, 9, 9)]
    places = figures._label_places(boxes, 22, 9)
    for (x, y), (a, b) in combinations(places, 2):
        assert abs(x - a) >= 22 or abs(y - b) >= 9
    assert all(0 <= x <= SIZE - 22 and 0 <= y <= SIZE - 9 for x, y in places)


# ---------------------------------------------------------------- ablation


def test_ablation_resumes_and_writes_its_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "TRIALS", ((0.006, 1.0), (0.015, 1.0)))
    published, written = ablation.RESULTS.read_text(), tmp_path / "results.md"
    quick = [x for x in OPTIONS if not x.startswith("--steps")]
    losses = list(ablation.COMPARED)
    options = [
        *quick, "--steps=2", f"--out={tmp_path}", "--seeds=2", "--other-seeds=2",
        "--other-objects", "1.0", "--other-steps", "3", "--losses", *losses,
    ]  # fmt: skip
    ran, experiment = [], experiments.experiment

    def interrupted(run, *args):
        if len(ran) == 5:
            raise KeyboardInterrupt
        ran.append(run)
        return experiment(run, *args)

    monkeypatch.setattr(experiments, "experiment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ablation.main(options)
    assert not written.exists()
    before = set(ran)
    monkeypatch.setattr(
        experiments, "experiment", lambda run, *a: ran.append(run) or experiment(run, *a)
    )
    results = ablation.main(options)
    assert len(ran) == len(set(ran)) == 6 * 2 * 4  # no run is repeated
    assert before < set(ran)

    assert {run.part for run in ran[:12]} == {"validation"}
    assert {run.part for run in ran[12:]} == {"test"}
    assert {name: len(runs) for name, runs in results.items()} == dict.fromkeys(losses, 2)
    text = written.read_text()
    assert ablation.RESULTS.read_text() == published  # unchanged by other options
    assert text.splitlines()[0] == published.splitlines()[0]
    assert text.splitlines()[-1] == published.splitlines()[-1]
    assert "| CE, no prior |" not in text
    assert "| CE, alpha .75 | 2 | " in text
    assert "|  | 805 to 1 | 1,482 to 1 |" in text
    assert "|  | 2 steps | 3 steps |" in text
    for name in ("ablation", "ap_differences"):
        assert 1000 < plt.imread(tmp_path / f"{name}.png").shape[1] <= 1060


def test_best_recipes():
    recipes = [replace(FOCAL, learning_rate=rate) for rate in (0.1, 0.2, 0.3)]
    runs = [
        {"AP": ap, "run": {"recipe": vars(recipe)}} for ap, recipe in zip((0.2, 0.4, 0.4), recipes)
    ]
    assert ablation.best_recipes({"FL": runs}) == {"FL": recipes[1]}


def test_table_has_mean_deviation_and_interval():
    def runs(*scores):
        return [{"AP": score, "AP50": 0.5, "AP75": 0.1} for score in scores]

    rows = {ablation.BALANCED: runs(0.2, 0.4, 0.3), ablation.FOCAL: runs(0.21, 0.43, 0.32)}
    lines = ablation.table(rows).splitlines()
    assert lines[2] == "| CE, alpha .75 | 3 | 30.0 ± 10.0 | 50.0 ± 0.0 | 10.0 ± 0.0 |  | 31.1 |"
    # Mean 2, standard deviation 1, and the t quantile 4.303 of two degrees of freedom over sqrt(3).
    assert "| +2.0 (-0.5 to 4.5) | 34.0 |" in lines[3]


def test_figures_are_drawn_from_the_recorded_tables(tmp_path):
    page = ablation.RESULTS.read_text()
    ablation.draw(page, tmp_path)
    for name in ("ablation", "ap_differences"):
        assert 1000 < plt.imread(tmp_path / f"{name}.png").shape[1] <= 1060  # text for a phone
    points = ablation._points(ablation.recorded_table("steps"))
    assert list(points) == list(ablation.BASELINES)
    assert points["CE"] == [(1000, 24.7, 20.0, 29.4), (3000, 7.2, 2.0, 12.4)]


def test_selected_rows_are_merged_into_the_recorded_table():
    old = ablation.recorded_table("steps")
    assert ablation.merge_tables(old, old).splitlines()[2:] == old.splitlines()[2:]
    head = ["", "1,000 steps", "3,000 steps"]
    rows = [["seeds", "5", "5"], ["CE", "1.0", "2.0"], ["CE, prior .001", "3.0", "4.0"]]
    merged = ablation.merge_tables(old, ablation.common.markdown(head, rows))
    lines = old.splitlines()[2:]
    lines[1] = "| CE | 1.0 | 2.0 |"
    first_difference = next(i for i, x in enumerate(lines) if x.startswith("| FL minus"))
    if not any(x.startswith("| CE, prior .001 ") for x in lines):
        lines.insert(first_difference, "| CE, prior .001 | 3.0 | 4.0 |")
        assert merged.splitlines()[2:] == lines
    with pytest.raises(ValueError, match="wanted"):
        ablation.merge_tables(old, ablation.common.markdown(head[:2], [["CE", "1.0"]]))


def test_gamma_2_has_as_many_settings_as_cross_entropy():
    focal = [recipe for recipe, _ in ablation.RECIPES.values() if recipe.gamma == 2]
    pairs = {(recipe.alpha, recipe.prior) for recipe in focal}
    assert {(alpha, prior) for alpha in (0.25, 0.5, 0.75) for prior in (0.01, 0.001)} <= pairs
    assert ablation.RECIPES["CE, prior .001"][0] == Recipe(gamma=0, alpha=None, prior=0.001)


def test_run_folder_depends_on_every_field(tmp_path):
    run = Run(Recipe(), BUDGET, 0)
    others = [
        replace(run, recipe=Recipe(gamma=1)),
        replace(run, budget=replace(BUDGET, steps=17)),
        replace(run, seed=1),
        replace(run, part="validation"),
    ]
    assert len({run_folder(tmp_path, run) for run in [run, *others]}) == 5


def test_demo_uses_the_best_trials():
    rows = ablation.recorded_table("trials").splitlines()
    head = rows[0].strip("| ").split(" | ")[1:]
    compared = ("CE", ablation.BEST_ALPHA, ablation.SMALL_PRIOR, ablation.FOCAL)
    for name, recipe in zip(compared, demo.RECIPES.values()):
        (row,) = (row for row in rows if row.startswith(f"| {name} |"))
        (best,) = (i for i, cell in enumerate(row.strip("| ").split(" | ")[1:]) if "**" in cell)
        rate, weight = recipe.learning_rate, recipe.class_weight
        assert head[best] == f"rate {rate}, weight {weight:g}"


def test_best_alpha_is_that_of_the_trials():
    best = {}
    for row in ablation.recorded_table("trials").splitlines()[2:]:
        name, *cells = row.strip("| ").split(" | ")
        (best[name],) = (float(cell.strip("*")) for cell in cells if "**" in cell)
    balanced = [name for name in best if re.fullmatch(r"CE, alpha \.\d+", name)]
    assert len(balanced) == 4
    assert max(balanced, key=best.get) == ablation.BEST_ALPHA


# ---------------------------------------------------------------- segmentation


def test_segmentation_trains(tmp_path):
    options = [
        "--scenes=40",
        "--test-scenes=10",
        "--steps=16",
        "--batch=4",
        "--seeds=2",
        f"--out={tmp_path}",
    ]
    results = segmentation.main(options)
    assert len(results) == 4
    for losses, scores in results.values():
        assert losses.shape == (2, 16)
        assert np.mean(losses[:, -4:]) < 0.9 * np.mean(losses[:, :4])
        assert ((scores > 0) & (scores < 1)).all()
    assert plt.imread(tmp_path / "segmentation.png").shape[1] > 500


def test_mean_iou_of_known_predictions():
    truth = np.array([0, 0, 1, 1, segmentation.VOID])
    predicted = np.array([0, 1, 1, 1, 5])
    expected = (1 / 2 + 2 / 3) / segmentation.CLASSES  # the other classes do not occur
    np.testing.assert_allclose(segmentation.mean_iou(truth, predicted), expected)
