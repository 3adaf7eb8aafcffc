"""Errors of computed numbers, measured against exact numbers of 60 digits."""

from typing import Any

import numpy as np

from focal_jax.measure.evaluate import DIGITS, evaluate, to_mpf

__all__ = ["DIGITS", "evaluate", "to_mpf", "worst_error"]


def worst_error(got: Any, exact: Any, tiny: Any, scale: Any = None) -> float:
    """Return the largest error, relative to the larger of the exact number and `scale`.

    An exact number below `tiny` counts as 0: the dtype cannot hold it as a normal number, so that
    the computed number may be anything between 0 and the exact number. The same holds for a term
    of the exact number.
    """
    # In float64, whose epsilon is far below the errors that tests allow.
    got, exact = (np.asarray(x).astype(np.float64) for x in (got, exact))
    assert got.shape == exact.shape
    assert np.all(np.isfinite(got))
    scale = np.abs(exact) if scale is None else np.asarray(scale).astype(np.float64)
    tiny = np.reshape(tiny, np.shape(tiny) + (1,) * (exact.ndim - np.ndim(tiny)))
    error, scale = np.abs(got - exact), np.maximum(scale, np.abs(exact))
    is_tiny = scale < tiny
    wrong = is_tiny & (np.minimum(np.abs(got), error) > 1.01 * tiny)
    assert not np.any(wrong), (got[wrong], exact[wrong])
    relative = np.divide(error - tiny, scale, out=np.zeros_like(error), where=~is_tiny)
    return float(np.max(relative, initial=0))
