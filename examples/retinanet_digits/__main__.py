"""Train a small RetinaNet with three losses, side by side, and compare what they find.

    python -m examples.retinanet_digits

Cross entropy, alpha-balanced cross entropy and focal loss start with the prior of the paper, .01
for each class; cross entropy once more with .0001, which fits the imbalance. Each has the learning
rate and the weight that trials chose for it, balanced cross entropy its alpha too, and the same
seeds and the same budget of steps.
A run that was interrupted goes on from its last checkpoint.
"""

import argparse

import numpy as np
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from examples.retinanet_digits import figures
from examples.retinanet_digits.ablation import interval, mean_and_spread, recorded
from examples.retinanet_digits.experiment import (
    Outcome,
    Run,
    bars,
    experiment,
    judged_by,
    parse,
    two_at_a_time,
)
from examples.retinanet_digits.train import Recipe, prepare

PLAIN, BALANCED, FOCAL = "cross entropy", "balanced cross entropy", "focal loss"
FITTED = "cross entropy, prior .0001"
# As the trials of the ablation chose.
RECIPES = {
    PLAIN: Recipe(gamma=0, alpha=None, learning_rate=0.006),
    BALANCED: Recipe(gamma=0, alpha=0.95, learning_rate=0.006),
    FITTED: Recipe(gamma=0, alpha=None, learning_rate=0.006, class_weight=0.25, prior=1e-4),
    FOCAL: Recipe(gamma=2, alpha=0.25, learning_rate=0.006),
}


def show(outcomes: dict[str, list[Outcome]], title: str, console: Console) -> None:
    """Print the table: a row for each loss."""
    seeds = len(outcomes[FOCAL])
    caption = f"Mean ± standard deviation of {seeds} seeds." if seeds > 1 else "One seed."
    caption += (
        " Prior .01 where none is given; balanced: alpha .95; focal loss: gamma 2, alpha .25."
    )
    table = Table("", "AP", "AP50", "AP75", title=title, caption=caption)
    for name, runs in outcomes.items():
        scores = [run.scores for run in runs]
        table.add_row(name, *(mean_and_spread(scores, score) for score in scores[0]))
    console.print(table)


def compared(outcomes: dict[str, list[Outcome]], rival: str) -> str:
    """Return how far apart focal loss and a rival are, and how sure that is."""
    mean, half = interval(*([run.scores for run in outcomes[name]] for name in (FOCAL, rival)))
    seen = f"{abs(mean):.1f} AP {'more' if mean >= 0 else 'less'} than {rival}"
    if np.isnan(half):
        return f"{seen} (one seed cannot tell whether by chance)"
    sure = "not by chance alone" if abs(mean) > half else "perhaps by chance"
    return f"{seen} (95 % interval {mean - half:+.1f} to {mean + half:+.1f}: {sure})"


def summary(outcomes: dict[str, list[Outcome]]) -> str:
    """Return one sentence of what was seen."""
    both = " and ".join(compared(outcomes, rival) for rival in (BALANCED, FITTED))
    return (
        f"Focal loss has {both}; `make ablation` has more losses, seeds, imbalances and steps, and "
        "examples/retinanet_digits/README.md what came of it."
    )


def main(argv: list[str] | None = None) -> dict[str, list[Outcome]]:
    """Train, evaluate, print the table and save the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    args, budget = parse(parser, argv)
    console = Console()
    runs = {
        (name, seed): Run(recipe, budget, seed)
        for seed in range(args.seeds)
        for name, recipe in RECIPES.items()
    }
    with bars(console) as progress:
        steps = budget.steps * len(runs)
        whole = progress.add_task("all runs", total=steps, note="draws canvases")
        prepare(runs.values())

        def one(job: tuple[tuple[str, int], Run]) -> Outcome:
            (name, seed), run = job
            bar = progress.add_task(f"{name}, seed {seed}", total=budget.steps, note="compiles")
            last = 0

            def tick(done: int, loss: float) -> None:
                nonlocal last
                note = f"loss {loss:.3f}" if done else "compiles"
                progress.update(bar, completed=done, note=note)
                progress.update(whole, advance=done - last, note="trains")
                last = done

            outcome = experiment(run, args.out, tick)
            progress.update(bar, note=f"AP {100 * outcome.scores['AP']:.1f}")
            return outcome

        found = dict(zip(runs, two_at_a_time(one, runs.items())))
    outcomes = {name: [found[name, seed] for seed in range(args.seeds)] for name in RECIPES}

    show(outcomes, f"{budget.test_canvases} canvases of digits never trained on, %", console)
    first, data = {name: runs[0] for name, runs in outcomes.items()}, judged_by(runs[FOCAL, 0])
    seen = {name: run.found for name, run in first.items()}
    pictures = (
        figures.detections(
            data, {name: seen[name] for name in (BALANCED, FOCAL)}, args.out / "detections.png"
        ),
        figures.precision_recall(data, seen, args.out / "precision_recall.png"),
        figures.losses({name: run.losses for name, run in first.items()}, args.out / "losses.png"),
        figures.loss_spread(data, first[FOCAL].logits, args.out / "loss_spread.png"),
    )
    console.print(
        "\nWith more seeds and three times the steps, by the last `make ablation`, AP in %:"
    )
    console.print(Markdown(recorded("steps")))
    console.print("Pictures:", ", ".join(map(str, pictures)), soft_wrap=True)
    console.print(summary(outcomes), soft_wrap=True)
    return outcomes


if __name__ == "__main__":
    main()
