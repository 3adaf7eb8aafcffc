"""Make tables, goals and figures from results.json.

Example:
  python -m benchmarks.report out/benchmarks/results.json --markdown
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter, NullLocator
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.measure import GRADIENT, MODES, OPS, VALUE, Rows
from benchmarks.peers import FOCAL_JAX, LINEAR, LINEAR_OTHER_VERSION, OTHER_VERSION, PLAIN_JAX
from benchmarks.workloads import SMALL
from focal_jax.measure import style

TIMES = "\N{MULTIPLICATION SIGN}"
AT_LEAST, AT_MOST = "\N{GREATER-THAN OR EQUAL TO}", "\N{LESS-THAN OR EQUAL TO}"


class Table(NamedTuple):
    """A table of text. The first `left` columns are aligned left, the others right."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int


def select(rows: Rows, **fields: Any) -> Rows:
    """Return the rows that have the given fields."""
    return [row for row in rows if all(row.get(key) == x for key, x in fields.items())]


def _distinct(values: Iterable) -> list:
    return list(dict.fromkeys(values))


# ---------------------------------------------------------------- formatting


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def _ratio(x: float | None) -> str:
    if x is None:
        return "-"
    return f"{x:.2f}" if x >= 0.1 else f"{x:.3f}"


def _megabytes(x: float | None) -> str:
    if x is None:
        return "-"
    return f"{x / 1e6:,.3f}" if x < 1e6 else f"{x / 1e6:,.1f}"


def _counts(ops: dict[str, int] | None) -> list[str]:
    return ["-" if ops is None else str(ops[op]) for op in OPS]


def implementation(row: dict[str, Any]) -> str:
    """Return the implementation, with the formula of plain JAX."""
    formula = row.get("formula")
    return f"{row['implementation']} ({formula})" if formula else row["implementation"]


def _shape(shape: Sequence[int]) -> str:
    return f" {TIMES} ".join(f"{n:,}" for n in shape)


# ---------------------------------------------------------------- goals


class Goal(NamedTuple):
    """A requirement: `measured` is at least, or at most, `bound`."""

    name: str
    measured: float
    sign: str
    bound: float

    @property
    def met(self) -> bool:
        """Whether the unrounded measurement meets the bound."""
        is_lower_bound = self.sign == AT_LEAST
        return self.measured >= self.bound if is_lower_bound else self.measured <= self.bound


# By kind: the smallest speed-up over plain JAX, and the largest temporaries / logits.
_BOUNDS = {"elementwise": (3.0, 0.1), "position": (1.25, 0.4), "distribution": (1.5, 0.4)}
# The smallest speed-up of workloads whose arrays fit into the cache.
_IN_CACHE = {SMALL: 1.0, "imagenet": 1.0}


def _losses_goals(rows: Rows) -> list[Goal]:
    """Return the goals for the rows of one workload of the section `losses`."""
    (gradient,) = select(rows, implementation=FOCAL_JAX, mode=GRADIENT)
    (value,) = select(rows, implementation=FOCAL_JAX, mode=VALUE)
    name = gradient["workload"]
    speedup, memory = _BOUNDS[gradient["kind"]]
    speedup = _IN_CACHE.get(name, speedup)
    over_plain = f"{name}: speed-up over {PLAIN_JAX}"
    found = [
        Goal(over_plain, gradient["speedup"], AT_LEAST, speedup),
        Goal(f"{over_plain}, value only", value["speedup"], AT_LEAST, 1.0),
    ]
    for optax in select(rows, implementation="optax", mode=GRADIENT):
        over_optax = gradient["speedup"] / optax["speedup"]
        found.append(Goal(f"{name}: speed-up over optax", over_optax, AT_LEAST, 8.0))
    share = gradient["temporary_share"]
    if share is not None and name != SMALL:
        found.append(Goal(f"{name}: temporaries / logits", share, AT_MOST, memory))
    # Scatters are not counted: XLA:CPU runs a scatter of one entry per position fast.
    slow_ops = ("transpose", "power")
    count = sum(gradient["ops"][op] for op in slow_ops)
    return [*found, Goal(f"{name}: {', '.join(slow_ops)}", count, AT_MOST, 0)]


