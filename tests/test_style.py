"""The figures' one style: legible on white and on dark, and no trace in the reader's session."""

import subprocess
import sys

import pytest

from focal_jax import _style

WHITE, DARK = "#ffffff", "#1e2129"  # paper; the dark scheme of mkdocs-material


def _luminance(colour):
    """Return the relative luminance, as the Web Content Accessibility Guidelines define it."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("colour", sorted({*_style.PALETTE, *_style.GAMMAS.values()}))
@pytest.mark.parametrize("page", [WHITE, DARK])
def test_contrast(colour, page):
    low, high = sorted((_luminance(colour), _luminance(page)))
    assert (high + 0.05) / (low + 0.05) >= 3


def test_a_figure_leaves_no_trace():
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    with _style.applied():
        drawn, panels = _style.figure(2, 3)
        panels[1, 2].plot([0, 1])
    assert drawn.dpi == 200
    assert dict(matplotlib.rcParams) == before
    assert drawn.get_facecolor() == panels[0, 0].get_facecolor() == (0, 0, 0, 0)
    assert panels[1, 2].lines[0].get_color() == _style.BLUE


def test_pyplot_has_the_style():
    pytest.importorskip("matplotlib")
    program = (
        "from focal_jax import _style; plt = _style.pyplot(); plt.switch_backend('agg'); "
        "assert plt.figure().dpi == 200; assert not plt.rcParams['legend.frameon']"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_without_matplotlib_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "focal_jax\[benchmarks\]"') as caught:
        _style.figure()
    assert "\n" not in str(caught.value)
