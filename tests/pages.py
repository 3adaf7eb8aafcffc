"""Extract and run the Python code of Markdown pages."""

import contextlib
import doctest
import re
from pathlib import Path

import jax

_CODE_BLOCK = re.compile(r"^```(python|pycon|py)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def code_blocks(text: str) -> list[str]:
    """Return the Python blocks of a page, in order."""
    return [code for language, code in _CODE_BLOCK.findall(text) if language == "python"]


@contextlib.contextmanager
def jax_defaults():
    """Turn off the strict type and rank promotion of the tests, as readers do."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run(page: Path, language: str = "python") -> dict:
    """Run the Python blocks and interactive sessions of a page as one program.

    With the language "py", run the blocks that need packages of other projects instead.

    Raises if a session prints something else than the page shows. The code runs with
    `jax_defaults`.

    Returns:
      The names that the page defines.
    """
    text, names = page.read_text(encoding="utf-8"), {}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    with jax_defaults():
        for found in _CODE_BLOCK.finditer(text):
            kind, code = found.groups()
            line = text.count("\n", 0, found.start()) + 1
            if kind == language:
                # The newlines give tracebacks the line numbers of the page.
                exec(compile("\n" * line + code, str(page), "exec"), names)
            elif kind == "pycon":
                session = doctest.DocTestParser().get_doctest(
                    code, names, f"{page.name}:{line}", str(page), line
                )
                report: list[str] = []
                failed = runner.run(session, out=report.append, clear_globs=False).failed
                names.update(session.globs)
                assert not failed, "".join(report)
    return names
