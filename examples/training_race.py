"""Train one network with focal_jax and with two plain JAX formulas, in float32 and bfloat16.

The network has two hidden layers of 256 units. It classifies the digits of scikit-learn: the first
1,000 are for training, the others for the test. All runs have the same initial weights, the same
batches and the same softmax focal loss. They differ in its implementation:

    focal_jax                  softmax_focal_loss_with_integer_labels
    plain JAX (optax)          (1 - exp(-ce))**gamma * ce, with optax's cross entropy ce
    plain JAX (log_softmax)    -(1 - exp(log_p))**gamma * log_p

In bfloat16 the layers compute in bfloat16; their parameters are float32. A run ends at its first
NaN, because all later steps would be NaN. The program prints a table and draws the loss by step.

    python -m examples.training_race              # about 30 seconds on two cores
    python -m examples.training_race --gamma 2    # no formula is NaN
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from sklearn.datasets import load_digits

from examples import common
from focal_jax import softmax_focal_loss_with_integer_labels
from focal_jax.measure import style

TRAINING = 1000  # images; the others are for the test
SEGMENT = 50  # steps of one compiled program, after which the display is updated
ADAM = optax.adam(1e-3)
BATCH = 128
DTYPES = "float32", "bfloat16"


# ---------------------------------------------------------------- formulas


def from_cross_entropy(logits, labels, gamma):
    """Return the formula on top of optax's cross entropy."""
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (1 - jnp.exp(-ce)) ** gamma * ce


def from_log_softmax(logits, labels, gamma):
    """Return the formula on top of `log_softmax`."""
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1)[:, 0]
    return -((1 - jnp.exp(log_p)) ** gamma) * log_p


FOCAL_JAX = "focal_jax"
FORMULAS: dict[str, Callable] = {
    FOCAL_JAX: lambda logits, labels, gamma: softmax_focal_loss_with_integer_labels(
        logits, labels, gamma=gamma
    ),
    "plain JAX (optax)": from_cross_entropy,
    "plain JAX (log_softmax)": from_log_softmax,
}


@cache  # JAX compiles again for a new function
def loss_function(formula: Callable, gamma: float) -> Callable:
    """Return a formula with a fixed gamma."""
    return partial(formula, gamma=gamma)


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Run:
    """A run: its name, its loss of logits and labels, and the dtype of the layers."""

    name: str
    loss: Callable
    dtype: str = "float32"
    seed: int = 0


class Curve(NamedTuple):
    """The result of a run."""

    losses: np.ndarray  # [steps], up to the first NaN
    accuracies: tuple[float, float]  # on training and on test images; NaN if the loss is NaN
    parameters: list

    @property
    def nan_step(self) -> int | None:
        """The first step whose loss is NaN, or None. The first step is 1."""
        return len(self.losses) if np.isnan(self.losses[-1]) else None


class Data(NamedTuple):
    """Training and test images with their labels."""

    images: jax.Array
    labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array


@cache
def digits() -> Data:
    """Return the digits, with pixels in [0, 1]."""
    data = load_digits()
    images, labels = data.data.astype(np.float32) / 16, data.target.astype(np.int32)
    halves = images[:TRAINING], labels[:TRAINING], images[TRAINING:], labels[TRAINING:]
    return Data(*map(jnp.asarray, halves))


def initial(seed: int, sizes: Sequence[int] = (64, 256, 256, 10)) -> list:
    """Return the weights and biases of the layers."""
    # NumPy draws the random numbers: XLA takes seconds to compile those of JAX.
    random = np.random.default_rng(seed)
    pairs = pairwise(sizes)
    return [(np.float32(random.normal(0, a**-0.5, (a, b))), np.zeros(b, "f4")) for a, b in pairs]


def network(parameters: list, images: jax.Array, dtype: str) -> jax.Array:
    """Return the logits, which have the dtype of the layers."""
    x = images.astype(dtype)
    for number, layer in enumerate(parameters):
        weights, bias = (array.astype(dtype) for array in layer)
        x = (jax.nn.relu(x) if number else x) @ weights + bias
    return x


