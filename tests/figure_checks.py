"""Check the figures that the examples and the documentation draw."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from matplotlib.text import Text

from examples import common


def assert_readable(figure) -> None:
    """Raise if an artist is cut, or if a text has less than 10 pixels on a screen of 390 pixels."""
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    edges = box.x0, box.y0, width - box.x1, height - box.y1
    assert min(edges) > -0.01, f"inches inside the figure: {edges}"
    sizes = {text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()}
    assert min(sizes) / 72 / width * 390 >= 10, f"points: {sizes}, inches: {width}"


@contextmanager
def saved_figures_are_checked() -> Iterator[None]:
    """Check every figure that an example saves."""
    save = common.save

    def checked(figure, path):
        assert_readable(figure)
        return save(figure, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "save", checked)
        yield
