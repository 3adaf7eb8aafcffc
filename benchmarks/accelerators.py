"""Read what XLA's GPU and TPU compilers make of the losses, without a GPU or a TPU.

Every workload is compiled, a value and its gradient, for each device: ours, the plain formula
and, for a sigmoid, optax. Tables go to the terminal, results.json and results.md to the folder
of --out. Nothing runs and nothing is timed: "bound" is the time that the bytes take at the
device's bandwidth, below which no run can come.

    make accelerators ARGS='--devices H200 v5e --workloads sigmoid anchors'
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import Progress, TimeElapsedColumn

import focal_jax
from benchmarks import compilers, report
from benchmarks.measure import GRADIENT
from benchmarks.peers import LINEAR, OURS, PLAIN, in_mode, linear_losses, losses
from benchmarks.workloads import WORKLOADS

DTYPES = ("float32", "bfloat16")
RETINANET, HEAD = "retinanet", "linear head"
NAMES = (*WORKLOADS, RETINANET, HEAD)


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile, and what it has to move at least."""

    workload: str
    dtype: str
    implementation: str
    function: Callable[..., Any]
    args: tuple[jax.ShapeDtypeStruct, ...]
    logits_bytes: int
    fewest_bytes: int


def _bytes(*arrays: jax.ShapeDtypeStruct) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def workload_cases(name: str, dtype: str) -> Iterator[Case]:
    """Yield the implementations of a loss.

    A sigmoid's logits and labels are read once and the gradient is written. A softmax needs
    the sums over a position's classes before it can begin with their gradient: what has a
    class axis is read twice.
    """
    workload = WORKLOADS[name]
    logits, labels = workload.shapes(dtype)
    fewest = {
        "sigmoid": _bytes(logits, labels, logits),
        "softmax": _bytes(logits, labels, logits, logits),
        "soft": _bytes(logits, labels, logits, labels, logits),
    }[workload.head]
    for implementation, loss in losses(workload).items():
        if implementation in (OURS, PLAIN, "optax"):
            yield Case(
                name,
                dtype,
                implementation,
                in_mode(GRADIENT, loss),
                (logits, labels),
                _bytes(logits),
                fewest,
            )


def _plain_retinanet(class_logits, box_regression, anchors, annotations):
    """Return RetinaNet's loss as one writes it: one-hot labels, and a mask for the ignored."""
    detection = focal_jax.detection
    sigmoid = losses(WORKLOADS["sigmoid"])[PLAIN]

    def image(logits, offsets, annotations):
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

    return jnp.mean(jax.vmap(image)(class_logits, box_regression, annotations))


def _retinanet(*args):
    return sum(focal_jax.detection.retinanet_loss(*args))


def retinanet_cases(dtype: str, images: int = 16) -> Iterator[Case]:
    """Yield RetinaNet's loss at COCO's size: an image of 600 by 1,000 pixels, 100 boxes."""
    struct = jax.ShapeDtypeStruct
    anchors, classes, boxes = 113_193, 80, 100
    logits, offsets = (struct((images, anchors, n), dtype) for n in (classes, 4))
    fixed = struct((anchors, 4), "float32"), struct((images, boxes, 5), "float32")
    for implementation, loss in ((OURS, _retinanet), (PLAIN, _plain_retinanet)):
        yield Case(
            RETINANET,
            dtype,
            implementation,
            jax.value_and_grad(loss, (0, 1)),
            (logits, offsets, *fixed),
            _bytes(logits),
            2 * _bytes(logits, offsets) + _bytes(*fixed),
        )


def linear_cases(dtype: str, shape: tuple[int, int, int] = (8192, 2048, 131_072)) -> Iterator[Case]:
    """Yield the vocabulary heads: as a softmax's logits, features and kernel are read twice."""
    struct = jax.ShapeDtypeStruct
    positions, depth, classes = shape
    features, kernel = struct((positions, depth), dtype), struct((depth, classes), dtype)
    labels = struct((positions,), "int32")
    for implementation, loss in linear_losses().items():
        yield Case(
            HEAD,
            dtype,
            implementation,
            in_mode(GRADIENT, loss, (0, 1)),
            (features, kernel, labels),
            _bytes(struct((positions, classes), dtype)),
            3 * _bytes(features, kernel) + _bytes(labels),
        )


def cases(names: Sequence[str], dtypes: Sequence[str]) -> Iterator[Case]:
    """Yield what is to be compiled."""
    special = {RETINANET: retinanet_cases, HEAD: linear_cases}
    for name in names:
        make = special.get(name) or partial(workload_cases, name)
        for dtype in dtypes:
            yield from make(dtype)


