"""The README: short, true, and its examples run in order, as one program."""

import re
from pathlib import Path

import pytest
from pages import code_blocks, run

import focal_jax
from focal_jax import _catalogue

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"
TEXT = README.read_text(encoding="utf-8")


def test_code_runs():
    assert len(code_blocks(TEXT)) >= 2
    names = run(README)
    assert names["loss"] > 0
    assert names["value"] > 0


def test_it_is_short():
    words = [word for word in TEXT.split() if re.search(r"\w", word)]
    assert len(words) <= 700
    assert len(re.findall(r"!\[", TEXT)) == 1


def test_every_loss_of_the_catalogue_is_in_the_table():
    section = TEXT.partition("\n## The losses\n")[2].partition("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("| `")]
    named = {name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert named - {"reduce_loss"} == {loss.name for loss in _catalogue.LOSSES}


@pytest.mark.parametrize("gamma", [2.0, 0.5])
def test_the_digits(gamma):
    rows = [line for line in TEXT.splitlines() if line.startswith(f"| {gamma:g} |")]
    assert len(rows) == 2
    assert all(row in (DOCS / "numerics.md").read_text(encoding="utf-8") for row in rows)
    found = focal_jax.compare_gradients(gamma=gamma, repeats=1)
    for row in rows:
        _, _, logits, ours, theirs, _ = (cell.strip() for cell in row.split("|"))
        regime = logits.partition(",")[0]
        custom, autodiff = getattr(found.custom, regime), getattr(found.autodiff, regime)
        assert 1 / 3 < custom.relative / float(ours) < 3
        assert custom.nans == 0
        if "NaN" in theirs:
            assert theirs == f"{autodiff.nans:,} of 8,190 are NaN"
        else:
            assert 1 / 3 < autodiff.relative / float(theirs.partition(":")[0]) < 3


def test_the_speeds_are_those_of_the_performance_page():
    def rows(text):
        table = text.partition("<!-- speed:")[2].partition("<!-- end of speed -->")[0]
        lines = re.findall(r"^\|(.*)\|$", table, re.MULTILINE)
        cells = [[cell.strip() for cell in line.split("|")] for line in lines]
        return {row[0]: (row[1], row[2], row[-1]) for row in cells if not row[0].startswith("-")}

    every = rows((DOCS / "performance.md").read_text(encoding="utf-8"))
    shown = rows(TEXT)
    assert len(shown) >= 3
    assert shown.items() <= every.items()
