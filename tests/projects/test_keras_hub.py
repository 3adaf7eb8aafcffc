"""Detectors of Keras Hub with their own losses and with those of `focal_jax.compat.keras`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from pages import run
from steps import assert_equal_trainings, three_steps

from focal_jax import varifocal_loss
from focal_jax.compat.keras import SigmoidFocalLoss

keras = pytest.importorskip("keras")
keras_hub = pytest.importorskip("keras_hub")

rng = np.random.default_rng(0)
CLASSES = 3


@pytest.fixture(scope="module")
def page():
    return run(Path(__file__).parents[2] / "docs" / "detection-transformers.md")


def _retinanet():
    """Return a small RetinaNet with random weights, the same on every call."""
    keras.utils.set_random_seed(0)
    encoder = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 8, 8, 8],
        stackwise_num_blocks=[1, 1, 1, 1],
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="basic_block",
        image_shape=(64, 64, 3),
    )
    backbone = keras_hub.models.RetinaNetBackbone(
        image_encoder=encoder, min_level=3, max_level=4, use_p5=False, image_shape=(64, 64, 3)
    )
    model = keras_hub.models.RetinaNetObjectDetector(
        backbone=backbone,
        num_classes=CLASSES,
        bounding_box_format="xyxy",
        pre_logits_num_conv_layers=1,
        activation="linear",  # the predictions are logits
        preprocessor=None,
    )
    # Small logits, because Keras clips the probabilities of logits beyond 16.
    for variable in model.get_layer("classification_head").trainable_variables:
        variable.assign(variable / 2)
    return model


def test_retinanet_trains_as_with_the_loss_of_keras():
    images = rng.normal(size=(2, 64, 64, 3)).astype(np.float32)
    assert np.abs(_retinanet()(images, training=True)["cls_logits"]).max() < 10
    boxes = np.array([[[4, 4, 40, 36], [20, 8, 60, 50]], [[8, 8, 40, 40], [-1, -1, -1, -1]]], float)
    labels = {"boxes": boxes.astype(np.float32), "labels": np.array([[0, 2], [1, -1]], np.float32)}

    # `fit` of Keras Hub needs TensorFlow, so the steps call its loss themselves.
    def trained(classification_loss):
        model = _retinanet()
        box_loss = keras.losses.MeanAbsoluteError(reduction="sum")
        model.compile(box_loss=box_loss, classification_loss=classification_loss)
        variables = model.trainable_variables

        def total(params):
            with keras.StatelessScope(state_mapping=list(zip(variables, params))):
                predictions = model(images, training=True)
                return model.compute_loss(images, dict(labels), predictions, None)

        return three_steps(total, [variable.value for variable in variables], 1e-3)

    original = keras.losses.BinaryFocalCrossentropy(
        apply_class_balancing=True, alpha=0.25, gamma=2.0, from_logits=True, reduction="sum"
    )
    replacement = SigmoidFocalLoss(alpha=0.25, gamma=2.0, reduction="sum")
    assert_equal_trainings(trained(original), trained(replacement))


def _d_fine():
    """Return a small D-FINE with random weights, the same on every call."""
    keras.utils.set_random_seed(0)
    encoder = keras_hub.models.HGNetV2Backbone(
        stem_channels=[3, 8, 8],
        stackwise_stage_filters=[[8, 8, 16, 1, 1, 3], [16, 8, 32, 1, 1, 3]],
        apply_downsample=[False, True],
        use_lightweight_conv_block=[False, False],
        depths=[1, 1],
        hidden_sizes=[16, 32],
        embedding_size=8,
        use_learnable_affine_block=True,
        hidden_act="relu",
        image_shape=(64, 64, 3),
        out_features=["stage1", "stage2"],
    )
    backbone = keras_hub.models.DFineBackbone(
        backbone=encoder,
        decoder_in_channels=[16, 16],
        encoder_hidden_dim=16,
        num_denoising=0,
        num_labels=CLASSES,
        hidden_dim=16,
        learn_initial_query=False,
        num_queries=12,
        anchor_image_size=(64, 64),
        feat_strides=[4, 8],
        num_feature_levels=2,
        encoder_in_channels=[16, 32],
        encode_proj_layers=[1],
        num_attention_heads=2,
        encoder_ffn_dim=16,
        num_encoder_layers=1,
        hidden_expansion=0.5,
        depth_multiplier=0.34,
        eval_idx=-1,
        num_decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        decoder_n_points=[2, 2],
        lqe_hidden_dim=8,
        num_lqe_layers=2,
        out_features=["stage1", "stage2"],
        image_shape=(64, 64, 3),
        seed=0,
    )
    return keras_hub.models.DFineObjectDetector(
        backbone=backbone, num_classes=CLASSES, bounding_box_format="xyxy"
    )


def test_d_fine_trains_as_with_the_class_loss_of_keras_hub(page, monkeypatch):
    detector = pytest.importorskip("keras_hub.src.models.d_fine.d_fine_object_detector")
    images = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    boxes = np.array([[[0.3, 0.3, 0.2, 0.3], [0.6, 0.5, 0.3, 0.4]]], np.float32)
    labels = {"boxes": boxes, "labels": np.array([[0, 2]])}

    def with_focal_jax(outputs, targets, indices, num_boxes, num_classes, alpha, gamma):
        def class_loss(logits, positive, quality):
            options = {"positive": positive, "stop_weight_gradient": True}
            return varifocal_loss(logits, quality, alpha=alpha, gamma=gamma, **options)

        (objects,), (query, item, valid) = targets, (x[0] for x in indices)
        # Keras Hub writes the rows of its padding over the match of the first query.
        valid &= query > 0
        classes = jnp.where(valid, objects["labels"].ravel()[item], -1)
        matched = query, classes, objects["boxes"].reshape(-1, 4)[item]
        pairs = outputs["logits"][0], outputs["pred_boxes"][0], *matched
        return {"loss_vfl": page["losses_of_pairs"](*pairs, class_loss)[-1] / num_boxes}

    def trained():
        model = _d_fine()
        variables = model.trainable_variables

        def total(params):
            with keras.StatelessScope(state_mapping=list(zip(variables, params))):
                predictions = model(images, training=True)
                return model.compute_loss(images, labels, predictions, None)

        params = [variable.value for variable in variables]
        # One array, because some gradients are small beside the rounding of the others.
        gradients, _ = ravel_pytree(jax.jit(jax.grad(total))(params))
        # With a larger rate the matching changes, and the loss rises.
        return gradients, *three_steps(total, params, 3e-6)

    original = trained()
    monkeypatch.setattr(detector, "compute_vfl_loss", with_focal_jax)
    assert_equal_trainings(original, trained())


def test_d_fine_edges(page):
    d_fine = pytest.importorskip("keras_hub.src.models.d_fine.d_fine_loss")
    edges = jnp.asarray(rng.normal(size=(8, 9)), jnp.float32)
    label = jnp.asarray(rng.uniform(0, 7.9, 8), jnp.float32)
    weight_left, weight_right = jnp.asarray(rng.uniform(0, 1, (2, 8)), jnp.float32)

    def original(edges):
        return d_fine.unimodal_distribution_focal_loss(edges, label, weight_right, weight_left)

    def with_focal_jax(edges):
        objects = (2, 4)  # two boxes with four edges each
        left = jnp.floor(label).astype(jnp.int32).reshape(objects)
        weights = weight_left.reshape(objects), weight_right.reshape(objects)
        return page["edge_loss"](edges.reshape(*objects, -1), left, *weights, jnp.ones(2), 1)

    assert_equal_trainings(*(jax.value_and_grad(f)(edges) for f in (original, with_focal_jax)))


def test_d_fine_varifocal_loss(page):
    d_fine = pytest.importorskip("keras_hub.src.models.d_fine.d_fine_loss")
    queries = 7
    logits = jnp.asarray(rng.normal(size=(1, queries, CLASSES)), jnp.float32)
    boxes = jnp.asarray(rng.uniform(0.3, 0.6, (1, queries, 4)), jnp.float32)
    classes = jnp.array([2, 0, 1])
    objects = jnp.asarray(rng.uniform(0.3, 0.6, (3, 4)), jnp.float32)
    query, item = jnp.array([[4, 1, 6]]), jnp.array([[0, 1, 2]])
    targets = [{"labels": classes, "boxes": objects}]
    pairs = query, item, jnp.ones((1, 3), bool)

    def original(logits):
        outputs = {"logits": logits, "pred_boxes": boxes}
        return d_fine.compute_vfl_loss(outputs, targets, pairs, 3, CLASSES, 0.75, 2.0)["loss_vfl"]

    def with_focal_jax(logits):
        pairs = logits[0], boxes[0], query[0], classes, objects
        return page["losses_of_pairs"](*pairs, page["varifocal"])[-1] / 3

    assert_equal_trainings(*(jax.value_and_grad(f)(logits) for f in (original, with_focal_jax)))
