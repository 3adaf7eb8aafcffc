"""Draw the figures of the documentation and compute its tables of errors and of linear heads.

    python docs/figures.py                   # write docs/figures/*.svg
    python docs/figures.py --out folder      # write the figures to another folder
    python docs/figures.py --numbers         # print the table of docs/numerics.md
    python docs/figures.py --heads           # measure the linear heads, about a minute

The figures show the public losses of the package. The exact gradients are a numerically stable
form of the formula in float64.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import focal_jax
from focal_jax.catalogue import LOSSES, Loss
from focal_jax.measure import curves, style

FIGURES = Path(__file__).parent / "figures"

# ---------------------------------------------------------------- implementations


def textbook(x: jax.Array, gamma: float) -> jax.Array:
    """Return the loss of a positive, computed from its probability."""
    p = jax.nn.sigmoid(x)
    return -((1 - p) ** gamma) * jnp.log(p)


def _clipped(epsilon: float) -> Callable:
    """Return the textbook loss with the probability clipped to `[epsilon, 1 - epsilon]`."""

    def loss(x, gamma):
        p = jnp.clip(jax.nn.sigmoid(x), epsilon, 1 - epsilon)
        return -((1 - p) ** gamma) * jnp.log(p)

    return loss


def torchvision(x: jax.Array, gamma: float) -> jax.Array:
    """Return the loss of a positive, computed as in `torchvision.ops.sigmoid_focal_loss`."""
    return jax.nn.softplus(-x) * (1 - jax.nn.sigmoid(x)) ** gamma


# Implementations of the loss of a positive. JAX differentiates all of them except focal_jax.
IMPLEMENTATIONS: dict[str, Callable] = {
    "focal_jax": lambda x, gamma: focal_jax.sigmoid_focal_loss(x, jnp.ones_like(x), gamma=gamma),
    "optax": lambda x, gamma: optax.losses.sigmoid_focal_loss(x, jnp.ones_like(x), gamma=gamma),
    "textbook": textbook,
    "torchvision's steps": torchvision,
    "Keras's clipping, 1e-7": _clipped(1e-7),
    "pytorch-retinanet's clipping, 1e-4": _clipped(1e-4),
}


def exact_gradient(x: np.ndarray, gamma: float) -> np.ndarray:
    """Return the gradient of a positive in float64: `-q**gamma (q + gamma p n)`."""
    x = np.asarray(x, np.float64)
    e = np.exp(-np.abs(x))
    p, q = np.where(x >= 0, 1, e) / (1 + e), np.where(x >= 0, e, 1) / (1 + e)
    n = np.log1p(e) + np.maximum(-x, 0)
    return -(q**gamma) * (q + gamma * p * n)


def gradient(loss: Callable, x: np.ndarray, gamma: float) -> np.ndarray:
    """Return the float32 gradient of a loss at every `x`."""
    return np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(loss(x, gamma))))(jnp.float32(x)))


def errors(x: np.ndarray, gamma: float) -> dict[str, np.ndarray]:
    """Return the relative error of the gradient of every implementation, or NaN.

    Numbers below 1e-36 count as 0: a factor of a product may underflow in float32 even if the
    product does not.
    """
    tiny = 1e-36
    exact = exact_gradient(np.float32(x), gamma)
    found = {}
    for name, loss in IMPLEMENTATIONS.items():
        absolute = np.abs(gradient(loss, x, gamma) - exact)
        relative = absolute / np.maximum(np.abs(exact), tiny)
        found[name] = np.where(absolute <= tiny, 0, relative)
    return found


# The ranges of the margin in the columns of the table. A probability of 1e-7 has the margin -16.1,
# a probability of 1e-4 the margin -9.2.
RANGES = {
    "-120 to -16.2": (-120, -16.2),
    "-16.1 to -9.3": (-16.1, -9.3),
    "-9.2 to 4": (-9.2, 4),
    "4 to 17": (4, 17),
    "17 to 40": (17, 40),
}


def largest_errors(gamma: float) -> dict[str, list[float]]:
    """Return the largest error of every implementation in each range of the margin."""
    x = np.linspace(-120, 40, 16001)
    inside = [(low <= x) & (x <= high) for low, high in RANGES.values()]
    return {name: [np.max(error[i]) for i in inside] for name, error in errors(x, gamma).items()}


def numbers() -> str:
    """Return the table of docs/numerics.md."""

    def cell(error):
        return "NaN" if np.isnan(error) else f"{error:.0e}" if error < 0.995 else f"{error:.2g}"

    lines = ["| gamma | gradient by | " + " | ".join(RANGES) + " |"]
    lines.append("| ---: | --- |" + " ---: |" * len(RANGES))
    for gamma in (0.5, 2.0):
        for name, row in largest_errors(gamma).items():
            lines.append(f"| {gamma:g} | {name} | " + " | ".join(map(cell, row)) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------- linear heads


def _plain_softmax(x, w, labels):
    ce = optax.losses.softmax_cross_entropy_with_integer_labels(x @ w, labels[:, 0])
    return (1 - jnp.exp(-ce)) ** 2 * ce


def _statistics(x, w, labels):
    found = focal_jax.linear_token_statistics(x, w, labels[:, 0])
    return found.entropy - found.log_probability


def _plain_statistics(x, w, labels):
    log_p = jax.nn.log_softmax(x @ w)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
    return entropy - jnp.take_along_axis(log_p, labels[:, :1], -1)[:, 0]


def _sparse(x, w, labels):
    weights = jnp.full(labels.shape, 1 / labels.shape[1], x.dtype)
    loss = focal_jax.linear_softmax_focal_loss_with_sparse_labels
    return loss(x, w, labels, weights, gamma=0.0)


def _plain_sparse(x, w, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x @ w), labels, -1), -1)


def _plain_sigmoid(x, w, labels):
    logits = x @ w
    y = jnp.put_along_axis(jnp.zeros_like(logits), labels, 1.0, -1, inplace=False)
    ce = optax.losses.sigmoid_binary_cross_entropy(logits, y)
    p = jax.nn.sigmoid(logits)
    return jnp.sum((1 - (y * p + (1 - y) * (1 - p))) ** 2 * ce, -1)


# Functions of features, kernel and eight classes per position: the linear head, and plain JAX.
HEADS: dict[str, tuple[Callable, Callable]] = {
    "softmax focal loss": (
        lambda x, w, y: focal_jax.linear_softmax_focal_loss_with_integer_labels(x, w, y[:, 0]),
        _plain_softmax,
    ),
    "log-probability and entropy": (_statistics, _plain_statistics),
    "sparse labels, K = 8": (_sparse, _plain_sparse),
    "sigmoid focal loss, 8 labels": (focal_jax.linear_sigmoid_focal_loss, _plain_sigmoid),
}


def compile_head(head: Callable, classes: int, positions: int = 2048, depth: int = 512):
    """Return the compiled value and gradient of a head in features and kernel."""
    shapes = (positions, depth), (depth, classes), (positions, 8)
    dtypes = jnp.float32, jnp.float32, jnp.int32
    step = jax.value_and_grad(lambda *args: jnp.sum(head(*args)), (0, 1))
    return jax.jit(step).lower(*map(jax.ShapeDtypeStruct, shapes, dtypes)).compile()


def temporaries(program) -> int:
    """Return the bytes of the temporary buffers of a compiled program."""
    return program.memory_analysis().temp_size_in_bytes


def _seconds(programs: list, args: tuple, rounds: int) -> np.ndarray:
    """Return the median time of each program. The programs alternate."""
    times = np.empty((rounds, len(programs)))
    for row in times:
        for i, program in enumerate(programs):
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            row[i] = time.perf_counter() - start
    return np.median(times, 0)


def heads(classes: int = 32_000, rounds: int = 7) -> str:
    """Return the table of docs/vocabularies.md: time and temporaries of the linear heads."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2048, 512)).astype(np.float32)
    kernel = rng.normal(size=(512, classes)).astype(np.float32) / 16
    labels = rng.integers(classes, size=(2048, 8)).astype(np.int32)
    args = jax.device_put((features, kernel, labels))
    lines = [
        "| head | time / plain JAX | temporaries / logits | temporaries of plain JAX / logits |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, pair in HEADS.items():
        programs = [compile_head(head, classes) for head in pair]
        linear, plain = _seconds(programs, args, rounds)
        shares = [temporaries(program) / (2048 * classes * 4) for program in programs]
        lines.append(f"| {name} | {linear / plain:.2f} | {shares[0]:.2f} | {shares[1]:.2f} |")
    return "\n".join(lines)


def heads_figure():
    """Draw the temporaries of loss and gradient against the number of classes."""
    classes = [2**i for i in range(13, 20, 2)]
    figure, panel = style.figure(height=4.2)
    for (name, pair), colour in zip(HEADS.items(), style.PALETTE):
        for head, line in zip(pair, ("-", ":")):
            sizes = [temporaries(compile_head(head, n)) / 1e9 for n in classes]
            label = name if line == "-" else None
            panel.plot(classes, sizes, line, color=colour, label=label, alpha=0.8)
    panel.set(xscale="log", yscale="log", xlabel="classes")
    panel.set_xticks(classes, [f"{n:,}" for n in classes])
    panel.minorticks_off()
    panel.set_title("temporaries in GB, 2,048 positions, float32; dotted: plain JAX")
    figure.legend(loc="outside lower center")
    return figure


# ---------------------------------------------------------------- figures of the gradient


def factor():
    """Draw the gradient of the focal loss divided by the gradient of cross entropy."""
    x = np.linspace(-6, 12, 400)
    figure, panel = style.figure(height=2.8)
    for gamma, colour in style.GAMMAS.items():
        ratio = exact_gradient(x, gamma) / exact_gradient(x, 0)
        line = "--" if gamma == 0 else "-"
        panel.plot(x, ratio, line, color=colour, label=rf"$\gamma$ = {gamma:g}")
    panel.set(yscale="log", ylim=(1e-6, 4), xlabel="margin $x$", xlim=(-6, 12))
    panel.set_title("gradient divided by the gradient of cross entropy")
    panel.legend()
    return figure


def one_minus_p():
    """Draw the relative error of q, computed as 1 - p and computed directly."""
    x = np.float32(np.linspace(0, 24, 500))
    e = np.exp(-x.astype(np.float64))
    exact = e / (1 + e)
    figure, panel = style.figure(height=2.8)
    for name, q, colour in (
        ("1 - sigmoid(x)", 1 - jax.nn.sigmoid(x), style.VERMILION),
        ("exp(-x) / (1 + exp(-x))", jnp.exp(-x) / (1 + jnp.exp(-x)), style.BLUE),
    ):
        panel.plot(x, np.maximum(np.abs(q - exact) / exact, 1e-9), color=colour, label=name)
    panel.set(yscale="log", ylim=(1e-9, 10), xlim=(0, 24), xlabel="margin $x$")
    panel.set_title("relative error of $q = 1 - p$ in float32")
    panel.legend(loc="lower right", bbox_to_anchor=(1, 0.2))
    return figure


_COLOURS = {
    "focal_jax": style.BLUE,
    "textbook": style.VERMILION,
    "torchvision's steps": style.PURPLE,
    "Keras's clipping, 1e-7": style.GREEN,
    "pytorch-retinanet's clipping, 1e-4": style.INK,
}


def margins():
    """Draw the relative error of the gradient against the margin; crosses mark NaN."""
    x = np.linspace(-100, 40, 1401)
    figure, panels = style.figure(1, 2, height=4.2, sharey=True)
    for panel, gamma in zip(panels, (2.0, 0.5)):
        found = errors(x, gamma)
        for name, colour in _COLOURS.items():
            # One point for 20 margins, their largest error. All points would fill a band.
            blocks = found[name][:-1].reshape(-1, 20)
            with np.errstate(all="ignore"):
                top = np.where(np.isnan(blocks).all(1), np.nan, np.max(np.nan_to_num(blocks), 1))
            panel.plot(x[10:-1:20], np.clip(top, 1e-8, 10), color=colour, label=name)
            nan = np.isnan(blocks).any(1)
            panel.plot(x[10:-1:20][nan], np.full(nan.sum(), 30), "x", color=colour, markersize=4)
        panel.set(yscale="log", ylim=(1e-8, 80), xlabel="margin $x$")
        panel.set_title(rf"$\gamma$ = {gamma:g}")
    panels[0].set_ylabel("relative error of the gradient")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center")
    return figure


# ---------------------------------------------------------------- figures of the losses


def loss_figure(loss: Loss):
    """Draw one loss and its gradient against a logit."""
    x = np.linspace(-8, 8, 161)
    figure, (left, right) = style.figure(1, 2, height=2.5)
    for curve in curves.curves(loss, x):
        left.plot(x, curve.losses, label=curve.name)
        right.plot(x, curve.gradients, label=curve.name)
    left.set_title("loss")
    right.set_title("gradient")
    for panel in (left, right):
        panel.set(xlabel="logit", xlim=(-8, 8), xticks=range(-8, 9, 4))
    left.legend()
    return figure


FIGURE_OF: dict[str, Callable] = {
    "loss": curves.gammas_figure,
    "factor": factor,
    "one_minus_p": one_minus_p,
    "margins": margins,
    "heads": heads_figure,
    **{name: lambda loss=loss: loss_figure(loss) for name, loss in LOSSES.items()},
}


@style.applied()
def main(argv: list[str] | None = None) -> None:
    """Write the figures, or print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder (default: %(default)s)")
    parser.add_argument("--numbers", action="store_true", help="print the table of errors only")
    parser.add_argument("--heads", action="store_true", help="print the table of linear heads only")
    parser.add_argument("--only", nargs="*", choices=FIGURE_OF, default=list(FIGURE_OF))
    args = parser.parse_args(argv)
    if args.numbers or args.heads:
        print(numbers() if args.numbers else heads())
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        FIGURE_OF[name]().savefig(args.out / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
