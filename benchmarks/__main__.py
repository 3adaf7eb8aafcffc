"""Measure what the losses cost beside their peers, in time and in memory.

The sections: `losses`, every workload in every implementation; `family`, every other loss of
the catalogue beside its formula; `linear`, the head that never makes the logits beside the
plain one; `growth`, how the cost grows with positions and classes; `scaling`, one batch on 1 to
8 host devices. Tables go to the terminal, results.json and figures to the folder of --out.

    python -m benchmarks --workloads sigmoid anchors --dtype float32
    python -m benchmarks --sections losses linear --against ../another-checkout
"""

import argparse
import datetime
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

# Before JAX and PyTorch start: PyTorch shares a GPU's memory, and on a CPU its idle threads
# sleep instead of spinning in the way of whoever is measured next.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress, TimeElapsedColumn

from benchmarks import report, scaling
from benchmarks.measure import GRADIENT, compile_program, measure, relate
from benchmarks.peers import (
    BEFORE,
    OURS,
    PLAIN,
    in_mode,
    jax_programs,
    linear_programs,
    losses,
    torch_programs,
    version_in,
)
from benchmarks.workloads import FAMILY, WORKLOADS, Workload, fewest_bytes, growth

DTYPES = ("float32", "bfloat16")
SECTIONS = ("losses", "family", "linear", "growth", "scaling")
Rows = list[dict[str, Any]]
Case = tuple[str, int, Callable[..., Rows]]  # what, rounds, how: a function of a tick


# ---------------------------------------------------------------- what is measured


def losses_rows(
    workload: Workload,
    dtype: str,
    before: ModuleType | None,
    rounds: int,
    tick: Callable[[], None],
) -> Rows:
    """Measure every implementation, and a copy of the logits to hold them against."""
    logits, labels = workload.inputs(dtype)
    on_device = jax.device_put((logits, labels))
    programs = jax_programs(workload, *on_device, before)
    programs += torch_programs(workload, logits, labels)
    programs.append(compile_program("copy", "copy", jnp.copy, on_device[0]))
    rows = measure(
        programs,
        rounds,
        tick,
        section="losses",
        workload=workload.name,
        kind=workload.kind,
        shape=workload.shape,
        dtype=dtype,
    )
    *rows, copy = relate(rows, PLAIN, logits.nbytes)
    copied = 2 * logits.nbytes / copy["seconds"]["median"]  # read once and written once
    for row in rows:
        row["fewest_bytes"] = fewest_bytes(logits, labels, row["mode"])
        row["bandwidth"] = row["fewest_bytes"] / row["seconds"]["median"]
        row["copy_bandwidth"] = copied
        row["copy_share"] = row["bandwidth"] / copied
    return rows


def beside_plain(
    workload: Workload,
    before: ModuleType | None,
    rounds: int,
    tick: Callable[[], None],
    **about: Any,
) -> Rows:
    """Measure ours and autodiff of the plain formula, value and gradient in float32."""
    logits, labels = jax.device_put(workload.inputs("float32"))
    programs = [
        compile_program(name, GRADIENT, in_mode(GRADIENT, loss), logits, labels)
        for name, loss in losses(workload, before).items()
        if name in (OURS, PLAIN, BEFORE)
    ]
    about |= {"workload": workload.name, "shape": workload.shape, "dtype": "float32"}
    return relate(measure(programs, rounds, tick, **about), PLAIN, logits.nbytes)


def linear_rows(
    shape: tuple[int, int, int],
    dtype: str,
    before: ModuleType | None,
    rounds: int,
    tick: Callable[[], None],
) -> Rows:
    """Measure the vocabulary heads at `(positions, depth, classes)`."""
    positions, depth, classes = shape
    rng = np.random.default_rng(0)
    features = rng.standard_normal((positions, depth), np.float32).astype(dtype)
    kernel = (rng.standard_normal((depth, classes), np.float32) / depth**0.5).astype(dtype)
    labels = rng.integers(classes, size=positions, dtype=np.int32)
    programs = linear_programs(*jax.device_put((features, kernel, labels)), before)
    rows = measure(programs, rounds, tick, section="linear", shape=shape, dtype=dtype)
    return relate(rows, OURS, positions * classes * features.itemsize)


