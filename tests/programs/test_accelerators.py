"""Limits on the memory traffic, kernels and cycles of programs that are compiled for GPUs and TPUs.

`make test-accelerators` runs these tests where the compilers are installed. Without the compilers
only the tests of the HLO parser run.
"""

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import jax_defaults

import focal_jax
from benchmarks import accelerators, compilers, pod
from benchmarks.peers import FOCAL_JAX, LINEAR, PLAIN_JAX, is_plain
from benchmarks.workloads import FAMILY, WORKLOADS
from focal_jax.catalogue import LOSSES

ROOT = Path(__file__).parents[2]
INSTALLED = compilers.installed()
if INSTALLED:  # before any test starts JAX
    compilers.prepare()


@dataclasses.dataclass(frozen=True)
class Limits:
    """The largest allowed statistics of a compiled program.

    Attributes:
      device: the name of the device.
      workload: the name of the workload.
      dtype: the dtype of the logits.
      bytes: bytes moved / minimum.
      temporaries: temporary memory / size of the logits.
      cycles: cycles / cycles of the plain formula `_plain_label`, on a TPU.
      kernels: the number of kernels.
    """

    device: str
    workload: str
    dtype: str
    bytes: float
    temporaries: float
    cycles: float | None = None
    kernels: int = 8


# fmt: off
LIMITS = [
    # Three kernels: the losses and gradients with partial sums, the sum of these, and a scalar.
    *(
        Limits(device, workload, dtype, 1.05, 0.01, kernels=3)
        for device in ("A100", "H200")
        for workload in ("sigmoid", "sigmoid-1.5", "sigmoid, int8 labels")
        for dtype in ("float32", "bfloat16")
    ),
    Limits("H200", "anchors", "float32", 1.35, 0.2),
    Limits("H200", "anchors", "bfloat16", 1.60, 0.4),
    Limits("H200", "segmentation", "float32", 1.35, 0.2),
    Limits("H200", "segmentation", "bfloat16", 1.60, 0.4),
    Limits("H200", "segmentation-last", "float32", 1.35, 0.2),
    Limits("H200", "imagenet", "float32", 1.05, 0.02),
    Limits("H200", "imagenet", "bfloat16", 1.10, 0.02),
    Limits("H200", "vocabulary", "float32", 1.05, 0.02),
    Limits("H200", "vocabulary", "bfloat16", 1.10, 0.02),
    Limits("H200", "retinanet", "float32", 1.15, 0.06, kernels=24),
    Limits("H200", "retinanet", "bfloat16", 1.28, 0.12, kernels=24),
    Limits("v5e", "sigmoid", "float32", 1.05, 0.01, cycles=1.03),
    Limits("v5e", "sigmoid", "bfloat16", 1.05, 0.01, cycles=1.03),
    Limits("v5e", "anchors", "float32", 1.40, 0.1, cycles=0.55, kernels=16),
    Limits("v5e", "anchors", "bfloat16", 1.60, 0.2, cycles=0.70, kernels=16),
    Limits("v5e", "imagenet", "float32", 1.40, 0.02, cycles=0.60, kernels=16),
    Limits("v5e", "imagenet", "bfloat16", 1.40, 0.02, cycles=0.85, kernels=16),
    Limits("v5e", "vocabulary", "float32", 1.40, 0.02, cycles=0.60, kernels=16),
    Limits("v5e", "vocabulary", "bfloat16", 1.40, 0.02, cycles=0.75, kernels=16),
    Limits("v5e", "segmentation", "float32", 1.60, 0.1, cycles=0.60, kernels=16),
    Limits("H200", "soft", "float32", 1.25, 0.4),
    Limits("H200", "soft", "bfloat16", 1.45, 0.8),
    Limits("H200", "soft-imagenet", "float32", 1.05, 0.02),
    Limits("H200", "soft-imagenet", "bfloat16", 1.05, 0.02),
]
# fmt: on

