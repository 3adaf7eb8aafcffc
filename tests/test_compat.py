"""The compat modules return the values of the systems that they replace."""

import contextlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import NOT_AN_ARRAY, NOT_AN_OPTION, assert_errors_name
from hypothesis import given, settings, strategies as st

from focal_jax import InputError, softmax_focal_loss_with_integer_labels
from focal_jax.compat import mindspore, pytorch_retinanet
from focal_jax.compat.caffe import FocalLossLayer

pytestmark = pytest.mark.quick


def golden(system):
    """Return the recorded inputs, losses and gradients of a system."""
    return json.loads((Path(__file__).parent / "golden" / f"{system}.json").read_text())


# ---------------------------------------------------------------- Caffe


@pytest.mark.parametrize("case", golden("caffe"))
def test_caffe_matches_recorded_values(case):
    layer = FocalLossLayer(
        alpha=case["alpha"],
        gamma=case["gamma"],
        axis=case["axis"],
        ignore_label=case["ignore_label"],
        normalization=case["normalization"].lower(),
        loss_weight=case["loss_weight"],
        return_prob=True,
    )
    logits = jnp.asarray(case["logits"], jnp.float32).reshape(case["shape"])
    step = jax.jit(jax.value_and_grad(layer, has_aux=True))
    (loss, prob), gradient = step(logits, jnp.asarray(case["labels"]))
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(loss, case["loss_weight"] * case["loss"])
    close(gradient.ravel(), case["logits_grad"])
    close(prob.ravel(), case["prob"])


def caffe_loops(layer, logits, labels):
    """Return the layer's loss and gradient, with Caffe's loops over outer and inner axes."""
    axis = layer.axis % logits.ndim
    outer, classes = int(np.prod(logits.shape[:axis])), logits.shape[axis]
    z = logits.reshape(outer, classes, -1)
    labels = labels.reshape(outer, -1)
    loss, gradient, valid = 0.0, np.zeros_like(z), 0
    for i, j in np.ndindex(labels.shape):
        t = labels[i, j]
        if t == layer.ignore_label:
            continue
        valid += 1
        p = np.exp(z[i, :, j]) / np.exp(z[i, :, j]).sum()
        q = 1 - p[t]
        loss -= layer.alpha * q**layer.gamma * np.log(p[t])
        slope = q**layer.gamma - layer.gamma * q ** (layer.gamma - 1) * p[t] * np.log(p[t])
        gradient[i, :, j] = layer.alpha * slope * (p - (np.arange(classes) == t))
    normalizer = {"full": labels.size, "valid": valid, "batch_size": outer, "none": 1}
    scale = layer.loss_weight / max(1, normalizer[layer.normalization])
    return loss * scale, gradient.reshape(logits.shape) * scale


layers = st.builds(
    FocalLossLayer,
    alpha=st.floats(0.1, 2),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5]),
    axis=st.sampled_from([0, 1, 2, 3, -1, -2, -3, -4]),
    ignore_label=st.sampled_from([None, 0, 1, -1, 255]),
    normalization=st.sampled_from(["full", "valid", "batch_size", "none"]),
    loss_weight=st.floats(-3, 3),
)


