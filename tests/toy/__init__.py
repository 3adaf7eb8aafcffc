"""A loss that the package does not have, added to it: what a new loss costs.

As a plugin (`pytest -p toy`) this does what a commit would: it adds the module, the formula
of the reference and the entry of the catalogue.
"""

import focal_jax
from focal_jax import _catalogue, _checks, reference
from toy._tempered import tempered_cross_entropy

ENTRY = _catalogue.Loss(
    "tempered_cross_entropy",
    "elementwise",
    ("hard",),
    {
        "alpha": _catalogue.Option(0.0, 1.0, default=None),
        "beta": _catalogue.Option(0.25, 4.0, default=1.0),
    },
)


def _tempered(ops, z, y, alpha, beta):
    positive, negative = (y, 1 - y) if alpha is None else (alpha * y, (1 - alpha) * (1 - y))
    losses = positive * ops.log_sigmoid(beta * z) + negative * ops.log_sigmoid(-beta * z)
    return -losses / beta


def _plain(logits, labels, *, alpha=None, beta=1.0, where=None):
    """Compute `tempered_cross_entropy` from its formula."""
    options = {"alpha": alpha, "beta": beta}
    beta = _checks.array("beta", beta)
    return reference._elementwise(_tempered, logits, labels, where, options, optional=("alpha",))


def pytest_configure():
    reference.FORMULAS[ENTRY.name] = _tempered
    reference.tempered_cross_entropy = _plain
    focal_jax.tempered_cross_entropy = tempered_cross_entropy
    _catalogue.LOSSES += (ENTRY,)
