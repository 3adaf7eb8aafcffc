"""Measure the hand-derived gradients against autodiff of the plain formulas, and both to 60 digits.

Measurement only: how the result is shown is `_comparison`'s.
"""

import contextlib
import importlib
import math
import numbers
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from focal_jax import _catalogue, _checks, reference
from focal_jax._comparison import GradientComparison, GradientError, Measured
from focal_jax._extras import extra
from focal_jax._modules import function_of

NAMES = tuple(_catalogue.by_name())
DTYPES = ("float16", "bfloat16", "float32", "float64")

# From a uniform number in [-1, 1) to the margin, the true logit less the log-sum-exp of
# the others. Beyond 17 float32 has no 1 - p left, beyond 37 float64 has none.
_MARGINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "easy": lambda u: 4.5 + 3.5 * u,
    "hard": lambda u: -3.5 + 4.5 * u,
    "saturated": lambda u: np.copysign(20 + 60 * np.abs(u), u),
}

# How many positions and logits are evaluated to 60 digits: a second or so for each regime.
_POSITIONS, _LOGITS = 1024, 2**13

# How often a comparison says what it does next.
STEPS = 3 + len(_MARGINS)


class _Case(NamedTuple):
    """Logits and labels of a loss, in float64 but for class indices."""

    logits: np.ndarray
    labels: np.ndarray


def _draw(loss: _catalogue.Loss, shape: tuple[int, ...], axis: int, margins, rng) -> _Case:
    """Return logits of the margins asked for, and labels of the first kind that the loss takes."""
    if not loss.softmax:
        labels = rng.integers(2, size=shape)
        margin = margins(rng.uniform(-1, 1, shape))
        return _Case(np.where(labels == 1, margin, -margin), labels.astype(np.float64))
    logits = np.moveaxis(rng.normal(size=shape), axis, -1)
    classes = logits.shape[-1]
    labels = rng.integers(classes, size=logits.shape[:-1])
    true = np.arange(classes) == labels[..., None]
    rest = np.log(np.sum(np.exp(logits), -1, where=~true))
    margin = margins(rng.uniform(-1, 1, labels.shape))
    logits = np.moveaxis(np.where(true, (margin + rest)[..., None], logits), -1, axis)
    match loss.labels[0]:
        case "one-hot":
            return _Case(logits, np.moveaxis(true, -1, axis).astype(np.float64))
        case "real":  # anywhere between the middles of the class and of its neighbours
            shift = rng.uniform(-0.5, 0.5, labels.shape)
            return _Case(logits, np.clip(labels + shift, 0, classes - 1))
        case _:
            return _Case(logits, labels)


def _truth(loss: _catalogue.Loss, case: _Case, axis: int, options: Mapping[str, Any]) -> np.ndarray:
    """Return the gradient of the summed losses in the logits, to 60 digits and then in float64."""
    extra("mpmath")  # which the module needs to be imported
    evaluate = importlib.import_module("focal_jax._truth").evaluate
    logits, labels = (np.asarray(x, np.float64) for x in case)
    flat: dict[str, Any] = {"logits": logits.ravel(), "labels": labels.ravel()}
    if loss.softmax:
        logits = np.moveaxis(logits, axis, -1)
        flat["logits"] = logits.reshape(-1, logits.shape[-1])
        if labels.ndim == logits.ndim:  # a weight for each class
            flat["labels"] = np.moveaxis(labels, axis, -1).reshape(flat["logits"].shape)
    for name, value in options.items():
        if value is not None and loss.kind == "region":
            flat[name] = np.float64(value)
        elif value is not None:
            shape = flat["logits"].shape if loss.options[name].per_class else len(flat["logits"])
            flat[name] = np.broadcast_to(np.float64(value), shape)
    if loss.kind == "linear":  # by the kernel that is one, its features are the logits
        loss = loss._replace(kind="position")
    gradient = evaluate(loss, flat, by={"logits"}).slopes["logits"]
    gradient = gradient.sum(0) if loss.kind == "region" else gradient
    gradient = gradient.astype(np.float64).reshape(logits.shape)
    return np.moveaxis(gradient, -1, axis) if loss.softmax else gradient


