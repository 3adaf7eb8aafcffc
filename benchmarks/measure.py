"""Compile programs, read the compiler's statistics and time the programs in turns."""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

VALUE, GRADIENT = MODES = ("value", "value and gradient")
# HLO operations that the tables count. All but "fusion" can make a gradient slow.
OPS = ("scatter", "power", "transpose", "all-gather", "fusion")
Rows = list[dict[str, Any]]

# Calls shorter than this number of seconds are timed several at once.
_MIN_SECONDS = 2e-3
_MAX_CALLS = 100


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, a function that waits for its result, and the compiler's statistics.

    A statistic is None if it is not known.
    """

    implementation: str
    mode: str
    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    bytes_accessed: float | None = None
    ops: dict[str, int] | None = None


def count_ops(hlo: str) -> dict[str, int]:
    """Return the number of occurrences of each of `OPS` in an optimized HLO module."""
    return {op: len(re.findall(rf" {op}(?:-start)?\(", hlo)) for op in OPS}


def compile_program(implementation: str, mode: str, function: Callable, *args: Any) -> Program:
    """Compile a function for JAX's default device and read the compiler's statistics."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    compile_seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return Program(
        implementation,
        mode,
        call=lambda: compiled(*args),
        wait=jax.block_until_ready,
        compile_seconds=compile_seconds,
        temporary_bytes=getattr(memory, "temp_size_in_bytes", None),
        bytes_accessed=cost.get("bytes accessed"),
        ops=count_ops(compiled.as_text() or ""),
    )


def _seconds_per_call(program: Program, calls: int) -> float:
    """Return the mean time of consecutive calls.

    On an accelerator the calls are queued and waited for once, so that the time of the dispatch
    does not count. The CPU backend would run queued calls concurrently, so each is waited for.
    """
    wait_for_each = jax.default_backend() == "cpu"
    start = time.perf_counter()
    for remaining in reversed(range(calls)):
        result = program.call()
        if wait_for_each or not remaining:
            program.wait(result)
    return (time.perf_counter() - start) / calls


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    names = ("min", "lower_quartile", "median", "upper_quartile", "max")
    return dict(zip(names, np.percentile(seconds, (0, 25, 50, 75, 100)).tolist()))


def measure(
    programs: Sequence[Program], rounds: int, on_round: Callable[[], None], **fields: Any
) -> Rows:
    """Time programs in turns and return one row per program.

    Each round runs all programs in a new random order. An untimed call precedes every timed
    call: it allocates the memory that the previous program has returned to the system. Calls
    shorter than two milliseconds are timed several at once.

    Args:
      programs: the programs.
      rounds: the number of rounds.
      on_round: is called after every round.
      **fields: are added to every row.
    """
    rng = np.random.default_rng(0)
    seconds: list[list[float]] = [[] for _ in programs]
    for _ in range(rounds):
        for i in rng.permutation(len(programs)):
            untimed = _seconds_per_call(programs[i], 1)
            calls = 1 + min(_MAX_CALLS - 1, int(_MIN_SECONDS / untimed))
            seconds[i].append(_seconds_per_call(programs[i], calls))
        on_round()
    return [
        fields
        | {
            "implementation": program.implementation,
            "mode": program.mode,
            "rounds": rounds,
            "seconds": _quantiles(of_program),
            "compile_seconds": program.compile_seconds,
            "temporary_bytes": program.temporary_bytes,
            "bytes_accessed": program.bytes_accessed,
            "ops": program.ops,
        }
        for program, of_program in zip(programs, seconds)
    ]


def keep_best(
    rows: Rows, baseline: str, cost: Callable[[dict[str, Any]], float], *same: str
) -> Rows:
    """Return the rows with the best formula of the baseline only.

    The implementation of a formula is labeled "<baseline>: <formula>". Among the formulas of rows
    with the same fields `same`, the row with the lowest cost is kept. It is labeled with the
    baseline, and its field "formula" has the name of the formula.
    """
    best: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        label, _, formula = row["implementation"].partition(": ")
        key = (label, formula if label != baseline else "", *(row[name] for name in same))
        row = row | {"implementation": label, "formula": formula}
        if key not in best or cost(row) < cost(best[key]):
            best[key] = row
    return list(best.values())


def median_seconds(row: dict[str, Any]) -> float:
    """Return the median time of a row."""
    return row["seconds"]["median"]


def add_ratios(rows: Rows, baseline: str, logits_bytes: int) -> Rows:
    """Return the rows with `temporary_share` and `speedup`, and the fastest baseline per mode.

    `temporary_share` is the temporary memory divided by the size of the logits. `speedup` is the
    median time of the implementation `baseline` in the same mode, divided by the row's own.
    """
    rows = keep_best(rows, baseline, median_seconds, "mode")
    medians = {
        row["mode"]: median_seconds(row) for row in rows if row["implementation"] == baseline
    }

    def temporary_share(row):
        temporary = row["temporary_bytes"]
        return None if temporary is None else temporary / logits_bytes

    def speedup(row):
        return medians[row["mode"]] / median_seconds(row) if row["mode"] in medians else None

    return [
        row | {"temporary_share": temporary_share(row), "speedup": speedup(row)} for row in rows
    ]
