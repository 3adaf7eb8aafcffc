"""Measure the error, the time and the memory of hand-derived gradients and of plain JAX."""

import contextlib
import difflib
import functools
import importlib
import inspect
import math
import numbers
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from focal_jax import catalogue, reference
from focal_jax.catalogue import Loss
from focal_jax.engine.arguments import InputError, shown, static_axis
from focal_jax.engine.options import check_call, check_names, known_numbers
from focal_jax.measure.extras import require_extra
from focal_jax.measure.report import GradientComparison, GradientError, Measurement

DTYPES = ("float16", "bfloat16", "float32", "float64")

# Functions from a uniform number in [-1, 1) to a margin. `1 - p` rounds to 0 for margins above 17
# in float32 and above 37 in float64.
_MARGINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "easy": lambda u: 4.5 + 3.5 * u,
    "hard": lambda u: -3.5 + 4.5 * u,
    "saturated": lambda u: np.copysign(20 + 60 * np.abs(u), u),
}
# mpmath evaluates about this many positions or logits per second.
_MAX_POSITIONS, _MAX_LOGITS = 1024, 2**13


def _cases(loss: Loss, shape: tuple[int, ...], axis: int, dtype: str, rng) -> list[tuple]:
    """Return random arguments of the loss for every regime; the labels are of the first kind."""
    cases = []
    for margins in _MARGINS.values():
        if loss.has_class_axis:
            logits = np.moveaxis(rng.normal(size=shape), axis, -1)
            num_classes = logits.shape[-1]
            labels = rng.integers(num_classes, size=logits.shape[:-1])
            one_hot = np.arange(num_classes) == labels[..., None]
            rest = np.log(np.sum(np.exp(logits), -1, where=~one_hot))
            margin = margins(rng.uniform(-1, 1, labels.shape))
            logits = np.where(one_hot, (margin + rest)[..., None], logits)
            logits = np.moveaxis(logits, -1, axis)
            if loss.labels[0] == "one-hot":
                labels = np.moveaxis(one_hot, -1, axis)
            elif loss.labels[0] == "real":
                labels = np.clip(labels + rng.uniform(-0.5, 0.5, labels.shape), 0, num_classes - 1)
        else:
            labels = rng.integers(2, size=shape)
            margin = margins(rng.uniform(-1, 1, shape))
            logits = np.where(labels == 1, margin, -margin)
        labels = jnp.asarray(labels, jnp.int32 if "integer" in loss.labels else dtype)
        kernel = [jnp.eye(shape[-1], dtype=dtype)] if loss.kind == "linear" else []
        cases.append((jnp.asarray(logits, dtype), *kernel, labels))
    return cases


def _exact_gradient(
    loss: Loss, case: Sequence, axis: int, options: Mapping[str, Any], formula: Any = None
) -> np.ndarray:
    """Return the gradient of the summed losses in the logits, evaluated to 60 digits."""
    require_extra("mpmath")  # raises a clear error; `evaluate` imports mpmath
    evaluate = importlib.import_module("focal_jax.measure.evaluate").evaluate
    logits, labels = np.asarray(case[0], np.float64), np.asarray(case[-1], np.float64)
    arrays: dict[str, Any] = {"logits": logits.ravel(), "labels": labels.ravel()}
    if loss.has_class_axis:
        logits = np.moveaxis(logits, axis, -1)
        arrays["logits"] = logits.reshape(-1, logits.shape[-1])
        if labels.ndim == logits.ndim:  # one weight per class
            arrays["labels"] = np.moveaxis(labels, axis, -1).reshape(arrays["logits"].shape)
    for name, value in options.items():
        option, shape = loss.options[name], arrays["logits"].shape
        if value is not None and option.differentiable and loss.kind != "region":
            value = np.broadcast_to(value, shape if option.per_class else shape[:1])
        arrays[name] = value
    if loss.kind == "linear":  # the kernel is the identity, so the features are the logits
        loss = loss._replace(kind="position")
    gradient = evaluate(loss, arrays, ("logits",), formula).slopes["logits"]
    gradient = gradient.sum(0) if loss.kind == "region" else gradient
    gradient = gradient.astype(np.float64).reshape(logits.shape)
    return np.moveaxis(gradient, -1, axis) if loss.has_class_axis else gradient


