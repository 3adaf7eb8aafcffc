"""Boxes, anchors, matching and the RetinaNet loss."""

import json
import logging
import re
from functools import partial
from pathlib import Path

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import NOT_AN_ARRAY, NOT_AN_OPTION, assert_errors_name
from hypothesis import given, settings, strategies as st
from jax.sharding import Mesh, PartitionSpec as P

import focal_jax
from focal_jax.detection import (
    BACKGROUND,
    IGNORED,
    RetinaNetLoss,
    box_iou,
    decode_boxes,
    encode_boxes,
    match_anchors,
    pyramid_anchors,
    retinanet_loss,
)
from focal_jax.detection.loss import carry_best, gather_best
from focal_jax.detection.matching import prepare
from focal_jax.engine.platform import forced_form


def test_padding_rows_of_nan_do_not_trigger_debug_nans_in_eager_calls():
    anchors = np.float32([[0, 0, 9, 9], [5, 5, 20, 20]])
    annotations = np.float32([[0, 0, 10, 10, 1], [*[np.nan] * 4, -1]])
    with jax.debug_nans(True):
        for force_match in (False, True):
            match_anchors(anchors, annotations, force_match=force_match)
            logits, offsets = jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 4))
            options = {"force_match": force_match, "ignored": np.array([[False, False]])}
            retinanet_loss(logits, offsets, anchors, annotations[None], **options)


GOLDEN = json.loads((Path(__file__).parent / "golden" / "retinanet.json").read_text())
IMAGES, ANCHORS, ROWS, CLASSES = 3, 16, 4, 3


def unit_vectors(loss: RetinaNetLoss):
    """Return the cotangents that select the classification and the regression loss."""
    one, zero = (jax.tree.map(fill, loss) for fill in (jnp.ones_like, jnp.zeros_like))
    return (
        RetinaNetLoss(one.classification, zero.regression),
        RetinaNetLoss(zero.classification, one.regression),
    )


STATIC = ("alpha", "gamma", "positive_iou", "negative_iou", "smooth_l1_beta")
STATIC += ("empty_images", "normalization")
# Without jit every operation compiles alone, which takes minutes.
pytestmark = pytest.mark.quick
loss_of = jax.jit(retinanet_loss, static_argnames=STATIC)
matches_of = jax.jit(match_anchors, static_argnames=("positive_iou", "negative_iou", "force_match"))
iou_of, encode, decode = map(jax.jit, (box_iou, encode_boxes, decode_boxes))


def _loss_and_gradients(class_logits, box_regression, anchors, annotations, **options):
    """Return the loss, d classification / d logits and d regression / d offsets."""
    loss, pullback = jax.vjp(
        lambda z, r: retinanet_loss(z, r, anchors, annotations, **options),
        class_logits,
        box_regression,
    )
    classification_grads, regression_grads = map(pullback, unit_vectors(loss))
    return loss, classification_grads[0], regression_grads[1]


loss_and_gradients = jax.jit(_loss_and_gradients, static_argnames=STATIC)
all_matches = jax.jit(jax.vmap(match_anchors, in_axes=(None, 0)))
close = partial(np.testing.assert_allclose, rtol=2e-6)


# ---------------------------------------------------------------- reference with loops


def loop_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / max(areas[0] + areas[1] - both, 1e-8)


def loop_image(logits, offsets, anchors, annotations, empty_images):
    """Return the two sums of losses of an image, and its number of positive anchors."""
    annotations = [row for row in annotations if row[4] != -1]
    classification, regression, positives = 0.0, 0.0, 0
    if not annotations and empty_images == "skip":
        return classification, regression, positives
    for z, offset, anchor in zip(logits, offsets, anchors):
        ious = [loop_iou(anchor, row) for row in annotations]
        best = max(ious, default=0.0)
        if 0.4 <= best < 0.5:
            continue
        target = None
        if best >= 0.5:
            x1, y1, x2, y2, target = annotations[ious.index(best)]
            positives += 1
            side = [anchor[2] - anchor[0], anchor[3] - anchor[1]]
            wanted = [
                ((x1 + x2) / 2 - (anchor[0] + anchor[2]) / 2) / side[0] / 0.1,
                ((y1 + y2) / 2 - (anchor[1] + anchor[3]) / 2) / side[1] / 0.1,
                np.log(max(x2 - x1, 1) / side[0]) / 0.2,
                np.log(max(y2 - y1, 1) / side[1]) / 0.2,
            ]
            for error in np.abs(np.subtract(offset, wanted)):
                regression += 4.5 * error**2 if error <= 1 / 9 else error - 0.5 / 9
        for c, x in enumerate(z):
            p = 1 / (1 + np.exp(-x))
            if c == target:
                classification -= 0.25 * (1 - p) ** 2 * np.log(p)
            else:
                classification -= 0.75 * p**2 * np.log(1 - p)
    return classification, regression, positives


def loop_loss(class_logits, box_regression, anchors, annotations, empty_images, normalization):
    images = [
        loop_image(*image, empty_images)
        for image in zip(class_logits, box_regression, [anchors] * len(annotations), annotations)
    ]
    if normalization == "image":
        return (
            np.mean([c / max(1, n) for c, _, n in images]),
            np.mean([r / max(1, 4 * n) for _, r, n in images]),
        )
    c, r, n = map(sum, zip(*images))
    return c / max(1, n), r / max(1, 4 * n)


