"""Bad input: an error that names the argument, what was got and what was wanted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import LOSSES, PROGRAMS, jit

import focal_jax

pytestmark = pytest.mark.quick

MODULES = pytest.mark.parametrize(
    "module", [focal_jax, focal_jax.reference], ids=["ours", "reference"]
)
SIGMOID, SOFT, INTEGER, LINEAR = (
    next(row for row in PROGRAMS if row.loss.kind == kind)
    for kind in ("elementwise", "distribution", "position", "linear")
)
KEYS = jax.random.split(jax.random.key(0), 4)


def _arguments(row, changes):
    return row.arguments(0, (4, 3)) | changes


def _refused(module, row, changes, message):
    arguments = _arguments(row, changes)
    with pytest.raises(ValueError, match=message) as caught:
        getattr(module, row.name)(**arguments)
    assert "Chex" not in str(caught.value)


def _of_every_loss():
    for row in PROGRAMS:
        yield row, {row.first: jnp.zeros((4, 3), jnp.int32)}, f"{row.first}: got dtype int32"
        yield row, {row.first: KEYS}, f"{row.first}: got .*key"
        yield row, {row.first: "logits"}, f"{row.first}: got 'logits', wanted"
        yield row, {row.first: None}, f"{row.first}: got None, wanted"
        yield row, {"labels": jnp.zeros((5, 3), jnp.int32)}, "labels: got shape"
        yield row, {"labels": jnp.zeros((2, 4, 3), jnp.int32)}, "labels: got shape"
        yield row, {"labels": KEYS}, "labels: got .*key"
        yield row, {"labels": ["cat", "dog"]}, "labels: got .*, wanted"
        yield row, {"labels": None}, "labels: got None, wanted"
        yield row, {"where": jnp.ones(4)}, "where: got dtype float32, wanted bool"
        yield row, {"where": jnp.ones(7, bool)}, r"where: got shape \(7,\), wanted one that broad"
        yield row, {"where": "all"}, "where: got 'all', wanted"
        for name, option in row.options.items():
            yield row, {name: jnp.ones(7)}, rf"{name}: got shape \(7,\), wanted"
            yield row, {name: jnp.ones((2, 4, 3))}, rf"{name}: got shape \(2, 4, 3\), wanted"
            yield row, {name: "2"}, f"{name}: got '2', wanted"
            yield row, {name: {"a": 1.0}}, f"{name}: got .*, wanted"
            yield row, {name: KEYS[0]}, f"{name}: got .*key"
            yield row, {name: 2j}, f"{name}: got .*, wanted"
            if option.default is not None:
                yield row, {name: None}, f"{name}: got None, wanted"
            if option.exponent:
                yield row, {name: -1}, f"{name}: got -1, wanted a finite number >= 0"
                yield row, {name: float("nan")}, f"{name}: got nan, wanted a finite number"
                yield row, {name: float("inf")}, f"{name}: got inf, wanted a finite number"
                yield row, {name: 10**400}, f"{name}: got .*, wanted a finite number"


@MODULES
@pytest.mark.parametrize(
    ("row", "changes", "message"), list(_of_every_loss()), ids=lambda x: str(x)[:40]
)
def test_every_loss(module, row, changes, message):
    _refused(module, row, changes, message)


@MODULES
@pytest.mark.parametrize("row", [INTEGER, LINEAR], ids=str)
@pytest.mark.parametrize(
    ("ignored", "message"),
    [
        (1.0, "ignore_label: got 1.0, wanted None or an integer"),
        ("background", "ignore_label: got 'background', wanted None or an integer"),
        (2**31, "ignore_label: got 2147483648, wanted an integer of 32 bits"),
        (-(2**31) - 1, "ignore_label: got -2147483649, wanted an integer of 32 bits"),
        (np.zeros(2, int), "ignore_label: got .*, wanted None or an integer"),
    ],
)
def test_a_label_to_ignore(module, row, ignored, message):
    _refused(module, row, {"ignore_label": ignored}, message)


@MODULES
@pytest.mark.parametrize("row", [INTEGER, LINEAR], ids=str)
def test_a_traced_label_to_ignore(module, row):
    arguments = _arguments(row, {})
    with pytest.raises(ValueError, match=r"ignore_label: got .*, wanted None or an integer"):
        jit(lambda i: getattr(module, row.name)(**arguments, ignore_label=i))(1)


@MODULES
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
@pytest.mark.parametrize("exponent", [1e10, 10**9, 1e30, 200])
def test_a_huge_exponent_is_one(module, row, exponent):
    # p is below 1 here, and so its huge power is 0; all stays finite.
    arguments = row.arguments(0, (4, 3), scale=0.1)
    for name in row.exponents:
        losses = getattr(module, row.name)(**arguments, **{name: exponent})
        assert np.all(np.isfinite(losses))


@MODULES
@pytest.mark.parametrize(
    ("row", "changes", "message"),
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
        (LINEAR, {"labels": jnp.zeros(4)}, "labels: got dtype float32, wanted an integer dtype"),
        (LINEAR, {"kernel": jnp.zeros((3, 3), int)}, "kernel: got dtype int32, wanted a floating"),
        (LINEAR, {"kernel": jnp.zeros((6, 3))}, r"kernel: got shape \(6, 3\), wanted"),
        (LINEAR, {"kernel": jnp.zeros(3)}, r"kernel: got shape \(3,\), wanted"),
        (LINEAR, {"kernel": jnp.zeros((1, 3, 3))}, r"kernel: got shape \(1, 3, 3\), wanted"),
        (LINEAR, {"features": jnp.float32(1)}, r"kernel: got shape \(3, 3\), wanted"),
        (LINEAR, {"bias": jnp.zeros(6)}, r"bias: got shape \(6,\), wanted \(3,\)"),
        (LINEAR, {"bias": jnp.zeros((4, 3))}, r"bias: got shape \(4, 3\), wanted \(3,\)"),
        (LINEAR, {"bias": jnp.zeros(3, int)}, "bias: got dtype int32, wanted a floating"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_one_loss(module, row, changes, message):
    _refused(module, row, changes, message)


@pytest.mark.parametrize("row", [INTEGER, LINEAR], ids=str)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"return_logsumexp": []}, r"return_logsumexp: got \[\], wanted True or False"),
        ({"return_logsumexp": jnp.array(True)}, "return_logsumexp: got .*, wanted True or False"),
        ({"class_axis_name": 3}, "class_axis_name: got 3, wanted the name of a mapped axis"),
    ],
)
def test_options_of_the_heads(row, changes, message):
    _refused(focal_jax, row, changes, message)


def test_a_number_names_no_axis():
    with pytest.raises(ValueError, match="axis_name: got 0, wanted the name of a mapped axis"):
        focal_jax.reduce_loss(jnp.ones(3), axis_name=0)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0, "all"])
def test_bad_chunk_sizes(chunk_size):
    wanted = f"chunk_size: got {chunk_size!r}, wanted None or an"
    _refused(focal_jax, LINEAR, {"chunk_size": chunk_size}, wanted)


@MODULES
@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        (jnp.ones(3), {"normalization": "average"}, "normalization: got 'average', wanted one of"),
        (jnp.ones(3), {"normalization": None}, "normalization: got None, wanted"),
        (jnp.ones(3), {"normalization": jnp.ones(3)}, r"normalization: got shape \(3,\), wanted"),
        (jnp.float32(1), {"normalization": "batch_size"}, "normalization: got 'batch_size'"),
        (jnp.ones(3, int), {}, "losses: got dtype int32, wanted a floating dtype"),
        (jnp.ones(3), {"where": jnp.ones(3)}, "where: got dtype float32, wanted bool"),
        (jnp.ones(3), {"where": jnp.ones(4, bool)}, r"where: got shape \(4,\), wanted"),
        (jnp.ones(3), {"labels": jnp.ones(3), "ignore_label": 1}, "labels: got dtype float32"),
        (jnp.ones(3), {"labels": jnp.ones(4, int), "ignore_label": 1}, r"labels: got shape \(4,\)"),
        (
            jnp.ones(3),
            {"labels": jnp.ones(3, int), "ignore_label": 0.5},
            "ignore_label: got 0.5, wanted",
        ),
    ],
    ids=lambda x: str(x)[:40],
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


@pytest.mark.parametrize("row", LOSSES, ids=str)
def test_checks_run_at_trace_time(row):
    arguments = row.arguments(0, (4, 3)) | {"labels": jnp.zeros((5, 7), jnp.int32)}
    with pytest.raises(ValueError, match="labels"):
        row.ours(**arguments)
