"""The pictures: detections, precision and recall, losses, the paper's Figure 4, the ablation."""

from functools import cache, partial
from itertools import product
from pathlib import Path

import jax
import numpy as np
from matplotlib.patches import Rectangle

from examples.retinanet_digits.data import CLASSES, SIZE, Canvases, canvases
from examples.retinanet_digits.evaluate import Detections, correct
from examples.retinanet_digits.model import anchors
from focal_jax import _style, sigmoid_focal_loss
from focal_jax.detection import BACKGROUND, match_anchors

# A colour for each alpha of cross entropy (none, .75, .95), dashes where the prior fits the
# imbalance; and the focal loss.
_PLAIN, _PAPERS, _TUNED = ({"color": x} for x in (_style.INK, _style.PURPLE, _style.BLUE))
_FITTED = {"linestyle": "--"}
# In the orders of the demo's losses, and of the ablation's rivals of focal loss.
DEMO_STYLES = (_PLAIN, _TUNED, _PLAIN | _FITTED, {"color": _style.VERMILION})
RIVAL_STYLES = (_PLAIN, _PAPERS, _TUNED, _PLAIN | _FITTED, _PAPERS | _FITTED)
# On canvases, which are dark: what was found rightly, what is none, what was missed.
STYLES = {
    "right": {"color": _style.FOUND},
    "false": {"color": "#ff6f4f", "linestyle": "--"},
    "missed": {"color": _style.TRUTH, "linestyle": ":"},
}


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def matched(annotations: np.ndarray) -> np.ndarray:
    """Return what each anchor of each canvas answers for."""
    return np.asarray(jax.jit(jax.vmap(partial(match_anchors, anchors())))(annotations))


@cache
def imbalance(objects: float) -> float:
    """Return how many background anchors there are to each on an object."""
    matches = matched(canvases("validation", 200, 0, objects).annotations)
    return (matches == BACKGROUND).sum() / (matches >= 0).sum()


# -------------------------------------------------------------------------- detections


def equal_number(data: Canvases, found: Detections) -> float:
    """Return the score that as many detections reach as there are objects.

    Scores of one loss are no scores of another: a focal loss is never sure. At the same number of
    boxes both can be looked at side by side.
    """
    objects = int((data.annotations[..., 4] >= 0).sum())
    return float(np.sort(found.scores.ravel())[-objects])


def _label_places(boxes: list, width: float = 28, height: float = 9) -> list[tuple[float, float]]:
    """Return a corner for the label of each box, where it hides no other as far as possible."""
    taken: list[tuple[float, float]] = []
    for x1, y1, x2, y2 in boxes:
        beside = product((x1, x2 - width, x2 + 1, x1 - width - 1), (y1 - height, y2 + 1, y1))
        inside = [(min(max(x, 0), SIZE - width), min(max(y, 0), SIZE - height)) for x, y in beside]
        free = [
            (x, y)
            for x, y in inside
            if all(abs(x - a) >= width or abs(y - b) >= height for a, b in taken)
        ]
        taken.append((free or inside)[0])
    return taken


def _draw(panel, image, rows, boxes, classes, scores, least: float) -> None:
    panel.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    panel.set(xticks=[], yticks=[])
    panel.grid(False)
    sure = scores >= least
    right, objects = correct(rows, boxes[sure], classes[sure], scores[sure])
    drawn = [
        (box, f"{label} {score:.2f}", "right" if hit else "false")
        for box, label, score, hit in zip(boxes[sure], classes[sure], scores[sure], right)
    ]
    drawn += [
        (row[:4], f"{row[4]:.0f}", "missed")
        for row, hit in zip(rows, objects)
        if row[4] >= 0 and not hit
    ]
    places = _label_places([box for box, _, _ in drawn])
    for (box, text, kind), (x, y) in zip(drawn, places):
        x1, y1, x2, y2 = box
        panel.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **STYLES[kind]))
        background = {"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 0.5}
        panel.text(x, y, text, color=STYLES[kind]["color"], fontsize=6, va="top", bbox=background)


@_style.applied()
def detections(data: Canvases, found: dict[str, Detections], path: Path, columns: int = 5) -> Path:
    """Draw the same canvases for each loss: right, false and missed ones are told apart."""
    figure, axes = _style.figure(len(found), columns, height=1.45 * len(found) + 0.4, squeeze=False)
    crowded = np.argsort(-(data.annotations[:40, :, 4] >= 0).sum(1), kind="stable")[:columns]
    for panels, (name, one) in zip(axes, found.items()):
        least = equal_number(data, one)
        for panel, i in zip(panels, crowded):
            _draw(panel, data.images[i], data.annotations[i], *(x[i] for x in one), least)
        title = name.replace(" cross", "\ncross")
        panels[0].set_ylabel(f"{title}\nscores from {least:.2f}", fontsize="small")
    handles = [
        Rectangle((0, 0), 1, 1, fill=False, label=name, **style) for name, style in STYLES.items()
    ]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=3)
    legend.get_frame().set(facecolor="black", alpha=1)
    legend.set_frame_on(True)
    for text in legend.get_texts():
        text.set_color("white")
    return _save(figure, path)


