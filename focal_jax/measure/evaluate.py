"""Evaluate a loss and its derivatives to 60 digits.

mpmath evaluates the formulas of `focal_jax.reference` on dual numbers, which carry their
derivatives. The derivatives are exact; there are no finite differences. `compare_gradients` and
the tests measure errors against the result. Only this module imports mpmath.
"""

import inspect
import operator
from collections.abc import Callable, Container, Hashable, Mapping
from typing import Any, NamedTuple

import mpmath
import numpy as np

from focal_jax.catalogue import Loss
from focal_jax.engine.arguments import InputError
from focal_jax.reference import FORMULAS, Operations

DIGITS = 60

# ---------------------------------------------------------------- dual numbers


class _Slope(NamedTuple):
    """A derivative, and the sum of the absolute values of its terms, which may cancel."""

    value: Any
    magnitude: Any


_ZERO = _Slope(0, 0)
_Slopes = Mapping[Hashable, _Slope]  # by variable; a variable that is absent has the slope 0


def _scaled(slopes: _Slopes, factor: Any) -> _Slopes:
    """Return the slopes times a factor."""
    size = abs(factor)
    return {k: _Slope(x.value * factor, x.magnitude * size) for k, x in slopes.items()}


def _sum(a: _Slopes, b: _Slopes) -> _Slopes:
    """Return the sum of the slopes by variable."""
    both = {k: _Slope(*map(operator.add, a[k], b[k])) for k in a.keys() & b.keys()}
    return {**a, **b, **both}


class _Dual:
    """An mpmath number and its derivatives in the variables that it depends on."""

    def __init__(self, value: Any, slopes: _Slopes | None = None):
        self.value = value
        self.slopes = {} if slopes is None else slopes

    def __add__(self, other: Any) -> "_Dual":
        other = _dual(other)
        return _Dual(self.value + other.value, _sum(self.slopes, other.slopes))

    def __mul__(self, other: Any) -> "_Dual":
        other = _dual(other)
        slopes = _sum(_scaled(self.slopes, other.value), _scaled(other.slopes, self.value))
        return _Dual(self.value * other.value, slopes)

    def __pow__(self, other: Any) -> "_Dual":
        other = _dual(other)
        value = self.value**other.value
        if self.value == 0:  # log(0) is infinite, and so may be the slope; both count as 0
            in_base = other.value * self.value ** max(other.value - 1, 0)
            return _Dual(value, _scaled(self.slopes, in_base if other.value >= 1 else 0))
        in_base = other.value / self.value * value
        in_exponent = mpmath.log(self.value) * value if other.slopes else 0
        slopes = _sum(_scaled(self.slopes, in_base), _scaled(other.slopes, in_exponent))
        return _Dual(value, slopes)

    def __neg__(self) -> "_Dual":
        return _Dual(-self.value, _scaled(self.slopes, -1))

    def __sub__(self, other: Any) -> "_Dual":
        return self + -_dual(other)

    def __rsub__(self, other: Any) -> "_Dual":
        return -self + other

    def __truediv__(self, other: Any) -> "_Dual":
        return self * _dual(other) ** -1

    def __rtruediv__(self, other: Any) -> "_Dual":
        return self**-1 * other

    def __rpow__(self, other: Any) -> "_Dual":
        return _dual(other) ** self

    def __abs__(self) -> "_Dual":
        return -self if self.value < 0 else self

    __radd__, __rmul__ = __add__, __mul__


for _relation in (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne):

    def _compare(self, other, relation=_relation):
        return relation(self.value, _dual(other).value)

    setattr(_Dual, f"__{_relation.__name__}__", _compare)


def to_mpf(x: Any) -> Any:
    """Return a NumPy or Python number as the mpmath number of the same value."""
    return x if isinstance(x, mpmath.mpf) else mpmath.mpf(float(x))


def _dual(x: Any) -> _Dual:
    return x if isinstance(x, _Dual) else _Dual(to_mpf(x))


def _vectorize(function: Callable[[Any], Any]) -> Any:
    """Return a function of arrays of Python objects."""
    return np.frompyfunc(function, 1, 1)


def _lift(value: Callable[[Any], Any], slope: Callable[[Any], Any]) -> Any:
    """Return a function of arrays of dual numbers, from a function and its derivative."""

    def lifted(x):
        x = _dual(x)
        return _Dual(value(x.value), _scaled(x.slopes, slope(x.value)) if x.slopes else None)

    vectorized = _vectorize(lifted)
    return lambda x: vectorized(np.atleast_1d(x))  # a constant has no axis


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x))


