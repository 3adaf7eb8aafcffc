"""Compile the losses with XLA's GPU and TPU compilers and report memory traffic and cycles.

Every workload is compiled for every device, value and gradient: focal_jax, plain JAX and, for a
sigmoid, optax. The tables are printed. The folder given by --out gets results.json and results.md.
Nothing runs and nothing is timed.

Examples:
  make accelerators ARGS='--devices H200 v5e --workloads sigmoid anchors'
  make accelerators ARGS='--pod'   # vocabulary heads and training steps on 1,024 TPUs
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import Progress, TimeElapsedColumn

import focal_jax
from benchmarks import compilers, pod, report
from benchmarks.measure import GRADIENT, Rows, keep_best
from benchmarks.peers import (
    FOCAL_JAX,
    LINEAR,
    MORE_HEADS,
    PLAIN_JAX,
    POSITIVES,
    is_plain,
    linear_losses,
    losses,
    summed,
)
from benchmarks.workloads import FAMILY, WORKLOADS

DTYPES = ("float32", "bfloat16")
RETINANET, HEAD, WIDE_HEAD = "retinanet", "linear head", "linear head, 4096 features"
LOSSES = WORKLOADS | FAMILY
HEADS = (HEAD, WIDE_HEAD, *MORE_HEADS)
NAMES = (*LOSSES, RETINANET, *HEADS)

# The minimum number of reads of the logits and of the labels, by kind. The gradient of a position
# needs the sums over its classes, so it reads the logits a second time. The gradient of a
# distribution needs the sum of the slopes too, which need the first sums. A region loss needs
# sums over all positions in addition.
PASSES: Mapping[str, tuple[int, int]] = {
    "elementwise": (1, 1),
    "position": (2, 1),
    "interval": (2, 1),
    "distribution": (3, 2),
    "region": (4, 3),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile, and the minimum number of bytes that it moves."""

    workload: str
    dtype: str
    implementation: str
    function: Callable[..., Any]
    args: tuple[jax.ShapeDtypeStruct, ...]
    logits_bytes: int
    minimum_bytes: int


def _bytes(*arrays: jax.ShapeDtypeStruct) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def workload_cases(name: str, dtype: str) -> Iterator[Case]:
    """Yield the implementations of a workload.

    The minimum number of bytes is that of the reads in `PASSES` and one write of the gradient.
    """
    workload = LOSSES[name]
    logits, labels = workload.shapes(dtype)
    logits_reads, labels_reads = PASSES[workload.kind]
    minimum = _bytes(*[logits] * logits_reads, *[labels] * labels_reads, logits)
    for implementation, loss in losses(workload).items():
        if implementation in (FOCAL_JAX, "optax") or is_plain(implementation):
            yield Case(
                name,
                dtype,
                implementation,
                summed(loss, GRADIENT),
                (logits, labels),
                _bytes(logits),
                minimum,
            )


def _plain_retinanet(class_logits, box_regression, anchors, annotations):
    """Compute RetinaNet's loss in plain JAX, with one-hot labels and a mask for ignored anchors."""
    detection = focal_jax.detection
    sigmoid = losses(LOSSES["sigmoid"])[f"{PLAIN_JAX}: torchvision"]

    def image_loss(logits, offsets, annotations):
        matches = detection.match_anchors(anchors, annotations)
        matched = annotations[jnp.maximum(matches, 0)]
        positive = matches >= 0
        labels = jnp.where(positive, matched[:, 4], -1).astype(jnp.int32)
        one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        focal = (0.25 * one_hot + 0.75 * (1 - one_hot)) * sigmoid(logits, one_hot)
        focal = jnp.where((matches == detection.IGNORED)[:, None], 0, focal)
        error = jnp.abs(offsets - detection.encode_boxes(matched[:, :4], anchors))
        huber = jnp.where(error < 1 / 9, 4.5 * error**2, error - 1 / 18)
        count = jnp.maximum(jnp.sum(positive), 1)
        boxes = jnp.sum(jnp.where(positive[:, None], huber, 0)) / (4 * count)
        return jnp.sum(focal.astype(jnp.float32)) / count + boxes

    return jnp.mean(jax.vmap(image_loss)(class_logits, box_regression, annotations))


def _retinanet(*args):
    return sum(focal_jax.detection.retinanet_loss(*args))


def retinanet_cases(dtype: str, images: int = 16) -> Iterator[Case]:
    """Yield RetinaNet's loss at the size of COCO: images of 600 by 1,000 pixels, 100 boxes."""
    struct = jax.ShapeDtypeStruct
    anchors, classes, boxes = 113_193, 80, 100
    logits, offsets = (struct((images, anchors, n), dtype) for n in (classes, 4))
    constants = struct((anchors, 4), "float32"), struct((images, boxes, 5), "float32")
    for implementation, loss in ((FOCAL_JAX, _retinanet), (PLAIN_JAX, _plain_retinanet)):
        yield Case(
            RETINANET,
            dtype,
            implementation,
            jax.value_and_grad(loss, (0, 1)),
            (logits, offsets, *constants),
            _bytes(logits),
            2 * _bytes(logits, offsets) + _bytes(*constants),
        )


