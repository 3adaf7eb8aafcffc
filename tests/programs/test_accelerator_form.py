"""The form that accelerators are given, run on a CPU: its numbers are held to the same digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_gradients
import test_values
from helpers import LOSSES, assert_close, gradients

pytestmark = pytest.mark.quick

# What has a form of its own, and one loss beside that has none but the plain call.
ROWS = [
    row
    for row in LOSSES
    if row.name
    in (
        "sigmoid_focal_loss",
        "softmax_focal_loss",
        "softmax_focal_loss_with_integer_labels",
        "dual_focal_loss_with_integer_labels",
    )
]
SOFTMAX = [row for row in ROWS if row.softmax]


@pytest.fixture(autouse=True, scope="module")
def _elsewhere():
    def default(*args, default, **platforms):
        del platforms
        return default(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", default)
        jax.clear_caches()
        yield
    jax.clear_caches()


@pytest.mark.parametrize("row", SOFTMAX, ids=str)
def test_it_is_another_program(row):
    inside, fixed = row.split(row.arguments(0, (4, 3)))
    text = gradients(row.eager, **fixed).lower(inside).compile().as_text()
    assert " conditional(" not in text
    assert text.count(" reduce(") > 0


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_float32_to_60_digits(row):
    test_values.test_float32_to_60_digits(row)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_second_derivatives(row, x64):
    test_gradients.test_second_derivatives(row, x64)


@pytest.mark.parametrize("row", SOFTMAX, ids=str)
@pytest.mark.parametrize("classes", [1000, 32_000])
def test_long_rows(row, classes):
    # On a CPU the reduction adds up one class after the other, which no accelerator does: the
    # numbers are the worst that any order can give.
    arguments = row.arguments(1, (4, classes), scale=2.0)
    inside, fixed = row.split(arguments)
    got = gradients(row.eager, **fixed)(inside)
    with jax.enable_x64(True):
        wide = {k: np.asarray(v, np.float64) for k, v in inside.items()}
        assert_close(got, gradients(row.reference, **fixed)(wide), 1e-5)


@pytest.mark.parametrize("row", SOFTMAX, ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis(row, axis):
    shape = (4, 3, 5)
    inside, fixed = row.split(row.all(2, shape, axis))
    want = gradients(row.reference, **fixed)(inside)
    assert_close(gradients(row.eager, **fixed)(inside), want, 1e-4)


@pytest.mark.parametrize("row", SOFTMAX, ids=str)
def test_classes_that_are_equal_or_switched_off(row):
    # Which of several largest classes stands apart is the first; -inf counts nothing.
    logits = jnp.array([[2.0, 2.0, 2.0], [-jnp.inf, 1.0, 1.0], [0.0, -jnp.inf, -jnp.inf]])
    labels = jnp.array([1, 2, 0]) if row.integer else jnp.eye(3)[jnp.array([1, 2, 0])]
    fixed = {"labels": labels}
    got = gradients(row.eager, **fixed)({"logits": logits})
    with jax.enable_x64(True):
        wide = {"labels": np.asarray(labels)}
        finite = np.where(np.isfinite(logits), np.float64(logits), -600.0)
        assert_close(got, gradients(row.reference, **wide)({"logits": finite}), 1e-5)