# Bytes, temporaries and kernels of the other losses, by kind (and number of classes) and dtype.
_FAMILY = {
    ("elementwise", "float32"): (1.05, 0.01, 3),
    ("elementwise", "bfloat16"): (1.05, 0.01, 3),
    ("position 21", "float32"): (1.35, 0.2, 6),
    ("position 21", "bfloat16"): (1.60, 0.4, 6),
    ("position 1000", "float32"): (1.05, 0.02, 6),
    ("position 1000", "bfloat16"): (1.10, 0.02, 6),
    # Two cross entropies over 17 classes: the sums of a position have the size of its logits.
    ("interval", "float32"): (1.70, 0.65, 8),
    ("interval", "bfloat16"): (2.35, 1.25, 8),
    ("region", "float32"): (1.20, 0.3, 12),
    ("region", "bfloat16"): (1.35, 0.6, 12),
}
# The largest probability below that of the true class needs a third pass over the classes.
_DUAL = {
    ("position 21", "float32"): (1.85, 0.45, 7),
    ("position 21", "bfloat16"): (2.30, 0.90, 7),
    ("position 1000", "float32"): (1.40, 0.02, 6),
    ("position 1000", "bfloat16"): (1.40, 0.02, 6),
}


def _family_limits():
    for name, workload in FAMILY.items():
        is_dual = workload.loss == focal_jax.dual_focal_loss_with_integer_labels.__name__
        kind = workload.kind
        if kind == "position":
            kind += f" {workload.shape[workload.axis]}"
        for dtype in accelerators.DTYPES:
            most, temporaries, kernels = (_DUAL if is_dual else _FAMILY)[kind, dtype]
            yield Limits("H200", name, dtype, most, temporaries, kernels=kernels)
            if kind == "elementwise":
                cycles = 1.25 if name == "asymmetric-loss" else 1.10
                yield Limits("v5e", name, dtype, most, temporaries, cycles, kernels=2)


LIMITS += _family_limits()
# Limits of the linear head: the device, temporaries / logits, and bytes and cycles relative to
# plain JAX with materialized logits. Each of the 128 chunks reads all features. The time of the
# matrix products exceeds that of the reads. The formula with optax's cross entropy keeps its logits
# and its sums in bfloat16, the linear head in float32.
HEADS = [
    ("H200", "log_softmax", 0.04, 2.5, None),
    ("v5e", "log_softmax", 0.06, 2.5, 1.10),
    ("v5e", "optax cross entropy", 0.06, 4.0, 1.30),
]
RETINANET_CYCLES = {"float32": 5.8e6, "bfloat16": 5.6e6}  # on v5e


def _narrow_labels(dtype):
    """Yield the cases of the sigmoid with int8 labels, which must not be widened in memory."""
    for case in accelerators.workload_cases("sigmoid", dtype):
        logits, labels = case.args
        narrow = jax.ShapeDtypeStruct(labels.shape, jnp.int8)
        saved = labels.size * (labels.dtype.itemsize - 1)
        yield dataclasses.replace(
            case, args=(logits, narrow), minimum_bytes=case.minimum_bytes - saved
        )


def _plain_label(workload, dtype):
    """Return the label of the plain formula with the fewest cycles on a v5e."""
    is_torchvision = (workload, dtype) == ("sigmoid", "float32")
    return f"{PLAIN_JAX}: {'torchvision' if is_torchvision else 'reference'}"


@cache
def find_case(workload, dtype, implementation=FOCAL_JAX):
    makers = {
        "sigmoid, int8 labels": _narrow_labels,
        "retinanet": accelerators.retinanet_cases,
        **{name: partial(accelerators.linear_cases, name) for name in accelerators.HEADS},
    }
    make = makers.get(workload) or partial(accelerators.workload_cases, workload)
    (found,) = (case for case in make(dtype) if case.implementation == implementation)
    return found


@cache
def compile_case(device, *case):
    """Return the row and the HLO of a case, or skip the test without the compiler."""
    try:
        known = compilers.device(device)
    except compilers.Unavailable as error:
        pytest.skip(str(error))
    found = find_case(*case)
    program = compilers.compile_for(known, found.function, *found.args)
    return accelerators.row(known, found, program), program.as_text()


needs_compilers = pytest.mark.skipif(
    not INSTALLED, reason="no compiler for GPUs or TPUs is installed: make test-accelerators"
)


@pytest.mark.accelerators
@needs_compilers
@pytest.mark.parametrize(
    "limits", LIMITS, ids=lambda x: f"{x.device} {x.workload} {x.dtype}".replace(",", "")
)
def test_programs_are_within_limits(limits):
    row, hlo = compile_case(limits.device, limits.workload, limits.dtype)
    assert 0.2 < row["bytes_over_minimum"] <= limits.bytes
    assert row["temporary_share"] <= limits.temporaries
    assert 1 <= row["kernels"] <= limits.kernels
    if limits.cycles is not None:
        label = _plain_label(limits.workload, limits.dtype)
        plain, _ = compile_case(limits.device, limits.workload, limits.dtype, label)
        assert row["unestimated"] == 0
        assert 0 < row["cycles"] <= limits.cycles * plain["cycles"]
    if limits.workload != "retinanet":  # RetinaNet's loss gathers the matched annotations
        for op in ("gather", "scatter", "power"):
            assert f" {op}(" not in hlo