def linear_cases(
    name: str, dtype: str, shape: tuple[int, int, int] | None = None
) -> Iterator[Case]:
    """Yield a linear head. The minimum is two reads and one write of features and kernel."""
    struct = jax.ShapeDtypeStruct
    positions, depth, classes = shape or (8192, 4096 if name == WIDE_HEAD else 2048, 131_072)
    features, kernel = struct((positions, depth), dtype), struct((depth, classes), dtype)
    labels = struct((positions, POSITIVES)[: 1 + (name in MORE_HEADS)], "int32")
    for implementation, loss in MORE_HEADS.get(name, linear_losses()).items():
        yield Case(
            name,
            dtype,
            implementation,
            summed(loss, GRADIENT, (0, 1)),
            (features, kernel, labels),
            _bytes(struct((positions, classes), dtype)),
            3 * _bytes(features, kernel) + _bytes(labels),
        )


def cases(names: Sequence[str], dtypes: Sequence[str]) -> Iterator[Case]:
    """Yield the programs of the selected workloads and dtypes."""
    special = {RETINANET: retinanet_cases} | {name: partial(linear_cases, name) for name in HEADS}
    for name in names:
        make = special.get(name) or partial(workload_cases, name)
        for dtype in dtypes:
            yield from make(dtype)


def compile_row(device: compilers.Device, case: Case) -> dict[str, Any]:
    """Compile a case for a device and return its row."""
    return row(device, case, compilers.compile_for(device, case.function, *case.args))


def row(device: compilers.Device, case: Case, program: jax.stages.Compiled) -> dict[str, Any]:
    """Return the row of a compiled case."""
    found = compilers.read(device, program)
    return {
        "device": device.name,
        "workload": case.workload,
        "dtype": case.dtype,
        "implementation": case.implementation,
        "minimum_bytes": case.minimum_bytes,
        **dataclasses.asdict(found),
        "bytes_over_minimum": found.bytes / case.minimum_bytes,
        "temporary_share": found.temporaries / case.logits_bytes,
        "bound_seconds": found.bytes / device.bandwidth,
    }


# ---------------------------------------------------------------- tables


def add_cycles_over_plain(rows: Rows) -> Rows:
    """Return the rows with their cycles divided by the cycles of plain JAX.

    Plain JAX is the formula with the fewest cycles, or with the fewest bytes on a GPU.
    """
    keys = ("device", "workload", "dtype")
    rows = keep_best(rows, PLAIN_JAX, lambda row: row["cycles"] or row["bytes"], *keys)
    plain = {
        tuple(row[key] for key in keys): row["cycles"]
        for row in rows
        if row["implementation"] == PLAIN_JAX and row["cycles"]
    }

    def ratio(row):
        cycles = plain.get(tuple(row[key] for key in keys))
        return row["cycles"] / cycles if cycles and row["cycles"] is not None else None

    return [row | {"cycles_over_plain": ratio(row)} for row in rows]


def _kilocycles(row: dict[str, Any]) -> str:
    """Return the cycles in thousands, with `+` if a kernel has no estimate."""
    if row["cycles"] is None:
        return "-"
    return f"{row['cycles'] / 1e3:,.0f}" + "+" * bool(row["unestimated"])


