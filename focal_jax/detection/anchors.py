"""The anchors of a feature pyramid."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from focal_jax import _checks


def pyramid_anchors(
    image_shape: tuple[int, int],
    levels: Sequence[int] = (3, 4, 5, 6, 7),
    scales: Sequence[float] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)),
    ratios: Sequence[float] = (0.5, 1.0, 2.0),
) -> Array:
    r"""Lay out a RetinaNet's anchors over an image.

    Level `l` of the pyramid has a cell for every `2**l` pixels begun, and every cell has
    at its center one anchor for each ratio and scale, of the area `(4 * 2**l * scale)**2`.

    Args:
      image_shape: height and width of the image in pixels.
      levels: the levels of the pyramid, finest first; the paper's are P3 to P7.
      scales: sides of an anchor, in units of 4 cells; the paper has three an octave.
      ratios: height over width.

    Returns:
      `[A, 4]`, boxes `(x1, y1, x2, y2)` in JAX's default floating dtype, in the order of
      a network's output: by level, row of cells, cell, ratio, scale. They reach over the
      edges of the image.

    Raises:
      ValueError: for sizes, scales or ratios that are not positive.

    Differentiation: none; the anchors are constants, computed once by NumPy.

    Example:
      >>> from focal_jax.detection import pyramid_anchors
      >>> pyramid_anchors((600, 1000)).shape
      (113193, 4)
      >>> pyramid_anchors((8, 16), levels=[3], scales=[1], ratios=[1]).tolist()
      [[-12.0, -12.0, 20.0, 20.0], [-4.0, -12.0, 28.0, 20.0]]

    References:
      Lin, Goyal, Girshick, He, Dollar. [Focal Loss for Dense Object
      Detection](https://arxiv.org/abs/1708.02002). ICCV 2017. Section 4.
    """
    for name, numbers in {"image_shape": image_shape, "scales": scales, "ratios": ratios}.items():
        if min(numbers, default=1) <= 0:
            raise _checks.InputError(f"{name}: got {tuple(numbers)}, wanted positive numbers")
    heights = np.sqrt(ratios)[:, None] * np.asarray(scales)[None]
    widths = heights / np.asarray(ratios)[:, None]
    half_sides = np.stack([widths, heights], -1).reshape(-1, 2) / 2
    shapes = np.concatenate([-half_sides, half_sides], -1)

    pyramid = [np.zeros((0, 4))]
    for stride in (2**level for level in levels):
        y, x = (stride * (np.arange(-(-size // stride)) + 0.5) for size in image_shape)
        centers = np.stack(np.broadcast_inputs(x[None], y[:, None]), -1).reshape(-1, 1, 2)
        anchors = np.tile(centers, 2) + 4 * stride * shapes
        pyramid.append(anchors.reshape(-1, 4))
    return jnp.asarray(np.concatenate(pyramid), jnp.result_type(float))
