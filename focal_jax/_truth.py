"""The losses and their derivatives to 60 digits: the reference's own formulas, by mpmath.

The formulas are evaluated on numbers that carry their derivatives along, so that no loss has
another line here, and no derivative the step of a difference quotient. `compare_gradients` and
the tests hold the losses against it. It needs mpmath, which the package itself does not.
"""

import operator
from collections.abc import Container, Hashable, Mapping
from typing import Any, NamedTuple

import mpmath
import numpy as np

from focal_jax import _catalogue
from focal_jax.reference import FORMULAS, OF_A_ROW, Operations

DIGITS = 60


class _Slope(NamedTuple):
    """A derivative, and the sum of the sizes of the terms that it is the sum of.

    The terms may cancel; then it is their sizes that an error is to be compared with.
    """

    value: Any
    size: Any


_NONE = _Slope(0, 0)
_Slopes = Mapping[Hashable, _Slope]  # by the variable; what is not in it has the derivative 0


def _chain(*links: tuple[_Slopes, Any]) -> _Slopes:
    """Return the sum of slopes, each times its factor."""
    out: dict[Hashable, _Slope] = {}
    for slopes, factor in links:
        for variable, slope in slopes.items():
            before = out.get(variable, _NONE)
            out[variable] = _Slope(
                before.value + slope.value * factor, before.size + slope.size * abs(factor)
            )
    return out


class Number:
    """A value to many digits, and its derivatives in the variables that it was made of."""

    __slots__ = ("slopes", "value")

    def __init__(self, value: Any, slopes: _Slopes | None = None):
        self.value = value
        self.slopes = {} if slopes is None else slopes

    def __add__(self, other: Any) -> "Number":
        other = _number(other)
        return Number(self.value + other.value, _chain((self.slopes, 1), (other.slopes, 1)))

    def __mul__(self, other: Any) -> "Number":
        other = _number(other)
        slopes = _chain((self.slopes, other.value), (other.slopes, self.value))
        return Number(self.value * other.value, slopes)

    def __pow__(self, other: Any) -> "Number":
        other = _number(other)
        value = self.value**other.value
        if self.value == 0:  # it has no logarithm; where its derivative is infinite, 0
            by_base = other.value * self.value ** max(other.value - 1, 0)
            return Number(value, _chain((self.slopes, by_base if other.value >= 1 else 0)))
        by_base = other.value / self.value * value
        by_power = mpmath.log(self.value) * value if other.slopes else 0
        return Number(value, _chain((self.slopes, by_base), (other.slopes, by_power)))

    def __neg__(self) -> "Number":
        return self * -1

    def __sub__(self, other: Any) -> "Number":
        return self + -_number(other)

    def __rsub__(self, other: Any) -> "Number":
        return -self + other

    def __truediv__(self, other: Any) -> "Number":
        return self * _number(other) ** -1

    def __rtruediv__(self, other: Any) -> "Number":
        return self**-1 * other

    __radd__, __rmul__ = __add__, __mul__

    def __abs__(self) -> "Number":
        return -self if self.value < 0 else self


def _compare(relation):
    return lambda self, other: relation(self.value, _number(other).value)


for _relation in (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne):
    setattr(Number, f"__{_relation.__name__}__", _compare(_relation))


def exact(x: Any) -> Any:
    """Return a number of NumPy's or Python's as one of mpmath's, of the same value."""
    return x if isinstance(x, mpmath.mpf) else mpmath.mpf(float(x))


def _number(x: Any) -> Number:
    return x if isinstance(x, Number) else Number(exact(x))


def _elementwise(value, slope):
    """Return a function of arrays of numbers, from a function and its derivative."""

    def of_number(x):
        x = _number(x)
        return Number(value(x.value), _chain((x.slopes, slope(x.value))) if x.slopes else None)

    return np.frompyfunc(of_number, 1, 1)


def _sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


# Arrays of such numbers are of NumPy's dtype "object", of which a type checker knows nothing.
_exact: Any = np.frompyfunc(exact, 1, 1)
_exp: Any = np.frompyfunc(mpmath.exp, 1, 1)
_log: Any = np.frompyfunc(mpmath.log, 1, 1)
_as_numbers: Any = np.frompyfunc(_number, 1, 1)