@pytest.mark.accelerators
@needs_compilers
@pytest.mark.parametrize("dtype", RETINANET_CYCLES)
def test_retinanet_cycles_are_within_limits(dtype):
    row, hlo = compile_case("v5e", "retinanet", dtype)
    assert row["unestimated"] == 0
    assert 1e6 < row["cycles"] <= RETINANET_CYCLES[dtype]
    assert " gather(" not in hlo


@pytest.mark.accelerators
@needs_compilers
@pytest.mark.parametrize(
    ("device", "formula", "temporaries", "most_bytes", "most_cycles"),
    HEADS,
    ids=[" ".join(x[:2]) for x in HEADS],
)
def test_linear_head_is_within_limits(device, formula, temporaries, most_bytes, most_cycles):
    linear, _ = compile_case(device, "linear head", "bfloat16", LINEAR)
    plain, _ = compile_case(device, "linear head", "bfloat16", f"{PLAIN_JAX}: {formula}")
    assert linear["temporary_share"] <= temporaries < 1 < plain["temporary_share"]
    assert linear["kernels"] > 100  # the kernels of a loop count once per iteration
    assert 0 < linear["bytes"] <= most_bytes * plain["bytes"]
    if most_cycles:
        assert linear["unestimated"] == 0
        assert linear["cycles"] <= most_cycles * plain["cycles"]


@pytest.mark.accelerators
@needs_compilers
@pytest.mark.parametrize("name", accelerators.MORE_HEADS)
def test_other_linear_heads_are_within_limits(name):
    linear, _ = compile_case("v5e", name, "bfloat16", LINEAR)
    plain, _ = compile_case("v5e", name, "bfloat16", PLAIN_JAX)
    assert linear["temporary_share"] <= 0.04 < 2 < plain["temporary_share"]
    assert 0 < linear["cycles"] <= 1.3 * plain["cycles"]


@pytest.mark.accelerators
@needs_compilers
@pytest.mark.parametrize("device", compilers.DEVICES)
def test_every_device_compiles(device):
    try:
        known = compilers.device(device)
    except compilers.Unavailable as error:
        pytest.skip(str(error))
    shape = jax.ShapeDtypeStruct((4096, 128), "bfloat16")
    program = compilers.compile_for(known, lambda z: z * 2, shape)
    assert compilers.read(known, program).bytes == 2 * 2 * 4096 * 128


# ---------------------------------------------------------------- pod


@cache
def compile_for_pod(name):
    try:
        compilers.device("v5p")
    except compilers.Unavailable as error:
        pytest.skip(str(error))
    # Flax's layers need implicit promotion.
    with jax_defaults():
        return pod.row(name)


GUIDE = (ROOT / "docs" / "scaling.md").read_text()
# The rows of the table with one program of the pod per row: a name and seven numbers.
POD_TABLE = dict(re.findall(r"^\| ([a-z, ]+) \|((?: [\d.,]+%? \|){7})$", GUIDE, re.MULTILINE))


def test_scaling_guide_has_every_program_of_the_pod():
    assert list(POD_TABLE) == list(pod.PROGRAMS)


@pytest.mark.accelerators
@pytest.mark.slow
@needs_compilers
@pytest.mark.parametrize("name", pod.PROGRAMS)
def test_scaling_guide_has_the_figures_of_the_pod(name):
    (_, *cells), *_ = pod.table([compile_for_pod(name)]).rows
    for got, stated in zip(cells, POD_TABLE[name].strip(" |").split(" | "), strict=True):
        tolerance = {"atol": 3} if stated.endswith("%") else {"rtol": 0.1, "atol": 0.02}
        got, stated = (float(cell.rstrip("%").replace(",", "")) for cell in (got, stated))
        np.testing.assert_allclose(got, stated, **tolerance)