@pytest.mark.usefixtures("x64")
@given(layers, st.integers(0, 2**32 - 1))
@settings(max_examples=12)
def test_caffe_matches_loops_for_any_options(layer, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (2, 3, 4, 2))
    positions = np.delete(logits.shape, layer.axis % 4)
    classes = logits.shape[layer.axis]
    labels = rng.integers(classes, size=positions)
    if layer.ignore_label is not None:
        labels[rng.random(positions) < 0.3] = layer.ignore_label
    loss, gradient = jax.jit(jax.value_and_grad(layer))(logits, labels)
    expected_loss, expected_gradient = caffe_loops(layer, logits, labels)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def scores():
    """Return logits [2, 3, 2, 4] and labels [2, 2, 4], one of them 255."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=(2, 2, 4)).astype(np.uint8)
    labels[1, 0, 2] = 255
    return jnp.asarray(rng.normal(0, 2, (2, 3, 2, 4)), jnp.float32), labels


@pytest.mark.parametrize("shape", [(2, 1, 2, 4), (2, 2, 4), (2, 8), (16,)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_caffe_accepts_labels_of_any_shape_and_dtype(scores, shape, dtype):
    logits, labels = scores
    layer = FocalLossLayer(ignore_label=255)
    np.testing.assert_array_equal(
        layer(logits, labels.reshape(shape).astype(dtype)), layer(logits, labels.astype(int))
    )


def test_caffe_truncates_floating_labels(scores):
    logits, labels = scores
    layer = FocalLossLayer(ignore_label=255)
    np.testing.assert_array_equal(layer(logits, labels + np.float32(0.75)), layer(logits, labels))


@pytest.mark.parametrize("label", [-1, 3, np.nan, np.inf, -np.inf, 1e20])
def test_caffe_invalid_label_gives_nan(scores, label):
    logits, labels = scores
    labels = labels.astype(np.float32)
    labels[0, 1, 3] = label
    loss, gradient = jax.value_and_grad(FocalLossLayer(ignore_label=255))(logits, labels)
    assert jnp.isnan(loss)
    assert jnp.all(jnp.isnan(gradient[0, :, 1, 3]))
    assert jnp.isnan(gradient).sum() == 3


def test_caffe_loss_is_zero_if_all_labels_are_ignored(scores):
    logits, labels = scores
    step = jax.value_and_grad(FocalLossLayer(ignore_label=7))
    loss, gradient = step(logits, np.full_like(labels, 7))
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)
    assert FocalLossLayer()(logits[:0], labels[:0]) == 0


def test_caffe_returns_probabilities_without_gradient(scores):
    logits, labels = scores
    layer = FocalLossLayer(return_prob=True, ignore_label=255)
    loss, prob = layer(logits, labels)
    np.testing.assert_array_equal(loss, FocalLossLayer(ignore_label=255)(logits, labels))
    np.testing.assert_allclose(prob.sum(1), np.ones((2, 2, 4)), rtol=1e-6)
    gradient = jax.grad(lambda logits: layer(logits, labels)[1][0, 0, 0, 0])(logits)
    np.testing.assert_array_equal(gradient, 0)


def test_caffe_batch_size_is_the_product_of_the_axes_before_the_class_axis():
    logits, labels = jnp.zeros((2, 3, 5)), np.zeros((2, 3), int)
    losses = softmax_focal_loss_with_integer_labels(logits, labels, alpha=0.25)
    layer = FocalLossLayer(axis=-1, normalization="batch_size")
    np.testing.assert_allclose(layer(logits, labels), losses.sum() / 6, rtol=1e-6)


@pytest.mark.parametrize("ignore_label", [None, -(2**31), -1])
@pytest.mark.parametrize("label", [np.nan, np.inf, -3e9, 3e9])
def test_caffe_labels_that_are_no_int32_are_not_ignored(scores, label, ignore_label):
    logits, labels = scores
    labels = np.where(labels == 255, 0, labels).astype(np.float32)
    layer = FocalLossLayer(ignore_label=ignore_label)
    if ignore_label is not None:
        labels[1, 1, 1] = ignore_label
        assert jnp.isfinite(layer(logits, labels))
    labels[0, 0, 0] = label
    assert jnp.isnan(layer(logits, labels))


def test_caffe_wide_labels_are_not_the_smallest_ignore_label(scores):
    logits, labels = scores
    labels = np.where(labels == 255, 2**40, labels.astype(np.int64))
    assert jnp.isnan(FocalLossLayer(ignore_label=-(2**31))(logits, labels))


def test_caffe_alpha_per_class(scores):
    logits, labels = scores
    alpha, ignored = (0.5, 2.0, 1.0), {"ignore_label": 255}
    layer = FocalLossLayer(alpha=alpha, axis=1, **ignored)
    losses = softmax_focal_loss_with_integer_labels(
        logits, labels.astype(int), alpha=jnp.array(alpha), axis=1, **ignored
    )
    np.testing.assert_allclose(layer(logits, labels), losses.sum() / 15, rtol=1e-6)
    with pytest.raises(InputError, match=r"alpha: got shape \(2,\), wanted"):
        FocalLossLayer(alpha=alpha[:2], axis=1)(logits, labels)


@pytest.mark.parametrize(
    ("message", "layer", "inputs"),
    [
        (r"\blabels: got 6 of shape \(2, 3\)", {}, (jnp.zeros((2, 3)), np.zeros((2, 3), int))),
        (r"\blabels: got", {}, (jnp.zeros((2, 3)), np.zeros(2, bool))),
        (r"\blabels: got", {}, (jnp.zeros((2, 3)), np.zeros(2, complex))),
        (r"\blogits: got", {}, (np.zeros((2, 3), int), np.zeros(2, int))),
        (r"\baxis: got", {"axis": 2}, (jnp.zeros((2, 3)), np.zeros(2, int))),
        (r"\bgamma: got", {"gamma": -1.0}, (jnp.zeros((2, 3)), np.zeros(2, int))),
    ],
)
def test_caffe_errors_name_the_argument(message, layer, inputs):
    with pytest.raises(ValueError, match=message):
        FocalLossLayer(**layer)(*inputs)


@pytest.mark.parametrize(
    ("option", "value"),
    [("normalization", value) for value in ("VALID", "mean", None)]
    + [("gamma", -1.0), ("gamma", None), ("alpha", "0.25"), ("axis", 1.0), ("ignore_label", "x")]
    + [
        ("loss_weight", 1e39),
        ("loss_weight", None),
        ("loss_weight", float("nan")),
        ("loss_weight", -float("inf")),
    ]
    + [("alpha", 0.0), ("alpha", -1), ("alpha", (0.5, 0.0)), ("axis", True)]
    + [("axis", 10**9), ("axis", -33), ("gamma", (1.0, 2.0)), ("return_prob", 2), ("alpha", None)],
)
def test_caffe_rejects_invalid_options_at_construction(option, value):
    with pytest.raises(ValueError, match=rf"\b{option}: got"):
        FocalLossLayer(**{option: value})


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.float64, np.float16])
def test_caffe_64_bit_labels_do_not_wrap(scores, dtype):
    logits, labels = scores
    wide = labels.astype(dtype)
    layer = FocalLossLayer(ignore_label=255)
    np.testing.assert_array_equal(layer(logits, wide), layer(logits, labels))
    if wide.dtype.itemsize == 8:
        wide[0, 0, 0] = 2**32 + 1  # wraps to the valid class 1 in int32
        assert jnp.isnan(layer(logits, wide))


def _raises(message, function, *arguments):
    with pytest.raises(InputError, match=message):
        function(*arguments)


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.bfloat16, 256), (jnp.float16, 2048)])
def test_16_bit_labels_that_cannot_hold_the_classes_are_errors(dtype, limit):
    anchors, annotations = jnp.zeros((1, 1, 4)), jnp.ones((1, 1, 5), dtype)
    loss_of = {"labels": FocalLossLayer(), "target": mindspore.FocalLoss()}
    for classes in (limit, limit + 1):
        retinanet = partial(pytorch_retinanet.FocalLoss(), jnp.zeros((1, 1, classes)))
        calls = {name: partial(f, jnp.zeros((2, classes))) for name, f in loss_of.items()}
        arguments = dict.fromkeys(calls, (jnp.ones((2, 1), dtype),))
        calls["annotations"] = retinanet
        arguments["annotations"] = jnp.zeros((1, 1, 4)), anchors, annotations
        for name, call in calls.items():
            if classes == limit:
                jax.eval_shape(call, *arguments[name])
            else:
                _raises(f"^{name}: got dtype .*{limit}", jax.eval_shape, call, *arguments[name])


_LOGITS, _ROWS = jnp.zeros((2, 3)), [[[0.0, 0, 4, 4, 1]]]
_CALLS = {
    "caffe": (FocalLossLayer(axis=-1), {"logits": _LOGITS, "labels": [0, 1]}),
    "mindspore": (mindspore.FocalLoss(), {"predict": _LOGITS, "target": [[0], [1]]}),
    "pytorch_retinanet": (
        pytorch_retinanet.FocalLoss(),
        {"classifications": jnp.zeros((1, 1, 2)), "regressions": jnp.zeros((1, 1, 4))}
        | {"anchors": [[[0.0, 0, 4, 4]]], "annotations": _ROWS},
    ),
}


@pytest.mark.parametrize("system", _CALLS)
def test_arguments_of_any_type_are_used_or_an_error_that_names_them(system):
    function, arguments = _CALLS[system]
    invalid = dict.fromkeys(arguments, (*NOT_AN_ARRAY, 3, [1, 2, 3], []))
    names = dict.fromkeys(("axis", *arguments))  # logits without axes have no class axis
    assert_errors_name(lambda axis=None, **a: function(**a), names | arguments, invalid)


def test_options_of_any_type_are_used_or_an_error_that_names_them():
    layer = {"gamma": 2.0, "axis": 1, "normalization": "full", "loss_weight": 1.0}
    layer |= {"return_prob": False, "alpha": 0.5}
    invalid = dict.fromkeys(layer, NOT_AN_OPTION) | {"loss_weight": NOT_AN_ARRAY}
    # A sequence of weights is valid, and so is one that does not fit the classes: they are unknown.
    invalid["alpha"] = [x for x in NOT_AN_OPTION if not isinstance(x, np.ndarray | list | tuple)]
    assert_errors_name(FocalLossLayer, layer, invalid)
    assert_errors_name(mindspore.FocalLoss, {"reduction": "sum"}, {"reduction": NOT_AN_OPTION})
    prototxt = {"text": NET, "name": None, "phase": None}
    invalid = {"name": NOT_AN_OPTION, "phase": NOT_AN_OPTION}
    invalid["text"] = [x for x in NOT_AN_ARRAY if not isinstance(x, str)]
    assert_errors_name(FocalLossLayer.from_prototxt, prototxt, invalid)


# ---------------------------------------------------------------- Caffe's prototxt

NET = """
# a net for segmentation
name: "segmenter"
input: "data" input_dim: [1, 3, 224, 224]
force_backward: true;
state { phase: TRAIN level: 1 stage: "deploy" }
layers { name: "old" type: SOFTMAX_LOSS bottom: "x" }
layer {
  name: "data" type: "Data" top: "data" top: "label"
  include { phase: TRAIN }
  transform_param { scale: 0.00390625 mirror: true mean_value: 104. mean_value: 117 }
  data_param { source: "it's a \\"db\\"" 'and more' backend: LMDB batch_size: 64 }
}
layer <
  name: "score" type: "Convolution" bottom: "data" top: "score"
  param { lr_mult: 1 decay_mult: 1e-4 } param { lr_mult: -2.5e+1f, decay_mult: inf }
  convolution_param { num_output: 21 kernel_size: [3, 3] weight_filler < type: 'xavier' > }
