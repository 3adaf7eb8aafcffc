"""Losses that users would write, with public names only.

The tests run every property over them, as over the losses of the package.
"""

from toy.tempered import TEMPERED, tempered_formula
from toy.tilted import LINEAR_TILTED, TILTED, tilted_formula

# Pairs of a declaration and the formula of the reference.
LOSSES = [
    (TEMPERED.declaration, tempered_formula),
    (TILTED.declaration, tilted_formula),
    (LINEAR_TILTED, tilted_formula),
]
