"""Losses that a user writes are short and work with the rest of the package.

`helpers.LOSSES` includes the losses of `tests/toy`, so that the tests of properties run over them.
"""

import ast
import inspect
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from helpers import PROGRAMS, assert_close

import focal_jax
from focal_jax import linen, nnx

pytestmark = pytest.mark.quick

FILES = sorted(Path(toy.__file__).parent.glob("t*.py"))
FUNCTIONS = {
    "tempered": (toy.TEMPERED, toy.tempered_formula),
    "tilted": (toy.TILTED, toy.tilted_formula),
}


def _labels(name):
    index = jnp.array([0, 2, 1, 2])
    return jax.nn.one_hot(index, 3) if name == "tempered" else index


def _logits():
    return 3 * jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)


def test_all_properties_run_over_the_losses():
    names = {row.name for row in PROGRAMS}
    assert {"tempered", "tilted", "linear_tilted"} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_loss_is_short(path):
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_loss_needs_public_names_only(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert (node.module, [x.name for x in node.names]) == ("focal_jax", ["engine"])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = {"engine": focal_jax.engine, "focal_jax": focal_jax}.get(node.value.id)
            assert module is None or node.attr in module.__all__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature(name):
    loss, _ = FUNCTIONS[name]
    defaults = {k: p.default for k, p in inspect.signature(loss).parameters.items()}
    assert list(defaults)[:2] == ["logits", "labels"]
    assert "where" in defaults
    for option, declared in loss.declaration.options.items():
        assert defaults[option] == declared.default


@pytest.mark.parametrize("name", FUNCTIONS)
def test_unknown_options(name):
    loss, _ = FUNCTIONS[name]
    with pytest.raises(focal_jax.InputError, match=r"^delta: got an option that .* does not have"):
        loss(_logits(), _labels(name), delta=1.0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_loss_can_be_pickled(name):
    loss, _ = FUNCTIONS[name]
    copy = pickle.loads(pickle.dumps(loss))
    assert_close(copy(_logits(), _labels(name)), loss(_logits(), _labels(name)), 0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_flax_modules(name):
    loss, _ = FUNCTIONS[name]
    args, where = (_logits(), _labels(name)), jnp.arange(4) != 2
    where = where[:, None] if name == "tempered" else where
    want = focal_jax.reduce_loss(loss(*args, alpha=0.3, where=where), where=where)
    module = linen.Reduced(loss, alpha=0.3)
    assert_close(module.apply({}, *args, where=where), want, 1e-6)
    assert_close(nnx.Reduced(loss, alpha=0.3)(*args, where=where), want, 1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compare_gradients(name):
    loss, formula = FUNCTIONS[name]
    report = focal_jax.compare_gradients(loss, formula=formula, shape=(64, 3), repeats=1, alpha=0.3)
    for regime in (report.focal_jax.easy, report.focal_jax.hard, report.focal_jax.saturated):
        assert regime.relative < 1e-5
        assert regime.nans == 0
