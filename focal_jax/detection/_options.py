"""Checks of the static options of the detection functions."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from focal_jax.engine.arguments import InputError, real_number, shown
from focal_jax.engine.options import known_numbers

_FLOAT32 = jnp.finfo(jnp.float32)


def static_number(name: str, value: Any, wanted: str, low: float, high: float) -> float:
    """Return a Python or NumPy number in `[low, high]` as a float. Traced numbers are invalid."""
    number = real_number(value)
    if number is None or not low <= number <= high:
        raise InputError(f"{name}: got {shown(value)}, wanted {wanted}")
    return number


def static_numbers(name: str, values: Any, wanted: str, low: float, high: float) -> np.ndarray:
    """Return a sequence of Python or NumPy numbers in `[low, high]` as a float64 array."""
    known = known_numbers(values, name, wanted)
    if known is None or known.ndim != 1 or not np.all((known >= low) & (known <= high)):
        raise InputError(f"{name}: got {shown(values)}, wanted {wanted}")
    return known


def positive_number(name: str, value: Any) -> float:
    """Return a Python or NumPy number above 0, which is a normal number of float32, as a float."""
    wanted = "a finite Python number above 0"
    return static_number(name, value, wanted, float(_FLOAT32.tiny), float(_FLOAT32.max))


def iou_thresholds(positive_iou: Any, negative_iou: Any) -> tuple[float, float]:
    """Return the two matching thresholds as floats; they are in [0, 1] and in order."""
    wanted = "a Python number in [0, 1]"
    positive = static_number("positive_iou", positive_iou, wanted, 0, 1)
    negative = static_number("negative_iou", negative_iou, wanted, 0, 1)
    if negative > positive:
        raise InputError(
            f"negative_iou: got {negative_iou}, wanted at most positive_iou, {positive_iou}"
        )
    return positive, negative
