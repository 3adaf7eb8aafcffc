"""The pictures: detections, loss curves, the paper's Figure 4, and the ablation."""

from functools import partial
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

from examples.retinanet_digits.data import CLASSES, Canvases
from examples.retinanet_digits.evaluate import Detections, suppress
from examples.retinanet_digits.model import anchors
from focal_jax import sigmoid_focal_loss
from focal_jax.detection import BACKGROUND, match_anchors

GAMMAS = (0, 0.5, 1, 2, 5)
COLORS = ("#4477aa", "#66ccee", "#228833", "#ee6677", "#aa3377")
SURE = 0.3  # the least score that is drawn


def _save(figure: plt.Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def _axes(width: float, columns: int = 1):
    figure, axes = plt.subplots(1, columns, figsize=(width, 3.8), layout="constrained")
    for one in np.ravel(axes):
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
    return figure, axes


def _box(axes: plt.Axes, box: np.ndarray, text: str, color: str) -> None:
    x1, y1, x2, y2 = box
    axes.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color))
    axes.text(x1 + 1, y1 - 2, text, color=color, fontsize=7, clip_on=True)


def detections(data: Canvases, found: Detections, path: Path, columns: int = 5) -> Path:
    """Draw the ground truth of the first images, and below it what was found there."""
    figure, axes = plt.subplots(2, columns, figsize=(2 * columns, 4.3), layout="constrained")
    for (truth, guess), image, rows, boxes, classes, scores in zip(axes.T, *data, *found):
        for one in (truth, guess):
            one.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            one.set(xticks=[], yticks=[])
        for *box, label in rows[rows[:, 4] >= 0]:
            _box(truth, box, f"{label:.0f}", "#66ccee")
        sure = np.where(scores > SURE, scores, 0)
        one_class = np.zeros_like(classes)  # so that a place has one label
        for i in np.flatnonzero(suppress(boxes, one_class, sure)):
            _box(guess, boxes[i], f"{classes[i]} {scores[i]:.2f}", "#ccbb44")
    axes[0, 0].set_ylabel("truth")
    axes[1, 0].set_ylabel(f"found, score > {SURE}")
    return _save(figure, path)


def losses(curves: dict[str, np.ndarray], path: Path, window: int = 20) -> Path:
    """Draw running means of training losses, each in units of where it started."""
    figure, axes = _axes(6)
    for (name, curve), color in zip(curves.items(), COLORS[::3]):
        window = min(window, len(curve))
        mean = np.convolve(curve, np.full(window, 1 / window), "valid")
        axes.plot(np.arange(window, len(curve) + 1), mean / mean[0], color=color, label=name)
    axes.set(yscale="log", xlabel="step", ylabel="training loss / its start")
    axes.legend(frameon=False)
    return _save(figure, path)


def loss_spread(data: Canvases, logits: np.ndarray, path: Path) -> Path:
    """Draw the paper's Figure 4: which share of the anchors makes which share of the loss.

    The cumulative loss of the positive and of the background anchors of a trained network,
    sorted from the least, each curve normalized to end at 1.
    """
    match = jax.jit(jax.vmap(partial(match_anchors, anchors())))
    matches = np.asarray(match(data.annotations))
    labels = np.take_along_axis(data.annotations[..., 4], matches.clip(0), 1)
    classes = np.where(matches >= 0, labels, -1)[..., None] == np.arange(CLASSES)
    figure, panels = _axes(9, 2)
    for gamma, color in zip(GAMMAS, COLORS):
        anchor_losses = np.asarray(sigmoid_focal_loss(logits, classes, gamma=gamma)).sum(-1)
        for axes, chosen in zip(panels, (matches >= 0, matches == BACKGROUND)):
            total = np.cumsum(np.sort(anchor_losses[chosen].astype(np.float64)))
            share = np.linspace(0, 1, 1001)
            curve = np.interp(share, np.linspace(0, 1, len(total)), total / total[-1])
            axes.plot(share, curve, color=color, label=f"gamma {gamma}")
    for axes, name in zip(panels, ("positive", "background")):
        axes.set(xlabel=f"share of the {name} anchors", ylabel="cumulative share of their loss")
    panels[0].legend(frameon=False)
    return _save(figure, path)


def ablation(ours: dict[str, list[float]], theirs: dict[str, float | None], path: Path) -> Path:
    """Draw the AP of every recipe and seed, and below it the paper's."""
    figure, (here, paper) = plt.subplots(
        2, 1, figsize=(7.5, 5), sharex=True, layout="constrained", height_ratios=(3, 2)
    )
    for name, seeds in ours.items():
        here.bar(name, np.mean(seeds), color=COLORS[0], alpha=0.35)
        here.plot([name] * len(seeds), seeds, "o", color=COLORS[0], markersize=4)
        paper.bar(name, theirs[name] or 0, color=COLORS[3], alpha=0.5)
    paper.tick_params("x", rotation=25, labelsize=8)
    plt.setp(paper.get_xticklabels(), ha="right")
    here.set_ylabel("AP here, digits\n(dots: seeds)")
    paper.set_ylabel("AP in the paper,\nCOCO")
    for axes in (here, paper):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, axis="y")
    return _save(figure, path)