def _error(value_and_gradient: tuple[Array, Array], truth: np.ndarray) -> GradientError:
    loss, gradient = value_and_gradient
    # The least that can be told from 0: JAX flushes what is below the smallest normal number
    # of the dtype it computes in, a factor of a product too, and rounding to float16 ends at
    # its smallest subnormal.
    least = max(
        100 * float(jnp.finfo(loss.dtype).tiny), float(jnp.finfo(gradient.dtype).smallest_subnormal)
    )
    got = np.asarray(gradient).astype(np.float64)
    finite = np.isfinite(got)
    if not finite.any():
        absolute = relative = np.array(math.nan)
    else:
        absolute = np.abs(got[finite] - truth[finite])
        relative = np.where(
            absolute <= least, 0, absolute / np.maximum(np.abs(truth[finite]), least)
        )
    return GradientError(
        absolute=float(absolute.max()),
        relative=float(relative.max()),
        nans=int(np.isnan(got).sum()),
        infinities=int(np.isinf(got).sum()),
    )


def _given(loss: _catalogue.Loss, case: _Case, dtype: str) -> tuple[Array, ...]:
    """Return the arguments as the loss takes them."""
    logits = jnp.asarray(case.logits, dtype)
    labels = jnp.asarray(case.labels, jnp.int32 if "integer" in loss.labels else dtype)
    if loss.kind == "linear":
        return logits, jnp.eye(logits.shape[-1], dtype=dtype), labels
    return logits, labels


def _compile(loss: Callable, options: Mapping[str, Any], *arguments: Array):
    def total(*arguments):
        return jnp.sum(loss(*arguments, **options))

    return jax.jit(jax.value_and_grad(total)).lower(*arguments).compile()


def _seconds(calls: Sequence[Callable], cases: Sequence[tuple], repeats: int) -> list[float]:
    """Return each call's median time; they take turns, so that all meet the same weather."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for case in cases:
            for call, taken in zip(calls, times):
                start = time.perf_counter()
                jax.block_until_ready(call(*case))
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


# ---------------------------------------------------------------- the arguments


def _loss(given: str | Callable) -> _catalogue.Loss:
    for loss in _catalogue.LOSSES:
        if given == loss.name or given is function_of(loss.name):
            return loss
    raise _checks.InputError(f"loss: got {given!r}, wanted one of {NAMES}, or the function itself")


def _integer(name: str, value: int, least: int) -> int:
    if not isinstance(value, numbers.Integral) or value < least:
        raise _checks.InputError(f"{name}: got {value!r}, wanted an integer of at least {least}")
    return int(value)


def _options(loss: _catalogue.Loss, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a loss as Python numbers, or tuples of one a class."""
    for name in given:
        if name not in loss.options:
            raise _checks.InputError(
                f"{name}: got an option that {loss.name} does not have, wanted one of "
                f"{tuple(loss.options)}"
            )
    out: dict[str, Any] = {name: option.default for name, option in loss.options.items()}
    for name, value in given.items():
        if value is not None:
            array = _checks.array(name, value)
            _checks.real(name, array)
            if isinstance(array, jax.core.Tracer):
                raise _checks.InputError(f"{name}: got a traced number, wanted one of Python's")
            if array.ndim and not loss.options[name].per_class:
                raise _checks.InputError(f"{name}: got {value}, wanted one number")
        out[name] = None if value is None else _tuple_or_number(value)
    return out


def _tuple_or_number(value: Any) -> float | tuple[float, ...]:
    array = np.asarray(value, np.float64)
    return tuple(array.tolist()) if array.ndim else array.item()


def _dtype(dtype: DTypeLike) -> str:
    with contextlib.suppress(TypeError):
        if dtype is not None and jnp.dtype(dtype).name in DTYPES:
            return jnp.dtype(dtype).name
    raise _checks.InputError(f"dtype: got {dtype!r}, wanted one of {DTYPES}")


def _fits(shape: tuple[int, ...]) -> None:
    """Refuse a shape that this machine has not the memory for."""
    # Three regimes in float64 and in their dtype, and what autodiff keeps.
    needed = math.prod(shape) * 8 * 3 * len(_MARGINS)
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not a POSIX system, or one that does not say
        return
    if needed > there:
        raise _checks.InputError(
            f"shape: got {math.prod(shape):,} logits, for which some {needed / 1e9:,.0f} GB are "
            f"needed, wanted what {there / 1e9:,.0f} GB of memory hold: a smaller shape"
        )


