"""The style of every figure of the project: colours, sizes and fonts.

The background is white on light and on dark pages, because no colour of text has a contrast ratio
of 4.5 to both. The text has 4.5, and every other colour at least 3. The hues are those of Okabe and
Ito, which colour-blind readers can tell apart; the blue is lighter. Grey marks baselines.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from focal_jax.measure.extras import require_extra

INK = "#757575"
BLUE, VERMILION, GREEN, PURPLE = "#1f7fc1", "#d55e00", "#009e73", "#cc79a7"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, INK)

# The values of gamma in Figure 1 of the focal loss paper; 0 is cross entropy.
GAMMAS = {0.0: INK, 0.5: BLUE, 1.0: GREEN, 2.0: VERMILION, 5.0: PURPLE}

# Ground truth and predictions on photographs and grey images, which are dark.
TRUTH, FOUND = "#56b4e9", "#f0e442"

# In inches: the width of a figure, whose text of 10 points is 10 pixels high on a phone that is 390
# pixels wide, and the height of one row of panels.
WIDTH, HEIGHT = 5.2, 3.0

RC: dict[str, Any] = {
    "figure.dpi": 200,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "white"),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), INK),
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "figure.titlesize": "medium",
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.hashsalt": "focal_jax",  # makes SVG files reproducible
}


def _settings() -> dict[str, Any]:
    return {**RC, "axes.prop_cycle": require_extra("cycler").cycler(color=PALETTE)}


@contextmanager
def applied() -> Iterator[None]:
    """Apply the style inside a `with` block or a decorated function; restore matplotlib after."""
    with require_extra("matplotlib").rc_context(_settings()):
        yield


def figure(
    rows: int = 1, columns: int = 1, *, width: float = WIDTH, height: float | None = None, **grid
) -> tuple[Any, Any]:
    """Return a matplotlib figure and its panels, without pyplot and its global state.

    Call this function inside `applied`. `width` and `height` are in inches; the default height is
    `HEIGHT` per row. `grid` has options of `Figure.subplots`, such as `sharex`.
    """
    size = (width, rows * HEIGHT if height is None else height)
    new = require_extra("matplotlib.figure").Figure(figsize=size)
    return new, new.subplots(rows, columns, **grid)


def pyplot() -> ModuleType:
    """Return `matplotlib.pyplot` with the style applied until the program ends."""
    require_extra("matplotlib").rcParams.update(_settings())
    return require_extra("matplotlib.pyplot")