@pytest.mark.accelerators
@needs_compilers
@pytest.mark.parametrize("head", ["logits", "linear head"])
def test_pod_sends_the_bytes_of_the_cost_model(head):
    # The row m = 8 of the cost model in docs/scaling.md.
    row = compile_for_pod(f"{head}, class parallel")
    megabytes = Counter()
    for x in row["sent"]:
        is_score = x["name"] == "all-reduce" and x["devices"] == 8
        megabytes["scores" if is_score else x["name"]] += x["bytes"] / 1e6
    assert {x["devices"] for x in row["sent"]} <= {8, 128, 1024}
    features = megabytes["all-gather"] + megabytes["reduce-scatter"]
    np.testing.assert_allclose(features, 469.8, rtol=0.01)
    np.testing.assert_allclose(megabytes["scores"], 0.7, atol=0.05)
    np.testing.assert_allclose(megabytes["all-reduce"], 532.7, rtol=0.01)
    assert row["loss_sent_bytes"] > 0.99 * row["sent_bytes"]


@pytest.mark.accelerators
@needs_compilers
def test_linear_head_on_a_pod_sends_the_kernel_gradient_once():
    row = compile_for_pod("linear head, data parallel")
    large = [x for x in row["sent"] if x["bytes"] > 1e6]
    assert [(x["name"], x["devices"]) for x in large] == [("all-reduce", 1024)]
    np.testing.assert_allclose(row["sent_bytes"] / 1e6, 4290.8, rtol=0.001)
    logits_bytes = 4096 * 2**18 * 2  # on one device, bfloat16
    assert row["temporaries"] < 0.1 * logits_bytes


# ---------------------------------------------------------------- HLO parser

HLO = """HloModule m

%body.1 (p.1: (s32[], f32[8,128], f32[4,8,128])) -> (s32[], f32[8,128], f32[4,8,128]) {
  %p.1 = (s32[], f32[8,128]{1,0}, f32[4,8,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%p.1), index=1
  %all = f32[4,8,128]{2,1,0} get-tuple-element(%p.1), index=2
  %f = f32[8,128]{1,0} fusion(%x, %all, %i), calls=%one, config={"estimated_cycles":"7"}
  ROOT %t = (s32[], f32[8,128]{1,0}, f32[4,8,128]{2,1,0}) tuple(%i, %f, %all)
}

%one (a: f32[8,128], b: f32[4,8,128], c: s32[]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %b = f32[4,8,128]{2,1,0} parameter(1)
  %c = s32[] parameter(2)
  %s = f32[1,8,128]{2,1,0} dynamic-slice(%b, %c), dynamic_slice_sizes={1,8,128}
  %r = f32[8,128]{1,0} bitcast(%s)
  ROOT %o = f32[8,128]{1,0} add(%a, %r)
}

%until (p.2: (s32[], f32[8,128], f32[4,8,128])) -> pred[] {
  %p.2 = (s32[], f32[8,128]{1,0}, f32[4,8,128]{2,1,0}) parameter(0)
  %n = s32[] constant(4)
  %j = s32[] get-tuple-element(%p.2), index=0
  ROOT %less = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (z: f32[8,128], w: f32[4,8,128]) -> bf16[8,128] {
  %z = f32[8,128]{1,0} parameter(0)
  %w = f32[4,8,128]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %kept = f32[8,128]{1,0:T(8,128)S(1)} copy(%z)
  %start = (s32[], f32[8,128]{1,0}, /*index=2*/f32[4,8,128]{2,1,0}) tuple(%zero, %z, %w)
  %loop = (s32[], f32[8,128], f32[4,8,128]) while(%start), condition=%until, body=%body.1TRIPS
  %y = f32[8,128]{1,0} get-tuple-element(%loop), index=1
  %cs = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%z)
  %cd = f32[8,128]{1,0:S(1)} copy-done(%cs)
  %ss = ((f32[4,8,128]{2,1,0}), f32[1,8,128]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%w)
  ROOT %e = bf16[8,128]{1,0} convert(%y)
}
"""
ARRAY = 8 * 128 * 4  # bytes of f32[8,128]


