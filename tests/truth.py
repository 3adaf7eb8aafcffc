"""The losses and their gradients to 60 digits, from the definitions, by mpmath."""

import mpmath
import numpy as np

mpmath.mp.dps = 60
_ZERO, _ONE = mpmath.mpf(0), mpmath.mpf(1)


def _exact(x):
    return [mpmath.mpf(float(v)) for v in x]


def _power(q, gamma):
    return _ONE if gamma == 0 else q**gamma


def sigmoid(logits, labels, gamma, alpha=None):
    """Return losses and the gradients in logits and labels, one per element."""
    out = []
    for z, y in zip(_exact(logits), _exact(labels)):
        g = mpmath.mpf(float(gamma))
        p, not_p = 1 / (1 + mpmath.exp(-z)), 1 / (1 + mpmath.exp(z))
        q = y * not_p + (1 - y) * p
        n = y * mpmath.log1p(mpmath.exp(-z)) + (1 - y) * mpmath.log1p(mpmath.exp(z))
        a, slope = (
            (_ONE, _ZERO)
            if alpha is None
            else (
                alpha * y + (1 - mpmath.mpf(alpha)) * (1 - y),
                2 * mpmath.mpf(alpha) - 1,
            )
        )
        dq, dn = (1 - 2 * y) * p * not_p, (1 - y) * p - y * not_p
        loss = a * _power(q, g) * n
        dz = a * _power(q, g) * (dn + g * n / q * dq)
        dy = a * _power(q, g) * (-z + g * n / q * (not_p - p)) + slope * _power(q, g) * n
        out.append((loss, dz, dy))
    return np.array(out, dtype=object).T


def softmax(logits, labels, gamma):
    """Return the loss of one position and its gradients in logits and labels.

    `logits` and `labels` have shape [C]; a one-hot `labels` is the integer loss.
    """
    z, y = _exact(logits), _exact(labels)
    g = mpmath.mpf(float(gamma))
    top = max(z)
    e = [mpmath.exp(v - top) for v in z]
    total = mpmath.fsum(e)
    p = [v / total for v in e]
    rest = [mpmath.fsum(e[:c] + e[c + 1 :]) for c in range(len(e))]
    q = [v / total for v in rest]
    n = [mpmath.log1p(v / w) for v, w in zip(rest, e)]
    per_class = [_power(b, g) * c for b, c in zip(q, n)]
    steep = [v * _power(b, g) * (1 + g * a * c / b) for v, a, b, c in zip(y, p, q, n)]
    loss = mpmath.fsum(v * w for v, w in zip(y, per_class))
    grad = [p[j] * mpmath.fsum(steep[:j] + steep[j + 1 :]) - steep[j] * q[j] for j in range(len(z))]
    return loss, np.array(grad, dtype=object), np.array(per_class, dtype=object)


def relative_error(got, want, tiny):
    """Return the largest error relative to the truth; below `tiny` the truth counts as 0.

    A truth that the dtype cannot hold as a normal number may come out as anything
    between 0 and itself.
    """
    got = np.asarray(got, dtype=np.float64).ravel()
    want = np.asarray(want, dtype=object).ravel()
    assert got.shape == want.shape
    worst = 0.0
    for a, b in zip(got, want):
        if abs(b) < tiny:
            assert 0 <= abs(a) <= 1.01 * tiny, (a, b)
        else:
            worst = max(worst, abs(float((mpmath.mpf(float(a)) - b) / b)))
    return worst
