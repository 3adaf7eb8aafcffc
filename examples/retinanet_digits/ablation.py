"""The paper's Table 1 in miniature, and at which imbalance which loss wins.

    python -m examples.retinanet_digits.ablation

follows the protocol of this folder's README.md: it tunes every loss, trains each with every
seed, does so once more with fewer and with more objects and with more steps, and writes the tables
into the README and the figures beside it; with other options than the protocol's, into a copy in
the folder of the results. It goes on where it was stopped.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from examples.retinanet_digits import figures
from examples.retinanet_digits.experiment import Run, bars, parse, result, two_at_a_time
from examples.retinanet_digits.train import Budget, Recipe, prepare

README = Path(__file__).parent / "README.md"
TABLES = "trials", "table", "imbalance", "steps"
# The AP that Lin et al. report for the like (Tables 1a and 1b, ResNet-50, 600 pixels).
RECIPES = {
    "CE": (Recipe(gamma=0, alpha=None), 30.2),
    "CE, alpha .75": (Recipe(gamma=0, alpha=0.75), 31.1),
    "CE, alpha .9": (Recipe(gamma=0, alpha=0.9), 30.8),
    "CE, alpha .95": (Recipe(gamma=0, alpha=0.95), None),
    "CE, alpha .99": (Recipe(gamma=0, alpha=0.99), 28.7),
    "FL, gamma .5, alpha .5": (Recipe(gamma=0.5, alpha=0.5), 32.9),
    "FL, gamma 1, alpha .25": (Recipe(gamma=1, alpha=0.25), 33.7),
    "FL, gamma 2, alpha .25": (Recipe(gamma=2, alpha=0.25), 34.0),
    "FL, gamma 5, alpha .25": (Recipe(gamma=5, alpha=0.25), 32.2),
    "CE, prior .0001": (Recipe(gamma=0, alpha=None, prior=1e-4), None),
    "CE, alpha .75, prior .0001": (Recipe(gamma=0, alpha=0.75, prior=1e-4), None),
    "FL, gamma 2, alpha .25, prior .0001": (Recipe(gamma=2, alpha=0.25, prior=1e-4), None),
    "CE, no prior": (Recipe(gamma=0, alpha=None, prior=None), None),
    "FL, gamma 2, alpha .25, no prior": (Recipe(gamma=2, alpha=0.25, prior=None), None),
}
BALANCED, FOCAL = "CE, alpha .75", "FL, gamma 2, alpha .25"  # which the test compares
# Beside the paper's alpha, the one that does best here; and a prior that fits the imbalance.
TUNED, FITTED = "CE, alpha .95", "CE, prior .0001"
RIVALS = ("CE", BALANCED, TUNED, FITTED, "CE, alpha .75, prior .0001")
COMPARED = (*RIVALS, FOCAL)
# Learning rate, weight of the class loss.
TRIALS = ((0.0007, 1.0), (0.002, 1.0), (0.006, 1.0), (0.015, 1.0), (0.006, 0.25), (0.006, 4.0))
TRIAL_SEED = 100
# Beside the main setting's: objects of the canvases in the mean, steps of training.
OBJECTS, STEPS = (4.0, 1.0), (3000,)


# ------------------------------------------------------------------------------- runs


def run_all(jobs: dict[str, Run], out: Path, progress) -> dict[str, dict]:
    """Return the result of every run, by its name."""
    whole = progress.add_task("runs", total=len(jobs), note="")

    def one(job: tuple[str, Run]) -> dict:
        name, run = job
        bar = progress.add_task(name, total=run.budget.steps, note="compiles")

        def tick(done: int, loss: float) -> None:
            progress.update(bar, completed=done, note=f"loss {loss:.3f}")

        found = result(run, out, tick)
        progress.remove_task(bar)
        progress.advance(whole)
        return found

    prepare(jobs.values())
    return dict(zip(jobs, two_at_a_time(one, jobs.items())))


def trials(losses: list[str], budget: Budget, out: Path, progress) -> dict[str, list[dict]]:
    """Return the results of the trials of each loss, in the order of `TRIALS`."""
    few = replace(budget, test_canvases=min(budget.test_canvases, 200))
    jobs = {
        f"{name}, rate {rate}, weight {weight:g}": Run(
            replace(RECIPES[name][0], learning_rate=rate, class_weight=weight),
            few, TRIAL_SEED, "validation",
        )
        for name in losses
        for rate, weight in TRIALS
    }  # fmt: skip
    found = list(run_all(jobs, out, progress).values())
    return {name: found[i * len(TRIALS) : (i + 1) * len(TRIALS)] for i, name in enumerate(losses)}


def chosen(tried: dict[str, list[dict]]) -> dict[str, Recipe]:
    """Return each loss with the learning rate and the weight that did best."""
    best = {name: max(found, key=lambda x: x["AP"]) for name, found in tried.items()}
    return {name: Recipe(**found["run"]["recipe"]) for name, found in best.items()}


# ------------------------------------------------------------------------------- words


def interval(runs: list[dict], others: list[dict]) -> tuple[float, float]:
    """Return the mean difference in AP of runs in pairs, and half of its 95 % interval.

    By Student's t; NaN for a single pair.
    """
    differences = [100 * (a["AP"] - b["AP"]) for a, b in zip(runs, others)]
    count = len(differences)
    if count < 2:
        return float(np.mean(differences)), float("nan")
    half = stats.t.ppf(0.975, count - 1) * np.std(differences, ddof=1) / count**0.5
    return float(np.mean(differences)), float(half)


def points(settings: Mapping[Any, dict]) -> dict[str, list[tuple]]:
    """Return for each rival of the focal loss the settings and the intervals there."""
    return {
        rival: [(x, *interval(rows[FOCAL], rows[rival])) for x, rows in settings.items()]
        for rival in RIVALS
    }


def mean_and_spread(runs: list[dict], score: str) -> str:
    """Return a score's mean in per cent, and of several runs its standard deviation."""
    values = [100 * run[score] for run in runs]
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def _difference(runs: list[dict], others: list[dict]) -> str:
    mean, half = interval(runs, others)
    between = f" ({mean - half:.1f} to {mean + half:.1f})" if np.isfinite(half) else ""
    return f"{mean:+.1f}{between}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = head, ["---"] * len(head), *rows
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def trials_table(tried: dict[str, list[dict]]) -> str:
    """Return the validation AP of every trial as Markdown."""
    rows = []
    for name, found in tried.items():
        cells = [f"{100 * x['AP']:.1f}" for x in found]
        best = int(np.argmax([x["AP"] for x in found]))
        cells[best] = f"**{cells[best]}**"
        rows.append([name, *cells])
    head = [f"rate {rate}, weight {weight:g}" for rate, weight in TRIALS]
    return _markdown(["loss", *head], rows)


