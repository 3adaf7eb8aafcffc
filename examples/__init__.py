"""Examples of focal_jax. Each one has `python -m examples.NAME --help`."""

from importlib.util import find_spec

# Stop before an example imports them, with one line instead of a traceback.
_missing = [
    x for x in ("matplotlib", "orbax", "pycocotools", "rich", "sklearn") if not find_spec(x)
]
if _missing:
    raise SystemExit(f"The examples need {', '.join(_missing)}: pip install '.[examples]'")