@partial(jax.jit, static_argnames=("loss", "dtype"))
def train_segment(state, batches, images, labels, *, loss: Callable, dtype: str):
    """Train on batches of indices, `[steps, batch]`; return the state and the losses."""

    def step(state, batch):
        parameters, moments = state

        def mean_loss(parameters):
            logits = network(parameters, images[batch], dtype)
            return loss(logits, labels[batch]).astype(jnp.float32).mean()

        value, gradients = jax.value_and_grad(mean_loss)(parameters)
        updates, moments = ADAM.update(gradients, moments)
        return (optax.apply_updates(parameters, updates), moments), value

    return jax.lax.scan(step, state, batches)


@partial(jax.jit, static_argnames="dtype")
def accuracy(parameters, images, labels, dtype: str):
    """Return the share of correctly classified images."""
    return (network(parameters, images, dtype).argmax(-1) == labels).mean()


def train(
    run: Run,
    steps: int,
    on_segment: Callable[[np.ndarray, tuple], object] = lambda losses, accuracies: None,
    *,
    data: Data | None = None,
    parameters: list | None = None,
) -> Curve:
    """Train a network until a loss is NaN.

    Args:
      run: the loss, the dtype and the seed.
      steps: the number of steps, a multiple of `SEGMENT`.
      on_segment: is called with all losses so far and the accuracies, after each segment.
      data: the images and the labels, by default the digits.
      parameters: the initial parameters, by default those of the seed.

    Returns:
      The losses and the accuracies.
    """
    data, parameters = data or digits(), parameters or initial(run.seed)
    state, losses, accuracies = (parameters, ADAM.init(parameters)), np.zeros(0), (np.nan, np.nan)
    random = np.random.default_rng((run.seed, 1))
    for _ in range(steps // SEGMENT):
        common.stop_if_interrupted()
        batches = random.integers(len(data.labels), size=(SEGMENT, BATCH), dtype=np.int32)
        state, new = train_segment(
            state, batches, data.images, data.labels, loss=run.loss, dtype=run.dtype
        )
        losses = np.append(losses, new)
        if np.isnan(losses).any():
            losses, accuracies = losses[: np.isnan(losses).argmax() + 1], (np.nan, np.nan)
            on_segment(losses, accuracies)
            break
        sets = data[:2], data[2:]
        accuracies = tuple(float(accuracy(state[0], *x, dtype=run.dtype)) for x in sets)
        on_segment(losses, accuracies)
    return Curve(losses, accuracies, state[0])


def race(runs: Iterable[Run], steps: int, console: Console) -> dict[Run, Curve]:
    """Train all runs at the same time and show them in one display."""
    runs = list(runs)
    columns = TextColumn("{task.description}"), BarColumn(8), TextColumn("{task.fields[note]}")
    with Progress(*columns, console=console) as progress:
        bars = {
            run: progress.add_task(f"{run.dtype:8} {run.name:23}", total=steps, note="compiling")
            for run in runs
        }

        def one(run: Run) -> Curve:
            def show(losses: np.ndarray, accuracies: tuple) -> None:
                training, test = (f"{100 * rate:.1f}" for rate in accuracies)
                note = f"loss {losses[-1]:.0e}  training {training} %  test {test} %"
                if np.isnan(losses[-1]):
                    note = f"[red]NaN at step {len(losses):,}[/]"
                progress.update(bars[run], completed=len(losses), note=note)

            return train(run, steps, show)

        curves = common.in_threads(one, runs, threads=len(runs))
    return dict(zip(runs, curves))


# ---------------------------------------------------------------- report


def show(curves: dict[Run, Curve], gamma: float, console: Console) -> None:
    """Print the table: one row per run."""
    rows = [
        (
            f"{run.dtype}, {run.name}",
            "none" if curve.nan_step is None else f"{curve.nan_step:,}",
            "NaN" if curve.nan_step else f"{curve.losses[-1]:.0e}",
            *("" if np.isnan(rate) else f"{100 * rate:.1f}" for rate in curve.accuracies),
        )
        for run, curve in curves.items()
    ]
    head = "", "NaN at step", "last loss", "training", "test"
    caption = "Training and test: accuracy in % after the last step."
    console.print(common.table(f"Focal loss, gamma {gamma:g}", head, rows, caption))


def sentence(curves: dict[Run, Curve], gamma: float) -> str:
    """Return which runs became NaN at which step."""
    failed = [
        f"{run.name} in {run.dtype} at step {curve.nan_step:,}"
        for run, curve in curves.items()
        if curve.nan_step is not None
    ]
    finite = [f"{x.name} in {x.dtype}" for x, curve in curves.items() if curve.nan_step is None]
    parts = [f"NaN: {'; '.join(failed)}"] * bool(failed)
    parts += [f"finite to the end: {'; '.join(finite)}"] * bool(finite)
    return f"Training with gamma {gamma:g}. {'. '.join(x[0].upper() + x[1:] for x in parts)}."


# The curves of the plain formulas lie on that of focal_jax until they end.
LINES = (
    {"color": style.BLUE, "linewidth": 5, "alpha": 0.5},
    {"color": style.VERMILION, "linewidth": 1.5},
    {"color": style.GREEN, "linewidth": 1.5, "linestyle": "--"},
)


def smooth(losses: np.ndarray) -> np.ndarray:
    """Return running geometric means of the losses over a tenth of the steps so far."""
    total = np.concatenate([[0], np.cumsum(np.log(losses))])
    steps = np.arange(1, len(losses) + 1)
    first = steps - 1 - steps // 10
    return np.exp((total[steps] - total[first]) / (steps - first))


@style.applied()
def plot(curves: dict[Run, Curve], gamma: float, path: Path) -> Path:
    """Draw the training loss by step, one panel per dtype. A cross marks the first NaN."""
    dtypes = list(dict.fromkeys(run.dtype for run in curves))
    height = 0.4 + 2.1 * len(dtypes)
    figure, panels = style.figure(len(dtypes), 1, height=height, sharex=True, squeeze=False)
    for panel, dtype in zip(panels[:, 0], dtypes):
        chosen = {run.name: curve for run, curve in curves.items() if run.dtype == dtype}
        for (name, curve), line in zip(chosen.items(), LINES):
            end = curve.nan_step
            y = smooth(np.maximum(curve.losses[: end and end - 1], 1e-12))
            label = f"{name}: {f'NaN at step {end:,}' if end else 'trains to the end'}"
            panel.plot(np.arange(1, len(y) + 1), y, label=label, **line)
            if end and len(y):
                cross = {"color": line["color"], "markersize": 12, "markeredgewidth": 3}
                panel.plot(end, y[-1], "x", **cross, zorder=3)
        panel.set(yscale="log", ylabel="training loss")
        panel.set_title(f"focal loss, gamma {gamma:g}, {dtype}")
        panel.legend(loc="upper right")
    panels[-1, 0].set_xlabel("step")
    return common.save(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = common.parser("training_race", __doc__)
    parser.add_argument("--gamma", type=float, default=0.5, help="of the focal loss")
    parser.add_argument("--steps", type=int, default=2500, help=f"a multiple of {SEGMENT}")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES, help="of the layers")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--out", type=Path, default=Path("out/training_race"), help="folder")
    args = parser.parse_args(argv)
    if args.steps < SEGMENT or args.steps % SEGMENT:
        parser.error(f"--steps: got {args.steps}, wanted a positive multiple of {SEGMENT}")
    if not 0 <= args.gamma < np.inf:
        parser.error(f"--gamma: got {args.gamma:g}, wanted a finite number >= 0")
    return args


def main(argv: list[str] | None = None) -> dict[Run, Curve]:
    """Train, print the table and draw the figure."""
    args, console = parse(argv), Console()
    runs = [
        Run(name, loss_function(formula, args.gamma), dtype, args.seed)
        for dtype in args.dtypes
        for name, formula in FORMULAS.items()
    ]
    curves = race(runs, args.steps, console)
    show(curves, args.gamma, console)
    path = plot(curves, args.gamma, args.out / "training_race.png")
    console.print(f"Figure: {path}", soft_wrap=True)
    console.print(sentence(curves, args.gamma), soft_wrap=True)
    return curves


if __name__ == "__main__":
    main()
