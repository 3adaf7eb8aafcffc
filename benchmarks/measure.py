"""Programs, what the compiler says of them, and how long they take."""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

VALUE, GRADIENT = MODES = ("value", "value and gradient")
# What a gradient may be slow by; how many fusions the rest became.
OPS = ("scatter", "power", "transpose", "all-gather", "fusion")


@dataclasses.dataclass(frozen=True)
class Program:
    """Something compiled that can be called and waited for; None is what is not known."""

    implementation: str
    mode: str
    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    bytes_accessed: float | None = None
    ops: dict[str, int] | None = None


def count_ops(hlo: str) -> dict[str, int]:
    """Return how often each of `OPS` stands in an optimised HLO module."""
    return {op: len(re.findall(rf" {op}(?:-start)?\(", hlo)) for op in OPS}


def compile_program(implementation: str, mode: str, function: Callable, *args: Any) -> Program:
    """Compile a function for JAX's default device, and ask the compiler what it made of it."""
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


def _seconds(program: Program, calls: int) -> float:
    """Return the time of a call, the mean of several in a row.

    An accelerator is given all of them and waited for once, so that what is timed is its
    work and not the way there. A CPU would run them side by side: there each is waited for.
    """
    each = jax.default_backend() == "cpu"
    start = time.perf_counter()
    for left in reversed(range(calls)):
        result = program.call()
        if each or not left:
            program.wait(result)
    return (time.perf_counter() - start) / calls


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    names = ("min", "lower_quartile", "median", "upper_quartile", "max")
    return dict(zip(names, np.percentile(seconds, (0, 25, 50, 75, 100)).tolist()))


def measure(
    programs: Sequence[Program], rounds: int, tick: Callable[[], None], **about: Any
) -> list[dict[str, Any]]:
    """Time programs in turns and return a row for each, with `about` in all of them.

    In every round all of them run, in a new random order. Before each timed call there is
    an untimed one, so that no program pays for the memory that another one left behind.
    Calls that are too short for the clock are repeated to about two milliseconds.
    """
    rng = np.random.default_rng(0)
    taken: list[list[float]] = [[] for _ in programs]
    for _ in range(rounds):
        for i in rng.permutation(len(programs)):
            untimed = _seconds(programs[i], 1)
            taken[i].append(_seconds(programs[i], 1 + min(99, int(2e-3 / untimed))))
        tick()
    return [
        about
        | {
            "implementation": program.implementation,
            "mode": program.mode,
            "rounds": rounds,
            "seconds": _spread(seconds),
            "compile_seconds": program.compile_seconds,
            "temporary_bytes": program.temporary_bytes,
            "bytes_accessed": program.bytes_accessed,
            "ops": program.ops,
        }
        for program, seconds in zip(programs, taken)
    ]


def relate(rows: list[dict[str, Any]], baseline: str, logits_bytes: int) -> list[dict[str, Any]]:
    """Return the rows with their temporaries over the logits and their speed-up.

    The speed-up is the baseline's median time in the same mode over the row's own.
    """
    medians = {
        row["mode"]: row["seconds"]["median"] for row in rows if row["implementation"] == baseline
    }

    def share(row):
        temporary = row["temporary_bytes"]
        return None if temporary is None else temporary / logits_bytes

    def speedup(row):
        return medians[row["mode"]] / row["seconds"]["median"] if row["mode"] in medians else None

    return [row | {"temporary_share": share(row), "speedup": speedup(row)} for row in rows]
