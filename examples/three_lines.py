"""Compare training and memory of focal_jax with the plain JAX formulas that users write.

Each section prints one table of docs/why.md in Markdown:

    race          a classifier: gamma 0.25 to 2, float32 and bfloat16         about 10 minutes
    detector      a sigmoid head on digits and 20 times as many backgrounds   about 2 minutes
    fine-tuning   a classifier that cross entropy has trained to saturation   about 1 minute
    memory        the largest batch that fits into 2 GiB, for two heads       about 5 minutes

The times are those of two cores. The first three sections train the network of
`examples.training_race` and count the runs that become NaN. The section `memory` runs each batch in
a process of its own whose memory is limited, and needs Linux.

    python -m examples.three_lines                        # all sections
    python -m examples.three_lines fine-tuning --seeds 2
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress

import focal_jax
from examples import common
from examples.training_race import (
    DTYPES,
    FOCAL_JAX,
    FORMULAS,
    SEGMENT,
    Curve,
    Data,
    Run,
    digits,
    from_cross_entropy,
    initial,
    loss_function,
    train,
)

Table = tuple[list[str], list[list[str]]]  # head, rows

# ---------------------------------------------------------------- runs that become NaN


def with_epsilon(logits, labels, gamma):
    """Return the formula on top of optax's cross entropy, with an epsilon against NaN."""
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (1 - jnp.exp(-ce) + 1e-7) ** gamma * ce


EPSILON: dict[str, Callable] = {"plain JAX (optax, epsilon)": with_epsilon}


def formulas(gamma: float) -> dict[str, Callable]:
    """Return the implementations to compare. The epsilon matters for gamma < 1 only."""
    return FORMULAS | (EPSILON if gamma < 1 else {})


def summary(curves: list[Curve]) -> list[str]:
    """Return the number of NaN runs, the range of their last steps, and the test accuracy."""
    ends = [curve.nan_step for curve in curves if curve.nan_step is not None]
    steps = " to ".join(dict.fromkeys(f"{x:,}" for x in (min(ends), max(ends)))) if ends else ""
    rates = [100 * curve.accuracies[1] for curve in curves if curve.nan_step is None]
    return [
        f"{len(ends)} of {len(curves)}",
        steps,
        common.mean_and_deviation(rates) if rates else "",
    ]


def train_all(
    settings: dict[tuple[str, ...], tuple[Callable, str, int]],
    seeds: int,
    progress: Progress,
    options: Callable[[int], dict] = lambda seed: {},
) -> list[list[str]]:
    """Train every setting with every seed; return a row of names and results for each setting.

    Args:
      settings: the loss, the dtype and the number of steps of each row, by its names.
      seeds: the number of seeds.
      progress: shows the number of finished runs.
      options: the keyword arguments of `train` for each seed.
    """
    runs = [
        (Run(names[-1], loss, dtype, seed), steps)
        for names, (loss, dtype, steps) in settings.items()
        for seed in range(seeds)
    ]
    task = progress.add_task("training", total=len(runs))

    def one(job: tuple[Run, int]) -> Curve:
        run, steps = job
        curve = train(run, steps, **options(run.seed))
        progress.advance(task)
        return curve

    curves = common.in_threads(one, runs)
    return [
        [*names, *summary(curves[i * seeds : (i + 1) * seeds])] for i, names in enumerate(settings)
    ]


HEAD = ["NaN runs", "NaN at step", "test accuracy, %"]
GAMMAS, TWO_GAMMAS = (0.25, 0.5, 1.0, 2.0), (0.5, 2.0)


def race(args: argparse.Namespace, progress: Progress) -> Table:
    """Train the classifier with every gamma, dtype and formula."""
    settings = {}
    for gamma, dtype in product(GAMMAS, DTYPES):
        # XLA:CPU takes twice as long for a step in bfloat16.
        steps = args.steps if dtype == "float32" else args.bfloat16_steps
        for name, formula in formulas(gamma).items():
            settings[f"{gamma:g}", dtype, name] = loss_function(formula, gamma), dtype, steps
    rows = train_all(settings, args.seeds, progress)
    return ["gamma", "dtype", "implementation", *HEAD], rows


