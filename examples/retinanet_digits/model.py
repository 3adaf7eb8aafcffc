"""A small RetinaNet in Flax NNX: backbone, feature pyramid, two heads shared by the levels."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from examples.retinanet_digits.data import CLASSES, SIZE
from focal_jax.detection import pyramid_anchors
from focal_jax.training import prior_bias_init

LEVELS = (2, 3, 4)  # strides 4, 8 and 16, anchors of about 16, 32 and 64 pixels
SCALES = (1.0,)
RATIOS = (0.5, 1.0, 2.0)
SHAPES = len(SCALES) * len(RATIOS)  # anchors a cell

_conv = partial(nnx.Conv, kernel_size=(3, 3))


def anchors() -> Array:
    """Return the anchors `[A, 4]` of a canvas, in the order of the network's outputs."""
    return pyramid_anchors((SIZE, SIZE), LEVELS, SCALES, RATIOS)


class Stage(nnx.Module):
    """Halve the resolution."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        """Initialize the layers from `rngs`."""
        self.down = _conv(inputs, outputs, strides=2, use_bias=False, rngs=rngs)
        self.mix = _conv(outputs, outputs, use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs) for _ in "ab"])

    def __call__(self, x: Array) -> Array:
        """Return features of half the height and width."""
        for layer, norm in zip((self.down, self.mix), self.norms):
            x = nnx.relu(norm(layer(x)))
        return x


class Pyramid(nnx.Module):
    """A convolutional backbone, and the features of each of its stages mixed with coarser ones."""

    def __init__(self, width: int, rngs: nnx.Rngs, *, stem_stride: int = 2):
        """Initialize the layers from `rngs`."""
        self.stem = _conv(1, width // 2, strides=stem_stride, rngs=rngs)
        inputs = (width // 2, *[width] * len(LEVELS))
        self.backbone = nnx.List([Stage(*pair, rngs) for pair in pairwise(inputs)])
        self.lateral = nnx.List([nnx.Conv(width, width, (1, 1), rngs=rngs) for _ in LEVELS])

    def __call__(self, images: Array) -> list[Array]:
        """Return the features of each level of images `[B, H, W, 1]` in [0, 255], finest first."""
        features = [nnx.relu(self.stem(images / 255))]
        for stage in self.backbone:
            features.append(stage(features[-1]))
        levels = [lateral(x) for lateral, x in zip(self.lateral, features[1:])]
        for i in reversed(range(len(levels) - 1)):
            levels[i] += jax.image.resize(levels[i + 1], levels[i].shape, "nearest")
        return levels


class Head(nnx.Module):
    """Predict `values` numbers for every anchor of a level."""

    def __init__(self, width: int, values: int, prior: float | None, rngs: nnx.Rngs):
        """Initialize the layers from `rngs`, the last bias from the prior, or with 0."""
        self.values = values
        self.mix = _conv(width, width, rngs=rngs)
        self.last = _conv(
            width,
            SHAPES * values,
            bias_init=prior_bias_init(prior) if prior else nnx.initializers.zeros,
            rngs=rngs,
        )

    def __call__(self, x: Array) -> Array:
        """Return `[B, cells * anchors a cell, values]`."""
        return self.last(nnx.relu(self.mix(x))).reshape(len(x), -1, self.values)


class RetinaNet(nnx.Module):
    """Class logits and box offsets for every anchor."""

    def __init__(self, rngs: nnx.Rngs, *, prior: float | None = 0.01, width: int = 24):
        """Initialize the layers; `prior` is every class's probability at the start."""
        self.pyramid = Pyramid(width, rngs)
        self.classes = Head(width, CLASSES, prior, rngs)
        self.boxes = Head(width, 4, None, rngs)

    def __call__(self, images: Array) -> tuple[Array, Array]:
        """Return logits `[B, A, CLASSES]` and offsets `[B, A, 4]` of images `[B, H, W, 1]`."""
        levels = self.pyramid(images)
        classes, boxes = ([head(x) for x in levels] for head in (self.classes, self.boxes))
        return jnp.concatenate(classes, 1), jnp.concatenate(boxes, 1)
