"""One run from its recipe to its average precision, and the options of the command line."""

import argparse
import zlib
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import Progress

from examples.retinanet_digits.data import Canvases, canvases
from examples.retinanet_digits.evaluate import Detections, average_precision, predict
from examples.retinanet_digits.train import Budget, Recipe, train


class Outcome(NamedTuple):
    """What came of a run."""

    losses: np.ndarray  # [steps]
    logits: np.ndarray  # [test canvases, A, CLASSES]
    found: Detections
    scores: dict[str, float]  # AP, AP50, AP75


def place(out: Path, recipe: Recipe, budget: Budget, seed: int) -> Path:
    """Return the folder of a run, named by all that it depends on."""
    return out / "runs" / f"{zlib.crc32(repr((recipe, budget, seed)).encode()):08x}"


def test_set(budget: Budget) -> Canvases:
    """Return the canvases that every run is judged by."""
    return canvases("test", budget.test_canvases, 0)


def experiment(
    name: str, recipe: Recipe, budget: Budget, seed: int, out: Path, progress: Progress
) -> Outcome:
    """Train, or go on training, and evaluate; the bar has the run's name."""
    task = progress.add_task(name, total=budget.steps)

    def tick(done: int) -> None:
        progress.update(task, completed=done)

    model, losses = train(recipe, budget, seed, place(out, recipe, budget, seed), tick)
    data = test_set(budget)
    logits, found = predict(model, data.images)
    return Outcome(losses, logits, found, average_precision(data, found))


def parse(parser: argparse.ArgumentParser, argv: list[str] | None):
    """Return the parsed options, and the budget that is among them."""
    parser.add_argument("--out", type=Path, default=Path("out/retinanet_digits"))
    for field in fields(Budget):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default)
    args = parser.parse_args(argv)
    return args, Budget(**{field.name: getattr(args, field.name) for field in fields(Budget)})
