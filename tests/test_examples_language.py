"""Tests of the language model example, on one device and on eight."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from figure_checks import saved_figures_are_checked
from flax import nnx

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLE = str(ROOT / "examples" / "language_model.py")
TINY = ["--steps=4", "--held-out=1", "--sources", "optax"]
RUN = """
import json, runpy, sys
values, _ = runpy.run_path(sys.argv[1])["main"](sys.argv[2:])
print(json.dumps(values))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("language")
    main = runpy.run_path(EXAMPLE)["main"]
    # Flax and optax need the standard dtype and rank promotion.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        saved_figures_are_checked(),
    ):
        return *main([*TINY, f"--out={out}"]), out


def test_every_loss_trains(tiny):
    values, results, _ = tiny
    start, *losses = values
    assert losses == ["cross entropy", "focal loss", "dynamic fine-tuning"]
    assert [len(x) for x in values.values()] == [2] * 4
    # The initial loss is about that of a uniform prediction.
    assert abs(values[start][0] - np.log(32_768)) < 1
    assert values[start][-1] < values[start][0] - 0.1
    for name in losses:
        assert results[name][0, 0] < 0.95 * results[start][0, 0]
    # While all predictions are wrong, the focal loss is close to cross entropy, and a weight that
    # is the probability is almost 0.
    np.testing.assert_allclose(values["focal loss"], values["cross entropy"], rtol=0.01)
    assert 0 < values["dynamic fine-tuning"][-1] < 0.1


def test_measures_are_valid(tiny):
    _, results, out = tiny
    for result in results.values():
        perplexity, error, accuracy, entropy = result
        assert result.shape == (4, 6)
        finite = perplexity[~np.isnan(perplexity)]
        assert len(finite) >= 4
        assert (finite > 1).all()
        assert finite[1] > finite[-1]  # rare tokens are harder to predict
        assert ((error >= 0) & (error <= 100)).all()
        known = ~np.isnan(perplexity)
        assert ((accuracy[known] >= 0) & (accuracy[known] <= 100)).all()
        assert accuracy[0] > 0
        assert ((entropy[known] > 0) & (entropy[known] < np.log(32_768))).all()
    height, width, _ = plt.imread(out / "language_model.png").shape
    assert height > 300
    assert width > 1000


def test_eight_devices_give_the_losses_of_one(tiny, tmp_path):
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    options = ["--devices=8", "--losses", "cross entropy", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, EXAMPLE, *TINY, *options],
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout.splitlines()[-1])
    for name, values in losses.items():
        np.testing.assert_allclose(values, tiny[0][name], rtol=1e-4)
    assert len(losses) == 2


def test_calibration_error_of_known_predictions():
    calibration_error = runpy.run_path(EXAMPLE)["calibration_error"]
    # 3 of 4 are correct at confidence 0.75: error 0. 2 of 4 are correct at 0.95: 0.45.
    confidence = np.array([0.75] * 4 + [0.95] * 4)
    correct = np.array([1, 1, 1, 0, 1, 1, 0, 0], bool)
    np.testing.assert_allclose(calibration_error(confidence, correct, bins=2), 0.225)


def test_predictions_agree_with_a_dense_head():
    names = runpy.run_path(EXAMPLE)
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32)
    labels = rng.integers(20, size=(2, 5)).astype(np.int32)

    class Model(nnx.Module):
        kernel = jnp.asarray(rng.normal(size=(20, 8)), jnp.float32)

        def __call__(self, tokens):
            return features

    members = jax.nn.one_hot(np.arange(20) % 5, 5)
    losses, entropy, confidence, correct, group_p = names["predict"](Model(), labels, members)
    log_p = np.asarray(jax.nn.log_softmax(features @ Model.kernel.T))
    p = np.exp(log_p)
    want = -np.take_along_axis(log_p, labels[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    np.testing.assert_allclose(entropy, -np.sum(p * log_p, -1), rtol=1e-5)
    np.testing.assert_allclose(confidence, p.max(-1), rtol=1e-5)
    np.testing.assert_array_equal(correct, log_p.argmax(-1) == labels[:, 1:])
    np.testing.assert_allclose(group_p[..., 0], p[..., ::5].sum(-1), rtol=1e-5)