def table(rows: dict[str, list[dict]]) -> str:
    """Return the results as Markdown."""
    lines = []
    for name, runs in rows.items():
        cells = [mean_and_spread(runs, score) for score in ("AP", "AP50", "AP75")]
        same = name == BALANCED or BALANCED not in rows
        cells.append("" if same else _difference(runs, rows[BALANCED]))
        paper = RECIPES[name][1]
        cells.append("not given" if paper is None else f"{paper}")
        lines.append([name, str(len(runs)), *cells])
    head = "loss", "seeds", "AP", "AP50", "AP75", "AP less balanced CE's, 95 %", "AP in the paper"
    return _markdown([*head], lines)


def settings_table(title: str, settings: Mapping[Any, dict]) -> str:
    """Return the AP of the compared losses in each setting, a column, as Markdown.

    Then focal loss's paired difference from each, with its 95 % interval.
    """
    runs = settings.values()
    lines = [["seeds", *(str(len(rows[FOCAL])) for rows in runs)]]
    for name in COMPARED:
        lines.append([name, *(mean_and_spread(rows[name], "AP") for rows in runs)])
    for rival in RIVALS:
        differences = (_difference(rows[FOCAL], rows[rival]) for rows in runs)
        lines.append([f"FL less {rival}", *differences])
    return _markdown(["", *map(title.format, settings)], lines)


