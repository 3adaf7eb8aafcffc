"""What the package promises to everyone who imports it."""

import ast
import graphlib
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import focal_jax
from focal_jax._catalogue import LOSSES

ROOT = Path(focal_jax.__file__).parent
FUNCTIONS = [loss.name for loss in LOSSES] + ["reduce_loss"]
SECTIONS = ["Args:", "Returns:", "Raises:", "Differentiation:", "Example:", "References:"]


def _name(path):
    """Return the name of a module within the package, "" for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix("__init__").removesuffix(".")


MODULES = {_name(path): path for path in ROOT.rglob("*.py")}


def _imports(path):
    """Return the package's own modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "focal_jax":
            parts = node.module.split(".")[1:]
            of_package = [".".join([*parts, alias.name]) for alias in node.names]
            found |= {name if name in MODULES else ".".join(parts) for name in of_package}
        if isinstance(node, ast.Import):
            found |= {
                a.name.partition(".")[2] for a in node.names if a.name.startswith("focal_jax")
            }
    return found


GRAPH = {name: _imports(path) for name, path in MODULES.items()}


def test_imports_never_turn_back():
    tuple(graphlib.TopologicalSorter(GRAPH).static_order())  # raises for a cycle


def _below(module):
    """Return all that a module imports, and what that imports."""
    found, new = set(), {module}
    while new:
        new = set().union(*(GRAPH.get(name, set()) for name in new)) - found
        found |= new
    return found


# Other members of the family may stand on one of these, and these on none.
HEADS = {"_sigmoid", "_softmax_soft", "_softmax_integer", "_linear"}


def test_the_heads_do_not_import_each_other():
    assert set(GRAPH) > HEADS
    for head in HEADS:
        assert not _below(head) & HEADS, head


def test_the_reference_shares_nothing_but_the_checks():
    assert _imports(ROOT / "reference.py") == {"_checks"}


def test_importing_is_light():
    code = (
        "import sys, focal_jax\n"
        "heavy = ('flax', 'optax', 'google.protobuf', 'matplotlib', 'rich', 'sklearn')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert out.stdout.strip() == "[]"


def _signature(function):
    return {name: (p.kind, p.default) for name, p in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_reference_has_the_same_signatures(name):
    ours, reference = getattr(focal_jax, name), getattr(focal_jax.reference, name)
    assert _signature(ours) == _signature(reference)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_the_catalogue_says_what_the_signature_says(loss):
    signature = _signature(getattr(focal_jax, loss.name))
    assert "where" in signature
    for name, option in loss.options.items():
        assert signature[name] == (inspect.Parameter.KEYWORD_ONLY, option.default)
    # No option that the catalogue does not know, and none that is not there.
    known = {"where", "axis", "axis_name", "bias", "ignore_label", "class_axis_name", "chunk_size"}
    known |= {"label_smoothing", "logit_softcap", "return_logsumexp"}  # of the heads, not a loss's
    options = {
        name for name, (kind, _) in signature.items() if kind == inspect.Parameter.KEYWORD_ONLY
    }
    assert options - known == {*loss.options, *loss.masks, *loss.flags}
    assert loss.name in focal_jax.reference.FORMULAS


def test_the_catalogue_imports_nothing_of_the_package():
    assert _imports(ROOT / "_catalogue.py") == set()


def test_the_signature_is_optax_s():
    optax = importlib.import_module("optax")
    theirs = _signature(optax.losses.sigmoid_focal_loss)
    ours = _signature(focal_jax.sigmoid_focal_loss)
    assert {name: ours[name] for name in theirs} == theirs


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_have_every_section_in_order(name):
    text = inspect.getdoc(getattr(focal_jax, name))
    at = [text.find(section) for section in SECTIONS]
    assert -1 not in at, SECTIONS[at.index(-1)]
    assert at == sorted(at)


def test_every_module_imports_and_has_a_docstring():
    for module in pkgutil.walk_packages([str(ROOT)], "focal_jax."):
        if not module.name.endswith("__main__"):
            assert importlib.import_module(module.name).__doc__, module.name
