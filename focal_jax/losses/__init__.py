"""The losses. A file has the value, its slopes, the declared options and the docstring of a loss.

`declare` enters a loss in `focal_jax.catalogue`.
"""

import importlib

# `multilabel` and `sparse` are loaded on first use.
_FILES = ("sigmoid", "asymmetric", "distribution", "dual", "gaussian", "matchability", "poly")
_FILES += ("probability_weighted", "quality", "softmax", "star", "tversky", "varifocal")
for _file in _FILES:
    importlib.import_module(f"focal_jax.losses.{_file}")
