"""What `compare_gradients` returns: the numbers, and how they are shown."""

import dataclasses
import html
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from focal_jax import _style
from focal_jax._extras import extra

# The regimes of the logits, by their margin: the true logit less the log-sum-exp of the others.
MARGINS = {"easy": "1 to 8", "hard": "-8 to 1", "saturated": "\N{PLUS-MINUS SIGN}(20 to 80)"}
_COLOURS = {"custom": _style.BLUE, "autodiff": _style.VERMILION}


@dataclasses.dataclass(frozen=True)
class GradientError:
    """How far gradients lie from the truth; differences are those of the finite ones."""

    absolute: float  # the largest |gradient - truth|, NaN if no gradient is finite
    relative: float  # the largest |gradient - truth| / |truth|, likewise
    nans: int
    infinities: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of one implementation."""

    easy: GradientError
    hard: GradientError
    saturated: GradientError
    seconds: float  # the median of a call
    temporary_bytes: int | None  # None where the compiler does not say


class Table(NamedTuple):
    """Rows of text, for a terminal or a notebook."""

    headings: tuple[str, ...]
    left: int  # how many columns are words
    rows: list[tuple[str, ...]]
    caption: str

    def __rich__(self) -> Any:
        """Return the table for a terminal."""
        table = extra("rich.table").Table(
            box=extra("rich.box").SIMPLE_HEAD,
            padding=(0, 1),
            caption=self.caption,
            caption_justify="left",
        )
        for i, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if i < self.left else "right")
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclasses.dataclass(frozen=True)
class GradientComparison:
    """The result of `compare_gradients`: the question, and what was measured.

    A terminal (rich) and a notebook show it as tables; `plot` draws it.
    """

    loss: str
    shape: tuple[int, ...]
    axis: int
    options: Mapping[str, Any]
    dtype: str
    seed: int
    repeats: int
    # The logits that the errors are those of; time and memory are those of the whole shape.
    held_against_the_truth: tuple[int, ...]
    jax_version: str
    device: str
    custom: Measured
    autodiff: Measured

    @property
    def verdict(self) -> str:
        """What came out, in a sentence or two."""
        ours, plain = self.custom, self.autodiff
        ratio = plain.seconds / ours.seconds
        winner, times = ("custom", ratio) if ratio >= 1 else ("autodiff", 1 / ratio)
        if times < 1.05:
            out = "The two gradients are about as fast."
        else:
            out = f"The {winner} gradient is {times:.1f} times as fast."
        size = math.prod(self.shape)
        if winner == "autodiff" and size < 10**6:
            out += (
                f" Of so few logits ({size:,}) the call itself is most of the time, and the memory"
                " traffic that a kernel of its own saves hardly shows: try a larger shape."
            )
        held = [m.temporary_bytes for m in (ours, plain)]
        if None not in held:
            shares = [x / size / jnp.dtype(self.dtype).itemsize for x in held if x is not None]
            out += (
                " Beside inputs and results the custom one needs {:.2f} of the logits' memory,"
                " autodiff {:.2f}."
            ).format(*shares)
        return out

    @property
    def _title(self) -> tuple[str, str]:
        def shown(value: Any) -> str:
            return f"{value:g}" if isinstance(value, int | float) else "per class"

        shape = "\N{MULTIPLICATION SIGN}".join(f"{n:,}" for n in self.shape)
        given = [f"{k} {shown(v)}" for k, v in self.options.items() if v is not None]
        return self.loss, ", ".join([f"{self.dtype} {shape}", *given])

    @property
    def _implementations(self) -> dict[str, Measured]:
        return {"custom": self.custom, "autodiff": self.autodiff}

    def _tables(self) -> list[Table]:
        errors = []
        for regime in MARGINS:
            for name, measured in self._implementations.items():
                error: GradientError = getattr(measured, regime)
                numbers = _number(error.relative), _number(error.absolute)
                shown = regime if name == "custom" else ""
                bad = f"{error.nans + error.infinities:,}"
                errors.append((shown, name, *numbers, bad))
        cost = [
            (name, _duration(measured.seconds), _size(measured.temporary_bytes))
            for name, measured in self._implementations.items()
        ]
        return [
            Table(
                ("logits", "gradient", "relative", "absolute", "NaN, inf"),
                2,
                errors,
                f"Largest errors of {math.prod(self.held_against_the_truth):,} gradients, to 60 "
                "digits. Margin of the true logit: "
                + ", ".join(f"{name} {margin}" for name, margin in MARGINS.items())
                + ".",
            ),
            Table(
                ("gradient", "median time", "temporary memory"),
                1,
                cost,
                f"Of jit(value_and_grad) on {self.device}, JAX {self.jax_version}.",
            ),
        ]

    def __rich__(self) -> Any:
        """Return the tables for a terminal, in sixty columns."""
        shown: list[Any] = [*self._title, ""]
        for table in self._tables():
            shown += [table, ""]
        return extra("rich.console").Group(*shown, self.verdict)

    def _repr_html_(self) -> str:
        """Return the tables for a notebook."""

        def row(cells: tuple[str, ...], tag: str, left: int) -> str:
            styles = ["left" if i < left else "right" for i in range(len(cells))]
            cells_ = [
                f'<{tag} style="text-align:{style}">{html.escape(cell)}</{tag}>'
                for style, cell in zip(styles, cells)
            ]
            return f"<tr>{''.join(cells_)}</tr>"

        name, question = map(html.escape, self._title)
        out = [f"<p><b>{name}</b><br>{question}</p>"]
        for headings, left, rows, caption in self._tables():
            head, body = row(headings, "th", left), "".join(row(r, "td", left) for r in rows)
            out.append(
                f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
                f"<p>{html.escape(caption)}</p>"
            )
        return "".join([*out, f"<p>{html.escape(self.verdict)}</p>"])

    @_style.applied()
    def plot(self) -> Any:
        """Draw the largest relative errors, the time and the memory of both implementations.

        Returns:
          A `matplotlib.figure.Figure`: a notebook shows it, `figure.savefig` writes it.

        Raises:
          ImportError: without matplotlib, which `focal_jax[benchmarks]` brings.
        """
        figure, (errors, time, memory) = _style.figure(1, 3, width=10, width_ratios=(2.6, 1, 1))
        figure.suptitle("\n".join(self._title))
        measured = self._implementations

        epsilon = float(jnp.finfo(self.dtype).eps)
        bottom, lost, top = epsilon / 100, 3e3, 1e5
        errors.set(yscale="log", ylim=(bottom, top), xlim=(-0.5, 2.5))
        errors.set_ylabel("largest relative error of the gradient")
        errors.set_xticks(range(3), [f"{name}\nmargin {at}" for name, at in MARGINS.items()])
        errors.set_yticks([10.0**k for k in range(0, math.floor(math.log10(bottom)), -2)])
        beside = {"textcoords": "offset points", "size": "small"}
        for y, what in ((epsilon, f"one unit\nof {self.dtype}"), (1, "no digit\nright")):
            errors.axhline(y, color=_style.INK, linewidth=0.8, linestyle="--", zorder=0)
            errors.annotate(what, (2.5, y), (3, 0), va="center", **beside)
        for shift, (name, colour) in zip((-0.18, 0.18), _COLOURS.items()):
            found: list[GradientError] = [getattr(measured[name], regime) for regime in MARGINS]
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
                    errors.annotate(text, place, (0, 7), color=colour, ha="center", **beside)
        errors.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1))

        for panel, label, heights, texts in (
            (
                time,
                "median time of a call [ms]",
                [m.seconds * 1e3 for m in measured.values()],
                [_duration(m.seconds) for m in measured.values()],
            ),
            (
                memory,
                "temporary memory [MB]",
                [(m.temporary_bytes or 0) / 1e6 for m in measured.values()],
                [_size(m.temporary_bytes) for m in measured.values()],
            ),
        ):
            bars = panel.bar(list(measured), heights, 0.6, color=list(_COLOURS.values()))
            panel.bar_label(bars, texts, fontsize="small", padding=2, color=_style.INK)
            panel.set_ylabel(label)
            panel.margins(x=0.2, y=0.1)
            panel.grid(visible=False, axis="x")
        return figure


def _number(x: float) -> str:
    return "none finite" if math.isnan(x) else f"{x:.1e}" if x else "0"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _size(count: int | None) -> str:
    return "not known" if count is None else f"{count / 1e6:,.3g} MB"
