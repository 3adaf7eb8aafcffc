"""Losses that users would write, with public names only.

The tests run every property over them, as over the losses of the package.
"""

from toy.shifted import LINEAR_SHIFTED, SHIFTED, shifted_formula
from toy.tempered import TEMPERED, tempered_formula

# Pairs of a declaration and the formula of the reference.
LOSSES = [
    (TEMPERED.declaration, tempered_formula),
    (SHIFTED.declaration, shifted_formula),
    (LINEAR_SHIFTED, shifted_formula),
]
