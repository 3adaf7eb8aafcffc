"""Read what XLA's GPU and TPU compilers make of the losses, without a GPU or a TPU.

Every workload is compiled, a value and its gradient, for each device: ours, the plain formula
and, for a sigmoid, optax. Tables go to the terminal, results.json and results.md to the folder
of --out. Nothing runs and nothing is timed: "bound" is the time that the bytes take at the
device's bandwidth, below which no run can come.

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
from benchmarks.measure import GRADIENT
from benchmarks.peers import LINEAR, OURS, PLAIN, in_mode, linear_losses, losses
from benchmarks.workloads import FAMILY, WORKLOADS

DTYPES = ("float32", "bfloat16")
RETINANET, HEAD = "retinanet", "linear head"
LOSSES = WORKLOADS | FAMILY
NAMES = (*LOSSES, RETINANET, HEAD)

# How often the logits and the labels are read at least. A position's sums come before its
# gradient. The slopes of a distribution need these sums, and are added up in their turn. So
# are those of a region, which need the sums over all the positions.
PASSES: Mapping[str, tuple[int, int]] = {
    "elementwise": (1, 1),
    "position": (2, 1),
    "interval": (2, 1),
    "distribution": (3, 2),
    "region": (4, 3),
}


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

    What is a function of one logit reads it and its label once, and writes the gradient. What
    has a class axis goes through it in passes, each of which needs what the last one added up.
    """
    workload = LOSSES[name]
    logits, labels = workload.shapes(dtype)
    of_logits, of_labels = PASSES[workload.kind]
    fewest = _bytes(*[logits] * of_logits, *[labels] * of_labels, logits)
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
    sigmoid = losses(LOSSES["sigmoid"])[PLAIN]

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


_HEADINGS = (
    *("workload", "dtype", "implementation", "kernels", "MB", "over fewest"),
    *("temporaries", "bound ms", "kcycles", "over plain"),
)


def _of_device(name: str, rows: Sequence[dict[str, Any]]) -> report.Table:
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
            _two_places(row["cycles_over_plain"]),
        )
        for row in rows
    ]
    used = [i for i in range(len(_HEADINGS)) if any(row[i] != "-" for row in cells)]
    cells = [tuple(row[i] for i in used) for row in cells]
    bandwidth = compilers.DEVICES[name].bandwidth / 1e12
    title = f"{name}, {GRADIENT}, as compiled; bound: the bytes at {bandwidth:.2f} TB/s"
    return report.Table(title, [_HEADINGS[i] for i in used], cells, 3)


def _two_places(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


def _of_ours(rows: Sequence[dict[str, Any]]) -> report.Table:
    """Return a line a workload: on each device the bytes over the fewest, of a TPU the cycles."""
    ours = [row for row in rows if row["implementation"] in (OURS, LINEAR)]
    ours = [row for row in ours if row["workload"] != HEAD or row["implementation"] == LINEAR]
    found = {(row["device"], row["workload"], row["dtype"]): row for row in ours}
    devices, lines = (
        [*dict.fromkeys(x)]
        for x in (
            (row["device"] for row in ours),
            ((row["workload"], row["dtype"]) for row in ours),
        )
    )
    columns = [(name, "bytes_over_fewest", name) for name in devices] + [
        (name, "cycles_over_plain", f"{name} cycles")
        for name in devices
        if compilers.DEVICES[name].platform == "tpu"
    ]

    def cell(device: str, line: tuple[str, str], field: str) -> str:
        return _two_places(found.get((device, *line), {}).get(field))

    cells = [(*line, *(cell(name, line, field) for name, field, _ in columns)) for line in lines]
    title = "focal_jax on every device: bytes over the fewest; of a TPU, cycles over the plain"
    return report.Table(title, ["workload", "dtype", *(x for _, _, x in columns)], cells, 2)


def tables(rows: Sequence[dict[str, Any]]) -> list[report.Table]:
    """Return a table for all devices, and one for each; or one for the programs of a pod."""
    if any("program" in row for row in rows):
        return [pod.table(rows)]
    rows = related(rows)
    devices = dict.fromkeys(row["device"] for row in rows)
    each = [_of_device(name, report.select(rows, device=name)) for name in devices]
    return [_of_ours(rows), *each] if each else []


def _not_compiled(missing: Sequence[str]) -> list[report.Table]:
    return [report.Table("Not compiled", ("",), [(x,) for x in missing], 1)] if missing else []


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
        "--only-ours",
        nargs="*",
        metavar="NAME",
        help="leave out what it is held to, on these devices or on all",
    )
    parser.add_argument(
        "--join",
        nargs="+",
        type=Path,
        default=(),
        metavar="JSON",
        help="results.json of other runs, to be in the tables too",
    )
    parser.add_argument(
        "--pod",
        nargs="*",
        choices=pod.PROGRAMS,
        metavar="PROGRAM",
        help=f"instead, on a pod, all or some of: {', '.join(pod.PROGRAMS)}",
    )
    parser.add_argument("--out", type=Path, default=Path("out/accelerators"), metavar="DIR")
    return parser


def _write(results: dict[str, Any], folder: Path) -> None:
    text = json.dumps(results, indent=1, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")


Work = tuple[str, Callable[[], dict[str, Any]]]  # what to compile, and how to make its row of it


def _work(options: argparse.Namespace, missing: list[str]) -> Iterator[Work]:
    """Yield what is to be compiled, and note the devices that there is no compiler for."""
    if options.pod is not None:
        for name in options.pod or pod.PROGRAMS:
            yield name, partial(pod.row, name)
        return
    programs = list(cases(options.workloads, options.dtype))
    ours = [case for case in programs if case.implementation in (OURS, LINEAR)]
    without = () if options.only_ours is None else options.only_ours or options.devices
    for name in options.devices:
        try:
            device = compilers.device(name)
        except compilers.Unavailable as error:
            missing.append(str(error))
            continue
        for case in ours if name in without else programs:
            what = f"{name} {case.workload} {case.dtype} {case.implementation}"
            yield what, partial(row, device, case)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile everything, write results.json and results.md, and print the tables."""
    options = _parser().parse_args(arguments)
    compilers.prepare()
    options.out.mkdir(parents=True, exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")}
    before = [json.loads(path.read_text(encoding="utf-8")) for path in options.join]
    rows, missing = ([x for run in before for x in run[key]] for key in ("rows", "missing"))
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "rows": rows,
        "missing": missing,
    }
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
        work = list(_work(options, missing))
        task = progress.add_task("compile", total=len(work))
        for what, make in work:
            progress.update(task, description=what)
            try:
                rows.append(make())
            except compilers.Unavailable as error:
                missing.append(f"{what}: {error}")
            progress.advance(task)
            _write(results, options.out)  # what was compiled outlives whatever may break later

    _write(results, options.out)
    made = [*tables(rows), *_not_compiled(missing)]
    (options.out / "results.md").write_text(report.markdown(made), encoding="utf-8")
    report.show(made)


if __name__ == "__main__":
    main()
