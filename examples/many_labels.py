"""Train a tagger with up to 20,000 labels on text and compare three losses.

The text is the documentation that is installed with Python packages. The task is to predict one
half of the distinct words of a paragraph from the other half, which is chosen at random. Each word
of the vocabulary is a label, and a paragraph has 4 to 16 positive labels. The losses are

    cross entropy      `linear_sigmoid_focal_loss` with gamma 0
    focal loss         `linear_sigmoid_focal_loss` with gamma 2
    asymmetric loss    `linear_asymmetric_loss` with its default options

The linear heads hold neither the logits nor the multi-hot labels of a batch. The table shows the
precision at 1 and 5 on held-out paragraphs, and the precision at 1 among the words that occur in a
given number of training paragraphs. The column "frequency" predicts the most frequent words for
every paragraph.

    python -m examples.many_labels            # all losses, about a minute on two cores
    python -m examples.many_labels --quick    # numpy only, 2,000 labels, a few seconds
"""

import argparse
import ast
import importlib.util
import re
import warnings
from collections import Counter
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import Progress

from examples import common
from focal_jax import linear_asymmetric_loss, linear_sigmoid_focal_loss, reduce_loss
from focal_jax.measure import style
from focal_jax.training import prior_bias_init

SOURCES = "numpy", "scipy", "sklearn", "jax"
LOSSES = {
    "cross entropy": partial(linear_sigmoid_focal_loss, gamma=0),
    "focal loss": partial(linear_sigmoid_focal_loss, gamma=2),
    "asymmetric loss": linear_asymmetric_loss,
}
FREQUENCY = "frequency"
WORDS = 32  # distinct words of a paragraph, one half of which are labels
RANKS = 10
EDGES = 0, 10, 100, 1_000  # label groups, by the number of training paragraphs with the word


# ---------------------------------------------------------------- data


def docstrings(source: str) -> list[str]:
    """Return the docstrings of a package, without its tests."""
    (root,) = importlib.util.find_spec(source).submodule_search_locations
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    texts = []
    for path in sorted(Path(root).rglob("*.py")):
        if "tests" not in path.parts:
            with warnings.catch_warnings(action="ignore"):  # about invalid escapes
                nodes = ast.walk(ast.parse(path.read_bytes()))
            texts += [ast.get_docstring(node) for node in nodes if isinstance(node, documented)]
    return [text for text in texts if text]


def paragraphs(texts: list[str]) -> list[list[str]]:
    """Return the distinct words of every paragraph that has at least 8, without duplicates."""
    unique = dict.fromkeys(chain.from_iterable(re.split(r"\n\s*\n", text) for text in texts))
    words = (list(dict.fromkeys(re.findall(r"[a-z]{2,}", text.lower()))) for text in unique)
    return list({tuple(sorted(x)): x[:WORDS] for x in words if len(x) >= 8}.values())


def encode(parts: list[list[str]], index: dict[str, int]) -> np.ndarray:
    """Return the indices of the words in the vocabulary, `[N, WORDS]`, padded with -1."""
    rows = np.full((len(parts), WORDS), -1, np.int32)
    for row, part in zip(rows, parts):
        known = [index[word] for word in part if word in index]
        row[: len(known)] = known
    return rows[(rows >= 0).sum(1) >= 8]


def corpus(args: argparse.Namespace, progress: Progress):
    """Return training and held-out paragraphs, and how many training paragraphs have each word."""
    reading = progress.track(args.sources, description="reading")
    found = paragraphs([text for source in reading for text in docstrings(source)])
    held_out = np.arange(len(found)) % 10 == 9
    training, test = ([x for x, here in zip(found, held_out) if here == part] for part in (0, 1))
    counts = Counter(chain.from_iterable(training)).most_common(args.labels)
    index = {word: i for i, (word, _) in enumerate(counts)}
    return encode(training, index), encode(test, index), np.array([n for _, n in counts])


