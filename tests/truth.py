"""The losses and their derivatives to 60 digits: the reference's own formulas, by mpmath.

The formulas are evaluated on numbers that carry their derivatives along, so that there is no
other line for any loss, and no step of a difference quotient.
"""

import operator

import mpmath
import numpy as np

from focal_jax.reference import FORMULAS, OF_A_ROW, Operations

DIGITS = 60


class Number:
    """A value to many digits, and its derivatives in everything that it was made of."""

    __slots__ = ("slopes", "value")

    def __init__(self, value, slopes=0):
        self.value = value
        # 0, or an array of mpmath's numbers of two rows: the derivatives, and for each the sum
        # of the sizes of the terms that it is the sum of, which may cancel.
        self.slopes = slopes

    def __add__(self, other):
        other = _number(other)
        return Number(self.value + other.value, self.slopes + other.slopes)

    def __mul__(self, other):
        other = _number(other)
        slopes = _times(self.slopes, other.value) + _times(other.slopes, self.value)
        return Number(self.value * other.value, slopes)

    def __pow__(self, other):
        other = _number(other)
        value = self.value**other.value
        if self.value == 0:  # it has no logarithm; where its derivative is infinite, 0
            by_base = other.value * self.value ** max(other.value - 1, 0)
            return Number(value, _times(self.slopes, by_base if other.value >= 1 else 0))
        by_base = other.value / self.value * value
        by_power = mpmath.log(self.value) * value
        return Number(value, _times(self.slopes, by_base) + _times(other.slopes, by_power))

    def __neg__(self):
        return self * -1

    def __sub__(self, other):
        return self + -_number(other)

    def __rsub__(self, other):
        return -self + other

    def __truediv__(self, other):
        return self * _number(other) ** -1

    def __rtruediv__(self, other):
        return self**-1 * other

    __radd__, __rmul__ = __add__, __mul__

    def __abs__(self):
        return -self if self.value < 0 else self


def _compare(relation):
    return lambda self, other: relation(self.value, _number(other).value)


for _relation in (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne):
    setattr(Number, f"__{_relation.__name__}__", _compare(_relation))


def _times(slopes, factor):
    """Return slopes times a number, and their sizes times its size."""
    return slopes * np.array([[factor], [abs(factor)]], dtype=object)


def _number(x) -> Number:
    return x if isinstance(x, Number) else Number(exact(x))


def exact(x):
    return x if isinstance(x, mpmath.mpf) else mpmath.mpf(float(x))


def _elementwise(value, slope):
    """Return a function of arrays of numbers, from a function and its derivative."""

    def of_number(x):
        x = _number(x)
        return Number(value(x.value), _times(x.slopes, slope(x.value)))

    return np.frompyfunc(of_number, 1, 1)


def _sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


_as_numbers = np.frompyfunc(lambda x: x if isinstance(x, Number) else Number(exact(x)), 1, 1)


def _where(condition, a, b):
    return np.where(np.asarray(condition, dtype=bool), _as_numbers(a), _as_numbers(b))


_log = _elementwise(mpmath.log, lambda x: 1 / x)
OPERATIONS = Operations(
    log=_log,
    where=_where,
    held=np.frompyfunc(lambda x: Number(x.value), 1, 1),
    exp=_elementwise(mpmath.exp, mpmath.exp),
    sigmoid=_elementwise(_sigmoid, lambda x: _sigmoid(x) * _sigmoid(-x)),
    log_sigmoid=_elementwise(lambda x: -mpmath.log1p(mpmath.exp(-x)), lambda x: _sigmoid(-x)),
)