@_style.applied()
def precision_recall(data: Canvases, found: dict[str, Detections], path: Path) -> Path:
    """Draw precision against recall at an IoU of 0.5, all classes together."""
    figure, panel = _style.figure(width=5, height=3.5)
    objects = (data.annotations[..., 4] >= 0).sum()
    for (name, one), style in zip(found.items(), DEMO_STYLES, strict=True):
        right = [correct(*image)[0] for image in zip(data.annotations, *one)]
        scores = one.scores.ravel()
        order = np.argsort(-scores, kind="stable")[: (scores > 0).sum()]
        hits = np.cumsum(np.concatenate(right)[order])
        panel.plot(hits / objects, hits / np.arange(1, len(hits) + 1), label=name, **style)
    panel.set(xlabel="recall", ylabel="precision, IoU from 0.5", xlim=(0, 1), ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=2)
    return _save(figure, path)


# ------------------------------------------------------------------------------ losses


@_style.applied()
def losses(curves: dict[str, np.ndarray], path: Path, window: int = 50) -> Path:
    """Draw running means of the training losses `[steps, 2]`.

    The box loss is the same function in all runs, so its values compare. A class loss compares only
    with itself: it is drawn in units of where it started.
    """
    figure, (boxes, classes) = _style.figure(1, 2, sharex=True, height=3.5)
    for (name, curve), style in zip(curves.items(), DEMO_STYLES, strict=True):
        window = min(window, len(curve))
        mean = np.stack([np.convolve(x, np.full(window, 1 / window), "valid") for x in curve.T])
        steps = np.arange(window, len(curve) + 1)
        boxes.plot(steps, mean[1], label=name, **style)
        classes.plot(steps, mean[0] / mean[0, 0], **style)
    boxes.set(xlabel="step", ylabel="box loss", ylim=(0, None))
    classes.set(xlabel="step", ylabel="class loss / its start", yscale="log")
    figure.legend(loc="outside lower center", ncols=2)
    return _save(figure, path)


@_style.applied()
def loss_spread(data: Canvases, logits: np.ndarray, path: Path) -> Path:
    """Draw the paper's Figure 4: which share of the anchors makes which share of the loss.

    The cumulative loss of the positive and of the background anchors of a trained network,
    sorted from the least, each curve normalized to end at 1.
    """
    matches = matched(data.annotations)
    labels = np.take_along_axis(data.annotations[..., 4], matches.clip(0), 1)
    classes = np.where(matches >= 0, labels, -1)[..., None] == np.arange(CLASSES)
    figure, panels = _style.figure(1, 2, sharey=True)
    for gamma, color in _style.GAMMAS.items():
        anchor_losses = np.asarray(sigmoid_focal_loss(logits, classes, gamma=gamma)).sum(-1)
        for panel, chosen in zip(panels, (matches >= 0, matches == BACKGROUND)):
            total = np.cumsum(np.sort(anchor_losses[chosen].astype(np.float64)))
            share = np.linspace(0, 1, 1001)
            curve = np.interp(share, np.linspace(0, 1, len(total)), total / total[-1])
            panel.plot(share, curve, color=color, label=f"gamma {gamma:g}")
    for panel, name in zip(panels, ("positive", "background")):
        panel.set(xlabel=f"share of the {name} anchors, easiest first")
    panels[0].set(ylabel="cumulative share of their loss")
    panels[0].legend()
    return _save(figure, path)


# ---------------------------------------------------------------------------- ablation


@_style.applied()
def ablation(ours: dict[str, list[float]], theirs: dict[str, float | None], path: Path) -> Path:
    """Draw the AP of every recipe and seed, and beside it the paper's."""
    figure, (here, paper) = _style.figure(
        1, 2, sharey=True, width_ratios=(3, 2), height=0.6 + 0.32 * len(ours)
    )
    for row, (name, seeds) in enumerate(ours.items()):
        color = _style.INK if name.startswith("CE") else _style.VERMILION
        here.plot(seeds, [row] * len(seeds), "o", color=color, alpha=0.45, markersize=4)
        here.plot(np.mean(seeds), row, "|", color=color, markersize=16, markeredgewidth=2.5)
        if theirs[name] is not None:
            paper.plot(theirs[name], row, "|", color=color, markersize=16, markeredgewidth=2.5)
    here.set_yticks(range(len(ours)), ours)
    here.invert_yaxis()
    here.set_xlabel("AP here (dot: a seed, bar: mean)")
    paper.set_xlabel("AP in the paper, COCO")
    return _save(figure, path)


@_style.applied()
def ahead(settings: dict[str, dict[str, list]], path: Path) -> Path:
    """Draw how much focal loss is ahead of each cross entropy, a panel for each kind of setting.

    `settings` has by the words for a number its values, the mean paired differences in AP, and the
    halves of their intervals, for each rival.
    """
    figure, panels = _style.figure(1, len(settings), sharey=True, height=4)
    for panel, (label, rows) in zip(panels, settings.items()):
        shifts = np.geomspace(0.96, 1.04, len(rows))  # so that no bar hides another
        for (name, points), style, shift in zip(rows.items(), RIVAL_STYLES, shifts, strict=True):
            values, means, halves = (np.array(x) for x in zip(*points))
            panel.errorbar(
                values * shift, means, np.nan_to_num(halves), marker="o", capsize=4,
                label=f"against {name}", **style,
            )  # fmt: skip
        panel.axhline(0, color=_style.INK, linewidth=1)
        panel.set(xscale="log", xlabel=label)
        ticks = [round(value) for value, *_ in next(iter(rows.values()))]
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
        panel.set_xticks([], minor=True)
    panels[0].set(ylabel="AP of focal loss less the other's")
    panels[0].set_title("mean of paired seeds, 95 % interval")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return _save(figure, path)