@st.composite
def batches(draw):
    """Draw logits, offsets, anchors and annotations of fixed shapes, with matches and padding."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    corners = rng.uniform(0, 24, (ANCHORS, 2))
    anchors = np.concatenate([corners, corners + rng.uniform(4, 16, (ANCHORS, 2))], 1)
    annotations = np.full((IMAGES, ROWS, 5), -1.0)
    for image, row in np.ndindex(IMAGES, ROWS):
        if draw(st.booleans()):
            corners = anchors[rng.integers(ANCHORS)] + rng.normal(0, 1, 4)
            annotations[image, row, :4] = np.sort(corners.reshape(2, 2), 0).ravel()
            annotations[image, row, 4] = rng.integers(CLASSES)
    logits = rng.normal(0, 3, (IMAGES, ANCHORS, CLASSES))
    return logits, rng.normal(0, 1, (IMAGES, ANCHORS, 4)), anchors, annotations


@pytest.fixture(scope="module")
def batch():
    """Return a batch of images with 3, 0 and 1 annotations."""
    rng = np.random.default_rng(0)
    anchors = np.asarray(pyramid_anchors((32, 32), levels=(3, 4), scales=(0.25, 0.5), ratios=(1,)))
    annotations = np.full((3, 4, 5), -1.0)
    annotations[0, [0, 1, 3]] = [[1, 1, 9, 8, 0], [10, 9, 26, 25, 2], [16, 16, 25, 24, 1]]
    annotations[2, 2] = [7, 0, 16, 8, 1]
    logits = rng.normal(0, 3, (3, len(anchors), 3))
    offsets = rng.normal(0, 1, (3, len(anchors), 4))
    return tuple(jnp.asarray(x, jnp.float32) for x in (logits, offsets, anchors, annotations))


# ---------------------------------------------------------------- the loss


@pytest.mark.quick(False)
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", GOLDEN)
def test_loss_and_gradients_match_recorded_values(case):
    inputs = [
        jnp.asarray(case[name])
        for name in ("class_logits", "box_regression", "anchors", "annotations")
    ]
    options = {"alpha": case["alpha"], "gamma": case["gamma"], "empty_images": "skip"}
    loss, class_grad, box_grad = jax.jit(partial(_loss_and_gradients, **options))(*inputs)
    # The original clamps probabilities at 1e-4, which changes a few tiny gradients to 0.
    np.testing.assert_allclose(loss.classification, case["classification_loss"], rtol=1e-8)
    np.testing.assert_allclose(loss.regression, case["regression_loss"], rtol=1e-8)
    np.testing.assert_allclose(class_grad, case["class_logits_grad"], atol=1e-9)
    np.testing.assert_allclose(box_grad, case["box_regression_grad"], atol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", GOLDEN)
def test_losses_of_each_image_match_recorded_values(case):
    logits, offsets, anchors, annotations = (
        jnp.asarray(case[name])
        for name in ("class_logits", "box_regression", "anchors", "annotations")
    )
    matches = all_matches(anchors, annotations)
    assert jnp.sum(matches >= 0, 1).tolist() == case["num_positives"]

    def image_loss(logits, offsets, annotations):
        return retinanet_loss(
            logits[None], offsets[None], anchors, annotations[None], empty_images="skip"
        )

    loss = jax.jit(jax.vmap(image_loss))(logits, offsets, annotations)
    np.testing.assert_allclose(loss.classification, case["classification_loss_per_image"], 1e-8)
    np.testing.assert_allclose(loss.regression, case["regression_loss_per_image"], 1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("normalization", ["image", "batch"])
@pytest.mark.parametrize("empty_images", ["background", "skip"])
@given(batches())
def test_loss_matches_loops(empty_images, normalization, inputs):
    loss, *_ = loss_and_gradients(
        *map(jnp.asarray, inputs), empty_images=empty_images, normalization=normalization
    )
    np.testing.assert_allclose(loss, loop_loss(*inputs, empty_images, normalization), rtol=1e-9)


@given(batches())
@settings(max_examples=10)
def test_padding_and_order_of_annotations_have_no_effect(inputs):
    logits, offsets, anchors, annotations = (jnp.asarray(x, jnp.float32) for x in inputs)
    loss = loss_and_gradients(logits, offsets, anchors, annotations)
    padding = jnp.full((IMAGES, 2, 5), jnp.nan).at[..., 4].set(-1)
    shuffled = jnp.concatenate([padding, annotations[:, ::-1]], 1)
    jax.tree.map(close, loss, loss_and_gradients(logits, offsets, anchors, shuffled))


def test_empty_images(batch):
    logits, offsets, anchors, annotations = batch
    empty = jnp.full_like(annotations, -1)
    skipped, *gradients = loss_and_gradients(logits, offsets, anchors, empty, empty_images="skip")
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), (skipped, gradients))
    counted, class_grad, box_grad = loss_and_gradients(logits, offsets, anchors, empty)
    assert counted.regression == 0
    assert jnp.all(box_grad == 0)
    assert jnp.all(class_grad > 0)
    # Without rows the result is the same as with rows of padding.
    no_rows = loss_and_gradients(logits, offsets, anchors, annotations[:, :0])
    jax.tree.map(close, no_rows, (counted, class_grad, box_grad))


def test_skipped_image_counts_in_the_mean_over_images(batch):
    logits, offsets, anchors, annotations = batch
    skipped = loss_of(*batch, empty_images="skip")
    others = jnp.array([0, 2])
    without = loss_of(logits[others], offsets[others], anchors, annotations[others])
    np.testing.assert_allclose(skipped, jnp.stack(without) * 2 / 3, rtol=1e-6)


def test_empty_batch(batch):
    logits, offsets, anchors, annotations = (x[:0] for x in batch)
    for normalization in ("image", "batch"):
        loss, *gradients = loss_and_gradients(
            logits, offsets, batch[2], annotations, normalization=normalization
        )
        assert loss == (0, 0)
        assert [x.shape for x in gradients] == [logits.shape, offsets.shape]
    assert loss_of(batch[0][:, :0], batch[1][:, :0], anchors, batch[3]) == (0, 0)


def test_boxes_and_anchors_without_area_give_finite_results(batch):
    logits, offsets, anchors, annotations = batch
    anchors = anchors.at[:3].set(jnp.array([[5.0, 5, 5, 5], [5, 5, 9, 5], [9, 9, 5, 5]]))
    degenerate = jnp.array([[5.0, 5, 5, 5, 0], [5, 5, 5, 30, 1], [2, 30, 30, 30, 2]])
    annotations = annotations.at[1, :3].set(degenerate)
    results = [
        loss_and_gradients(logits, offsets, anchors, annotations, normalization=normalization)
        for normalization in ("image", "batch")
    ]
    assert jax.tree.all(jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), results))
    # Also if every anchor is positive.
    results = loss_and_gradients(
        logits, offsets, anchors, annotations, positive_iou=0.0, negative_iou=0.0
    )
    assert jax.tree.all(jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), results))


def test_predictions_of_unmatched_anchors_are_ignored(batch):
    logits, offsets, anchors, annotations = batch
    matches = all_matches(anchors, annotations)
    assert {BACKGROUND, IGNORED} < set(matches.ravel().tolist())
    with_nan = (
        jnp.where((matches == IGNORED)[..., None], jnp.nan, logits),
        jnp.where((matches < 0)[..., None], jnp.nan, offsets),
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        loss_and_gradients(*with_nan, anchors, annotations),
        loss_and_gradients(*batch),
    )


@pytest.mark.parametrize("row", [2, 0])  # a row that is matched, and a row that is not
@pytest.mark.parametrize(
    ("column", "value"),
    [(4, -2.0), (4, 3.0), (4, -0.5), (4, 1.7), (4, jnp.nan), (0, jnp.nan), (3, jnp.inf)]
    + [(0, 600.0), (1, 600.0), (2, -1.0), (3, -1.0)],  # x2 < x1 or y2 < y1
)
def test_invalid_annotation_makes_its_image_nan(batch, row, column, value):
    logits, offsets, anchors, annotations = batch
    far = annotations.at[2, 0].set(jnp.array([500.0, 500, 508, 508, 1]))
    loss, class_grad, box_grad = loss_and_gradients(
        logits, offsets, anchors, far.at[2, row, column].set(value)
    )
    valid, valid_class_grad, valid_box_grad = loss_and_gradients(logits, offsets, anchors, far)
    assert all(jnp.isfinite(x) for x in valid)
    assert all(jnp.isnan(x) for x in loss)
    assert jnp.any(jnp.isnan(class_grad[2]))
    np.testing.assert_array_equal(class_grad[:2], valid_class_grad[:2])
    np.testing.assert_array_equal(box_grad[:2], valid_box_grad[:2])


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_smooth_l1_beta(batch, beta):
    logits, offsets, anchors, annotations = batch
    matches = matches_of(anchors, annotations[2])
    wanted = encode(jnp.tile(annotations[2, 2:3, :4], (len(anchors), 1)), anchors)
    error = jnp.abs(offsets[2] - wanted)[matches >= 0]
    smooth = jnp.where(error < beta, error**2 / (2 * beta), error - beta / 2)
    loss = loss_of(*(x[2:] for x in (logits, offsets)), anchors, annotations[2:])
    other = loss_of(
        *(x[2:] for x in (logits, offsets)), anchors, annotations[2:], smooth_l1_beta=beta
    )
    assert other.classification == loss.classification
    np.testing.assert_allclose(other.regression, smooth.mean(), rtol=1e-6)


def test_alpha_and_gamma(batch):
    plain = loss_of(*batch, alpha=None, gamma=0.0)
    halved = jax.jit(lambda gamma: retinanet_loss(*batch, alpha=0.5, gamma=gamma))(jnp.zeros(()))
    np.testing.assert_allclose(halved.classification, plain.classification / 2, rtol=1e-6)
    slope = jax.jit(jax.grad(lambda alpha: retinanet_loss(*batch, alpha=alpha).classification))(
        0.25
    )
    low, high = (loss_of(*batch, alpha=alpha).classification for alpha in (0.0, 1.0))
    np.testing.assert_allclose(slope, high - low, rtol=1e-5)


def test_class_loss_option(batch):
    named = partial(focal_jax.sigmoid_focal_loss, alpha=0.25, gamma=2.0)
    same = jax.jit(partial(retinanet_loss, class_loss=named))
    np.testing.assert_array_equal(same(*batch), loss_of(*batch))
    logits, offsets, anchors, annotations = (x[2:] if i != 2 else x for i, x in enumerate(batch))
    matches = matches_of(anchors, annotations[0])
    classes = jnp.where(matches >= 0, annotations[0, matches, 4], -1)
    labels = classes[:, None] == jnp.arange(3.0)[None]
    losses = focal_jax.asymmetric_loss(logits[0], labels)
    losses = jnp.where((matches == IGNORED)[:, None], 0, losses)
    other = jax.jit(partial(retinanet_loss, class_loss="asymmetric_loss"))
    loss = other(logits, offsets, anchors, annotations)
    wanted = losses.sum() / max(1, int(jnp.sum(matches >= 0)))
    np.testing.assert_allclose(loss.classification, wanted, rtol=1e-6)


def losses_by_parts(logits, offsets, anchors, annotations, ignored, weights, min_side):
    """Return the losses of one image with `force_match`, from the public parts and loops."""
    real = annotations[~ignored & (annotations[:, 4] != -1)]
    match = np.array(match_anchors(anchors, real, force_match=True))
    for i, (x1, y1, x2, y2) in enumerate(anchors):
        for a1, b1, a2, b2, _ in annotations[ignored]:
            inside = max(min(x2, a2) - max(x1, a1), 0) * max(min(y2, b2) - max(y1, b1), 0)
            if match[i] < 0 and inside >= 0.5 * (x2 - x1) * (y2 - y1):
                match[i] = IGNORED
    positive = match >= 0
    labels = positive[:, None] & (real[match, 4:] == np.arange(logits.shape[1]))
    losses = np.asarray(focal_jax.sigmoid_focal_loss(logits, labels, alpha=0.25))
    targets = encode_boxes(real[match, :4], anchors, weights=weights, min_side=min_side)
    error = np.abs(offsets - np.asarray(targets))[positive]
    smooth_l1 = np.where(error <= 1 / 9, 4.5 * error**2, error - 0.5 / 9)
    count = positive.sum()
    return losses[match != IGNORED].sum() / max(count, 1), smooth_l1.sum() / max(4 * count, 1)


@pytest.mark.parametrize("transformation", [lambda loss: loss, jax.jit])
def test_options_of_the_matching_equal_the_parts(transformation):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 30, (60, 2))
    anchors = np.concatenate([corners, corners + rng.uniform(3, 12, (60, 2))], 1).astype("f")
    boxes = [[0, 0, 9, 9, 1], [20, 20, 20.2, 31, 0], [10, 10, 25, 25, 2], [28, 2, 39, 12, 0]]
    annotations = np.array([*boxes, [-1] * 5], np.float32)
    ignored = np.array([False, False, True, False, False])
    logits, offsets = rng.normal(size=(60, 3)).astype("f"), rng.normal(size=(60, 4)).astype("f")
    own = {"weights": (1.0, 2.0, 3.0, 4.0), "min_side": 0.5}
    loss = transformation(partial(retinanet_loss, force_match=True, **own))
    arrays = logits[None], offsets[None], anchors, annotations[None]
    found = loss(*arrays, ignored=ignored[None])
    close(
        found, losses_by_parts(*(logits, offsets, anchors, annotations), ignored, **own), rtol=1e-5
    )
    without = losses_by_parts(logits, offsets, anchors, annotations, ignored & False, **own)
    close(loss(*arrays), without, rtol=1e-5)
    assert not np.allclose(found, without, rtol=1e-2)
    annotations[2, 4] = -1  # now the region is a row of padding
    without = losses_by_parts(logits, offsets, anchors, annotations, ignored & False, **own)
    close(loss(*arrays[:3], annotations[None], ignored=ignored[None]), without, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_inputs_are_computed_in_float32(batch, dtype):
    logits, offsets, anchors, annotations = batch
    logits, offsets = logits.astype(dtype), offsets.astype(dtype)
    loss, class_grad, box_grad = loss_and_gradients(logits, offsets, anchors, annotations)
    wide = loss_and_gradients(
        logits.astype(jnp.float32), offsets.astype(jnp.float32), anchors, annotations
    )
    assert [x.dtype for x in loss] == [jnp.float32] * 2
    assert class_grad.dtype == box_grad.dtype == dtype
    np.testing.assert_array_equal(loss, wide[0])
    np.testing.assert_array_equal(class_grad, wide[1].astype(dtype))


def test_integer_boxes(batch):
    logits, offsets, anchors, annotations = batch
    integer = loss_of(logits, offsets, anchors.astype(int), annotations.astype(int))
    np.testing.assert_array_equal(integer, loss_of(logits, offsets, anchors, annotations))


# ---------------------------------------------------------------- several devices

DEVICES = 4


@pytest.fixture(scope="module")
def uneven():
    """Return a batch for four devices with different numbers of positive anchors."""
    rng = np.random.default_rng(1)
    anchors = np.asarray(pyramid_anchors((32, 32), levels=(3,), scales=(0.5,), ratios=(0.5, 1)))
    annotations = np.full((2 * DEVICES, 2, 5), -1.0)
    for image, row in [(2, 0), (3, 1), (4, 0), (6, 0), (6, 1), (7, 0)]:
        annotations[image, row, :4] = anchors[rng.integers(len(anchors))] + rng.normal(0, 0.5, 4)
        annotations[image, row, 4] = rng.integers(2)
    logits = rng.normal(0, 2, (2 * DEVICES, len(anchors), 2))
    offsets = rng.normal(0, 1, (2 * DEVICES, len(anchors), 4))
    return tuple(jnp.asarray(x, jnp.float32) for x in (logits, offsets, anchors, annotations))


@pytest.mark.parametrize("normalization", ["image", "batch"])
@pytest.mark.parametrize("mapping", ["pmap", "vmap", "shard_map", "shard_map, checked"])
def test_pmean_over_devices_equals_the_loss_on_one_device(uneven, mapping, normalization):
    logits, offsets, anchors, annotations = uneven

    def total(scale, logits, offsets, annotations, axis_name=None):
        loss = retinanet_loss(
            scale * logits,
            scale * offsets,
            anchors,
            annotations,
            normalization=normalization,
            axis_name=axis_name,
        )
        return loss.classification + 3 * loss.regression

    on_a_device = partial(total, axis_name="devices")
    scale, batch = jnp.ones(()), (logits, offsets, annotations)
    if mapping in ("pmap", "vmap"):

        def mean(*shard):
            return jax.lax.pmean(jax.value_and_grad(on_a_device)(*shard), "devices")

        transform = jax.pmap if mapping == "pmap" else jax.vmap
        mapped = transform(mean, axis_name="devices", in_axes=(None, 0, 0, 0))
        split = [x.reshape(DEVICES, 2, *x.shape[1:]) for x in batch]
        result = jax.tree.map(lambda x: x[0], jax.jit(mapped)(scale, *split))
    else:
        mapped = jax.shard_map(
            lambda *shard: jax.lax.pmean(on_a_device(*shard), "devices"),
            mesh=Mesh(np.array(jax.devices()[:DEVICES]), ("devices",)),
            in_specs=(P(), P("devices"), P("devices"), P("devices")),
            out_specs=P(),
            check_vma=mapping.endswith("checked"),
        )
        result = jax.jit(jax.value_and_grad(mapped))(scale, *batch)
    expected = jax.jit(jax.value_and_grad(total))(scale, *batch)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), result, expected)


# ---------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 1e20, 1e20],
        [1e20, 1e20, 2e20, 2e20],
        [0, 0, np.inf, 5],
        [-np.inf, -np.inf, np.inf, np.inf],
        [-3e38, -3e38, 3e38, 3e38],
        [1, 2, 1e30, 3],
    ],
)
def test_huge_box_overlaps_itself_and_no_distant_box(box):
    iou = box_iou([box, [0, 0, 4, 4]], [box, [10, 10, 14, 14]])
    np.testing.assert_allclose(iou, [[1, 0], [0, 0]], atol=1e-9)
    assert match_anchors([box], [[*box, 1]]).tolist() == [0]


def test_box_at_infinity_has_no_area():
    assert box_iou([[np.inf] * 4], [[np.inf] * 4, [0, 0, 4, 4]]).tolist() == [[0, 0]]


iou_gradients = jax.jit(jax.grad(lambda a, b: jnp.sum(box_iou(a, b)), argnums=(0, 1)))
coordinates = st.floats(-50, 50, width=32)
boxes = hnp.arrays(np.float32, (5, 4), elements=coordinates)
boxes_with_area = boxes.map(
    lambda x: np.concatenate([x[:, :2], x[:, :2] + 1 + np.abs(x[:, 2:])], 1).astype(np.float32)
)


@given(boxes_with_area, boxes_with_area)
def test_iou_is_symmetric_and_at_most_one(a, b):
    iou = iou_of(a, b)
    np.testing.assert_array_equal(iou, iou_of(b, a).T)
    assert jnp.all((iou >= 0) & (iou <= 1))
    np.testing.assert_array_equal(jnp.diagonal(iou_of(a, a)), 1)
    expected = [[loop_iou(x, y) for y in b.astype(float)] for x in a.astype(float)]
    np.testing.assert_allclose(iou, expected, rtol=1e-4, atol=1e-6)


@given(boxes, boxes)
def test_iou_and_its_gradient_are_finite_for_any_boxes(a, b):
    assert jnp.all((iou_of(a, b) >= 0) & (iou_of(a, b) <= 1))
    assert all(jnp.all(jnp.isfinite(x)) for x in iou_gradients(a, b))


@given(boxes_with_area, boxes_with_area)
def test_decode_inverts_encode(boxes, anchors):
    offsets = encode(boxes, anchors)
    np.testing.assert_allclose(decode(offsets, anchors), boxes, rtol=1e-4, atol=1e-3)


@given(boxes, boxes)
def test_encodings_are_finite_for_any_boxes(boxes, anchors):
    assert jnp.all(jnp.isfinite(encode(boxes, anchors)))


def test_weights_of_the_box_coder():
    boxes, anchors = [[1.0, 0, 5, 8]], [[0.0, 0, 4, 4]]
    offsets = encode_boxes(boxes, anchors, weights=(1, 1, 1, 1))
    np.testing.assert_allclose(offsets, [[0.25, 0.5, 0, np.log(2)]], rtol=1e-6)
    np.testing.assert_allclose(
        encode_boxes(boxes, anchors), offsets * jnp.array([[10.0, 10, 5, 5]]), rtol=1e-6
    )
    for weights in [(1, 1, 1, 1), (2.0, 3.0, 4.0, 5.0)]:
        offsets = encode_boxes(boxes, anchors, weights=weights)
        np.testing.assert_allclose(
            decode_boxes(offsets, anchors, weights=weights), boxes, rtol=1e-6
        )


@pytest.mark.parametrize("distance", [0, 1e3, 1e5])
def test_offsets_keep_their_digits_far_from_the_origin(distance):
    corners = distance + np.random.default_rng(0).uniform(0, 30, (2, 20, 2))
    sides = np.random.default_rng(1).uniform(2, 40, (2, 20, 2))
    boxes, anchors = np.concatenate([corners, corners + sides], -1).astype(np.float32)
    with jax.enable_x64(True):
        want = encode_boxes(boxes.astype("d"), anchors.astype("d"))
    np.testing.assert_allclose(encode_boxes(boxes, anchors), want, rtol=1e-5, atol=1e-5)


def test_sides_below_min_side_are_replaced():
    anchors = [[0, 0, 1, 1]] * 2
    offsets = encode_boxes([[0.0, 0.0, 0.5, 1.0], [0.5, 0.5, 0.5, 0.5]], anchors)
    np.testing.assert_allclose(offsets, [[-2.5, 0, 0, 0], [0, 0, 0, 0]], atol=1e-6)
    offsets = encode_boxes([[0.0, 0.0, 0.5, 1.0]], anchors[:1], min_side=0.1)
    np.testing.assert_allclose(offsets, [[-2.5, 0, np.log(0.5) / 0.2, 0]], atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_results_have_the_widest_dtype():
    narrow, wide = np.ones((2, 4), np.float16), np.ones((2, 4), np.float64)
    for function in (box_iou, encode_boxes, decode_boxes):
        assert function(narrow, narrow).dtype == np.float32
        assert function(narrow, wide).dtype == np.float64


# ---------------------------------------------------------------- anchors


def test_anchors_of_the_paper():
    anchors = pyramid_anchors((224, 256))
    cells = 28 * 32 + 14 * 16 + 7 * 8 + 4 * 4 + 2 * 2
    assert anchors.shape == (9 * cells, 4)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    sides = anchors[:, 2:] - anchors[:, :2]
    # The nine anchors of the first cell: three ratios times three scales.
    np.testing.assert_allclose(centers[:9], np.full((9, 2), 4), atol=1e-5)
    areas = np.tile(32**2 * np.array([1, 2 ** (2 / 3), 2 ** (4 / 3)]), 3)
    np.testing.assert_allclose(jnp.prod(sides[:9], 1), areas, rtol=1e-5)
    np.testing.assert_allclose(sides[:9, 1] / sides[:9, 0], np.repeat([0.5, 1, 2], 3), rtol=1e-5)
    # The order of cells is row-major, and levels start with the finest.
    np.testing.assert_allclose(centers[9], [12, 4], atol=1e-5)
    np.testing.assert_allclose(centers[9 * 32], [4, 12], atol=1e-5)
    np.testing.assert_allclose(centers[-9:], np.full((9, 2), 192), atol=1e-4)


def test_anchors_match_recorded_values():
    golden = np.asarray(GOLDEN[0]["anchors"])
    anchors = pyramid_anchors((48, 48), levels=(3, 4), scales=(0.25, 0.375), ratios=(1,))
    np.testing.assert_allclose(anchors, golden[: len(anchors)], atol=1e-6)
    assert len(anchors) == 2 * (36 + 9)


def test_last_cell_can_extend_beyond_the_image():
    assert len(pyramid_anchors((17, 16), levels=(4,), scales=(1,), ratios=(1,))) == 2
    assert pyramid_anchors((17, 16), levels=()).shape == (0, 4)


# ---------------------------------------------------------------- matching


def loop_matches(iou, positive, negative, force):
    """Return torchvision's matches of `iou` [A, M], with loops."""
    matches = []
    for row in iou:
        best = int(np.argmax(row))
        forced = force and any(
            row[m] == iou[:, m].max() and row[m] > 0 for m in range(iou.shape[1])
        )
        if row[best] >= positive or forced:
            matches.append(best)
        else:
            matches.append(BACKGROUND if row[best] < negative else IGNORED)
    return matches


