"""The scaling guide's code runs, gives the numbers of one device, and crosses what it says."""

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

GUIDE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
SETUP, *_ = code_blocks(GUIDE)
SECTIONS = dict(re.findall(r"^## (.*)\n((?s:.*?))(?=^## |\Z)", GUIDE, re.MULTILINE))
LAYOUTS = re.findall(r"^\| \[(.*)\]\(#(.*)\) \| .* \| (.*) \|$", GUIDE, re.MULTILINE)
VOLUMES = re.findall(r"^\| (\d+) \|(.*)\|$", GUIDE, re.MULTILINE)
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def collectives(compiled):
    """Return the numbers in the results of each kind of collective, and how many there are."""
    text = compiled.as_text()
    computations = dict(re.findall(r"^(?:ENTRY )?%(\S+) .*\{\n((?s:.*?))^\}", text, re.MULTILINE))
    (entry,) = re.findall(r"^ENTRY %(\S+)", text, re.MULTILINE)

    def count(name, times):
        for line in computations[name].splitlines():
            if found := re.search(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", line):
                shapes = re.findall(r"\w+\[([\d,]*)\]", found[1])
                sizes = [np.prod([int(n) for n in shape.split(",") if n]) for shape in shapes]
                numbers[found[2]] += times * int(sum(sizes))
                messages[found[2]] += times
            if found := re.search(r" while\(.*body=%([^,\s]+).*known_trip_count\D*(\d+)", line):
                count(found[1], times * int(found[2]))
            elif found := re.search(r" (?:call|conditional)\(", line):
                for called in re.findall(r"(?:to_apply|\w+_computation)=%([^,\s]+)", line):
                    count(called, times)

    numbers, messages = Counter(), Counter()
    count(entry, 1)
    return numbers, messages


@pytest.fixture(scope="module")
def guide():
    """Return what the guide's code defines, each layout's results, and those of one device."""
    names = {}
    exec(SETUP, names)
    layouts = {}
    for title, _, _ in LAYOUTS:
        for block in code_blocks(SECTIONS[title]):
            exec(block, names)
        compiled = names["step"].lower(*names["args"]).compile()
        layouts[title] = names["value"], names["gradient"], collectives(compiled)[0]
    for block in code_blocks(SECTIONS["On paper"]):
        exec(block, names)
    args = names["kernel"], names["features"], names["labels"]
    return names, layouts, jax.jit(jax.value_and_grad(names["loss"], (0, 1)))(*args)


def test_the_table_leads_to_every_section():
    titles = [title for title, _, _ in LAYOUTS]
    assert [*titles, "On paper", "Compiled for a pod"] == list(SECTIONS)
    for title, anchor, _ in LAYOUTS:
        assert anchor == title.lower().replace(" ", "-")


@pytest.mark.parametrize(("title", "_", "crossing"), LAYOUTS, ids=[row[0] for row in LAYOUTS])
def test_layout(guide, title, _, crossing):
    names, layouts, (want, (by_kernel, _)) = guide
    value, gradient, found = layouts[title]
    assert_close((value, gradient), (want, by_kernel), 1e-5)
    stated = re.findall(rf"({COLLECTIVES}) `(.*?)`", crossing)
    assert {kind: eval(size, names) for kind, size in stated} == found


def _linear(kernel, features, labels):
    losses = focal_jax.linear_softmax_focal_loss_with_integer_labels(
        features, kernel, labels, ignore_label=-1
    )
    return focal_jax.reduce_loss(losses, where=labels != -1)


def _under_jit(guide, loss, classes, *specs):
    names, _, _ = guide
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    args = jnp.ones((names["D"], classes)), names["features"], names["labels"]
    placed = jax.device_put(args, tuple(NamedSharding(mesh, spec) for spec in specs))
    return collectives(jax.jit(jax.value_and_grad(loss)).lower(*placed).compile())


def test_jit_sums_the_linear_heads_gradient_chunk_by_chunk(guide):
    numbers, messages = _under_jit(guide, _linear, 640, P(), P("data"), P("data"))
    assert messages == {"all-reduce": 40 + 2}
    assert numbers == {"all-reduce": guide[0]["D"] * 640 + 2}


def test_jit_gathers_the_linear_heads_kernel(guide):
    _, messages = _under_jit(guide, _linear, 640, P(None, "model"), P("data"), P("data"))
    assert messages["all-gather"]


def test_jit_with_the_classes_sharded(guide):
    names, _, _ = guide
    loss, N, D, C = (names[name] for name in ("loss", "N", "D", "C"))
    numbers, _ = _under_jit(guide, loss, C, P(None, "model"), P("data"), P("data"))
    assert numbers == {"all-reduce": D * C // 4 + 3 * N // 2 + 2}
    numbers, _ = _under_jit(guide, loss, C, P(None, "model"), P(("data", "model")), P("data"))
    assert numbers["all-gather"] == D * C


def test_class_parallel_gives_the_features_their_gradient(guide):
    names, _, (_, (_, by_features)) = guide
    assert_close(names["onward"], by_features, 1e-5)


# --------------------------------------------------------------------------------- on paper


def test_the_formula_counts_what_xla_compiled(guide):
    names, layouts, _ = guide
    N, D, C, d, m = (names[name] for name in ("N", "D", "C", "d", "m"))
    _, _, found = layouts["Class parallel"]
    # A ring passes all but one of the parts of a result, and of what is scattered.
    gathered = (m - 1) / m * found["all-gather"]
    scattered = (m - 1) * found["reduce-scatter"]
    scores = 2 * (m - 1) / m * (found["all-reduce"] - D * C / m - 2)
    gradient = 2 * (d - 1) / d * D * C / m
    got = names["sent"](m, devices=d * m, tokens=N // (d * m), C=C, D=D, width=4)
    want = np.array([gathered + scattered, scores, gradient]) * 4 / 1e6
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_the_table_on_paper(guide):
    sent = guide[0]["sent"]
    totals = {}
    for m, cells in VOLUMES:
        parts = sent(int(m))
        totals[int(m)] = sum(parts)
        stated = [float(cell.replace(",", "")) for cell in cells.split("|")]
        np.testing.assert_allclose(stated, [*parts, sum(parts)], atol=0.05, rtol=0)
    assert min(totals, key=totals.get) == (2**18 / 4096) ** 0.5
    assert f"each device sends {totals[1] / 1e3:.1f} GB" in GUIDE
    assert f"Eight slices make it {totals[8] / 1e3:.1f} GB" in GUIDE
    logits = 7 / 8 * (8 * 4096) * 2**18 * 2
    assert f"would send {logits / 1e9:.0f} GB at `m` = 8" in GUIDE
