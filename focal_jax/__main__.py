"""The command line: `python -m focal_jax compare` and `python -m focal_jax plot`.

Presentation only: what is shown is measured by `focal_jax.compare_gradients`, and the
curves are drawn from the library's own losses and gradients.
"""

import argparse
import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from focal_jax._checks import InputError
from focal_jax._compare import (
    DTYPES,
    HEADS,
    GradientComparison,
    GradientError,
    Measured,
    compare_gradients,
)
from focal_jax._sigmoid import sigmoid_focal_loss

_MARGINS = {"easy": "1 to 8", "hard": "-8 to 1", "saturated": "\N{PLUS-MINUS SIGN}(20 to 80)"}
_COLOURS = {"custom": "#0072b2", "autodiff": "#d55e00"}
_BESIDE: dict[str, Any] = {
    "textcoords": "offset points",
    "size": "small",
    "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5},
}
_GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)  # those of the paper's Figure 1


def _extra(module: str) -> ModuleType:
    """Import what only the presentation needs, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise SystemExit(
            f'{name} is missing: pip install "focal_jax[benchmarks]" brings it ({error})'
        ) from error


# ---------------------------------------------------------------- a comparison as text


def _title(report: GradientComparison) -> str:
    shape = "\N{MULTIPLICATION SIGN}".join(map(str, report.shape))
    alpha = "per class" if isinstance(report.alpha, tuple) else report.alpha
    return f"{report.head}: {report.dtype} {shape}, gamma {report.gamma:g}, alpha {alpha}"


def _implementations(report: GradientComparison) -> dict[str, Measured]:
    return {"custom": report.custom, "autodiff": report.autodiff}


def _number(x: float) -> str:
    return "none finite" if math.isnan(x) else f"{x:.1e}" if x else "0"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _size(count: int | None) -> str:
    return "not known" if count is None else f"{count / 2**10:,.1f} KiB"


def _json(report: GradientComparison) -> str:
    """Return the report as JSON, which has no NaN: null stands for it."""

    def plain(x):
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items()}
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(plain(dataclasses.asdict(report)), indent=2, allow_nan=False)


def _print_table(report: GradientComparison) -> None:
    rich = _extra("rich.table")
    errors = rich.Table(
        caption="Largest errors of the finite gradients, against a float64 truth.",
    )
    cost = rich.Table(
        caption=f"Under jit(value_and_grad) on {report.device}, JAX {report.jax_version}."
    )
    for table, left, right in (
        (errors, ("logits", "margin", "gradient"), ("absolute", "relative", "NaN", "inf")),
        (cost, ("gradient",), ("median time", "peak temporary memory")),
    ):
        for heading in left + right:
            table.add_column(heading, justify="left" if heading in left else "right")
    for regime, margin in _MARGINS.items():
        for name, measured in _implementations(report).items():
            error: GradientError = getattr(measured, regime)
            errors.add_row(
                *((regime, margin) if name == "custom" else ("", "")),
                name,
                _number(error.absolute),
                _number(error.relative),
                f"{error.nans:,}",
                f"{error.infinities:,}",
                end_section=name == "autodiff",
            )
    for name, measured in _implementations(report).items():
        cost.add_row(name, _duration(measured.seconds), _size(measured.temporary_bytes))
    _extra("rich").print(_title(report), errors, cost)


# ---------------------------------------------------------------- figures


def _figure(size: tuple[float, float], panels: int, ratios: Sequence[float] | None = None):
    """Return a figure and its panels: no pyplot, so no window and no global state."""
    figure = _extra("matplotlib.figure").Figure(figsize=size, dpi=160, layout="constrained")
    axes = figure.subplots(1, panels, width_ratios=ratios)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # no such folder; no such format
        raise InputError(f"{path}: {error}") from error
    print(f"{path} written", file=sys.stderr)


def _comparison_figure(report: GradientComparison):
    """Draw the largest relative errors, the time and the memory of both implementations."""
    figure, (errors, time, memory) = _figure((11, 4.2), 3, (2.6, 1, 1))
    figure.suptitle(_title(report), fontsize="medium")
    measured = _implementations(report)

    epsilon = float(jnp.finfo(report.dtype).eps)
    bottom, lost, top = epsilon / 100, 3e3, 1e5
    errors.set(yscale="log", ylim=(bottom, top), xlim=(-0.5, 2.5))
    errors.set_ylabel("largest relative error of the gradient")
    errors.set_xticks(range(3), [f"{name}\nmargin {at}" for name, at in _MARGINS.items()])
    errors.set_yticks([10.0**k for k in range(0, math.floor(math.log10(bottom)), -2)])
    for y, what in ((epsilon, f"one unit\nof {report.dtype}"), (1, "no digit\nright")):
        errors.axhline(y, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
        errors.annotate(what, (2.5, y), (3, 0), color="0.4", va="center", **_BESIDE)
    for shift, (name, colour) in zip((-0.18, 0.18), _COLOURS.items()):
        found: list[GradientError] = [getattr(measured[name], regime) for regime in _MARGINS]
        errors.plot([], "o", color=colour, label=name)
        for x, error in enumerate(found):
            marks = []
            if not math.isnan(error.relative):
                y = min(max(error.relative, 2 * bottom), 100)
                marks.append(("o", y, _number(error.relative)))
            if error.nans or error.infinities:
                marks.append(("X", lost, f"{error.nans + error.infinities:,} NaN or inf"))
            for marker, y, text in marks:
                errors.plot(x + shift, y, marker, color=colour, markersize=7)
                place = (x + shift, y)
                errors.annotate(text, place, (0, 7), color=colour, ha="center", **_BESIDE)
    errors.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))

    for panel, label, heights, texts in (
        (
            time,
            "median time of a call [ms]",
            [m.seconds * 1e3 for m in measured.values()],
            [_duration(m.seconds) for m in measured.values()],
        ),
        (
            memory,
            "peak temporary memory [KiB]",
            [(m.temporary_bytes or 0) / 2**10 for m in measured.values()],
            [_size(m.temporary_bytes) for m in measured.values()],
        ),
    ):
        bars = panel.bar(list(measured), heights, 0.6, color=list(_COLOURS.values()))
        panel.bar_label(bars, texts, fontsize="small", padding=2)
        panel.set_ylabel(label)
        panel.margins(x=0.2, y=0.1)
    return figure


def _paper_figure():
    """Draw the loss against p_t, the paper's Figure 1, and its gradient beside it."""
    p_t = np.linspace(0.001, 0.999, 999)
    logits = np.tile(np.log(p_t / (1 - p_t)), (len(_GAMMAS), 1))

    def total(logits, gammas):
        losses = sigmoid_focal_loss(logits, jnp.ones_like(logits), gamma=gammas)
        return losses.sum(), losses

    curves = jax.jit(jax.grad(total, has_aux=True))
    gradients, losses = curves(logits, np.array(_GAMMAS)[:, None])

    figure, (left, right) = _figure((10, 4.2), 2)
    viridis = _extra("matplotlib").colormaps["viridis"]
    for i, gamma in enumerate(_GAMMAS):
        style = {"color": viridis(i / len(_GAMMAS)), "label": rf"$\gamma$ = {gamma:g}"}
        left.plot(p_t, losses[i], **style)
        right.plot(p_t, -gradients[i], **style)
    left.set(ylabel=r"loss  $-(1 - p_t)^\gamma\,\log p_t$", ylim=(0, 5))
    right.set(ylabel=r"gradient  $-\partial\,$loss$\,/\,\partial\,$logit", ylim=(0, None))
    for panel in (left, right):
        panel.set(xlabel=r"$p_t$, the probability of the true class", xlim=(0, 1))
        panel.grid(alpha=0.25)
    left.legend(frameon=False)
    return figure