@given(batches(), st.sampled_from([(0.5, 0.4), (0.7, 0.3), (0.6, 0.6)]), st.booleans())
def test_matches_agree_with_loops(inputs, thresholds, force):
    _, _, anchors, annotations = inputs
    anchors, annotations = anchors.astype(np.float32), annotations[0].astype(np.float32)
    positive, negative = thresholds
    matches = matches_of(
        anchors, annotations, positive_iou=positive, negative_iou=negative, force_match=force
    )
    assert matches.dtype == jnp.int32
    valid = np.flatnonzero(annotations[:, 4] != -1)
    if not len(valid):
        assert jnp.all(matches == BACKGROUND)
        return
    expected = loop_matches(
        np.asarray(iou_of(anchors, annotations[:, :4]))[:, valid], positive, negative, force
    )
    assert matches.tolist() == [valid[m] if m >= 0 else m for m in expected]


def test_positive_threshold_is_inclusive_and_negative_is_exclusive():
    # The first two IoUs are exactly 1/2 and 2/5.
    anchors = [[0, 0, 10, 5], [0, 0, 10, 4], [0, 0, 10, 3]]
    annotations = [[0, 0, 10, 10, 0]]
    assert match_anchors(anchors, annotations).tolist() == [0, IGNORED, BACKGROUND]


