"""A small RetinaNet in Flax NNX: backbone, feature pyramid, and two heads for all levels."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import jax.numpy as jnp
from flax import nnx
from jax import Array

from examples.retinanet_digits.data import CLASSES, SIZE
from focal_jax.detection import pyramid_anchors
from focal_jax.training import prior_bias_init

LEVELS = (2, 3, 4)  # strides 4, 8 and 16
SCALES = (0.5, 2 ** (-2 / 3), 2 ** (-1 / 3))  # three per octave: anchors of 8 to 50 pixels
RATIOS = (0.5, 1.0, 2.0)
SHAPES = len(SCALES) * len(RATIOS)  # anchors per cell
WIDTHS = (24, 32, 48)  # channels of the backbone stages; the pyramid has WIDTHS[0]

_conv = partial(nnx.Conv, kernel_size=(3, 3))


def anchors() -> Array:
    """Return the anchors `[A, 4]` of a canvas, in the order of the outputs of the network."""
    return pyramid_anchors((SIZE, SIZE), LEVELS, SCALES, RATIOS)


def _patches(x: Array, side: int) -> Array:
    """Return `[B, H / side, W / side, side**2 C]`: the pixels of each patch in one row.

    With a linear layer this is a strided convolution, which is slow on XLA:CPU.
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    return x.swapaxes(2, 3).reshape(batch, height // side, width // side, -1)


class Backbone(nnx.Module):
    """Features of an image at three resolutions, each half of the previous one."""

    def __init__(self, rngs: nnx.Rngs, patch: int = 4, widths: Sequence[int] = WIDTHS):
        """Initialize the layers from `rngs`. `patch` is the stride of the first stage."""
        self.patch = patch
        self.stem = _conv(patch**2, widths[0], rngs=rngs)
        self.start = nnx.Linear(widths[0], widths[0], rngs=rngs)
        pairs = list(pairwise(widths))
        self.down = nnx.List([nnx.Linear(4 * a, b, rngs=rngs) for a, b in pairs])
        self.mix = nnx.List([_conv(b, b, rngs=rngs) for _, b in pairs])

    def __call__(self, images: Array) -> list[Array]:
        """Return the features of images `[B, H, W, 1]` in [0, 255], finest first."""
        x = nnx.relu(self.stem(_patches(images / 128 - 0.5, self.patch)))
        features = [nnx.relu(self.start(x))]
        for down, mix in zip(self.down, self.mix):
            x = nnx.relu(down(_patches(features[-1], 2)))
            features.append(x + nnx.relu(mix(x)))
        return features


class Classifier(nnx.Module):
    """A classifier of single digits, which pretrains the backbone."""

    def __init__(self, rngs: nnx.Rngs):
        """Initialize the layers from `rngs`."""
        self.backbone = Backbone(rngs)
        self.last = nnx.Linear(sum(WIDTHS), CLASSES, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Return logits `[B, CLASSES]`."""
        features = [x.max((1, 2)) for x in self.backbone(images)]
        return self.last(jnp.concatenate(features, 1))


class Pyramid(nnx.Module):
    """A backbone and a feature pyramid, which adds coarser features to finer ones."""

    def __init__(self, rngs: nnx.Rngs, patch: int = 4, widths: Sequence[int] = WIDTHS):
        """Initialize the layers from `rngs`."""
        self.backbone = Backbone(rngs, patch, widths)
        self.lateral = nnx.List([nnx.Linear(width, widths[0], rngs=rngs) for width in widths])
        self.norms = nnx.List([nnx.LayerNorm(widths[0], rngs=rngs) for _ in widths])

    def __call__(self, images: Array) -> list[Array]:
        """Return the features of each level of images `[B, H, W, 1]` in [0, 255], finest first."""
        levels = [lateral(x) for lateral, x in zip(self.lateral, self.backbone(images))]
        for i in reversed(range(len(levels) - 1)):
            levels[i] += levels[i + 1].repeat(2, 1).repeat(2, 2)
        return [norm(x) for norm, x in zip(self.norms, levels)]


class Head(nnx.Module):
    """A head that predicts `values` numbers per anchor of a level."""

    def __init__(self, values: int, prior: float | None, rngs: nnx.Rngs, width: int = WIDTHS[0]):
        """Initialize the layers from `rngs`. `prior` initializes the last bias; None means 0."""
        self.values = values
        self.mix = _conv(width, width, rngs=rngs)
        self.last = nnx.Linear(
            width,
            SHAPES * values,
            bias_init=prior_bias_init(prior) if prior else nnx.initializers.zeros,
            rngs=rngs,
        )

    def __call__(self, x: Array) -> Array:
        """Return `[B, cells * SHAPES, values]`."""
        return self.last(nnx.relu(self.mix(x))).reshape(len(x), -1, self.values)


class RetinaNet(nnx.Module):
    """A RetinaNet, which predicts class logits and box offsets for every anchor."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        prior: float | None = 0.01,
        classes: int = CLASSES,
        patch: int = 4,
        widths: Sequence[int] = WIDTHS,
    ):
        """Initialize the layers. `prior` is the initial probability of each class."""
        self.pyramid = Pyramid(rngs, patch, widths)
        self.classes = Head(classes, prior, rngs, widths[0])
        self.boxes = Head(4, None, rngs, widths[0])

    def __call__(self, images: Array) -> tuple[Array, Array]:
        """Return logits `[B, A, classes]` and offsets `[B, A, 4]` of images `[B, H, W, 1]`."""
        levels = self.pyramid(images)
        classes, boxes = ([head(x) for x in levels] for head in (self.classes, self.boxes))
        return jnp.concatenate(classes, 1), jnp.concatenate(boxes, 1)