>
layer {
  name: "prob" type: "Softmax" bottom: "score" top: "prob" softmax_param { axis: 2 engine: CAFFE }
}
layer {
  name: "softmax_loss" type: "SoftmaxWithLoss" bottom: "score" bottom: "label" top: "other"
  loss_param { ignore_label: 3 normalization: FULL odd: "x" } loss_weight: 0.5
  focal_loss_param { gama: 1 extra { deep: [{ a: 1 }] } }
}
layer {
  name: "focal" type: "FocalLoss" bottom: "score" bottom: "label" top: "loss" top: "prob"
  propagate_down: true propagate_down: false
  loss_weight: 2 loss_weight: 0
  focal_loss_param { type: ORIGIN alpha: 0.3 gamma: 1.5 beta: 1 }
  softmax_param { axis: -1 engine: CAFFE } include { phase: TRAIN }
  loss_param { ignore_label: -1 normalization: BATCH_SIZE normalize: true }
}
"""


def focal(body, name="loss", tops='top: "loss"'):
    return f'layer {{ name: "{name}" type: "FocalLoss" {tops} {body} }}'


def test_prototxt_of_a_net():
    assert FocalLossLayer.from_prototxt(NET) == FocalLossLayer(
        alpha=0.3,
        gamma=1.5,
        axis=-1,
        ignore_label=-1,
        normalization="batch_size",
        loss_weight=2.0,
        return_prob=True,
    )


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ("", {}),
        ("loss_param { }", {}),
        ("loss_param { normalization: FULL }", {"normalization": "full"}),
        ("loss_param { normalization: 0 }", {"normalization": "full"}),
        ("loss_param { normalization: VALID }", {"normalization": "valid"}),
        ("loss_param { normalization: BATCH_SIZE }", {"normalization": "batch_size"}),
        ("loss_param { normalization: NONE }", {"normalization": "none"}),
        # The legacy option has an effect only if `normalization` is absent.
        ("loss_param { normalize: true }", {"normalization": "valid"}),
        ("loss_param { normalize: false }", {"normalization": "batch_size"}),
        ("loss_param { normalize: false normalization: VALID }", {"normalization": "valid"}),
        ("loss_param { normalization: FULL normalize: true }", {"normalization": "full"}),
        ("loss_param { ignore_label: 0 }", {"ignore_label": 0}),
        ("focal_loss_param { alpha: 1 }", {"alpha": 1.0}),
        ("focal_loss_param { gamma: 0 }", {"gamma": 0.0}),
        ("softmax_param { axis: 0 }", {"axis": 0}),
        ("loss_weight: 0", {"loss_weight": 0.0}),
        ('top: "p" loss_weight: [0.5, 0]', {"loss_weight": 0.5, "return_prob": True}),
        ("propagate_down: 1 propagate_down: 0", {}),
        ("propagate_down: false", {}),
        ('top: "prob"', {"return_prob": True}),
        ('bottom: "score" bottom: "label"', {}),
        # Forks of Caffe have one alpha for each class, and the axis beside alpha.
        ("focal_loss_param { alpha: 1 alpha: 2.5 }", {"alpha": (1.0, 2.5)}),
        ("focal_loss_param { alpha: [0.5, 1, 1] gamma: 1 }", {"alpha": (0.5, 1, 1), "gamma": 1}),
        ("focal_loss_param { alpha_balance: true alpha: 1 alpha: 2 }", {"alpha": (1.0, 2.0)}),
        ("focal_loss_param { alpha_balance: false alpha: 1 alpha: 2 }", {"alpha": 1.0}),
        ("focal_loss_param { axis: 2 engine: CAFFE }", {"axis": 2}),
        ("focal_loss_param { axis: 2 } softmax_param { axis: 2 }", {"axis": 2}),
        ("# \u2028 \x0c \x85 a comment \x0b\n loss_weight: 2", {"loss_weight": 2.0}),
    ],
)
def test_prototxt_options(body, options):
    expected = FocalLossLayer(**options)
    assert FocalLossLayer.from_prototxt(focal(body)) == expected
    # The fields of the layer without its block are valid too.
    inside = focal(body).removeprefix("layer {").removesuffix("}")
    assert FocalLossLayer.from_prototxt(inside) == expected


def test_prototxt_selects_a_layer_by_name():
    text = focal("softmax_param { axis: 2 }", "a") + NET + focal("loss_weight: 3", "b")
    assert FocalLossLayer.from_prototxt(text, name="a") == FocalLossLayer(axis=2)
    assert FocalLossLayer.from_prototxt(text, "b") == FocalLossLayer(loss_weight=3.0)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("include { phase: TRAIN }", "include { phase: TEST }"),
        (
            "include { phase: TRAIN stage: 'a' } include { phase: TRAIN }",
            "exclude { phase: TRAIN }",
        ),
        ("phase: TRAIN", "phase: TEST"),
    ],
)
def test_prototxt_selects_a_layer_by_phase(train, test):
    test = focal(f"{test} loss_param {{ normalization: FULL }}")
    shared = 'layer { name: "x" type: "Convolution" }'
    for text in (focal(train) + shared + test, test + focal(train)):
        for name in (None, "loss"):
            read = partial(FocalLossLayer.from_prototxt, text, name)
            assert read(phase="TRAIN") == read(phase="train") == FocalLossLayer()
            assert read(phase="TEST") == FocalLossLayer(normalization="full")
            _raises("phase='TRAIN'", read)
    assert FocalLossLayer.from_prototxt(focal(""), phase="TEST") == FocalLossLayer()
    _raises("^name: got", partial(FocalLossLayer.from_prototxt, focal(train), phase="TEST"))


@pytest.mark.parametrize("bottom", ["score", "prob"])
def test_prototxt_warns_about_a_softmax_before_the_layer(bottom):
    softmax = 'layer { name: "p" type: "Softmax" bottom: "score" top: "prob" }'
    text = softmax + focal(f'bottom: "{bottom}" bottom: "label"')
    warns = pytest.warns(UserWarning, match="'prob' from a Softmax layer, wanted logits")
    with warns if bottom == "prob" else contextlib.nullcontext():
        assert FocalLossLayer.from_prototxt(text) == FocalLossLayer()


@pytest.mark.parametrize(
    ("message", "text", "name"),
    [
        ("no FocalLoss layer", "\ufeff" + focal("").replace("FocalLoss", "Loss"), None),
        ("nested too deeply", focal("a { " * 5000 + "}" * 5000), None),
        (r"but \['MultiBoxFocalLoss'\], wanted", 'layer { type: "MultiBoxFocalLoss" }', None),
        (r"but \['SoftmaxFocalLoss'\], wanted", 'layer { type: "SoftmaxFocalLoss" }', None),
        (r"but \['SoftmaxWithFocalLoss'\]", 'type: "SoftmaxWithFocalLoss"', None),
        ("wanted two bottoms", focal('bottom: "a" bottom: "b" bottom: "weights"'), None),
        ("at most two tops", focal('bottom: "a" bottom: "b" top: "c" top: "d"'), None),
        ("alpha: got 0, wanted a finite number > 0", focal("focal_loss_param { alpha: 0 }"), None),
        ("alpha: got -1,", focal("focal_loss_param { alpha: 1 alpha: -1 }"), None),
        ("axis: got 1000000000, wanted", focal("softmax_param { axis: 1000000000 }"), None),
        ("two axes", focal("focal_loss_param { axis: 2 } softmax_param { axis: 3 }"), None),
        ("1:7", "layer {", None),
        ("1:", "layer { name: }", None),
        ("2:14", 'layer {\n name: "a" } }', None),
        ("loss_weight", focal('loss_weight: "much"'), None),
        ("2 values of loss_weight, wanted one for each top", focal("loss_weight: [1, 0]"), None),
        ("gamma", focal("focal_loss_param { gamma: 1 gamma: 2 }"), None),
        ("no FocalLoss layer", "", None),
        ("no FocalLoss layer", 'layer { name: "x" type: "SoftmaxWithLoss" }', None),
        (r"\['a', 'b'\]", focal("", "a") + focal("", "b"), None),
        (r"got 'c', .*\['a', 'b'\]", focal("", "a") + focal("", "b"), "c"),
        (r"\['a', 'a'\]", focal("", "a") + focal("", "a"), "a"),
        ("cannot backpropagate to label inputs", focal("propagate_down: [1, 1]"), None),
        ("cannot backpropagate to label", focal("propagate_down: 0 propagate_down: true"), None),
        ("FULL, VALID, BATCH_SIZE, NONE", focal("loss_param { normalization: MEAN }"), None),
        ("FULL, VALID, BATCH_SIZE, NONE", focal("loss_param { normalization: 4 }"), None),
    ],
)
def test_prototxt_errors_name_the_problem(message, text, name):
    with pytest.raises(ValueError, match=message):
        FocalLossLayer.from_prototxt(text, name)


@pytest.mark.parametrize(
    ("message", "body"),
    [
        ("1:[0-9]+ .*'gama' in focal_loss_param, wanted gamma", "focal_loss_param { gama: 5 }"),
        ("'Gamma' in focal_loss_param, wanted gamma", "focal_loss_param < alpha: 1 Gamma: 5 >"),
        ("'x' in focal_loss_param, wanted one of .*'alpha'", "focal_loss_param: { x { y: 1 } }"),
        ("2:1 .*'axes' in softmax_param, wanted axis", "softmax_param {\naxes: 2 }"),
        ("'ignore_lable' in loss_param, wanted ignore_label", "loss_param { ignore_lable: 0 }"),
        ("'normalisation' in loss_param", "loss_param { normalisation: FULL }"),
        ("'focal_loss_parm' in the FocalLoss layer, wanted focal_loss_param", "focal_loss_parm {}"),
        ("'loss_weights' in the FocalLoss layer, wanted loss_weight", "loss_weights: 2"),
        ("type LINEAR, wanted ORIGIN", "focal_loss_param { type: LINEAR gamma: 2 beta: 1 }"),
    ],
)
def test_prototxt_rejects_unknown_fields_of_the_layer_only(message, body):
    alone = focal(body)
    inside = alone.removeprefix("layer {").removesuffix("}")
    # Other layers before and after may contain any fields, also the same fields.
    other = 'layer { name: "x" ' + body + ' other_param: [{ a: 1 }, { b: "{" }] }'
    listed = "layer [{ name: 'y' " + body.replace("\n", " ") + " }, {" + inside + "}]"
    for text in (alone, inside, alone + other, listed):
        with pytest.raises(ValueError, match=message if text == alone else message[-20:]):
            FocalLossLayer.from_prototxt(text)
    plain = other + focal("focal_loss_param { gamma: 3 }") + other
    assert FocalLossLayer.from_prototxt(plain) == FocalLossLayer(gamma=3.0)


any_layer = st.builds(
    FocalLossLayer,
    alpha=st.floats(1e-3, 10) | st.tuples(st.floats(1e-3, 10), st.floats(1e-3, 10)),
    gamma=st.floats(0, 10),
    axis=st.integers(-4, 4),
    ignore_label=st.none() | st.integers(-(2**31), 2**31 - 1),
    normalization=st.sampled_from(["full", "valid", "batch_size", "none"]),
    loss_weight=st.floats(allow_nan=False, allow_infinity=False, width=32),
    return_prob=st.booleans(),
)


@given(any_layer)
def test_prototxt_round_trip(layer):
    text = layer.to_prototxt()
    assert FocalLossLayer.from_prototxt(text) == layer
    assert text.count("top:") == text.count("loss_weight:") == 1 + layer.return_prob


@pytest.mark.parametrize("make", [list, np.array])
def test_caffe_layer_with_a_weight_per_class_is_hashable(make):
    alpha = make([1.0, 2.0, 3.0])
    layer = FocalLossLayer(alpha=alpha, gamma=np.array(2.0), loss_weight=np.float32(0.5))
    assert layer == FocalLossLayer(alpha=(1.0, 2.0, 3.0), loss_weight=0.5)
    assert FocalLossLayer.from_prototxt(layer.to_prototxt()) == layer
    logits, labels = jnp.ones((2, 3)), jnp.array([0, 2])
    np.testing.assert_allclose(jax.jit(layer)(logits, labels), layer(logits, labels), rtol=1e-6)
    with pytest.raises(InputError, match=r"alpha: got shape \(0,\), wanted one number, or one per"):
        FocalLossLayer(alpha=[])


# ---------------------------------------------------------------- MindSpore


@pytest.mark.parametrize("case", golden("mindspore"))
def test_mindspore_matches_recorded_values(case):
    logits = jnp.asarray(case["logits"], jnp.float32).reshape(case["shape"])
    samples, classes, *positions = case["shape"]
    target = jnp.asarray(case["labels"]).reshape(samples, 1, *positions)
    if case["one_hot"]:
        target = jax.nn.one_hot(target.squeeze(1), classes, axis=1)
    weight = None if case["weight"] is None else jnp.asarray(case["weight"])
    loss_of = mindspore.FocalLoss(weight, case["gamma"], case["reduction"])
    close = partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-5)
    if case["reduction"] == "none":
        loss = jax.jit(loss_of)(logits, target)
        assert loss.shape == np.shape(case["loss"])
    else:
        loss, gradient = jax.jit(jax.value_and_grad(loss_of))(logits, target)
        close(gradient.ravel(), case["logits_grad"])
    close(loss, case["loss"])


@pytest.fixture(scope="module")
def volumes():
    """Return logits [2, 3, 4, 2] and class indices [2, 1, 4, 2]."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (2, 3, 4, 2))
    return jnp.asarray(logits, jnp.float32), jnp.asarray(rng.integers(3, size=(2, 1, 4, 2)))


