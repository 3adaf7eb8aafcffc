"""The registry of losses: every property is tested over every row, and drawn from the catalogue.

A row is a loss of the catalogue with one kind of labels. All arguments go by their names, so
that a test need not know whether a loss takes logits, or features and a kernel.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import focal_jax
from focal_jax import _catalogue

# What an exponent is tested at: whole numbers, halves of them, and others.
EXPONENTS = (0, 0.5, 1, 1.3, 2.0, 3, 5)


@dataclasses.dataclass(frozen=True, eq=False)  # a row is itself alone, and so a key
class Row:
    """A loss with one kind of labels."""

    loss: _catalogue.Loss
    labels: str

    def __str__(self):
        return f"{self.name}-{self.labels}"

    @property
    def name(self) -> str:
        return self.loss.name

    @property
    def options(self) -> Mapping[str, _catalogue.Option]:
        return self.loss.options

    @property
    def softmax(self) -> bool:
        """Whether the loss has a class axis."""
        return self.loss.softmax

    @property
    def linear(self) -> bool:
        return self.loss.kind == "linear"

    @property
    def integer(self) -> bool:
        return self.labels == "integer"

    @property
    def soft(self) -> bool:
        """Whether labels lie between the ends of their range, so that they can be moved."""
        return self.labels in ("soft", "distribution")

    @property
    def first(self) -> str:
        """The argument that has the positions, in which the loss is first of all derived."""
        return "features" if self.linear else "logits"

    @property
    def exponents(self) -> list[str]:
        return [name for name, option in self.options.items() if option.exponent]

    # ------------------------------------------------------------ calls

    def eager(self, **arguments):
        """Call the public function; a linear head takes several steps where it can."""
        return self._call(focal_jax, arguments)

    def reference(self, **arguments):
        return self._call(focal_jax.reference, arguments)

    def _call(self, module, arguments):
        static = {"chunk_size": 2} if self.linear else {}
        return getattr(module, self.name)(**static | arguments)

    def ours(self, **arguments):
        """Call the public function compiled, once for all equal structures."""
        return _jitted(self, "eager")(**arguments)

    def plain(self, **arguments):
        """Call the reference compiled."""
        return _jitted(self, "reference")(**arguments)

    def split(self, arguments, *, movable=False):
        """Return what the loss is differentiable in, and the rest.

        Labels that are to be `movable` are differentiated only where they have room: not at
        the ends of their range.
        """
        names = {self.first, "kernel", "bias", *self.options}
        names |= {"labels"} if self.soft or not (self.integer or movable) else set()
        floating = {
            name
            for name, x in arguments.items()
            if name in names and hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        }
        return (
            {k: v for k, v in arguments.items() if k in floating},
            {k: v for k, v in arguments.items() if k not in floating},
        )

    # ------------------------------------------------------------ shapes

    def positions(self, shape, axis=-1):
        return tuple(np.delete(shape, axis)) if self.softmax else tuple(shape)

    def axes(self, rank):
        """Return the class axes that the loss can have; a loss without has the last."""
        return range(rank) if self.softmax and not self.linear else [rank - 1]

    def axis(self, axis):
        return {"axis": axis} if self.softmax and not self.linear else {}

    def along(self, where, axis=-1):
        """Return a mask of the positions with the rank of the first argument."""
        return np.expand_dims(where, axis) if self.softmax else where

    # ------------------------------------------------------------ inputs

    def arguments(self, seed, shape, axis=-1, *, scale=3.0, dtype=np.float32):
        """Return random arguments by name, all but the options; `shape` is the logits'."""
        rng = np.random.default_rng(seed)
        arrays = {self.first: scale * rng.normal(size=shape)}
        if self.linear:
            classes = shape[-1]
            arrays["kernel"] = rng.normal(size=(classes, classes)) / math.sqrt(max(classes, 1))
            arrays["bias"] = rng.normal(size=classes)
        arrays["labels"] = _LABELS[self.labels](rng, shape, axis % max(len(shape), 1))
        return {
            name: jnp.asarray(x if x.dtype == np.int32 else x.astype(dtype))
            for name, x in arrays.items()
        } | self.axis(axis)

    def drawn(self, seed, shape, axis=-1, *, names=None, dtype=np.float32):
        """Return random options, well inside their ranges, one entry a position or class."""
        rng = np.random.default_rng(seed + 1)
        out = {}
        for name, option in self.options.items():
            low, high = option.low, min(option.high, option.low + 4)
            entries = (shape[axis],) if option.per_class else self.positions(shape, axis)
            out[name] = rng.uniform(low + 0.1 * (high - low), low + 0.9 * (high - low), entries)
        return {k: jnp.asarray(v.astype(dtype)) for k, v in out.items() if not names or k in names}

    def scalars(self, dtype=np.float32):
        """Return one number for each option, as arrays."""
        return {k: jnp.asarray(v.ravel()[0]) for k, v in self.drawn(0, (3, 3), dtype=dtype).items()}

    def all(self, seed, shape, axis=-1, **keywords):
        """Return random arguments and options."""
        dtype = keywords.get("dtype", np.float32)
        return self.arguments(seed, shape, axis, **keywords) | self.drawn(
            seed, shape, axis, dtype=dtype
        )

    def at(self, margins, classes=3, dtype=np.float32):
        """Return arguments with the given margins of the true class, one a position."""
        margins = np.asarray(margins, dtype)
        if not self.softmax:
            sign = np.where(np.arange(margins.size) % 2, -1, 1).astype(dtype)
            return {
                "logits": jnp.asarray(sign * margins),
                "labels": jnp.asarray((sign > 0).astype(dtype)),
            }
        true = np.arange(margins.size) % classes
        logits = np.zeros((margins.size, classes), dtype)
        logits[np.arange(margins.size), true] = margins
        labels = true.astype(np.int32) if self.integer else np.eye(classes, dtype=dtype)[true]
        return self.of_logits(jnp.asarray(logits), jnp.asarray(labels))

    def of_logits(self, logits, labels):
        """Return arguments with these logits; a linear head has them for features."""
        if not self.linear:
            return {"logits": logits, "labels": labels}
        classes = logits.shape[-1]
        return {
            "features": logits,
            "kernel": np.eye(classes, dtype=logits.dtype),
            "labels": labels,
        }