def _error(
    value_and_gradient: tuple[Array, Array], exact: np.ndarray, cancels: int | None = None
) -> GradientError:
    """Return the errors; along the axis `cancels` they are relative to the largest entry."""
    loss, gradient = value_and_gradient
    size = np.abs(exact)
    if cancels is not None:
        size = np.broadcast_to(np.max(size, cancels, keepdims=True), size.shape)
    # Smaller numbers count as 0: XLA flushes subnormal numbers, factors of a product underflow
    # before the product does, and float16 ends at its smallest subnormal number.
    subnormal = float(jnp.finfo(gradient.dtype).smallest_subnormal)
    tiny = max(100 * float(jnp.finfo(loss.dtype).tiny), subnormal)
    got = np.asarray(gradient).astype(np.float64)
    finite = np.isfinite(got)
    absolute = relative = np.array(math.nan)
    if finite.any():
        absolute = np.abs(got[finite] - exact[finite])
        relative = np.where(absolute <= tiny, 0, absolute / np.maximum(size[finite], tiny))
    nans, infinities = int(np.isnan(got).sum()), int(np.isinf(got).sum())
    return GradientError(float(absolute.max()), float(relative.max()), nans, infinities)


def _compile(loss: Callable, options: Mapping[str, Any], *arguments: Array):
    def total(*arguments):
        return jnp.sum(loss(*arguments, **options))

    return jax.jit(jax.value_and_grad(total)).lower(*arguments).compile()


def _median_seconds(calls: Sequence[Callable], cases: Sequence, repeats: int) -> list[float]:
    """Return the median time of each call. The calls alternate, so that both see the same load."""
    times: list[list[float]] = [[] for _ in calls]
    for case in [*cases] * repeats:
        for call, found in zip(calls, times):
            start = time.perf_counter()
            jax.block_until_ready(call(*case))
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


# ---------------------------------------------------------------- arguments


def _find(loss: Any, formula: Any) -> tuple[Loss, Callable, Callable]:
    """Return the declaration of a loss, its function, and the same loss in plain JAX."""
    known = catalogue.LOSSES
    found = known.get(loss) if isinstance(loss, str) else catalogue.declaration_of(loss)
    if found is None:
        wanted = f"one of {tuple(known)}, the function itself, or a loss made by focal_jax.engine"
        near = difflib.get_close_matches(loss, known, 1) if isinstance(loss, str) else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"loss: got {shown(loss)}, wanted {wanted}{hint}")
    function = loss if callable(loss) else found.function
    if found is known.get(found.name):
        if formula is not None:
            raise InputError(f"formula: got a function, wanted None: {found.name} has a formula")
        return found, function, getattr(reference, found.name)
    inputs = ("logit", "label") if found.kind == "elementwise" else ("log_p",)
    options = [k for k in found.options if k != "alpha" or found.kind == "elementwise"]
    wanted = f"formula({', '.join(['ops', *inputs, *options])})"
    if formula is None:
        raise InputError(f"formula: got None, wanted the formula of {found.name}: {wanted}")
    try:
        inspect.signature(formula).bind("ops", *inputs, **dict.fromkeys(options))
    except (TypeError, ValueError) as error:
        raise InputError(f"formula: {error}, wanted {wanted}") from error
    return found, function, reference.from_formula(found, formula)