@pytest.mark.parametrize("dtype", [np.float32, np.int32, bool])
def test_mindspore_sum_and_mean_reduce_the_losses_of_none(volumes, dtype):
    logits, labels = volumes
    one_hot = jax.nn.one_hot(labels.squeeze(1), 3, axis=1, dtype=dtype)
    weight = jnp.array([0.2, 1.0, 3.0])

    def total(reduction):
        loss_of = mindspore.FocalLoss(weight, 1.5, reduction)
        return jax.jit(jax.value_and_grad(lambda z: jnp.sum(loss_of(z, one_hot))))(logits)

    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, total("none"), total("sum"))
    jax.tree.map(close, total("sum"), jax.tree.map(lambda x: 6 * x, total("mean")))


@pytest.mark.parametrize(
    ("target", "valid"),
    [
        ([0.3, 0.7, 0], True),
        ([0.5, 0.5, 0], True),
        ([np.nan, 0.5, 0.5], False),
        ([-1, 1, 0], False),
    ],
)
@pytest.mark.parametrize(("logit", "weight"), [(-1.0, None), (-jnp.inf, jnp.array([1.0, 1, 0]))])
def test_mindspore_gradients_of_none_equal_those_of_sum(target, valid, logit, weight):
    logits, target = jnp.array([[1.0, 2.0, logit]]), jnp.array([target], jnp.float32)

    def gradients(reduction):
        loss_of = mindspore.FocalLoss(weight, reduction=reduction)
        return jax.grad(lambda *args: jnp.sum(loss_of(*args)), (0, 1))(logits, target)

    (none, by_target), (wanted, wanted_by_target) = gradients("none"), gradients("sum")
    if valid:
        np.testing.assert_allclose(none, wanted, rtol=1e-5)
        np.testing.assert_allclose(by_target, wanted_by_target, rtol=1e-5)
    else:
        assert jnp.all(jnp.isnan(none))
        assert jnp.all(jnp.isnan(wanted))