def row(device: compilers.Device, case: Case) -> dict[str, Any]:
    """Compile a program and return what the device's compiler made of it."""
    return row_of(device, case, compilers.compile_for(device, case.function, *case.args))


def row_of(device: compilers.Device, case: Case, program: jax.stages.Compiled) -> dict[str, Any]:
    """Return what the device's compiler made of a program."""
    found = compilers.read(device, program)
    return {
        "device": device.name,
        "workload": case.workload,
        "dtype": case.dtype,
        "implementation": case.implementation,
        "fewest_bytes": case.fewest_bytes,
        **dataclasses.asdict(found),
        "bytes_over_fewest": found.bytes / case.fewest_bytes,
        "temporary_share": found.temporaries / case.logits_bytes,
        "bound_seconds": found.bytes / device.bandwidth,
    }


def related(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with their cycles over those of the plain formula."""
    about = ("device", "workload", "dtype")
    plain = {
        tuple(row[key] for key in about): row["cycles"]
        for row in rows
        if row["implementation"] == PLAIN and row["cycles"]
    }

    def share(row):
        cycles = plain.get(tuple(row[key] for key in about))
        return row["cycles"] / cycles if cycles and row["cycles"] is not None else None

    return [row | {"cycles_over_plain": share(row)} for row in rows]


def _kilocycles(row: dict[str, Any]) -> str:
    """Return a TPU's cycles; `+` where the compiler has no estimate of some kernel (a look-up)."""
    if row["cycles"] is None:
        return "-"
    return f"{row['cycles'] / 1e3:,.0f}" + "+" * bool(row["unestimated"])


def tables(results: dict[str, Any]) -> list[report.Table]:
    """Return a table for each device, and one for what could not be had."""
    found = []
    headings = (
        "workload",
        "dtype",
        "implementation",
        "kernels",
        "MB",
        "over fewest",
        "temporaries",
        "bound ms",
        "kcycles",
        "over plain",
    )
    rows = related(results["rows"])
    for device in dict.fromkeys(row["device"] for row in rows):
        bandwidth = compilers.DEVICES[device].bandwidth / 1e12
        cells = [
            (
                row["workload"],
                row["dtype"],
                row["implementation"],
                f"{row['kernels']:,}",
                f"{row['bytes'] / 1e6:,.1f}",
                f"{row['bytes_over_fewest']:.2f}",
                f"{row['temporary_share']:.3f}",
                f"{row['bound_seconds'] * 1e3:.3f}",
                _kilocycles(row),
                "-" if row["cycles_over_plain"] is None else f"{row['cycles_over_plain']:.2f}",
            )
            for row in report.select(rows, device=device)
        ]
        title = f"{device}, {GRADIENT}, as compiled; bound: the bytes at {bandwidth:.2f} TB/s"
        used = [i for i in range(len(headings)) if any(row[i] != "-" for row in cells)]
        cells = [tuple(row[i] for i in used) for row in cells]
        found.append(report.Table(title, [headings[i] for i in used], cells, 3))
    if results["missing"]:
        lines = [(line,) for line in results["missing"]]
        found.append(report.Table("Not compiled", ("",), lines, 1))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerators",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = compilers.DEVICES
    parser.add_argument("--devices", nargs="+", default=list(known), metavar="NAME")
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--only-ours", action="store_true", help="leave out what it is held to")
    parser.add_argument("--out", type=Path, default=Path("out/accelerators"), metavar="DIR")
    return parser


def _write(results: dict[str, Any], folder: Path) -> None:
    text = json.dumps(results, indent=1, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile everything, write results.json and results.md, and print the tables."""
    options = _parser().parse_args(arguments)
    compilers.prepare()
    options.out.mkdir(parents=True, exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")}
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "rows": [],
        "missing": [],
    }
    programs = list(cases(options.workloads, options.dtype))
    if options.only_ours:
        programs = [case for case in programs if case.implementation in (OURS, LINEAR)]

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
        task = progress.add_task("compile", total=len(options.devices) * len(programs))
        for name in options.devices:
            try:
                device = compilers.device(name)
            except compilers.Unavailable as error:
                results["missing"].append(str(error))
                progress.advance(task, len(programs))
                continue
            for case in programs:
                what = f"{case.workload} {case.dtype} {case.implementation}"
                progress.update(task, description=f"{name} {what}")
                try:
                    results["rows"].append(row(device, case))
                except compilers.Unavailable as error:
                    results["missing"].append(f"{what}: {error}")
                progress.advance(task)
            _write(results, options.out)

    _write(results, options.out)
    made = tables(results)
    (options.out / "results.md").write_text(report.markdown(made), encoding="utf-8")
    report.show(made)


if __name__ == "__main__":
    main()
