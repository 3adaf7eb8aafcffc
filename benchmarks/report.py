"""Tables, figures and the stated goals from results.json.

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

from benchmarks.measure import GRADIENT, MODES, OPS, VALUE
from benchmarks.peers import BEFORE, LINEAR, LINEAR_BEFORE, OURS, PLAIN
from benchmarks.workloads import SMALL
from focal_jax import _style

Rows = list[dict[str, Any]]
TIMES = "\N{MULTIPLICATION SIGN}"


class Table(NamedTuple):
    """Text in rows; the first `left` columns are words, the others numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int


def select(rows: Rows, **wanted: Any) -> Rows:
    """Return the rows that have these fields."""
    return [row for row in rows if all(row.get(key) == x for key, x in wanted.items())]


def _distinct(values: Iterable) -> list:
    return list(dict.fromkeys(values))


# ---------------------------------------------------------------- numbers as text


def _ms(seconds: float | None) -> str:
    return (
        "-"
        if seconds is None
        else f"{seconds * 1e3:.3g}"
        if seconds < 0.1
        else f"{seconds * 1e3:,.0f}"
    )


def _spread(seconds: dict[str, float]) -> str:
    return " / ".join(_ms(seconds[key]) for key in ("min", "lower_quartile", "upper_quartile"))


def _ratio(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}" if x >= 0.1 else f"{x:.3f}"


def _megabytes(x: float | None) -> str:
    return "-" if x is None else f"{x / 1e6:,.3f}" if x < 1e6 else f"{x / 1e6:,.1f}"


def _ops(ops: dict[str, int] | None) -> list[str]:
    return ["-" if ops is None else str(ops[op]) for op in OPS]


def _shape(shape: Sequence[int]) -> str:
    return f" {TIMES} ".join(f"{n:,}" for n in shape)


# ---------------------------------------------------------------- the goals


class Goal(NamedTuple):
    """Something promised: `measured` is to be at least, or at most, `bound`."""

    what: str
    measured: float
    sign: str
    bound: float

    @property
    def met(self) -> bool:
        """Whether it was reached; exactly, however near."""
        return self.measured >= self.bound if self.sign == LEAST else self.measured <= self.bound


LEAST, MOST = "\N{GREATER-THAN OR EQUAL TO}", "\N{LESS-THAN OR EQUAL TO}"


# Of each kind: the speed-up over the plain formula, and the temporaries over the logits.
_BOUNDS = {"elementwise": (3.0, 1.1), "position": (1.5, 1.3), "distribution": (1.0, 1.5)}


def _losses_goals(rows: Rows) -> list[Goal]:
    """Return the goals of ours, with its gradient, in the rows of one workload."""
    (ours,) = select(rows, implementation=OURS, mode=GRADIENT)
    (value,) = select(rows, implementation=OURS, mode=VALUE)
    name = ours["workload"]
    speedup, memory = (1.0, None) if name == SMALL else _BOUNDS[ours["kind"]]
    found = [
        Goal(f"{name}: speed-up over {PLAIN}", ours["speedup"], LEAST, speedup),
        Goal(f"{name}: speed-up over {PLAIN}, value alone", value["speedup"], LEAST, 1.0),
    ]
    for optax in select(rows, implementation="optax", mode=GRADIENT):
        speedup = ours["speedup"] / optax["speedup"]
        found.append(Goal(f"{name}: speed-up over optax", speedup, LEAST, 8.0))
    if ours["temporary_share"] is not None and memory is not None:
        what = f"{name}: temporaries over the logits"
        found.append(Goal(what, ours["temporary_share"], MOST, memory))
    banned = ("scatter", "transpose", "power")
    count = sum(ours["ops"][op] for op in banned)
    return [*found, Goal(f"{name}: {', '.join(banned)}", count, MOST, 0)]


def _linear_goals(row: dict[str, Any]) -> list[Goal]:
    """Return the goals of the linear head, in its row."""
    found = [Goal("linear head: time over the plain head's", 1 / row["speedup"], MOST, 1.3)]
    if row["temporary_share"] is not None:  # the gradients are results, and not among them
        what = "linear head: temporaries over the logits"
        found.append(Goal(what, row["temporary_share"], MOST, 0.1))
    return found


def _family_goals(row: dict[str, Any]) -> list[Goal]:
    """Return the goals of a loss of the family, in its row."""
    name = row["workload"]
    bound, memory = (2.0, 0.05) if row["kind"] == "elementwise" else (1.0, None)
    found = [Goal(f"{name}: speed-up over {PLAIN}", row["speedup"], LEAST, bound)]
    if row["temporary_share"] is not None and memory is not None:
        found.append(
            Goal(f"{name}: temporaries over the logits", row["temporary_share"], MOST, memory)
        )
    return found


