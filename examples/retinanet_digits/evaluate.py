"""Find digits with a trained network, and score them as COCO does."""

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

CANDIDATES = 100  # of an image, before non-maximum suppression
MAX_IOU = 0.5  # of two detections of one class
BATCH = 50

# They print their progress; to set sys.stdout aside meanwhile would do so for every thread.
coco.print = cocoeval.print = lambda *words, **options: None


class Detections(NamedTuple):
    """What was found in each image, the surest first."""

    boxes: Array  # [N, CANDIDATES, 4]
    classes: Array  # [N, CANDIDATES]
    scores: Array  # [N, CANDIDATES]; 0: suppressed


@jax.jit
def suppress(boxes: Array, classes: Array, scores: Array) -> Array:
    """Return the scores, which fall from the first, with 0 for what repeats a higher one."""
    repeats = (box_iou(boxes, boxes) > MAX_IOU) & (classes[:, None] == classes[None])
    later = jnp.arange(len(boxes))

    def keep_or_drop(i, kept):
        return kept & ~(kept[i] & repeats[i] & (later > i))

    kept = lax.fori_loop(0, len(boxes), keep_or_drop, scores > 0)
    return jnp.where(kept, scores, 0)


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


_overlaps = jax.jit(box_iou)  # once: many images are judged one by one


def correct(
    rows: np.ndarray, boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return which detections of an image are right, and which of its annotations are found.

    The surest detection first, each finds at most one object, of its class and with an IoU of
    0.5 or more.
    """
    overlaps = np.array(_overlaps(boxes, rows[:, :4]))
    overlaps[classes[:, None] != rows[None, :, 4]] = 0
    right, found = np.zeros(len(boxes), bool), np.zeros(len(rows), bool)
    for i in np.argsort(-scores, kind="stable"):
        best = np.argmax(np.where(found, 0, overlaps[i]))
        if scores[i] > 0 and not found[best] and overlaps[i, best] >= MAX_IOU:
            right[i] = found[best] = True
    return right, found


def _coco_box(box: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = box.tolist()
    return [x1, y1, x2 - x1, y2 - y1]


def average_precision(data: Canvases, found: Detections) -> dict[str, float]:
    """Return AP, AP50 and AP75 by pycocotools."""
    truth, results = [], []
    for image, (rows, *detections) in enumerate(zip(data.annotations, *found)):
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
        for box, label, score in zip(*detections):
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
    known = coco.COCO()
    known.dataset = {
        "images": [{"id": i} for i in range(len(data.images))],
        "categories": [{"id": c} for c in range(CLASSES)],
        "annotations": truth,
    }
    known.createIndex()
    evaluation = cocoeval.COCOeval(known, known.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(zip(("AP", "AP50", "AP75"), evaluation.stats.tolist()))
