"""The result of `compare_gradients` as numbers, tables and figures."""

import dataclasses
import html
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from focal_jax.measure import style
from focal_jax.measure.extras import require_extra

# The regimes of the logits and their margins, which `compare_gradients` defines.
REGIMES = {"easy": "1 to 8", "hard": "-8 to 1", "saturated": "\N{PLUS-MINUS SIGN}(20 to 80)"}
_COLOURS = {"focal_jax": style.BLUE, "plain JAX": style.VERMILION}


@dataclasses.dataclass(frozen=True)
class GradientError:
    """The errors of the finite entries of a gradient, and the number of the other entries."""

    absolute: float  # the largest |gradient - exact|; NaN if no entry is finite
    relative: float  # the largest |gradient - exact| / |exact|, see `compare_gradients`; or NaN
    nans: int
    infinities: int


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The errors, the time and the memory of one implementation."""

    easy: GradientError
    hard: GradientError
    saturated: GradientError
    seconds: float  # the median time of a call
    temporary_bytes: int | None  # None if the compiler does not report the number


class Table(NamedTuple):
    """A table of text; the first `left` columns are aligned to the left."""

    headings: tuple[str, ...]
    left: int
    rows: list[tuple[str, ...]]
    caption: str

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """Yield the table for a terminal, or one line per row if the terminal is narrow."""
        if options.max_width < 50:
            for row in self.rows:
                numbers = map(" ".join, zip(self.headings[self.left :], row[self.left :]))
                yield f"{', '.join(row[: self.left])}: {', '.join(numbers)}"
            yield self.caption
            return
        layout = {"box": require_extra("rich.box").SIMPLE_HEAD, "caption_justify": "left"}
        layout |= {"padding": 0, "show_edge": False}
        table = require_extra("rich.table").Table(caption=self.caption, **layout)
        for i, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if i < self.left else "right")
        for row in self.rows:
            table.add_row(*row)
        yield table

    def html(self) -> str:
        """Return the table for a notebook."""
        rows = []
        for cells in (self.headings, *self.rows):
            tag, sides = "td" if rows else "th", ["left"] * self.left + ["right"] * len(cells)
            cells = (
                f'<{tag} style="text-align:{side}">{html.escape(cell)}</{tag}>'
                for side, cell in zip(sides, cells)
            )
            rows.append(f"<tr>{''.join(cells)}</tr>")
        return f"<table>{''.join(rows)}</table><p>{html.escape(self.caption)}</p>"


@dataclasses.dataclass(frozen=True)
class GradientComparison:
    """The result of `compare_gradients`: its arguments and the measurements.

    Notebooks and `rich.print` show it as tables; `plot` draws it.
    """

    loss: str
    shape: tuple[int, ...]
    axis: int
    options: Mapping[str, Any]
    dtype: str
    seed: int
    repeats: int
    sample_shape: tuple[int, ...]  # the shape of the logits at which the errors are measured
    jax_version: str
    device: str
    focal_jax: Measurement
    plain_jax: Measurement

    @property
    def _measurements(self) -> dict[str, Measurement]:
        return dict(zip(_COLOURS, (self.focal_jax, self.plain_jax)))

    @property
    def summary(self) -> str:
        """The ratio of the times, and the temporary memory relative to the logits."""
        ratio, size = self.plain_jax.seconds / self.focal_jax.seconds, math.prod(self.shape)
        if 1 / 1.05 < ratio < 1.05:
            text = "focal_jax and plain JAX are about equally fast."
        elif ratio > 1:
            text = f"focal_jax is {ratio:.1f} times as fast as plain JAX."
        else:
            text = f"plain JAX is {1 / ratio:.1f} times as fast as focal_jax."
            if size < 10**6:
                text += f" With {size:,} logits, the overhead of a call counts: try a larger shape."
        counts: dict[str, Any] = {k: m.temporary_bytes for k, m in self._measurements.items()}
        if None not in counts.values():
            logits = size * jnp.dtype(self.dtype).itemsize
            shares = ", ".join(f"{name} {count / logits:.2f}" for name, count in counts.items())
            text += f" Temporary memory divided by the memory of the logits: {shares}."
        return text

    @property
    def _title(self) -> tuple[str, str]:
        parts = [f"{self.dtype} " + "\N{MULTIPLICATION SIGN}".join(f"{n:,}" for n in self.shape)]
        for name, value in self.options.items():
            if value is not None and value is not False:
                text = "per class" if isinstance(value, tuple) else f"{value:g}"
                parts.append(name if value is True else f"{name} {text}")
        return self.loss, ", ".join(parts)

    def _tables(self) -> list[Table]:
        errors, costs = [], []
        for regime in REGIMES:
            for name, measured in self._measurements.items():
                error: GradientError = getattr(measured, regime)
                shown = _number(error.relative), _number(error.absolute)
                errors.append((regime, name, *shown, f"{error.nans + error.infinities:,}"))
        for name, measured in self._measurements.items():
            count = measured.temporary_bytes
            size = "unknown" if count is None else f"{count / 1e6:,.3g} MB"
            costs.append((name, f"{measured.seconds * 1e3:.3g} ms", size))
        margins = ", ".join(f"{regime} {margin}" for regime, margin in REGIMES.items())
        headings = ("logits", "gradient", "relative error", "absolute error", "NaN or inf")
        caption = (
            f"Largest errors of {math.prod(self.sample_shape):,} gradient entries, against 60 "
            f"digits, without NaN and inf. Margins of the logits: {margins}."
        )
        cost_headings = ("gradient", "median time", "temporary memory")
        cost_caption = f"jit(value_and_grad) on {self.device}, JAX {self.jax_version}."
        return [Table(headings, 2, errors, caption), Table(cost_headings, 1, costs, cost_caption)]

    def __rich__(self) -> Any:
        """Return the tables for a terminal."""
        parts = [*self._title, *self._tables(), self.summary]
        return require_extra("rich.console").Group(*parts)

    def _repr_html_(self) -> str:
        """Return the tables for a notebook."""
        name, details, summary = map(html.escape, (*self._title, self.summary))
        tables = "".join(table.html() for table in self._tables())
        return f"<p><b>{name}</b><br>{details}</p>{tables}<p>{summary}</p>"

    @style.applied()
    def plot(self) -> Any:
        """Draw the relative errors, the time and the memory; return a matplotlib figure."""
        figure, (errors, time, memory) = style.figure(1, 3, width=10, width_ratios=(2.6, 1, 1))
        figure.suptitle("\n".join(self._title))
        epsilon = float(jnp.finfo(self.dtype).eps)
        bottom, invalid_height, top = epsilon / 100, 3e3, 1e5
        errors.set(yscale="log", ylim=(bottom, top), xlim=(-0.5, 2.5))
        errors.set_ylabel("largest relative error of the gradient")
        errors.set_xticks(range(3), [f"{name}\nmargin {at}" for name, at in REGIMES.items()])
        errors.set_yticks([10.0**k for k in range(0, math.floor(math.log10(bottom)), -2)])
        text = {"textcoords": "offset points", "size": "small"}
        for y, label in ((epsilon, f"epsilon\nof {self.dtype}"), (1, "100%\nerror")):
            errors.axhline(y, color=style.INK, linewidth=0.8, linestyle="--", zorder=0)
            errors.annotate(label, (2.5, y), (3, 0), va="center", **text)
        for shift, (name, measured) in zip((-0.18, 0.18), self._measurements.items()):
            colour = _COLOURS[name]
            errors.plot([], "o", color=colour, label=name)
            for x, regime in enumerate(REGIMES):
                error: GradientError = getattr(measured, regime)
                marks = []
                if not math.isnan(error.relative):
                    y = min(max(error.relative, 2 * bottom), 100)
                    marks.append(("o", y, _number(error.relative)))
                if invalid := error.nans + error.infinities:
                    marks.append(("X", invalid_height, f"{invalid:,} NaN or inf"))
                for marker, y, label in marks:
                    at = (x + shift, y)
                    errors.plot(*at, marker, color=colour, markersize=7)
                    errors.annotate(label, at, (0, 7), color=colour, ha="center", **text)
        errors.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1))

        names, times, sizes = zip(*self._tables()[1].rows)
        seconds = [m.seconds for m in self._measurements.values()]
        counts = [m.temporary_bytes or 0 for m in self._measurements.values()]
        for panel, label, heights, texts in (
            (time, "median time of a call [ms]", [x * 1e3 for x in seconds], times),
            (memory, "temporary memory [MB]", [x / 1e6 for x in counts], sizes),
        ):
            bars = panel.bar(names, heights, 0.6, color=list(_COLOURS.values()))
            panel.bar_label(bars, texts, fontsize="small", padding=2, color=style.INK)
            panel.set_ylabel(label)
            panel.margins(x=0.2, y=0.1)
            panel.grid(visible=False, axis="x")
        return figure


def _number(x: float) -> str:
    return "undefined" if math.isnan(x) else f"{x:.1e}" if x else "0"