def _linear_goals(row: dict[str, Any]) -> list[Goal]:
    """Return the goals for a row of the linear head."""
    found = [Goal("linear head: time / time with logits", 1 / row["speedup"], AT_MOST, 1.3)]
    if row["temporary_share"] is not None:  # the gradients are results, not temporaries
        share = row["temporary_share"]
        found.append(Goal("linear head: temporaries / logits", share, AT_MOST, 0.1))
    return found


def _family_goals(row: dict[str, Any]) -> list[Goal]:
    """Return the goals for a row of the section `family`."""
    name = row["workload"]
    speedup, memory = (2.0, 0.05) if row["kind"] == "elementwise" else (1.25, None)
    found = [Goal(f"{name}: speed-up over {PLAIN_JAX}", row["speedup"], AT_LEAST, speedup)]
    if row["temporary_share"] is not None and memory is not None:
        share = row["temporary_share"]
        found.append(Goal(f"{name}: temporaries / logits", share, AT_MOST, memory))
    return found


def against(results: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
    """Return the focal_jax rows that the other version has too, each with its speed-up."""
    labels = {FOCAL_JAX: OTHER_VERSION, LINEAR: LINEAR_OTHER_VERSION}
    keys = ("section", "workload", "dtype", "mode")
    found = []
    for row in results["rows"]:
        label = labels.get(row["implementation"])
        same_program = {key: row.get(key) for key in keys}
        if label is not None:
            for other in select(results["rows"], implementation=label, **same_program):
                found.append((row, other["seconds"]["median"] / row["seconds"]["median"]))
    return found


def _against_goals(results: dict[str, Any]) -> list[Goal]:
    """Return the goals for the speed-ups over the other version.

    The bound per workload is 0.9, because the medians of equal programs differ by a tenth.
    """
    over_other = f"speed-up over the {OTHER_VERSION}"
    found = [
        Goal(f"{_label(row)}, {row['mode']}: {over_other}", speedup, AT_LEAST, 0.9)
        for row, speedup in against(results)
        if row["dtype"] == "float32"
    ]
    if found:
        mean = statistics.geometric_mean(goal.measured for goal in found)
        found.append(Goal(f"geometric mean: {over_other}", mean, AT_LEAST, 1.0))
    return found


def _label(row: dict[str, Any]) -> str:
    return row.get("workload") or row["implementation"]


def goals(results: dict[str, Any]) -> list[Goal]:
    """Return the goals that apply to the results. All goals are for float32.

    On a CPU the goals are speed-ups and temporary memory. On a GPU they are the achieved share
    of the bandwidth of a copy.
    """
    if results["quick"]:
        return []
    rows = select(results["rows"], section="losses", dtype="float32")
    gradients = select(rows, implementation=FOCAL_JAX, mode=GRADIENT)
    if results["machine"]["backend"] != "cpu":
        return [
            Goal(f"{row['workload']}: share of copy bandwidth", row["copy_share"], AT_LEAST, 0.7)
            for row in gradients
        ]
    found = [
        goal for row in gradients for goal in _losses_goals(select(rows, workload=row["workload"]))
    ]
    for row in select(results["rows"], section="family", implementation=FOCAL_JAX):
        found += _family_goals(row)
    fields = {"dtype": "float32", "implementation": LINEAR, "mode": GRADIENT}
    for row in select(results["rows"], section="linear", **fields):
        found += _linear_goals(row)
    return found + _against_goals(results)


# ---------------------------------------------------------------- tables

_TIME = ("median ms", "min ms", "lower quartile ms", "upper quartile ms")
_COST = (*_TIME, "speed-up", "temporaries / logits")
_COMPILED = ("accessed MB", "compile ms", *OPS)


def _time(row: dict[str, Any]) -> list[str]:
    """Return the cells of the columns `_TIME`."""
    names = ("median", "min", "lower_quartile", "upper_quartile")
    return [_ms(row["seconds"][name]) for name in names]


def _cost(row: dict[str, Any]) -> list[str]:
    """Return the cells of the columns `_COST` and `_COMPILED`."""
    return [
        *_time(row),
        _ratio(row["speedup"]),
        _ratio(row["temporary_share"]),
        _megabytes(row["bytes_accessed"]),
        _ms(row["compile_seconds"]),
        *_counts(row["ops"]),
    ]


def _machine(results: dict[str, Any]) -> Table:
    machine = results["machine"]
    load = machine["load_before"]
    rows = [
        ("device", f"{machine['device']} ({machine['backend']})"),
        ("processor", machine["processor"]),
        ("cores", str(machine["cores"])),
        ("system", machine["system"]),
        ("Python", machine["python"]),
        *((k, v) for k, v in machine["versions"].items() if v is not None),
        ("XLA_FLAGS", machine["xla_flags"] or "none"),
        ("load average before", "-" if load is None else f"{load:.2f}"),
        ("date", machine["date"]),
    ]
    return Table("Machine", ("", ""), rows, 2)


def _goals(results: dict[str, Any]) -> list[Table]:
    rows = [
        (
            goal.name,
            f"{goal.measured:.2f}",
            f"{goal.sign} {goal.bound:g}",
            "met" if goal.met else "missed",
        )
        for goal in goals(results)
    ]
    headings = ("goal (float32)", "measured", "required", "")
    return [Table("Goals", headings, rows, 1)] if rows else []


def _losses(results: dict[str, Any]) -> list[Table]:
    found = []
    rows = select(results["rows"], section="losses")
    for dtype in _distinct(row["dtype"] for row in rows):
        for mode in reversed(MODES):
            cells = [
                (row["workload"], _shape(row["shape"]), implementation(row), *_cost(row))
                for row in select(rows, dtype=dtype, mode=mode)
            ]
            headings = ("workload", "logits", "implementation", *_COST, *_COMPILED)
            found.append(Table(f"{mode.capitalize()}, {dtype}", headings, cells, 3))
        cells = [
            (
                row["workload"],
                row["implementation"],
                _megabytes(row["minimum_bytes"]),
                f"{row['copy_bandwidth'] / 1e9:.1f}",
                f"{row['bandwidth'] / 1e9:.1f}",
                f"{row['copy_share']:.0%}",
            )
            for row in select(rows, dtype=dtype, mode=GRADIENT)
            if row["implementation"] in (FOCAL_JAX, "torch.compile")
        ]
        headings = (
            "workload",
            "implementation",
            "minimum MB",
            "copy GB/s",
            "achieved GB/s",
            "share",
        )
        found.append(Table(f"Bandwidth, {GRADIENT}, {dtype}", headings, cells, 2))
    return found


def _growth(results: dict[str, Any]) -> list[Table]:
    cells = [
        (row["curve"], implementation(row), f"{row['size']:,}", *_cost(row)[: len(_COST)])
        for row in select(results["rows"], section="growth")
    ]
    headings = ("curve", "implementation", "size", *_COST)
    return [Table(f"Growth, {GRADIENT}, float32", headings, cells, 2)] if cells else []


def _family(results: dict[str, Any]) -> list[Table]:
    cells = [
        (row["workload"], _shape(row["shape"]), implementation(row), *_cost(row))
        for row in select(results["rows"], section="family")
    ]
    headings = ("loss", "logits", "implementation", *_COST, *_COMPILED)
    return [Table(f"Family, {GRADIENT}, float32", headings, cells, 3)] if cells else []


def _other_version(results: dict[str, Any]) -> list[Table]:
    cells = [
        (_label(row), row["dtype"], row["mode"], _ms(row["seconds"]["median"]), _ratio(speedup))
        for row, speedup in against(results)
    ]
    headings = ("workload", "dtype", "mode", "median ms", "speed-up")
    title = f"Speed-up over another version: {results['machine'].get('against')}"
    return [Table(title, headings, cells, 3)] if cells else []


def _linear(results: dict[str, Any]) -> list[Table]:
    rows = select(results["rows"], section="linear")
    if not rows:
        return []
    shape = "{} positions, {} features, {} classes".format(*(f"{n:,}" for n in rows[0]["shape"]))
    cells = [(row["dtype"], row["mode"], implementation(row), *_cost(row)) for row in rows]
    headings = ("dtype", "mode", "implementation", *_COST, *_COMPILED)
    return [Table(f"Linear head: {shape}; speed-up over {FOCAL_JAX}", headings, cells, 3)]


def _scaling(results: dict[str, Any]) -> list[Table]:
    rows = select(results["rows"], section="scaling")
    rows.sort(key=lambda row: (row["kind"], row["implementation"], row["devices"]))
    cells = []
    for row in rows:
        same = {key: row[key] for key in ("kind", "implementation")}
        (one_device,) = select(rows, devices=1, **same)
        cells.append(
            (
                row["kind"],
                row["implementation"],
                str(row["devices"]),
                _shape(row["shape"]),
                *_time(row),
                _ratio(one_device["seconds"]["median"] / row["seconds"]["median"]),
                _ratio(row["temporary_share"]),
                str(row["ops"]["all-gather"]),
            )
        )
    headings = ("kind", "implementation", "devices", "logits", *_TIME)
    headings += ("speed-up over one device", "temporaries / logits", "all-gather")
    return [Table(_scaling_title(results), headings, cells, 2)] if rows else []


def _scaling_title(results: dict[str, Any]) -> str:
    return f"Scaling: XLA host devices that share {results['machine']['cores']} cores"


def tables(results: dict[str, Any]) -> list[Table]:
    """Return all tables of the results."""
    return [
        _machine(results),
        *_goals(results),
        *_other_version(results),
        *_losses(results),
        *_family(results),
        *_linear(results),
        *_growth(results),
        *_scaling(results),
    ]


def show(tables: Sequence[Table]) -> None:
    """Print tables to the terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = 200
    for table in tables:
        rich = RichTable(title=table.title, title_justify="left", show_header=any(table.headings))
        for i, heading in enumerate(table.headings):
            rich.add_column(heading, justify="left" if i < table.left else "right")
        grouped = len({row[0] for row in table.rows}) < len(table.rows)
        for row, following in zip(table.rows, [*table.rows[1:], table.rows[-1]]):
            row_style = {"met": "green", "missed": "bold red"}.get(row[-1])
            rich.add_row(*row, style=row_style, end_section=grouped and row[0] != following[0])
        console.print(rich, "")


def markdown(tables: Sequence[Table]) -> str:
    """Return tables as Markdown."""
    lines = []
    for table in tables:
        rules = ["---" if i < table.left else "---:" for i in range(len(table.headings))]
        lines += [f"### {table.title}", ""]
        lines += [f"| {' | '.join(row)} |" for row in (table.headings, rules, *table.rows)]
        lines.append("")
    return "\n".join(lines)


# ---------------------------------------------------------------- figures

# The color of each implementation in every figure.
_COLORS = {
    FOCAL_JAX: style.BLUE,
    PLAIN_JAX: style.VERMILION,
    OTHER_VERSION: style.TRUTH,
    "optax": style.PURPLE,
    "one-hot": style.GREEN,
    "torch": style.INK,
    "torch.compile": (style.INK, 0.5),
}


def _bars(axes: Axes, rows: Rows, field: str) -> None:
    """Draw one bar per row. The bars are grouped by workload, the first group at the top."""
    ticks, y = {}, 0.0
    for workload in _distinct(row["workload"] for row in rows):
        group = [row for row in select(rows, workload=workload) if row[field] is not None]
        start = y
        for row in group:
            value, label = row[field], row["implementation"]
            axes.barh(y, value, 0.85, color=_COLORS[label])
            axes.annotate(
                _ratio(value),
                (value, y),
                (3, 0),
                textcoords="offset points",
                va="center",
                size="x-small",
                weight="bold" if label == FOCAL_JAX else "normal",
            )
            y += 1
        ticks[(start + y - 1) / 2] = workload
        y += 0.8
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set(ylim=(y - 0.8, -0.8))
    axes.tick_params("y", length=0)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.12)


def _bar_figure(rows: Rows, field: str, title: str) -> Figure:
    """Draw a panel of bars for each dtype."""
    dtypes = _distinct(row["dtype"] for row in rows)
    most_bars = max(len(select(rows, dtype=dtype)) for dtype in dtypes)
    figure, panels = style.figure(
        1, len(dtypes), width=1.5 + 5 * len(dtypes), height=1.6 + 0.19 * most_bars, squeeze=False
    )
    for axes, dtype in zip(panels[0], dtypes):
        _bars(axes, select(rows, dtype=dtype), field)
        axes.axvline(1, color=style.INK, linewidth=0.8, linestyle="--", zorder=0)
        axes.set_title(dtype)
        axes.spines["left"].set_visible(False)
    figure.suptitle(title)
    labels = [label for label in _COLORS if select(rows, implementation=label)]
    patches = [Patch(color=_COLORS[label], label=label) for label in labels]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(labels))
    return figure


def _finish(figure: Figure, panels: Sequence[Axes], ylabel: str, title: str) -> Figure:
    """Add the title, the legend and the shared label of the y axis."""
    panels[0].set_ylabel(ylabel)
    panels[0].legend()
    figure.suptitle(title)
    return figure


def _growth_figure(rows: Rows) -> Figure:
    """Draw time against size, one panel per curve, and a line of constant time per element."""
    curves = _distinct(row["curve"] for row in rows)
    width = 1 + 4 * len(curves)
    figure, (panels,) = style.figure(1, len(curves), width=width, sharey=True, squeeze=False)
    for axes, curve in zip(panels, curves):
        for label in (FOCAL_JAX, PLAIN_JAX):
            points = select(rows, curve=curve, implementation=label)
            sizes = [row["size"] for row in points]
            low, median, high = (
                [row["seconds"][key] * 1e3 for row in points]
                for key in ("lower_quartile", "median", "upper_quartile")
            )
            axes.plot(sizes, median, "o-", color=_COLORS[label], label=label, markersize=4)
            axes.fill_between(sizes, low, high, color=_COLORS[label], alpha=0.2, linewidth=0)
        largest = select(rows, curve=curve, size=sizes[-1])
        slope = min(row["seconds"]["median"] for row in largest) * 1e3 / sizes[-1] / 3
        ends = [sizes[0], sizes[-1]]
        line = [slope * n for n in ends]
        axes.plot(ends, line, color=style.INK, linestyle=":", label="proportional to size")
        title, _, xlabel = curve.rpartition(", ")
        axes.set(xscale="log", yscale="log", xlabel=xlabel)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title)
    ylabel = "median time [ms], band: quartiles"
    return _finish(figure, panels, ylabel, f"Growth, {GRADIENT}, float32")


def _scaling_figure(rows: Rows, title: str) -> Figure:
    """Draw time against the number of devices, one panel per kind of scaling."""
    kinds = {"strong": "strong: eight images in total", "weak": "weak: one image per device"}
    figure, panels = style.figure(1, len(kinds), width=7, sharey=True)
    for axes, (kind, panel_title) in zip(panels, kinds.items()):
        for label in (FOCAL_JAX, PLAIN_JAX):
            points = select(rows, kind=kind, implementation=label)
            devices = [row["devices"] for row in points]
            milliseconds = [row["seconds"]["median"] * 1e3 for row in points]
            axes.plot(devices, milliseconds, "o-", color=_COLORS[label], label=label)
        axes.set(xscale="log", ylim=(0, None), xlabel="host devices")
        axes.set_xticks(devices, [str(n) for n in devices])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(panel_title)
    return _finish(figure, panels, "median time [ms]", title)


@style.applied()
def figures(results: dict[str, Any]) -> dict[str, Figure]:
    """Return all figures of the results by name."""
    drawn = {}
    rows = select(results["rows"], section="losses", mode=GRADIENT)
    if rows:
        others = [row for row in rows if row["implementation"] != PLAIN_JAX]
        drawn["speedup"] = _bar_figure(others, "speedup", f"Speed-up over {PLAIN_JAX}, {GRADIENT}")
        known = [row for row in rows if row["temporary_share"] is not None]
        title = f"Peak temporary memory / size of the logits, {GRADIENT}"
        drawn["memory"] = _bar_figure(known, "temporary_share", title)
    rows = select(results["rows"], section="growth")
    if rows:
        drawn["growth"] = _growth_figure(rows)
    rows = select(results["rows"], section="scaling")
    if rows:
        drawn["scaling"] = _scaling_figure(rows, _scaling_title(results))
    return drawn


def draw(results: dict[str, Any], folder: Path) -> None:
    """Write all figures as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(results).items():
        figure.savefig(folder / f"{name}.png")


# ---------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> None:
    """Print tables, or write figures, of stored results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="results.json")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write the figures to DIR")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text(encoding="utf-8"))
    if options.markdown:
        print(markdown(tables(results)))
    else:
        show(tables(results))
    if options.figures is not None:
        draw(results, options.figures)


if __name__ == "__main__":
    main()
