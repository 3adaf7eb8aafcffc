"""Dense object detection: boxes, anchors, anchor matching and the RetinaNet loss.

Boxes are `(x1, y1, x2, y2)`. Invalid arguments raise `focal_jax.InputError`.
"""

from focal_jax.detection.anchors import pyramid_anchors
from focal_jax.detection.boxes import box_iou, decode_boxes, encode_boxes
from focal_jax.detection.loss import RetinaNetLoss, retinanet_loss
from focal_jax.detection.matching import BACKGROUND, IGNORED, match_anchors

__all__ = [
    "BACKGROUND",
    "IGNORED",
    "RetinaNetLoss",
    "box_iou",
    "decode_boxes",
    "encode_boxes",
    "match_anchors",
    "pyramid_anchors",
    "retinanet_loss",
]
