"""How every figure of the project looks: one palette, one set of sizes, 200 dots an inch.

The background is transparent, and every colour has a contrast of at least 3 against white and
against the dark pages of documentation sites, so that one file serves print, light and dark.
The four hues are those of Okabe and Ito, which colour-blind readers tell apart, the blue a
little lighter. What stands for "no method at all" (cross entropy, a bound, an axis) is drawn
in ink.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from focal_jax._extras import extra

INK = "#757575"
BLUE, VERMILION, GREEN, PURPLE = "#1f7fc1", "#d55e00", "#009e73", "#cc79a7"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, INK)

# The paper's five, from cross entropy on.
GAMMAS = {0.0: INK, 0.5: BLUE, 1.0: GREEN, 2.0: VERMILION, 5.0: PURPLE}

# On photographs and grey images, which are dark: what is true, and what was found.
TRUTH, FOUND = "#56b4e9", "#f0e442"

# The inches of a figure that fills the width of a page, and the height of one row of panels.
WIDTH, HEIGHT = 7.0, 3.0

RC: dict[str, Any] = {
    "figure.dpi": 200,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.titlesize": "medium",
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.hashsalt": "focal_jax",  # the same figure is the same file
}


def _settings() -> dict[str, Any]:
    return {**RC, "axes.prop_cycle": extra("cycler").cycler(color=PALETTE)}


@contextmanager
def applied() -> Iterator[None]:
    """Draw in the project's style, as a `with` block or as a decorator, and leave no trace."""
    with extra("matplotlib").rc_context(_settings()):
        yield


def figure(
    rows: int = 1, columns: int = 1, *, width: float = WIDTH, height: float | None = None, **grid
) -> tuple[Any, Any]:
    """Return a figure and its panels, without pyplot: no window, no global state.

    To be called, like all that draws on it, inside of `applied`.

    Args:
        rows: How many rows of panels.
        columns: How many panels in a row.
        width: Inches.
        height: Inches; by default `HEIGHT` for each row.
        **grid: What `Figure.subplots` takes: `sharex`, `width_ratios`, `squeeze`.

    Returns:
        A `matplotlib.figure.Figure`, and what its `subplots` returns.
    """
    size = (width, rows * HEIGHT if height is None else height)
    drawn = extra("matplotlib.figure").Figure(figsize=size)
    return drawn, drawn.subplots(rows, columns, **grid)


def pyplot() -> ModuleType:
    """Return `matplotlib.pyplot` with the project's style, for scripts, until they end."""
    extra("matplotlib").rcParams.update(_settings())
    return extra("matplotlib.pyplot")