def test_mindspore_indices_and_one_hot_differ_only_in_the_mean(volumes):
    logits, labels = volumes
    one_hot = jax.nn.one_hot(labels.squeeze(1), 3, axis=1)
    close = partial(np.testing.assert_allclose, rtol=1e-6)
    loss = {reduction: mindspore.FocalLoss(reduction=reduction) for reduction in ("none", "sum")}
    close(loss["sum"](logits, labels), loss["sum"](logits, one_hot))
    close(loss["none"](logits, labels), loss["none"](logits, one_hot).sum(1))
    mean = mindspore.FocalLoss()
    close(mean(logits, labels), 3 * mean(logits, one_hot))


def test_mindspore_truncates_floating_indices_and_rejects_negative_ones(volumes):
    logits, labels = volumes
    loss_of = mindspore.FocalLoss(reduction="none")
    np.testing.assert_array_equal(
        loss_of(logits, labels.astype(jnp.float32)), loss_of(logits, labels)
    )
    invalid = labels.at[1, 0, 0, 0].set(-1)
    assert jnp.isnan(loss_of(logits, invalid)).tolist() == [False, True]


def test_mindspore_64_bit_indices_do_not_wrap(volumes):
    logits, labels = volumes
    wide = np.asarray(labels).astype(np.int64)
    wide[1, 0, 0, 0] = 2**32
    assert jnp.isnan(mindspore.FocalLoss(reduction="none")(logits, wide)).tolist() == [False, True]


