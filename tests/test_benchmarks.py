"""Tests of the benchmarks: what is measured, and the report from results.json."""

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
from benchmarks.measure import GRADIENT, MODES, keep_best, median_seconds
from benchmarks.peers import FOCAL_JAX, LINEAR, OTHER_VERSION, PLAIN_JAX, is_plain
from benchmarks.workloads import FAMILY, SIGMOID, WORKLOADS, Workload
from focal_jax.catalogue import LOSSES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STATISTICS = ("temporary_share", "bytes_accessed", "compile_seconds", "speedup", "bandwidth")
# The implementations in JAX of the workloads that the test runs.
IMPLEMENTATIONS = {
    "sigmoid": {FOCAL_JAX, OTHER_VERSION, PLAIN_JAX, "optax"},
    "anchors": {FOCAL_JAX, OTHER_VERSION, PLAIN_JAX, "one-hot"},
    "soft": {FOCAL_JAX, OTHER_VERSION, PLAIN_JAX, "one-hot"},
}
FAMILY_MEMBER = next(name for name, workload in FAMILY.items() if workload.kind == "elementwise")


def _run(module, *arguments):
    """Run a module in a new process, because optax does not support strict dtype promotion."""
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
    """Return the results and the output of a quick run."""
    out = tmp_path_factory.mktemp("benchmarks")
    options = "--quick --dtype float32 --no-figures --rounds 2 --sections losses family linear"
    names = "--workloads", *IMPLEMENTATIONS, FAMILY_MEMBER
    text = _run("benchmarks", *options.split(), *names, "--against", ROOT, "--out", out)
    return json.loads((out / "results.json").read_text()), text


def _rows(quick, section, **fields):
    return report.select(quick[0]["rows"], section=section, **fields)


def test_every_implementation_is_measured_in_both_modes(quick):
    for workload, names in IMPLEMENTATIONS.items():
        for mode in MODES:
            rows = _rows(quick, "losses", workload=workload, mode=mode)
            found = {row["implementation"] for row in rows}
            assert names <= found <= names | {"torch", "torch.compile"}
            assert len(rows) == len(found)


def test_statistics_are_finite_and_quantiles_are_sorted(quick):
    for row in _rows(quick, "losses"):
        quantiles = list(row["seconds"].values())
        assert quantiles == sorted(quantiles)
        assert quantiles[0] > 0
        if not row["implementation"].startswith("torch"):
            assert all(math.isfinite(row[key]) and row[key] > 0 for key in STATISTICS)
        if row["implementation"] == PLAIN_JAX:
            assert row["speedup"] == 1


def test_operations_are_counted(quick):
    for row in _rows(quick, "losses", implementation=FOCAL_JAX):
        assert not any(row["ops"][op] for op in ("scatter", "power", "transpose", "all-gather"))
        assert row["ops"]["fusion"] > 0
    fields = {"workload": "anchors", "implementation": PLAIN_JAX, "mode": GRADIENT}
    (plain,) = _rows(quick, "losses", **fields)
    assert plain["ops"]["scatter"] == 1


def test_plain_jax_is_the_fastest_formula(quick):
    seconds = {"a": 3.0, "b": 1.0, "c": 2.0}
    rows = [
        {"implementation": f"{PLAIN_JAX}: {formula}", "mode": GRADIENT, "seconds": {"median": t}}
        for formula, t in seconds.items()
    ]
    (row,) = keep_best(rows, PLAIN_JAX, median_seconds, "mode")
    assert row["implementation"] == PLAIN_JAX
    assert row["formula"] == "b"
    formulas = {"optax cross entropy", "log_softmax", "reference"}
    for row in _rows(quick, "losses", workload="anchors", implementation=PLAIN_JAX):
        assert row["formula"] in formulas


def test_family_section_has_the_plain_formula(quick):
    rows = _rows(quick, "family")
    assert {row["workload"] for row in rows} == {FAMILY_MEMBER}
    assert [row["implementation"] for row in rows] == [FOCAL_JAX, PLAIN_JAX, OTHER_VERSION]


