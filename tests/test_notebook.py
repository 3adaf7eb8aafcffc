"""The quickstart notebook: its saved outputs are the outputs of its cells."""

import ast
import json
import re
from pathlib import Path

import jax
import matplotlib
import matplotlib.pyplot as plt
import pytest
from pages import jax_defaults

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def _text(output):
    data = output.get("data", {})
    return "".join(output.get("text", data.get("text/plain", [])))


def test_saved_outputs_are_complete():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    kinds = [output["output_type"] for cell in CODE for output in cell["outputs"]]
    assert "error" not in kinds
    types = {kind for cell in CODE for o in cell["outputs"] for kind in o.get("data", {})}
    assert {"text/html", "image/png"} <= types
    assert NOTEBOOK.stat().st_size < 500_000
    assert str(Path.home()) not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_cells_reproduce_the_saved_outputs(capsys, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    matplotlib.use("agg")
    names = {}
    with jax_defaults():
        for cell in CODE:
            tree = ast.parse(re.sub(r"^%.*$", "", "".join(cell["source"]), flags=re.MULTILINE))
            # A notebook shows the value of the last expression of a cell.
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, str(NOTEBOOK), "exec"), names)
            value = None
            if last is not None:
                value = eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)
            printed = capsys.readouterr().out
            for output in cell["outputs"]:
                if output["output_type"] == "stream":
                    saved, got = _text(output), printed
                elif isinstance(value, jax.Array):
                    saved, got = _text(output), repr(value)
                elif "text/html" in output.get("data", {}):
                    saved, got = "<table>", value._repr_html_()
                else:
                    continue
                # Times differ, and the last digits may differ.
                digits = re.compile(r"\d+\.?\d*(e-?\d+)?")
                assert digits.sub("#", saved) in digits.sub("#", got)
    assert names["report"].focal_jax.saturated.relative < 1e-5
