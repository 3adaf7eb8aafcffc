"""The Python that the project's pages show."""

import re


def code_blocks(text: str) -> list[str]:
    """Return the Python blocks of a page, in order."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)
