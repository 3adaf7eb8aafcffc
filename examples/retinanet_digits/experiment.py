"""Run experiments, from the recipe to the average precision, two at a time."""

import argparse
import json
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from examples import common
from examples.retinanet_digits.data import Canvases, canvases
from examples.retinanet_digits.evaluate import Detections, average_precision, predict
from examples.retinanet_digits.train import Budget, Recipe, train


@dataclass(frozen=True)
class Run:
    """Everything that a result depends on."""

    recipe: Recipe
    budget: Budget
    seed: int
    part: str = "test"  # the evaluation set; "validation" for tuning


class Outcome(NamedTuple):
    """The result of a run."""

    losses: np.ndarray  # [steps, 2]: class loss, box loss
    logits: np.ndarray  # [canvases, A, CLASSES]
    detections: Detections
    scores: dict[str, float]  # AP, AP50, AP75


BUDGET_HELP = {
    "steps": "of each run",
    "batch": "canvases per step",
    "canvases": "for the training",
    "test_canvases": "for the evaluation",
    "objects": "mean number of digits per canvas",
    "pretrained": "start from the pretrained backbone",
    "save_every": "number of steps between checkpoints",
}


def run_folder(out: Path, run: Run) -> Path:
    """Return the folder of a run. Its name is a hash of everything that the run depends on."""
    return out / "runs" / f"{zlib.crc32(repr(run).encode()):08x}"


def evaluation_set(run: Run) -> Canvases:
    """Return the canvases for the evaluation of a run, which are the same for every seed."""
    return canvases(run.part, run.budget.test_canvases, 0, run.budget.objects)


def progress_bars(console=None) -> Progress:
    """Return progress bars with the step, a note and the remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def experiment(run: Run, out: Path, on_step: Callable[[int, float], None]) -> Outcome:
    """Train, from the last checkpoint if there is one, and evaluate."""
    model, losses = train(run.recipe, run.budget, run.seed, run_folder(out, run), on_step)
    data = evaluation_set(run)
    logits, detections = predict(model, data.images)
    return Outcome(losses, logits, detections, average_precision(data, detections))


def result(run: Run, out: Path, on_step: Callable[[int, float], None]) -> dict:
    """Return the result of a run from its file, or run the experiment and write the file."""
    path = run_folder(out, run).with_suffix(".json")
    if not path.exists():
        outcome = experiment(run, out, on_step)
        content = outcome.scores | {
            "run": asdict(run),
            "last losses": outcome.losses[-100:].mean(0).tolist(),
        }
        common.write(path, lambda new: new.write_text(json.dumps(content)))
    return json.loads(path.read_text())


def parse(parser: argparse.ArgumentParser, argv: list[str] | None):
    """Return the parsed options and the budget."""
    out = Path("out/retinanet_digits")
    parser.add_argument("--out", type=Path, default=out, help="folder of runs and figures")
    for field in fields(Budget):
        name, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        options = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(name, default=field.default, help=BUDGET_HELP[field.name], **options)
    args = parser.parse_args(argv)
    return args, Budget(**{field.name: getattr(args, field.name) for field in fields(Budget)})
