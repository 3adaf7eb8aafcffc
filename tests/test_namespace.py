"""Tests of the public names as `dir`, `help`, star imports and type checkers show them."""

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
# The documented modules. All other modules are private.
PUBLIC = [
    "focal_jax",
    *(
        f"focal_jax.{name}"
        for name in sorted(focal_jax.__all__)
        if inspect.ismodule(getattr(focal_jax, name))
    ),
    *(f"focal_jax.compat.{name}" for name in compat.__all__),
]


@pytest.mark.parametrize("package", [focal_jax, compat])
def test_dir_lists_exactly_the_public_names(package):
    assert dir(package) == sorted(package.__all__)  # `dir` sorts
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="tensorflow"):
        _ = package.tensorflow


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_unique_and_documented(name):
    module = importlib.import_module(name)
    assert len(module.__all__) == len(set(module.__all__))
    for public in module.__all__:
        assert not public.startswith("_")
        x = getattr(module, public)
        is_constant = not (inspect.isfunction(x) or inspect.isclass(x) or inspect.ismodule(x))
        assert is_constant or inspect.getdoc(x), public


def test_everything_with_an_example_is_public():
    public = [
        getattr(module, name)
        for module in map(importlib.import_module, PUBLIC)
        for name in module.__all__
    ]
    for info in pkgutil.walk_packages(focal_jax.__path__, "focal_jax."):
        if info.name.endswith("__main__"):
            continue
        for name, x in vars(importlib.import_module(info.name)).items():
            if getattr(x, "__module__", None) == info.name and inspect.getdoc(x):
                has_example = "\nExample:" in inspect.getdoc(x)
                assert not has_example or any(x is each for each in public), f"{info.name}.{name}"


def test_star_import_brings_exactly_the_public_names():
    names = {}
    exec("from focal_jax import *", names)
    assert names.keys() - {"__builtins__"} == set(focal_jax.__all__)


def test_help_describes_every_public_function():
    text = pydoc.plaintext.document(focal_jax)
    functions = text[text.index("\nFUNCTIONS\n") :]
    described = re.findall(r"^    (\w+)\(", functions, re.MULTILINE)
    public = {name: getattr(focal_jax, name) for name in focal_jax.__all__}
    assert described == sorted(name for name, x in public.items() if inspect.isfunction(x))


# Expressions, and the types that pyright infers.
TYPES = {
    "focal_jax.nnx.SoftmaxFocalLoss(gamma=1.0)": "SoftmaxFocalLoss",
    "focal_jax.nnx.Reduced('sigmoid_focal_loss', gamma=1.0)(1.0, 1.0)": "Array",
    "focal_jax.linen.SigmoidFocalLoss(alpha=0.25)": "SigmoidFocalLoss",
    "focal_jax.linen.Reduced('sigmoid_focal_loss', alpha=0.25)": "Reduced",
    "focal_jax.training.positive_count_ema()": "PositiveCountEma",
    "focal_jax.compat.caffe.FocalLossLayer.from_prototxt('')": "FocalLossLayer",
    "focal_jax.reduce_loss(1.0, normalization='mean')": "Array",
    "focal_jax.sigmoid_focal_loss(1.0, 1)": "Array",
    "focal_jax.linear_sigmoid_focal_loss(1.0, 1.0, 1)": "Array",
    "focal_jax.linear_token_statistics(1.0, 1.0, 1)": "TokenStatistics",
    # An array, or with return_logsumexp a pair.
    "focal_jax.softmax_focal_loss_with_integer_labels(1.0, 1)": "Any",
    "focal_jax.InputError('')": "InputError",
}


def test_pyright_infers_the_types_of_public_names(tmp_path):
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
        pytest.skip(f"pyright does not run on this machine: {done.stderr[-200:]}")
    diagnostics = json.loads(done.stdout)["generalDiagnostics"]
    revealed = [x["message"] for x in diagnostics if x["severity"] == "information"]
    assert [re.search(r'is "(\w+)"$', message)[1] for message in revealed] == [*TYPES.values()]
    (error,) = (x["message"] for x in diagnostics if x["severity"] == "error")
    assert '"nothing" is not a known attribute of module "focal_jax"' in error