def test_mindspore_empty_inputs():
    for reduction, shape in {"mean": (), "sum": (), "none": (0,)}.items():
        loss = mindspore.FocalLoss(reduction=reduction)(jnp.zeros((0, 3)), np.zeros((0, 1), int))
        assert loss.shape == shape
        assert loss.sum() == 0
    loss = mindspore.FocalLoss()(jnp.zeros((2, 3, 0)), np.zeros((2, 1, 0), int))
    assert loss == 0


@pytest.mark.parametrize(
    ("message", "weight", "inputs"),
    [
        (r"\bpredict: got", None, (jnp.zeros(3), np.zeros(3, int))),
        (r"\bpredict: got", None, (np.zeros((2, 3), int), np.zeros((2, 1), int))),
        (r"\btarget: got", None, (jnp.zeros((2, 3)), np.zeros(2, int))),
        (r"\btarget: got", None, (jnp.zeros((2, 3, 4)), np.zeros((2, 1, 5), int))),
        (r"\btarget: got", None, (jnp.zeros((2, 3)), np.zeros((2, 1), bool))),
        (r"\btarget: got", None, (jnp.zeros((2, 3)), np.zeros((2, 3), complex))),
        (r"\bweight: got", jnp.ones(2), (jnp.zeros((2, 3)), np.zeros((2, 1), int))),
    ],
)
def test_mindspore_errors_name_the_argument(message, weight, inputs):
    with pytest.raises(ValueError, match=message):
        mindspore.FocalLoss(weight)(*inputs)


