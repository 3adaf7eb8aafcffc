"""What a reader, a completer and a type checker see of the package."""

import importlib
import inspect
import json
import pkgutil
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import focal_jax
from focal_jax import compat

ROOT = Path(focal_jax.__file__).parents[1]
PUBLIC = [
    module.name
    for module in pkgutil.walk_packages(focal_jax.__path__, "focal_jax.")
    if "._" not in module.name
]


@pytest.mark.parametrize("package", [focal_jax, compat])
def test_a_package_shows_its_public_names_and_nothing_else(package):
    assert dir(package) == sorted(package.__all__)
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="tensorflow"):
        _ = package.tensorflow


@pytest.mark.parametrize("name", ["focal_jax", *PUBLIC])
def test_every_public_module_says_what_is_public(name):
    module = importlib.import_module(name)
    assert len(module.__all__) == len(set(module.__all__))
    for public in module.__all__:
        assert not public.startswith("_")
        assert inspect.getdoc(getattr(module, public)) or public.isupper()
    # What has an example in its docstring is there for users; the rest is for other rooms.
    shown = {
        public
        for public, x in vars(module).items()
        if getattr(x, "__module__", None) == name and "Example:" in (inspect.getdoc(x) or "")
    }
    assert shown <= set(module.__all__)


def test_a_star_brings_the_public_names():
    names = {}
    exec("from focal_jax import *", names)
    assert names.keys() - {"__builtins__"} == set(focal_jax.__all__)


def test_help_describes_the_losses():
    text = pydoc.plaintext.document(focal_jax)
    functions = text[text.index("\nFUNCTIONS\n") :]
    described = re.findall(r"^    (\w+)\(", functions, re.MULTILINE)
    public = {name: getattr(focal_jax, name) for name in focal_jax.__all__}
    assert described == [name for name, x in public.items() if inspect.isfunction(x)]


TYPES = {
    "focal_jax.nnx.SoftmaxFocalLoss(gamma=1.0)": "SoftmaxFocalLoss",
    "focal_jax.nnx.Reduced('sigmoid_focal_loss', gamma=1.0)(1.0, 1.0)": "Array",
    "focal_jax.linen.SigmoidFocalLoss(alpha=0.25)": "SigmoidFocalLoss",
    "focal_jax.linen.Reduced('sigmoid_focal_loss', alpha=0.25)": "Reduced",
    "focal_jax.training.positive_count_ema()": "PositiveCountEma",
    "focal_jax.compat.caffe.FocalLossLayer.from_prototxt('')": "FocalLossLayer",
    "focal_jax.reduce_loss(1.0, normalization='mean')": "Array",
    "focal_jax.softmax_focal_loss_with_integer_labels(1.0, 1)": "Array",
}


def test_a_type_checker_sees_the_real_types(tmp_path):
    pytest.importorskip("pyright")
    script = tmp_path / "script.py"
    lines = ["import focal_jax", *(f"reveal_type({call})" for call in TYPES), "focal_jax.nothing"]
    script.write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", script],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
    )
    if not done.stdout.startswith("{"):
        pytest.skip(f"pyright does not run here: {done.stderr[-200:]}")
    said = json.loads(done.stdout)["generalDiagnostics"]
    shown = [x["message"] for x in said if x["severity"] == "information"]
    assert [re.search(r'is "(\w+)"$', message)[1] for message in shown] == [*TYPES.values()]
    (error,) = (x["message"] for x in said if x["severity"] == "error")
    assert '"nothing" is not a known attribute of module "focal_jax"' in error
