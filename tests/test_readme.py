"""README.md: its code runs, and its tables agree with the library and with the other pages."""

import importlib.util
import re
from pathlib import Path

import pytest
from pages import code_blocks, run

import focal_jax
from focal_jax.catalogue import LOSSES

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"
TEXT = README.read_text(encoding="utf-8")


def table_rows(text, first_header):
    """Return the rows of the tables with this first header, each as a dict by header."""
    rows, headers = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            headers = None
        elif headers is None:
            headers = cells
        elif headers[0] == first_header and not set(line) <= set("|-: "):
            rows.append(dict(zip(headers, cells)))
    return rows


# ---------------------------------------------------------------- form


def test_code_runs():
    assert len(code_blocks(TEXT)) >= 2
    names = run(README)
    assert names["loss"] > 0
    assert names["value"] > 0


def test_length():
    words = [word for word in TEXT.split() if re.search(r"\w", word)]
    assert len(words) <= 700
    assert len(re.findall(r"!\[", TEXT)) == 1


def test_demo_and_test_commands_come_first():
    assert re.findall(r"^make \w+", TEXT, re.MULTILINE) == ["make demo", "make test"]
    assert TEXT.index("make test") < TEXT.index("## ")


# ---------------------------------------------------------------- the table of losses


@pytest.fixture
def loss_table():
    """The module docs/loss_table.py."""
    spec = importlib.util.spec_from_file_location("loss_table", DOCS / "loss_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name_and_link(row):
    """Return the name of a loss and where it leads."""
    return re.fullmatch(r"\[`(\w+)`\]\((.*)\)", row["loss"]).groups()


def test_table_of_losses_is_current(loss_table):
    current = loss_table.with_table(TEXT, loss_table.source_file)
    assert current == TEXT, "run: python docs/loss_table.py --readme"
    rows = table_rows(TEXT, "loss")
    assert sorted(name_and_link(row)[0] for row in rows) == sorted(LOSSES)
    assert all((README.parent / name_and_link(row)[1]).is_file() for row in rows)


def test_script_restores_a_changed_table(loss_table, monkeypatch, tmp_path):
    copy = tmp_path / "README.md"
    before, _, after = TEXT.partition(loss_table.BEGIN)
    copy.write_text(
        f"{before}{loss_table.BEGIN}old\n{loss_table.END}{after.partition(loss_table.END)[2]}"
    )
    monkeypatch.setattr(loss_table, "README", copy)
    loss_table.main(["--readme"])
    assert copy.read_text() == TEXT


# ---------------------------------------------------------------- measurements


@pytest.mark.parametrize("gamma", [2.0, 0.5])
def test_accuracy(gamma):
    rows = [row for row in table_rows(TEXT, "gamma") if row["gamma"] == f"{gamma:g}"]
    assert len(rows) == 2
    numerics = table_rows((DOCS / "numerics.md").read_text(encoding="utf-8"), "gamma")
    cells = [list(row.values()) for row in numerics]
    assert all(list(row.values()) in cells for row in rows)
    found = focal_jax.compare_gradients(gamma=gamma, repeats=1)
    for row in rows:
        stable, plain = (
            getattr(measurement, row["logits"])
            for measurement in (found.focal_jax, found.plain_jax)
        )
        assert 1 / 3 < stable.relative / float(row["focal_jax"]) < 3
        assert f"{stable.nans:,}" == row["focal_jax NaN"] == "0"
        assert f"{plain.nans:,}" == row["plain JAX NaN"]
        if plain.nans:
            assert row["plain JAX"] == "NaN"
        else:
            assert 1 / 3 < plain.relative / float(row["plain JAX"]) < 3


def test_speed_agrees_with_the_performance_page():
    performance = (DOCS / "performance.md").read_text(encoding="utf-8")
    table = performance.partition("<!-- speed:")[2].partition("<!-- end of speed -->")[0]
    measured = {row["workload"]: row for row in table_rows(table, "workload")}
    rows = table_rows(TEXT, "workload")
    assert len(rows) >= 3
    assert all(row.items() <= measured[row["workload"]].items() for row in rows)