def split(rows: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a random half of the words of each row, and the other half."""
    order = np.where(rows >= 0, random.random(rows.shape), 1).argsort(1)
    shuffled = np.take_along_axis(rows, order, 1)
    return shuffled[:, ::2], shuffled[:, 1::2]


# ---------------------------------------------------------------- training


class Tagger(nnx.Module):
    """The sum of the embeddings of words, a hidden layer, and the kernel and bias of the labels."""

    def __init__(self, labels: int, prior: float, rngs: nnx.Rngs, width: int = 64):
        """Initialize the layers from `rngs`; every label starts with the probability `prior`."""
        self.embedding = nnx.Embed(labels, width, rngs=rngs)
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(width, labels, bias_init=prior_bias_init(prior), rngs=rngs)

    def __call__(self, words):
        """Return the features, `[N, width]`, of words that are padded with -1."""
        embedded = self.embedding(jnp.maximum(words, 0))
        x = self.norms[0](jnp.sum(jnp.where((words >= 0)[..., None], embedded, 0), 1))
        return self.norms[1](x + jax.nn.gelu(self.hidden(x)))


def training_step(loss):
    """Return a training step that returns the loss per positive label."""

    @nnx.jit
    def step(model, optimizer, words, labels):
        def mean_loss(model):
            head = model.head
            losses = loss(model(words), head.kernel[...], labels, bias=head.bias[...])
            return reduce_loss(losses, normalization=jnp.sum(labels >= 0))

        value, gradients = nnx.value_and_grad(mean_loss)(model)
        optimizer.update(model, gradients)
        return value

    return step


# ---------------------------------------------------------------- measures


def hits(scores, words, labels, group_of):
    """Return whether the best labels are correct, and the same for the best label of each group.

    Args:
      scores: `[N, C]`.
      words: the words that are given, which are no candidates.
      labels: the words to predict.
      group_of: the group of each label, `[C]`.

    Returns:
      `[N, RANKS]`, and `[N, groups]` with NaN if no label of the paragraph is in the group.
    """
    rows = jnp.arange(len(scores))[:, None]
    num_labels = scores.shape[1]
    empty = jnp.zeros(scores.shape, bool)  # an index of -1 is moved past the end and dropped
    given, positive = (
        empty.at[rows, jnp.where(x < 0, num_labels, x)].set(True, mode="drop")
        for x in (words, labels)
    )
    scores = jnp.where(given, -jnp.inf, scores)
    correct = jnp.take_along_axis(positive, jax.lax.top_k(scores, RANKS)[1], 1)
    of_groups = []
    for group in range(len(EDGES)):
        member = (group_of == group)[None]
        best = jnp.argmax(jnp.where(member, scores, -jnp.inf), 1)
        hit = positive[rows[:, 0], best].astype(scores.dtype)
        of_groups.append(jnp.where(jnp.any(positive & member, 1), hit, jnp.nan))
    return correct, jnp.stack(of_groups, 1)


@nnx.jit
def predicted_hits(model, words, labels, group_of):
    """Return the hits of a model."""
    return hits(model.head(model(words)), words, labels, group_of)


@jax.jit
def frequency_hits(counts, words, labels, group_of):
    """Return the hits of the most frequent words."""
    return hits(jnp.broadcast_to(counts, (len(words), len(counts))), words, labels, group_of)


def precision(parts) -> tuple[np.ndarray, np.ndarray]:
    """Return the precision at 1 to `RANKS`, and at 1 for each group, in percent."""
    correct, of_groups = (np.concatenate(x) for x in zip(*parts))
    at = np.cumsum(correct.mean(0)) / np.arange(1, RANKS + 1)
    present = ~np.isnan(of_groups)
    sums = np.sum(np.where(present, of_groups, 0), 0)
    return 100 * at, 100 * sums / np.maximum(present.sum(0), 1)


# ---------------------------------------------------------------- report


def group_names() -> list[str]:
    return [*(f"{a:,} to {b - 1:,}" for a, b in pairwise(EDGES)), f"{EDGES[-1]:,} or more"]


def show(results: dict, sizes: np.ndarray, console: Console) -> None:
    """Print the table: one row per measure, one column per loss."""
    title = "Precision on held-out paragraphs, %"
    caption = "Words in 10 to 99: words that occur in 10 to 99 training paragraphs. Bold: the best."
    numbers = [("at 1", sizes.sum(), [at[0] for at, _ in results.values()])]
    numbers.append(("at 5", sizes.sum(), [at[4] for at, _ in results.values()]))
    for i, name in enumerate(group_names()):
        values = [groups[i] for _, groups in results.values()]
        numbers.append((f"at 1, words in {name}", sizes[i], values))
    rows = [
        [name, f"{size:,}", *common.bold_best(values, [f"{x:.1f}" for x in values])]
        for name, size, values in numbers
    ]
    console.print(common.table(title, ["", "labels", *results], rows, caption))


@style.applied()
def plot(results: dict, path: Path) -> None:
    """Draw the precision at 1 to `RANKS`, and at 1 for each group."""
    figure, (top, bottom) = style.figure(2, 1, height=6)
    colours = (style.INK, style.BLUE, style.VERMILION, style.PURPLE)
    for i, ((name, (at, groups)), colour) in enumerate(zip(results.items(), colours)):
        top.plot(range(1, RANKS + 1), at, color=colour, label=name)
        bottom.bar(np.arange(len(groups)) + 0.2 * i - 0.3, groups, 0.2, color=colour)
    top.set(xlabel="k", title="precision at k, %", ylim=(0, None))
    bottom.set(xlabel="training paragraphs with the word", title="precision at 1, %")
    bottom.set_xticks(range(len(EDGES)), group_names())
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    common.save(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = common.parser("many_labels", __doc__)
    parser.add_argument("--steps", type=int, default=300, help="per loss")
    parser.add_argument("--batch", type=int, default=128, help="paragraphs per step")
    parser.add_argument("--labels", type=int, default=20_000, help="size of the vocabulary")
    losses = {"default": [*LOSSES], "choices": LOSSES, "metavar": "LOSS"}
    parser.add_argument("--losses", nargs="+", help="the losses to compare", **losses)
    sources = {"default": SOURCES, "metavar": "PACKAGE"}
    parser.add_argument("--sources", nargs="+", help="the documentation to read", **sources)
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--out", type=Path, default=Path("out/many_labels"), help="folder")
    parser.add_argument("--quick", action="store_true", help="a small run, to try the program")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.labels, args.sources = 60, 2_000, ["numpy"]
    return args


def main(argv: list[str] | None = None) -> tuple[dict, dict]:
    """Return the training losses and the precisions, by the name of the loss."""
    args, console = parse(argv), Console()
    with Progress(console=console) as progress:
        training, test, counts = corpus(args, progress)
        group_of = np.digitize(counts, EDGES[1:])
        random = np.random.default_rng(args.seed)
        held_out = [split(part, random) for part in np.array_split(test, -(-len(test) // 256))]
        curves = {}
        results = {FREQUENCY: precision(frequency_hits(counts, *x, group_of) for x in held_out)}
        # Half of the words of a paragraph are labels.
        prior = float((training >= 0).sum()) / 2 / len(training) / len(counts)
        for name in args.losses:
            # XLA compiles the default generator in many seconds, this one in one second.
            rngs = nnx.Rngs(jax.random.key(args.seed, impl="unsafe_rbg"))
            model = Tagger(len(counts), prior, rngs)
            rate = optax.cosine_decay_schedule(1e-2, args.steps)
            optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)
            step, curves[name] = training_step(LOSSES[name]), []
            random = np.random.default_rng(args.seed)  # the same batches for every loss
            task = progress.add_task(f"{name}: compiling", total=args.steps)
            for _ in range(args.steps):
                rows = training[random.integers(len(training), size=args.batch)]
                curves[name].append(float(step(model, optimizer, *split(rows, random))))
                text = f"{name}: {curves[name][-1]:.3f}"
                progress.update(task, advance=1, description=f"{text:24}")
            results[name] = precision(predicted_hits(model, *x, group_of) for x in held_out)
    console.print(f"Paragraphs: {len(training):,} for training, {len(test):,} held out")
    show(results, np.bincount(group_of, minlength=len(EDGES)), console)
    plot(results, args.out / "many_labels.png")
    console.print(f"Figure: {args.out / 'many_labels.png'}", soft_wrap=True)
    return curves, results


if __name__ == "__main__":
    main()
