"""Tests of the package: imports between modules, import cost, size, signatures and docstrings."""

import ast
import graphlib
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import focal_jax
from focal_jax.catalogue import LOSSES

ROOT = Path(focal_jax.__file__).parent
FUNCTIONS = [*LOSSES, "reduce_loss"]
# Functions that the catalogue and the reference do not contain.
MORE_FUNCTIONS = [
    "linear_asymmetric_loss",
    "linear_sigmoid_focal_loss",
    "linear_softmax_focal_loss_with_sparse_labels",
    "linear_token_statistics",
    "softmax_focal_loss_with_sparse_labels",
    "token_statistics",
]


def _module_name(path):
    """Return the name of a module within the package, "" for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix("__init__").removesuffix(".")


MODULES = {_module_name(path): path for path in ROOT.rglob("*.py")}
LINES = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}


# ---------------------------------------------------------------- imports between modules


def _imports(path):
    """Return the modules of the package that a file imports, also inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "focal_jax":
            parts = node.module.split(".")[1:]
            names = [".".join([*parts, alias.name]) for alias in node.names]
            found |= {name if name in MODULES else ".".join(parts) for name in names}
        if isinstance(node, ast.Import):
            found |= {
                alias.name.partition(".")[2]
                for alias in node.names
                if alias.name.split(".")[0] == "focal_jax"
            }
    return found


IMPORTS = {name: _imports(path) for name, path in MODULES.items()}


def _in(module, *packages):
    """Return whether a module is one of the packages or in one of them."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_imports_have_no_cycle():
    tuple(graphlib.TopologicalSorter(IMPORTS).static_order())  # raises for a cycle


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("engine", ["engine"]),
        ("catalogue", ["engine"]),
        ("reduction", ["engine"]),
        ("losses", ["losses", "catalogue", "engine"]),
    ],
)
def test_imports_run_downward(package, allowed):
    importers = [name for name in MODULES if _in(name, package)]
    assert importers
    for importer in importers:
        upward = {name for name in IMPORTS[importer] if not _in(name, *allowed)}
        assert not upward, f"{importer} imports {sorted(upward)}"


def test_reference_shares_only_declarations_and_checks_with_the_losses():
    # A bug of the mathematics cannot be in both. `reduction` has the check of `normalization`.
    shared = {"catalogue", "reduction"}
    shared |= {f"engine.{name}" for name in ("arguments", "checks", "declaration", "options")}
    assert IMPORTS["reference"] <= {*shared, "plain"}
    assert IMPORTS["plain"] <= shared


def test_losses_do_not_mention_platforms():
    platforms = re.compile(
        r"by_platform|platform_dependent|default_backend|[\"'](cpu|gpu|tpu|cuda|rocm)[\"']"
    )
    for name, path in MODULES.items():
        if _in(name, "losses"):
            found = platforms.search(path.read_text())
            assert found is None, f"{name}: {found[0]}"


# ---------------------------------------------------------------- import cost and size


def _loaded(code):
    """Return the names of the modules that a new process loads."""
    code += "; import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return set(json.loads(done.stdout))


@pytest.fixture(scope="module")
def loaded():
    """Return the names of the modules that the first use of a loss loads in a new process."""
    return _loaded("import focal_jax; focal_jax.sigmoid_focal_loss")


OPTIONAL = {"flax", "optax", "google.protobuf", "matplotlib", "mpmath", "rich", "sklearn"}


def test_import_does_not_load_optional_packages(loaded):
    assert not loaded & OPTIONAL


def test_import_of_the_package_alone_does_not_load_jax():
    assert not _loaded("import focal_jax") & {*OPTIONAL, "jax", "numpy", "chex"}


def test_calls_do_not_load_optional_packages():
    calls = """import focal_jax, jax, jax.numpy as jnp
