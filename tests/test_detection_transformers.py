"""The functions of docs/detection-transformers.md return the numbers of the published formulas."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import run
from scipy.special import expit as sigmoid

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("jax_defaults", "x64")]

CLASS_LOSSES = ["focal", "varifocal", "matchability_aware"]
L, B, Q, C, M = 2, 2, 5, 3, 3
rng = np.random.default_rng(0)
LOGITS, BOXES = rng.normal(0, 2, (L, B, Q, C)), rng.uniform(0.2, 0.6, (L, B, Q, 4))
OBJECTS = rng.uniform(0.2, 0.6, (B, M, 4))
CLASSES = np.array([[2, 0, 2], [1, -1, -1]])  # the second image has one object


@pytest.fixture(scope="module")
def page():
    return run(Path(__file__).parents[1] / "docs" / "detection-transformers.md")


def ious(a, b):
    """Return IoU and generalized IoU of two boxes with center, width and height."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    sides = [(ax - aw / 2, ax + aw / 2, bx - bw / 2, bx + bw / 2)]
    sides.append((ay - ah / 2, ay + ah / 2, by - bh / 2, by + bh / 2))
    inner = np.prod([max(min(q, s) - max(p, r), 0) for p, q, r, s in sides])
    outer = np.prod([max(q, s) - min(p, r) for p, q, r, s in sides])
    union = aw * ah + bw * bh - inner
    return inner / union, inner / union - (outer - union) / outer


def class_loss_of(name, logits, hard, quality):
    """Return the sum of the class losses of one image."""
    p, y = sigmoid(logits), hard.astype(float)
    if name == "focal":
        p_t, weight = np.where(hard, p, 1 - p), np.where(hard, 0.25, 0.75)
        return (weight * (1 - p_t) ** 2 * -np.log(p_t)).sum()
    if name == "varifocal":  # published: alpha * p**gamma * (1 - label) + score
        y, weight = quality, 0.75 * p**2 * (1 - y) + quality
    else:
        y, weight = quality**1.5, np.where(hard, 1, p**1.5)
    return (weight * -(y * np.log(p) + (1 - y) * np.log(1 - p))).sum()


def losses_of(name, logits, boxes, pairs, classes, objects):
    """Return L1 loss, generalized IoU loss and class loss of one image for pairs of indices."""
    hard, quality, of_boxes = np.zeros((len(logits), C), bool), np.zeros((len(logits), C)), 0
    for query, item in pairs:
        iou, giou = ious(boxes[query], objects[item])
        hard[query, classes[item]], quality[query, classes[item]] = True, iou
        of_boxes = of_boxes + np.array([np.abs(boxes[query] - objects[item]).sum(), 1 - giou])
    return np.append(of_boxes, class_loss_of(name, logits, hard, quality))