OPERATIONS = Operations(
    exp=_elementwise(mpmath.exp, mpmath.exp),
    log=_elementwise(mpmath.log, lambda x: 1 / x),
    sigmoid=_elementwise(_sigmoid, lambda x: _sigmoid(x) * _sigmoid(-x)),
    log_sigmoid=_elementwise(lambda x: -mpmath.log1p(mpmath.exp(-x)), lambda x: _sigmoid(-x)),
    where=lambda condition, a, b: np.where(
        np.asarray(condition, dtype=bool), _as_numbers(a), _as_numbers(b)
    ),
    held=np.frompyfunc(lambda x: Number(x.value), 1, 1),
)


def _objects(x: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array of things, also where there is but one."""
    out = np.empty(shape, dtype=object)
    out.ravel()[:] = np.ravel(x)
    return out


def _variables(name: str, x: np.ndarray) -> Any:
    """Return numbers that are each a variable, called by its name and its place.

    Of the first axis, the positions, each has variables of the same names.
    """
    unit = _Slope(1, 1)
    numbers = [Number(exact(v), {(name, *at[1:]): unit}) for at, v in np.ndenumerate(x)]
    return _objects(np.array([*numbers, None], dtype=object)[:-1], x.shape)


def _slopes(losses: Any, name: str, shape: tuple[int, ...]) -> _Slope:
    """Return the losses' slopes in one argument: arrays of its shape."""
    found = [losses[at[0]].slopes.get((name, *at[1:]), _NONE) for at in np.ndindex(shape)]
    return _Slope(*(_objects([s[i] for s in found], shape) for i in range(2)))


class Truth(NamedTuple):
    """Losses, and by the name of an argument their derivatives and these's sizes."""

    losses: np.ndarray
    slopes: Mapping[str, np.ndarray]
    sizes: Mapping[str, np.ndarray]


def evaluate(
    loss: _catalogue.Loss, arrays: Mapping[str, Any], by: Container[str] | None = None
) -> Truth:
    """Return the losses of one row of positions, and the derivatives of each of them.

    Args:
      loss: the catalogue's entry.
      arrays: all arguments by their names, each with the positions for its first axis and
        then, if it has one, the class axis (for a kernel two). An option that is absent or
        None is not used. Of a region the options are numbers, or have an entry a class.
      by: the arguments in which the losses are derived, all by default: the fewer, the faster.
        Of what a softmax is made of the derivatives cost nothing.

    Returns:
      Arrays of mpmath's numbers. The losses have one entry a position; derivatives, and the
      sums of the sizes of the terms that each of them is the sum of, have the shapes of the
      arguments. Of a region there is one loss a class, and the derivatives in the logits
      alone, of each class in all the logits.
    """
    given = {k: arrays[k] for k in (*loss.masks, *loss.flags) if k in arrays}
    floats = {k: np.asarray(x) for k, x in arrays.items() if x is not None and k not in given}
    integers = None if loss.differentiable_labels else floats.pop("labels").astype(int)
    first = floats["features" if loss.kind == "linear" else "logits"]
    # `1 - p` loses as many digits as p is close to 1.
    spread = np.ptp(first, -1).max() if loss.softmax else np.abs(first).max()
    with mpmath.workdps(DIGITS + int(spread)):
        if loss.kind == "region":
            return _region(loss, floats)
        formula = FORMULAS[loss.name]
        within = ("features", "kernel", "bias", *(["logits"] if loss.softmax else []))
        plain = {k: _exact(v) for k, v in floats.items()}
        x = {
            k: _variables(k, v) if by is None or k in by else plain[k]
            for k, v in floats.items()
            if k not in within
        }
        options = [x.get(name) for name in loss.options]
        if loss.kind == "elementwise":
            losses = formula(OPERATIONS, x["logits"], x["labels"], *options, **given)
            return _found(losses, {k: _slopes(losses, k, v.shape) for k, v in floats.items()})
        product = {k: plain[k] for k in within if k in plain}
        logits = _product(**product) if loss.kind == "linear" else plain["logits"]
        p = _softmax(logits)
        log_p = _variables("log_p", _log(p))
        positions = np.arange(len(p))
        if loss.kind == "distribution":
            along = [o if o is None or o.ndim > 1 else o[:, None] for o in options]
            losses = (x["labels"] * formula(OPERATIONS, log_p, *along)).sum(-1)
        elif loss.kind == "interval":
            left = np.minimum(np.floor(floats["labels"]), p.shape[-1] - 2).astype(int)
            pair = log_p[positions, left], log_p[positions, left + 1]
            losses = formula(OPERATIONS, x["labels"], left, *pair)
        else:
            own = positions, integers
            chosen = [o if o is None or o.ndim == 1 else o[own] for o in options]
            row = {"row": log_p} if loss.name in OF_A_ROW else {}
            losses = formula(OPERATIONS, log_p[own], *chosen, **row)
        slopes = {k: _slopes(losses, k, v.shape) for k, v in floats.items() if k in x}
        by_logits = _through_softmax(_slopes(losses, "log_p", p.shape), p)
        if loss.kind == "linear":
            slopes |= _through_product(by_logits, **product)
        else:
            slopes["logits"] = by_logits
        return _found(losses, slopes)


def _found(losses: np.ndarray, slopes: Mapping[str, _Slope]) -> Truth:
    return Truth(
        np.array([number.value for number in losses], dtype=object),
        {k: v.value for k, v in slopes.items()},
        {k: v.size for k, v in slopes.items()},
    )


def _softmax(logits: Any) -> Any:
    e = _exp(logits)
    return e / e.sum(-1, keepdims=True)


def _through_softmax(by_log_p: _Slope, p: np.ndarray) -> _Slope:
    """Return slopes in the logits from those in the logarithms of the probabilities."""
    value, size = (s.sum(-1, keepdims=True) * p for s in by_log_p)
    return _Slope(by_log_p.value - value, by_log_p.size + size)


def _product(features: Any, kernel: Any, bias: Any = 0) -> Any:
    return (features[..., None] * kernel).sum(-2) + bias


def _through_product(by_logits: _Slope, features, kernel, bias=None) -> dict[str, _Slope]:
    """Return slopes in what the logits are the product of."""

    def each(of_one):
        return _Slope(of_one(by_logits.value, lambda x: x), of_one(by_logits.size, abs))

    out = {
        "features": each(lambda s, part: (s[:, None, :] * part(kernel)).sum(-1)),
        "kernel": each(lambda s, part: s[:, None, :] * part(features)[..., None]),
    }
    return out if bias is None else out | {"bias": by_logits}


def _region(loss: _catalogue.Loss, floats: Mapping[str, np.ndarray]) -> Truth:
    """Return one loss a class of all positions together, from the counts of each class."""
    p, y = _softmax(_exact(floats["logits"])), _exact(floats["labels"])
    # Of a probability: how much of it is right, is missing, is wrong.
    shares = {"tp": (y * p, y), "fn": (y * (1 - p), -y), "fp": ((1 - y) * p, 1 - y)}
    counts = [_variables(name, part.sum(0)[None])[0] for name, (part, _) in shares.items()]
    options = [_exact(floats[name]) for name in loss.options]
    losses = FORMULAS[loss.name](OPERATIONS, *counts, *options)
    classes = range(p.shape[-1])
    by_p = []  # of each class, the slopes in its probability at every position
    for c in classes:
        found = [(losses[c].slopes[name, c], slope[:, c]) for name, (_, slope) in shares.items()]
        value = sum(by_count.value * slope for by_count, slope in found)
        by_p.append(_Slope(value, sum(by_count.size * abs(slope) for by_count, slope in found)))
    # The class's own logit raises its probability, every other lowers it.
    unit = [np.array([int(j == c) for j in classes]) for c in classes]
    slopes = _Slope(
        np.stack([(by_p[c].value * p[:, c])[:, None] * (unit[c] - p) for c in classes]),
        np.stack([(by_p[c].size * p[:, c])[:, None] * (unit[c] + p) for c in classes]),
    )
    return _found(losses, {"logits": slopes})