def _numbers(arrays, positions):
    """Return arrays of numbers, each a variable of its own within its position."""
    own = {name: int(np.prod(x.shape[positions:])) for name, x in arrays.items()}
    total, first = sum(own.values()), 0
    out, places = {}, {}
    for name, x in arrays.items():
        units = [[int(i == first + k) for i in range(total)] for k in range(own[name])]
        units = [np.array([unit, unit], dtype=object) for unit in units]
        flat = [Number(exact(v), units[i % own[name]]) for i, v in enumerate(x.ravel())]
        out[name] = np.array([*flat, None], dtype=object)[:-1].reshape(x.shape)
        places[name] = slice(first, first + own[name])
        first += own[name]
    return out, places


def evaluate(loss, arrays, sizes=False):
    """Return the losses of one row of positions, and the derivatives of each of them.

    With `sizes` these are the sums of the sizes of the terms that each derivative is a sum of:
    what an error is to be compared with where they cancel by nature.

    `loss` is the catalogue's entry; `arrays` has all arguments by their names, each with the
    positions for its first axis and then, if it has one, the class axis (for a kernel two).
    An option that is absent or None is not used. Derivatives have the shapes of the arguments.
    """
    keywords = {k: arrays[k] for k in (*loss.masks, *loss.flags) if k in arrays}
    floats = {k: np.asarray(x) for k, x in arrays.items() if x is not None and k not in keywords}
    integers = None if loss.differentiable_labels else floats.pop("labels").astype(int)
    first = floats["features" if loss.kind == "linear" else "logits"]
    (n,) = {len(x) for x in floats.values()}
    # `1 - p` loses as many digits as p is close to 1.
    spread = np.ptp(first, -1).max() if loss.softmax else np.abs(first).max()
    with mpmath.workdps(DIGITS + int(spread)):
        x, places = _numbers(floats, 1)
        options = [x.get(name) for name in loss.options]
        formula = FORMULAS[loss.name]
        if loss.kind == "elementwise":
            losses = formula(OPERATIONS, x["logits"], x["labels"], *options, **keywords)
        else:
            z = x["logits"] if loss.kind != "linear" else _product(**x)
            log_p = z - _log(OPERATIONS.exp(z).sum(-1, keepdims=True))
            if loss.kind == "distribution":
                losses = (x["labels"] * formula(OPERATIONS, log_p, *_along(options))).sum(-1)
            else:
                own = np.arange(n), integers
                chosen = [o if o is None or o.ndim == 1 else o[own] for o in options]
                row = {"row": log_p} if loss.name in OF_A_ROW else {}
                losses = formula(OPERATIONS, log_p[own], *chosen, **row)
        slopes = np.array([number.slopes[int(sizes)] for number in losses], dtype=object)
        values = np.array([number.value for number in losses], dtype=object)
        return values, {k: slopes[:, places[k]].reshape(v.shape) for k, v in floats.items()}


def _product(features, kernel, bias=0, **_):
    return (features[..., None] * kernel).sum(-2) + bias


def _along(options):
    """Return options that lie along the class axis, whether they have it or not."""
    return [o if o is None or o.ndim > 1 else o[:, None] for o in options]


def worst_error(got, want, tiny, scale=None):
    """Return the largest error relative to the truth; below `tiny` the truth counts as 0.

    A truth that the dtype cannot hold as a normal number may come out as anything between 0
    and itself, and so may a term of it. With a `scale` the error is relative to that where it
    is larger.
    """
    got = np.asarray(got, dtype=np.float64)
    want = np.asarray(want, dtype=object)
    assert got.shape == want.shape
    assert np.all(np.isfinite(got))
    scale = np.abs(want) if scale is None else np.broadcast_to(scale, want.shape)
    tiny = np.reshape(tiny, np.shape(tiny) + (1,) * (want.ndim - np.ndim(tiny)))
    worst = 0.0
    for a, b, s, t in zip(*(x.ravel() for x in np.broadcast_arrays(got, want, scale, tiny))):
        s = max(s, abs(b))
        if s < t:
            assert 0 <= abs(a) <= 1.01 * t, (a, b)
        else:
            worst = max(worst, float((abs(mpmath.mpf(float(a)) - b) - t) / s))
    return worst
