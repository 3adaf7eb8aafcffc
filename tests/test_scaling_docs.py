"""Tests of docs/scaling.md: its code, the results on one device, and the stated communication."""

import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pages import code_blocks

import focal_jax

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
SETUP, *_ = code_blocks(PAGE)
SECTIONS = dict(re.findall(r"^## (.*)\n((?s:.*?))(?=^## |\Z)", PAGE, re.MULTILINE))
# The rows of the table of layouts: title, anchor, sizes of the three collectives.
LAYOUTS = re.findall(
    r"^\| \[(.*)\]\(#(.*)\) \| .* \| `(.*)` \| `(.*)` \| `(.*)` \|$", PAGE, re.MULTILINE
)
COST_ROWS = re.findall(r"^\| (\d+) \|(.*)\|$", SECTIONS["Cost model"], re.MULTILINE)
COLLECTIVES = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"


def collectives(compiled):
    """Count the collectives of a compiled program.

    Returns the numbers in the results of each kind of collective, and the number of messages of
    each kind. The body of a loop counts once per iteration.
    """
    text = compiled.as_text()
    computations = dict(re.findall(r"^(?:ENTRY )?%(\S+) .*\{\n((?s:.*?))^\}", text, re.MULTILINE))
    (entry,) = re.findall(r"^ENTRY %(\S+)", text, re.MULTILINE)
    numbers, messages = Counter(), Counter()

    def count(name, times):
        for line in computations[name].splitlines():
            if found := re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line):
                shapes = re.findall(r"\w+\[([\d,]*)\]", found[1])
                sizes = [np.prod([int(n) for n in shape.split(",") if n]) for shape in shapes]
                numbers[found[2]] += times * int(sum(sizes))
                messages[found[2]] += times
            if found := re.search(r" while\(.*body=%([^,\s]+).*known_trip_count\D*(\d+)", line):
                count(found[1], times * int(found[2]))
            elif found := re.search(r" (?:call|conditional)\(", line):
                for called in re.findall(r"(?:to_apply|\w+_computation)=%([^,\s]+)", line):
                    count(called, times)

    count(entry, 1)
    return numbers, messages


@pytest.fixture(scope="module")
def guide():
    """Run the page.

    Returns the names that its code defines; for each layout the value, the gradient and the
    numbers in its collectives; and the value and gradients on one device.
    """
    names = {}
    exec(SETUP, names)
    layouts = {}
    for title, *_ in LAYOUTS:
        for block in code_blocks(SECTIONS[title]):
            exec(block, names)
        compiled = names["step"].lower(*names["args"]).compile()
        layouts[title] = names["value"], names["gradient"], collectives(compiled)[0]
    for block in code_blocks(SECTIONS["Cost model"]):
        exec(block, names)
    args = names["kernel"], names["features"], names["labels"]
    return names, layouts, jax.jit(jax.value_and_grad(names["loss"], (0, 1)))(*args)


def test_table_of_layouts_links_to_every_section():
    titles = [title for title, *_ in LAYOUTS]
    assert [*titles, "Cost model", "Compiler estimates for a TPU pod"] == list(SECTIONS)
    for title, anchor, *_ in LAYOUTS:
        assert anchor == title.lower().replace(" ", "-")


@pytest.mark.parametrize(
    ("title", "sizes"), [(row[0], row[2:]) for row in LAYOUTS], ids=[row[0] for row in LAYOUTS]
)
def test_layout_equals_one_device_and_has_the_stated_collectives(guide, title, sizes):
    names, layouts, (want, (kernel_gradient, _)) = guide
    value, gradient, found = layouts[title]
    assert_close((value, gradient), (want, kernel_gradient), 1e-5)
    stated = {kind: eval(size, names) for kind, size in zip(COLLECTIVES, sizes)}
    assert {kind: size for kind, size in stated.items() if size} == found


# ---------------------------------------------------------------- sharding under jit alone


def _linear_head(kernel, features, labels):
    losses = focal_jax.linear_softmax_focal_loss_with_integer_labels(
        features, kernel, labels, ignore_label=-1
    )
    return focal_jax.reduce_loss(losses, where=labels != -1)


def _collectives_under_jit(guide, loss, num_classes, *specs):
    names, _, _ = guide
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    args = jnp.ones((names["D"], num_classes)), names["features"], names["labels"]
    placed = jax.device_put(args, tuple(NamedSharding(mesh, spec) for spec in specs))
    return collectives(jax.jit(jax.value_and_grad(loss)).lower(*placed).compile())


def test_linear_head_under_jit_sums_the_kernel_gradient_in_every_chunk(guide):
    specs = P(), P("data"), P("data")
    numbers, messages = _collectives_under_jit(guide, _linear_head, 640, *specs)
    assert messages == {"all-reduce": 40 + 2}
    assert numbers == {"all-reduce": guide[0]["D"] * 640 + 2}


def test_linear_head_under_jit_gathers_a_class_sharded_kernel(guide):
    specs = P(None, "model"), P("data"), P("data")
    _, messages = _collectives_under_jit(guide, _linear_head, 640, *specs)
    assert messages["all-gather"]


def test_class_sharded_logits_under_jit(guide):
    names, _, _ = guide
    loss, N, D, C = (names[name] for name in ("loss", "N", "D", "C"))
    specs = P(None, "model"), P("data"), P("data")
    numbers, _ = _collectives_under_jit(guide, loss, C, *specs)
    assert numbers == {"all-reduce": D * C // 4 + 3 * N // 2 + 2}
    specs = P(None, "model"), P(("data", "model")), P("data")
    numbers, _ = _collectives_under_jit(guide, loss, C, *specs)
    assert numbers["all-gather"] == D * C


def test_class_parallelism_returns_the_gradient_of_the_features(guide):
    names, _, (_, (_, features_gradient)) = guide
    assert_close(names["features_gradient"], features_gradient, 1e-5)


# ---------------------------------------------------------------- cost model


def test_cost_model_agrees_with_the_compiled_program(guide):
    names, layouts, _ = guide
    N, D, C, d, m = (names[name] for name in ("N", "D", "C", "d", "m"))
    _, _, found = layouts["Class parallelism"]
    # Each device of a ring sends all parts of the result but one.
    gathered = (m - 1) / m * found["all-gather"]
    scattered = (m - 1) * found["reduce-scatter"]
    scores = 2 * (m - 1) / m * (found["all-reduce"] - D * C / m - 2)
    gradient = 2 * (d - 1) / d * D * C / m
    got = names["megabytes_sent"](m, devices=d * m, tokens=N // (d * m), C=C, D=D, width=4)
    want = np.array([gathered + scattered, scores, gradient]) * 4 / 1e6
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_cost_table(guide):
    totals = {}
    for m, cells in ((int(m), cells) for m, cells in COST_ROWS):
        parts = guide[0]["megabytes_sent"](m)
        totals[m] = sum(parts)
        gathered_logits = (m - 1) / m * (m * 4096) * 2**18 * 2 / 1e6
        stated = [float(cell.replace(",", "")) for cell in cells.split("|")]
        want = [*parts, totals[m], gathered_logits]
        np.testing.assert_allclose(stated, want, atol=0.05, rtol=0)
    assert min(totals, key=totals.get) == (2**18 / 4096) ** 0.5
