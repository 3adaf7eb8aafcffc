"""The README's examples run, in order, as one program, and its links lead somewhere."""

import re
from pathlib import Path

import jax
import pytest
from pages import code_blocks

from focal_jax import _catalogue

README = Path(__file__).parents[1] / "README.md"


def test_code_blocks():
    blocks = code_blocks(README.read_text())
    assert len(blocks) >= 3
    namespace = {}
    # As a reader runs them: without this suite's strict promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, str(README), "exec"), namespace)


@pytest.mark.parametrize("page", [README, README.parent / "docs" / "scaling.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    assert links
    for link in links:
        assert (page.parent / link).exists(), link


def test_every_loss_of_the_catalogue_is_in_the_readmes_table():
    section = README.read_text().partition("\n## The losses\n")[2].partition("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("| `")]
    named = {name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert {loss.name for loss in _catalogue.LOSSES} <= named
    assert named - {"reduce_loss"} <= {loss.name for loss in _catalogue.LOSSES}
