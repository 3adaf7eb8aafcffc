"""The shapes that are measured, and their inputs."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from focal_jax import _catalogue


@dataclasses.dataclass(frozen=True)
class Workload:
    """A loss of the catalogue, of one shape."""

    name: str
    loss: str
    shape: tuple[int, ...]
    axis: int = -1
    options: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What the loss is a function of, as the catalogue has it."""
        return _catalogue.by_name()[self.loss].kind

    @property
    def positions(self) -> tuple[int, ...]:
        """The logits' shape without the class axis."""
        return tuple(np.delete(self.shape, self.axis).tolist())

    @property
    def static(self) -> dict[str, float]:
        """What the loss is called with beside logits and labels."""
        axis = {} if self.kind == "elementwise" else {"axis": self.axis}
        return {**self.options, **axis}

    def inputs(self, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        """Return logits and labels, the same ones in every run, on the host.

        Labels are int32 class indices, real numbers between two classes, or of the logits'
        dtype: for one logit 0 or 1, one in a hundred positive; for a distribution such indices
        smoothed by a tenth.
        """
        rng = np.random.default_rng(0)
        logits = (3 * rng.standard_normal(self.shape, np.float32)).astype(jnp.dtype(dtype))
        if self.kind == "elementwise":
            return logits, (rng.random(self.shape) < 0.01).astype(logits.dtype)
        classes = self.shape[self.axis]
        if self.kind == "interval":
            return logits, rng.uniform(0, classes - 1, self.positions).astype(np.float32)
        labels = rng.integers(classes, size=self.positions, dtype=np.int32)
        if self.kind == "position":
            return logits, labels
        smoothed = np.full(self.shape, 0.1 / classes, logits.dtype)
        true = np.expand_dims(labels, self.axis)
        np.put_along_axis(smoothed, true, 0.9 + 0.1 / classes, self.axis)
        return logits, smoothed

    def shapes(self, dtype: str) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of the inputs."""
        logits = jax.ShapeDtypeStruct(self.shape, dtype)
        narrow = {"position": "int32", "interval": "float32"}.get(self.kind)
        return logits, jax.ShapeDtypeStruct(self.positions, narrow) if narrow else logits

    def quick(self) -> "Workload":
        """Return a tiny workload of the same kind."""
        return dataclasses.replace(self, shape=tuple(min(n, 48) for n in self.shape))


def fewest_bytes(logits: np.ndarray, labels: np.ndarray, mode: str) -> int:
    """Return what the work must move at least: read the inputs once, write the gradient once."""
    return logits.nbytes * (1 if mode == "value" else 2) + labels.nbytes


# Small enough that what large inputs need would only be in its way.
SMALL = "classifier"

SIGMOID, SOFTMAX, SOFT = (
    "sigmoid_focal_loss",
    "softmax_focal_loss_with_integer_labels",
    "softmax_focal_loss",
)

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("sigmoid", SIGMOID, (400_000, 20)),  # eight images of 50,000 anchors
        Workload("sigmoid-1.5", SIGMOID, (400_000, 20), options={"gamma": 1.5}),
        Workload("anchors", SOFTMAX, (400_000, 21)),
        Workload("imagenet", SOFTMAX, (4096, 1000)),
        Workload("vocabulary", SOFTMAX, (1024, 32_000)),
        Workload("segmentation", SOFTMAX, (4, 21, 256, 256), axis=1),
        Workload("segmentation-last", SOFTMAX, (4, 256, 256, 21)),
        Workload("soft", SOFT, (400_000, 21)),
        Workload("soft-imagenet", SOFT, (4096, 1000)),
        Workload(SMALL, SOFTMAX, (256, 10)),
    )
}

# Of every other loss, by its kind: `interval` has the four sides of 100,000 boxes.
_SHAPES: Mapping[str, tuple[tuple[tuple[int, ...], int], ...]] = {
    "elementwise": (((400_000, 20), -1),),
    "position": (((400_000, 21), -1), ((4096, 1000), -1)),
    "distribution": (((400_000, 21), -1), ((4096, 1000), -1)),
    "interval": (((400_000, 17), -1),),
    "region": (((4, 21, 256, 256), 1),),
    "linear": (),  # measured apart, beside the head that makes the logits
}


def _family() -> dict[str, Workload]:
    """Return the workloads of the catalogue's losses that have none above."""
    measured = {workload.loss for workload in WORKLOADS.values()}
    found = {}
    for loss in _catalogue.LOSSES:
        for shape, axis in () if loss.name in measured else _SHAPES[loss.kind]:
            short = loss.name.removesuffix("_with_integer_labels").replace("_", "-")
            name = f"{short}-{shape[axis]}" if loss.kind == "position" else short
            found[name] = Workload(name, loss.name, shape, axis)
    return found


FAMILY = _family()


def growth(quick: bool) -> dict[str, dict[int, Workload]]:
    """Return the workloads of each curve, by the size that grows along it."""
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
