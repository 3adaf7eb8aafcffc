"""Checks of the static options of the detection functions."""

import math
import numbers
from typing import Any

from focal_jax.engine.arguments import InputError


def static_number(name: str, value: Any, wanted: str, low: float, high: float) -> float:
    """Return a Python or NumPy number in `[low, high]` as a float. Traced numbers are invalid."""
    if not isinstance(value, numbers.Real) or not low <= float(value) <= high:
        raise InputError(f"{name}: got {value}, wanted {wanted}")
    return float(value)


def positive_number(name: str, value: Any) -> float:
    """Return a finite Python or NumPy number above 0 as a float."""
    smallest, largest = math.ulp(0.0), math.nextafter(math.inf, 0)
    return static_number(name, value, "a finite Python number above 0", smallest, largest)


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