def _scaling_rows(devices: int, anchors: int, rounds: int, tick: Callable[[], None]) -> Rows:
    del tick  # a process of its own
    return scaling.rows(devices, anchors, rounds)


def cases(options: argparse.Namespace, before: ModuleType | None) -> Iterator[Case]:
    """Yield what is to be measured, section by section."""
    quick, rounds = options.quick, options.rounds

    def chosen(workloads: Mapping[str, Workload]) -> Iterator[tuple[str, Workload]]:
        for name, workload in workloads.items():
            if name in options.workloads:
                yield name, workload.quick() if quick else workload

    if "losses" in options.sections:
        for name, workload in chosen(WORKLOADS):
            for dtype in options.dtype:
                yield (
                    f"{name} {dtype}",
                    rounds,
                    partial(losses_rows, workload, dtype, before, rounds),
                )
    if "family" in options.sections:
        for name, workload in chosen(FAMILY):
            about = {"section": "family", "kind": workload.kind}
            yield name, rounds, partial(beside_plain, workload, before, rounds, **about)
    if "linear" in options.sections:
        shape = (64, 16, 128) if quick else (2048, 512, 32_000)
        few = -(-rounds // 3)  # a call takes seconds
        for dtype in options.dtype:
            yield f"linear head {dtype}", few, partial(linear_rows, shape, dtype, before, few)
    if "growth" in options.sections:
        for curve, workloads in growth(quick).items():
            for size, workload in workloads.items():
                about = {"section": "growth", "curve": curve, "size": size}
                yield (
                    f"{curve}: {size:,}",
                    rounds,
                    partial(beside_plain, workload, None, rounds, **about),
                )
    if "scaling" in options.sections:
        anchors = 32 if quick else 50_000
        for devices in scaling.DEVICES:
            yield (
                f"{devices} host devices",
                0,
                partial(_scaling_rows, devices, anchors, rounds),
            )


# ---------------------------------------------------------------- where and how


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Return what a reader of the numbers has to know of the machine and the packages."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "optax", "torch", "numpy")
    return {
        "date": datetime.date.today().isoformat(),
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()}, {platform.machine()}",
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": {package: _version(package) for package in packages},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try it out")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    known = [*WORKLOADS, *FAMILY]
    parser.add_argument("--workloads", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=int, help="timed calls of each program (15; quick: 3)")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="another checkout, to measure its losses too"
    )
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), metavar="DIR")
    parser.add_argument("--no-figures", action="store_true")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write results.json, print the tables and draw the figures."""
    options = _parser().parse_args(arguments)
    options.rounds = options.rounds or (3 if options.quick else 15)
    options.out.mkdir(parents=True, exist_ok=True)
    about = machine() | ({"against": str(options.against)} if options.against else {})
    results: dict[str, Any] = {"machine": about, "quick": options.quick, "rows": []}

    before = options.against and version_in(options.against.resolve())
    todo = list(cases(options, before))
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
        total = progress.add_task("all", total=len(todo))
        for what, rounds, run in todo:
            task = progress.add_task(what, total=rounds or None)
            results["rows"] += run(tick=partial(progress.advance, task))
            progress.remove_task(task)
            progress.advance(total)
            # Each time: what was measured outlives whatever may break later.
            text = json.dumps(results, indent=1, allow_nan=False)
            (options.out / "results.json").write_text(text + "\n", encoding="utf-8")

    report.show(report.tables(results))
    if not options.no_figures:
        report.draw(results, options.out)


if __name__ == "__main__":
    main()
