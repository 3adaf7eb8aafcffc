"""What comes in decides what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import LOSSES, PROGRAMS, assert_close, gradients, jit, total

import focal_jax

pytestmark = pytest.mark.quick

SIXTEEN = [jnp.bfloat16, jnp.float16]
INTEGER = [row for row in PROGRAMS if row.integer]


@pytest.mark.parametrize("row", [row for row in LOSSES if not row.linear], ids=str)
def test_sixteen_bits_are_the_float32_result_rounded(row):
    arguments = row.arguments(0, (8, 5)) | row.scalars()
    logits = arguments.pop("logits")

    @jax.jit  # as XLA optimizes them the two programs are equal to the bit
    def both(logits):
        out = []
        for exponents in ({}, dict.fromkeys(row.exponents, 2), dict.fromkeys(row.exponents, 1.3)):

            def losses(z, exponents=exponents):
                return row.eager(logits=z, **arguments | exponents)

            values, transpose = jax.vjp(losses, logits)
            out.append((values, *transpose(jnp.ones_like(values))))
        return out

    for dtype in SIXTEEN:
        rounded = logits.astype(dtype)
        for narrow, wide in zip(both(rounded), both(rounded.astype(jnp.float32))):
            assert narrow[0].dtype == jnp.float32
            assert_close(narrow[0], wide[0], 0)
            assert narrow[1].dtype == dtype
            assert np.array_equal(narrow[1], wide[1].astype(dtype))


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_every_cotangent_has_its_primals_dtype(row, x64):
    # Each argument in each of the three, all of them different.
    inside, fixed = row.split(row.all(1, (4, 3)))
    dtypes = jnp.bfloat16, jnp.float32, jnp.float64
    for shift in range(3):
        mixed = {k: x.astype(dtypes[(i + shift) % 3]) for i, (k, x) in enumerate(inside.items())}
        with jax.numpy_dtype_promotion("standard" if row.linear else "strict"):
            got = jax.eval_shape(jax.grad(total(row.eager, **fixed)), mixed)
        assert {k: (x.dtype, x.shape) for k, x in got.items()} == {
            k: (x.dtype, x.shape) for k, x in mixed.items()
        }


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_float64_stays_float64(row, x64):
    arguments = row.arguments(2, (4, 3), dtype=np.float64)
    inside, fixed = row.split(arguments)
    values, gradient = jax.eval_shape(gradients(row.eager, **fixed), inside)
    assert values.dtype == jnp.float64
    assert all(x.dtype == jnp.float64 for x in gradient.values())
    assert row.ours(**arguments, **row.scalars(np.float32)).dtype == jnp.float64


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_options_do_not_promote_the_result(row, x64):
    arguments = row.arguments(5, (4, 3))
    assert row.ours(**arguments, **row.scalars(np.float64)).dtype == jnp.float32


@pytest.mark.parametrize("row", LOSSES, ids=str)
def test_an_option_narrower_than_the_loss_is_widened_first(row):
    # 1 - 0.001 is 1 in bfloat16; the loss is that of the very number, in its own dtype.
    arguments = row.arguments(6, (6, 3))

    @jit
    def of_each(options):
        out = []
        for name, x in sorted(options.items()):
            inside, fixed = row.split(arguments | {name: x})
            out.append(jax.value_and_grad(total(row.eager, **fixed))(inside))
        return out

    for dtype in SIXTEEN:
        narrow = {k: jnp.asarray(o.low + 0.001, dtype) for k, o in row.options.items()}
        wide = {k: x.astype(jnp.float32) for k, x in narrow.items()}
        for name, got, want in zip(sorted(narrow), of_each(narrow), of_each(wide)):
            assert got[1].pop(name).dtype == dtype
            want[1].pop(name)
            assert_close(got, want, 1e-7)


# ---------------------------------------------------------------- integer labels


@pytest.mark.parametrize("row", INTEGER, ids=str)
def test_narrow_labels_do_not_wrap(row):
    # 300 classes: an iota in int8 would meet the label twice.
    arguments = row.arguments(3, (4, 300)) | {"labels": np.array([0, 44, 100, 127], np.int32)}
    fixed = {"chunk_size": 70} if row.linear else {}
    inside, _ = row.split(arguments)

    def of(labels, inside=inside):
        return gradients(row.eager, **fixed, **row.axis(-1), labels=labels)(inside)

    want = of(arguments["labels"])
    few = {k: x[..., :100] if k in ("logits", "kernel", "bias") else x for k, x in inside.items()}
    for dtype in ("int8", "uint8", "int16", "uint16", "uint32"):
        assert_close(of(arguments["labels"].astype(dtype)), want, 0)
        last = np.full(4, np.iinfo(dtype).max, dtype)
        assert np.all(np.isnan(row.ours(**few, **fixed, **row.axis(-1), labels=jnp.asarray(last))))


WIDE = [2**32 + 1, 2**32 - 1, 2**63 - 1, 2**31]


@pytest.mark.parametrize("module", [focal_jax, focal_jax.reference], ids=["ours", "reference"])
@pytest.mark.parametrize("row", INTEGER, ids=str)
@pytest.mark.parametrize("kind", ["int64", "uint64", "list", "scalars"])
@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
def test_wide_labels_do_not_turn_into_another_class(module, row, kind, wide):
    # 2**32 + 1 has the lower half of 1, 2**32 - 1 that of -1.
    convert = {"list": list, "scalars": lambda x: [np.int64(v) for v in x]}
    with jax.enable_x64(wide):
        labels = convert.get(kind, lambda x: np.array(x, kind))([1, *WIDE, 0])
        arguments = row.of_logits(jnp.zeros((6, 4)), labels)
        function = getattr(module, row.name)
        for ignored, there in ((None, None), (1, 0), (-1, None)):
            losses = function(**arguments, ignore_label=ignored)
            assert np.isnan(losses).tolist() == [False, True, True, True, True, False]
            assert there is None or losses[there] == 0


@pytest.mark.parametrize("row", INTEGER, ids=str)
def test_wide_labels_below_0_are_no_class(row):
    labels = np.array([-(2**32), -(2**63), 1 - 2**32], np.int64)
    assert np.all(np.isnan(row.eager(**row.of_logits(jnp.zeros((3, 4)), labels))))


@pytest.mark.parametrize("dtype", [bool, "int8", "uint8", "int32", "float16", "float32"])
@pytest.mark.parametrize("row", [row for row in LOSSES if not (row.soft or row.integer)], ids=str)
def test_hard_labels_of_any_kind(row, dtype):
    arguments = row.arguments(4, (4, 3))
    labels = np.asarray(arguments["labels"]).astype(dtype)
    assert_close(row.ours(**arguments | {"labels": jnp.asarray(labels)}), row.ours(**arguments), 0)
