"""The figures: detections, precision and recall, losses, and the results of the ablation."""

from functools import cache, partial
from itertools import product
from pathlib import Path

import jax
import numpy as np
from matplotlib.patches import Rectangle

from examples import common
from examples.retinanet_digits.data import CLASSES, SIZE, Canvases, canvases
from examples.retinanet_digits.evaluate import Detections, correct
from examples.retinanet_digits.model import anchors
from focal_jax import sigmoid_focal_loss
from focal_jax.detection import BACKGROUND, match_anchors
from focal_jax.measure import style

# The colour of a cross entropy shows its alpha: none, .75, .95. Dashed lines have a prior of .0001.
_NO_ALPHA, _ALPHA_75, _ALPHA_95 = ({"color": x} for x in (style.INK, style.PURPLE, style.BLUE))
_SMALL_PRIOR = {"linestyle": "--"}
# In the order of the losses of the demo, and of `ablation.BASELINES`.
DEMO_STYLES = (_NO_ALPHA, _ALPHA_95, _NO_ALPHA | _SMALL_PRIOR, {"color": style.VERMILION})
BASELINE_STYLES = (
    *(_NO_ALPHA, _ALPHA_75, _ALPHA_95),
    *(_NO_ALPHA | _SMALL_PRIOR, _ALPHA_75 | _SMALL_PRIOR),
)
# Boxes on canvases, which are dark.
BOX_STYLES = {
    "correct": {"color": style.FOUND},
    "false positive": {"color": "#ff6f4f", "linestyle": "--"},
    "missed": {"color": style.TRUTH, "linestyle": ":"},
}


def match_all(annotations: np.ndarray) -> np.ndarray:
    """Return the match of each anchor of each canvas, as `match_anchors` does."""
    return np.asarray(jax.jit(jax.vmap(partial(match_anchors, anchors())))(annotations))


@cache
def imbalance(objects: float) -> float:
    """Return the number of background anchors per positive anchor."""
    matches = match_all(canvases("validation", 200, 0, objects).annotations)
    return (matches == BACKGROUND).sum() / (matches >= 0).sum()


# ---------------------------------------------------------------- detections


def score_threshold(data: Canvases, found: Detections) -> float:
    """Return the threshold at which the number of detections equals the number of objects.

    Scores of different losses are not comparable: a focal loss gives less confident predictions.
    """
    objects = int((data.annotations[..., 4] >= 0).sum())
    return float(np.sort(found.scores.ravel())[-objects])


# The size of the label of a box, one digit, in pixels of the canvas.
LABEL = 9.0, 13.0


def _label_places(
    boxes: list, width: float = LABEL[0], height: float = LABEL[1]
) -> list[tuple[float, float]]:
    """Return a corner for the label of each box, without overlaps if possible."""
    used: list[tuple[float, float]] = []
    for x1, y1, x2, y2 in boxes:
        beside = product((x1, x2 - width, x2 + 1, x1 - width - 1), (y1 - height, y2 + 1, y1))
        inside = [(min(max(x, 0), SIZE - width), min(max(y, 0), SIZE - height)) for x, y in beside]
        free = [
            (x, y)
            for x, y in inside
            if all(abs(x - a) >= width or abs(y - b) >= height for a, b in used)
        ]
        used.append((free or inside)[0])
    return used


def _draw(panel, image, rows, boxes, classes, scores, threshold: float) -> None:
    panel.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    panel.set(xticks=[], yticks=[])
    panel.grid(False)
    boxes, classes, scores = (x[scores >= threshold] for x in (boxes, classes, scores))
    is_correct, is_detected = correct(rows, boxes, classes, scores)
    drawn = [
        (box, label, "correct" if hit else "false positive")
        for box, label, hit in zip(boxes, classes, is_correct)
    ]
    drawn += [
        (row[:4], row[4], "missed")
        for row, hit in zip(rows, is_detected)
        if row[4] >= 0 and not hit
    ]
    places = _label_places([box for box, _, _ in drawn])
    for (box, label, kind), (x, y) in zip(drawn, places):
        x1, y1, x2, y2 = box
        color = BOX_STYLES[kind]["color"]
        panel.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **BOX_STYLES[kind]))
        background = {"facecolor": "black", "alpha": 0.7, "linewidth": 0, "pad": 0.5}
        panel.text(x + 1, y + 1, f"{label:.0f}", color=color, va="top", bbox=background)


@style.applied()
def detections(data: Canvases, results: dict[str, Detections], path: Path, count: int = 3) -> Path:
    """Draw the correct, false and missed detections of each loss, one canvas per row."""
    figure, axes = style.figure(count, len(results), height=2.6 * count + 0.9, squeeze=False)
    crowded = np.argsort(-(data.annotations[:40, :, 4] >= 0).sum(1), kind="stable")[:count]
    for panels, (name, one) in zip(axes.T, results.items()):
        threshold = score_threshold(data, one)
        for panel, i in zip(panels, crowded):
            _draw(panel, data.images[i], data.annotations[i], *(x[i] for x in one), threshold)
        panels[0].set_title(f"{name}\nscore ≥ {threshold:.2f}")
    handles = [
        Rectangle((0, 0), 1, 1, fill=False, label=name, **line) for name, line in BOX_STYLES.items()
    ]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=3)
    legend.get_frame().set(facecolor="black", alpha=1)
    legend.set_frame_on(True)
    for text in legend.get_texts():
        text.set_color("white")
    return common.save(figure, path)