def test_force_match_matches_every_annotation_that_overlaps_an_anchor():
    anchors = [[0, 0, 8, 8], [8, 0, 16, 8], [40, 40, 48, 48]]
    annotations = [[6, 0, 10, 4, 0], [90, 90, 99, 99, 1], [-1] * 5]
    assert match_anchors(anchors, annotations).tolist() == [BACKGROUND] * 3
    # Two anchors have the same IoU with the first annotation. No anchor overlaps the second.
    forced = match_anchors(anchors, annotations, force_match=True)
    assert forced.tolist() == [0, 0, BACKGROUND]


def test_forms_of_the_matching_agree_bit_for_bit():
    rng = np.random.default_rng(2)
    anchors = jnp.asarray(pyramid_anchors((64, 80), levels=(3, 4), scales=(1, 1.3)))
    annotations = np.full((7, 5), -1, np.float32)
    annotations[[0, 2, 3, 5], :4] = anchors[rng.integers(len(anchors), size=4)]
    annotations[3] = annotations[0]  # the same IoU: the first annotation is matched
    annotations[[0, 2, 3, 5], 4] = rng.integers(3, size=4)
    annotations[1, :4] = np.nan  # padding
    anchors, annotations = prepare(anchors, jnp.asarray(annotations))

    def found(anchors, annotations, best_of):
        best = best_of(anchors, annotations)
        return best.iou, best.label, best.corners(annotations)

    results = []
    for form, best_of in (("cpu", gather_best), ("accelerator", gather_best), ("tpu", carry_best)):
        with forced_form(form):
            results.append(jax.jit(partial(found, best_of=best_of))(anchors, annotations))
    first, *others = results
    iou, *_ = first
    overlaps = iou > 0
    assert 0 < jnp.sum(overlaps) < len(iou)
    for other in others:
        for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(other)):
            np.testing.assert_array_equal(x[overlaps], y[overlaps])
        np.testing.assert_array_equal(iou, other[0])
    matches = match_anchors(anchors, annotations)
    assert not jnp.any(matches == 3)
    assert jnp.any(matches == 0)


