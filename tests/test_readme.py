"""The README: short, true, and its examples run in order, as one program."""

import re
from pathlib import Path

from pages import code_blocks, run

from focal_jax import _catalogue

README = Path(__file__).parents[1] / "README.md"
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


def test_the_speeds_are_those_of_the_performance_page():
    def rows(text):
        table = text.partition("<!-- speed:")[2].partition("<!-- end of speed -->")[0]
        lines = re.findall(r"^\|(.*)\|$", table, re.MULTILINE)
        cells = [[cell.strip() for cell in line.split("|")] for line in lines]
        return {row[0]: (row[1], row[2], row[-1]) for row in cells if not row[0].startswith("-")}

    every = rows((README.parent / "docs" / "performance.md").read_text(encoding="utf-8"))
    shown = rows(TEXT)
    assert len(shown) >= 3
    assert shown.items() <= every.items()