def test_mindspore_rejects_invalid_options_at_construction():
    with pytest.raises(ValueError, match="reduction: got 'max'"):
        mindspore.FocalLoss(reduction="max")
    for gamma in (-1, "2"):
        with pytest.raises(ValueError, match=f"gamma: got '?{gamma}"):
            mindspore.FocalLoss(gamma=gamma)
    for weight in ([-1.0, 1.0], "2", {}, [None, 1]):
        with pytest.raises(ValueError, match=r"weight: got .*, wanted a finite number >= 0"):
            mindspore.FocalLoss(weight=weight)


@pytest.mark.parametrize("weight", [None, [2.0, 1.0, 1.0]], ids=["no weight", "weight"])
def test_mindspore_terms_of_classes_with_large_negative_logits(weight):
    logits = jnp.array([[-jnp.inf, 0, 1], [-1e20, 0, 1], [-1e30, -1e25, 1]], jnp.float32)
    target = jnp.array([[1.0, 0, 0], [1, 0, 0], [0.5, 0.5, 0]], jnp.float32)
    first = 1 if weight is None else 2
    got = mindspore.FocalLoss(weight, reduction="none")(logits, target)
    want = [[np.inf, 0, 0], [first * 1e20, 0, 0], [first * 5e29, 5e24, 0]]
    np.testing.assert_allclose(got, want, rtol=1e-6)


# ---------------------------------------------------------------- pytorch-retinanet


def pytorch_losses(p, regressions, anchors, annotations):
    """Return both losses, and the gradient of each with respect to its own input."""
    losses, pullback = jax.vjp(
        lambda p, r: pytorch_retinanet.FocalLoss()(p, r, anchors, annotations), p, regressions
    )
    one, zero = jnp.ones_like(losses[0]), jnp.zeros_like(losses[0])
    return losses, pullback((one, zero))[0], pullback((zero, one))[1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", golden("retinanet"))
def test_pytorch_retinanet_matches_recorded_values(case):
    logits, regressions, anchors, annotations = (
        jnp.asarray(case[name])
        for name in ("class_logits", "box_regression", "anchors", "annotations")
    )
    p, to_logits = jax.vjp(jax.nn.sigmoid, logits)
    losses, p_gradient, gradient = jax.jit(pytorch_losses)(
        p, regressions, anchors[None], annotations
    )
    assert [loss.shape for loss in losses] == [(1,), (1,)]
    close = partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-9)
    close(losses[0], [case["classification_loss"]])
    close(losses[1], [case["regression_loss"]])
    close(to_logits(p_gradient)[0], case["class_logits_grad"])
    close(gradient, case["box_regression_grad"])