def best_pairs(logits, boxes, classes, objects):
    """Return the pairs with the smallest cost, found by trying all of them."""
    p = sigmoid(logits)
    of_class = 0.25 * (1 - p) ** 2 * -np.log(p) - 0.75 * p**2 * -np.log(1 - p)

    def cost(query, item):
        l1 = np.abs(boxes[query] - objects[item]).sum()
        giou = ious(boxes[query], objects[item])[1]
        return 2 * of_class[query, classes[item]] + 5 * l1 - 2 * giou

    items = np.flatnonzero(classes >= 0)
    choices = itertools.permutations(range(len(logits)), len(items))
    return min(
        (list(zip(queries, items)) for queries in choices),
        key=lambda pairs: sum(cost(*pair) for pair in pairs),
    )


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_set_loss(page, name):
    expected = 0
    for layer, image in itertools.product(range(L), range(B)):
        args = LOGITS[layer, image], BOXES[layer, image]
        objects = CLASSES[image], OBJECTS[image]
        expected += losses_of(name, *args, best_pairs(*args, *objects), *objects)
    expected = expected @ [5, 2, 2] / 4  # four objects
    function = jax.jit(lambda *args: page["set_loss"](*args, class_loss=page[name]))
    found = function(LOGITS, BOXES, CLASSES, OBJECTS)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_mean_over_devices_is_the_set_loss_of_the_batch(page):
    # The images have different numbers of objects, and each device has one image.
    def local(logits, boxes, classes, objects):
        loss = page["set_loss"](logits, boxes, classes, objects, axis_name="images")
        return jax.lax.pmean(loss, "images")

    batch = LOGITS, BOXES, CLASSES, OBJECTS
    shards = [np.expand_dims(x, 1 + i) for x, i in zip(batch, (1, 1, 0, 0))]
    found = jax.pmap(local, axis_name="images", in_axes=(1, 1, 0, 0))(*shards)
    np.testing.assert_allclose(found, page["set_loss"](*batch), rtol=1e-9)


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_padding_rows_do_not_change_the_set_loss(page, name):
    padded = np.insert(CLASSES, [1, 2], -1, 1), np.insert(OBJECTS, [1, 2], -7, 1)

    def function(logits, boxes, *objects):
        return page["set_loss"](logits, boxes, *objects, class_loss=page[name])

    want, found = (
        jax.value_and_grad(function, (0, 1))(LOGITS, BOXES, *objects)
        for objects in ((CLASSES, OBJECTS), padded)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-9, 1e-12), found, want)


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_denoising_loss(page, name):
    groups = 2
    logits = rng.normal(0, 2, (L, B, groups * 2 * M, C))
    boxes = rng.uniform(0.2, 0.6, (L, B, groups * 2 * M, 4))
    expected = 0
    for layer, image in itertools.product(range(L), range(B)):
        items = np.flatnonzero(CLASSES[image] >= 0)
        pairs = [(2 * M * group + item, item) for group in range(groups) for item in items]
        args = logits[layer, image], boxes[layer, image], pairs, CLASSES[image], OBJECTS[image]
        expected += losses_of(name, *args)
    expected = expected @ [5, 2, 2] / (4 * groups)
    found = page["denoising_loss"](logits, boxes, CLASSES, OBJECTS, groups, class_loss=page[name])
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_gradient_does_not_pass_through_the_quality(page):
    # The IoU is a label: boxes get their gradient from the box losses only.
    def boxes_gradient(name, weights):
        def function(boxes):
            objects = CLASSES, OBJECTS
            return page["set_loss"](LOGITS, boxes, *objects, page[name], weights)

        return jax.grad(function)(BOXES)

    assert not np.any(boxes_gradient("varifocal", (0, 0, 1)))
    assert np.any(boxes_gradient("varifocal", (5, 2, 0)))


def test_edge_loss(page):
    edges, left = rng.normal(size=(4, 4, 7)), rng.integers(6, size=(4, 4))
    weight_left, weight_right = rng.uniform(0, 1, (2, 4, 4))
    iou = jnp.array([0.1, 0.5, 0.9, 0.0])
    log_p = edges - np.log(np.exp(edges).sum(-1, keepdims=True))
    expected = 0
    for k, e in itertools.product(range(4), range(4)):
        expected -= iou[k] * weight_left[k, e] * log_p[k, e, left[k, e]]
        expected -= iou[k] * weight_right[k, e] * log_p[k, e, left[k, e] + 1]
    found = page["edge_loss"](edges, left, weight_left, weight_right, iou, 3)
    np.testing.assert_allclose(found, expected / 3, rtol=1e-9)


def test_gradients_beside_a_padding_row_and_a_predicted_box_without_area(page):
    boxes = np.full((1, 1, 4, 4), 0.5)
    boxes[..., 2:] = 0
    classes, objects = np.array([[1, -1]]), np.array([[[0.5, 0.5, 0.2, 0.2], [0, 0, 0, 0]]])

    def gradient(classes, objects):
        return jax.grad(page["set_loss"], 1)(np.zeros((1, 1, 4, 2)), boxes, classes, objects)

    want = gradient(classes[:, :1], objects[:, :1])
    assert np.all(np.isfinite(want))
    np.testing.assert_allclose(gradient(classes, objects), want, rtol=1e-6)
