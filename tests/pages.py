"""The Python that the project's pages show."""

import doctest
import re
from pathlib import Path

import jax

_FENCE = re.compile(r"^```(python|pycon)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def code_blocks(text: str) -> list[str]:
    """Return the Python blocks of a page, in order."""
    return [code for language, code in _FENCE.findall(text) if language == "python"]


def run(page: Path) -> dict:
    """Run a page's Python and its sessions as one program, and return what it defines.

    What a session is said to print is what it prints. As a reader runs them: without the
    suite's strict promotion.
    """
    text, names = page.read_text(encoding="utf-8"), {}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for found in _FENCE.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            if found[1] == "python":
                exec(compile("\n" * line + found[2], str(page), "exec"), names)
            else:
                session = doctest.DocTestParser().get_doctest(
                    found[2], names, f"{page.name}:{line}", str(page), line
                )
                said: list[str] = []
                failed = runner.run(session, out=said.append, clear_globs=False).failed
                names.update(session.globs)
                assert not failed, "".join(said)
    return names
