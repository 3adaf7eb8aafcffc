"""The table of losses, made from `focal_jax.catalogue`.

    python docs/loss_table.py             # print the table
    python docs/loss_table.py --readme    # write the table into README.md

`docs/hooks.py` puts the same table on the site.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import focal_jax  # noqa: F401  its import fills the catalogue
from focal_jax.catalogue import LOSSES, Kind, Loss

README = Path(__file__).parents[1] / "README.md"
# On a page, the table stands between these two lines.
BEGIN, END = "<!-- losses: docs/loss_table.py -->\n", "<!-- end of losses -->\n"


def source_file(loss: Loss) -> str:
    """Return the path of the file that defines a loss, from the root of the repository."""
    return loss.function.__module__.replace(".", "/") + ".py"


def section(loss: Loss) -> str:
    """Return the anchor of a loss on the page `docs/family.md`."""
    return f"#{loss.name}"


def table(link: Callable[[Loss], str]) -> str:
    """Return a Markdown table of the losses, by kind.

    Args:
      link: the target of the link that the name of a loss gets.
    """
    kinds = list(get_args(Kind))
    rows = ["| loss | kind | labels | options |", "| --- | --- | --- | --- |"]
    for loss in sorted(LOSSES.values(), key=lambda loss: kinds.index(loss.kind)):
        options = ", ".join(f"{name}={option.default}" for name, option in loss.options.items())
        cells = [
            f"[`{loss.name}`]({link(loss)})",
            loss.kind,
            " or ".join(loss.labels),
            f"`{options}`" if options else "",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def with_table(text: str, link: Callable[[Loss], str]) -> str:
    """Return the text of a page with the current table between the two markers."""
    between = re.compile(f"(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", re.DOTALL)
    return between.sub(lambda _: table(link), text)


def main(argv: list[str] | None = None) -> None:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="rewrite the table in README.md")
    if parser.parse_args(argv).readme:
        text = with_table(README.read_text(encoding="utf-8"), source_file)
        README.write_text(text, encoding="utf-8")
    else:
        print(table(source_file), end="")


if __name__ == "__main__":
    main()