def test_forms_of_the_matching_are_different_programs():
    anchors, annotations = jnp.zeros((4, 4)), jnp.zeros((2, 5))
    programs = []
    for form in ("cpu", "accelerator", "tpu"):
        with forced_form(form):
            loss = partial(retinanet_loss, jnp.zeros((1, 4, 2)), jnp.zeros((1, 4, 4)))
            programs.append(str(jax.make_jaxpr(loss)(anchors, annotations[None])))
    _, accelerator, tpu = programs
    assert ["scan[" in program for program in programs] == [True, False, False]
    assert "gather[" in accelerator
    assert "gather[" not in tpu


def test_matching_without_annotations_or_anchors():
    assert match_anchors([[0, 0, 8, 8]], np.zeros((0, 5))).tolist() == [BACKGROUND]
    empty = match_anchors(np.zeros((0, 4)), [[0, 0, 8, 8, 1]], force_match=True)
    assert empty.shape == (0,)


@pytest.mark.parametrize("box", [[8, 0, 0, 8], [0, 8, 8, 0], [8, 8, 0, 0], [0, np.nan, 8, 8]])
def test_a_box_with_a_nan_or_corners_out_of_order_matches_nothing(box):
    annotations = np.array([[*box, 1], [0, 0, 8, 4, 0]])
    matches = matches_of(
        np.array([[0.0, 0, 8, 8]]), annotations, positive_iou=0.0, negative_iou=0.0
    )
    assert matches.tolist() == [1]


