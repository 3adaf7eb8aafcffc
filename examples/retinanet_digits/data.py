"""A detection set made on the fly: real handwritten digits on cluttered canvases.

scikit-learn's digits are split image by image, so that a digit of the test canvases is
never seen in training. Each canvas has up to three whole digits, to be found, and a crowd of
things that are nearly digits: corners of digits, digits cut up and shuffled, lines.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.ndimage import zoom
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CLASSES = 10
SIZE = 128  # of a canvas, pixels
OBJECTS = 3  # on a canvas, at most
HEIGHTS = (14, 64)  # of an object, pixels
PIXELS = (np.arange(SIZE) + 1j * np.arange(SIZE)[:, None]).astype(np.complex64)


class Canvases(NamedTuple):
    """Images with what is on them."""

    images: np.ndarray  # [N, SIZE, SIZE, 1] uint8
    annotations: np.ndarray  # [N, OBJECTS, 5] float32: x1, y1, x2, y2, digit; rows of -1 pad


@cache
def digits(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images `[n, 8, 8]` in [0, 1] and the labels of one half, "train" or "test"."""
    data = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        (data.images / 16).astype(np.float32),
        data.target,
        test_size=0.5,
        stratify=data.target,
        random_state=0,
    )
    return {"train": (train_x, train_y), "test": (test_x, test_y)}[part]


def enlarged(image: np.ndarray, height: float) -> np.ndarray:
    """Return the inked part of a small image, cut out and scaled to a height."""
    rows, columns = (np.flatnonzero((image > 0.3).any(axis)) for axis in (1, 0))
    inked = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return zoom(inked, height / len(inked), order=1, grid_mode=True, mode="nearest")


def draw(canvas: np.ndarray, patch: np.ndarray, x: int, y: int, contrast: float):
    """Paint a patch on a canvas, the brighter of the two remains; return where, as slices."""
    place = np.s_[y : y + len(patch), x : x + patch.shape[1]]
    under = canvas[place]
    np.maximum(under, contrast * patch[: len(under), : under.shape[1]], out=under)
    return place


def find_room(patch: np.ndarray, free: np.ndarray, random: np.random.Generator):
    """Return a random `(x, y)` for a patch, None if that is taken; `free` is brought up to date."""
    (height, width), (rows, columns) = patch.shape, free.shape
    x, y = random.integers(columns - width + 1), random.integers(rows - height + 1)
    place = np.s_[y : y + height, x : x + width]
    if not free[place].all():
        return None
    free[place] = False
    return x, y


def _height(random: np.random.Generator) -> float:
    return np.exp(random.uniform(*np.log(HEIGHTS)))


def _corner(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    y, x = 4 * random.integers(2, size=2)
    return image[y : y + 4, x : x + 4]


def _shuffled(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    blocks = image.reshape(4, 2, 4, 2).swapaxes(1, 2).reshape(16, 2, 2)
    return random.permutation(blocks).reshape(4, 4, 2, 2).swapaxes(1, 2).reshape(8, 8)


def _line(random: np.random.Generator) -> np.ndarray:
    turn = np.exp(1j * random.uniform(0, np.pi))
    along_across = (PIXELS - SIZE * (random.uniform() + 1j * random.uniform())) * turn
    width, length = random.uniform(0.5, 3), random.uniform(5, 60)
    inside = np.abs(along_across.real) < length
    return np.clip(width - np.abs(along_across.imag), 0, 1) * inside


def background(source: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return a canvas of haze, noise, lines and parts of the digits of `source`."""
    haze = zoom(random.uniform(0, 0.25, (4, 4)), SIZE // 4, order=1, grid_mode=True, mode="nearest")
    canvas = haze.astype(np.float32)
    for _ in range(random.integers(1, 4)):
        draw(canvas, _line(random), 0, 0, random.uniform(0.5, 1))
    for _ in range(random.integers(4, 9)):
        image = source[random.integers(len(source))]
        part = random.choice([_corner, _shuffled])(image, random)
        if (part > 0.3).any():
            patch = enlarged(part, _height(random) / 2)
            draw(canvas, patch, *random.integers(0, SIZE - 8, 2), random.uniform(0.5, 1))
    return canvas


def canvas(part: str, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return one image `[SIZE, SIZE, 1]` and its annotations `[OBJECTS, 5]`."""
    images, labels = digits(part)
    picture = background(images, random)
    annotations = np.full((OBJECTS, 5), -1, np.float32)
    free = np.ones((SIZE, SIZE), bool)
    for row in range(random.integers(1, OBJECTS + 1)):
        chosen = random.integers(len(images))
        patch = enlarged(images[chosen], _height(random))
        if corner := find_room(patch, free, random):
            draw(picture, patch, *corner, random.uniform(0.7, 1))
            height, width = patch.shape
            x, y = corner
            annotations[row] = x, y, x + width, y + height, labels[chosen]
    picture += random.normal(0, 0.03, picture.shape)
    return np.uint8(255 * picture.clip(0, 1))[..., None], annotations


@cache
def canvases(part: str, count: int, seed: int) -> Canvases:
    """Return `count` canvases of one half of the digits."""
    random = np.random.default_rng((seed, part == "test"))
    return Canvases(*map(np.stack, zip(*(canvas(part, random) for _ in range(count)))))