def test_pytorch_retinanet_clamps_like_pytorch():
    low, high = np.float32(1e-4), np.float32(1 - 1e-4)
    row = [0.0, np.nextafter(low, 0), low, 0.5, high, np.nextafter(high, 2), 1.0]
    p = jnp.asarray([[row, row]], jnp.float32)
    anchors = jnp.array([[[0.0, 0, 8, 8], [20, 20, 28, 28]]])
    annotations = jnp.array([[[0.0, 0, 8, 8, 6]]])
    losses, gradient, _ = jax.jit(pytorch_losses)(p, jnp.zeros((1, 2, 4)), anchors, annotations)
    inside = (row >= low) & (row <= high)
    # At the ends of the range the gradient is not halved, as in PyTorch. Beyond them it is 0.
    np.testing.assert_array_equal(gradient != 0, np.broadcast_to(inside, (1, 2, 7)))
    clamped = np.clip(np.asarray(p, float), 1e-4, 1 - 1e-4)
    target = np.zeros((1, 2, 7))
    target[0, 0, 6] = 1
    expected = np.where(
        target == 1,
        -0.25 * (1 - clamped) ** 2 * np.log(clamped),
        -0.75 * clamped**2 * np.log(1 - clamped),
    )
    np.testing.assert_allclose(losses[0], [expected.sum()], rtol=1e-3)
    slope = 0.75 * (clamped**2 / (1 - clamped) - 2 * clamped * np.log(1 - clamped))
    np.testing.assert_allclose(gradient[0, 1], (slope * inside)[0, 1], rtol=1e-3)
    assert losses[1] == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_pytorch_retinanet_clamps_16_bit_probabilities(dtype):
    row = [0.0, 2e-5, 3e-4, 0.5, 0.9951171875, 1.0]  # 0.995 rounds to less than 1 in both dtypes
    p = jnp.asarray([[row, row]], dtype)
    anchors = jnp.array([[[0.0, 0, 8, 8], [20, 20, 28, 28]]])
    annotations = jnp.array([[[0.0, 0, 8, 8, 0]]])
    arguments = jnp.zeros((1, 2, 4)), anchors, annotations
    losses, gradient, _ = jax.jit(pytorch_losses)(p, *arguments)
    exact, exact_gradient, _ = jax.jit(pytorch_losses)(p.astype(jnp.float32), *arguments)
    np.testing.assert_array_equal(losses, exact)
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, exact_gradient.astype(dtype))
    assert np.isfinite(losses[0]).all()
    np.testing.assert_array_equal(
        gradient[0, 1].astype(bool), [False, False, True, True, True, False]
    )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("classifications", {0: jnp.zeros((2, 5, 3), int)}),
        ("anchors", {2: jnp.zeros((5, 4))}),
        ("anchors", {2: jnp.zeros((2, 5, 4))}),
        ("annotations", {3: jnp.zeros((2, 1, 4))}),
    ],
)
def test_pytorch_retinanet_errors_name_the_argument(name, change):
    inputs = [jnp.zeros(shape) for shape in [(2, 5, 3), (2, 5, 4), (1, 5, 4), (2, 1, 5)]]
    for i, bad in change.items():
        inputs[i] = bad
    with pytest.raises(ValueError, match=rf"\b{name}: got"):
        pytorch_retinanet.FocalLoss()(*inputs)


# ---------------------------------------------------------------- imports


def test_only_caffe_loads_protobuf():
    script = (
        "import sys, focal_jax.compat as compat\n"
        "compat.mindspore.FocalLoss, compat.pytorch_retinanet.FocalLoss\n"
        "assert 'google.protobuf' not in sys.modules\n"
        "compat.caffe.FocalLossLayer\n"
        "assert 'google.protobuf' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_integer_anchors_of_pytorch_retinanet_do_not_wrap():
    box = [0, 0, 2**32, 2**32]
    arrays = jnp.full((1, 1, 2), 0.5), jnp.zeros((1, 1, 4))
    loss = partial(pytorch_retinanet.FocalLoss(), *arrays)
    annotations = np.array([[[*box, 0]]], np.float32)
    got, want = (loss(anchors, annotations)[0] for anchors in ([[box]], np.float32([[box]])))
    np.testing.assert_array_equal(got, want)


def test_a_caffe_layer_with_a_list_of_jax_numbers():
    layer = FocalLossLayer(alpha=list(jnp.array([0.5, 1.0, 2.0])))
    assert hash(layer) == hash(FocalLossLayer(alpha=[0.5, 1.0, 2.0]))
    assert hash(FocalLossLayer(ignore_label=jnp.array(255))) == hash(
        FocalLossLayer(ignore_label=255)
    )
    with pytest.raises(InputError, match="alpha: got -1"):
        FocalLossLayer(alpha=[jnp.array(-1.0), 1.0])
    layer = FocalLossLayer(alpha=[0.5])
    assert FocalLossLayer.from_prototxt(layer.to_prototxt()) == layer


def test_integer_weights_of_mindspore_are_not_rounded_to_16_bits():
    logits, target = jnp.zeros((1, 2), jnp.bfloat16), jnp.array([[1]])
    for weight in ([1, 100001], [1.0, 100001.0]):
        loss = mindspore.FocalLoss(weight=weight, gamma=0.0)(logits, target)
        np.testing.assert_allclose(loss, 100001 * np.log(2), rtol=1e-6)
