"""Measure the calibration of overfitted networks, for four losses and ten seeds.

Each network is trained on a few hundred noisy digits of scikit-learn until it classifies all of
them correctly. The expected calibration error compares its confidence with its accuracy on test
digits. The losses are

    cross entropy
    smoothed labels      cross entropy with label smoothing 0.05
    focal, gamma 3
    focal, by sample     gamma depends on the probability of the true class, as in Mukhoti et al.
                         2020 (`focal_jax.training.sample_dependent_gamma`)

The measures are given before and after temperature scaling. The temperature is fitted on
validation digits. `vmap` trains all seeds in one program. Measures and figure take about a minute
on two cores.

    python -m examples.calibration --out out/calibration
"""

import argparse
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from examples import common
from focal_jax import softmax_focal_loss_with_integer_labels as focal_loss
from focal_jax.measure import style
from focal_jax.training import sample_dependent_gamma

CLASSES, BINS = 10, 15
TEMPERATURES = np.geomspace(0.1, 10, 201, dtype=np.float32)


def sample_dependent_focal_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return focal losses whose gamma depends on the probability of the true class."""
    p_t = jnp.take_along_axis(nnx.softmax(logits), labels[:, None], 1)[:, 0]
    return focal_loss(logits, labels, gamma=sample_dependent_gamma(p_t))


LOSSES: dict[str, Callable] = {
    "cross entropy": partial(focal_loss, gamma=0),
    "smoothed labels": partial(focal_loss, gamma=0, label_smoothing=0.05),
    "focal, gamma 3": partial(focal_loss, gamma=3),
    "focal, by sample": sample_dependent_focal_loss,
}


# ---------------------------------------------------------------- data and training


def noisy_digits(seed: int, train: int, noise: float) -> list[np.ndarray]:
    """Return images and labels of the training set, of 400 validation digits, of the test set."""
    data = load_digits()
    random = np.random.default_rng(seed)
    images = data.data / 16 + random.normal(0, noise, data.data.shape)
    rest = images.astype(np.float32), data.target.astype(np.int32)
    sets = []
    for size in (train, 400):
        chosen_x, rest_x, chosen_y, rest_y = train_test_split(
            *rest, train_size=size, stratify=rest[1], random_state=seed
        )
        sets += chosen_x, chosen_y
        rest = rest_x, rest_y
    return [*sets, *rest]


class Network(nnx.Module):
    """A multilayer perceptron with three layers."""

    def __init__(self, rngs: nnx.Rngs, width: int = 128):
        """Initialize the layers from `rngs`."""
        self.layers = nnx.List(
            [nnx.Linear(64, width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)]
        )
        self.last = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, images):
        """Return the logits."""
        for layer in self.layers:
            images = nnx.relu(layer(images))
        return self.last(images)


@partial(jax.jit, static_argnames=("loss", "steps", "batch"))
def train(loss: Callable, key, images, labels, inputs, *, steps: int, batch: int, rate: float):
    """Train a network that is initialized from `key`; return its logits for each of `inputs`."""
    graph, start = nnx.split(Network(nnx.Rngs(params=key)))
    adam = optax.adam(rate)

    def step(state, key):
        parameters, moments = state
        chosen = jax.random.randint(key, (batch,), 0, len(labels))

        def mean_loss(parameters):
            return loss(nnx.merge(graph, parameters)(images[chosen]), labels[chosen]).mean()

        updates, moments = adam.update(jax.grad(mean_loss)(parameters), moments)
        return (optax.apply_updates(parameters, updates), moments), None

    keys = jax.random.split(jax.random.fold_in(key, 1), steps)
    (parameters, _), _ = jax.lax.scan(step, (start, adam.init(start)), keys)
    return [nnx.merge(graph, parameters)(x) for x in inputs]


# ---------------------------------------------------------------- measures


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis."""
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def negative_log_likelihood(labels: np.ndarray, logits: np.ndarray) -> float:
    """Return the mean cross entropy in nats."""
    losses = focal_loss(logits, labels, gamma=0)
    return float(losses.mean())


