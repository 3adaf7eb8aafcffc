"""Define the workloads: a loss, the shape of its logits, and reproducible inputs."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

import focal_jax
from focal_jax import catalogue

SIGMOID = focal_jax.sigmoid_focal_loss.__name__
SOFTMAX = focal_jax.softmax_focal_loss_with_integer_labels.__name__
SOFT = focal_jax.softmax_focal_loss.__name__


@dataclasses.dataclass(frozen=True)
class Workload:
    """A loss of the catalogue, given by name, at one shape of the logits."""

    name: str
    loss: str
    shape: tuple[int, ...]
    axis: int = -1
    options: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of the loss, as defined in the catalogue."""
        return catalogue.LOSSES[self.loss].kind

    @property
    def positions(self) -> tuple[int, ...]:
        """The shape of the logits without the class axis."""
        return tuple(np.delete(self.shape, self.axis).tolist())

    @property
    def keywords(self) -> dict[str, float]:
        """The keyword arguments of the loss."""
        axis = {} if self.kind == "elementwise" else {"axis": self.axis}
        return {**self.options, **axis}

    def inputs(self, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        """Return random logits and labels as NumPy arrays. Every run gets the same arrays.

        The labels depend on the kind of the loss:

          elementwise           1 with probability 0.01, else 0; the dtype of the logits
          position              class indices; int32
          interval              real numbers from 0 to the index of the last class; float32
          distribution, region  one-hot labels with label smoothing 0.1; the dtype of the logits
        """
        rng = np.random.default_rng(0)
        logits = (3 * rng.standard_normal(self.shape, np.float32)).astype(jnp.dtype(dtype))
        if self.kind == "elementwise":
            return logits, (rng.random(self.shape) < 0.01).astype(logits.dtype)
        num_classes = self.shape[self.axis]
        if self.kind == "interval":
            return logits, rng.uniform(0, num_classes - 1, self.positions).astype(np.float32)
        labels = rng.integers(num_classes, size=self.positions, dtype=np.int32)
        if self.kind == "position":
            return logits, labels
        smoothed = np.full(self.shape, 0.1 / num_classes, logits.dtype)
        indices = np.expand_dims(labels, self.axis)
        np.put_along_axis(smoothed, indices, 0.9 + 0.1 / num_classes, self.axis)
        return logits, smoothed

    def shapes(self, dtype: str) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of the inputs."""
        logits = jax.ShapeDtypeStruct(self.shape, dtype)
        label_dtype = {"position": "int32", "interval": "float32"}.get(self.kind)
        if label_dtype is None:
            return logits, logits
        return logits, jax.ShapeDtypeStruct(self.positions, label_dtype)

    def quick(self) -> "Workload":
        """Return a small workload of the same kind."""
        return dataclasses.replace(self, shape=tuple(min(n, 48) for n in self.shape))


def minimum_bytes(logits: np.ndarray, labels: np.ndarray, mode: str) -> int:
    """Return the bytes that any program moves: it reads the inputs and writes the gradient."""
    return logits.nbytes * (1 if mode == "value" else 2) + labels.nbytes


# The workload whose time is dominated by the cost of a call.
SMALL = "classifier"

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("sigmoid", SIGMOID, (400_000, 20)),  # 8 images with 50,000 anchors each
        Workload("sigmoid-1.5", SIGMOID, (400_000, 20), options={"gamma": 1.5}),
        Workload("anchors", SOFTMAX, (400_000, 21)),
        Workload("imagenet", SOFTMAX, (4096, 1000)),
        Workload("vocabulary", SOFTMAX, (1024, 32_000)),
        Workload("segmentation", SOFTMAX, (4, 21, 256, 256), axis=1),
        Workload("segmentation-last", SOFTMAX, (4, 256, 256, 21)),
        Workload("cityscapes", SOFTMAX, (2, 19, 512, 1024), axis=1),
        Workload("soft", SOFT, (400_000, 21)),
        Workload("soft-imagenet", SOFT, (4096, 1000)),
        Workload("soft-cityscapes", SOFT, (2, 19, 512, 1024), axis=1),
        Workload(SMALL, SOFTMAX, (256, 10)),
    )
}

# Shapes and class axes of the workloads of all other losses, by kind. The shape for "interval"
# is that of the four sides of 100,000 boxes.
_SHAPES: Mapping[str, tuple[tuple[tuple[int, ...], int], ...]] = {
    "elementwise": (((400_000, 20), -1),),
    "position": (((400_000, 21), -1), ((4096, 1000), -1)),
    "distribution": (((400_000, 21), -1), ((4096, 1000), -1)),
    "interval": (((400_000, 17), -1),),
    "region": (((4, 21, 256, 256), 1),),
    "linear": (),  # measured separately, with features and a kernel as inputs
}


def _family() -> dict[str, Workload]:
    """Return a workload for each loss of the catalogue that `WORKLOADS` lacks."""
    measured = {workload.loss for workload in WORKLOADS.values()}
    found = {}
    for loss in catalogue.LOSSES.values():
        for shape, axis in () if loss.name in measured else _SHAPES[loss.kind]:
            short = loss.name.removesuffix("_with_integer_labels").replace("_", "-")
            name = f"{short}-{shape[axis]}" if loss.kind == "position" else short
            found[name] = Workload(name, loss.name, shape, axis)
    return found


FAMILY = _family()


def growth(quick: bool) -> dict[str, dict[int, Workload]]:
    """Return the workloads of each growth curve by size."""
    positions = [10**k for k in (range(2, 4) if quick else range(3, 8))]
    classes = [2, 8, 32] if quick else [2, 8, 32, 128, 512, 2000, 8000, 32_000]
    return {
        "sigmoid, positions": {n: Workload("growth", SIGMOID, (n,)) for n in positions},
        "softmax of 10 classes, positions": {
            n: Workload("growth", SOFTMAX, (n, 10)) for n in positions
        },
        "softmax of 1024 positions, classes": {
            n: Workload("growth", SOFTMAX, (1024, n)) for n in classes
        },
    }
