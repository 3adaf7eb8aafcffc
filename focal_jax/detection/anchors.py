"""Anchors of a feature pyramid."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from focal_jax.detection.boxes import UNIT
from focal_jax.engine import arguments
from focal_jax.engine.arguments import InputError, shown
from focal_jax.engine.options import check_call, known_numbers

__all__ = ["pyramid_anchors"]

_MAX_ANCHORS = 10**8  # 1.6 GB in float32


def _numbers(name: str, values: Any, wanted: str, low: float, high: float) -> np.ndarray:
    """Return a sequence of Python or NumPy numbers in `[low, high]` as a float64 array."""
    known = known_numbers(values, name, wanted)
    valid = known is not None and known.ndim == 1 and np.all((known >= low) & (known <= high))
    if known is None or not valid or any(isinstance(value, bool) for value in values):
        raise InputError(f"{name}: got {shown(values)}, wanted {wanted}")
    return known


def _integers(name: str, values: Any, wanted: str, low: float, high: float) -> list[int]:
    numbers = _numbers(name, values, wanted, low, high)
    if np.any(numbers % 1):
        raise InputError(f"{name}: got {shown(values)}, wanted {wanted}")
    return [int(number) for number in numbers]


@check_call
def pyramid_anchors(
    image_shape: tuple[int, int],
    levels: Sequence[int] = (3, 4, 5, 6, 7),
    scales: Sequence[float] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)),
    ratios: Sequence[float] = (0.5, 1.0, 2.0),
    *,
    center: float = 0.5,
    whole_pixels: bool = False,
) -> Array:
    r"""Generate the anchors of a RetinaNet for an image.

    Level `l` divides the image into cells of `2**l` pixels; the last cell of a row or column can
    extend beyond the image. Each cell has one anchor per ratio and scale, with the area
    `(4 * 2**l * scale)**2`. `center=0.0, whole_pixels=True` gives the anchors of torchvision's
    RetinaNet, and `center=0.0` alone those of Detectron2 and MMDetection.

    Example:
      >>> from focal_jax.detection import pyramid_anchors
      >>> pyramid_anchors((600, 1000)).shape
      (113193, 4)
      >>> pyramid_anchors((8, 16), levels=[3], scales=[1], ratios=[1]).tolist()
      [[-12.0, -12.0, 20.0, 20.0], [-4.0, -12.0, 28.0, 20.0]]

    Args:
      image_shape: height and width of the image in pixels.
      levels: the levels of the pyramid, finest first. The defaults are the paper's P3 to P7.
      scales: anchor sizes in units of 4 cells.
      ratios: height divided by width.
      center: the position of the anchor's center in its cell, in [0, 1]. 0.5 is the center of the
        cell and 0 is its top left corner.
      whole_pixels: whether to round like torchvision: the side of a square anchor is rounded down,
        half a side is rounded to the nearest integer, and the distance of two cells is
        `image size // number of cells`, which differs from `2**l` if the image size is not a
        multiple of `2**l`.

    Returns:
      `[A, 4]` in JAX's default floating dtype, ordered by level, row, column, ratio and scale.
      The anchors are constants computed by NumPy, and are not clipped to the image.

    References:
      [Focal Loss for Dense Object Detection](https://arxiv.org/abs/1708.02002). ICCV 2017.
    """
    whole_pixels = arguments.static_bool("whole_pixels", whole_pixels)
    center = UNIT.static("center", center)
    sizes = _integers("image_shape", image_shape, "two positive integers", 1, 2**31)
    if len(sizes) != 2:
        raise InputError(f"image_shape: got {image_shape}, wanted two positive integers")
    wanted = "a sequence of integers in [0, 30]"
    strides = [2**level for level in _integers("levels", levels, wanted, 0, 30)]
    wanted = "a sequence of numbers in [1e-6, 1e6]"
    units = _numbers("scales", scales, wanted, 1e-6, 1e6)
    aspect = np.sqrt(_numbers("ratios", ratios, wanted, 1e-6, 1e6))[:, None, None]
    count = sum(-(-sizes[0] // n) * -(-sizes[1] // n) for n in strides) * units.size * aspect.size
    if count > _MAX_ANCHORS:
        raise InputError(
            f"image_shape: got {image_shape}, which has {count:,} anchors, wanted at most "
            f"{_MAX_ANCHORS:,}"
        )
    half_unit_sides = np.concatenate([1 / aspect, aspect], -1) / 2

    pyramid = [np.zeros((0, 4))]
    for stride in strides:
        sides = 4 * stride * units[:, None]
        half = (np.floor(sides) if whole_pixels else sides) * half_unit_sides
        half = (np.round(half) if whole_pixels else half).reshape(-1, 2)
        cells = [-(-size // stride) for size in sizes]
        steps = [size // n if whole_pixels else stride for size, n in zip(sizes, cells)]
        y, x = (step * (np.arange(n) + center) for step, n in zip(steps, cells))
        centers = np.stack(np.broadcast_arrays(x[None], y[:, None]), -1).reshape(-1, 1, 2)
        pyramid.append(np.concatenate([centers - half, centers + half], -1).reshape(-1, 4))
    return jnp.asarray(np.concatenate(pyramid), jnp.result_type(float))