# ---------------------------------------------------------------- detector

BACKGROUNDS = 20  # per digit


@cache
def detector_data() -> Data:
    """Return digits and backgrounds, which have label -1. The test set has digits only.

    A background is composed of quarters of four training digits.
    """
    data = digits()
    random = np.random.default_rng(0)
    quarters = np.asarray(data.images).reshape(-1, 2, 4, 2, 4).swapaxes(2, 3).reshape(-1, 4, 4)
    chosen = random.integers(len(quarters), size=(BACKGROUNDS * len(data.labels), 2, 2))
    backgrounds = quarters[chosen].swapaxes(2, 3).reshape(-1, 64)
    images = jnp.concatenate([data.images, backgrounds])
    labels = jnp.pad(data.labels, (0, len(backgrounds)), constant_values=-1)
    return data._replace(images=images, labels=labels)


def one_hot(logits, labels):
    """Return 1 for the class of each digit and 0 elsewhere, also for backgrounds."""
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)


def torchvision_steps(logits, labels, gamma):
    """Return the formula of `torchvision.ops.sigmoid_focal_loss`."""
    y, p = one_hot(logits, labels), jax.nn.sigmoid(logits)
    ce = optax.sigmoid_binary_cross_entropy(logits, y)
    p_t = p * y + (1 - p) * (1 - y)
    return ce * (1 - p_t) ** gamma


SIGMOID_FORMULAS: dict[str, Callable] = {
    FOCAL_JAX: lambda logits, labels, gamma: focal_jax.sigmoid_focal_loss(
        logits, one_hot(logits, labels), gamma=gamma
    ),
    "plain JAX (torchvision's steps)": torchvision_steps,
    "optax.losses.sigmoid_focal_loss": lambda logits, labels, gamma: (
        optax.losses.sigmoid_focal_loss(logits, one_hot(logits, labels), gamma=gamma)
    ),
}


def detector(args: argparse.Namespace, progress: Progress) -> Table:
    """Train a sigmoid head, whose last bias starts at the prior .01."""
    settings = {
        (f"{gamma:g}", dtype, name): (loss_function(formula, gamma), dtype, args.bfloat16_steps)
        for gamma, dtype in product(TWO_GAMMAS, DTYPES)
        for name, formula in SIGMOID_FORMULAS.items()
    }

    def options(seed: int) -> dict:
        *layers, (weights, bias) = initial(seed)
        return {
            "data": detector_data(),
            "parameters": [*layers, (weights, bias + np.log(0.01 / 0.99))],
        }

    rows = train_all(settings, args.seeds, progress, options)
    return ["gamma", "dtype", "implementation", *HEAD], rows


# ---------------------------------------------------------------- fine-tuning


def fine_tuning(args: argparse.Namespace, progress: Progress) -> Table:
    """Fine-tune a classifier that was trained with cross entropy."""
    cross_entropy = loss_function(FORMULAS[FOCAL_JAX], 0.0)
    task = progress.add_task("training with cross entropy", total=args.seeds)

    def pretrained(seed: int) -> list:
        curve = train(Run("cross entropy", cross_entropy, seed=seed), args.steps)
        progress.advance(task)
        return curve.parameters

    start = common.in_threads(pretrained, range(args.seeds))
    settings = {
        (f"{gamma:g}", dtype, name): (loss_function(formula, gamma), dtype, 4 * SEGMENT)
        for gamma, dtype in product(TWO_GAMMAS, DTYPES)
        for name, formula in formulas(gamma).items()
    }
    rows = train_all(settings, args.seeds, progress, lambda seed: {"parameters": start[seed]})
    return ["gamma", "dtype", "implementation", *HEAD], rows


# ---------------------------------------------------------------- memory

LIMIT = 2 << 30  # bytes
CLASSES = 32_000, 131_072
DEPTH = 64  # features
EXPONENTS = 8, 16  # of the least and the largest number of positions


def plain_head(x, kernel, labels):
    """Return the formula for the logits `x @ kernel`."""
    return from_cross_entropy(x @ kernel, labels, 2)