@pytest.mark.parametrize("form", ["cpu", "accelerator"])
def test_an_anchor_with_a_nan_changes_no_other_anchor(form):
    anchors = np.array([[0.0, 0, 8, 8], [8, 0, 16, 8], [0, np.nan, 8, 8], [40, 40, 48, 48]])
    annotations = np.array([[6.0, 0, 10, 4, 0], [41, 41, 48, 48, 1]])
    with forced_form(form):
        forced = jax.jit(partial(match_anchors, force_match=True))(anchors, annotations)
        assert forced.tolist() == [0, 0, BACKGROUND, 1]
        assert jax.jit(partial(match_anchors))(anchors, annotations).tolist() == [-1, -1, -1, 1]


def test_eager_calls_compile_once(batch):
    _, _, anchors, annotations = batch

    def calls():
        match_anchors(anchors, annotations[0])
        jax.vmap(gather_best, (None, 0))(anchors, annotations)  # as in the loss

    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("jax")
    calls()
    with jax.log_compiles():
        logger.addHandler(handler)
        try:
            calls()
        finally:
            logger.removeHandler(handler)
    assert [x.getMessage() for x in records if "ompil" in x.getMessage()] == []


# ---------------------------------------------------------------- unit of the annotations


def test_normalized_annotations_beside_anchors_in_pixels_are_a_warning():
    anchors = np.array([[0.0, 0, 100, 100], [20, 20, 60, 60]])
    boxes = np.array([[[0.1, 0.2, 0.6, 1.0, 1], [-1] * 5], [[-1] * 5] * 2])
    loss = partial(retinanet_loss, jnp.zeros((2, 2, 3)), jnp.zeros((2, 2, 4)))
    with pytest.warns(UserWarning, match="annotations: got coordinates of at most 1, wanted pix"):
        jax.eval_shape(lambda: loss(anchors, boxes))
    with pytest.warns(UserWarning, match="annotations: got coordinates of at most 1, wanted pix"):
        match_anchors(anchors, jnp.asarray(boxes[0]))
    # Other calls give no warning. Warnings are errors here.
    match_anchors(anchors, boxes[1])
    match_anchors(anchors / 100, boxes[0])
    match_anchors(anchors, boxes[0] + np.array([0, 0, 1, 0, 0]))
    jax.eval_shape(match_anchors, anchors, boxes[0])


