"""The shapes that are measured, and their inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Workload:
    """A loss of one shape.

    `head` is "sigmoid", "softmax" (with integer labels) or "soft" (a softmax and a distribution).
    """

    name: str
    head: str
    shape: tuple[int, ...]
    axis: int = -1
    gamma: float = 2.0

    def inputs(self, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        """Return logits and labels, the same ones in every run, on the host.

        A sigmoid's labels are of the logits' dtype, one in a hundred positive; a softmax's
        are int32, or such labels smoothed by a tenth, in the logits' dtype.
        """
        rng = np.random.default_rng(0)
        logits = (3 * rng.standard_normal(self.shape, np.float32)).astype(jnp.dtype(dtype))
        if self.head == "sigmoid":
            return logits, (rng.random(self.shape) < 0.01).astype(logits.dtype)
        classes, positions = self.shape[self.axis], np.delete(self.shape, self.axis)
        labels = rng.integers(classes, size=positions, dtype=np.int32)
        if self.head == "softmax":
            return logits, labels
        smoothed = np.full(self.shape, 0.1 / classes, logits.dtype)
        true = np.expand_dims(labels, self.axis)
        np.put_along_axis(smoothed, true, 0.9 + 0.1 / classes, self.axis)
        return logits, smoothed

    def shapes(self, dtype: str) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of the inputs."""
        logits = jax.ShapeDtypeStruct(self.shape, dtype)
        if self.head == "softmax":
            positions = np.delete(self.shape, self.axis).tolist()
            return logits, jax.ShapeDtypeStruct(positions, "int32")
        return logits, logits

    def quick(self) -> "Workload":
        """Return a tiny workload of the same kind."""
        return dataclasses.replace(self, shape=tuple(min(n, 48) for n in self.shape))


def fewest_bytes(logits: np.ndarray, labels: np.ndarray, mode: str) -> int:
    """Return what the work must move at least: read the inputs once, write the gradient once."""
    return logits.nbytes * (1 if mode == "value" else 2) + labels.nbytes


# Small enough that what large inputs need would only be in its way.
SMALL = "classifier"

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("sigmoid", "sigmoid", (400_000, 20)),  # eight images of 50,000 anchors
        Workload("sigmoid-1.5", "sigmoid", (400_000, 20), gamma=1.5),
        Workload("anchors", "softmax", (400_000, 21)),
        Workload("imagenet", "softmax", (4096, 1000)),
        Workload("vocabulary", "softmax", (1024, 32_000)),
        Workload("segmentation", "softmax", (4, 21, 256, 256), axis=1),
        Workload("segmentation-last", "softmax", (4, 256, 256, 21)),
        Workload("soft", "soft", (400_000, 21)),
        Workload("soft-imagenet", "soft", (4096, 1000)),
        Workload(SMALL, "softmax", (256, 10)),
    )
}


def growth(quick: bool) -> dict[str, dict[int, Workload]]:
    """Return the workloads of each curve, by the size that grows along it."""
    positions = [10**k for k in (range(2, 4) if quick else range(3, 8))]
    classes = [2, 8, 32] if quick else [2, 8, 32, 128, 512, 2000, 8000, 32_000]
    return {
        "sigmoid, positions": {n: Workload("growth", "sigmoid", (n,)) for n in positions},
        "softmax of 10 classes, positions": {
            n: Workload("growth", "softmax", (n, 10)) for n in positions
        },
        "softmax of 1024 positions, classes": {
            n: Workload("growth", "softmax", (1024, n)) for n in classes
        },
    }
