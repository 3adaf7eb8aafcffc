"""Train a small language model with a vocabulary of 32,768 tokens and three losses.

The text is the documentation that is installed with Python: the docstrings of the standard library
and of some packages, and the language reference. A token is a word, white space or punctuation.
Text outside the vocabulary is encoded in bytes. The kernel of the head is the embedding, and
`linear_softmax_focal_loss_with_integer_labels` computes the loss without holding the logits, 64 MiB
for a batch of 512 tokens, in memory.

The first half of the steps is the same for all losses and uses cross entropy. The second half uses

    cross entropy
    focal loss             gamma 2
    dynamic fine-tuning    cross entropy, weighted by the probability of the true token

The losses differ only in the second half because, as long as all predictions are wrong, the focal
loss equals cross entropy, and the weights of dynamic fine-tuning are almost 0.

`linear_token_statistics` computes the log-probability, the entropy and the prediction for held-out
text. The tables show perplexity, calibration error, accuracy and entropy by the frequency of the
token in the training text.

    python -m examples.language_model                # about ten minutes on two cores
    python -m examples.language_model --devices 8    # eight devices of the machine or of its CPU
"""

import argparse
import ast
import importlib.util
import re
import sysconfig
import warnings
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from examples import common
from focal_jax import (
    linear_softmax_focal_loss_with_integer_labels,
    linear_token_statistics,
    reduce_loss,
)
from focal_jax.measure import style

SOURCES = "python", "numpy", "flax", "optax", "sklearn"
START = "half-way"  # the start of the second half
LOSSES = {
    "cross entropy": {"gamma": 0},
    "focal loss": {"gamma": 2},
    "dynamic fine-tuning": {"gamma": 0, "weight_by_probability": True},
}
TITLES = {  # and the number of decimal places
    "Perplexity of held-out text": 1,
    "Calibration error on held-out text, %": 2,
    "Accuracy on held-out text, %": 1,
    "Mean entropy of the prediction on held-out text, nats": 2,
}
LENGTH, WIDTH, HEADS, LAYERS = 64, 128, 4, 2
EDGES = 0, 10, 100, 1_000, 10_000  # token groups, by the count in the training text


def files(source: str) -> list[Path]:
    """Return the Python files of a package, or of the standard library, without tests."""
    package = None if source == "python" else importlib.util.find_spec(source)
    root = Path(package.submodule_search_locations[0] if package else sysconfig.get_path("stdlib"))
    excluded = {"site-packages", "test", "tests", "idle_test"}
    return [x for x in sorted(root.rglob("*.py")) if not excluded & set(x.relative_to(root).parts)]


def documentation(path: Path) -> str:
    """Return the docstrings of a file, and the strings of the language reference."""
    with warnings.catch_warnings(action="ignore"):  # about invalid escapes
        tree = ast.parse(path.read_bytes())
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    if path.parent.name == "pydoc_data":
        texts += [x.value for x in ast.walk(tree) if isinstance(x, ast.Constant)]
    return "\n\n".join(x for x in texts if isinstance(x, str))


def corpus(args: argparse.Namespace, progress: Progress) -> list[np.ndarray]:
    """Return the training tokens, and the tokens of every 20th document, which is held out."""
    paths = [path for source in args.sources for path in files(source)]
    texts = [documentation(path) for path in progress.track(paths, description="reading")]
    pieces = [re.findall(r" ?\w+|\s+|[^\w\s]+", text) for text in texts if text]
    parts = [
        [pieces[i] for i in range(len(pieces)) if (i % 20 == 19) == held_out]
        for held_out in (False, True)
    ]
    # The vocabulary is the bytes, then the most frequent pieces that occur more than once.
    counts = Counter(chain(*parts[0])).most_common(args.vocabulary - 256)
    token = {piece: [256 + i] for i, (piece, n) in enumerate(counts) if n > 1}
    tokens = ((token.get(x) or x.encode(errors="replace") for x in chain(*part)) for part in parts)
    return [np.fromiter(chain.from_iterable(x), np.int32) for x in tokens]