def _split(page: str, name: str) -> tuple[str, str, str]:
    """Return what stands before, between and after the two comments of this name."""
    begin, end = f"<!-- {name}: written by ablation.py -->\n", f"<!-- end of {name} -->\n"
    if not page.count(begin) == page.count(end) == 1:
        raise ValueError(f"{README}: {begin.strip()} and {end.strip()} must stand there once each")
    before, rest = page.split(begin)
    lines, after = rest.split(end)
    return before + begin, lines, end + after


def written(page: str, name: str, lines: str) -> str:
    """Return a page with another table of this name."""
    before, _, after = _split(page, name)
    return before + lines + after


def recorded(name: str) -> str:
    """Return a table that the README has from the last ablation."""
    return _split(README.read_text(), name)[1]


# ------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    """Run what is left to run, then write the tables and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--other-seeds", type=int, default=5, help="of the other settings")
    parser.add_argument("--losses", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--other-objects", nargs="*", type=float, default=list(OBJECTS))
    parser.add_argument("--other-steps", nargs="*", type=int, default=list(STEPS))
    args, budget = parse(parser, argv)
    for name in TABLES:
        recorded(name)  # a missing mark is better found now than after an hour
    if missing := set(COMPARED) - set(args.losses):
        parser.error(f"--losses: {sorted(missing)} missing, which all others are compared with")
    with bars() as progress:
        tried = trials(args.losses, budget, args.out, progress)
        recipes = chosen(tried)
        others = [replace(budget, objects=x) for x in args.other_objects]
        others += [replace(budget, steps=x) for x in args.other_steps]
        seeds = {budget: range(args.seeds)} | dict.fromkeys(others, range(args.other_seeds))
        jobs = {
            (name, seed, setting): Run(recipes[name], setting, seed)
            for setting in seeds
            for seed in seeds[setting]
            for name in (recipes if setting == budget else COMPARED)
        }
        names = [
            f"{name}, seed {seed}, objects {setting.objects:g}, steps {setting.steps}"
            for name, seed, setting in jobs
        ]
        ended = run_all(dict(zip(names, jobs.values())), args.out, progress)
        found = dict(zip(jobs, ended.values()))

    def rows(losses, setting: Budget) -> dict[str, list[dict]]:
        return {name: [found[name, seed, setting] for seed in seeds[setting]] for name in losses}

    results = rows(recipes, budget)
    protocol = vars(parser.parse_args([f"--out={args.out}"]))
    folder = README.parent if vars(args) == protocol else args.out
    page = written(README.read_text(), "trials", trials_table(tried))
    page = written(page, "table", table(results))
    figures.ablation(
        {name: [100 * run["AP"] for run in runs] for name, runs in results.items()},
        {name: RECIPES[name][1] for name in results},
        folder / "ablation.png",
    )
    by_ratio = {
        figures.imbalance(x): rows(COMPARED, replace(budget, objects=x))
        for x in sorted({budget.objects, *args.other_objects}, reverse=True)
    }
    by_steps = {
        x: rows(COMPARED, replace(budget, steps=x))
        for x in sorted({budget.steps, *args.other_steps})
    }
    page = written(page, "imbalance", settings_table("{:,.0f} to 1", by_ratio))
    page = written(page, "steps", settings_table("{:,} steps", by_steps))
    figures.ahead(
        {"background anchors to each on an object": points(by_ratio), "steps": points(by_steps)},
        folder / "ahead.png",
    )
    (folder / README.name).write_text(page)
    print(f"Tables and figures: {folder / README.name}")
    return results


if __name__ == "__main__":
    main()