def reliability(labels: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the share of predictions, the mean confidence and the accuracy of each bin."""
    predicted = probabilities(logits)
    confidence, correct = predicted.max(-1), predicted.argmax(-1) == labels
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    counts, confidence_sums, correct_counts = (
        np.bincount(index, weights, BINS) for weights in (None, confidence, correct)
    )
    denominators = np.maximum(counts, 1)
    return counts / labels.size, confidence_sums / denominators, correct_counts / denominators


def calibration_error(labels: np.ndarray, logits: np.ndarray) -> float:
    """Return the expected calibration error of the predicted class."""
    share, confidence, accuracy = reliability(labels, logits)
    return float(np.sum(share * np.abs(accuracy - confidence)))


def fitted_temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """Return the temperature of `TEMPERATURES` with the smallest negative log-likelihood."""
    scaled = jnp.asarray(logits)[None] / TEMPERATURES[:, None, None]
    likelihoods = focal_loss(scaled, np.broadcast_to(labels, scaled.shape[:2]), gamma=0).mean(1)
    return float(TEMPERATURES[int(likelihoods.argmin())])


def measure(labels: dict[str, np.ndarray], logits: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the measures of one network.

    `labels` and `logits` have the keys `"train"`, `"validation"` and `"test"`.
    """
    temperature = fitted_temperature(labels["validation"], logits["validation"])
    result = {
        f"{name} error": float((logits[name].argmax(-1) != labels[name]).mean())
        for name in ("train", "test")
    }
    for suffix, scale in (("", 1), (", scaled", temperature)):
        scaled = logits["test"] / np.float32(scale)
        result["ECE" + suffix] = calibration_error(labels["test"], scaled)
        result["NLL" + suffix] = negative_log_likelihood(labels["test"], scaled)
    return result | {"temperature": temperature}


# ---------------------------------------------------------------- report


def show(results: dict[str, dict[str, np.ndarray]], console: Console) -> None:
    """Print the table: one row per measure, one column per loss."""
    rows = []
    for name in next(iter(results.values())):
        percent = "NLL" not in name and name != "temperature"
        scale, digits = (100, 1) if percent else (1, 2)
        cells = (common.mean_and_deviation(scale * x[name], digits) for x in results.values())
        rows.append([name + (", %" if percent else ""), *cells])
    seeds = len(next(iter(results.values()))["ECE"])
    caption = (
        f"{common.seeds_caption(seeds)} ECE: expected calibration error. NLL: negative "
        'log-likelihood. "scaled": after temperature scaling, fitted on validation digits. A '
        "temperature above 1 means that the network was overconfident."
    )
    console.print(common.table("Calibration of overfitted networks", ["", *results], rows, caption))


@style.applied()
def plot(logits: dict[str, tuple], labels: np.ndarray, path: Path) -> None:
    """Draw accuracy against confidence. The width of a bar grows with its share of predictions."""
    height = 1.5 * len(logits) + 0.5
    figure, panels = style.figure(len(logits), 2, height=height, sharex=True, sharey=True)
    colors = (style.INK, style.PURPLE, style.VERMILION, style.BLUE)
    for row, (name, both), color in zip(panels, logits.items(), colors):
        for panel, predictions in zip(row, both):
            share, confidence, accuracy = reliability(labels, predictions)
            width = np.sqrt(share / share.max()) / BINS
            middle = (np.arange(BINS) + 0.5) / BINS
            panel.bar(middle, accuracy, width, color=color)
            panel.plot([0, 1], [0, 1], color=style.INK, linestyle="--", linewidth=1)
            error = np.sum(share * np.abs(accuracy - confidence))
            panel.text(0.04, 0.85, f"ECE {100 * error:.1f} %", transform=panel.transAxes)
            panel.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        row[0].set_ylabel(name.replace(", ", ",\n").replace(" ", "\n", 1))
    for panel, title in zip(panels[0], ("accuracy", "temperature scaled")):
        panel.set_title(title)
    for panel in panels[-1]:
        panel.set_xlabel("confidence")
    common.save(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = common.parser("calibration", __doc__)
    parser.add_argument("--seeds", type=int, default=10, help="networks per loss")
    parser.add_argument("--images", type=int, default=300, help="size of the training set")
    parser.add_argument("--noise", type=float, default=0.3, help="of pixels in [0, 1]")
    parser.add_argument("--steps", type=int, default=2000, help="of Adam")
    parser.add_argument("--batch", type=int, default=50, help="images per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of Adam")
    parser.add_argument("--out", type=Path, default=Path("out/calibration"), help="folder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Return the measures of each loss, as arrays with one entry per seed."""
    args = parse(argv)
    sets = [noisy_digits(seed, args.images, args.noise) for seed in range(args.seeds)]
    images, targets = [
        dict(zip(("train", "validation", "test"), (np.stack(x) for x in list(zip(*sets))[half::2])))
        for half in (0, 1)
    ]
    keys = jax.random.split(jax.random.key(0), args.seeds)
    options = {"steps": args.steps, "batch": args.batch, "rate": args.learning_rate}
    console, results, predictions = Console(), {}, {}
    with Progress(console=console) as progress:
        task = progress.add_task(f"{args.seeds} networks per loss", total=len(LOSSES))
        for name, loss in LOSSES.items():
            train_all = jax.vmap(partial(train, loss, **options))
            outputs = train_all(keys, images["train"], targets["train"], list(images.values()))
            logits = dict(zip(images, map(np.asarray, outputs)))
            measures = [
                measure(*(jax.tree.map(itemgetter(seed), sets) for sets in (targets, logits)))
                for seed in range(args.seeds)
            ]
            results[name] = {key: np.array([m[key] for m in measures]) for key in measures[0]}
            scale = np.float32(results[name]["temperature"])[:, None, None]
            test_logits = logits["test"], logits["test"] / scale
            predictions[name] = [x.reshape(-1, CLASSES) for x in test_logits]
            progress.advance(task)

    show(results, console)
    plot(predictions, targets["test"].ravel(), args.out / "reliability.png")
    console.print(f"Figure: {args.out / 'reliability.png'}", soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