def against(results: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
    """Return the rows of ours that another version has too, and the speed-up over that one."""
    names = {OURS: BEFORE, LINEAR: LINEAR_BEFORE}
    key = ("section", "workload", "dtype", "mode")
    found = []
    for ours in results["rows"]:
        before = names.get(ours["implementation"])
        same = {name: ours.get(name) for name in key}
        for row in select(results["rows"], implementation=before, **same) if before else ():
            found.append((ours, row["seconds"]["median"] / ours["seconds"]["median"]))
    return found


def _against_goals(results: dict[str, Any]) -> list[Goal]:
    """Return that nothing is slower than before; a tenth is what two equal programs differ by."""
    found = [
        Goal(f"{_label(row)}, {row['mode']}: speed-up over {BEFORE}", ratio, LEAST, 0.9)
        for row, ratio in against(results)
        if row["dtype"] == "float32"
    ]
    if found:
        mean = statistics.geometric_mean(goal.measured for goal in found)
        found.append(Goal(f"geometric mean of the speed-ups over {BEFORE}", mean, LEAST, 1.0))
    return found


def _label(row: dict[str, Any]) -> str:
    return row.get("workload") or row["implementation"]


def goals(results: dict[str, Any]) -> list[Goal]:
    """Return the goals that these results can be held against, all of them for float32.

    On a CPU they are the losses' speed and memory; on a GPU the share of a copy's bandwidth.
    """
    if results["quick"]:
        return []
    rows = select(results["rows"], section="losses", dtype="float32")
    ours = select(rows, implementation=OURS, mode=GRADIENT)
    if results["machine"]["backend"] != "cpu":
        what = "{}: share of a copy's bandwidth"
        return [Goal(what.format(row["workload"]), row["copy_share"], LEAST, 0.7) for row in ours]
    found = [goal for row in ours for goal in _losses_goals(select(rows, workload=row["workload"]))]
    for row in select(results["rows"], section="family", implementation=OURS):
        found += _family_goals(row)
    chosen = {"dtype": "float32", "implementation": LINEAR, "mode": GRADIENT}
    for row in select(results["rows"], section="linear", **chosen):
        found += _linear_goals(row)
    return found + _against_goals(results)


# ---------------------------------------------------------------- tables

_TIME = ("median ms", "min / quartiles")
_COST = (*_TIME, "speed-up", "temporaries")
_COMPILED = ("accessed MB", "compile ms", *OPS)


def _cost(row: dict[str, Any]) -> list[str]:
    """Return the columns `_COST` and `_COMPILED` of a row."""
    return [
        _ms(row["seconds"]["median"]),
        _spread(row["seconds"]),
        _ratio(row["speedup"]),
        _ratio(row["temporary_share"]),
        _megabytes(row["bytes_accessed"]),
        _ms(row["compile_seconds"]),
        *_ops(row["ops"]),
    ]


def _machine(results: dict[str, Any]) -> Table:
    machine = results["machine"]
    versions = {k: v for k, v in machine["versions"].items() if v is not None}
    load = machine["load_before"]
    rows = [
        ("device", f"{machine['device']} ({machine['backend']})"),
        ("processor", f"{machine['processor']}, {machine['cores']} cores"),
        ("system", machine["system"]),
        ("Python", machine["python"]),
        ("packages", ", ".join(f"{k} {v}" for k, v in versions.items())),
        ("XLA_FLAGS", machine["xla_flags"] or "none"),
        ("load average before", "-" if load is None else f"{load:.2f}"),
        ("date", machine["date"]),
    ]
    return Table("Machine", ("", ""), rows, 2)


def _goals(results: dict[str, Any]) -> list[Table]:
    rows = [
        (
            goal.what,
            f"{goal.measured:.2f}",
            f"{goal.sign} {goal.bound:g}",
            "met" if goal.met else "MISSED",
        )
        for goal in goals(results)
    ]
    headings = ("goal (float32)", "measured", "wanted", "")
    return [Table("Goals", headings, rows, 1)] if rows else []


def _losses(results: dict[str, Any]) -> list[Table]:
    found = []
    rows = select(results["rows"], section="losses")
    for dtype in _distinct(row["dtype"] for row in rows):
        for mode in reversed(MODES):
            chosen = select(rows, dtype=dtype, mode=mode)
            cells = [
                (f"{row['workload']} {_shape(row['shape'])}", row["implementation"], *_cost(row))
                for row in chosen
            ]
            headings = ("workload", "implementation", *_COST, *_COMPILED)
            found.append(Table(f"{mode.capitalize()}, {dtype}", headings, cells, 2))
        cells = [
            (
                row["workload"],
                row["implementation"],
                _megabytes(row["fewest_bytes"]),
                f"{row['copy_bandwidth'] / 1e9:.1f}",
                f"{row['bandwidth'] / 1e9:.1f}",
                f"{row['copy_share']:.0%}",
            )
            for row in select(rows, dtype=dtype, mode=GRADIENT)
            if row["implementation"] in (OURS, "torch.compile")
        ]
        headings = (
            "workload",
            "implementation",
            "fewest MB",
            "copy GB/s",
            "achieved GB/s",
            "share",
        )
        found.append(Table(f"Bandwidth, {GRADIENT}, {dtype}", headings, cells, 2))
    return found


def _growth(results: dict[str, Any]) -> list[Table]:
    rows = select(results["rows"], section="growth")
    cells = [
        (row["curve"], row["implementation"], f"{row['size']:,}", *_cost(row)[: len(_COST)])
        for row in rows
    ]
    headings = ("curve", "implementation", "size", *_COST)
    return [Table(f"Growth, {GRADIENT}, float32", headings, cells, 2)] if rows else []


def _family(results: dict[str, Any]) -> list[Table]:
    cells = [
        (f"{row['workload']} {_shape(row['shape'])}", row["implementation"], *_cost(row))
        for row in select(results["rows"], section="family")
    ]
    headings = ("loss", "implementation", *_COST, *_COMPILED)
    return [Table(f"Family, {GRADIENT}, float32", headings, cells, 2)] if cells else []


def _before(results: dict[str, Any]) -> list[Table]:
    cells = [
        (_label(row), row["dtype"], row["mode"], _ms(row["seconds"]["median"]), _ratio(ratio))
        for row, ratio in against(results)
    ]
    headings = ("workload", "dtype", "mode", "median ms", "speed-up")
    title = f"Against another version: {results['machine'].get('against')}"
    return [Table(title, headings, cells, 3)] if cells else []


def _linear(results: dict[str, Any]) -> list[Table]:
    rows = select(results["rows"], section="linear")
    if not rows:
        return []
    shape = "{} positions, depth {}, {} classes".format(*(f"{n:,}" for n in rows[0]["shape"]))
    cells = [(row["dtype"], row["mode"], row["implementation"], *_cost(row)) for row in rows]
    headings = ("dtype", "mode", "implementation", *_COST, *_COMPILED)
    return [Table(f"Linear head: {shape}; speed-up over {OURS}", headings, cells, 3)]


def _scaling(results: dict[str, Any]) -> list[Table]:
    rows = select(results["rows"], section="scaling")
    rows.sort(key=lambda row: (row["kind"], row["implementation"], row["devices"]))
    cells = []
    for row in rows:
        same = {key: row[key] for key in ("kind", "implementation")}
        (one,) = select(rows, devices=1, **same)
        cells.append(
            (
                row["kind"],
                row["implementation"],
                str(row["devices"]),
                _shape(row["shape"]),
                _ms(row["seconds"]["median"]),
                _spread(row["seconds"]),
                _ratio(one["seconds"]["median"] / row["seconds"]["median"]),
                _ratio(row["temporary_share"]),
                str(row["ops"]["all-gather"]),
            )
        )
    headings = ("kind", "implementation", "devices", "shape", *_TIME)
    headings += ("one device over this", "temporaries", "all-gather")
    cores = results["machine"]["cores"]
    title = f"Scaling: XLA host devices that share {cores} cores"
    return [Table(title, headings, cells, 2)] if rows else []


def tables(results: dict[str, Any]) -> list[Table]:
    """Return everything there is to say in tables."""
    return [
        _machine(results),
        *_goals(results),
        *_before(results),
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
            style = {"met": "green", "MISSED": "bold red"}.get(row[-1])
            rich.add_row(*row, style=style, end_section=grouped and row[0] != following[0])
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

# One colour for an implementation in every figure; ours and the plain formula stand out.
_COLOURS = {
    OURS: _style.BLUE,
    PLAIN: _style.VERMILION,
    BEFORE: _style.TRUTH,
    "optax": _style.PURPLE,
    "one-hot": _style.GREEN,
    "torch": _style.INK,
    "torch.compile": (_style.INK, 0.5),
}


def _bars(axes: Axes, rows: Rows, field: str) -> None:
    """Draw a bar for each row, grouped by workload, the first group at the top."""
    ticks, place = {}, 0.0
    for workload in _distinct(row["workload"] for row in rows):
        group = [row for row in select(rows, workload=workload) if row[field] is not None]
        start = place
        for row in group:
            value, name = row[field], row["implementation"]
            axes.barh(place, value, 0.85, color=_COLOURS[name])
            axes.annotate(
                _ratio(value),
                (value, place),
                (3, 0),
                textcoords="offset points",
                va="center",
                size="x-small",
                weight="bold" if name == OURS else "normal",
            )
            place += 1
        ticks[(start + place - 1) / 2] = workload
        place += 0.8
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set(ylim=(place - 0.8, -0.8))
    axes.tick_params("y", length=0)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.12)


def _legend(figure: Figure, names: Sequence[str]) -> None:
    patches = [Patch(color=_COLOURS[name], label=name) for name in names]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(names))


