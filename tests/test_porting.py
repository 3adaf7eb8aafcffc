"""Every call in the porting guide returns the value of the call of the other library.

The other libraries are not installed, except optax. Their formulas are written here in NumPy and
evaluated in float64.
"""

import itertools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pages import code_blocks, run

import focal_jax

DOCS = Path(__file__).parents[1] / "docs"
GUIDE = "".join((DOCS / page).read_text() for page in ("porting.md", "porting-losses.md"))
IMPORTS = "".join(code_blocks(GUIDE))
ROWS = [  # the call of the other library, and the call of focal_jax
    (original.strip(), call)
    for original, call in re.findall(r"^\| (?!---)(.*?) \| `(.*)` \|$", GUIDE, re.MULTILINE)
]

rng = np.random.default_rng(0)
N, C = 4, 3
scores = rng.normal(0, 2, (N, C, 2, 5))
labels = rng.integers(C, size=(N, 2, 5))
one_hot = np.moveaxis(np.eye(C)[labels], -1, 1)
weight = np.array([0.5, 1.0, 2.0])
logits, targets = rng.normal(0, 2, (N, C)), rng.integers(2, size=(N, C)).astype(float)
classes = np.array([0, 2, 1, 1])
y_true = np.eye(C)[classes]
gt = np.array([3, 0, 2, 3])
gt_rows = np.eye(C + 1)[gt][:, :C]
sample_weight = np.array([1.0, 0.5, 0.0, 2.0])

matched, unmatched = json.loads((Path(__file__).parent / "golden" / "retinanet.json").read_text())
anchors = np.array(matched["anchors"])
# The IoU of the last box with every anchor is below the threshold.
annotated = np.array([*matched["annotations"][0], [3, 3, 6, 6, 2]])
boxes = annotated[:, :4]
image_shape = (40, 72)
prototxt = """
name: "net"
layer { name: "score" type: "Convolution" bottom: "data" top: "score" }
layer {
  name: "loss" type: "FocalLoss" bottom: "score" bottom: "label" top: "loss"
  loss_weight: 3 focal_loss_param { gamma: 1.5 } loss_param { normalize: false }
}
"""


def softmax(z):
    """Return the softmax over axis 1."""
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


def categorical(z, y, gamma=2.0):
    """Return the softmax focal loss of each class, `-y (1 - p)**gamma log p`."""
    p = softmax(z)
    return -y * (1 - p) ** gamma * np.log(p)


def binary(z, y, alpha=None, gamma=2.0):
    """Return the sigmoid focal loss of torchvision, Keras, MONAI and mmdetection."""
    p = 1 / (1 + np.exp(-z))
    cross_entropy = -(y * np.log(p) + (1 - y) * np.log(1 - p))
    loss = cross_entropy * (1 - (y * p + (1 - y) * (1 - p))) ** gamma
    return loss if alpha is None else (alpha * y + (1 - alpha) * (1 - y)) * loss


def iou():
    """Return the IoU of each box with each anchor."""
    table = np.zeros((len(boxes), len(anchors)))
    for (i, a), (j, b) in itertools.product(enumerate(boxes), enumerate(anchors)):
        width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
        both = max(width, 0) * max(height, 0)
        table[i, j] = both / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both)
    return table


def low_quality_matches():
    """Return torchvision's matches: -1 below 0.4, -2 below 0.5, and the best anchor of each box."""
    table = iou()
    best, value = table.argmax(0), table.max(0)
    matches = np.where(value >= 0.5, best, np.where(value < 0.4, -1, -2))
    forced = (table == table.max(1, keepdims=True)).any(0)
    assert np.any(forced & (matches < 0))
    return np.where(forced, best, matches)


