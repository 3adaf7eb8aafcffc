"""The benchmark measures what it says, and its report can be made again from its JSON."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import assert_close

import focal_jax
from benchmarks import peers, report
from benchmarks.workloads import FAMILY, WORKLOADS, Workload
from focal_jax import _catalogue

ROOT = Path(__file__).parents[1]
COST = ("temporary_share", "bytes_accessed", "compile_seconds", "speedup", "bandwidth")
JAX = {
    "sigmoid": {"focal_jax", "before", "plain", "optax"},
    "anchors": {"focal_jax", "before", "plain", "one-hot"},
    "soft": {"focal_jax", "before", "plain", "one-hot"},
}


def _run(module, *arguments):
    """Run a module in a process of its own: optax does not take the tests' strict promotion."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    ).stdout


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmarks")
    options = "--quick --dtype float32 --no-figures --rounds 2 --sections losses family linear"
    names = "--workloads", *JAX, "quality-focal-loss"
    text = _run("benchmarks", *options.split(), *names, "--against", ROOT, "--out", out)
    return json.loads((out / "results.json").read_text()), text


def _losses(quick, **wanted):
    rows = [row for row in quick[0]["rows"] if row["section"] == "losses"]
    return [row for row in rows if wanted.items() <= row.items()]


def test_measures_every_implementation_in_both_modes(quick):
    for workload, names in JAX.items():
        for mode in ("value", "value and gradient"):
            rows = _losses(quick, workload=workload, mode=mode)
            found = {row["implementation"] for row in rows}
            assert names <= found <= names | {"torch", "torch.compile"}
            assert len(rows) == len(found)


def test_numbers_are_finite_and_in_order(quick):
    for row in _losses(quick):
        spread = list(row["seconds"].values())
        assert spread == sorted(spread)
        assert spread[0] > 0
        if not row["implementation"].startswith("torch"):
            assert all(math.isfinite(row[key]) and row[key] > 0 for key in COST)
        if row["implementation"] == "plain":
            assert row["speedup"] == 1


def test_counts_ops(quick):
    for row in _losses(quick, implementation="focal_jax"):
        assert not any(row["ops"][op] for op in ("scatter", "power", "transpose", "all-gather"))
        assert row["ops"]["fusion"] > 0
    (plain,) = _losses(quick, workload="anchors", implementation="plain", mode="value and gradient")
    assert plain["ops"]["scatter"] == 1  # that the count counts


def test_the_family_stands_beside_its_formulas(quick):
    rows = [row for row in quick[0]["rows"] if row["section"] == "family"]
    assert {row["workload"] for row in rows} == {"quality-focal-loss"}
    assert [row["implementation"] for row in rows] == ["focal_jax", "plain", "before"]


def test_another_version_is_measured_in_turns_with_ours(quick):
    against = report.against(quick[0])
    assert len(against) == 2 * len(JAX) + 1 + 2  # and the family's, and the linear head's
    for row, speedup in against:
        assert row["implementation"] in ("focal_jax", "focal_jax linear")
        assert 1e-3 < speedup < 1e3


def test_another_version_is_another(tmp_path):
    package = tmp_path / "focal_jax"
    package.mkdir()
    (package / "__init__.py").write_text("from focal_jax.inner import twice as sigmoid_focal_loss")
    (package / "inner.py").write_text("def twice(logits, labels):\n    return 2 * logits")
    ours = focal_jax.sigmoid_focal_loss
    other = peers.version_in(tmp_path)
    assert other.sigmoid_focal_loss(3, None) == 6
    assert sys.modules["focal_jax"].sigmoid_focal_loss is ours
    assert "focal_jax.inner" not in sys.modules
    found = peers.losses(Workload("x", "sigmoid_focal_loss", (2,)), other)
    assert found["before"](3, None) == 6
    assert "before" not in peers.losses(Workload("x", "quality_focal_loss", (2,)), other)


def test_a_folder_without_the_package_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="got a folder without focal_jax"):
        peers.version_in(tmp_path)
    assert sys.modules["focal_jax"] is focal_jax


def test_every_loss_of_the_catalogue_is_measured():
    measured = {workload.loss for workload in (*WORKLOADS.values(), *FAMILY.values())}
    linear = {loss.name for loss in _catalogue.LOSSES if loss.kind == "linear"}
    assert measured | linear == {loss.name for loss in _catalogue.LOSSES}


@pytest.mark.parametrize("workload", FAMILY.values(), ids=list(FAMILY))
def test_the_familys_formulas_are_the_losses(workload):
    small = dataclasses.replace(workload, shape=tuple(min(n, 7) for n in workload.shape))
    found = peers.losses(small)
    arguments = small.inputs("float32")
    ours, plain = (np.asarray(found[name](*arguments)) for name in ("focal_jax", "plain"))
    shapes = [np.shape(x) for x in arguments]
    assert shapes == [x.shape for x in small.shapes("float32")]
    assert_close(ours, plain, 1e-5)


def test_linear_head_stands_beside_the_plain_one(quick):
    rows = [row for row in quick[0]["rows"] if row["section"] == "linear"]
    assert {"focal_jax", "plain"} <= {row["implementation"] for row in rows}
    assert all(row["temporary_share"] > 0 for row in rows)


def test_report_is_made_again_from_the_json(quick, tmp_path):
    results, text = quick
    assert "focal_jax" in text
    assert "Goals" not in text  # tiny sizes say nothing of them
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results | {"quick": False}))
    markdown = _run("benchmarks.report", path, "--markdown", "--figures", tmp_path)
    (sigmoid,) = _losses(
        quick, workload="sigmoid", implementation="focal_jax", mode="value and gradient"
    )
    mark = "met" if sigmoid["speedup"] >= 3 else "MISSED"
    goal = f"| sigmoid: speed-up over plain | {sigmoid['speedup']:.2f} | \u2265 3 | {mark} |"
    assert goal in markdown
    for name in ("speedup", "memory"):
        assert plt.imread(tmp_path / f"{name}.png").shape[1] > 800


def test_scaling_gathers_nothing():
    rows = json.loads(_run("benchmarks.scaling", 2, 16, 1))
    assert {(row["kind"], row["implementation"]) for row in rows} == {
        (kind, name) for kind in ("strong", "weak") for name in ("focal_jax", "plain")
    }
    for row in rows:
        assert row["seconds"]["median"] > 0
        if row["implementation"] == "focal_jax":
            assert row["ops"]["all-gather"] == 0
