"""Two processes with two devices each return the results of one device.

The test starts this file as a program in each process. Its arguments are the coordinator's
address, the number of processes and the rank of the process.
"""

import functools
import json
import os
import re
import runpy
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import focal_jax

pytestmark = pytest.mark.slow

PROCESSES, DEVICES = 2, 2
SHARDED, REPLICATED = P("data"), P()
SPECS = SHARDED, REPLICATED, SHARDED, SHARDED


# ------------------------------------------------------------------------ computations


def _sigmoid(logits, gamma, labels, where):
    one_hot = jax.nn.one_hot(labels, logits.shape[1])
    losses = focal_jax.sigmoid_focal_loss(logits, one_hot, gamma=gamma, where=where[:, None])
    return jnp.sum(losses, 1)


def _softmax(logits, alpha, labels, where):
    return focal_jax.softmax_focal_loss_with_integer_labels(
        logits, labels, alpha=alpha, where=where
    )


def _linear(features, kernel, labels, where):
    return focal_jax.linear_softmax_focal_loss_with_integer_labels(
        features, kernel, labels, where=where, chunk_size=4
    )


def _reduced(loss, axis_name=None):
    def reduced(rows, parameter, labels, where):
        losses = loss(rows, parameter, labels, where)
        return focal_jax.reduce_loss(losses, where=where, axis_name=axis_name)

    return reduced


def _mean_over_devices(loss):
    return lambda *args: lax.pmean(_reduced(loss, "data")(*args), "data")


def _jit(loss, mesh):
    return jax.value_and_grad(_reduced(loss), (0, 1))


def _gradient_outside(loss, mesh):
    mapped = jax.shard_map(
        _mean_over_devices(loss), mesh=mesh, in_specs=SPECS, out_specs=REPLICATED
    )
    return jax.value_and_grad(mapped, (0, 1))


def _gradient_inside(loss, mesh):
    return jax.shard_map(
        jax.value_and_grad(_mean_over_devices(loss), (0, 1)),
        mesh=mesh,
        in_specs=SPECS,
        out_specs=(REPLICATED, (SHARDED, REPLICATED)),
    )


TRANSFORMS = {
    "jit": _jit,
    "shard_map, gradient outside": _gradient_outside,
    "shard_map, gradient inside": _gradient_inside,
}
rng = np.random.default_rng(0)
ROWS = rng.normal(0, 2, (8, 5)).astype(np.float32)
LABELS = rng.integers(5, size=8).astype(np.int32)
WHERE = np.array([0, 0, 0, 1, 1, 0, 1, 1], bool)  # the devices have 0, 1, 1 and 2 valid rows
LOSSES = {  # with an argument that is replicated
    "sigmoid": (_sigmoid, np.float32(1.5)),
    "integer softmax": (_softmax, rng.uniform(0.5, 2, 5).astype(np.float32)),
    "linear head": (_linear, rng.normal(size=(5, 12)).astype(np.float32)),
}


def _process(address, processes, rank):
    """Compute all results in one process of several, and print them as a line of JSON."""
    jax.distributed.initialize(address, processes, rank, cluster_detection_method="deactivate")
    assert (jax.process_count(), jax.local_device_count()) == (PROCESSES, DEVICES)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    rows, labels, where = (
        jax.make_array_from_process_local_data(
            NamedSharding(mesh, SHARDED), np.split(x, processes)[rank]
        )
        for x in (ROWS, LABELS, WHERE)
    )

    def compute(rows, labels, where):
        return {
            f"{transform}, {name}": function(loss, mesh)(rows, parameter, labels, where)
            for transform, function in TRANSFORMS.items()
            for name, (loss, parameter) in LOSSES.items()
        }

    results = jax.jit(compute, out_shardings=NamedSharding(mesh, REPLICATED))(rows, labels, where)
    numbers = {k: [x.tolist() for x in jax.tree.leaves(v)] for k, v in results.items()}
    print(json.dumps(numbers), flush=True)


# -------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "multi_host.py"
    return runpy.run_path(str(path))


@pytest.fixture(scope="module")
def results(example):
    strict = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    printed = example["launch"]([sys.executable, __file__], PROCESSES, DEVICES, 120, **strict)
    return [line for (line,) in printed]


@functools.cache
def _on_one_device(name):
    loss, parameter = LOSSES[name]
    return jax.tree.leaves(jax.jit(_jit(loss, None))(ROWS, parameter, LABELS, WHERE))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_two_processes_return_the_results_of_one_device(results, transform, name):
    for numbers in results:
        got = [np.array(x) for x in numbers[f"{transform}, {name}"]]
        assert_close(got, _on_one_device(name), 1e-5)


def test_example_has_equal_losses_in_every_layout(example, capsys):
    losses = example["main"](["--steps=3"])
    assert [x.shape for x in losses.values()] == [(1, 3), (1, 3), (2, 3)]
    assert losses["1 device"][0, -1] < losses["1 device"][0, 0]
    assert "The layouts agree" in capsys.readouterr().out


@pytest.mark.parametrize("second", [1.001, float("nan")])
def test_example_fails_if_layouts_disagree(example, monkeypatch, second):
    def launch(command, processes, devices, timeout):
        return [[{"loss": 1.0}, {"loss": second if processes == 2 else 1.0}]] * processes

    monkeypatch.setitem(example["main"].__globals__, "launch", launch)
    with pytest.raises(SystemExit, match="The layouts disagree: greatest difference") as raised:
        example["main"]([])
    assert raised.value.code != 0


def _program(text):
    imports = "import os, sys, time\nrank = int(sys.argv[3])\nprint(os.getpid(), file=sys.stderr)\n"
    return [sys.executable, "-c", imports + text]


def test_failed_process_stops_the_others_and_is_reported(example):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"process \[1\] of 2 failed with code \[1\](.|\n)*boom"):
        example["launch"](_program("sys.exit('boom') if rank else time.sleep(100)"), 2, 1, 100)
    assert time.monotonic() - start < 50


def test_processes_are_stopped_after_the_timeout(example):
    message = r"process \[0, 1\] of 2 had not ended after 2 s"
    with pytest.raises(RuntimeError, match=message) as raised:
        example["launch"](_program("time.sleep(100)"), 2, 1, 2)
    pids = re.findall(r"^\d+$", str(raised.value), re.MULTILINE)
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


if __name__ == "__main__":
    _process(sys.argv[1], *map(int, sys.argv[2:]))