def torchvision_anchors():
    """Return torchvision's anchors, computed one at a time."""
    rows = []
    for level in range(3, 8):
        cells = [-(-size // 2**level) for size in image_shape]
        steps = [size // n for size, n in zip(image_shape, cells)]
        for y, x, ratio, octave in itertools.product(*map(range, cells), (0.5, 1, 2), range(3)):
            side = int(4 * 2**level * 2 ** (octave / 3))
            half = np.round(np.array([side / ratio**0.5, side * ratio**0.5]) / 2)
            center = np.array([x * steps[1], y * steps[0]])
            rows.append([*(center - half), *(center + half)])
    return np.array(rows)


def torchvision_offsets(boxes, anchors):
    """Return torchvision's offsets of boxes from anchors."""
    (w, h), (aw, ah) = ((b[:, 2:] - b[:, :2]).T for b in (boxes, anchors))
    (x, y), (ax, ay) = ((b[:, 2:] + b[:, :2]).T / 2 for b in (boxes, anchors))
    return np.stack([(x - ax) / aw, (y - ay) / ah, np.log(w / aw), np.log(h / ah)], 1)


def pytorch_retinanet_anchors():
    """Return pytorch-retinanet's anchors, computed one at a time."""
    rows = []
    for level in range(3, 8):
        stride = 2**level
        cells = [range(-(-size // stride)) for size in image_shape]
        for y, x, ratio, octave in itertools.product(*cells, (0.5, 1, 2), range(3)):
            area = (4 * stride * 2 ** (octave / 3)) ** 2
            half = np.array([(area / ratio) ** 0.5, (area * ratio) ** 0.5]) / 2
            center = (np.array([x, y]) + 0.5) * stride
            rows.append([*(center - half), *(center + half)])
    return np.array(rows)


def entropy(z, y):
    """Return the binary cross entropy of each element."""
    return -y * np.log(sigmoid(z)) - (1 - y) * np.log(sigmoid(-z))


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


# One of the four positives has the quality 0. The heat map has one peak.
positive = np.eye(N, C, dtype=bool)
quality = np.where(positive, np.array([0.7, 0.0, 0.4, 0.9])[:, None], 0)
heat = np.where(positive & (np.arange(N) == 0)[:, None], 1, rng.uniform(0, 0.95, (N, C)))
distance = np.array([0.0, 0.3, 1.7, 1.0])
num_boxes = 3.0
tokens = np.array([0, -100, 1, -100])
counts = np.array([900.0, 90.0, 10.0])
matched_boxes = anchors + rng.uniform(-1, 1, anchors.shape)
detached = (0.75 * sigmoid(logits) ** 2 * ~positive + quality) * entropy(logits, quality)
mal = np.where(positive, 1, sigmoid(logits) ** 1.5) * entropy(logits, quality**1.5)


features, hidden = rng.normal(size=(N, 6)), rng.normal(size=(2, 5, 6))
embedding = rng.normal(size=(8, 6))
tags = np.array([[0, 7, 3], [2, 2, -1], [-1, -1, -1], [5, -1, -1]])  # a class counts once
completion = np.array([[1, 7, 0], [4, 4, 6]])
is_tag = np.array([[c in row for c in range(len(embedding))] for row in tags.tolist()], float)
dense = features @ embedding.T
capped = 5 * np.tanh(dense / 5)
# The logits before each token of the completion.
sampled = (hidden[:, 1:-1] @ embedding.T / 0.8).reshape(6, -1)
log_p = np.log(softmax(sampled))


# Two bins of each edge and their weights, which need not add up to 1.
left = np.array([0, 1, 1, 0])
weight_left, weight_right = np.array([0.3, 0.9, 0.0, 0.5]), np.array([0.8, 0.1, 1.0, 0.4])
image_weight = np.array([1.0, 0.0, 0.5, 2.0])


def cross_entropy(index):
    """Return the cross entropy of each row of the logits."""
    return -np.log(softmax(logits)[np.arange(N), index])


def gaussian(z, heat):
    """Return the Gaussian focal loss of CornerNet, CenterNet and mmdetection."""
    p = sigmoid(z)
    negative = -((1 - heat) ** 4) * p**2 * np.log(1 - p)
    return np.where(heat == 1, -((1 - p) ** 2) * np.log(p), negative)


def asl(z, y):
    """Return the asymmetric loss of ASL."""
    p, q = sigmoid(z), np.minimum(1 - sigmoid(z) + 0.05, 1)
    p_t = p * y + q * (1 - y)
    return -((1 - p_t) ** np.where(y == 1, 1, 4)) * (y * np.log(p) + (1 - y) * np.log(q))


def star(z, y):
    """Return fvcore's star loss with gamma = 2."""
    return np.log1p(np.exp(-2 * z * (2 * y - 1))) / 2


def dual(z, classes):
    """Return the dual focal loss."""
    p = softmax(z)
    p_t = p[np.arange(N), classes]
    p_j = (p * (p < p_t[:, None])).max(1)
    return -((1 - p_t + p_j) ** 5) * np.log(p_t)


def tversky(p, y, axes, smooth):
    """Return 1 - TI with the weight 0.7 of false negatives and 0.3 of false positives."""
    tp, fn, fp = ((a * b).sum(axes) for a, b in ((p, y), (1 - p, y), (p, 1 - y)))
    return 1 - (tp + smooth) / (tp + 0.7 * fn + 0.3 * fp + smooth)


def distribution(z, y):
    """Return mmdetection's distribution focal loss."""
    left, rows = y.astype(int), np.arange(N)
    losses = -np.log(softmax(z))
    return losses[rows, left] * (left + 1 - y) + losses[rows, left + 1] * (y - left)


INPUTS = {
    "quality": quality,
    "positive": positive,
    "heat": heat,
    "distance": distance,
    "num_boxes": num_boxes,
    "left": left,
    "weight_left": weight_left,
    "weight_right": weight_right,
    "image_weight": image_weight,
    "tokens": tokens,
    "counts": counts,
    "features": features,
    "hidden": hidden,
    "embedding": embedding,
    "kernel": embedding.T,
    "tags": tags,
    "softmax_p": softmax(logits),
    "sigmoid_p": sigmoid(logits),
    "completion": completion,
    "matched": matched_boxes,
    "scores": scores,
    "labels": labels,
    "target": labels[:, None],
    "one_hot": one_hot,
    "weight": weight,
    "logits": logits,
    "pred": logits,
    "targets": targets,
    "classes": classes,
    "y_true": y_true,
    "gt": gt,
    "sample_weight": sample_weight,
    "positives": 2,
    "avg_factor": 2.0,
    "boxes": boxes,
    "annotated": annotated,
    "anchors": anchors,
    # One image has no annotations, and one image has no matches.
    "class_logits": np.array(unmatched["class_logits"]),
    "box_regression": np.array(unmatched["box_regression"]),
    "annotations": np.array(unmatched["annotations"]),
}
RETINANET = [unmatched["classification_loss"], unmatched["regression_loss"]]
OPTAX = [jnp.asarray(x, jnp.float32) for x in (logits, targets)]

EXPECTED = {
    # Caffe
    '`net.forward()` with `type: "FocalLoss"` in `prototxt`': (
        3 * 0.25 * categorical(scores, one_hot, 1.5).sum() / N
    ),
    "`focal_loss_param { alpha: 0.5 gamma: 1 }`": (
        0.5 * categorical(scores, one_hot, 1).sum() / labels.size
    ),
    "`loss_param { ignore_label: 2 }`": (
        0.25 * categorical(scores, one_hot)[:, :2].sum() / (labels != 2).sum()
    ),
    "`loss_param { normalization: BATCH_SIZE }`": 0.25 * categorical(scores, one_hot).sum() / N,
    "the same, without `focal_jax.compat`": 0.25 * categorical(scores, one_hot).sum() / N,
    # pytorch-retinanet
    "`FocalLoss()(classifications, regressions, anchors, annotations)`": RETINANET,
    "the same, from logits": RETINANET,
    "`Anchors()(image)`": pytorch_retinanet_anchors(),
    # MindSpore
    "`nn.FocalLoss(weight, gamma=2.0)(scores, target)`": (
        (weight[:, None, None] * categorical(scores, one_hot)).sum(1).mean()
    ),
    '`nn.FocalLoss(weight, reduction="none")(scores, one_hot)`': (
        weight * categorical(scores, one_hot).mean((2, 3))
    ),
    "`nn.FocalLoss()(scores, target)`, without `focal_jax.compat`": (
        categorical(scores, one_hot).sum(1).mean()
    ),
    "`nn.FocalLoss()(scores, one_hot)`, without `focal_jax.compat`": categorical(
        scores, one_hot
    ).mean(),
    # torchvision
    "`ops.sigmoid_focal_loss(logits, targets)`": binary(logits, targets, 0.25),
    '`ops.sigmoid_focal_loss(logits, targets, alpha=-1, reduction="mean")`': (
        binary(logits, targets).mean()
    ),
    '`ops.sigmoid_focal_loss(logits, targets, reduction="sum") / max(1, positives)`': (
        binary(logits, targets, 0.25).sum() / 2
    ),
    "`ops.box_iou(boxes, anchors)`": iou(),
    "`Matcher(0.5, 0.4, allow_low_quality_matches=True)(ops.box_iou(boxes, anchors))`": (
        low_quality_matches()
    ),
    "`RetinaNet.anchor_generator` of an image of `image_shape`": torchvision_anchors(),
    "`BoxCoder((1.0, 1.0, 1.0, 1.0)).encode_single(matched, anchors)`": (
        torchvision_offsets(matched_boxes, anchors)
    ),
    # PyTorch
    "`nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))(logits, targets)`": (
        (np.where(targets == 1, 3, 1) * binary(logits, targets, gamma=0)).mean()
    ),
    "`nn.CrossEntropyLoss(ignore_index=2)(scores, labels)`": (
        categorical(scores, one_hot, 0)[:, :2].sum() / (labels != 2).sum()
    ),
    "`nn.CrossEntropyLoss(weight, ignore_index=2)(scores, labels)`": (
        (weight[:2, None, None] * categorical(scores, one_hot, 0)[:, :2]).sum()
        / weight[labels[labels != 2]].sum()
    ),
    # Keras
    "`CategoricalFocalCrossentropy(from_logits=True)(y_true, logits)`": (
        0.25 * categorical(logits, y_true).sum(1).mean()
    ),
    "`CategoricalFocalCrossentropy()(y_true, softmax_p)`": (
        0.25 * categorical(logits, y_true).sum(1).mean()
    ),
    "`CategoricalFocalCrossentropy(from_logits=True, label_smoothing=0.1)(y_true, logits)`": (
        0.25 * categorical(logits, 0.9 * y_true + 0.1 / C).sum(1).mean()
    ),
    "`CategoricalFocalCrossentropy(alpha=weight, from_logits=True)(y_true, logits)`": (
        (weight * categorical(logits, y_true)).sum(1).mean()
    ),
    "`BinaryFocalCrossentropy(from_logits=True)(targets, logits)`": binary(logits, targets).mean(),
    "`BinaryFocalCrossentropy()(targets, sigmoid_p)`": binary(logits, targets).mean(),
    "`BinaryFocalCrossentropy(apply_class_balancing=True, from_logits=True)(targets, logits)`": (
        binary(logits, targets, 0.25).mean()
    ),
    "`BinaryFocalCrossentropy(from_logits=True, label_smoothing=0.1)(targets, logits)`": (
        binary(logits, 0.9 * targets + 0.05).mean()
    ),
    '`model.compile(loss="categorical_focal_crossentropy")`, output `softmax_p`': (
        0.25 * categorical(logits, y_true).sum(1).mean()
    ),
    '`model.compile(loss="binary_focal_crossentropy")`, output `sigmoid_p`': (
        binary(logits, targets).mean()
    ),
    "`model.fit(class_weight=...)` with the categorical loss, output `softmax_p`": (
        (0.25 * weight[classes] * categorical(logits, y_true).sum(1)).mean()
    ),
    # optax
    "`optax.losses.sigmoid_focal_loss(logits, targets)`": optax.losses.sigmoid_focal_loss(*OPTAX),
    "`optax.losses.sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=1.0)`": (
        optax.losses.sigmoid_focal_loss(*OPTAX, alpha=0.25, gamma=1.0)
    ),
    "`optax.losses.softmax_cross_entropy_with_integer_labels(logits, classes)`": (
        optax.losses.softmax_cross_entropy_with_integer_labels(OPTAX[0], jnp.asarray(classes))
    ),
    # MONAI
    "`FocalLoss(alpha=0.25)(scores, one_hot)`": binary(scores, one_hot, 0.25).mean(),
    "`FocalLoss(use_softmax=True, to_onehot_y=True)(scores, target)`": (
        categorical(scores, one_hot).mean()
    ),
    "`FocalLoss(alpha=0.25, use_softmax=True)(scores, one_hot)`": (
        np.array([0.75, 0.25, 0.25])[:, None, None] * categorical(scores, one_hot)
    ).mean(),
    "`FocalLoss(include_background=False)(scores, one_hot)`": (
        binary(scores[:, 1:], one_hot[:, 1:]).mean()
    ),
    '`FocalLoss(weight=weight, use_softmax=True, reduction="sum")(scores, one_hot)`': (
        weight * categorical(scores, one_hot).mean((2, 3))
    ).sum(),
    # mmdetection
    "`FocalLoss()(pred, gt, avg_factor=avg_factor)`": binary(logits, gt_rows, 0.25).sum() / 2,
    "`FocalLoss()(pred, gt, sample_weight, avg_factor=avg_factor)`": (
        (sample_weight[:, None] * binary(logits, gt_rows, 0.25)).sum() / 2
    ),
    "`FocalLoss(loss_weight=2.0)(pred, gt)`": 2 * binary(logits, gt_rows, 0.25).mean(),
    # linear heads
    "RecML: `cut_binary_focal_cross_entropy(features, embedding, tags)`": (
        binary(dense, is_tag).mean()
    ),
    "RecML: the same with `gamma=1.5, alpha=0.25, apply_class_balancing=True`": (
        binary(dense, is_tag, 0.25, 1.5).mean()
    ),
    "tunix: `compute_per_token_logps(..., temperature=0.8)`": (
        log_p[np.arange(6), completion.ravel()].reshape(2, 3)
    ),
    "tunix: the same with `return_entropy=True`, second result": (
        -(np.exp(log_p) * log_p).sum(1).reshape(2, 3)
    ),
    "levanter: `fused_cross_entropy_loss_and_logsumexp_penalty(features, classes, kernel)`": (
        -np.log(softmax(dense)[np.arange(N), classes]).mean()
    ),
    "levanter: the same with `logsumexp_weight=0.01, logit_soft_cap=5.0`": (
        (
            0.01 * np.log(np.exp(capped).sum(1)) ** 2
            - np.log(softmax(capped)[np.arange(N), classes])
        ).mean()
    ),
    "levanter: the same with `return_argmax=True`, second result": (dense.argmax(1)),
    # scenic, big_vision, Keras Hub and D-FINE
    "scenic: `focal_softmax_cross_entropy(logits, y_true)`": categorical(logits, y_true).sum(1),
    "scenic: the same with `label_smoothing=0.1`": (
        (1 - (y_true * softmax(logits)).sum(1)) ** 2
        * categorical(logits, 0.9 * y_true + 0.1 / C, 0).sum(1)
    ),
    "scenic: the same for images, with `weights=image_weight`": (
        categorical(scores, one_hot).sum(1) * image_weight[:, None, None]
    ),
    "scenic: `focal_sigmoid_cross_entropy(logits, targets)`": 0.5 * binary(logits, targets),
    "scenic: `CenterNetDetector.heatmap_focal_loss(logits, heat)`": (
        (np.where(heat == 1, 0.25, 0.75) * gaussian(logits, heat)).sum() / (heat == 1).sum()
    ),
    "big_vision: `sigmoid_xent(logits=logits, labels=targets)`": (
        entropy(logits, targets).sum(1).mean()
    ),
    "big_vision: `softmax_xent` with labels `1 - 0.1` at the class and `0.1 / (C - 1)` elsewhere": (
        categorical(logits, 0.9 * y_true + 0.1 / (C - 1) * (1 - y_true), 0).sum(1).mean()
    ),
    "Keras Hub: `BinaryFocalCrossentropy(apply_class_balancing=True, from_logits=True, "
    'reduction="sum")(targets, logits)`': binary(logits, targets, 0.25).mean(1).sum(),
    "D-FINE: `unimodal_distribution_focal_loss(logits, left, weight_right, weight_left)`": (
        weight_left @ cross_entropy(left) + weight_right @ cross_entropy(left + 1)
    ),
    # related losses
    "mmdetection: `QualityFocalLoss()(pred, quality)`": (
        (np.abs(quality - sigmoid(logits)) ** 2 * entropy(logits, quality)).sum(1).mean()
    ),
    "mmdetection: `VarifocalLoss()(pred, quality, avg_factor=avg_factor)`": (
        np.where(quality > 0, quality, 0.75 * sigmoid(logits) ** 2) * entropy(logits, quality)
    ).sum()
    / 2,
    "mmdetection: `GaussianFocalLoss()(pred.sigmoid(), heat)`": gaussian(logits, heat).mean(),
    "mmdetection: `DistributionFocalLoss()(pred, distance)`": distribution(logits, distance).mean(),
    "transformers: `loss_labels_vfl` of RT-DETR and D-FINE": detached.sum() / num_boxes,
    "DEIM: `loss_labels_mal`": mal.sum() / num_boxes,
    "CornerNet, CenterNet: `_neg_loss(logits.sigmoid(), heat)`": gaussian(logits, heat).sum(),
    "CenterPoint: `FastFocalLoss()`": gaussian(logits, heat).sum(),
    "Leng et al.: `poly1_focal_loss(logits, targets, epsilon=1.0)`": (
        binary(logits, targets)
        + (1 - np.where(targets == 1, sigmoid(logits), sigmoid(-logits))) ** 3
    ),
    "ASL: `AsymmetricLoss()(logits, targets)`": asl(logits, targets).sum(),
    "fvcore: `sigmoid_focal_loss_star(logits, targets, gamma=2)`": star(logits, targets),
    "fvcore: `sigmoid_focal_loss_star(logits, targets, alpha=0.25, gamma=2)`": (
        (0.25 * targets + 0.75 * (1 - targets)) * star(logits, targets)
    ),
    "optax: `losses.poly_loss_cross_entropy(logits, y_true)`": (
        categorical(logits, y_true, 0).sum(1) + 2 * (1 - (y_true * softmax(logits)).sum(1))
    ),
    "DFT: the mean cross entropy of `logits`, each times `softmax(logits)[classes].detach()`": (
        (softmax(logits) * categorical(logits, y_true, 0)).sum(1).mean()
    ),
    'TRL: `SFTConfig(loss_type="dft")`, with labels `tokens`': (
        (softmax(logits) * categorical(logits, np.eye(C)[tokens.clip(0)], 0))[[0, 2]].sum() / 2
    ),
    "Menon et al.: cross entropy of `logits + log(counts / counts.sum())`": (
        categorical(logits + np.log(counts / counts.sum()), y_true, 0).sum(1).mean()
    ),
    "dual focal loss: `DualFocalLoss(gamma=5)(logits, classes)`": dual(logits, classes).sum(),
    "MONAI: `TverskyLoss(softmax=True, alpha=0.3, beta=0.7, batch=True)(scores, one_hot)`": (
        tversky(softmax(scores), one_hot, (0, 2, 3), 1e-5).mean()
    ),
    "Abraham and Khan: `focal_tversky(targets, sigmoid(logits))`": (
        tversky(sigmoid(logits), targets, (0, 1), 1) ** 0.75
    ),
}


def test_every_row_has_a_formula():
    assert [original for original, _ in ROWS] == list(EXPECTED)


@pytest.mark.quick
@pytest.mark.parametrize(("original", "call"), ROWS)
def test_call_returns_the_value_of_the_original(original, call):
    names = {"image_shape": image_shape, "prototxt": prototxt}
    # optax is called in float32. The formulas are evaluated in float64.
    x64 = not original.startswith("`optax")
    with jax.enable_x64(x64), jax.numpy_rank_promotion("allow"):
        names |= jax.tree.map(jnp.asarray, INPUTS)
        exec(IMPORTS, names)
        result = jax.jit(lambda inputs: eval(call, {**names, **inputs}))(
            {name: x for name, x in names.items() if name in INPUTS and name in call}
        )
        result = np.asarray(result).reshape(np.shape(EXPECTED[original]))
    tolerance = 1e-9 if x64 else 2e-6
    np.testing.assert_allclose(result, EXPECTED[original], rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_page_of_scenic_and_big_vision():
    page = run(DOCS / "scenic-big-vision.md")
    with jax.enable_x64(True):
        mask, labels = np.array([1.0, 1.0, 0.0, 1.0]), np.moveaxis(one_hot, 1, -1)
        batch = {"label": labels, "batch_mask": mask}
        got = [
            page["loss_function"](np.moveaxis(scores, 1, -1), batch),
            page["heatmap_loss"](logits, heat),
            page["sigmoid_xent"](logits=logits, labels=targets),
            page["softmax_xent"](logits=logits, labels=classes, smoothing=0.1),
        ]
    smoothed = 0.9 * y_true + 0.05 * (1 - y_true)
    want = [
        (categorical(scores, one_hot).sum(1) * mask[:, None, None]).sum() / 3,
        (np.where(heat == 1, 0.25, 0.75) * gaussian(logits, heat)).sum(),
        entropy(logits, targets).sum(1).mean(),
        categorical(logits, smoothed, 0).sum(1).mean(),
    ]
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_statements_about_optax():
    # optax computes in logarithms since version 0.2.5.
    version = tuple(int(x) for x in re.findall(r"\d+", optax.__version__)[:3])
    if version < (0, 2, 5):
        pytest.skip("optax is older than 0.2.5")
    z = jnp.linspace(-80.0, 80.0, 81)

    def gradient(loss, z, gamma):
        return jax.grad(lambda z: jnp.sum(loss(z, jnp.ones_like(z), gamma=gamma)))(z)

    for gamma in (0.5, 2.0):
        got = gradient(optax.losses.sigmoid_focal_loss, z, gamma)
        want = gradient(focal_jax.sigmoid_focal_loss, z, gamma)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-36)
    infinite = jnp.array([-jnp.inf, jnp.inf])
    assert np.isnan(gradient(optax.losses.sigmoid_focal_loss, infinite, 2.0)).all()
    assert gradient(focal_jax.sigmoid_focal_loss, infinite, 2.0).tolist() == [-1, 0]


def test_statements_about_the_gradient_of_the_weight():
    z, y = (jnp.asarray(x, jnp.float32) for x in (logits, quality))

    def gradient(loss, **options):
        return jax.grad(lambda z: jnp.sum(loss(z, y, positive=positive, **options)))(z)

    score = jax.nn.sigmoid(z)
    # With a constant weight the gradient is the weight times the gradient of the cross entropy.
    weights = jnp.where(positive, y, 0.75 * score**2), jnp.where(positive, 1, score**1.5)
    constant_weight = (
        gradient(focal_jax.varifocal_loss, stop_weight_gradient=True),
        gradient(focal_jax.matchability_aware_loss),
    )
    targets = y, y**1.5
    for got, weight, target in zip(constant_weight, weights, targets):
        np.testing.assert_allclose(got, weight * (score - target), rtol=1e-5, atol=1e-7)
    differentiated = gradient(focal_jax.varifocal_loss)
    assert np.all((differentiated > constant_weight[0])[~positive])
