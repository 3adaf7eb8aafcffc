"""One run from its recipe to its average precision; many of them, two at a time."""

import argparse
import json
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
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

from examples.retinanet_digits.data import Canvases, canvases
from examples.retinanet_digits.evaluate import Detections, average_precision, predict
from examples.retinanet_digits.train import Budget, Recipe, train


@dataclass(frozen=True)
class Run:
    """All that a result depends on."""

    recipe: Recipe
    budget: Budget
    seed: int
    part: str = "test"  # what it is judged by: "validation" while something is chosen


class Outcome(NamedTuple):
    """What came of a run."""

    losses: np.ndarray  # [steps, 2]: of the classes, of the boxes
    logits: np.ndarray  # [canvases, A, CLASSES]
    found: Detections
    scores: dict[str, float]  # AP, AP50, AP75


def place(out: Path, run: Run) -> Path:
    """Return the folder of a run, named by all that it depends on."""
    return out / "runs" / f"{zlib.crc32(repr(run).encode()):08x}"


def judged_by(run: Run) -> Canvases:
    """Return the canvases that a run is judged by, the same for every seed."""
    return canvases(run.part, run.budget.test_canvases, 0, run.budget.objects)


def bars(console=None) -> Progress:
    """Return bars with the step, the loss and the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def experiment(run: Run, out: Path, tick: Callable[[int, float], None]) -> Outcome:
    """Train, or go on training, and evaluate."""
    model, losses = train(run.recipe, run.budget, run.seed, place(out, run), tick)
    data = judged_by(run)
    logits, found = predict(model, data.images)
    return Outcome(losses, logits, found, average_precision(data, found))


def result(run: Run, out: Path, tick: Callable[[int, float], None]) -> dict:
    """Return what a run came to: read, if it ended before, else found out and written."""
    path = place(out, run).with_suffix(".json")
    if not path.exists():
        outcome = experiment(run, out, tick)
        found = outcome.scores | {
            "run": asdict(run),
            "last losses": outcome.losses[-100:].mean(0).tolist(),
        }
        whole = path.with_suffix(".new")  # renamed when it is: no run leaves half a result
        whole.write_text(json.dumps(found))
        whole.replace(path)
    return json.loads(path.read_text())


def two_at_a_time(function: Callable, jobs: Iterable) -> list:
    """Return the results of `function` for all jobs, in order.

    XLA's CPU backend keeps one core busy with a step of so small a network, so two runs take
    little longer than one. What is cached is made by one thread alone.
    """
    stop = threading.Event()

    def unless_stopped(job):
        if not stop.is_set():
            return function(job)

    with ThreadPoolExecutor(2) as pool:
        try:
            return list(pool.map(unless_stopped, jobs))
        except BaseException:
            stop.set()
            raise


def parse(parser: argparse.ArgumentParser, argv: list[str] | None):
    """Return the parsed options, and the budget that is among them."""
    parser.add_argument("--out", type=Path, default=Path("out/retinanet_digits"))
    for field in fields(Budget):
        name, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        if kind is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(name, action=action, default=field.default)
        else:
            parser.add_argument(name, type=kind, default=field.default)
    args = parser.parse_args(argv)
    return args, Budget(**{field.name: getattr(args, field.name) for field in fields(Budget)})
