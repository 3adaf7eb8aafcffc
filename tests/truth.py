"""How far numbers of a program are from the truth to 60 digits."""

from typing import Any

import mpmath
import numpy as np

from focal_jax._truth import DIGITS, evaluate, exact

__all__ = ["DIGITS", "evaluate", "exact", "worst_error"]


def worst_error(got: Any, want: Any, tiny: Any, scale: Any = None) -> float:
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
            assert min(abs(a), abs(mpmath.mpf(float(a)) - b)) <= 1.01 * t, (a, b)
        else:
            worst = max(worst, float((abs(mpmath.mpf(float(a)) - b) - t) / s))
    return worst
