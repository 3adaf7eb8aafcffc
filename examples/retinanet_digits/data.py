"""A synthetic detection data set: handwritten digits on cluttered canvases.

The digits of scikit-learn are split into disjoint training, validation and test digits. A canvas
holds a few whole digits, which are the objects, and clutter that resembles digits: quarters of
digits, digits whose blocks are shuffled, and lines.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.ndimage import zoom
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CLASSES = 10
SIZE = 128  # of a canvas, in pixels
OBJECTS = 12  # maximal number per canvas
HEIGHTS = (14, 36)  # range of the heights of objects, in pixels
PARTS = ("train", "validation", "test")


class Canvases(NamedTuple):
    """Images and their annotations."""

    images: np.ndarray  # [N, SIZE, SIZE, 1] uint8
    annotations: np.ndarray  # [N, OBJECTS, 5] float32: x1, y1, x2, y2, digit; padded with -1


@cache
def digits(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images `[n, 8, 8]` in [0, 1] and the labels of a part.

    The training part is a half of all digits, the validation part a tenth, the test part the rest.
    """
    data = load_digits()
    rest = (data.images / 16).astype(np.float32), data.target
    split = {}
    for name, size in (("train", 0.5), ("validation", 0.2)):  # fractions of the rest
        chosen_x, rest_x, chosen_y, rest_y = train_test_split(
            *rest, train_size=size, stratify=rest[1], random_state=0
        )
        split[name], rest = (chosen_x, chosen_y), (rest_x, rest_y)
    return (split | {"test": rest})[part]


def crop_and_scale(image: np.ndarray, height: float) -> np.ndarray:
    """Crop an image to its bright pixels and scale the crop to a height."""
    rows, columns = (np.flatnonzero((image > 0.3).any(axis)) for axis in (1, 0))
    crop = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return zoom(crop, height / len(crop), order=1, grid_mode=True, mode="nearest")


def draw(canvas: np.ndarray, patch: np.ndarray, x: int, y: int, contrast: float):
    """Draw a patch on a canvas by the maximum of both; return the slices of the patch."""
    place = np.s_[y : y + len(patch), x : x + patch.shape[1]]
    under = canvas[place]
    np.maximum(under, contrast * patch[: len(under), : under.shape[1]], out=under)
    return place


def find_room(patch: np.ndarray, free: np.ndarray, random: np.random.Generator):
    """Return a random corner `(x, y)` for a patch and mark its pixels in `free` as used.

    Return None if some of the pixels are already used.
    """
    (height, width), (rows, columns) = patch.shape, free.shape
    x, y = random.integers(columns - width + 1), random.integers(rows - height + 1)
    place = np.s_[y : y + height, x : x + width]
    if not free[place].all():
        return None
    free[place] = False
    return x, y


def _random_height(random: np.random.Generator) -> float:
    return np.exp(random.uniform(*np.log(HEIGHTS)))


def _quarter(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    y, x = 4 * random.integers(2, size=2)
    return image[y : y + 4, x : x + 4]


def _shuffle_blocks(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    blocks = image.reshape(4, 2, 4, 2).swapaxes(1, 2).reshape(16, 2, 2)
    return random.permutation(blocks).reshape(4, 4, 2, 2).swapaxes(1, 2).reshape(8, 8)


def _line(size: int, random: np.random.Generator) -> np.ndarray:
    rotation = np.exp(1j * random.uniform(0, np.pi))
    pixels = (np.arange(size) + 1j * np.arange(size)[:, None]).astype(np.complex64)
    # The real part is the coordinate along the line, the imaginary part the one across it.
    coordinates = (pixels - size * (random.uniform() + 1j * random.uniform())) * rotation
    width, length = random.uniform(0.5, 2), random.uniform(5, 40)
    inside = np.abs(coordinates.real) < length
    return np.clip(width - np.abs(coordinates.imag), 0, 1) * inside


def background(
    source: np.ndarray, random: np.random.Generator, size: int = SIZE, parts: float = 10
) -> np.ndarray:
    """Return a canvas with smooth noise, lines, and `parts` pieces of digits on average."""
    noise = zoom(
        random.uniform(0, 0.25, (4, 4)), size // 4, order=1, grid_mode=True, mode="nearest"
    )
    canvas = noise.astype(np.float32)
    for _ in range(random.integers(1, 4)):
        draw(canvas, _line(size, random), 0, 0, random.uniform(0.5, 1))
    for _ in range(random.poisson(parts)):
        image = source[random.integers(len(source))]
        part = (_quarter, _shuffle_blocks)[random.integers(2)](image, random)
        if (part > 0.3).any():
            patch = crop_and_scale(part, _random_height(random) / (2 if len(part) == 4 else 1))
            draw(canvas, patch, *random.integers(0, size - 8, 2), random.uniform(0.5, 1))
    return canvas


def canvas(
    part: str, objects: float, random: np.random.Generator, size: int = SIZE, parts: float = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Return one image `[size, size, 1]` and its annotations `[OBJECTS, 5]`.

    `objects` is the mean number of objects. The number is uniform from 1 to `2 * objects - 1`. If
    `objects` is below 1, it is the probability of one object.
    """
    images, labels = digits(part)
    picture = background(images, random, size, parts)
    annotations = np.full((OBJECTS, 5), -1, np.float32)
    free = np.ones((size, size), bool)
    number = random.integers(1, 2 * int(objects)) if objects >= 1 else random.uniform() < objects
    for row in range(min(number, OBJECTS)):
        chosen = random.integers(len(images))
        patch = crop_and_scale(images[chosen], min(_random_height(random), size))
        if patch.shape[1] <= size and (corner := find_room(patch, free, random)):
            draw(picture, patch, *corner, random.uniform(0.7, 1))
            height, width = patch.shape
            x, y = corner
            annotations[row] = x, y, x + width, y + height, labels[chosen]
    picture += random.normal(0, 0.03, picture.shape)
    return np.uint8(255 * picture.clip(0, 1))[..., None], annotations


@cache
def canvases(part: str, count: int, seed: int, objects: float = 1) -> Canvases:
    """Return `count` canvases of a part, with a mean number of `objects`."""
    random = np.random.default_rng((seed, PARTS.index(part)))
    return Canvases(*map(np.stack, zip(*(canvas(part, objects, random) for _ in range(count)))))


def single_digits(part: str, count: int, size: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Return images `[count, size, size, 1]` of one digit each, and their labels."""
    random = np.random.default_rng(PARTS.index(part))
    images, annotations = zip(*(canvas(part, 1, random, size, 1) for _ in range(count)))
    return np.stack(images), np.stack(annotations)[:, 0, 4].astype(np.int32)
