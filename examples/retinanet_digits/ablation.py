"""Run an ablation like Table 1 of the focal loss paper, for several imbalances and budgets.

    python -m examples.retinanet_digits.ablation

follows the protocol in README.md of this folder: tune every loss, train every loss with every seed,
repeat the training with other numbers of objects and steps, and write the tables into results.md
and the figures into this folder. The option --losses selects rows; results.md keeps the other rows.
If other options differ from the protocol, the output goes to the folder of the results instead. An
interrupted ablation resumes.

On two cores, two runs take about half a minute. Most losses have 6 trials, 5 runs with 1,000 steps
and 5 runs with 3,000 steps: about 8 minutes. All rows take about two hours.

    python -m examples.retinanet_digits.ablation --losses "CE, prior .001"
    python -m examples.retinanet_digits.ablation --figures    # only draws the tables of results.md
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from examples import common
from examples.retinanet_digits import figures
from examples.retinanet_digits.experiment import Run, parse, progress_bars, result
from examples.retinanet_digits.train import Budget, Recipe, prepare

RESULTS = Path(__file__).parent / "results.md"
TABLES = "trials", "table", "imbalance", "steps"
# Each recipe, and the AP of the same loss on COCO (Lin et al., Tables 1a and 1b).
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
    "CE, prior .001": (Recipe(gamma=0, alpha=None, prior=1e-3), None),
    "FL, gamma 2, alpha .5": (Recipe(gamma=2, alpha=0.5), None),
    "FL, gamma 2, alpha .75": (Recipe(gamma=2, alpha=0.75), None),
    "FL, gamma 2, alpha .25, prior .001": (Recipe(gamma=2, alpha=0.25, prior=1e-3), None),
    "FL, gamma 2, alpha .5, prior .001": (Recipe(gamma=2, alpha=0.5, prior=1e-3), None),
    "FL, gamma 2, alpha .75, prior .001": (Recipe(gamma=2, alpha=0.75, prior=1e-3), None),
}
# The last rows, which give the focal loss as many settings as cross entropy has.
ADDED = tuple(RECIPES)[-6:]
# The protocol tests the difference of these two.
BALANCED, FOCAL = "CE, alpha .75", "FL, gamma 2, alpha .25"
# The best alpha on digits, and a prior that fits the imbalance.
BEST_ALPHA, SMALL_PRIOR = "CE, alpha .95", "CE, prior .0001"
BASELINES = ("CE", BALANCED, BEST_ALPHA, SMALL_PRIOR, "CE, alpha .75, prior .0001")
COMPARED = (*BASELINES, FOCAL)
# Learning rate and weight of the class loss.
TRIALS = ((0.0007, 1.0), (0.002, 1.0), (0.006, 1.0), (0.015, 1.0), (0.006, 0.25), (0.006, 4.0))
TRIAL_SEED = 100
# The other settings: mean number of objects per canvas, number of steps.
OBJECTS, STEPS = (4.0, 1.0), (3000,)


# ---------------------------------------------------------------- runs


def run_all(jobs: dict[str, Run], out: Path, progress) -> dict[str, dict]:
    """Return the results of all runs, by name."""
    whole = progress.add_task("runs", total=len(jobs), note="")

    def one(job: tuple[str, Run]) -> dict:
        name, run = job
        bar = progress.add_task(name, total=run.budget.steps, note="compiling")

        def on_step(done: int, loss: float) -> None:
            progress.update(bar, completed=done, note=f"loss {loss:.3f}")

        scores = result(run, out, on_step)
        progress.remove_task(bar)
        progress.advance(whole)
        return scores

    prepare(jobs.values())  # the threads share its caches
    return dict(zip(jobs, common.in_threads(one, jobs.items())))


def trials(losses: list[str], budget: Budget, out: Path, progress) -> dict[str, list[dict]]:
    """Return the results of the trials of each loss, in the order of `TRIALS`."""
    budget = replace(budget, test_canvases=min(budget.test_canvases, 200))
    jobs = {
        f"{name}, rate {rate}, weight {weight:g}": Run(
            replace(RECIPES[name][0], learning_rate=rate, class_weight=weight),
            budget, TRIAL_SEED, "validation",
        )
        for name in losses
        for rate, weight in TRIALS
    }  # fmt: skip
    results = list(run_all(jobs, out, progress).values())
    return {name: results[i * len(TRIALS) : (i + 1) * len(TRIALS)] for i, name in enumerate(losses)}


def best_recipes(trial_results: dict[str, list[dict]]) -> dict[str, Recipe]:
    """Return the recipe of the best trial of each loss."""
    best = {name: max(results, key=lambda x: x["AP"]) for name, results in trial_results.items()}
    return {name: Recipe(**result["run"]["recipe"]) for name, result in best.items()}


# ---------------------------------------------------------------- tables


def interval(runs: list[dict], others: list[dict]) -> tuple[float, float]:
    """Return the mean of the paired AP differences and half of the width of its 95 % interval.

    The interval is that of Student's t. It is NaN for a single pair.
    """
    differences = [100 * (a["AP"] - b["AP"]) for a, b in zip(runs, others)]
    count = len(differences)
    if count < 2:
        return float(np.mean(differences)), float("nan")
    half = stats.t.ppf(0.975, count - 1) * np.std(differences, ddof=1) / count**0.5
    return float(np.mean(differences)), float(half)


def mean_and_deviation(runs: list[dict], score: str) -> str:
    """Return the mean of a score in percent, with the standard deviation of several runs."""
    return common.mean_and_deviation(100 * run[score] for run in runs)


def _difference(runs: list[dict], others: list[dict]) -> str:
    mean, half = interval(runs, others)
    limits = f" ({mean - half:.1f} to {mean + half:.1f})" if np.isfinite(half) else ""
    return f"{mean:+.1f}{limits}"


def trials_table(trial_results: dict[str, list[dict]]) -> str:
    """Return the validation AP of all trials as a Markdown table."""
    rows = []
    for name, results in trial_results.items():
        cells = [f"{100 * x['AP']:.1f}" for x in results]
        best = int(np.argmax([x["AP"] for x in results]))
        cells[best] = f"**{cells[best]}**"
        rows.append([name, *cells])
    head = [f"rate {rate}, weight {weight:g}" for rate, weight in TRIALS]
    return common.markdown(["loss", *head], rows)


def table(rows: dict[str, list[dict]]) -> str:
    """Return the results of the main setting as a Markdown table."""
    lines = []
    for name, runs in rows.items():
        cells = [mean_and_deviation(runs, score) for score in ("AP", "AP50", "AP75")]
        same = name == BALANCED or BALANCED not in rows
        cells.append("" if same else _difference(runs, rows[BALANCED]))
        paper = RECIPES[name][1]
        cells.append("not given" if paper is None else f"{paper}")
        lines.append([name, str(len(runs)), *cells])
    difference = f"AP minus AP of {BALANCED}, 95 % interval"
    head = "loss", "seeds", "AP", "AP50", "AP75", difference, "AP on COCO"
    return common.markdown([*head], lines)


def settings_table(title: str, settings: Mapping[Any, dict]) -> str:
    """Return a Markdown table with one column per setting.

    The rows are the AP of the losses, then the paired differences of the focal loss to its
    baselines with their 95 % intervals.
    """
    runs = list(settings.values())
    lines = [["seeds", *(str(len(next(iter(rows.values())))) for rows in runs)]]
    for name in runs[0]:
        lines.append([name, *(mean_and_deviation(rows[name], "AP") for rows in runs)])
    for baseline in BASELINES:
        if {baseline, FOCAL} <= set(runs[0]):
            differences = (_difference(rows[FOCAL], rows[baseline]) for rows in runs)
            lines.append([f"FL minus {baseline}", *differences])
    return common.markdown(["", *map(title.format, settings)], lines)


def _cells(lines: str) -> list[list[str]]:
    """Return the cells of a Markdown table, with its head, without its rule."""
    rows = [[x.strip() for x in line.strip()[1:-1].split("|")] for line in lines.splitlines()]
    return rows[:1] + rows[2:]


def merge_tables(old: str, new: str) -> str:
    """Return the old table with the rows of the new one; differences come last."""
    (head, *rows), (new_head, *new_rows) = _cells(old), _cells(new)
    if head != new_head:
        raise ValueError(f"{RESULTS}: got a table with the head {head}, wanted {new_head}")
    by_name = {row[0]: row for row in rows + new_rows}
    order = sorted(by_name, key=lambda name: name.startswith("FL minus"))  # a stable sort
    return common.markdown(head, [by_name[name] for name in order])


def _split(page: str, name: str) -> tuple[str, str, str]:
    """Return the text before, between and after the two comments with a name."""
    begin, end = f"<!-- {name}: written by ablation.py -->\n", f"<!-- end of {name} -->\n"
    if not page.count(begin) == page.count(end) == 1:
        raise ValueError(f"{RESULTS}: {begin.strip()} and {end.strip()} must occur exactly once")
    before, rest = page.split(begin)
    lines, after = rest.split(end)
    return before + begin, lines, end + after


def replace_table(page: str, name: str, lines: str) -> str:
    """Return the page with a new table between the comments with a name."""
    before, _, after = _split(page, name)
    return before + lines + after


def recorded_table(name: str) -> str:
    """Return a table of results.md, which the last ablation wrote."""
    return _split(RESULTS.read_text(), name)[1]


# ---------------------------------------------------------------- figures

_DIFFERENCE = re.compile(r"([+-][\d.]+)(?: \((-?[\d.]+) to (-?[\d.]+)\))?")


def _points(lines: str) -> dict[str, list[tuple[float, ...]]]:
    """Return setting, mean and limits of the differences in a table, for each baseline."""
    (_, *titles), *rows = _cells(lines)
    settings = [float(title.split()[0].replace(",", "")) for title in titles]
    points = {}
    for name, *cells in rows:
        if name.startswith("FL minus "):
            found = [_DIFFERENCE.fullmatch(cell).groups() for cell in cells]
            limits = [(float(m), float(a or m), float(b or m)) for m, a, b in found]
            points[name.removeprefix("FL minus ")] = [(x, *y) for x, y in zip(settings, limits)]
    return points


def draw(page: str, folder: Path) -> None:
    """Draw the figures of the tables of a page."""
    rows = {}
    for name, _, ap, *_, coco in _cells(_split(page, "table")[1])[1:]:
        mean, _, deviation = ap.partition(" ± ")
        rows[name] = float(mean), float(deviation or 0), RECIPES[name][1] and float(coco)
    figures.ablation(rows, folder / "ablation.png")
    settings = {
        "background anchors per positive anchor": _points(_split(page, "imbalance")[1]),
        "steps": _points(_split(page, "steps")[1]),
    }
    if all(settings.values()):
        figures.ap_differences(settings, folder / "ap_differences.png")


# ---------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    """Run the experiments that have no result yet, then write the tables and the figures."""
    parser = common.parser("retinanet_digits.ablation", __doc__)
    parser.add_argument("--seeds", type=int, default=5, help="of the main setting")
    parser.add_argument("--other-seeds", type=int, default=5, help="of the other settings")
    losses = {"default": list(RECIPES), "choices": list(RECIPES), "metavar": "LOSS"}
    parser.add_argument("--losses", nargs="+", help="the rows to run", **losses)
    parser.add_argument(
        "--other-objects", type=float, nargs="*", default=list(OBJECTS), help="per canvas"
    )
    parser.add_argument("--other-steps", type=int, nargs="*", default=list(STEPS), help="of a run")
    parser.add_argument("--figures", action="store_true", help="only draw the recorded tables")
    args, budget = parse(parser, argv)
    if args.figures:
        draw(RESULTS.read_text(), RESULTS.parent)
        return {}
    for name in TABLES:
        recorded_table(name)  # fails before the runs if a comment is missing
    compared = [name for name in COMPARED if name in args.losses]
    more = [*compared, *(name for name in ADDED if name in args.losses)]
    with progress_bars() as progress:
        trial_results = trials(args.losses, budget, args.out, progress)
        recipes = best_recipes(trial_results)
        by_objects = [replace(budget, objects=x) for x in args.other_objects]
        by_steps = [replace(budget, steps=x) for x in args.other_steps]
        seeds = {budget: range(args.seeds)}
        seeds |= dict.fromkeys(by_objects + by_steps, range(args.other_seeds))
        names = dict.fromkeys(by_objects, compared) | dict.fromkeys(by_steps, more)
        names[budget] = args.losses
        jobs = {
            (name, seed, setting): Run(recipes[name], setting, seed)
            for setting in seeds
            for seed in seeds[setting]
            for name in names[setting]
        }
        titles = [
            f"{name}, seed {seed}, objects {setting.objects:g}, steps {setting.steps}"
            for name, seed, setting in jobs
        ]
        finished = run_all(dict(zip(titles, jobs.values())), args.out, progress)
        scores = dict(zip(jobs, finished.values()))

    def rows(losses, setting: Budget) -> dict[str, list[dict]]:
        return {name: [scores[name, seed, setting] for seed in seeds[setting]] for name in losses}

    results = rows(args.losses, budget)
    tables = {"trials": trials_table(trial_results), "table": table(results)}
    by_ratio = sorted([budget, *by_objects], key=lambda x: -x.objects)
    ratios = {figures.imbalance(x.objects): rows(compared, x) for x in by_ratio if compared}
    steps = {x.steps: rows(more, x) for x in sorted([budget, *by_steps], key=lambda x: x.steps)}
    if compared:
        tables["imbalance"] = settings_table("{:,.0f} to 1", ratios)
    if more:
        tables["steps"] = settings_table("{:,} steps", steps)
    defaults = vars(parser.parse_args([f"--out={args.out}", "--losses", *args.losses]))
    by_protocol = vars(args) == defaults
    page = RESULTS.read_text()
    for name, lines in tables.items():
        merged = merge_tables(_split(page, name)[1], lines) if by_protocol else lines
        page = replace_table(page, name, merged)
    folder = RESULTS.parent if by_protocol else args.out
    draw(page, folder)
    common.write(folder / RESULTS.name, lambda path: path.write_text(page))
    print(f"Tables and figures: {folder / RESULTS.name}")
    return results


if __name__ == "__main__":
    main()