def _two_places(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


_HEADINGS = (
    *("workload", "dtype", "implementation", "kernels", "MB", "bytes / minimum"),
    *("temporaries / logits", "bound ms", "kcycles", f"cycles / {PLAIN_JAX}"),
)


def _device_table(name: str, rows: Sequence[dict[str, Any]]) -> report.Table:
    """Return all programs of one device."""
    cells = [
        (
            row["workload"],
            row["dtype"],
            report.implementation(row),
            f"{row['kernels']:,}",
            f"{row['bytes'] / 1e6:,.1f}",
            f"{row['bytes_over_minimum']:.2f}",
            f"{row['temporary_share']:.3f}",
            f"{row['bound_seconds'] * 1e3:.3f}",
            _kilocycles(row),
            _two_places(row["cycles_over_plain"]),
        )
        for row in rows
    ]
    used = [i for i in range(len(_HEADINGS)) if any(row[i] != "-" for row in cells)]
    cells = [tuple(row[i] for i in used) for row in cells]
    bandwidth = compilers.DEVICES[name].bandwidth / 1e12
    title = f"{name}, {GRADIENT}, compiled; bound ms: bytes at {bandwidth:.2f} TB/s"
    return report.Table(title, [_HEADINGS[i] for i in used], cells, 3)


def _focal_jax_table(rows: Sequence[dict[str, Any]]) -> report.Table:
    """Return one line per workload: bytes / minimum on each device, and cycles on each TPU."""
    # The linear head has rows with materialized logits too; they are not shown.
    shown = [
        row
        for row in rows
        if row["implementation"] == (LINEAR if row["workload"] in HEADS else FOCAL_JAX)
    ]
    found = {(row["device"], row["workload"], row["dtype"]): row for row in shown}
    devices = list(dict.fromkeys(row["device"] for row in shown))
    lines = list(dict.fromkeys((row["workload"], row["dtype"]) for row in shown))
    columns = [(name, "bytes_over_minimum", name) for name in devices] + [
        (name, "cycles_over_plain", f"{name} cycles")
        for name in devices
        if compilers.DEVICES[name].platform == "tpu"
    ]

    def cell(device: str, line: tuple[str, str], field: str) -> str:
        return _two_places(found.get((device, *line), {}).get(field))

    cells = [(*line, *(cell(name, line, field) for name, field, _ in columns)) for line in lines]
    title = f"{FOCAL_JAX} on all devices: bytes / minimum; for TPUs also cycles / {PLAIN_JAX}"
    return report.Table(title, ["workload", "dtype", *(x for _, _, x in columns)], cells, 2)


def tables(rows: Sequence[dict[str, Any]]) -> list[report.Table]:
    """Return one table of all devices and one table per device, or the table of a pod."""
    if any("program" in row for row in rows):
        return [pod.table(rows)]
    rows = add_cycles_over_plain(rows)
    devices = dict.fromkeys(row["device"] for row in rows)
    per_device = [_device_table(name, report.select(rows, device=name)) for name in devices]
    return [_focal_jax_table(rows), *per_device] if per_device else []


def _not_compiled(missing: Sequence[str]) -> list[report.Table]:
    return [report.Table("Not compiled", ("",), [(x,) for x in missing], 1)] if missing else []


# ---------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerators",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = compilers.DEVICES
    parser.add_argument("--devices", nargs="*", default=list(known), metavar="NAME")
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument(
        "--only-focal-jax",
        nargs="*",
        metavar="DEVICE",
        help="do not compile the other implementations, on these devices or on all",
    )
    parser.add_argument(
        "--join",
        nargs="+",
        type=Path,
        default=(),
        metavar="JSON",
        help="results.json of earlier runs, whose rows are added to the tables",
    )
    parser.add_argument(
        "--pod",
        nargs="*",
        choices=pod.PROGRAMS,
        metavar="PROGRAM",
        help=f"compile these programs for a pod instead (default: all): {', '.join(pod.PROGRAMS)}",
    )
    parser.add_argument("--out", type=Path, default=Path("out/accelerators"), metavar="DIR")
    return parser


def _write(results: dict[str, Any], folder: Path) -> None:
    text = json.dumps(results, indent=1, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")


Work = tuple[str, Callable[[], dict[str, Any]]]  # a description, and a function that makes a row


def _work(options: argparse.Namespace, missing: list[str]) -> Iterator[Work]:
    """Yield the programs to compile. Devices without a compiler are appended to `missing`."""
    if options.pod is not None:
        for name in options.pod or pod.PROGRAMS:
            yield name, partial(pod.row, name)
        return
    programs = list(cases(options.workloads, options.dtype))
    of_focal_jax = [case for case in programs if case.implementation in (FOCAL_JAX, LINEAR)]
    only = () if options.only_focal_jax is None else options.only_focal_jax or options.devices
    for name in options.devices:
        try:
            device = compilers.device(name)
        except compilers.Unavailable as error:
            missing.append(str(error))
            continue
        for case in of_focal_jax if name in only else programs:
            description = f"{name} {case.workload} {case.dtype} {case.implementation}"
            yield description, partial(compile_row, device, case)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile the programs, write results.json and results.md, and print the tables."""
    options = _parser().parse_args(arguments)
    compilers.prepare()
    options.out.mkdir(parents=True, exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")}
    earlier = [json.loads(path.read_text(encoding="utf-8")) for path in options.join]
    rows, missing = ([x for run in earlier for x in run[key]] for key in ("rows", "missing"))
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "rows": rows,
        "missing": missing,
    }
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
        work = list(_work(options, missing))
        task = progress.add_task("compile", total=len(work))
        for description, make_row in work:
            progress.update(task, description=description)
            try:
                rows.append(make_row())
            except compilers.Unavailable as error:
                missing.append(f"{description}: {error}")
            progress.advance(task)
            _write(results, options.out)  # a later failure does not lose the results

    _write(results, options.out)
    made = [*tables(rows), *_not_compiled(missing)]
    (options.out / "results.md").write_text(report.markdown(made), encoding="utf-8")
    report.show(made)


if __name__ == "__main__":
    main()