z, y = jnp.zeros((4, 3)), jnp.array([0, 2, 1, -1])
loss = lambda z: focal_jax.reduce_loss(
    focal_jax.softmax_focal_loss_with_integer_labels(z, y, ignore_label=-1), where=y >= 0
)
jax.jit(jax.value_and_grad(loss))(z)
focal_jax.sigmoid_focal_loss(z, y[:, None] > 0, alpha=0.25)
focal_jax.linear_softmax_focal_loss_with_integer_labels(z, jnp.eye(3), y, ignore_label=-1)
focal_jax.linear_token_statistics(z, jnp.eye(3), y, ignore_label=-1)"""
    assert not _loaded(calls + "\npass") & OPTIONAL


@pytest.mark.parametrize("module", ["catalogue", "losses.sigmoid", "losses.sparse", "reference"])
def test_catalogue_is_complete_whatever_is_imported_first(module):
    code = f"import focal_jax.{module}; from focal_jax.catalogue import LOSSES; print(list(LOSSES))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert ast.literal_eval(done.stdout) == list(LOSSES)


def test_import_loads_only_engine_losses_and_catalogue(loaded):
    package = {name.partition(".")[2] for name in loaded if name.split(".")[0] == "focal_jax"}
    assert [
        x for x in package if x and not _in(x, "engine", "losses", "catalogue", "_version")
    ] == []


def test_import_executes_at_most_4300_lines(loaded):
    package = {name for name in MODULES if f"focal_jax.{name}".rstrip(".") in loaded}
    assert sum(LINES[name] for name in package) <= 4300


def test_package_does_not_grow():
    assert sum(LINES.values()) <= 11989


def test_no_file_has_more_than_450_lines():
    assert {name: n for name, n in LINES.items() if n > 450} == {}


# ---------------------------------------------------------------- signatures


def _signature(function):
    return {name: (p.kind, p.default) for name, p in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_has_the_same_signature(name):
    function, reference = getattr(focal_jax, name), getattr(focal_jax.reference, name)
    assert _signature(function) == _signature(reference)


# Arguments that are not declared as options, because the engine handles them for many losses.
SHARED = {
    "axis",
    "axis_name",
    "bias",
    "chunk_size",
    "class_axis_name",
    "ignore_label",
    "label_smoothing",
    "logit_softcap",
    "mesh",
    "return_logsumexp",
    "temperature",
    "transpose_kernel",
    "where",
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_signature_has_the_declared_options(loss):
    signature = _signature(getattr(focal_jax, loss.name))
    assert "where" in signature
    for name, option in loss.options.items():
        assert signature[name] == (inspect.Parameter.KEYWORD_ONLY, option.default)
    keywords = {
        name for name, (kind, _) in signature.items() if kind == inspect.Parameter.KEYWORD_ONLY
    }
    assert keywords - SHARED == set(loss.options)
    assert loss.name in focal_jax.reference.FORMULAS


@pytest.mark.parametrize("name", [x.name for x in LOSSES.values() if "integer" in x.labels])
def test_losses_of_integer_labels_have_the_same_arguments(name):
    wanted = {"ignore_label", "label_smoothing", "return_logsumexp", "class_axis_name", "where"}
    if name == "dual_focal_loss_with_integer_labels":
        wanted -= {"label_smoothing"}
    assert wanted <= set(_signature(getattr(focal_jax, name)))


def test_signature_extends_that_of_optax():
    optax = importlib.import_module("optax")
    wanted = _signature(optax.losses.sigmoid_focal_loss)
    signature = _signature(focal_jax.sigmoid_focal_loss)
    assert {name: signature[name] for name in wanted} == wanted


# ---------------------------------------------------------------- docstrings


@pytest.mark.parametrize("name", MORE_FUNCTIONS)
def test_functions_outside_the_catalogue_are_listed(name):
    parameters = _signature(getattr(focal_jax, name))
    assert {"where", "class_axis_name"} <= set(parameters)
    linear = {"bias", "transpose_kernel", "chunk_size", "mesh"}
    assert linear & set(parameters) == (linear if name.startswith("linear_") else set())
    for page in ("README.md", "docs/family.md", "docs/conventions.md"):
        assert f"`{name}`" in (ROOT.parent / page).read_text(encoding="utf-8"), page


def test_every_function_of_the_package_is_known():
    public = {name for name in focal_jax.__all__ if inspect.isfunction(getattr(focal_jax, name))}
    assert public == {*FUNCTIONS, *MORE_FUNCTIONS, "compare_gradients"}


@pytest.mark.parametrize("name", [*FUNCTIONS, *MORE_FUNCTIONS])
def test_docstring_has_example_arguments_and_result(name):
    text = inspect.getdoc(getattr(focal_jax, name))
    sections = ["Example:", "Args:", "Returns:"]
    if "The arguments are those of `" in text:
        sections.remove("Args:")
    if "\nRaises:\n" in text:  # only for errors that `focal_jax.__doc__` does not describe
        sections.append("Raises:")
    positions = [text.find(f"\n{section}\n") for section in sections]
    assert -1 not in positions, sections[positions.index(-1)]
    assert positions == sorted(positions)


def _public_functions():
    for module in pkgutil.walk_packages([str(ROOT)], "focal_jax."):
        if module.name.endswith("__main__"):
            continue
        for name in getattr(importlib.import_module(module.name), "__all__", ()):
            public = getattr(sys.modules[module.name], name)
            if inspect.isfunction(public):
                yield f"{module.name}.{name}", public
    for name in (*FUNCTIONS, *MORE_FUNCTIONS):
        yield f"focal_jax.{name}", getattr(focal_jax, name)


def test_docstrings_start_with_one_imperative_line():
    for name, function in _public_functions():
        summary, _, rest = inspect.getdoc(function).partition("\n")
        assert summary.endswith("."), f"{name}: {summary}"
        assert not rest or rest.startswith("\n"), f"{name}: {rest.partition(chr(10))[0]}"
        first = summary.split()[0]
        assert first[0].isupper(), f"{name}: {summary}"
        assert first not in ("A", "An", "It", "The", "This", "These"), f"{name}: {summary}"
        assert not re.search(r"[^s]s$", first), f"{name}: {summary}"  # "Returns", not "Pass"


def test_every_module_has_a_docstring():
    for module in pkgutil.walk_packages([str(ROOT)], "focal_jax."):
        if not module.name.endswith("__main__"):
            assert importlib.import_module(module.name).__doc__, module.name
