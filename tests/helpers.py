"""The registry of losses for the tests, and functions to call, compile and compare them.

A row of the registry is a loss of the catalogue with one kind of labels. Tests of a property are
parametrized over the rows. All arguments are passed by name, so that a test works for losses of
logits and for losses of features and a kernel.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax._src import compiler

from focal_jax import InputError, catalogue, reference
from focal_jax.engine import Option

# The exponents that are tested: integers, multiples of 1/2, and others.
EXPONENTS = (0, 0.5, 1, 1.3, 2.0, 3, 5)


def range_of(option: Option) -> tuple[float, float]:
    """Return the finite range of an option from which tests take its values."""
    low = max(option.low, 0.0)
    high = min(option.high, low + 4)
    return low + 0.5 * option.above_low, high


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Row:
    """A loss with one kind of labels."""

    loss: catalogue.Loss
    labels: str
    formula: Callable[..., Any]  # of the reference

    def __str__(self):
        return f"{self.name}-{self.labels}"

    @property
    def name(self) -> str:
        return self.loss.name

    @property
    def kind(self) -> str:
        return self.loss.kind

    @property
    def options(self) -> Mapping[str, Option]:
        """All options but `where`."""
        return self.loss.options

    @property
    def numbers(self) -> Mapping[str, Option]:
        """The options that the loss is differentiable in."""
        return self.loss.numbers

    @property
    def exponents(self) -> list[str]:
        return [name for name, option in self.options.items() if option.kind == "exponent"]

    @property
    def softmax(self) -> bool:
        """Whether the loss has a class axis."""
        return self.loss.has_class_axis

    @property
    def linear(self) -> bool:
        return self.kind == "linear"

    @property
    def region(self) -> bool:
        """Whether the loss has one value per class and not one per position."""
        return self.kind == "region"

    @property
    def integer(self) -> bool:
        return self.labels == "integer"

    @property
    def hard(self) -> bool:
        """Whether floating labels are at the ends of their range."""
        return self.labels in ("hard", "one-hot")

    @property
    def soft(self) -> bool:
        """Whether labels lie inside their range, so that they can be moved in both directions."""
        return self.labels in ("soft", "distribution", "real")

    @property
    def first(self) -> str:
        """The name of the first argument."""
        return "features" if self.linear else "logits"

    @property
    def variants(self) -> "list[Row]":
        """The rows of the same loss, one for each kind of labels."""
        return [row for row in LOSSES if row.loss is self.loss]

    # ------------------------------------------------------------ calls

    def eager(self, **arguments):
        """Call the public function. A linear head computes two classes per chunk."""
        static = {"chunk_size": 2} if self.linear else {}
        return self.loss.function(**static | arguments)

    @functools.cached_property
    def reference(self) -> Callable[..., Any]:
        """The function of the reference."""
        if self.name in reference.FORMULAS:
            return getattr(reference, self.name)
        return reference.from_formula(self.loss, self.formula)

    def compiled(self, **arguments):
        """Call the compiled public function. Calls with equal static arguments share a program."""
        return _jitted(self, "eager")(**arguments)

    def reference_compiled(self, **arguments):
        """Call the compiled function of the reference."""
        return _jitted(self, "reference")(**arguments)

    def split(self, arguments, *, movable=False):
        """Return the arguments that the loss is differentiable in, and the other arguments.

        With `movable`, labels at the ends of their range are among the other arguments.
        """
        names = {self.first, "kernel", "bias", *self.numbers}
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
        """Return the shape of a mask, for logits of the given shape."""
        return tuple(np.delete(shape, axis)) if self.softmax else tuple(shape)

    def losses_shape(self, shape, axis=-1):
        """Return the shape of the losses, for logits of the given shape."""
        return (shape[axis],) if self.region else self.positions(shape, axis)

    def axes(self, rank):
        """Return the axes that the class axis may be. Without a class axis, the last axis."""
        return range(rank) if self.softmax and not self.linear else [rank - 1]

    def axis(self, axis):
        """Return the keyword argument for the class axis."""
        return {"axis": axis} if self.softmax and not self.linear else {}

    def expand_mask(self, where, axis=-1):
        """Return a mask of the positions with the rank of the first argument."""
        return np.expand_dims(where, axis) if self.softmax else where

    # ------------------------------------------------------------ arguments

    def arguments(self, seed, shape, axis=-1, *, scale=3.0, dtype=np.float32):
        """Return random arguments by name, without options. `shape` is the shape of the logits."""
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

    def random_options(self, seed, shape, axis=-1, *, dtype=np.float32):
        """Return random numbers inside their ranges, one per position or per class."""
        rng = np.random.default_rng(seed + 1)
        out = {}
        for name, option in self.numbers.items():
            low, high = range_of(option)
            entries = (shape[axis],) if option.per_class else self.positions(shape, axis)
            numbers = rng.uniform(low + 0.1 * (high - low), low + 0.9 * (high - low), entries)
            out[name] = jnp.asarray(numbers.astype(dtype))
        return out

    def scalars(self, dtype=np.float32):
        """Return one random number for each option, as arrays without axes."""
        options = self.random_options(0, (3, 3), dtype=dtype)
        return {name: jnp.asarray(x.ravel()[0]) for name, x in options.items()}

    def all(self, seed, shape, axis=-1, **keywords):
        """Return random arguments and options."""
        dtype = keywords.get("dtype", np.float32)
        options = self.random_options(seed, shape, axis, dtype=dtype)
        return self.arguments(seed, shape, axis, **keywords) | options

    def with_margins(self, margins, classes=3, dtype=np.float32):
        """Return arguments whose true class has the given margins, one per position."""
        margins = np.asarray(margins, dtype)
        if not self.softmax:
            sign = np.where(np.arange(margins.size) % 2, -1, 1).astype(dtype)
            return {
                "logits": jnp.asarray(sign * margins),
                "labels": jnp.asarray((sign > 0).astype(dtype)),
            }
        index = np.arange(margins.size) % classes
        logits = np.zeros((margins.size, classes), dtype)
        logits[np.arange(margins.size), index] = margins
        return self.of_logits(
            jnp.asarray(logits), jnp.asarray(self.labels_of(index, classes, dtype))
        )

    def labels_of(self, index, classes, dtype=np.float32):
        """Return labels that are the given class indices."""
        if self.integer:
            return np.asarray(index, np.int32)
        return (
            np.asarray(index, dtype)
            if self.labels == "real"
            else np.eye(classes, dtype=dtype)[index]
        )

    def of_logits(self, logits, labels):
        """Return arguments with these logits. For a linear head the logits are the features."""
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
    # Arguments that are not arrays are static: the axis, `ignore_label`, Python exponents.
    @functools.cache
    def compiled(static):
        return jax.jit(functools.partial(getattr(row, which), **dict(static)))

    def call(**arguments):
        static = {k: v for k, v in arguments.items() if v is None or isinstance(v, int | float)}
        arrays = {k: v for k, v in arguments.items() if k not in static}
        return compiled(tuple(static.items()))(**arrays)

    return call


# ---------------------------------------------------------------- compilation

# No optimization by LLVM, the fusion emitter that compiles faster, and one LLVM module per program.
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


@functools.cache
def quick_options() -> dict[str, Any]:
    """Return compiler options for fast compilation and slow programs, as far as XLA has them."""
    known = {}
    for name, value in _QUICK.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(jnp.negative, compiler_options={name: value}).lower(1.0).compile()
            known[name] = value
    return known


# The options of every program that is compiled now; `tests/conftest.py` sets them for each test.
compiler_options: dict[str, Any] = {}
_get_compile_options = compiler.get_compile_options


def _with_compiler_options(*args: Any, **others: Any) -> Any:
    # JAX has no public default for these options. As arguments of `jax.jit`, JAX refuses them for a
    # function that is called inside another `jax.jit`.
    own = others.pop("env_options_overrides", None) or {}
    return _get_compile_options(*args, env_options_overrides=compiler_options | own, **others)


compiler.get_compile_options = _with_compiler_options


def total(function: Callable, cotangent: Any = 1.0, **fixed):
    """Return the weighted sum of the losses as a function of a dictionary of arguments."""

    def summed(arguments):
        return jnp.sum(cotangent * function(**fixed, **arguments))

    return summed


def gradients(function: Callable, cotangent: Any = 1.0, **fixed):
    """Return the compiled value and gradients of the weighted sum of the losses."""
    return jax.jit(jax.value_and_grad(total(function, cotangent, **fixed)))


# ---------------------------------------------------------------- rows


def _integer(rng, shape, axis):
    return rng.integers(0, shape[axis], np.delete(shape, axis)).astype(np.int32)


def _one_hot(rng, shape, axis):
    labels = np.expand_dims(_integer(rng, shape, axis), axis)
    out = np.zeros(shape)
    np.put_along_axis(out, labels, 1, axis)
    return out


def _distribution(rng, shape, axis):
    weights = rng.exponential(size=shape)
    return weights / weights.sum(axis, keepdims=True)


_LABELS: dict[str, Callable] = {
    "hard": lambda rng, shape, _: (rng.random(shape) < 0.3).astype(np.float32),
    "soft": lambda rng, shape, _: rng.random(shape),
    "one-hot": _one_hot,
    "distribution": _distribution,
    "integer": _integer,
    "real": lambda rng, shape, axis: rng.uniform(0, shape[axis] - 1, np.delete(shape, axis)),
}

# The losses of the package, and losses that are written as a user would write them.
_ALL = [(loss, reference.FORMULAS[name]) for name, loss in catalogue.LOSSES.items()] + toy.LOSSES

LOSSES = [Row(loss, labels, formula) for loss, formula in _ALL for labels in loss.labels]
# One row per loss, with the labels that are the most differentiable: for properties that do not
# depend on the values of the labels.
PROGRAMS = [Row(loss, loss.labels[-1], formula) for loss, formula in _ALL]
# One row per kind of loss: for properties of the engine that do not depend on the formula.
KINDS = [
    row
    for row in PROGRAMS
    if row.name
    in (
        "sigmoid_focal_loss",
        "softmax_focal_loss",
        "softmax_focal_loss_with_integer_labels",
        "linear_softmax_focal_loss_with_integer_labels",
        "distribution_focal_loss",
        "focal_tversky_loss",
    )
]


# Losses whose derivatives have a singularity where the score equals a soft label. At a distance of
# one rounding error of the label, an exponent below 1 multiplies that error without bound.
_SINGULAR_AT_LABEL = "quality_"


def near_labels(row, arguments, dtype):
    """Return the labels moved by a few roundings of `dtype`, for losses that are singular there.

    The change of a value with the label is the error that the value may have. Labels next to 0 and
    1 are moved by less, so that they stay in their range. Other losses have no such labels.
    """
    if not (row.soft and row.name.startswith(_SINGULAR_AT_LABEL)):
        return []
    y = np.asarray(arguments["labels"], np.float64)
    shift = 8 * np.finfo(dtype).eps * np.minimum(y, 1 - y)
    return [y + shift, y - shift]


# Names of the losses that are tested against values that this project did not compute.
WITH_PUBLISHED_VALUES: set[str] = set()


def published_values_of(*names):
    """Mark a test that compares losses with published values or another implementation."""
    WITH_PUBLISHED_VALUES.update(names)
    return lambda test: test


@functools.cache
def _not_an_array():
    return (
        *(None, "a", b"a", Path("a"), {}, {"a": 1}, [{"bbox": [1, 2, 3, 4]}], [[1], [1, 2]]),
        *([1, [2]], [jnp.zeros((1, 5)), jnp.zeros((2, 5))], [np.zeros((1, 5)), np.zeros((2, 5))]),
        *([None, 1], 10**400, object(), len, int, slice(3), {1}, np.array(["a"]), np.array([None])),
        *(np.datetime64("2020-01-01"), jax.random.key(0), jnp.zeros((7, 5, 3, 2))),
        np.ones((1, 4), complex),
    )


def __getattr__(name):
    """Return values of wrong types, for tests that an error names the argument.

    The arrays are made on first use: `jax.distributed.initialize` has to come before.
    """
    if name == "NOT_AN_ARRAY":
        return _not_an_array()
    if name == "NOT_AN_OPTION":  # options are numbers, words or flags
        others = math.nan, [], (), np.array([1, 2]), "nothing", [True, "a"]
        return (*_not_an_array()[1:], *others)
    raise AttributeError(name)


def assert_errors_name(function, arguments, invalid):
    """Check that each invalid value of each argument raises `InputError`, naming an argument."""
    for name, values in invalid.items():
        for value in values:
            with pytest.raises(InputError) as caught:
                function(**arguments | {name: value})
            assert re.match(rf"({'|'.join(arguments)}): got ", str(caught.value)), (name, value)


def assert_close(got, want, rtol=1e-5, atol=None):
    """Compare trees; `atol` defaults to `rtol` of the largest entry of each leaf."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        scale = np.max(np.abs(b[np.isfinite(b)]), initial=0)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale if atol is None else atol)