@pytest.mark.parametrize(
    "trip_count",
    ["", ', backend_config={"known_trip_count":{"n":"4"},"x":1}'],
    ids=["from the condition", "annotated"],
)
def test_kernels_of_loops_and_slices(trip_count):
    found = compilers.kernels(HLO.replace("TRIPS", trip_count))
    copy, fusion, copy_start, slice_start, convert = found
    assert (copy.read, copy.written) == (ARRAY, 0)  # the copy is in on-chip memory
    assert (fusion.runs, fusion.read, fusion.written) == (4, 2 * ARRAY + 4, ARRAY)
    assert (fusion.cycles, fusion.bytes) == (28, 4 * (3 * ARRAY + 4))
    assert (copy_start.read, copy_start.written) == (ARRAY, 0)
    assert (slice_start.read, slice_start.written) == (ARRAY, 0)
    assert (convert.read, convert.written) == (ARRAY, ARRAY // 2)


@pytest.mark.parametrize(
    ("type_", "expected"),
    [
        ("f32[]", 4),
        ("pred[3,5]{1,0}", 15),
        ("(bf16[4,2]{1,0}, s8[3], u4[8])", 16 + 3 + 4),
        ("f8e4m3fn[10]", 10),
        ("c64[2]", 16),
        ("f32[16,8]{1,0:T(8,128)S(1)}", 0),
    ],
)
def test_bytes_of_a_type(type_, expected):
    assert compilers.size(type_) == expected


COLLECTIVES = """HloModule m

ENTRY %main (z: f32[8,128], w: f32[4,8,128]) -> (f32[8,128], f32[4,8,128]) {
  %z = f32[8,128]{1,0} parameter(0), metadata={op_name="z"}
  %w = f32[4,8,128]{2,1,0} parameter(1), metadata={op_name="jvp(focal_loss)/w"}
  %n = f32[8,128]{1,0} negate(%z)
  %a = (f32[8,128]{1,0}, f32[4,8,128]{2,1,0}) all-reduce(%n, %w), replica_groups=GROUPS, to=%add
  %x = f32[8,128]{1,0} get-tuple-element(%a), index=0
  %y = f32[4,8,128]{2,1,0} get-tuple-element(%a), index=1
  ROOT %t = (f32[8,128]{1,0}, f32[4,8,128]{2,1,0}) tuple(%x, %y)
}
"""


@pytest.mark.parametrize(
    "groups",
    [
        "{{0,1,2,3},{4,5,6,7}}",
        "[2,4]<=[8]",
        "mesh['axis_0'=2,'axis_1'=4] {'axis_1'}",
        "mesh['a'=2,'b'=2,'c'=2] {'a','c'}",
    ],
)
def test_arrays_of_a_combined_collective_are_separate(groups):
    first, second = compilers.sent(COLLECTIVES.replace("GROUPS", groups))
    assert first == ("all-reduce", 4, 2 * 3 / 4 * ARRAY, "z")
    assert second == ("all-reduce", 4, 2 * 3 / 4 * 4 * ARRAY, "jvp(focal_loss)/w")


# ---------------------------------------------------------------- benchmark


def test_unknown_device_is_reported_and_results_are_written(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "benchmarks.accelerators", "--devices", "X9", "--out", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=300,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    (line,) = results["missing"]
    assert line.startswith("X9: got no device of that name, wanted one of")
    assert line in (tmp_path / "results.md").read_text()


def test_every_loss_of_the_catalogue_has_limits():
    limited = {
        (WORKLOADS | FAMILY)[limits.workload].loss
        for limits in LIMITS
        if limits.workload in WORKLOADS | FAMILY
    }
    linear = {loss.name for loss in LOSSES.values() if loss.kind == "linear"}
    assert limited | linear == set(LOSSES)


def test_minimum_bytes_count_reads_and_writes():
    logits = 400_000 * 21 * 2
    assert find_case("anchors", "bfloat16").minimum_bytes == 3 * logits + 400_000 * 4
    assert find_case("soft", "bfloat16").minimum_bytes == 6 * logits
    logits = 4 * 21 * 256 * 256 * 2
    assert find_case("focal-tversky-loss", "bfloat16").minimum_bytes == 8 * logits
    logits = 400_000 * 20 * 2
    assert find_case("sigmoid", "bfloat16").minimum_bytes == 3 * logits
    narrow = find_case("sigmoid, int8 labels", "bfloat16")
    assert narrow.minimum_bytes == 2 * logits + logits // 2


@pytest.mark.quick
def test_plain_formulas_equal_the_losses():
    for name in ("sigmoid", "anchors", "soft"):
        workload = WORKLOADS[name].quick()
        found = accelerators.losses(workload)
        args = workload.inputs("float32")
        got = jnp.sum(found[FOCAL_JAX](*args))
        plain = [jnp.sum(loss(*args)) for label, loss in found.items() if is_plain(label)]
        assert len(plain) > 1
        assert all(abs(got - want) < 1e-4 * abs(got) for want in plain)
    assert focal_jax.detection.IGNORED == -2
