"""The notebook: what it shows is what its cells give, run in order in a fresh program."""

import ast
import json
import re
from pathlib import Path

import jax
import matplotlib
import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def _text(output):
    data = output.get("data", {})
    return "".join(output.get("text", data.get("text/plain", [])))


def test_the_notebook_was_saved_as_run():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    kinds = [output["output_type"] for cell in CODE for output in cell["outputs"]]
    assert "error" not in kinds
    shown = {kind for cell in CODE for o in cell["outputs"] for kind in o.get("data", {})}
    assert {"text/html", "image/png"} <= shown
    assert NOTEBOOK.stat().st_size < 500_000
    assert str(Path.home()) not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_showed(capsys, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    matplotlib.use("agg")
    names = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for cell in CODE:
            tree = ast.parse(re.sub(r"^%.*$", "", "".join(cell["source"]), flags=re.MULTILINE))
            # The value of a last expression is what a notebook shows.
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, str(NOTEBOOK), "exec"), names)
            shown = None
            if last is not None:
                shown = eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)
            printed = capsys.readouterr().out
            for output in cell["outputs"]:
                if output["output_type"] == "stream":
                    wanted, got = _text(output), printed
                elif isinstance(shown, jax.Array):
                    wanted, got = _text(output), repr(shown)
                elif "text/html" in output.get("data", {}):
                    wanted, got = "<table>", shown._repr_html_()
                else:
                    continue
                # Times differ, and so may the last digits.
                digits = re.compile(r"\d+\.?\d*(e-?\d+)?")
                assert digits.sub("#", wanted) in digits.sub("#", got)
    assert names["report"].custom.saturated.relative < 1e-5
