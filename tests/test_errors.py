"""Bad input: an error that names the argument, what was got and what was wanted."""

import jax
import jax.numpy as jnp
import pytest
from helpers import INTEGER, LOSSES, SIGMOID, SOFT, ids

import focal_jax


def _call(loss, **changes):
    logits, labels = loss.inputs(0, (4, 3))
    arguments = {"logits": logits, "labels": labels} | changes
    return arguments.pop("logits"), arguments.pop("labels"), arguments


@pytest.mark.parametrize("module", [focal_jax, focal_jax.reference], ids=["ours", "reference"])
@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": jnp.zeros((4, 3), jnp.int32)}, "logits: got dtype int32, wanted a floating"),
        ({"labels": jnp.zeros((5, 3))}, "labels: got"),
        ({"labels": jnp.zeros((2, 4, 3))}, "labels: got"),
        ({"gamma": -1}, "gamma: got -1, wanted a finite number >= 0"),
        ({"gamma": float("nan")}, "gamma: got nan, wanted"),
        ({"gamma": jnp.ones(7)}, r"gamma: got shape \(7,\), wanted one that broadcasts to"),
        ({"gamma": jnp.ones((2, 4, 3))}, r"gamma: got shape \(2, 4, 3\), wanted"),
        ({"where": jnp.ones(4)}, "where: got dtype float32, wanted bool"),
        ({"where": jnp.ones(7, bool)}, r"where: got shape \(7,\), wanted one that broadcasts"),
        ({"alpha": jnp.ones(7)}, r"alpha: got shape \(7,\), wanted"),
    ],
)
def test_every_loss(module, loss, changes, message):
    logits, labels, options = _call(loss, **changes)
    with pytest.raises(ValueError, match=message):
        getattr(module, loss.name)(logits, labels, **options)


@pytest.mark.parametrize("module", [focal_jax, focal_jax.reference], ids=["ours", "reference"])
@pytest.mark.parametrize(
    ("loss", "changes", "message"),
    [
        (INTEGER, {"labels": jnp.zeros(4)}, "labels: got dtype float32, wanted an integer dtype"),
        (INTEGER, {"labels": jnp.zeros(4, bool)}, "labels: got dtype bool, wanted an integer"),
        (INTEGER, {"labels": jnp.zeros((4, 1), int)}, r"labels: got shape \(4, 1\), wanted \(4,\)"),
        (INTEGER, {"labels": jnp.zeros((4, 3), int)}, r"labels: got shape \(4, 3\), wanted \(4,\)"),
        (INTEGER, {"axis": 2}, r"axis: got 2, wanted one in \[-2, 2\)"),
        (INTEGER, {"axis": -3}, r"axis: got -3, wanted one in \[-2, 2\)"),
        (INTEGER, {"axis": 1.0}, "axis: got 1.0, wanted an integer"),
        (INTEGER, {"logits": jnp.float32(1)}, "axis: got -1, wanted one in"),
        (INTEGER, {"alpha": jnp.ones((4, 3))}, r"alpha: got shape \(4, 3\), wanted a scalar or"),
        (INTEGER, {"alpha": jnp.ones(1)}, r"alpha: got shape \(1,\), wanted a scalar or \(3,\)"),
        (SOFT, {"labels": jnp.ones(3)}, r"labels: got shape \(3,\), wanted \(4, 3\)"),
        (SOFT, {"labels": jnp.ones((4, 1))}, r"labels: got shape \(4, 1\), wanted \(4, 3\)"),
        (SOFT, {"axis": 2}, "axis: got 2, wanted one in"),
        (SIGMOID, {"labels": jnp.zeros((4, 3, 1))}, r"labels: got shape \(4, 3, 1\), wanted"),
        (
            SIGMOID,
            {"logits": jnp.zeros((4, 1)), "labels": jnp.zeros(4)},
            r"labels: got shape \(4,\), wanted",
        ),
        (SIGMOID, {"labels": jnp.zeros((4, 3), complex)}, "labels: got dtype complex64, wanted"),
    ],
)
def test_one_loss(module, loss, changes, message):
    logits, labels, options = _call(loss, **changes)
    with pytest.raises(ValueError, match=message):
        getattr(module, loss.name)(logits, labels, **options)


@pytest.mark.parametrize("module", [focal_jax, focal_jax.reference], ids=["ours", "reference"])
@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        (jnp.ones(3), {"normalization": "median"}, "normalization: got 'median', wanted one of"),
        (jnp.ones(3), {"normalization": jnp.ones(3)}, r"normalization: got shape \(3,\), wanted"),
        (jnp.float32(1), {"normalization": "batch_size"}, "normalization: got 'batch_size'"),
        (jnp.ones(3, int), {}, "losses: got dtype int32, wanted a floating dtype"),
        (jnp.ones(3), {"where": jnp.ones(3)}, "where: got dtype float32, wanted bool"),
        (jnp.ones(3), {"where": jnp.ones(4, bool)}, r"where: got shape \(4,\), wanted"),
    ],
)
def test_reduction(module, losses, options, message):
    with pytest.raises(ValueError, match=message):
        module.reduce_loss(losses, **options)


def test_an_unbound_axis_name_is_said():
    with pytest.raises(NameError, match="batch"):
        focal_jax.reduce_loss(jnp.ones(3), axis_name="batch")


@pytest.mark.parametrize("kind", [ValueError, TypeError, AssertionError])
def test_whatever_a_caller_expects_is_caught(kind):
    with pytest.raises(kind, match="logits"):
        focal_jax.sigmoid_focal_loss(jnp.zeros(3, int), jnp.zeros(3))


def test_checks_run_at_trace_time():
    with pytest.raises(ValueError, match="labels"):
        jax.jit(focal_jax.sigmoid_focal_loss)(jnp.zeros((4, 3)), jnp.zeros((5, 3)))