# ---------------------------------------------------------------- the commands


def _compare(json_file: str | None = None, plot: Path | None = None, **question: Any) -> None:
    needed = ["rich.table"] * (json_file != "-") + ["matplotlib.figure"] * (plot is not None)
    for module in needed:  # before the measurement, not after it
        _extra(module)
    report = compare_gradients(**question)
    if json_file == "-":
        print(_json(report))
    else:
        _print_table(report)
        if json_file is not None:
            Path(json_file).write_text(_json(report) + "\n", encoding="utf-8")
    if plot is not None:
        _save(_comparison_figure(report), plot)


def _figure_file(name: str) -> Path:
    """Return the path, whose suffix says which format; without one another file is written."""
    path = Path(name)
    if not path.suffix.strip("."):
        raise argparse.ArgumentTypeError(
            f"got {name!r}, wanted a name that ends as a format does, such as {path.name}.png"
        )
    return path


def _plot(out: Path) -> None:
    _save(_paper_figure(), out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m focal_jax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    # What is not given is left to the function's own default.
    compare = commands.add_parser(
        "compare",
        help="hand-derived gradients against autodiff: errors, NaNs, time, memory",
        argument_default=argparse.SUPPRESS,
    )
    compare.set_defaults(run=_compare)
    compare.add_argument("--head", choices=HEADS, help="the loss")
    compare.add_argument("--shape", type=int, nargs="+", metavar="N", help="the logits' shape")
    compare.add_argument("--axis", type=int, help="the class axis")
    compare.add_argument("--gamma", type=float, help="focusing exponent")
    compare.add_argument("--alpha", type=float, nargs="+", help="one weight, or one per class")
    compare.add_argument("--dtype", choices=DTYPES, help="the logits' dtype")
    compare.add_argument("--seed", type=int, help="of the random logits and labels")
    compare.add_argument("--repeats", type=int, help="how often each regime is timed")
    compare.add_argument(
        "--json",
        dest="json_file",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write JSON to FILE, or in place of the table to the standard output",
    )
    compare.add_argument("--plot", type=_figure_file, metavar="FILE", help="draw the result")

    plot = commands.add_parser("plot", help="draw the loss and its gradient against p_t")
    plot.set_defaults(run=_plot)
    plot.add_argument("--out", type=_figure_file, metavar="FILE", default="focal_loss.png")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a bad argument ends it with a message and exit code 2."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    if len(options.get("alpha", ())) == 1:
        options["alpha"] = options["alpha"][0]
    try:
        options.pop("run")(**options)
    except (InputError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