def _bar_figure(rows: Rows, field: str, title: str) -> Figure:
    dtypes = _distinct(row["dtype"] for row in rows)
    most = max(len(select(rows, dtype=dtype)) for dtype in dtypes)
    figure, panels = _style.figure(
        1, len(dtypes), width=1.5 + 5 * len(dtypes), height=1.6 + 0.19 * most, squeeze=False
    )
    for axes, dtype in zip(panels[0], dtypes):
        _bars(axes, select(rows, dtype=dtype), field)
        axes.axvline(1, color=_style.INK, linewidth=0.8, linestyle="--", zorder=0)
        axes.set_title(dtype)
        axes.spines["left"].set_visible(False)
    figure.suptitle(title)
    _legend(figure, [name for name in _COLOURS if select(rows, implementation=name)])
    return figure


def _titled(figure: Figure, panels: Sequence[Axes], ylabel: str, title: str) -> Figure:
    """Return a figure of several panels with what they share: a title, a legend, one y axis."""
    panels[0].set_ylabel(ylabel)
    panels[0].legend()
    figure.suptitle(title)
    return figure


def _growth_figure(rows: Rows) -> Figure:
    """Draw time against size, one panel a curve, and the slope of a cost in proportion."""
    curves = _distinct(row["curve"] for row in rows)
    width = 1 + 4 * len(curves)
    figure, (panels,) = _style.figure(1, len(curves), width=width, sharey=True, squeeze=False)
    for axes, curve in zip(panels, curves):
        for name in (OURS, PLAIN):
            points = select(rows, curve=curve, implementation=name)
            sizes = [row["size"] for row in points]
            low, median, high = (
                [row["seconds"][key] * 1e3 for row in points]
                for key in ("lower_quartile", "median", "upper_quartile")
            )
            axes.plot(sizes, median, "o-", color=_COLOURS[name], label=name, markersize=4)
            axes.fill_between(sizes, low, high, color=_COLOURS[name], alpha=0.2, linewidth=0)
        largest = select(rows, curve=curve, size=sizes[-1])
        slope = min(row["seconds"]["median"] for row in largest) * 1e3 / sizes[-1] / 3
        ends = [sizes[0], sizes[-1]]
        axes.plot(
            ends, [slope * n for n in ends], color=_style.INK, linestyle=":", label="in proportion"
        )
        head, _, what = curve.rpartition(", ")
        axes.set(xscale="log", yscale="log", xlabel=what)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(head)
    return _titled(
        figure, panels, "median time [ms], band: quartiles", f"Growth, {GRADIENT}, float32"
    )


