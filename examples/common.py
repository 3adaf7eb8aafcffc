"""Parts that the examples share: command lines, tables, figures and threads."""

import argparse
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the lines of the description, and add its default to the help of an option."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for `python -m examples.MODULE`, whose help starts with the description."""
    prog = f"python -m examples.{module}"
    return argparse.ArgumentParser(prog, description=description, formatter_class=_HelpFormatter)


# ---------------------------------------------------------------- tables


def mean_and_deviation(values: Iterable[float], digits: int = 1) -> str:
    """Return the mean, and the standard deviation if there are several values."""
    values = np.array([*values], float)
    deviation = f" ± {values.std(ddof=1):.{digits}f}" if values.size > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def seeds_caption(seeds: int) -> str:
    """Return the caption of a table whose cells come from `mean_and_deviation`."""
    return f"Mean ± standard deviation of {seeds} seeds." if seeds > 1 else "One seed."


def table(
    title: str, head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = ""
) -> Table:
    """Return a table: one name per row, then numbers, which are aligned to the right."""
    made = Table(title=title, caption=caption)
    for number, name in enumerate(head):
        made.add_column(name, justify="right" if number else "left")
    for row in rows:
        made.add_row(*row)
    return made


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """Return the same table in Markdown. The first `names` columns are words."""
    rule = ["---"] * names + ["---:"] * (len(head) - names)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows))


def bold_best(values: Sequence[float], cells: Sequence[str], *, lowest: bool = False) -> list[str]:
    """Return the cells, with the one of the best value in bold."""
    best = min(values) if lowest else max(values)
    return [f"[bold]{cell}[/]" if value == best else cell for value, cell in zip(values, cells)]


# ---------------------------------------------------------------- files


def write(path: Path, save: Callable[[Path], Any]) -> Path:
    """Call `save` with a new path beside `path`, then rename it, so that no file is incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".new-{path.name}")
    try:
        save(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    return path


def save(figure: Any, path: Path) -> Path:
    """Write a figure."""
    return write(path, figure.savefig)


# ---------------------------------------------------------------- threads


_stop = threading.Event()


def stop_if_interrupted() -> None:
    """Raise in a thread of `in_threads` after an error in another thread, or after Ctrl-C."""
    if _stop.is_set():
        raise KeyboardInterrupt


def in_threads(function: Callable, jobs: Iterable, threads: int = 2) -> list:
    """Return the results of `function` for all jobs, in order.

    XLA:CPU uses little more than one core for a step of a small network. After an error no further
    job starts.
    """
    _stop.clear()

    @contextmanager
    def stopping():
        try:
            yield
        except BaseException:
            _stop.set()
            raise

    def run_unless_stopped(job):
        with stopping():
            stop_if_interrupted()
            return function(job)

    with ThreadPoolExecutor(threads) as pool, stopping():
        return list(pool.map(run_unless_stopped, jobs))
