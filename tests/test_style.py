"""The style of the figures: contrast, isolation from the user's settings, a missing matplotlib."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from figure_checks import assert_readable

from focal_jax.measure import style

DOCS = Path(__file__).parents[1] / "docs"
WHITE, DARK = "#ffffff", "#1e2129"  # paper, and the dark scheme of mkdocs-material


def _luminance(colour):
    """Return the relative luminance as defined by the Web Content Accessibility Guidelines."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(*colours):
    low, high = sorted(map(_luminance, colours))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", sorted({*style.PALETTE, *style.GAMMAS.values()}))
@pytest.mark.parametrize("page", [WHITE, DARK])
def test_contrast_to_light_and_dark_pages(colour, page):
    assert _contrast(colour, page) >= 3


def test_text_is_readable_on_the_background_and_on_a_phone():
    matplotlib = pytest.importorskip("matplotlib")
    with style.applied():
        figure, panel = style.figure()
        text = panel.set_title("text")
        background = matplotlib.colors.to_hex(figure.get_facecolor(), keep_alpha=True)
    assert background == f"{WHITE}ff"  # opaque, on every page
    assert _contrast(text.get_color(), background) >= 4.5
    assert text.get_fontsize() / 72 / figure.get_figwidth() * 390 >= 10  # pixels


def test_applied_restores_the_settings():
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    with style.applied():
        figure, panels = style.figure(2, 3)
        panels[1, 2].plot([0, 1])
    assert figure.dpi == 200
    assert dict(matplotlib.rcParams) == before
    assert figure.get_facecolor() == panels[0, 0].get_facecolor() == (1, 1, 1, 1)
    assert panels[1, 2].lines[0].get_color() == style.BLUE


def test_pyplot_has_the_style():
    pytest.importorskip("matplotlib")
    program = (
        "from focal_jax.measure import style; plt = style.pyplot(); plt.switch_backend('agg'); "
        "assert plt.figure().dpi == 200; assert not plt.rcParams['legend.frameon']"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_missing_matplotlib_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[benchmarks\]'") as caught:
        style.figure()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["loss", "margins", "softmax_focal_loss"])  # one of each layout
def test_figures_of_the_documentation_are_readable(name):
    spec = importlib.util.spec_from_file_location("docs_figures", DOCS / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    with style.applied():
        assert_readable(figures.FIGURE_OF[name]())
