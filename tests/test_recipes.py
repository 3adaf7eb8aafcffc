"""Each recipe of docs/recipes.md returns the numbers of the original system or of its formula."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import run
from scipy.special import expit as sigmoid

from focal_jax.detection import match_anchors, pyramid_anchors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("jax_defaults", "x64")]

ROOT = Path(__file__).parents[1]
rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def recipes():
    return run(ROOT / "docs" / "recipes.md")


def softmax(z, axis):
    return np.exp(z) / np.exp(z).sum(axis, keepdims=True)


# ---------------------------------------------------------------- results of torchvision

GOLDEN = json.loads((ROOT / "tests" / "golden" / "torchvision.json").read_text())


def _wave(shape, a, b, scale):
    """Return the inputs that the golden results were computed from."""
    return (scale * np.sin(a * np.arange(np.prod(shape)) + b)).round(6).reshape(shape)


def test_torchvision_anchors(recipes):
    assert recipes["image_shape"] == tuple(GOLDEN["image_shape"])
    assert recipes["anchors"].tolist() == GOLDEN["anchors"]
    # For an image of 800 x 1344 the cells of the last two levels are 61 and 114 pixels apart. The
    # number of anchors, the last anchors and the sum are torchvision's.
    large = np.asarray(pyramid_anchors((800, 1344), center=0.0, whole_pixels=True))
    assert len(large) == 201_600
    assert large[-10].tolist() == [811, 110, 1385, 1258]
    assert large[-1].tolist() == [933, 110, 1507, 1258]
    assert np.abs(large).sum() == pytest.approx(428_578_270, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"center": 1.5}, r"center: got 1.5, wanted a number in \[0, 1\]"),
        ({"center": "corner"}, r"center: got 'corner', wanted a number in \[0, 1\]"),
        ({"whole_pixels": 1}, "whole_pixels: got 1, wanted True or False"),
    ],
)
def test_invalid_anchor_options(options, message):
    with pytest.raises(ValueError, match=message):
        pyramid_anchors((64, 64), **options)


def test_torchvision_retinanet(recipes):
    anchors = jnp.array(GOLDEN["anchors"], float)
    logits = jnp.asarray(_wave((2, len(anchors), GOLDEN["classes"]), 0.37, 0.1, 3) - 2)
    regression = jnp.asarray(_wave((2, len(anchors), 4), 0.73, 0.4, 1.5))
    annotations = np.full((2, 4, 5), -1.0)  # the second image has no annotation
    annotations[0, :3] = GOLDEN["annotations"][0]
    assert match_anchors(anchors, annotations[0], force_match=True).tolist() == GOLDEN["matches"]

    @jax.jit
    def losses(logits, regression):
        return recipes["torchvision_retinanet"](logits, regression, anchors, annotations)

    expected = [GOLDEN["classification"], GOLDEN["bbox_regression"]]
    np.testing.assert_allclose(losses(logits, regression), expected, rtol=1e-9)
    by_logits, by_regression = jax.grad(lambda *args: losses(*args)[0], (0, 1))(logits, regression)
    np.testing.assert_allclose(
        by_logits.ravel(), GOLDEN["classification_grad"], rtol=1e-8, atol=1e-15
    )
    assert not np.any(by_regression)
    expected = np.zeros(regression.size)
    index, values = zip(*GOLDEN["bbox_regression_grad"])
    expected[list(index)] = values
    by_regression = jax.grad(lambda r: losses(logits, r)[1])(regression)
    np.testing.assert_allclose(by_regression.ravel(), expected, rtol=1e-8, atol=1e-15)


# ---------------------------------------------------------------- published formulas


def test_centernet(recipes):
    shape, sigma = (6, 7, 2), 1.3
    centers, classes = np.array([[2, 1], [5, 4], [-1, -1]]), np.array([1, 0, 0])
    heat = np.zeros(shape)
    for (cx, cy), c in zip(centers[:2], classes):
        for y, x in itertools.product(range(6), range(7)):
            value = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * sigma**2))
            heat[y, x, c] = max(heat[y, x, c], value)
    found_heat = recipes["heat_map"](centers, classes, sigma, shape)
    np.testing.assert_allclose(found_heat, heat, rtol=1e-12)

    logits, sizes = rng.normal(0, 2, shape), rng.uniform(0, 9, (6, 7, 2))
    true_sizes = rng.uniform(0, 9, (3, 2))
    p = sigmoid(logits)
    negative = (np.log(1 - p) * p**2 * (1 - heat) ** 4 * (heat < 1)).sum()
    focal = -((np.log(p) * (1 - p) ** 2 * (heat == 1)).sum() + negative) / 2
    at_peaks = sizes[centers[:2, 1], centers[:2, 0]]
    expected = focal + 0.1 * np.abs(at_peaks - true_sizes[:2]).sum() / 4
    found = jax.jit(recipes["centernet_loss"])(logits, sizes, found_heat, centers, true_sizes)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    bias = recipes["centernet_bias"](jax.random.key(0), (1,))
    np.testing.assert_allclose(bias, -2.19, atol=0.01)


def test_segmentation(recipes):
    labels = rng.integers(0, 3, (2, 4, 8))
    labels[0, 0] = 255
    scores = [rng.normal(0, 2, (2, 3, 4 // step, 8 // step)) for step in (1, 2)]
    expected, weights = 0, (2 / 3, 1 / 3)
    for weight, z, step in zip(weights, scores, (1, 2)):
        small = labels[:, ::step, ::step]
        valid, p = small != 255, softmax(z, 1)
        one_hot = np.moveaxis(small[..., None] == np.arange(3), -1, 1) * valid[:, None]
        p_t = (p * one_hot).sum(1)[valid]
        # nnU-Net: (2 TP + smooth) / (sum of predictions + sum of labels + smooth), over the batch.
        true_positives, total = (
            (x * valid[:, None]).sum((0, 2, 3)) for x in (p * one_hot, p + one_hot)
        )
        dice = (2 * true_positives + 1e-5) / (total + 1e-5)
        expected += weight * (np.mean(-((1 - p_t) ** 2) * np.log(p_t)) + 1 - dice[1:].mean())
    found = jax.jit(recipes["segmentation_loss"])([jnp.asarray(z) for z in scores], labels)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_sigmoid_classifiers(recipes):
    logits, labels = rng.normal(0, 3, (4, 4)), rng.uniform(0, 1, (4, 4))
    log_likelihood = labels * np.log(sigmoid(logits)) + (1 - labels) * np.log(sigmoid(-logits))
    found = recipes["sigmoid_head_loss"](logits, labels)
    np.testing.assert_allclose(found, -log_likelihood.sum(-1).mean(), rtol=1e-9)
    signs = 2 * np.eye(4) - 1
    expected = -np.log(sigmoid(signs * logits)).sum(-1).mean()
    np.testing.assert_allclose(recipes["siglip_loss"](logits), expected, rtol=1e-9)
    bias = recipes["head_bias"](jax.random.key(0), (1,))
    np.testing.assert_allclose(bias, -10, atol=0.01)