def _scaling_figure(rows: Rows, cores: int) -> Figure:
    kinds = {"strong": "strong: eight images in all", "weak": "weak: one image for each device"}
    figure, panels = _style.figure(1, len(kinds), sharey=True)
    for axes, (kind, title) in zip(panels, kinds.items()):
        for name in (OURS, PLAIN):
            points = select(rows, kind=kind, implementation=name)
            devices = [row["devices"] for row in points]
            milliseconds = [row["seconds"]["median"] * 1e3 for row in points]
            axes.plot(devices, milliseconds, "o-", color=_COLOURS[name], label=name)
        axes.set(xscale="log", ylim=(0, None), xlabel="host devices")
        axes.set_xticks(devices, [str(n) for n in devices])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(title)
    about = f"Scaling: XLA host devices that share {cores} cores"
    return _titled(figure, panels, "median time [ms]", about)


@_style.applied()
def figures(results: dict[str, Any]) -> dict[str, Figure]:
    """Return what there is to draw, by name."""
    drawn = {}
    rows = select(results["rows"], section="losses", mode=GRADIENT)
    if rows:
        title = f"Speed-up over autodiff of the {PLAIN} formula, {GRADIENT}"
        others = [row for row in rows if row["implementation"] != PLAIN]
        drawn["speedup"] = _bar_figure(others, "speedup", title)
        title = f"Peak temporary memory over the logits' size, {GRADIENT}"
        known = [row for row in rows if row["temporary_share"] is not None]
        drawn["memory"] = _bar_figure(known, "temporary_share", title)
    rows = select(results["rows"], section="growth")
    if rows:
        drawn["growth"] = _growth_figure(rows)
    rows = select(results["rows"], section="scaling")
    if rows:
        drawn["scaling"] = _scaling_figure(rows, results["machine"]["cores"])
    return drawn


def draw(results: dict[str, Any], folder: Path) -> None:
    """Write the figures as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(results).items():
        figure.savefig(folder / f"{name}.png")


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Show results that were measured before."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="results.json")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw the figures there")
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