# ---------------------------------------------------------------- errors


def shapes(logits=(2, 5, 3), regression=(2, 5, 4), anchors=(5, 4), annotations=(2, 1, 5)):
    return tuple(jnp.zeros(shape) for shape in (logits, regression, anchors, annotations))


@pytest.mark.parametrize(
    ("name", "inputs", "options"),
    [
        ("class_logits", shapes(logits=(5, 3)), {}),
        ("class_logits", (jnp.zeros((2, 5, 3), int), *shapes()[1:]), {}),
        ("box_regression", shapes(regression=(2, 4, 4)), {}),
        ("box_regression", (shapes()[0], jnp.zeros((2, 5, 4), int), *shapes()[2:]), {}),
        ("anchors", shapes(anchors=(2, 5, 4)), {}),
        ("anchors", (*shapes()[:2], jnp.zeros((5, 4), complex), shapes()[3]), {}),
        ("annotations", shapes(annotations=(2, 1, 4)), {}),
        ("annotations", shapes(annotations=(1, 1, 5)), {}),
        ("annotations", shapes(annotations=(2, 5)), {}),
        ("annotations", (*shapes()[:3], jnp.zeros((2, 1, 5), complex)), {}),
        ("empty_images", shapes(), {"empty_images": "ignore"}),
        ("normalization", shapes(), {"normalization": "valid"}),
        ("smooth_l1_beta", shapes(), {"smooth_l1_beta": 0.0}),
        ("smooth_l1_beta", shapes(), {"smooth_l1_beta": np.inf}),
        ("smooth_l1_beta", shapes(), {"smooth_l1_beta": np.nan}),
        ("smooth_l1_beta", shapes(), {"smooth_l1_beta": "1"}),
        ("smooth_l1_beta", shapes(), {"smooth_l1_beta": jnp.ones(())}),
        ("negative_iou", shapes(), {"negative_iou": 0.6}),
        ("negative_iou", shapes(), {"negative_iou": None}),
        ("positive_iou", shapes(), {"positive_iou": -1}),
        ("positive_iou", shapes(), {"positive_iou": 1.5}),
        ("positive_iou", shapes(), {"positive_iou": np.nan}),
        ("force_match", shapes(), {"force_match": 1}),
        ("weights", shapes(), {"weights": (1.0, 1.0)}),
        ("min_side", shapes(), {"min_side": 0}),
        ("ignored", shapes(), {"ignored": jnp.zeros((2, 1))}),
        ("ignored", shapes(), {"ignored": jnp.zeros((1, 1), bool)}),
        ("gamma", shapes(), {"gamma": -1.0}),
        ("alpha", shapes(), {"alpha": jnp.zeros(7)}),
        ("class_loss", shapes(), {"class_loss": "softmax_focal_loss"}),
        ("class_loss", shapes(), {"class_loss": ["sigmoid_focal_loss"]}),
        ("class_loss", shapes(), {"class_loss": lambda z, y, where: None}),
        ("gamma", shapes(), {"class_loss": "asymmetric_loss", "gamma": 1.0}),
        ("alpha", shapes(), {"class_loss": "asymmetric_loss", "alpha": jnp.float32(0.25)}),
        ("class_loss", shapes(), {"class_loss": lambda z, y, where: jnp.sum(z, -1)}),
        ("class_loss", shapes(), {"class_loss": lambda z, y, where: z > 0}),
        ("class_logits", (None, *shapes()[1:]), {}),
        ("anchors", (*shapes()[:2], "a", shapes()[3]), {}),
        ("annotations", (*shapes()[:3], None), {}),
    ],
)
def test_errors_of_the_loss_name_the_argument(name, inputs, options):
    with pytest.raises(ValueError, match=rf"\b{name}: got"):
        retinanet_loss(*inputs, **options)


@pytest.mark.parametrize("name", ["positive_iou", "negative_iou", "smooth_l1_beta"])
def test_traced_values_of_static_options_are_errors(name):
    def traced(x):
        return retinanet_loss(*shapes(), **{name: x})

    with pytest.raises(ValueError, match=rf"\b{name}: got"):
        jax.jit(traced)(0.5)


@pytest.mark.parametrize("option", [{"gamma": -1.0}, {"alpha": jnp.zeros(7)}])
def test_options_are_checked_before_the_matching(option, monkeypatch):
    def matching(*_):
        raise AssertionError("anchors were matched")

    monkeypatch.setattr("focal_jax.detection.loss.find_best", matching)
    with pytest.raises(ValueError, match=f"{next(iter(option))}: got"):
        retinanet_loss(*shapes(), **option)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"\ba: got shape", lambda: box_iou(np.zeros(4), np.zeros((2, 4)))),
        (r"\bb: got shape", lambda: box_iou(np.zeros((2, 4)), np.zeros((2, 5)))),
        (r"\bboxes: got shape", lambda: encode_boxes(np.zeros((2, 4)), np.zeros((3, 4)))),
        (r"\boffsets: got shape", lambda: decode_boxes(np.zeros((2, 4)), np.zeros((3, 4)))),
        (r"\bannotations: got shape", lambda: match_anchors(np.zeros((2, 4)), np.zeros((3, 4)))),
        (r"\banchors: got shape", lambda: match_anchors(np.zeros((2, 5)), np.zeros((3, 5)))),
        (r"\bpositive_iou: got", lambda: match_anchors([[0] * 4], [[0] * 5], positive_iou=-1)),
        (r"\bweights: got", lambda: encode_boxes([[0] * 4], [[0] * 4], weights=(1, 1, 1))),
        (r"\bweights: got", lambda: decode_boxes([[0] * 4], [[0] * 4], weights=(1, 1, 0, 1))),
        ("image_shape: got", lambda: pyramid_anchors((0, 8))),
        ("scales: got", lambda: pyramid_anchors((8, 8), scales=(-1,))),
        ("ratios: got", lambda: pyramid_anchors((8, 8), ratios=(0,))),
        ("image_shape: got", lambda: pyramid_anchors((8,))),
        ("image_shape: got", lambda: pyramid_anchors((8, 8, 3))),
        ("image_shape: got", lambda: pyramid_anchors((8.5, 8))),
        ("image_shape: got", lambda: pyramid_anchors((True, 8))),
        ("image_shape: got .* anchors, wanted", lambda: pyramid_anchors((10**9, 10**9))),
        ("levels: got", lambda: pyramid_anchors((8, 8), levels=[3.5])),
        ("levels: got", lambda: pyramid_anchors((8, 8), levels=[100])),
        ("force_match: got 2", lambda: match_anchors([[0] * 4], [[0] * 5], force_match=2)),
        ("min_side: got 0", lambda: encode_boxes([[0] * 4], [[0] * 4], min_side=0)),
        ("min_side: got 1e-39", lambda: encode_boxes([[0] * 4], [[0] * 4], min_side=1e-39)),
    ],
)
def test_errors_of_box_functions_name_the_argument(message, call):
    with pytest.raises(ValueError, match=message):
        call()