_to_mpf, _to_dual = _vectorize(to_mpf), _vectorize(_dual)
_exp, _log = _vectorize(mpmath.exp), _vectorize(mpmath.log)

OPERATIONS = Operations(
    exp=_lift(mpmath.exp, mpmath.exp),
    log=_lift(mpmath.log, lambda x: 1 / x),
    sigmoid=_lift(_sigmoid, lambda x: _sigmoid(x) * _sigmoid(-x)),
    log_sigmoid=_lift(lambda x: -mpmath.log1p(mpmath.exp(-x)), lambda x: _sigmoid(-x)),
    where=lambda mask, a, b: np.where(np.asarray(mask, bool), _to_dual(a), _to_dual(b)),
    stop_gradient=_lift(lambda x: x, lambda x: 0),
)


def _variables(name: str, x: np.ndarray) -> np.ndarray:
    """Return `x` as dual numbers, each of them a variable.

    The key of a variable is its name and its index without the first axis, which has the
    positions: a loss depends on the variables of its own position only.
    """
    unit = _Slope(1, 1)
    entries = [_Dual(to_mpf(v), {(name, *index[1:]): unit}) for index, v in np.ndenumerate(x)]
    return np.array(entries, dtype=object).reshape(x.shape)


def _slopes(losses: Any, name: str, shape: tuple[int, ...]) -> _Slope:
    """Return the slopes of the losses in one argument, as arrays of its shape."""
    found = [losses[i[0]].slopes.get((name, *i[1:]), _ZERO) for i in np.ndindex(shape)]
    return _Slope(*(np.array([s[i] for s in found], object).reshape(shape) for i in range(2)))


# ---------------------------------------------------------------- losses


class Evaluation(NamedTuple):
    """Losses, derivatives by argument, and the sums of the absolute values of their terms."""

    losses: np.ndarray
    slopes: Mapping[str, np.ndarray]
    magnitudes: Mapping[str, np.ndarray]


def evaluate(
    loss: Loss,
    arrays: Mapping[str, Any],
    arguments: Container[str] | None = None,
    formula: Callable[..., Any] | None = None,
) -> Evaluation:
    """Evaluate the losses at a list of positions, and their derivatives.

    Args:
      loss: the declaration of the loss.
      arrays: all arguments by name. The first axis has the positions; the class axis is the last.
        The kernel has one matrix per position. An option that is absent or None is not used. An
        option of a region loss is a number or has one entry per class.
      arguments: the arguments to differentiate in, by default all. Logits, features, kernel and
        bias of a loss with a class axis are always included.
      formula: the formula of the loss, by default the formula in `focal_jax.reference`.

    Returns:
      An `Evaluation` with arrays of mpmath numbers. The losses have one entry per position, and
      the derivatives have the shapes of the arguments. A region loss has one entry per class, and
      derivatives in the logits only, of shape `[C, positions, C]`.
    """
    formula = FORMULAS[loss.name] if formula is None else formula
    others = {k: x for k, x in loss.options.items() if not x.differentiable}
    static = {k: arrays.get(k, x.default) for k, x in others.items()}
    floats = {k: np.asarray(x) for k, x in arrays.items() if x is not None and k not in static}
    index = None if loss.differentiable_labels else floats.pop("labels").astype(int)
    logits_of = ("features", "kernel", "bias") + ("logits",) * loss.has_class_axis
    product = {k: floats[k] for k in logits_of if k in floats}
    first = _matmul(**product) if loss.kind == "linear" else floats["logits"]
    # `1 - p` in a formula needs more digits the closer p is to 1.
    spread = np.ptp(first, -1).max() if loss.has_class_axis else np.abs(first).max()
    with mpmath.workdps(DIGITS + int(spread)):
        plain = {k: _to_mpf(v) for k, v in floats.items()}
        if loss.kind == "region":
            return _evaluate_region(loss, formula, plain, static)
        x = {
            k: _variables(k, v) if arguments is None or k in arguments else v
            for k, v in plain.items()
            if k not in logits_of
        }
        options: dict[str, Any] = {k: x.get(k) for k in loss.numbers} | static
        if loss.kind == "elementwise":
            losses = formula(OPERATIONS, x["logits"], x["labels"], **options)
            losses = _check(losses, first.shape)
            return _evaluation(losses, {k: _slopes(losses, k, v.shape) for k, v in x.items()})

        alpha = options.pop("alpha", None)  # the class weights, which multiply the formula
        product = {k: plain[k] for k in logits_of if k in plain}
        p = _softmax(_matmul(**product) if loss.kind == "linear" else plain["logits"])
        log_p, positions = _variables("log_p", _log(p)), np.arange(len(p))
        if loss.kind == "distribution":
            options |= {k: o[:, None] for k, o in options.items() if np.ndim(o) == 1}
            losses = _check(formula(OPERATIONS, log_p, **options), p.shape)
            losses = (x["labels"] * (1 if alpha is None else alpha) * losses).sum(-1)
        elif loss.kind == "interval":
            left = np.minimum(np.floor(floats["labels"]), p.shape[-1] - 2).astype(int)
            pair = log_p[positions, left], log_p[positions, left + 1]
            losses = formula(OPERATIONS, x["labels"], left, *pair)
        else:
            own = positions, index
            options |= {k: o[own] for k, o in options.items() if np.ndim(o) == 2}
            if "log_probabilities" in inspect.signature(formula).parameters:
                options["log_probabilities"] = log_p
            losses = _check(formula(OPERATIONS, log_p[own], **options), positions.shape)
            losses = losses if alpha is None else alpha[own] * losses
        slopes = {k: _slopes(losses, k, v.shape) for k, v in x.items()}
        in_logits = _through_softmax(_slopes(losses, "log_p", p.shape), p)
        if loss.kind == "linear":
            return _evaluation(losses, slopes | _through_matmul(in_logits, **product))
        return _evaluation(losses, slopes | {"logits": in_logits})


