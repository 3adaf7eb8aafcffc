"""Detect digits with a trained network, and compute the average precision of COCO."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from pycocotools import coco, cocoeval

from examples.retinanet_digits.data import CLASSES, SIZE, Canvases
from examples.retinanet_digits.model import RetinaNet, anchors
from focal_jax.detection import box_iou, decode_boxes

CANDIDATES = 100  # per image, before non-maximum suppression
MAX_IOU = 0.5  # of two detections of the same class
BATCH = 50

# pycocotools prints its progress. Redirecting sys.stdout would redirect it in all threads.
coco.print = cocoeval.print = lambda *words, **options: None


class Detections(NamedTuple):
    """The detections of each image, sorted by falling scores."""

    boxes: Array  # [N, CANDIDATES, 4]
    classes: Array  # [N, CANDIDATES]
    scores: Array  # [N, CANDIDATES]; 0 for suppressed detections


@jax.jit
def suppress(boxes: Array, classes: Array, scores: Array) -> Array:
    """Return the scores, which are sorted, with 0 for detections that repeat a higher one."""
    overlaps = (box_iou(boxes, boxes) > MAX_IOU) & (classes[:, None] == classes[None])
    index = jnp.arange(len(boxes))

    def suppress_by(i, valid):
        return valid & ~(valid[i] & overlaps[i] & (index > i))

    valid = lax.fori_loop(0, len(boxes), suppress_by, scores > 0)
    return jnp.where(valid, scores, 0)


def _detect(logits: Array, offsets: Array) -> Detections:
    best, index = lax.top_k(logits.ravel(), CANDIDATES)
    anchor, classes = jnp.divmod(index, CLASSES)
    boxes = decode_boxes(offsets[anchor], anchors()[anchor]).clip(0, SIZE)
    return Detections(boxes, classes, suppress(boxes, classes, nnx.sigmoid(best)))


@nnx.jit
def _predict(model: RetinaNet, images: Array) -> tuple[Array, Array, Detections]:
    logits, offsets = model(images)
    return logits, jax.vmap(_detect)(logits, offsets)


def predict(model: RetinaNet, images: np.ndarray) -> tuple[np.ndarray, Detections]:
    """Return the class logits `[N, A, CLASSES]` and the detections of the images."""
    parts = [_predict(model, images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


_jitted_iou = jax.jit(box_iou)  # called once per image


def correct(
    rows: np.ndarray, boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return which detections of an image are correct, and which annotations are detected.

    In the order of falling scores, each detection is matched to at most one annotation of its
    class with an IoU of at least 0.5.
    """
    overlaps = np.array(_jitted_iou(boxes, rows[:, :4]))
    overlaps[classes[:, None] != rows[None, :, 4]] = 0
    is_correct, is_detected = np.zeros(len(boxes), bool), np.zeros(len(rows), bool)
    for i in np.argsort(-scores, kind="stable"):
        best = np.argmax(np.where(is_detected, 0, overlaps[i]))
        if scores[i] > 0 and not is_detected[best] and overlaps[i, best] >= MAX_IOU:
            is_correct[i] = is_detected[best] = True
    return is_correct, is_detected


def _coco_box(box: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = box.tolist()
    return [x1, y1, x2 - x1, y2 - y1]


def average_precision(data: Canvases, detections: Detections) -> dict[str, float]:
    """Return AP, AP50 and AP75, computed by pycocotools."""
    truth, results = [], []
    for image, (rows, *columns) in enumerate(zip(data.annotations, *detections)):
        for *box, label in rows[rows[:, 4] >= 0]:
            x, y, w, h = _coco_box(np.array(box))
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        for box, label, score in zip(*columns):
            if score > 0:
                results.append(
                    {
                        "image_id": image,
                        "category_id": int(label),
                        "bbox": _coco_box(box),
                        "score": float(score),
                    }
                )
    if not results:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    ground_truth = coco.COCO()
    ground_truth.dataset = {
        "images": [{"id": i} for i in range(len(data.images))],
        "categories": [{"id": c} for c in range(CLASSES)],
        "annotations": truth,
    }
    ground_truth.createIndex()
    evaluation = cocoeval.COCOeval(ground_truth, ground_truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(zip(("AP", "AP50", "AP75"), evaluation.stats.tolist()))
