"""Train the same steps on one device, on eight devices and in two processes; compare the losses.

A small Flax classifier is trained on the digits of scikit-learn. Some labels are missing, and more
are missing in the first half of a batch than in the second, so the devices have different numbers
of valid labels. The loss is still that of one device. Each layout runs `train` of this program in
its own processes, which communicate over the loopback interface as hosts do over a network. The
comparison takes about half a minute:

    python examples/multi_host.py --steps 20

On several machines, start the program once per machine with the address of the first one:

    python examples/multi_host.py --join 10.0.0.1:9000 PROCESSES RANK
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from focal_jax.nnx import SoftmaxFocalLoss

LAYOUTS = {  # number of processes, devices per process
    "1 device": (1, 1),
    "8 devices": (1, 8),
    "2 processes of 2 devices": (2, 2),
}


# ---------------------------------------------------------------- one process


def batches(steps: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield images and labels. A label is -1 with a probability that falls along the batch."""
    digits = load_digits()
    images = (digits.data / 16).astype(np.float32)
    random = np.random.default_rng(0)
    for _ in range(steps):
        chosen = random.integers(len(images), size=size)
        hidden = random.random(size) < np.linspace(1, 0, size)
        yield images[chosen], np.where(hidden, -1, digits.target[chosen])


def create():
    """Return a classifier and its optimizer."""
    # XLA compiles the default generator in many seconds, this one in one second.
    rngs = nnx.Rngs(jax.random.key(0, impl="unsafe_rbg"))
    model = nnx.Sequential(nnx.Linear(64, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 10, rngs=rngs))
    return model, nnx.Optimizer(model, optax.sgd(0.5, momentum=0.9), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, images, labels):
    """Take a step of gradient descent. The code is the same for one device and for many."""
    focal = SoftmaxFocalLoss(gamma=2.0, ignore_label=-1)
    loss, gradients = nnx.value_and_grad(lambda model: focal(model(images), labels))(model)
    optimizer.update(model, gradients)
    return loss


def train(address: str, processes: int, rank: int, steps: int, size: int) -> None:
    """Train as one of the processes; print the loss of each step as one line of JSON."""
    jax.distributed.initialize(address, processes, rank, cluster_detection_method="deactivate")
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    sharded, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), ()))

    # Every device of every process computes the same parameters from the same key.
    model, optimizer = nnx.jit(create, out_shardings=replicated)()
    for batch in batches(steps, size):
        # Each process passes its own rows. On real hosts it would load only those.
        rows = [
            jax.make_array_from_process_local_data(sharded, np.split(x, processes)[rank])
            for x in batch
        ]
        print(json.dumps({"loss": float(step(model, optimizer, *rows))}), flush=True)


# ---------------------------------------------------------------- all processes


def free_address() -> str:
    """Return a loopback address with a free port."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return "{}:{}".format(*server.getsockname())


def launch(
    command: Sequence[str], processes: int, devices: int, timeout: float, **env: str
) -> list[list[dict[str, Any]]]:
    """Run a command in several processes, each with its own CPU devices.

    All processes have ended when this function returns or raises.

    Args:
      command: the argument list. The address of the coordinator, the number of processes and
        the rank of the process are appended.
      processes: the number of processes.
      devices: the number of CPU devices per process.
      timeout: in seconds, for all processes together.
      **env: additional environment variables.

    Returns:
      For each process, the JSON objects that it printed.

    Raises:
      RuntimeError: if a process fails or the time is over. The message holds the stderr of the
        processes.
    """
    # The processes connect over the loopback interface without a proxy and import from the same
    # paths as this one.
    own = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    own |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    own |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    end, address = time.monotonic() + timeout, free_address()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = {}
        for rank in range(processes):
            process = subprocess.Popen(
                [*command, address, str(processes), str(rank)],
                env=own | env,
                stdout=stack.enter_context((folder / f"{rank}.out").open("w")),
                stderr=stack.enter_context((folder / f"{rank}.err").open("w")),
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            running[rank] = process

        def fail(ranks: Sequence[int], what: str):
            errors = (f"process {i}:\n{(folder / f'{i}.err').read_text()}" for i in ranks)
            raise RuntimeError("\n".join([f"process {ranks} of {processes} {what}", *errors]))

        while running:
            codes = {rank: process.poll() for rank, process in running.items()}
            if failed := [rank for rank, code in codes.items() if code]:
                fail(failed, f"failed with code {[codes[rank] for rank in failed]}")
            running = {rank: running[rank] for rank, code in codes.items() if code is None}
            if running and time.monotonic() > end:
                fail(list(running), f"had not ended after {timeout} s")
            time.sleep(0.05)
        # The library of the collectives prints other lines to stdout.
        outputs = [(folder / f"{rank}.out").read_text() for rank in range(processes)]
        lines = [[x for x in text.splitlines() if x.startswith("{")] for text in outputs]
        return [[json.loads(x) for x in process] for process in lines]


def compare(losses: dict[str, np.ndarray]) -> np.ndarray:
    """Return the largest relative difference to the first layout, for each step.

    `losses` holds an array `[processes, steps]` per layout.
    """
    (first,), *_ = losses.values()
    return np.max([np.abs(x / first - 1).max(0) for x in losses.values()], 0)


def show(losses: dict[str, np.ndarray], differences: np.ndarray, console: Console) -> None:
    """Print the table: one row per step, one column per layout."""
    table = Table(
        "step",
        *losses,
        "difference",
        title="Focal loss of each training step",
        caption="Difference: the largest relative difference to the first column.",
    )
    for column in table.columns:
        column.justify = "right"
    for number, difference in enumerate(differences):
        cells = (f"{x[0, number]:.7f}" for x in losses.values())
        table.add_row(str(number + 1), *cells, f"{difference:.1e}")
    console.print(table)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python examples/multi_host.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument(
        "--batch", type=int, default=64, help="a multiple of 8; default: %(default)s"
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="relative, per loss; default: %(default)s"
    )
    parser.add_argument(
        "--timeout", type=float, default=120, help="seconds per layout; default: %(default)s"
    )
    parser.add_argument(
        "--join",
        nargs=3,
        metavar=("ADDRESS", "PROCESSES", "RANK"),
        help="run as one process and only print its losses",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, np.ndarray] | None:
    args = parse(argv)
    if args.join:
        address, processes, rank = args.join
        train(address, int(processes), int(rank), args.steps, args.batch)
        return None
    command = [sys.executable, __file__, f"--steps={args.steps}", f"--batch={args.batch}", "--join"]
    console, losses = Console(), {}
    for name, (processes, devices) in LAYOUTS.items():
        with console.status(name):
            printed = launch(command, processes, devices, args.timeout)
        losses[name] = np.array([[line["loss"] for line in lines] for lines in printed])
    differences = compare(losses)
    show(losses, differences, console)
    summary = f"greatest difference {differences.max():.1e}, tolerance {args.tolerance:.0e}"
    if not differences.max() <= args.tolerance:  # also true for NaN
        sys.exit(f"The layouts disagree: {summary}")
    console.print(f"The layouts agree: {summary}")
    return losses


if __name__ == "__main__":
    main()
