"""The dtypes of arguments, losses and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PROGRAMS, assert_close, gradients, range_of, total

import focal_jax

pytestmark = pytest.mark.quick

SIXTEEN_BITS = [jnp.bfloat16, jnp.float16]
INTEGER = [row for row in PROGRAMS if row.integer]


# The products of a linear head are computed in the dtype of the features. With all of XLA's
# optimizations, both programs are equal to the last bit.
@pytest.mark.quick(False)
@pytest.mark.parametrize("row", [row for row in PROGRAMS if not row.linear], ids=str)
def test_sixteen_bits_give_the_rounded_result_of_float32(row):
    options, static = row.scalars(), row.axis(-1)

    @jax.jit
    def losses_and_gradients(logits, labels):
        out = []
        for exponents in ({}, *(dict.fromkeys(row.exponents, x) for x in (2, 1.3))):

            def losses(z, exponents=exponents):
                return row.eager(logits=z, labels=labels, **static, **options | exponents)

            values, transpose = jax.vjp(losses, logits)
            out.append((values, *transpose(jnp.ones_like(values))))
        return out

    for variant in row.variants:
        arguments = variant.arguments(0, (8, 5))
        for dtype in SIXTEEN_BITS:
            rounded = arguments["logits"].astype(dtype)
            narrow = losses_and_gradients(rounded, arguments["labels"])
            wide = losses_and_gradients(rounded.astype(jnp.float32), arguments["labels"])
            for got, want in zip(narrow, wide):
                assert got[0].dtype == jnp.float32
                assert_close(got[0], want[0], 0)
                assert got[1].dtype == dtype
                assert np.array_equal(got[1], want[1].astype(dtype))


@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_gradients_have_the_dtype_of_their_argument(row, x64):
    # Each argument in each of three dtypes; the dtypes of the arguments differ.
    inside, fixed = row.split(row.all(1, (4, 3)))
    dtypes = jnp.bfloat16, jnp.float32, jnp.float64
    for shift in range(3):
        mixed = {k: x.astype(dtypes[(i + shift) % 3]) for i, (k, x) in enumerate(inside.items())}
        with jax.numpy_dtype_promotion("strict"):
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
    assert row.compiled(**arguments, **row.scalars(np.float32)).dtype == jnp.float64


@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.numbers], ids=str)
def test_options_do_not_promote_the_losses(row, x64):
    arguments = row.arguments(5, (4, 3))
    assert row.compiled(**arguments, **row.scalars(np.float64)).dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.numbers], ids=str)
def test_options_are_cast_to_the_dtype_of_the_loss_first(row):
    # 1 - 0.001 is 1 in bfloat16. The loss of a bfloat16 option is the loss of the same number in
    # float32.
    static = row.axis(-1)

    @jax.jit
    def of_each(arguments, options):
        out = {}
        for name, x in options.items():
            inside, fixed = row.split(arguments | {name: x})
            out[name] = jax.value_and_grad(total(row.eager, **fixed, **static))(inside)
        return out

    for variant in row.variants:
        arguments = {k: x for k, x in variant.arguments(6, (6, 3)).items() if k not in static}
        for dtype in SIXTEEN_BITS:
            numbers = {k: range_of(option)[0] + 0.001 for k, option in row.numbers.items()}
            narrow = {k: jnp.asarray(x, dtype) for k, x in numbers.items()}
            wide = {k: x.astype(jnp.float32) for k, x in narrow.items()}
            got, want = of_each(arguments, narrow), of_each(arguments, wide)
            for name in narrow:
                assert got[name][1].pop(name).dtype == dtype
                want[name][1].pop(name)
                # Entries of the gradient of a region are differences that may cancel.
                assert_close(got[name], want[name], 1e-6 if row.region else 1e-7)


# ---------------------------------------------------------------- integer labels


@pytest.mark.parametrize("row", INTEGER, ids=str)
def test_narrow_labels_do_not_wrap(row):
    # With 300 classes, an int8 index of the classes would match a label twice.
    labels = np.array([0, 44, 100, 127], np.int32)
    arguments = row.arguments(3, (4, 300)) | {"labels": labels}
    static = row.axis(-1) | ({"chunk_size": 70} if row.linear else {})
    inside, _ = row.split(arguments)

    @jax.jit
    def outputs(inside, labels):
        few = {
            k: x[..., :100] if k in ("logits", "kernel", "bias") else x for k, x in inside.items()
        }
        largest = jnp.full_like(labels, jnp.iinfo(labels.dtype).max)
        value_and_gradients = jax.value_and_grad(total(row.eager, **static, labels=labels))(inside)
        return value_and_gradients, row.eager(**few, **static, labels=largest)

    want, _ = outputs(inside, labels)
    for dtype in ("int8", "uint8", "int16", "uint16", "uint32"):
        got, invalid = outputs(inside, labels.astype(dtype))
        assert_close(got, want, 0)
        assert np.all(np.isnan(invalid))


WIDE = [2**32 + 1, 2**32 - 1, 2**63 - 1, 2**31]


@pytest.mark.parametrize("call", ["eager", "reference"])
@pytest.mark.parametrize("row", INTEGER, ids=str)
@pytest.mark.parametrize("kind", ["int64", "uint64", "list", "scalars"])
@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
def test_wide_labels_do_not_become_another_class(call, row, kind, wide):
    # The lower 32 bits of 2**32 + 1 are 1, those of 2**32 - 1 are -1.
    convert = {"list": list, "scalars": lambda x: [np.int64(v) for v in x]}
    with jax.enable_x64(wide):
        labels = convert.get(kind, lambda x: np.array(x, kind))([1, *WIDE, 0])
        arguments = row.of_logits(jnp.zeros((6, 4)), labels)
        function = getattr(row, call)
        for ignored, position in ((None, None), (1, 0), (-1, None)):
            losses = function(**arguments, ignore_label=ignored)
            assert np.isnan(losses).tolist() == [False, True, True, True, True, False]
            assert position is None or losses[position] == 0


@pytest.mark.parametrize("call", ["eager", "reference"])
@pytest.mark.parametrize("row", INTEGER, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
def test_wide_labels_are_not_ignored(call, row, wide):
    # `ignore_label` is compared with the label before the label is narrowed to int32.
    limits = 2**31 - 1, -(2**31)
    reduce_loss = (focal_jax if call == "eager" else focal_jax.reference).reduce_loss
    with jax.enable_x64(wide):
        for ignored in (*limits, -1, 1 - 2**31):
            for convert in (np.asarray, jnp.asarray if wide else list):
                labels = convert(np.array([*limits, 2**31, 2**40, -(2**31) - 1, -(2**40), 0]))
                arguments = row.of_logits(jnp.zeros((7, 4)), labels)
                losses = getattr(row, call)(**arguments, ignore_label=ignored)
                valid = np.array([ignored != 2**31 - 1, ignored != -(2**31), *[True] * 4, False])
                assert np.isnan(losses).tolist() == valid.tolist()
                options = {"labels": labels, "ignore_label": ignored}
                mean = reduce_loss(jnp.ones(7), normalization=1.0, **options)
                assert mean == 7 - (ignored in limits)


@pytest.mark.parametrize("row", INTEGER, ids=str)
def test_wide_negative_labels_are_invalid(row):
    labels = np.array([-(2**32), -(2**63), 1 - 2**32], np.int64)
    assert np.all(np.isnan(row.eager(**row.of_logits(jnp.zeros((3, 4)), labels))))


# ---------------------------------------------------------------- floating labels


@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.variants[0].hard], ids=str)
def test_hard_labels_of_every_dtype(row):
    arguments = row.variants[0].arguments(4, (4, 3))
    labels, static = arguments["labels"], row.axis(-1)
    dtypes = (bool, "int8", "uint8", "int32", "float16", "float32")

    @jax.jit
    def losses(logits, labels):
        return [row.eager(logits=logits, labels=x, **static) for x in labels]

    got = losses(arguments["logits"], [labels, *(labels.astype(x) for x in dtypes)])
    for x in got[1:]:
        assert_close(x, got[0], 0)
