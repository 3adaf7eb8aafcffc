"""Measure the time and the memory of the losses and of other implementations.

Sections:
  losses   the main workloads in every implementation
  family   every other loss of the catalogue and its plain JAX formula
  linear   the linear head, with and without materialized logits
  growth   time as a function of the number of positions and of classes
  scaling  one sharded batch on 1 to 8 host devices

The tables are printed. The folder given by --out gets results.json and the figures.

Examples:
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
from typing import Any

# Set before JAX and PyTorch start. On a GPU PyTorch needs a part of the memory. On a CPU idle
# OpenMP threads of PyTorch would otherwise spin and slow down the next program.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress, TimeElapsedColumn

from benchmarks import report, scaling
from benchmarks.measure import GRADIENT, Rows, add_ratios, compile_program, measure
from benchmarks.peers import (
    FOCAL_JAX,
    OTHER_VERSION,
    PLAIN_JAX,
    Version,
    compile_losses,
    import_version,
    is_plain,
    jax_programs,
    linear_programs,
    losses,
    torch_programs,
)
from benchmarks.workloads import FAMILY, WORKLOADS, Workload, growth, minimum_bytes

DTYPES = ("float32", "bfloat16")
SECTIONS = ("losses", "family", "linear", "growth", "scaling")
# The description of a case, its number of rounds, and a function that measures it. The function
# takes a callback `on_round`.
Case = tuple[str, int, Callable[..., Rows]]


# ---------------------------------------------------------------- cases


def losses_rows(
    workload: Workload,
    dtype: str,
    other_version: Version | None,
    rounds: int,
    on_round: Callable[[], None],
) -> Rows:
    """Measure all implementations of a workload, and a copy of the logits as the bandwidth."""
    logits, labels = workload.inputs(dtype)
    on_device = jax.device_put((logits, labels))
    programs = jax_programs(workload, *on_device, other_version)
    programs += torch_programs(workload, logits, labels)
    programs.append(compile_program("copy", "copy", jnp.copy, on_device[0]))
    rows = measure(
        programs,
        rounds,
        on_round,
        section="losses",
        workload=workload.name,
        kind=workload.kind,
        shape=workload.shape,
        dtype=dtype,
    )
    *rows, copy = add_ratios(rows, PLAIN_JAX, logits.nbytes)
    copy_bandwidth = 2 * logits.nbytes / copy["seconds"]["median"]  # a copy reads and writes
    for row in rows:
        row["minimum_bytes"] = minimum_bytes(logits, labels, row["mode"])
        row["bandwidth"] = row["minimum_bytes"] / row["seconds"]["median"]
        row["copy_bandwidth"] = copy_bandwidth
        row["copy_share"] = row["bandwidth"] / copy_bandwidth
    return rows


def plain_comparison_rows(
    workload: Workload,
    other_version: Version | None,
    rounds: int,
    on_round: Callable[[], None],
    **fields: Any,
) -> Rows:
    """Measure focal_jax and plain JAX, value and gradient in float32."""
    logits, labels = jax.device_put(workload.inputs("float32"))
    compared = {
        label: loss
        for label, loss in losses(workload, other_version).items()
        if label in (FOCAL_JAX, OTHER_VERSION) or is_plain(label)
    }
    programs = compile_losses(compared, [GRADIENT], (logits, labels), other_version)
    fields |= {"workload": workload.name, "shape": workload.shape, "dtype": "float32"}
    return add_ratios(measure(programs, rounds, on_round, **fields), PLAIN_JAX, logits.nbytes)


def linear_rows(
    shape: tuple[int, int, int],
    dtype: str,
    other_version: Version | None,
    rounds: int,
    on_round: Callable[[], None],
) -> Rows:
    """Measure the linear head. `shape` is `(positions, features, classes)`."""
    positions, depth, classes = shape
    rng = np.random.default_rng(0)
    features = rng.standard_normal((positions, depth), np.float32).astype(dtype)
    kernel = (rng.standard_normal((depth, classes), np.float32) / depth**0.5).astype(dtype)
    labels = rng.integers(classes, size=positions, dtype=np.int32)
    programs = linear_programs(*jax.device_put((features, kernel, labels)), other_version)
    rows = measure(programs, rounds, on_round, section="linear", shape=shape, dtype=dtype)
    return add_ratios(rows, FOCAL_JAX, positions * classes * features.itemsize)


def _scaling_rows(devices: int, anchors: int, rounds: int, on_round: Callable[[], None]) -> Rows:
    del on_round  # the measurement runs in another process
    return scaling.rows(devices, anchors, rounds)


def cases(options: argparse.Namespace, other_version: Version | None) -> Iterator[Case]:
    """Yield the cases of the selected sections."""
    quick, rounds = options.quick, options.rounds

    def selected(workloads: Mapping[str, Workload]) -> Iterator[tuple[str, Workload]]:
        for name, workload in workloads.items():
            if name in options.workloads:
                yield name, workload.quick() if quick else workload

    if "losses" in options.sections:
        for name, workload in selected(WORKLOADS):
            for dtype in options.dtype:
                run = partial(losses_rows, workload, dtype, other_version, rounds)
                yield f"{name} {dtype}", rounds, run
    if "family" in options.sections:
        for name, workload in selected(FAMILY):
            fields = {"section": "family", "kind": workload.kind}
            run = partial(plain_comparison_rows, workload, other_version, rounds, **fields)
            yield name, rounds, run
    if "linear" in options.sections:
        shape = (64, 16, 128) if quick else (2048, 512, 32_000)
        fewer = -(-rounds // 3)  # one call takes seconds
        for dtype in options.dtype:
            run = partial(linear_rows, shape, dtype, other_version, fewer)
            yield f"linear head {dtype}", fewer, run
    if "growth" in options.sections:
        for curve, workloads in growth(quick).items():
            for size, workload in workloads.items():
                fields = {"section": "growth", "curve": curve, "size": size}
                run = partial(plain_comparison_rows, workload, None, rounds, **fields)
                yield f"{curve}: {size:,}", rounds, run
    if "scaling" in options.sections:
        anchors = 32 if quick else 50_000
        for devices in scaling.DEVICES:
            run = partial(_scaling_rows, devices, anchors, rounds)
            yield f"{devices} host devices", 0, run


# ---------------------------------------------------------------- machine


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
    """Return a description of the machine and the versions of the packages."""
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


# ---------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="use small sizes, for a trial run")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    known = [*WORKLOADS, *FAMILY]
    parser.add_argument("--workloads", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument(
        "--rounds", type=int, help="timed calls per program (default: 15; with --quick: 3)"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="another checkout, whose losses are measured too",
    )
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), metavar="DIR")
    parser.add_argument("--no-figures", action="store_true", help="do not draw the figures")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the measurements, write results.json, print the tables and draw the figures."""
    options = _parser().parse_args(arguments)
    options.rounds = options.rounds or (3 if options.quick else 15)
    options.out.mkdir(parents=True, exist_ok=True)
    about = machine() | ({"against": str(options.against)} if options.against else {})
    results: dict[str, Any] = {"machine": about, "quick": options.quick, "rows": []}

    other_version = options.against and import_version(options.against.resolve())
    todo = list(cases(options, other_version))
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
        total = progress.add_task("all", total=len(todo))
        for description, rounds, run in todo:
            task = progress.add_task(description, total=rounds or None)
            results["rows"] += run(on_round=partial(progress.advance, task))
            progress.remove_task(task)
            progress.advance(total)
            # Written after every case, so that a later failure does not lose the results.
            text = json.dumps(results, indent=1, allow_nan=False)
            (options.out / "results.json").write_text(text + "\n", encoding="utf-8")

    report.show(report.tables(results))
    if not options.no_figures:
        report.draw(results, options.out)


if __name__ == "__main__":
    main()
