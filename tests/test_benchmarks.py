"""The benchmark measures what it says, and its report can be made again from its JSON."""

import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).parents[1]
COST = ("temporary_share", "bytes_accessed", "compile_seconds", "speedup", "bandwidth")
JAX = {
    "sigmoid": {"focal_jax", "plain", "optax"},
    "anchors": {"focal_jax", "plain", "one-hot"},
    "soft": {"focal_jax", "plain", "one-hot"},
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
    options = "--quick --workloads sigmoid anchors soft --dtype float32 --no-figures --rounds 2"
    text = _run("benchmarks", *options.split(), "--sections", "losses", "linear", "--out", out)
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
