"""Assertions on the options of the detection losses, which are Python numbers."""

import math
import numbers
from typing import Any

from focal_jax import _checks


def number(name: str, value: Any, wanted: str, least: float, most: float) -> float:
    """Return `value` as a float if it is a Python or NumPy number in `[least, most]`.

    A traced number is refused: what an option means for the shape of a loss is decided when
    the program is made.
    """
    if not isinstance(value, numbers.Real) or not least <= float(value) <= most:
        raise _checks.InputError(f"{name}: got {value}, wanted {wanted}")
    return float(value)


def above_zero(name: str, value: Any) -> float:
    """Return `value` as a float if it is a finite number above 0."""
    tiny, largest = math.ulp(0.0), math.nextafter(math.inf, 0)
    return number(name, value, "a finite Python number above 0", tiny, largest)


def iou_thresholds(positive_iou: Any, negative_iou: Any) -> tuple[float, float]:
    """Return the two thresholds of a matching as floats, in [0, 1] and in order."""
    wanted = "a Python number in [0, 1]"
    positive = number("positive_iou", positive_iou, wanted, 0, 1)
    negative = number("negative_iou", negative_iou, wanted, 0, 1)
    if negative > positive:
        raise _checks.InputError(
            f"negative_iou: got {negative_iou}, wanted at most positive_iou, {positive_iou}"
        )
    return positive, negative
