"""The losses on several devices: a process for each number of XLA's host devices.

What is measured is how the program is split up, not how fast it would be on that many
machines: the host devices share the cores of this one.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.measure import GRADIENT, compile_program, measure, relate
from benchmarks.peers import OURS, PLAIN, in_mode, losses
from benchmarks.workloads import SOFTMAX, Workload

DEVICES = (1, 2, 4, 8)


def _rows(devices: int, anchors: int, rounds: int) -> list[dict[str, Any]]:
    """Measure a batch of images that is spread over this process's devices."""
    mesh = jax.make_mesh((devices,), ("batch",), axis_types=(AxisType.Auto,))
    batch = NamedSharding(mesh, PartitionSpec("batch"))
    rows = []
    # Eight images in all, or one image for each device.
    for kind, images in (("strong", max(DEVICES)), ("weak", devices)):
        workload = Workload(kind, SOFTMAX, (images, anchors, 21))
        logits, labels = jax.device_put(workload.inputs("float32"), batch)
        programs = [
            compile_program(name, GRADIENT, in_mode(GRADIENT, loss), logits, labels)
            for name, loss in losses(workload).items()
            if name in (OURS, PLAIN)
        ]
        about = {"section": "scaling", "kind": kind, "devices": devices, "dtype": "float32"}
        measured = measure(
            programs, rounds, lambda: None, **about, workload=kind, shape=workload.shape
        )
        # The compiler counts one device's memory.
        rows += relate(measured, PLAIN, logits.nbytes // devices)
    return rows


def rows(devices: int, anchors: int, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of a process with that many devices."""
    others = [
        flag
        for flag in os.environ.get("XLA_FLAGS", "").split()
        if "xla_force_host_platform_device_count" not in flag
    ]
    flags = [*others, f"--xla_force_host_platform_device_count={devices}"]
    numbers = [str(x) for x in (devices, anchors, rounds)]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", *numbers],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)},
        stdout=subprocess.PIPE,
        check=True,
        timeout=1800,
    )
    return json.loads(process.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    for name in ("devices", "anchors", "rounds"):
        parser.add_argument(name, type=int)
    json.dump(_rows(**vars(parser.parse_args())), sys.stdout)
