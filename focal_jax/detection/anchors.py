"""The anchors of a feature pyramid."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from focal_jax import _checks

__all__ = ["pyramid_anchors"]


def pyramid_anchors(
    image_shape: tuple[int, int],
    levels: Sequence[int] = (3, 4, 5, 6, 7),
    scales: Sequence[float] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)),
    ratios: Sequence[float] = (0.5, 1.0, 2.0),
    *,
    center: float = 0.5,
    whole_pixels: bool = False,
) -> Array:
    r"""Lay out a RetinaNet's anchors over an image.

    Level `l` of the pyramid has a cell for every `2**l` pixels begun, and every cell has
    at its center one anchor for each ratio and scale, of the area `(4 * 2**l * scale)**2`.
    `center=0.0, whole_pixels=True` are the anchors of torchvision's RetinaNet, `center=0.0`
    alone those of detectron2 and mmdetection.

    Args:
      image_shape: height and width of the image in pixels.
      levels: the levels of the pyramid, finest first; the paper's are P3 to P7.
      scales: sides of an anchor, in units of 4 cells; the paper has three an octave.
      ratios: height over width.
      center: where in its cell the center of an anchor is, in [0, 1]: 0.5 in the middle, 0 in
        the corner of the least coordinates.
      whole_pixels: count in whole pixels, as torchvision does: the side of a square anchor is
        cut to a whole number, half a side is rounded to one, and the cells of a level are
        `image size // number of cells` apart, which differs from `2**l` where the image is no
        multiple of that.

    Returns:
      `[A, 4]`, boxes `(x1, y1, x2, y2)` in JAX's default floating dtype, in the order of
      a network's output: by level, row of cells, cell, ratio, scale. They reach over the
      edges of the image.

    Raises:
      ValueError: for sizes, scales or ratios that are not positive, a `center` outside [0, 1],
        or a `whole_pixels` that is not a Python bool.

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
    whole_pixels = _checks.flag("whole_pixels", whole_pixels)
    if not isinstance(center, int | float) or not 0 <= center <= 1:
        raise _checks.InputError(f"center: got {center!r}, wanted a number in [0, 1]")
    given = {"image_shape": image_shape, "levels": levels, "scales": scales, "ratios": ratios}
    for name, numbers in given.items():
        if np.ndim(numbers) != 1 or np.asarray(numbers).dtype.kind not in "iuf":
            raise _checks.InputError(f"{name}: got {numbers!r}, wanted several numbers")
        if name != "levels" and min(numbers, default=1) <= 0:
            raise _checks.InputError(f"{name}: got {tuple(numbers)}, wanted positive numbers")
    heights = np.sqrt(ratios)[:, None, None]
    shapes = np.concatenate([1 / heights, heights], -1) / 2  # half a side, of a square of 1

    pyramid = [np.zeros((0, 4))]
    for stride in (2**level for level in levels):
        sides = 4 * stride * np.asarray(scales)[:, None]
        half = (np.floor(sides) if whole_pixels else sides) * shapes
        half = (np.round(half) if whole_pixels else half).reshape(-1, 2)
        cells = [-(-size // stride) for size in image_shape]
        apart = [size // n if whole_pixels else stride for size, n in zip(image_shape, cells)]
        y, x = (step * (np.arange(n) + center) for step, n in zip(apart, cells))
        centers = np.stack(np.broadcast_arrays(x[None], y[:, None]), -1).reshape(-1, 1, 2)
        pyramid.append(np.concatenate([centers - half, centers + half], -1).reshape(-1, 4))
    return jnp.asarray(np.concatenate(pyramid), jnp.result_type(float))