def windows(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return sequences of `LENGTH` tokens and the next token, `[N, LENGTH + 1]`."""
    return tokens[starts[:, None] + np.arange(LENGTH + 1)]


class Block(nnx.Module):
    """A transformer block: causal attention and a multilayer perceptron."""

    def __init__(self, rngs: nnx.Rngs):
        """Initialize the layers from `rngs`."""
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        """Return `x`, `[B, T, WIDTH]`, plus the outputs of the layers."""
        x += self.attention(self.norms[0](x), mask=mask)
        return x + self.down(jax.nn.gelu(self.up(self.norms[1](x))))


class LanguageModel(nnx.Module):
    """A transformer that returns features. The head is tied to the embedding."""

    def __init__(self, vocabulary: int, rngs: nnx.Rngs):
        """Initialize the layers from `rngs`."""
        self.embedding = nnx.Embed(vocabulary, WIDTH, rngs=rngs)
        self.position = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens):
        """Return the features `[B, T, WIDTH]` of the head."""
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    @property
    def kernel(self):
        """Return the transposed kernel of the head, `[vocabulary, WIDTH]`."""
        return self.embedding.embedding[...]


def mean_loss(model: LanguageModel, windows, *, gamma: float, weight_by_probability: bool = False):
    """Return the contribution of this device, whose mean over the devices is the mean loss."""
    losses = linear_softmax_focal_loss_with_integer_labels(
        model(windows[:, :-1]), model.kernel, windows[:, 1:], gamma=gamma, transpose_kernel=True
    )
    # The loss with gamma 0 is -log p.
    weights = lax.stop_gradient(jnp.exp(-losses)) if weight_by_probability else None
    return reduce_loss(losses, weights=weights, normalization="mean", axis_name="data")


def training_step(mesh: Mesh, **options):
    """Return a training step on all devices of a mesh, each with a shard of the batch."""

    def global_loss(model, windows):
        structure, parameters = nnx.split(model)

        def device_loss(parameters, windows):
            model = nnx.merge(structure, parameters)
            return lax.pmean(mean_loss(model, windows, **options), "data")

        specs = {"in_specs": (P(), P("data")), "out_specs": P()}
        return jax.shard_map(device_loss, mesh=mesh, **specs)(parameters, windows)

    @nnx.jit
    def step(model, optimizer, windows):
        value, gradients = nnx.value_and_grad(global_loss)(model, windows)
        optimizer.update(model, gradients)
        return value

    return step


@nnx.jit
def predict(model: LanguageModel, windows, members):
    """Return -log p, the entropy, the confidence, whether the prediction is correct, p of groups.

    The calibration of the groups needs the probabilities of all tokens, and so an array of logits.
    """
    features, labels = model(windows[:, :-1]), windows[:, 1:]
    found = linear_token_statistics(features, model.kernel, labels, transpose_kernel=True)
    p = jax.nn.softmax(features @ model.kernel.T)
    correct = found.argmax == labels
    return -found.log_probability, found.entropy, p.max(-1), correct, p @ members


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Return the expected calibration error, with the same number of predictions per bin."""
    order = np.argsort(confidence, axis=None)
    parts = np.array_split((confidence - correct).ravel()[order], bins)
    return float(sum(abs(part.sum()) for part in parts)) / order.size


def measures(predictions, groups: np.ndarray) -> np.ndarray:
    """Return the measures in `TITLES`: of all tokens, of each group.

    The calibration error of a group is that of the event that the next token belongs to the group.
    (The confidence in a token would be biased after a selection by that token.)
    """
    losses, entropy, confidence, correct, group_p = (np.concatenate(x) for x in zip(*predictions))

    def row(chosen, error):
        means = [x[chosen].mean() if chosen.any() else np.nan for x in (losses, correct, entropy)]
        return np.exp(means[0]), 100 * error, 100 * means[1], means[2]

    rows = [row(np.ones(groups.shape, bool), calibration_error(confidence, correct))]
    for group in range(group_p.shape[-1]):
        in_group = groups == group
        rows.append(row(in_group, calibration_error(group_p[..., group], in_group)))
    return np.array(rows).T


def show(names: list[str], shares: np.ndarray, results: dict[str, np.ndarray], console: Console):
    """Print a table of each measure."""
    for which, (title, digits) in enumerate(TITLES.items()):
        rows = [
            [name, f"{share:.1f}", *(f"{x[which, row]:,.{digits}f}" for x in results.values())]
            for row, (name, share) in enumerate(zip(names, shares))
        ]
        head = "count in training", "share, %", *results
        console.print(common.table(title, head, rows))


@style.applied()
def plot(names: list[str], results: dict[str, np.ndarray], path: Path) -> None:
    """Draw perplexity and calibration error for each group of tokens."""
    figure, axes = style.figure(2, 1, height=6.4, sharex=True)
    for axis, title in zip(axes, TITLES):
        axis.set(title=title, yscale="log")
    for i, (name, result) in enumerate(results.items()):
        for axis, values in zip(axes, result):
            axis.bar(np.arange(len(names)) + 0.2 * i - 0.3, values, 0.2, label=name)
    axes[-1].set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names])
    axes[-1].set_xlabel("count in training")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2)
    common.save(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = common.parser("language_model", __doc__)
    parser.add_argument("--steps", type=int, default=400, help="half of them with cross entropy")
    parser.add_argument("--devices", type=int, default=1, help="number of devices")
    parser.add_argument("--batch", type=int, default=8, help="a multiple of --devices")
    parser.add_argument("--vocabulary", type=int, default=32_768, help="number of tokens")
    losses = {"default": [*LOSSES], "choices": LOSSES, "metavar": "LOSS"}
    parser.add_argument("--losses", nargs="+", help="of the second half", **losses)
    parser.add_argument("--held-out", type=int, default=32, help="number of test batches")
    sources = {"default": SOURCES, "metavar": "SOURCE"}
    parser.add_argument("--sources", nargs="+", help="python, or names of packages", **sources)
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--out", type=Path, default=Path("out/language_model"), help="folder")
    args = parser.parse_args(argv)
    if args.devices > 1:
        jax.config.update("jax_num_cpu_devices", args.devices)
    if args.devices > jax.device_count() or args.batch % args.devices:
        parser.error(f"--devices: {args.devices} of {jax.device_count()}, --batch: {args.batch}")
    return args


def main(argv: list[str] | None = None) -> tuple[dict, dict[str, np.ndarray]]:
    """Return the training losses and the measures, by the name of the loss."""
    args, console = parse(argv), Console()
    mesh = Mesh(np.array(jax.devices()[: args.devices]), ("data",))
    sharding = NamedSharding(mesh, P("data"))
    step = {name: training_step(mesh, **options) for name, options in LOSSES.items()}
    step[START] = step["cross entropy"]

    columns = TextColumn("{task.description:40}"), BarColumn(), TaskProgressColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        training, held_out = corpus(args, progress)
        counts = np.bincount(training, minlength=args.vocabulary)
        group_of = np.digitize(counts, EDGES[1:])
        members = jax.nn.one_hot(group_of, len(EDGES))
        starts = np.linspace(0, len(held_out) - LENGTH - 1, args.held_out * args.batch)
        test = windows(held_out, starts.astype(int))
        groups = group_of[test[:, 1:]]

        rate = optax.cosine_decay_schedule(3e-3, args.steps)
        # XLA compiles the default generator in many seconds, this one in one second.
        key = jax.random.key(args.seed, impl="unsafe_rbg")
        model = LanguageModel(args.vocabulary, nnx.Rngs(key))
        optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)

        def train(name, steps):
            """Train a copy of the model. The batches do not depend on the loss."""
            state, values = nnx.clone((model, optimizer)), []
            task = progress.add_task(f"{name}: compiling", total=len(steps))
            for i in steps:
                random = np.random.default_rng((args.seed, i))
                at = random.integers(len(training) - LENGTH, size=args.batch)
                batch = jax.device_put(windows(training, at), sharding)
                values.append(float(step[name](*state, batch)))
                progress.update(task, advance=1, description=f"{name}: {values[-1]:.3f}")
            return *state, values

        def evaluate(name, model):
            parts = progress.track(test.reshape(-1, args.batch, LENGTH + 1), description=name)
            predictions = (predict(model, jax.device_put(x, sharding), members) for x in parts)
            return measures(predictions, groups)

        curves, results, half = {}, {}, args.steps // 2
        model, optimizer, curves[START] = train(START, range(half))
        results[START] = evaluate(f"{START}: held-out text", model)
        for name in args.losses:
            trained, _, curves[name] = train(name, range(half, args.steps))
            results[name] = evaluate(f"{name}: held-out text", trained)
    names = ["all", *(f"{a:,} to {b - 1:,}" for a, b in pairwise(EDGES)), f"{EDGES[-1]:,} or more"]
    shares = [100, *(100 * np.mean(groups == group) for group in range(len(EDGES)))]
    show(names, shares, results, console)
    plot(names, results, args.out / "language_model.png")
    console.print(f"Figure: {args.out / 'language_model.png'}", soft_wrap=True)
    return curves, results


if __name__ == "__main__":
    main()
