"""Tests that functions export with a batch of symbolic size and run at several sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax import export

import focal_jax
from focal_jax import catalogue, detection, engine, linen, nnx
from focal_jax.compat import caffe, mindspore, pytorch_retinanet

pytestmark = [pytest.mark.quick, pytest.mark.every_form]

CLASSES, SIZES = 5, (3, 8)
KERNEL = np.linspace(-1, 1, CLASSES * 48, dtype=np.float32).reshape(CLASSES, 48)


def _loss_of(loss):
    """Return a loss of the catalogue as a function of logits, distributions and class indices."""

    def function(logits, labels, indices):
        if loss.kind == "linear":
            return loss.function(logits, KERNEL, indices)
        if loss.kind == "interval":
            return loss.function(logits, 4 * labels[:, 0])
        if "integer" in loss.labels:
            return loss.function(logits, indices)
        if loss.labels == ("hard",):
            return loss.function(logits, labels > 0.5)
        return loss.function(logits, labels)

    return function


def _reduced(**options):
    return lambda z, y, i: focal_jax.reduce_loss(z[:, 0], **options)


FUNCTIONS = {name: _loss_of(loss) for name, loss in catalogue.LOSSES.items()}
INTEGER = focal_jax.softmax_focal_loss_with_integer_labels
FUNCTIONS |= {
    "smoothing": lambda z, y, i: INTEGER(z, i, label_smoothing=0.1),
    "class weights": lambda z, y, i: INTEGER(z, i, alpha=jnp.arange(1.0, 6.0)),
    "linear sigmoid": lambda z, y, i: focal_jax.linear_sigmoid_focal_loss(z, KERNEL, i[:, None]),
    "linear asymmetric": lambda z, y, i: focal_jax.linear_asymmetric_loss(z, KERNEL, i[:, None]),
    "linear sparse labels": lambda z, y, i: focal_jax.linear_softmax_focal_loss_with_sparse_labels(
        z, KERNEL, i[:, None], y[:, :1]
    ),
    "log-probability": lambda z, y, i: engine.of_log_probability(INTEGER, jnp.log(y[:, 0])),
    "token statistics": lambda z, y, i: sum(focal_jax.token_statistics(z, i)[:3]),
    "linear token statistics": lambda z, y, i: sum(
        focal_jax.linear_token_statistics(z, KERNEL, i)[:3]
    ),
    "sparse labels": lambda z, y, i: focal_jax.softmax_focal_loss_with_sparse_labels(
        z, i[:, None], y[:, :1]
    ),
    **{f"reduce_loss {x}": _reduced(normalization=x) for x in ("mean", "sum", "batch_size")},
    "reduce_loss valid": _reduced(),
    "reduce_loss ignore_label": lambda z, y, i: focal_jax.reduce_loss(
        z[:, 0], labels=i, ignore_label=0
    ),
    "reduce_loss where": lambda z, y, i: focal_jax.reduce_loss(z, where=y[:, :1] > 0.1),
    "reduce_loss weights": lambda z, y, i: focal_jax.reduce_loss(z, weights=y[:, :1]),
    "module": lambda z, y, i: nnx.SoftmaxFocalLoss()(z, i),
    "linen module": lambda z, y, i: linen.SoftmaxFocalLoss().apply({}, z, i),
    **{
        f"caffe {x}": lambda z, y, i, x=x: caffe.FocalLossLayer(normalization=x)(z, i)
        for x in ("valid", "full", "batch_size", "none")
    },
    "mindspore": lambda z, y, i: mindspore.FocalLoss()(z, jax.nn.one_hot(i, CLASSES)),
}


def _assert_exports(function, shapes, make):
    """Check the exported value and gradient in the first argument against those of fixed sizes."""
    size = export.symbolic_shape("b")[0]
    structs = [
        jax.ShapeDtypeStruct([size if n is None else n for n in shape], dtype)
        for shape, dtype in shapes
    ]
    value_and_gradient = jax.value_and_grad(lambda *args: jnp.sum(function(*args)))
    exported = jax.jit(export.export(jax.jit(value_and_gradient))(*structs).call)
    program = jax.jit(value_and_gradient)
    for size in SIZES:
        args = make(size)
        for got, want in zip(exported(*args), program(*args)):
            assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batch_of_symbolic_size(name):
    def make(size):
        rng = np.random.default_rng(0)
        return (
            rng.normal(size=(size, CLASSES)).astype(np.float32),
            rng.dirichlet(np.ones(CLASSES), size).astype(np.float32),
            rng.integers(0, CLASSES, size).astype(np.int32),
        )

    shapes = ((None, CLASSES), "float32"), ((None, CLASSES), "float32"), ((None,), "int32")
    _assert_exports(FUNCTIONS[name], shapes, make)


# Losses of several classes per position: functions of logits or features, class indices, weights.
LABELS = {
    "sparse labels": lambda z, i, w: focal_jax.softmax_focal_loss_with_sparse_labels(z, i, w),
    "linear sparse labels": lambda z, i, w: focal_jax.linear_softmax_focal_loss_with_sparse_labels(
        z, KERNEL, i, w
    ),
    "linear sigmoid": lambda z, i, w: focal_jax.linear_sigmoid_focal_loss(z, KERNEL, i),
    "linear asymmetric": lambda z, i, w: focal_jax.linear_asymmetric_loss(z, KERNEL, i),
}


@pytest.mark.parametrize("positions", [4, None])
@pytest.mark.parametrize("name", LABELS)
def test_a_symbolic_number_of_labels_per_position(name, positions):
    def make(size):
        rng = np.random.default_rng(0)
        n = positions or size
        return (
            rng.normal(size=(n, CLASSES)).astype(np.float32),
            rng.integers(-1, CLASSES, (n, size)).astype(np.int32),
            rng.uniform(size=(n, size)).astype(np.float32),
        )

    pairs = (positions, None)
    shapes = ((positions, CLASSES), "float32"), (pairs, "int32"), (pairs, "float32")
    _assert_exports(LABELS[name], shapes, make)


# One loss for each computation over the classes.
DENSE = [
    "softmax_focal_loss_with_integer_labels",
    "softmax_focal_loss",
    "dual_focal_loss_with_integer_labels",
    "distribution_focal_loss",
    "focal_tversky_loss",
    "smoothing",
    "token statistics",
    "sparse labels",
    "caffe valid",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSE)
def test_symbolic_number_of_classes(name):
    def make(size):
        rng = np.random.default_rng(0)
        return (
            rng.normal(size=(4, size)).astype(np.float32),
            rng.dirichlet(np.ones(size), 4).astype(np.float32),
            rng.integers(0, size, 4).astype(np.int32),
        )

    shapes = ((4, None), "float32"), ((4, None), "float32"), ((4,), "int32")
    _assert_exports(FUNCTIONS[name], shapes, make)


def test_linear_heads_name_a_symbolic_number_of_classes():
    kernel = jax.ShapeDtypeStruct((5, *export.symbolic_shape("c")), "float32")
    loss = focal_jax.linear_softmax_focal_loss_with_integer_labels
    with pytest.raises(focal_jax.InputError, match="kernel: got c classes, wanted"):
        jax.eval_shape(loss, np.ones((4, 5), np.float32), kernel, np.zeros(4, int))


ANCHORS = np.array([[0, 0, 9, 9], [5, 5, 20, 20], [30, 30, 50, 60]], np.float32)
DETECTION = {
    "image": lambda z, x, y: detection.retinanet_loss(z, x, ANCHORS, y, normalization="image"),
    "batch": lambda z, x, y: detection.retinanet_loss(z, x, ANCHORS, y, normalization="batch"),
    "pytorch-retinanet": lambda z, x, y: pytorch_retinanet.FocalLoss()(
        jax.nn.sigmoid(z), x, ANCHORS[None], y
    ),
}


@pytest.mark.parametrize("name", DETECTION)
def test_detection_with_a_symbolic_number_of_images(name):
    def function(logits, offsets, annotations):
        return sum(DETECTION[name](logits, offsets, annotations))

    def make(size):
        rng = np.random.default_rng(0)
        annotations = np.tile(np.array([[0, 0, 10, 10, 1]], np.float32), (size, 1, 1))
        logits, offsets = (rng.normal(size=(size, 3, n)).astype(np.float32) for n in (CLASSES, 4))
        return logits, offsets, annotations

    shapes = [((None, *shape), "float32") for shape in ((3, CLASSES), (3, 4), (1, 5))]
    _assert_exports(function, shapes, make)


@pytest.mark.parametrize("name", ["box_iou", "encode_boxes", "decode_boxes"])
def test_a_symbolic_number_of_boxes(name):
    function = getattr(detection, name)

    def make(size):
        rng = np.random.default_rng(0)
        corners = rng.uniform(0, 50, (size, 2))
        boxes, anchors = (np.hstack([corners, corners + x]).astype(np.float32) for x in (9, 12))
        return (boxes / 10 if name == "decode_boxes" else boxes), anchors

    _assert_exports(function, [((None, 4), "float32")] * 2, make)


def test_matching_with_a_symbolic_number_of_annotations():
    anchors = np.array([[0, 0, 9, 9], [5, 5, 20, 20]], np.float32)
    struct = jax.ShapeDtypeStruct((export.symbolic_shape("m")[0], 5), "float32")
    exported = export.export(jax.jit(lambda x: detection.match_anchors(anchors, x)))(struct)
    annotations = np.array([[5, 5, 20, 20, 0], [0, 0, 10, 10, 1]], np.float32)
    for rows in (annotations, annotations[:1]):
        want = detection.match_anchors(anchors, rows)
        assert exported.call(rows).tolist() == want.tolist()
