"""Train a small RetinaNet with cross entropy, balanced cross entropy and the focal loss.

    python -m examples.retinanet_digits

The losses start with the prior .01 per class, as in the paper. Cross entropy is also trained with
the prior .0001, which fits the imbalance. The learning rate, the weight of the class loss and the
alpha of balanced cross entropy are tuned. All losses have the same seeds and the same number of
steps. An interrupted run resumes from its last checkpoint.

With the default options this takes about three minutes on two cores: four losses with two seeds.
`python -m examples.retinanet_digits.ablation` compares more losses with more seeds.
"""

import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from examples import common
from examples.retinanet_digits import figures
from examples.retinanet_digits.ablation import interval, mean_and_deviation, recorded_table
from examples.retinanet_digits.experiment import (
    Outcome,
    Run,
    evaluation_set,
    experiment,
    parse,
    progress_bars,
)
from examples.retinanet_digits.train import Recipe, prepare

PLAIN, BALANCED, FOCAL = "cross entropy", "balanced cross entropy", "focal loss"
SMALL_PRIOR = "cross entropy, prior .0001"
# The best trials of the ablation.
RECIPES = {
    PLAIN: Recipe(gamma=0, alpha=None, learning_rate=0.006),
    BALANCED: Recipe(gamma=0, alpha=0.95, learning_rate=0.006),
    SMALL_PRIOR: Recipe(gamma=0, alpha=None, learning_rate=0.006, class_weight=0.25, prior=1e-4),
    FOCAL: Recipe(gamma=2, alpha=0.25, learning_rate=0.006),
}


def show(outcomes: dict[str, list[Outcome]], title: str, console: Console) -> None:
    """Print the table: one row per loss."""
    seeds = len(outcomes[FOCAL])
    caption = common.seeds_caption(seeds)
    caption += " The default prior is .01. Balanced: alpha .95. Focal loss: gamma 2, alpha .25."
    rows = []
    for name, runs in outcomes.items():
        scores = [run.scores for run in runs]
        rows.append([name, *(mean_and_deviation(scores, score) for score in scores[0])])
    console.print(common.table(title, ("", "AP", "AP50", "AP75"), rows, caption))


def comparison(outcomes: dict[str, list[Outcome]], baseline: str) -> str:
    """Return the AP difference of the focal loss to a baseline, with its 95 % interval."""
    mean, half = interval(*([run.scores for run in outcomes[name]] for name in (FOCAL, baseline)))
    difference = f"AP of {FOCAL} minus AP of {baseline}: {mean:+.1f}"
    if np.isnan(half):
        return f"{difference} (one seed: no interval)"
    significance = "significant" if abs(mean) > half else "not significant"
    return f"{difference}, 95 % interval {mean - half:.1f} to {mean + half:.1f} ({significance})"


def summary(outcomes: dict[str, list[Outcome]]) -> str:
    """Return the differences of the focal loss to the baselines, one per line."""
    return "\n".join(comparison(outcomes, baseline) for baseline in (BALANCED, SMALL_PRIOR))


def main(argv: list[str] | None = None) -> dict[str, list[Outcome]]:
    """Train, evaluate, print the table and save the figures."""
    parser = common.parser("retinanet_digits", __doc__)
    parser.add_argument("--seeds", type=int, default=2, help="of weights, canvases and batches")
    args, budget = parse(parser, argv)
    console = Console()
    runs = {
        (name, seed): Run(recipe, budget, seed)
        for seed in range(args.seeds)
        for name, recipe in RECIPES.items()
    }
    with progress_bars(console) as progress:
        steps = budget.steps * len(runs)
        whole = progress.add_task("all runs", total=steps, note="drawing canvases")
        prepare(runs.values())  # the threads share its caches

        def run_one(job: tuple[tuple[str, int], Run]) -> Outcome:
            (name, seed), run = job
            bar = progress.add_task(f"{name}, seed {seed}", total=budget.steps, note="compiling")
            last = 0

            def on_step(done: int, loss: float) -> None:
                nonlocal last
                note = f"loss {loss:.3f}" if done else "compiling"
                progress.update(bar, completed=done, note=note)
                progress.update(whole, advance=done - last, note="training")
                last = done

            outcome = experiment(run, args.out, on_step)
            progress.update(bar, note=f"AP {100 * outcome.scores['AP']:.1f}")
            return outcome

        finished = dict(zip(runs, common.in_threads(run_one, runs.items())))
    outcomes = {name: [finished[name, seed] for seed in range(args.seeds)] for name in RECIPES}

    show(outcomes, f"Average precision on {budget.test_canvases} test canvases, %", console)
    first = {name: runs[0] for name, runs in outcomes.items()}
    data = evaluation_set(runs[FOCAL, 0])
    detections = {name: outcome.detections for name, outcome in first.items()}
    paths = (
        figures.detections(
            data,
            {name: detections[name] for name in (BALANCED, FOCAL)},
            args.out / "detections.png",
        ),
        figures.precision_recall(data, detections, args.out / "precision_recall.png"),
        figures.losses({name: x.losses for name, x in first.items()}, args.out / "losses.png"),
        figures.loss_spread(data, first[FOCAL].logits, args.out / "loss_spread.png"),
    )
    console.print("\nRecorded results of `make ablation`, with five seeds, AP in %:")
    console.print(Markdown(recorded_table("steps")))
    console.print("Figures:", ", ".join(map(str, paths)), soft_wrap=True)
    console.print(summary(outcomes), soft_wrap=True)
    return outcomes


if __name__ == "__main__":
    main()
