"""The paper's Table 1 in miniature: which loss, and does it need the prior?

    python -m examples.retinanet_digits.ablation

trains every recipe with every seed, goes on where it was stopped, and writes the table and
the figure into this folder's README.md.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from examples.retinanet_digits import figures
from examples.retinanet_digits.experiment import experiment, parse, place
from examples.retinanet_digits.train import Budget, Recipe

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- table: written by ablation.py -->\n", "<!-- end of table -->\n"
# The AP that Lin et al. report for the like (Tables 1a and 1b, ResNet-50, 600 pixels).
RECIPES = {
    "CE, no prior": (Recipe(gamma=0, alpha=None, prior=None), None),
    "CE": (Recipe(gamma=0, alpha=None), 30.2),
    "CE, alpha .75": (Recipe(gamma=0, alpha=0.75), 31.1),
    "FL, gamma .5, alpha .5": (Recipe(gamma=0.5, alpha=0.5), 32.9),
    "FL, gamma 1, alpha .25": (Recipe(gamma=1, alpha=0.25), 33.7),
    "FL, gamma 2, alpha .25": (Recipe(gamma=2, alpha=0.25), 34.0),
    "FL, gamma 5, alpha .25": (Recipe(gamma=5, alpha=0.25), 32.2),
    "FL, gamma 2, alpha .25, no prior": (Recipe(gamma=2, alpha=0.25, prior=None), None),
}


def result(name: str, budget: Budget, seed: int, out: Path, progress: Progress) -> dict:
    """Return what a run came to: read, if it ended before, else found out and written."""
    recipe, _ = RECIPES[name]
    path = place(out, recipe, budget, seed).with_suffix(".json")
    if not path.exists():
        outcome = experiment(f"{name}, seed {seed}", recipe, budget, seed, out, progress)
        losses = outcome.losses.tolist()
        whole = path.with_suffix(".new")  # renamed when it is: no run leaves half a result
        whole.write_text(json.dumps(outcome.scores | {"name": name, "seed": seed, "loss": losses}))
        whole.replace(path)
    return json.loads(path.read_text())


def _cell(values: list[float]) -> str:
    spread = np.std(values, ddof=1) if len(values) > 1 else 0
    return f"{np.mean(values):.1f} ± {spread:.1f}"


def table(results: dict[str, list[dict]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| loss | AP | AP50 | AP75 | diverged | AP in the paper |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in results.items():
        cells = [_cell([100 * run[score] for run in runs]) for score in ("AP", "AP50", "AP75")]
        lost = sum(not all(map(math.isfinite, run["loss"])) for run in runs)
        paper = RECIPES[name][1]
        cells += [f"{lost} of {len(runs)}", "not given" if paper is None else f"{paper}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    """Run what is left to run, then write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--readme", type=Path, default=README)
    args, budget = parse(parser, argv)
    results = {name: [] for name in RECIPES}
    columns = *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        for seed in range(args.seeds):
            for name, runs in results.items():
                runs.append(result(name, budget, seed, args.out, progress))

    before, rest = args.readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    args.readme.write_text(before + BEGIN + table(results) + END + after)
    rows = {name: [100 * run["AP"] for run in runs] for name, runs in results.items()}
    paper = {name: ap for name, (_, ap) in RECIPES.items()}
    figures.ablation(rows, paper, args.readme.with_name("ablation.png"))
    return results


if __name__ == "__main__":
    main()