def test_against_measures_the_other_version(quick):
    against = report.against(quick[0])
    # Both modes of the workloads, one row of the family section, both modes of the linear head.
    assert len(against) == 2 * len(IMPLEMENTATIONS) + 1 + 2
    for row, speedup in against:
        assert row["implementation"] in (FOCAL_JAX, LINEAR)
        assert 1e-3 < speedup < 1e3


def test_other_version_is_separate_from_the_current_package(tmp_path):
    package = tmp_path / "focal_jax"
    package.mkdir()
    # The loss imports a module on first use.
    lines = (
        f"def {SIGMOID}(*args):",
        "    from focal_jax.inner import twice",
        "    return twice(*args)",
    )
    (package / "__init__.py").write_text("\n".join(lines))
    (package / "inner.py").write_text("def twice(logits, labels):\n    return 2 * logits")
    current = getattr(focal_jax, SIGMOID)
    other = peers.import_version(tmp_path)
    loss = peers.losses(Workload("x", SIGMOID, (2,)), other)[OTHER_VERSION]
    for _ in range(2):
        with other.active():
            assert loss(3, None) == 6
            assert "focal_jax.inner" in sys.modules
        assert "focal_jax.inner" not in sys.modules
        assert getattr(sys.modules["focal_jax"], SIGMOID) is current
    assert OTHER_VERSION not in peers.losses(FAMILY[FAMILY_MEMBER], other)


def test_import_version_raises_without_the_package(tmp_path):
    with pytest.raises(FileNotFoundError, match="got a folder without focal_jax"):
        peers.import_version(tmp_path)
    assert sys.modules["focal_jax"] is focal_jax


def test_every_loss_of_the_catalogue_is_measured():
    measured = {workload.loss for workload in (*WORKLOADS.values(), *FAMILY.values())}
    linear = {loss.name for loss in LOSSES.values() if loss.kind == "linear"}
    assert measured | linear == set(LOSSES)


@pytest.mark.parametrize("workload", FAMILY.values(), ids=list(FAMILY))
def test_family_formulas_equal_the_losses(workload):
    small = dataclasses.replace(workload, shape=tuple(min(n, 7) for n in workload.shape))
    found = peers.losses(small)
    arguments = small.inputs("float32")
    assert [np.shape(x) for x in arguments] == [x.shape for x in small.shapes("float32")]
    got = np.asarray(found[FOCAL_JAX](*arguments))
    plain = [np.asarray(loss(*arguments)) for label, loss in found.items() if is_plain(label)]
    assert plain
    for want in plain:
        assert_close(got, want, 1e-5)


def test_linear_section_has_the_head_with_logits(quick):
    rows = _rows(quick, "linear")
    assert {FOCAL_JAX, PLAIN_JAX} <= {row["implementation"] for row in rows}
    assert all(row["temporary_share"] > 0 for row in rows)


def test_report_from_the_json_file(quick, tmp_path):
    results, text = quick
    assert FOCAL_JAX in text
    assert "Goals" not in text  # goals do not apply to quick runs
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results | {"quick": False}))
    markdown = _run("benchmarks.report", path, "--markdown", "--figures", tmp_path)
    fields = {"workload": "sigmoid", "implementation": FOCAL_JAX, "mode": GRADIENT}
    (sigmoid,) = _rows(quick, "losses", **fields)
    speedup = sigmoid["speedup"]
    verdict = "met" if speedup >= 3 else "missed"
    goal = f"| sigmoid: speed-up over {PLAIN_JAX} | {speedup:.2f} | \u2265 3 | {verdict} |"
    assert goal in markdown
    for name in ("speedup", "memory"):
        assert plt.imread(tmp_path / f"{name}.png").shape[1] > 800


def test_scaling_has_no_all_gather():
    rows = json.loads(_run("benchmarks.scaling", 2, 16, 1))
    assert {(row["kind"], row["implementation"]) for row in rows} == {
        (kind, label) for kind in ("strong", "weak") for label in (FOCAL_JAX, PLAIN_JAX)
    }
    for row in rows:
        assert row["seconds"]["median"] > 0
        if row["implementation"] == FOCAL_JAX:
            assert row["ops"]["all-gather"] == 0
