"""What comes in decides what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import INTEGER, LOSSES, ONE_HOT, SIGMOID, assert_close, ids

SIXTEEN = [jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("gamma", [2, 1.5])
def test_sixteen_bits_are_the_float32_result_rounded(loss, dtype, gamma):
    logits, labels = loss.inputs(0, (8, 5))
    narrow = logits.astype(dtype)

    def total(z):
        return jnp.sum(loss.ours(z, labels, gamma=gamma, alpha=0.3))

    losses = loss.ours(narrow, labels, gamma=gamma, alpha=0.3)
    assert losses.dtype == jnp.float32
    wide = narrow.astype(jnp.float32)
    assert_close(losses, loss.ours(wide, labels, gamma=gamma, alpha=0.3), 0)
    gradient = jax.grad(total)(narrow)
    assert gradient.dtype == dtype
    assert np.array_equal(gradient, jax.grad(total)(wide).astype(dtype))


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_every_cotangent_has_its_primals_dtype(loss, x64):
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        logits, labels = loss.inputs(1, (4, 3))
        for option in (jnp.bfloat16, jnp.float32, jnp.float64):
            args = logits.astype(dtype), jnp.asarray(0.3, option), jnp.asarray(1.5, option)
            soft = (labels.astype(option),) if loss.soft else ()

            def total(z, a, g, *y, labels=labels):
                return jnp.sum(loss.ours(z, *(y or (labels,)), alpha=a, gamma=g))

            gradients = jax.grad(total, tuple(range(3 + len(soft))))(*args, *soft)
            assert [g.dtype for g in gradients] == [dtype] + [option] * (2 + len(soft))
            assert [g.shape for g in gradients[:3]] == [x.shape for x in args]


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_float64_stays_float64(loss, x64):
    logits, labels = loss.inputs(2, (4, 3), dtype=np.float64)
    assert loss.ours(logits, labels).dtype == jnp.float64
    gradient = jax.grad(lambda z: jnp.sum(loss.ours(z, labels)))(logits)
    assert gradient.dtype == jnp.float64
    mixed = loss.ours(logits, labels, alpha=jnp.float32(0.25), gamma=jnp.float32(2))
    assert mixed.dtype == jnp.float64


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_narrow_labels_do_not_wrap(dtype):
    # 300 classes: an iota in int8 would meet the label twice.
    loss = INTEGER
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(4, 300)), jnp.float32)
    labels = np.array([0, 44, 100, 127])
    want = loss.ours(logits, labels.astype(np.int32))
    got = loss.ours(logits, labels.astype(dtype))
    assert_close(got, want, 0)
    gradients = [
        jax.grad(lambda z, y=y: jnp.sum(loss.ours(z, y)))(logits)
        for y in (labels.astype(np.int32), labels.astype(dtype))
    ]
    assert_close(gradients[1], gradients[0], 0)
    last = np.array([np.iinfo(dtype).max] * 4, dtype)
    beyond = loss.ours(logits[:, :100], last)
    assert np.all(np.isnan(beyond))


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_wide_labels_do_not_turn_into_another_class(dtype, x64):
    loss = INTEGER
    logits = jnp.zeros((3, 4))
    labels = np.array([1, 2**32 + 1, 2**63 - 1], dtype)
    assert np.isnan(loss.ours(logits, labels)).tolist() == [False, True, True]
    assert loss.ours(logits, labels, ignore_label=1)[0] == 0


@pytest.mark.parametrize("dtype", [bool, "int8", "uint8", "int32", "float16", "float32"])
@pytest.mark.parametrize("loss", [SIGMOID, ONE_HOT], ids=ids)
def test_hard_labels_of_any_kind(loss, dtype):
    logits, labels = loss.inputs(4, (4, 3))
    assert_close(loss.ours(logits, np.asarray(labels).astype(dtype)), loss.ours(logits, labels), 0)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_options_do_not_promote_the_result(loss, x64):
    logits, labels = loss.inputs(5, (4, 3))
    losses = loss.ours(logits, labels, alpha=jnp.float64(0.25), gamma=jnp.float64(2))
    assert losses.dtype == jnp.float32
