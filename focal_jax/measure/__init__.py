"""Measure gradients, evaluate formulas to 60 digits, draw losses; the command line `focal-jax`.

The packages of `focal_jax[benchmarks]` (matplotlib, mpmath, rich) are imported on first use.
"""

from focal_jax.measure.compare import compare_gradients
from focal_jax.measure.report import GradientComparison, GradientError, Measurement

__all__ = ["GradientComparison", "GradientError", "Measurement", "compare_gradients"]
