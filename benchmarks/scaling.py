"""Measure a sharded batch on XLA's host devices, with one process per number of devices.

Host devices share the cores of one machine. The times show the overhead of partitioning a
program, not the speed-up of several machines.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.measure import GRADIENT, add_ratios, compile_program, measure
from benchmarks.peers import FOCAL_JAX, PLAIN_JAX, is_plain, losses, summed
from benchmarks.workloads import SOFTMAX, Workload

DEVICES = (1, 2, 4, 8)


def _rows(devices: int, anchors: int, rounds: int) -> list[dict[str, Any]]:
    """Measure a batch of images that is sharded over the devices of this process."""
    mesh = jax.make_mesh((devices,), ("batch",), axis_types=(AxisType.Auto,))
    batch = NamedSharding(mesh, PartitionSpec("batch"))
    rows = []
    # Strong scaling: eight images in total. Weak scaling: one image per device.
    for kind, images in (("strong", max(DEVICES)), ("weak", devices)):
        workload = Workload(kind, SOFTMAX, (images, anchors, 21))
        logits, labels = jax.device_put(workload.inputs("float32"), batch)
        programs = [
            compile_program(label, GRADIENT, summed(loss, GRADIENT), logits, labels)
            for label, loss in losses(workload).items()
            if label == FOCAL_JAX or is_plain(label)
        ]
        fields = {"section": "scaling", "kind": kind, "devices": devices, "dtype": "float32"}
        measured = measure(
            programs, rounds, lambda: None, **fields, workload=kind, shape=workload.shape
        )
        # `memory_analysis` reports the memory of one device.
        rows += add_ratios(measured, PLAIN_JAX, logits.nbytes // devices)
    return rows


def rows(devices: int, anchors: int, rounds: int) -> list[dict[str, Any]]:
    """Run a process with the given number of host devices and return its rows."""
    other_flags = [
        flag
        for flag in os.environ.get("XLA_FLAGS", "").split()
        if "xla_force_host_platform_device_count" not in flag
    ]
    flags = [*other_flags, f"--xla_force_host_platform_device_count={devices}"]
    arguments = [str(x) for x in (devices, anchors, rounds)]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", *arguments],
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
