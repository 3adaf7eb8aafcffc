"""Measure the hand-derived gradients against autodiff of the plain formulas.

Measurement only: tables and figures are `focal_jax.__main__`'s.
"""

import contextlib
import dataclasses
import importlib
import math
import numbers
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from focal_jax import _catalogue, _checks, reference

# The losses of given logits whose truth is the formula below.
_FOCAL = {reference.FORMULAS[name] for name in ("sigmoid_focal_loss", "softmax_focal_loss")}
_LOSSES = {
    loss.name: loss
    for loss in _catalogue.LOSSES
    if loss.kind != "linear" and reference.FORMULAS[loss.name] in _FOCAL
}
HEADS = tuple(_LOSSES)
DTYPES = ("float16", "bfloat16", "float32", "float64")

# From a uniform number in [-1, 1) to the margin, the true logit less the log-sum-exp of
# the others. Beyond 17 float32 has no 1 - p left, beyond 37 float64 has none.
_MARGINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "easy": lambda u: 4.5 + 3.5 * u,
    "hard": lambda u: -3.5 + 4.5 * u,
    "saturated": lambda u: np.copysign(20 + 60 * np.abs(u), u),
}


@dataclasses.dataclass(frozen=True)
class GradientError:
    """How far gradients lie from the truth; differences are those of the finite ones."""

    absolute: float  # the largest |gradient - truth|, NaN if no gradient is finite
    relative: float  # the largest |gradient - truth| / |truth|, likewise
    nans: int
    infinities: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of one implementation."""

    easy: GradientError
    hard: GradientError
    saturated: GradientError
    seconds: float  # the median of a call
    temporary_bytes: int | None  # None where the compiler does not say


@dataclasses.dataclass(frozen=True)
class GradientComparison:
    """The result of `compare_gradients`: the question, and what was measured."""

    head: str
    shape: tuple[int, ...]
    axis: int
    gamma: float
    alpha: float | tuple[float, ...] | None
    dtype: str
    seed: int
    repeats: int
    jax_version: str
    device: str
    custom: Measured
    autodiff: Measured


# ---------------------------------------------------------------- the truth


@jax.jit
@partial(jnp.vectorize, signature="(c),(),(),()->(c)")
def _true_gradient(logits: Array, label: Array, weight: Array, gamma: Array) -> Array:
    """Return the gradient of one position from the formulas of the paper, in logarithms.

    A third way of computing it, that shares no line with the other two. Whatever may
    underflow or cancel is a logarithm until the last exponential.
    """
    true = jnp.arange(logits.size) == label
    total = jax.nn.logsumexp(logits)
    log_p = logits - total
    log_q = jax.nn.logsumexp(jnp.where(true, -jnp.inf, logits)) - total
    n = jnp.where(log_q < -math.log(2), -jnp.log1p(-jnp.exp(log_q)), total - logits[label])
    # -d loss/d(log p) = q**gamma (1 + gamma p n / q)
    log_slope = gamma * log_q + jnp.logaddexp(0.0, jnp.log(gamma) - n + jnp.log(n) - log_q)
    return weight * jnp.exp(log_slope) * jnp.where(true, -jnp.exp(log_q), jnp.exp(log_p))


def _truth(
    loss: _catalogue.Loss, logits: np.ndarray, labels: np.ndarray, axis: int, alpha, gamma: float
):
    """Return the gradient of the summed losses in float64, on the CPU: a TPU has none."""
    logits = logits.astype(np.float64)
    if not loss.softmax:  # the softmax of [0, z], whose second logit is the one that is asked for
        logits = np.stack([np.zeros_like(logits), logits], -1)
        weights = np.ones(2) if alpha is None else np.array([1 - alpha, alpha])
    else:
        logits = np.moveaxis(logits, axis, -1)
        weights = np.broadcast_to(np.float64(1 if alpha is None else alpha), logits.shape[-1])
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        gradient = np.asarray(_true_gradient(logits, labels, weights[labels], gamma))
    return np.moveaxis(gradient, -1, axis) if loss.softmax else gradient[..., 1]


# ---------------------------------------------------------------- what is measured


def _draw(loss: _catalogue.Loss, shape: tuple[int, ...], axis: int, margins: Callable, rng):
    """Return logits of the margins asked for, in float64, and their integer labels."""
    if not loss.softmax:
        labels = rng.integers(2, size=shape)
        margin = margins(rng.uniform(-1, 1, shape))
        return np.where(labels == 1, margin, -margin), labels
    logits = np.moveaxis(rng.normal(size=shape), axis, -1)
    classes = logits.shape[-1]
    labels = rng.integers(classes, size=logits.shape[:-1])
    true = np.arange(classes) == labels[..., None]
    rest = np.log(np.sum(np.exp(logits), -1, where=~true))
    margin = margins(rng.uniform(-1, 1, labels.shape))
    return np.moveaxis(np.where(true, (margin + rest)[..., None], logits), -1, axis), labels


def _error(value_and_gradient: tuple[Array, Array], truth: np.ndarray) -> GradientError:
    loss, gradient = value_and_gradient
    # The least that can be told from 0: JAX flushes what is below the smallest normal number
    # of the dtype it computes in, and rounding to float16 ends at its smallest subnormal.
    least = max(
        float(jnp.finfo(loss.dtype).tiny), float(jnp.finfo(gradient.dtype).smallest_subnormal)
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


def _compile(loss: Callable, options: dict, logits: Array, labels: Array):
    def total(logits, labels):
        return jnp.sum(loss(logits, labels, **options))

    return jax.jit(jax.value_and_grad(total)).lower(logits, labels).compile()


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


# ---------------------------------------------------------------- the public function


def _function(name: str) -> Callable:
    # The package's own front door, which imports this module.
    return getattr(importlib.import_module("focal_jax"), name)


def _loss(head: str | Callable) -> _catalogue.Loss:
    for name, loss in _LOSSES.items():
        if head == name or head is _function(name):
            return loss
    raise _checks.InputError(f"head: got {head!r}, wanted one of {HEADS}, or the function itself")


def _integer(name: str, value: int, least: int) -> int:
    if not isinstance(value, numbers.Integral) or value < least:
        raise _checks.InputError(f"{name}: got {value!r}, wanted an integer of at least {least}")
    return int(value)


def _alpha(alpha: ArrayLike | Sequence[float] | None) -> float | tuple[float, ...] | None:
    if alpha is None:
        return None
    weights = np.asarray(alpha, np.float64)
    return tuple(weights.tolist()) if weights.ndim else weights.item()


def _dtype(dtype: DTypeLike) -> str:
    with contextlib.suppress(TypeError):
        if jnp.dtype(dtype).name in DTYPES:
            return jnp.dtype(dtype).name
    raise _checks.InputError(f"dtype: got {dtype!r}, wanted one of {DTYPES}")


def compare_gradients(
    head: str | Callable = "softmax_focal_loss_with_integer_labels",
    *,
    shape: Sequence[int] = (1024, 21),
    axis: int = -1,
    gamma: float = 2.0,
    alpha: ArrayLike | Sequence[float] | None = None,
    dtype: DTypeLike = "float32",
    seed: int = 0,
    repeats: int = 20,
) -> GradientComparison:
    """Compare a loss's own gradient and autodiff's, each with the true one.

    "Custom" is the gradient of the public loss, "autodiff" what JAX makes of the same
    loss in `focal_jax.reference`. The truth is a third implementation, in float64 and in
    logarithms, of the very logits (rounded to `dtype`) that the two are given; it runs on
    JAX's CPU backend, which `JAX_PLATFORMS` must not hide.

    The logits come in three regimes, by their margin: the true logit less the log-sum-exp
    of the others, for a sigmoid the logit with the sign of its label.

        easy        1 to 8        the true class is ahead
        hard        -8 to 1       it is not, or hardly
        saturated   +-20 to +-80  1 - p, as written, is 0 or 1 in float32

    Of every regime's gradient of the summed losses with respect to the logits:

    * `absolute`: the largest `|gradient - truth|` of the finite ones;
    * `relative`: the largest `|gradient - truth| / |truth|`, element by element. A
      difference no larger than the least number that is told from 0 counts as none, and no
      `|truth|` counts as less: a true 1e-50 that comes out as 0 is underflow, not an error
      of 100%. That least number is the smallest normal one of the dtype that is computed
      in (1.2e-38 for float32), for float16 its smallest subnormal one, 6e-8;
    * `nans` and `infinities`: how many of the gradient's elements are.

    Of each implementation, under `jit(value_and_grad)`: the median time of a call, the two
    taking turns over all regimes in one process, and the compiler's figure for the
    temporary memory at its peak.

    Args:
      head: a loss of this package, or its name: `sigmoid_focal_loss`,
        `softmax_focal_loss` (with one-hot labels) or
        `softmax_focal_loss_with_integer_labels`.
      shape: the logits' shape.
      axis: the class axis; a sigmoid has none and does not look at it.
      gamma: focusing exponent, a Python number, 0 or more.
      alpha: as the loss takes it: None, a number or, for a softmax, one weight per class.
      dtype: the logits' dtype: float16, bfloat16, float32 or float64 (the last needs no
        `jax_enable_x64`). The truth has errors of its own of about 1e-13.
      seed: of the random logits and labels.
      repeats: how often each regime is timed.

    Returns:
      A `GradientComparison`; `dataclasses.asdict` makes a dictionary of it. For example
      `comparison.custom.saturated.relative`, `comparison.autodiff.seconds`.

    Raises:
      ValueError: for an unknown head or dtype, sizes below 1, fewer than two classes, an
        axis out of range, an alpha that does not fit, a gamma that is not a number or is
        negative, fewer than one repeat.

    Example:
      >>> from focal_jax import compare_gradients
      >>> report = compare_gradients("sigmoid_focal_loss", shape=(64,), gamma=0.5, repeats=1)
      >>> report.custom.saturated.relative < 1e-5
      True
      >>> report.autodiff.saturated.nans > 0
      True
    """
    loss, dtype, weights = _loss(head), _dtype(dtype), _alpha(alpha)
    shape = tuple(_integer("shape", n, 1) for n in shape)
    seed, repeats = _integer("seed", seed, 0), _integer("repeats", repeats, 1)
    if not isinstance(gamma, numbers.Real):
        raise _checks.InputError(f"gamma: got {gamma!r}, wanted a Python number")
    # What is left to check of alpha and gamma, the losses do when they are compiled.
    options: dict = {"alpha": weights, "gamma": gamma}
    if loss.softmax:
        options["axis"] = axis = _checks.axis(axis, len(shape))
        _integer("shape along the class axis", shape[axis], 2)
    elif isinstance(weights, tuple):
        raise _checks.InputError(f"alpha: got {alpha}, wanted None or one number for a sigmoid")

    rng = np.random.default_rng(seed)
    draws = [_draw(loss, shape, axis, margins, rng) for margins in _MARGINS.values()]
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        cases = []
        for logits, labels in draws:
            given = jnp.asarray(labels, jnp.int32)
            if loss.kind == "distribution":
                given = jax.nn.one_hot(given, shape[axis], dtype=dtype, axis=axis)
            cases.append((jnp.asarray(logits, dtype), given))
        calls = [
            _compile(implementation, options, *cases[0])
            for implementation in (_function(loss.name), getattr(reference, loss.name))
        ]
        truths = [
            _truth(loss, np.asarray(logits), labels, axis, weights, gamma)
            for (logits, _), (_, labels) in zip(cases, draws)
        ]
        errors = [
            [_error(call(*case), truth) for case, truth in zip(cases, truths)] for call in calls
        ]
        seconds = _seconds(calls, cases, repeats)
    custom, autodiff = (
        Measured(
            **dict(zip(_MARGINS, by_regime)),
            seconds=taken,
            temporary_bytes=getattr(call.memory_analysis(), "temp_size_in_bytes", None),
        )
        for by_regime, taken, call in zip(errors, seconds, calls)
    )
    return GradientComparison(
        head=loss.name,
        shape=shape,
        axis=axis,
        gamma=float(gamma),
        alpha=weights,
        dtype=dtype,
        seed=seed,
        repeats=repeats,
        jax_version=jax.__version__,
        device=next(iter(cases[0][0].devices())).device_kind,
        custom=custom,
        autodiff=autodiff,
    )