_BOX, _ROWS = [[0.0, 0, 4, 4]], [[0.0, 0, 4, 4, 1]]
_FUNCTIONS = {
    box_iou: ({"a": _BOX, "b": _BOX}, {}),
    encode_boxes: ({"boxes": _BOX, "anchors": _BOX}, {"weights": (1, 1, 1, 1), "min_side": 1}),
    decode_boxes: ({"offsets": _BOX, "anchors": _BOX}, {"weights": (1, 1, 1, 1)}),
    match_anchors: (
        {"anchors": _BOX, "annotations": _ROWS},
        {"positive_iou": 0.5, "negative_iou": 0.4, "force_match": False},
    ),
    pyramid_anchors: (
        {},
        {"image_shape": (8, 8), "levels": [3], "scales": [1], "ratios": [1], "center": 0.5}
        | {"whole_pixels": False},
    ),
    retinanet_loss: (
        {
            "class_logits": jnp.zeros((1, 1, 2)),
            "box_regression": jnp.zeros((1, 1, 4)),
            "anchors": _BOX,
            "annotations": [_ROWS],
        },
        {"smooth_l1_beta": 1.0, "empty_images": "skip", "normalization": "batch"},
    ),
}


@pytest.mark.parametrize("function", _FUNCTIONS)
def test_arguments_of_any_type_are_used_or_an_error_that_names_them(function):
    arrays, options = _FUNCTIONS[function]
    invalid = dict.fromkeys(arrays, (*NOT_AN_ARRAY, 3, [1, 2], []))
    invalid |= dict.fromkeys(options, NOT_AN_OPTION)
    for name in {"image_shape", "levels", "scales", "ratios"} & set(options):
        sequences = {str(x) for x in ([], (), np.array([1, 2]))}  # these are valid
        invalid[name] = [x for x in NOT_AN_OPTION if str(x) not in sequences]
        invalid[name] += [[np.nan, 8], [np.inf, 8], [-1, 8], [10**400, 8], 3]
    assert_errors_name(function, arrays | options, invalid)


def test_class_loss_of_any_type_is_used_or_an_error():
    arrays, _ = _FUNCTIONS[retinanet_loss]
    invalid = {"class_loss": (*NOT_AN_OPTION, lambda z, y: z)}
    assert_errors_name(retinanet_loss, arrays | {"class_loss": None}, invalid)


@pytest.mark.parametrize("function", [match_anchors, retinanet_loss])
def test_ragged_annotations_are_an_error_that_says_how_to_pad(function):
    arrays, _ = _FUNCTIONS[function]
    coco = [{"bbox": [1, 2, 3, 4], "category_id": 1}]
    for annotations in ([_ROWS, _ROWS * 2], [jnp.array(_ROWS), jnp.array(_ROWS * 2)], coco, [coco]):
        with pytest.raises(focal_jax.InputError, match=r"^annotations: got .*, wanted .* class -1"):
            function(**arrays | {"annotations": annotations})


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.bfloat16, 256), (np.float16, 2048)])
def test_dtypes_that_cannot_hold_the_classes_are_errors(dtype, limit):
    annotations = jnp.array([[[0, 0, 4, 4, 1]]], dtype)
    for classes in (limit, limit + 1):
        loss = partial(retinanet_loss, jnp.zeros((1, 1, classes)), jnp.zeros((1, 1, 4)), _BOX)
        eager = partial(match_anchors, _BOX, annotations.at[..., 4].set(classes - 1)[0])
        for call in (partial(jax.eval_shape, loss, annotations), eager):
            if classes == limit:
                call()
                continue
            with pytest.raises(focal_jax.InputError, match=rf"annotations: got dtype .*{limit}"):
                call()
    assert jax.eval_shape(loss, annotations.astype(jnp.float32)).classification.shape == ()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.float16, np.float32])
def test_anchors_do_not_depend_on_the_dtype_of_the_options(dtype):
    shape, levels, scales, ratios = (64, 96), (3, 4, 7), (1, 2), (1, 4)
    anchors = pyramid_anchors(shape, levels, scales, ratios)
    arrays = [np.array(x, dtype) for x in (shape, levels, scales, ratios)]
    np.testing.assert_array_equal(pyramid_anchors(*arrays), anchors)


@pytest.mark.parametrize(
    "function",
    [box_iou, encode_boxes, decode_boxes, pyramid_anchors, match_anchors, retinanet_loss],
)
def test_docstrings_have_sections_in_order(function):
    required = ["Example:", "Args:", "Returns:"]
    sections = [*required, "Raises:", "References:"]
    found = re.findall(r"^ *([A-Z]\w+:)$", function.__doc__, re.MULTILINE)
    assert found == [section for section in sections if section in found]
    assert set(required) <= set(found)


def test_unbound_axis_name_is_an_error(batch):
    with pytest.raises(NameError):
        jax.eval_shape(partial(retinanet_loss, normalization="batch", axis_name="nowhere"), *batch)