def _check(losses: Any, shape: tuple[int, ...]) -> Any:
    """Return the result of a formula as dual numbers; raise if its shape is wrong."""
    if np.shape(losses) != shape:
        raise InputError(f"formula: got shape {np.shape(losses)}, wanted {shape}, one per loss")
    return _to_dual(losses)


def _evaluation(losses: np.ndarray, slopes: Mapping[str, _Slope]) -> Evaluation:
    return Evaluation(
        np.array([loss.value for loss in losses], dtype=object),
        {k: v.value for k, v in slopes.items()},
        {k: v.magnitude for k, v in slopes.items()},
    )


def _softmax(logits: Any) -> Any:
    e = _exp(logits)
    return e / e.sum(-1, keepdims=True)


def _through_softmax(in_log_p: _Slope, p: np.ndarray) -> _Slope:
    """Return the slopes in the logits, from the slopes in the log-probabilities."""
    value, magnitude = (s.sum(-1, keepdims=True) * p for s in in_log_p)
    return _Slope(in_log_p.value - value, in_log_p.magnitude + magnitude)


def _matmul(features: Any, kernel: Any, bias: Any = 0) -> Any:
    return (features[..., None] * kernel).sum(-2) + bias


def _through_matmul(in_logits: _Slope, features, kernel, bias=None) -> dict[str, _Slope]:
    """Return the slopes in features, kernel and bias, from the slopes in the logits."""
    factors = ((features, kernel), (abs(features), abs(kernel)))
    pairs = [(s[:, None, :], *factor) for s, factor in zip(in_logits, factors)]
    out = {
        "features": _Slope(*((s * kernel).sum(-1) for s, _, kernel in pairs)),
        "kernel": _Slope(*(s * features[..., None] for s, features, _ in pairs)),
    }
    return out if bias is None else out | {"bias": in_logits}


def _evaluate_region(loss: Loss, formula: Callable, plain: Mapping, static: Mapping) -> Evaluation:
    p, y = _softmax(plain["logits"]), plain["labels"]
    # True positives, false negatives and false positives: the terms, and their slopes in p.
    terms = {"tp": (y * p, y), "fn": (y * (1 - p), -y), "fp": ((1 - y) * p, 1 - y)}
    counts = [_variables(name, term.sum(0)[None])[0] for name, (term, _) in terms.items()]
    losses = formula(OPERATIONS, *counts, **{name: plain[name] for name in loss.numbers}, **static)
    in_logits = []
    for c, one_hot in enumerate(np.eye(p.shape[-1], dtype=int)):
        links = [(losses[c].slopes[name, c], slope[:, c]) for name, (_, slope) in terms.items()]
        value = sum(in_count.value * slope for in_count, slope in links) * p[:, c]
        magnitude = sum(in_count.magnitude * abs(slope) for in_count, slope in links) * p[:, c]
        in_log_p = _Slope(value[:, None] * one_hot, magnitude[:, None] * one_hot)
        in_logits.append(_through_softmax(in_log_p, p))
    return _evaluation(losses, {"logits": _Slope(*map(np.stack, zip(*in_logits)))})
