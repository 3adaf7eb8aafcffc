"""Meshes of the eight devices, and the collectives of compiled programs."""

import re

import jax
import numpy as np

GATHERS = "all-gather|all-to-all|collective-permute"


def make_mesh(shape=(4, 2), kind=jax.sharding.AxisType.Auto):
    """Return a mesh with the axes `data`, `model` and `other`, as many as `shape` has."""
    names = ("data", "model", "other")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def result_sizes(text, operations):
    """Return the number of elements of each result of an operation in compiled HLO.

    `operations` is a regular expression. A collective may be a pair of operations, of which the
    first has the suffix `-start`.
    """
    results = re.findall(rf"= (.*?) (?:{operations})(?:-start)?\(", text)
    shapes = [s for result in results for s in re.findall(r"\w+\[([\d,]*)\]", result)]
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
