"""Errors of computed numbers, measured against exact numbers of 60 digits."""

from typing import Any

import mpmath
import numpy as np

from focal_jax.measure.evaluate import DIGITS, evaluate, to_mpf

__all__ = ["DIGITS", "evaluate", "to_mpf", "worst_error"]


def worst_error(got: Any, exact: Any, tiny: Any, scale: Any = None) -> float:
    """Return the largest error, relative to the larger of the exact number and `scale`.

    An exact number below `tiny` counts as 0: the dtype cannot hold it as a normal number, so that
    the computed number may be anything between 0 and the exact number. The same holds for a term
    of the exact number.
    """
    got = np.asarray(got, dtype=np.float64)
    exact = np.asarray(exact, dtype=object)
    assert got.shape == exact.shape
    assert np.all(np.isfinite(got))
    scale = np.abs(exact) if scale is None else np.broadcast_to(scale, exact.shape)
    tiny = np.reshape(tiny, np.shape(tiny) + (1,) * (exact.ndim - np.ndim(tiny)))
    worst = 0.0
    for a, b, s, t in zip(*(x.ravel() for x in np.broadcast_arrays(got, exact, scale, tiny))):
        s = max(s, abs(b))
        if s < t:
            assert min(abs(a), abs(mpmath.mpf(float(a)) - b)) <= 1.01 * t, (a, b)
        else:
            worst = max(worst, float((abs(mpmath.mpf(float(a)) - b) - t) / s))
    return worst