def _with_named_errors(formula: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Return the formula with errors that name it."""
    if not callable(formula):
        return formula

    @functools.wraps(formula)
    def checked(*args, **options):
        wanted = "an array, computed by arithmetic and by the functions of ops"
        try:
            found = formula(*args, **options)
        except Exception as error:
            got = str(error).partition("\n")[0]
            raise InputError(f"formula: got {got}, wanted {wanted}") from error
        if found is None or isinstance(found, str | list | tuple) or np.iscomplexobj(found):
            raise InputError(f"formula: got {type(found).__name__}, wanted {wanted}")
        return found

    return checked


def _integer(name: str, value: Any, low: int, high: float = math.inf) -> int:
    is_integer = isinstance(value, numbers.Integral) and not isinstance(
        value, bool | np.timedelta64
    )
    if not is_integer or value < low:
        raise InputError(f"{name}: got {shown(value)}, wanted an integer of at least {low}")
    if int(value) > high:
        raise InputError(f"{name}: got {shown(value)}, wanted at most {high}")
    return int(value)


def _dtype(dtype: DTypeLike) -> str:
    with contextlib.suppress(Exception):  # NumPy and JAX raise different exceptions
        if dtype is not None and jnp.dtype(dtype).name in DTYPES:
            return jnp.dtype(dtype).name
    raise InputError(f"dtype: got {shown(dtype)}, wanted one of {DTYPES}")


def _options(loss: Loss, given: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """Return all options but the masks, as Python numbers or tuples with one number per class."""
    known = {name: option for name, option in loss.options.items() if option.kind != "mask"}
    check_names(loss.name, known, given)
    out: dict[str, Any] = {name: option.default for name, option in known.items()} | dict(given)
    for name, value in given.items():
        known[name].check(name, value)
        if value is None or known[name].kind == "flag":
            continue
        per_class = known[name].per_class
        wanted = "one number" + f", or {num_classes} numbers, one per class" * per_class
        array = known_numbers(value, name, wanted)
        if array is None:  # traced, complex or no number
            raise InputError(f"{name}: got {shown(value)}, wanted {wanted}")
        if array.shape not in [(), (num_classes,)][: 1 + per_class]:
            raise InputError(f"{name}: got shape {array.shape}, wanted {wanted}")
        out[name] = tuple(array.tolist()) if array.ndim else array.item()
    return out


def _check_memory(shape: tuple[int, ...], kernel: int) -> None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):  # on Windows
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Three regimes, each in float64 and in the dtype, and the residuals of plain JAX.
    needed = (math.prod(shape) + kernel) * 8 * 3 * len(_MARGINS)
    if needed > memory:
        got = f"{math.prod(shape):,} logits, which need about {needed / 1e9:,.0f} GB"
        raise InputError(f"shape: got {got}, wanted at most the {memory / 1e9:,.0f} GB of memory")


def _sample_shape(loss: Loss, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Return a shape with at most as many positions as are evaluated to 60 digits."""
    num_classes = shape[axis] if loss.has_class_axis else 1
    positions = max(1, min(_MAX_POSITIONS, _MAX_LOGITS // num_classes))
    if math.prod(shape) <= positions * num_classes:
        return shape
    if not loss.has_class_axis:
        return (positions,)
    sample = [1] * len(shape)
    sample[axis], sample[0 if axis else 1] = num_classes, positions
    return tuple(sample)


# ---------------------------------------------------------------- the comparison


@check_call
def compare_gradients(
    loss: str | Callable = "softmax_focal_loss_with_integer_labels",
    *,
    formula: Callable[..., Any] | None = None,
    shape: Sequence[int] = (100_000, 21),
    axis: int = -1,
    dtype: DTypeLike = "float32",
    seed: int = 0,
    repeats: int = 10,
    progress: Callable[[str], object] | None = None,
    **options: ArrayLike | Sequence[float] | None,
) -> GradientComparison:
    """Compare the gradient of a loss with the gradient that JAX derives from its plain formula.

    Both are compared with the exact gradient: mpmath differentiates the formula to 60 digits at the
    same logits. The random logits have three regimes of the margin: the logit of the label minus
    the log-sum-exp of the other logits; for a sigmoid, the logit with the sign of the label.

    | regime | margin |
    | --- | --- |
    | easy | 1 to 8 |
    | hard | -8 to 1 |
    | saturated | 20 to 80, -80 to -20 |

    The errors are the largest over the entries of the gradient of the summed losses, at up to 1,024
    positions. Numbers below 100 times the smallest normal number of the loss's dtype, or below the
    smallest subnormal number of a float16 gradient, count as 0. Entries of the gradient of an
    interval or region loss are differences, which may cancel: their error is relative to the
    largest entry of the position. Time (the median) and temporary memory are those of
    `jit(value_and_grad)` at the whole shape.

    Example:
      >>> from focal_jax import compare_gradients
      >>> report = compare_gradients("sigmoid_focal_loss", shape=(64,), gamma=0.5, repeats=1)
      >>> report.focal_jax.saturated.relative < 1e-5
      True
      >>> report.plain_jax.saturated.nans > 0
      True

    Args:
      loss: a loss of this package, its name, or a loss made by `focal_jax.engine`. The kernel of a
        linear loss is the identity.
      formula: the formula of a loss made by `focal_jax.engine`: `formula(ops, logit, label,
        **options)` if it is elementwise, `formula(ops, log_p, **options)` without `alpha` if it is
        a position loss. `ops` has `exp`, `log`, `sigmoid`, `log_sigmoid`, `where` and
        `stop_gradient`. A large relative error shows that the slope in the logits and the formula
        disagree. The slopes in the label and in the options are not compared.
      shape: the shape of the logits.
      axis: the class axis; a linear loss needs the last axis.
      dtype: float16, bfloat16, float32, or float64, which does not need `jax_enable_x64`.
      seed: the seed of the random logits and labels.
      repeats: the number of timed calls in each regime.
      progress: a function that is called with the name of each step before the step starts.
      **options: the options of the loss: Python numbers, or sequences with one number per class.

    Returns:
      A `GradientComparison`. Notebooks and `rich.print` show it as tables, `plot()` draws it.

    Raises:
      InputError: an argument is invalid, or the formula does not fit the loss.
      ImportError: mpmath is missing; `focal_jax[benchmarks]` installs it.
    """
    formula = _with_named_errors(formula)
    found, function, plain = _find(loss, formula)
    dtype = _dtype(dtype)
    is_scalar = isinstance(shape, str | bytes) or getattr(shape, "ndim", 1) == 0
    if is_scalar or not isinstance(shape, Sequence | np.ndarray):
        raise InputError(f"shape: got {shown(shape)}, wanted a sequence of integers")
    shape = tuple(_integer("shape", n, 1) for n in shape)
    seed, repeats = _integer("seed", seed, 0), _integer("repeats", repeats, 1, 10**6)
    axis = static_axis(axis, len(shape)) if shape or found.has_class_axis else axis
    if found.kind == "linear" and axis != len(shape) - 1:
        raise InputError(f"axis: got {axis}, wanted the last axis: the loss is linear")
    num_classes = shape[axis] if found.has_class_axis else 2
    given = _options(found, options, _integer("shape along the class axis", num_classes, 2))
    keywords = given | ({"axis": axis} if found.kind not in ("elementwise", "linear") else {})
    _check_memory(shape, num_classes**2 if found.kind == "linear" else 0)
    if not (progress is None or callable(progress)):
        raise InputError(f"progress: got {shown(progress)}, wanted None or a function")
    sample = _sample_shape(found, shape, axis)
    say = progress if progress is not None else lambda _: None
    rng = np.random.default_rng(seed)

    x64 = jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()
    precision = jax.default_matmul_precision("highest")  # the default is lower on accelerators
    with x64, precision, jax.disable_jit(False):
        say("compile for the sample")
        cases = _cases(found, sample, axis, dtype, rng)
        calls = [_compile(each, keywords, *cases[0]) for each in (function, plain)]
        errors: list[list[GradientError]] = [[], []]
        cancels = axis if found.kind in ("interval", "region") else None
        for regime, case in zip(_MARGINS, cases):
            say(f"evaluate {regime} logits to 60 digits")
            exact = _exact_gradient(found, case, axis, given, formula)
            for call, by_regime in zip(calls, errors):
                by_regime.append(_error(call(*case), exact, cancels))
        say("compile for the whole shape")
        if sample != shape:
            cases = _cases(found, shape, axis, dtype, rng)
            calls = [_compile(each, keywords, *cases[0]) for each in (function, plain)]
        say("measure the time")
        seconds = _median_seconds(calls, cases, repeats)
    memory = [getattr(call.memory_analysis(), "temp_size_in_bytes", None) for call in calls]
    measured = [
        Measurement(*by_regime, seconds=taken, temporary_bytes=count)
        for by_regime, taken, count in zip(errors, seconds, memory)
    ]
    device = next(iter(cases[0][0].devices())).device_kind
    settings = found.name, shape, axis, given, dtype, seed, repeats, sample, jax.__version__, device
    return GradientComparison(*settings, *measured)