HEADS: dict[str, Callable] = {
    "plain JAX (optax)": plain_head,
    "focal_jax, linear head": focal_jax.linear_softmax_focal_loss_with_integer_labels,
}


def virtual_memory() -> int:
    """Return the bytes of address space that this process uses."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmSize:\s+(\d+) kB", status)[1])


def run_limited(head: str, classes: int, positions: int) -> None:
    """Compute value and gradient of a head in `LIMIT` bytes beside those of Python and JAX."""
    import resource  # does not exist on Windows

    jax.jit(jnp.sum)(jnp.ones(8)).block_until_ready()  # starts the threads of the backend
    shapes = ((positions, DEPTH), "f4"), ((DEPTH, classes), "f4"), ((positions,), "i4")
    step = jax.value_and_grad(lambda *args: HEADS[head](*args).mean(), (0, 1))
    program = jax.jit(step).lower(*(jax.ShapeDtypeStruct(*x) for x in shapes)).compile()
    allowed = virtual_memory() + LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    arrays = [jax.device_put(np.zeros(*shape)) for shape in shapes]
    jax.block_until_ready(program(*arrays))


OUT_OF_MEMORY = re.compile("RESOURCE_EXHAUSTED|[Oo]ut of memory|bad_alloc|MemoryError|allocate")


def fits(head: str, classes: int, positions: int) -> bool:
    """Return whether the process of `run_limited` ends without running out of memory."""
    command = [sys.executable, "-m", "examples.three_lines", "--probe", head]
    done = subprocess.run(
        [*command, str(classes), str(positions)], capture_output=True, text=True, check=False
    )
    if done.returncode and not OUT_OF_MEMORY.search(done.stderr):
        raise RuntimeError(f"{head}, {classes:,} classes, {positions:,} positions: {done.stderr}")
    return not done.returncode


def memory(args: argparse.Namespace, progress: Progress) -> Table:
    """Find the largest batch that fits, a power of 2, by running out of memory."""
    if sys.platform != "linux":
        raise SystemExit("memory: the limit of the address space needs Linux")
    rows = []
    for classes, head in product(CLASSES, HEADS):
        task = progress.add_task(f"{head}, {classes:,} classes", total=None)
        low, high = EXPONENTS[0], EXPONENTS[1] + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(head, classes, 1 << middle) else (low, middle)
            progress.update(task, description=f"{head}, {classes:,} classes: {1 << low:,} fit")
        progress.remove_task(task)
        more = " or more" * (low == EXPONENTS[1])
        logits = 4 * (1 << low) * classes / (1 << 30)
        rows.append([f"{classes:,}", head, f"{1 << low:,}{more}", f"{logits:.1f}"])
    return ["classes", "head", "positions", "size of the logits, GiB"], rows


# ---------------------------------------------------------------- command line

SECTIONS: dict[str, Callable[[argparse.Namespace, Progress], Table]] = {
    "race": race,
    "detector": detector,
    "fine-tuning": fine_tuning,
    "memory": memory,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = common.parser("three_lines", __doc__)
    text = f"the tables to print: {', '.join(SECTIONS)}; default: all"
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=text)
    parser.add_argument("--seeds", type=int, default=5, help="of weights and batches")
    parser.add_argument(
        "--steps", type=int, default=2500, help=f"in float32, a multiple of {SEGMENT}"
    )
    parser.add_argument("--bfloat16-steps", type=int, default=1000, help="and of the detector")
    probe = ("HEAD", "CLASSES", "POSITIONS")
    parser.add_argument("--probe", nargs=3, metavar=probe, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"SECTION: got {', '.join(unknown)}, wanted some of {', '.join(SECTIONS)}")
    return args


def main(argv: list[str] | None = None) -> dict[str, Table]:
    """Print the tables and return them."""
    args = parse(argv)
    if args.probe:
        head, *sizes = args.probe
        run_limited(head, *map(int, sizes))
        return {}
    tables = {}
    for name in args.sections or SECTIONS:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            tables[name] = SECTIONS[name](args, progress)
        print(f"<!-- {name}: python -m examples.three_lines {name} -->")
        words = 2 if name == "memory" else 3
        print(common.markdown(*tables[name], names=words))
    return tables


if __name__ == "__main__":
    main()