def _excerpt(loss: _catalogue.Loss, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Return a shape with no more positions than are evaluated to 60 digits."""
    classes = shape[axis] if loss.softmax else 1
    positions = max(1, min(_POSITIONS, _LOGITS // classes))
    if math.prod(shape) <= positions * classes:
        return shape
    if not loss.softmax:
        return (positions,)
    first = 0 if axis else 1
    others = [positions if i == first else 1 for i in range(len(shape))]
    return tuple(classes if i == axis else n for i, n in enumerate(others))


@contextlib.contextmanager
def _precision(dtype: str) -> Iterator[None]:
    """Compute in `dtype`, products of matrices too: they would be rounded on accelerators."""
    wide = jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()
    with wide, jax.default_matmul_precision("highest"):
        yield


# What the relative error of a float32 gradient stays below.
LIMIT = 1e-5


def check(loss: _catalogue.Loss) -> float:
    """Return the largest relative error of a loss's own float32 gradient on this device."""
    shape = (24, 5) if loss.softmax else (120,)
    rng = np.random.default_rng(0)
    options = _options(loss, {})
    with _precision("float32"):
        cases = [_draw(loss, shape, len(shape) - 1, margins, rng) for margins in _MARGINS.values()]
        given = [_given(loss, case, "float32") for case in cases]
        call = _compile(function_of(loss.name), options, *given[0])
        worst = 0.0
        for case, arguments in zip(cases, given):
            truth = _truth(
                loss, case._replace(logits=arguments[0], labels=arguments[-1]), -1, options
            )
            found = _error(call(*arguments), truth)
            if found.nans or found.infinities:
                return math.inf
            # The entries of these are differences, which may cancel.
            cancels = loss.kind in ("interval", "region")
            worst = max(worst, found.absolute / np.abs(truth).max() if cancels else found.relative)
    return worst


def compare_gradients(
    loss: str | Callable = "softmax_focal_loss_with_integer_labels",
    *,
    shape: Sequence[int] = (100_000, 21),
    axis: int = -1,
    dtype: DTypeLike = "float32",
    seed: int = 0,
    repeats: int = 10,
    progress: Callable[[str], object] | None = None,
    **options: ArrayLike | Sequence[float] | None,
) -> GradientComparison:
    """Compare a loss's own gradient and autodiff's, each with the true one.

    "Custom" is the gradient of the public loss, "autodiff" what JAX makes of the same
    loss in `focal_jax.reference`. The truth is the formula of the latter, evaluated and
    differentiated to 60 digits (by mpmath, which `focal_jax[benchmarks]` brings) at the very
    logits, rounded to `dtype`, that the two are given. The labels are 0 or 1, one class, or
    for an interval loss a real number near one.

    The logits come in three regimes, by their margin: the true logit less the log-sum-exp
    of the others, for a sigmoid the logit with the sign of its label.

        easy        1 to 8        the true class is ahead
        hard        -8 to 1       it is not, or hardly
        saturated   +-20 to +-80  1 - p, as written, is 0 or 1 in float32

    Of every regime's gradient of the summed losses with respect to the logits, for up to
    1,024 positions (fewer of many classes):

    * `absolute`: the largest `|gradient - truth|` of the finite ones;
    * `relative`: the largest `|gradient - truth| / |truth|`, element by element. A
      difference no larger than the least number that is told from 0 counts as none, and no
      `|truth|` counts as less: a true 1e-50 that comes out as 0 is underflow, not an error
      of 100%. That least number is a hundred times the smallest normal one of the dtype that
      is computed in (1.2e-36 for float32), for float16 its smallest subnormal one, 6e-8. Of
      an interval or a region the entries are differences, which may cancel: see `absolute`;
    * `nans` and `infinities`: how many of the gradient's elements are.

    Of each implementation, under `jit(value_and_grad)` at the whole shape: the median time of
    a call, the two taking turns over all regimes in one process, and the compiler's figure for
    the temporary memory at its peak.

    Args:
      loss: a loss of this package, or its name. The linear head is given features that are
        the logits, and the identity for a kernel.
      shape: the logits' shape.
      axis: the class axis; a sigmoid has none and does not look at it. The linear head has the
        last.
      dtype: the logits' dtype: float16, bfloat16, float32 or float64 (the last needs no
        `jax_enable_x64`).
      seed: of the random logits and labels.
      repeats: how often each regime is timed.
      progress: called with what comes next, in words, before each of the steps.
      **options: the loss's own, such as `gamma` and `alpha`: Python numbers, or where the loss
        takes one number a class a sequence of these. The others keep their defaults.

    Returns:
      A `GradientComparison`, which a notebook shows as tables and `rich.print` in a terminal;
      its `plot()` returns a figure, `dataclasses.asdict` makes a dictionary of it. For example
      `comparison.custom.saturated.relative`, `comparison.autodiff.seconds`.

    Raises:
      ValueError: for an unknown loss, option or dtype, sizes below 1, fewer than two classes,
        more logits than the memory holds, an axis out of range, options that do not fit the
        loss, fewer than one repeat.
      ImportError: without mpmath.

    Example:
      >>> from focal_jax import compare_gradients
      >>> report = compare_gradients("sigmoid_focal_loss", shape=(64,), gamma=0.5, repeats=1)
      >>> report.custom.saturated.relative < 1e-5
      True
      >>> report.autodiff.saturated.nans > 0
      True
    """
    entry, dtype = _loss(loss), _dtype(dtype)
    if not isinstance(shape, Sequence | np.ndarray):
        raise _checks.InputError(f"shape: got {shape!r}, wanted several integers")
    shape = tuple(_integer("shape", n, 1) for n in shape)
    seed, repeats = _integer("seed", seed, 0), _integer("repeats", repeats, 1)
    given = _options(entry, options)
    axis = _checks.axis(axis, len(shape)) if entry.softmax else axis
    if entry.kind == "linear" and axis != len(shape) - 1:
        raise _checks.InputError(f"axis: got {axis}, wanted the last: the linear head has no other")
    if entry.softmax:
        _integer("shape along the class axis", shape[axis], 2)
    _fits(shape)
    excerpt = _excerpt(entry, shape, axis)
    say = progress if progress is not None else lambda _: None

    rng = np.random.default_rng(seed)
    keywords: dict[str, Any] = dict(given)
    if entry.softmax and entry.kind != "linear":
        keywords["axis"] = axis
    functions = function_of(entry.name), getattr(reference, entry.name)

    def drawn(shape: tuple[int, ...]) -> list[_Case]:
        return [_draw(entry, shape, axis, margins, rng) for margins in _MARGINS.values()]

    with _precision(dtype):
        say("compiling for the truth's logits")
        few = drawn(excerpt)
        exact = [_given(entry, case, dtype) for case in few]
        calls = [_compile(function, keywords, *exact[0]) for function in functions]
        errors: list[list[GradientError]] = [[], []]
        for regime, case, arguments in zip(_MARGINS, few, exact):
            say(f"{regime} logits to 60 digits")
            rounded = case._replace(logits=arguments[0], labels=arguments[-1])
            truth = _truth(entry, rounded, axis, given)
            for call, found in zip(calls, errors):
                found.append(_error(call(*arguments), truth))
        say("compiling for the whole shape")
        if excerpt != shape:
            exact = [_given(entry, case, dtype) for case in drawn(shape)]
            calls = [_compile(function, keywords, *exact[0]) for function in functions]
        say("timing")
        seconds = _seconds(calls, exact, repeats)
    custom, autodiff = (
        Measured(
            **dict(zip(_MARGINS, by_regime)),
            seconds=taken,
            temporary_bytes=getattr(call.memory_analysis(), "temp_size_in_bytes", None),
        )
        for by_regime, taken, call in zip(errors, seconds, calls)
    )
    return GradientComparison(
        loss=entry.name,
        shape=shape,
        axis=axis,
        options=given,
        dtype=dtype,
        seed=seed,
        repeats=repeats,
        held_against_the_truth=excerpt,
        jax_version=jax.__version__,
        device=next(iter(exact[0][0].devices())).device_kind,
        custom=custom,
        autodiff=autodiff,
    )