@style.applied()
def precision_recall(data: Canvases, results: dict[str, Detections], path: Path) -> Path:
    """Draw precision against recall at an IoU of 0.5, over all classes."""
    figure, panel = style.figure(height=3.9)
    objects = (data.annotations[..., 4] >= 0).sum()
    for (name, one), line in zip(results.items(), DEMO_STYLES, strict=True):
        is_correct = [correct(*image)[0] for image in zip(data.annotations, *one)]
        scores = one.scores.ravel()
        order = np.argsort(-scores, kind="stable")[: (scores > 0).sum()]
        hits = np.cumsum(np.concatenate(is_correct)[order])
        panel.plot(hits / objects, hits / np.arange(1, len(hits) + 1), label=name, **line)
    panel.set(xlabel="recall", ylabel="precision, IoU ≥ 0.5", xlim=(0, 1), ylim=(0, 1))
    figure.legend(loc="outside lower center")
    return common.save(figure, path)


# ---------------------------------------------------------------- losses


@style.applied()
def losses(curves: dict[str, np.ndarray], path: Path, window: int = 50) -> Path:
    """Draw running means of the training losses `[steps, 2]`.

    The box loss is the same function for all runs, so its values are comparable. The class loss is
    not, so it is divided by its first value.
    """
    figure, (boxes, classes) = style.figure(2, 1, sharex=True, height=5.6)
    for (name, curve), line in zip(curves.items(), DEMO_STYLES, strict=True):
        window = min(window, len(curve))
        mean = np.stack([np.convolve(x, np.full(window, 1 / window), "valid") for x in curve.T])
        steps = np.arange(window, len(curve) + 1)
        boxes.plot(steps, mean[1], label=name, **line)
        classes.plot(steps, mean[0] / mean[0, 0], **line)
    boxes.set(ylabel="box loss", ylim=(0, None))
    classes.set(xlabel="step", ylabel="class loss / first value", yscale="log")
    figure.legend(loc="outside lower center")
    return common.save(figure, path)


@style.applied()
def loss_spread(data: Canvases, logits: np.ndarray, path: Path) -> Path:
    """Draw the cumulative distribution of the loss over the anchors, as Figure 4 of the paper.

    The losses of the positive and of the background anchors of a trained network are sorted in
    increasing order, and each cumulative sum is normalized to 1.
    """
    matches = match_all(data.annotations)
    labels = np.take_along_axis(data.annotations[..., 4], matches.clip(0), 1)
    classes = np.where(matches >= 0, labels, -1)[..., None] == np.arange(CLASSES)
    figure, panels = style.figure(2, 1, height=5.2, sharex=True)
    for gamma, color in style.GAMMAS.items():
        anchor_losses = np.asarray(sigmoid_focal_loss(logits, classes, gamma=gamma)).sum(-1)
        for panel, chosen in zip(panels, (matches >= 0, matches == BACKGROUND)):
            total = np.cumsum(np.sort(anchor_losses[chosen].astype(np.float64)))
            share = np.linspace(0, 1, 1001)
            curve = np.interp(share, np.linspace(0, 1, len(total)), total / total[-1])
            panel.plot(share, curve, color=color, label=f"gamma {gamma:g}")
    for panel, name in zip(panels, ("positive", "background")):
        panel.set(ylabel="share of the loss")
        panel.set_title(f"{name} anchors")
    panels[1].set(xlabel="share of the anchors, in the order of their losses")
    panels[0].legend()
    return common.save(figure, path)


# ---------------------------------------------------------------- ablation


@style.applied()
def ablation(rows: dict[str, tuple[float, float, float | None]], path: Path) -> Path:
    """Draw the AP of every loss: mean and standard deviation on digits, and the AP on COCO."""
    figure, panel = style.figure(height=1.2 + 0.3 * len(rows))
    for y, (name, (mean, deviation, coco)) in enumerate(rows.items()):
        color = style.INK if name.startswith("CE") else style.VERMILION
        panel.errorbar(mean, y, xerr=deviation, fmt="o", color=color, capsize=4)
        if coco is not None:
            panel.plot(coco, y, "D", color=color, fillstyle="none")
    panel.set_yticks(range(len(rows)), rows)
    panel.invert_yaxis()
    panel.set_xlabel("AP (dot: digits, diamond: COCO)")
    return common.save(figure, path)


@style.applied()
def ap_differences(settings: dict[str, dict[str, list]], path: Path) -> Path:
    """Draw the AP of the focal loss minus the AP of each baseline, one panel per varied setting.

    `settings[label][baseline]` is a list of the value of the setting, the mean of the paired
    differences, and the limits of its 95 % interval.
    """
    figure, panels = style.figure(len(settings), 1, height=2.6 * len(settings) + 1.4, sharey=True)
    for panel, (label, rows) in zip(panels, settings.items()):
        shifts = np.geomspace(0.96, 1.04, len(rows))  # separates the error bars
        for (name, points), line, shift in zip(rows.items(), BASELINE_STYLES, shifts, strict=True):
            values, means, low, high = np.array(points).T
            panel.errorbar(
                values * shift, means, [means - low, high - means], marker="o", capsize=4,
                label=f"minus {name}", **line,
            )  # fmt: skip
        panel.axhline(0, color=style.INK, linewidth=1)
        panel.set(xscale="log", xlabel=label, ylabel="AP difference")
        ticks = [round(value) for value, *_ in next(iter(rows.values()))]
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
        panel.set_xticks([], minor=True)
    panels[0].set_title("AP of the focal loss minus AP of a baseline, 95 % interval")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center")
    return common.save(figure, path)