@functools.cache
def _jitted(row, which):
    # What is not an array, a number apart, is structure: the axis, `ignore_label`, an
    # exponent that is a Python number.
    @functools.cache
    def compiled(static, quick):
        del quick  # `jit` reads it
        return jit(functools.partial(getattr(row, which), **dict(static)))

    def call(**arguments):
        static = {k: v for k, v in arguments.items() if v is None or isinstance(v, int | float)}
        arrays = {k: v for k, v in arguments.items() if k not in static}
        return compiled(tuple(static.items()), quick)(**arrays)

    return call


# Whether programs are to be compiled quickly, not to be fast: as the test at hand is marked.
quick = False
# No optimization by LLVM, fusions by the emitter that is quicker itself, and all in one piece.
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


@functools.cache
def quick_options() -> dict[str, Any]:
    """Return what of that this XLA knows: such options come and go."""
    known = {}
    for name, value in _QUICK.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(jnp.negative, compiler_options={name: value}).lower(1.0).compile()
            known[name] = value
    return known


def jit(function: Callable, **options: Any) -> Any:
    """Return the function compiled, as the test's mark has it; not for use within another."""
    return jax.jit(function, compiler_options=quick_options() if quick else None, **options)


def total(function: Callable, cotangent: Any = 1.0, **fixed):
    """Return the weighted sum of the losses as a function of a dictionary of arguments."""

    def summed(arguments):
        return jnp.sum(cotangent * function(**fixed, **arguments))

    return summed


def gradients(function: Callable, cotangent: Any = 1.0, **fixed):
    """Return the compiled value and gradients of the weighted sum of the losses."""
    return jit(jax.value_and_grad(total(function, cotangent, **fixed)))


def _integer(rng, shape, axis):
    return rng.integers(0, shape[axis], np.delete(shape, axis)).astype(np.int32)


def _one_hot(rng, shape, axis):
    return np.moveaxis(np.eye(shape[axis])[_integer(rng, shape, axis)], -1, axis)


def _distribution(rng, shape, axis):
    weights = rng.exponential(size=shape)
    return weights / weights.sum(axis, keepdims=True)


_LABELS: dict[str, Callable] = {
    "hard": lambda rng, shape, _: (rng.random(shape) < 0.3).astype(np.float32),
    "soft": lambda rng, shape, _: rng.random(shape),
    "one-hot": _one_hot,
    "distribution": _distribution,
    "integer": _integer,
}

# The losses of one element or position, whose labels are of it alone. The others are put
# together from these, and have their own tests.
_OF_A_POSITION = [loss for loss in _catalogue.LOSSES if loss.kind not in ("interval", "region")]
LOSSES = [Row(loss, labels) for loss in _OF_A_POSITION for labels in loss.labels]
# One row a loss, with the labels that it can be differentiated in most freely: for what does
# not depend on the labels' values.
PROGRAMS = [Row(loss, loss.labels[-1]) for loss in _OF_A_POSITION]


# One row a kind of loss: for what its engine does, whatever the formula.
KINDS = list({row.loss.kind: row for row in reversed(PROGRAMS)}.values())


# Losses that a soft label has an edge in, where the score meets it: as close to it as the
# label's own rounding, an exponent below 1 multiplies the error without bound.
_EDGES = {"quality_focal_loss"}


def near_labels(row, arguments, dtype):
    """Return labels that are wrong in the last digits of `dtype`, where the loss has an edge.

    Either way, by a part of what they lack to the nearer end of their range. How far something
    moves with them is how far it may be off: nowhere else is there any such label.
    """
    if not (row.soft and row.name in _EDGES):
        return []
    y = np.asarray(arguments["labels"], np.float64)
    room = 8 * np.finfo(dtype).eps * np.minimum(y, 1 - y)
    return [y + room, y - room]


OUTSIDE: set[str] = set()  # the losses that have a figure from outside


def figure_of(*names):
    """Mark a test that holds losses against figures that this project did not make."""
    OUTSIDE.update(names)
    return lambda test: test


def assert_close(got, want, rtol=1e-5, atol=None):
    """Compare trees; `atol` defaults to `rtol` of the largest entry of each leaf."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        scale = np.max(np.abs(b[np.isfinite(b)]), initial=0)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale if atol is None else atol)
