"""Train a small RetinaNet twice, with cross entropy and with focal loss, and compare.

    python -m examples.retinanet_digits

Both start alike, with the prior in the last bias, and have the same budget of steps. A run
that was interrupted goes on from its last checkpoint.
"""

import argparse

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from examples.retinanet_digits import figures
from examples.retinanet_digits.experiment import Outcome, experiment, parse, test_set
from examples.retinanet_digits.train import Recipe

RECIPES = {"cross entropy": Recipe(gamma=0, alpha=None), "focal loss": Recipe()}


def show(outcomes: dict[str, Outcome], title: str, console: Console) -> None:
    """Print the table: a row for each loss."""
    table = Table("", "AP", "AP50", "AP75", title=title)
    for name, outcome in outcomes.items():
        table.add_row(name, *(f"{100 * score:.1f}" for score in outcome.scores.values()))
    console.print(table)


def main(argv: list[str] | None = None) -> dict[str, Outcome]:
    """Train, evaluate, print the table and save the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    args, budget = parse(parser, argv)
    console, outcomes = Console(), {}
    with Progress(console=console) as progress:
        for name, recipe in RECIPES.items():
            outcomes[name] = experiment(name, recipe, budget, args.seed, args.out, progress)

    show(outcomes, f"{budget.test_canvases} canvases of digits never trained on, %", console)
    focal, data = outcomes["focal loss"], test_set(budget)
    curves = {name: outcome.losses for name, outcome in outcomes.items()}
    pictures = (
        figures.detections(data, focal.found, args.out / "detections.png"),
        figures.losses(curves, args.out / "losses.png"),
        figures.loss_spread(data, focal.logits, args.out / "loss_spread.png"),
    )
    console.print("Pictures:", ", ".join(map(str, pictures)), soft_wrap=True)
    return outcomes


if __name__ == "__main__":
    main()
