"""Time the linear cross entropy of focal_jax, optax, jax-cce and tokamax, value and gradients.

Packages that are not installed are left out. `make test-projects` installs all of them:

  .venv-projects/bin/python -m benchmarks.heads
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import focal_jax
from benchmarks import report
from benchmarks.measure import GRADIENT, compile_program, measure

SHAPE = 2048, 512, 32_000  # positions, features, classes


def _focal_jax(features, kernel, labels):
    loss = focal_jax.linear_softmax_focal_loss_with_integer_labels
    return jnp.mean(loss(features, kernel, labels, gamma=0.0))


def _optax(features, kernel, labels):
    loss = optax.losses.softmax_cross_entropy_with_integer_labels
    return jnp.mean(loss(features @ kernel, labels))


def _jax_cce(package, features, kernel, labels):
    return package.linear_cross_entropy(features, kernel.T, labels, chunk_size=128)


def _tokamax(implementation, package, features, kernel, labels):
    loss = package.linear_softmax_cross_entropy_loss
    return loss(features, labels, kernel, reduction="mean", implementation=implementation)


def heads() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the labels and the losses of the installed packages."""
    yield "focal_jax", _focal_jax
    yield "optax", _optax
    for label, package, loss in (
        ("jax-cce, `chunk_size=128`", "jax_cce", _jax_cce),
        ("tokamax, default on a CPU", "tokamax", partial(_tokamax, None)),
        ('tokamax, `implementation="chunked_xla"`', "tokamax", partial(_tokamax, "chunked_xla")),
    ):
        try:
            yield label, partial(loss, importlib.import_module(package))
        except ImportError:
            continue


def main(rounds: int = 9) -> None:
    """Measure all heads in one process and print a table."""
    positions, depth, classes = SHAPE
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.standard_normal((positions, depth), np.float32))
    kernel = jnp.asarray(rng.standard_normal((depth, classes), np.float32) / np.sqrt(depth))
    labels = jnp.asarray(rng.integers(classes, size=positions), jnp.int32)
    args = features, kernel, labels
    programs = [
        compile_program(label, GRADIENT, jax.value_and_grad(loss, (0, 1)), *args)
        for label, loss in heads()
    ]
    cells = [
        (
            row["implementation"],
            f"{row['temporary_bytes'] / 1e6:,.0f}",
            *(f"{row['seconds'][name] * 1e3:,.0f}" for name in ("median", "min")),
        )
        for row in measure(programs, rounds, lambda: None)
    ]
    headings = ("library", "temporaries MB", "median ms", "min ms")
    title = f"Linear cross entropy, {positions:,} x {depth:,} x {classes:,}, float32"
    report.show([report.Table(title, headings, cells, 1)])


if __name__ == "__main__":
    main()
