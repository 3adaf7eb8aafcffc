"""Dense object detection with a focal loss: boxes, anchors, matching and RetinaNet's loss."""

from focal_jax.detection.anchors import pyramid_anchors as pyramid_anchors
from focal_jax.detection.boxes import (
    box_iou as box_iou,
    decode_boxes as decode_boxes,
    encode_boxes as encode_boxes,
)
from focal_jax.detection.loss import (
    RetinaNetLoss as RetinaNetLoss,
    retinanet_loss as retinanet_loss,
)
from focal_jax.detection.matching import (
    BACKGROUND as BACKGROUND,
    IGNORED as IGNORED,
    match_anchors as match_anchors,
)

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
