"""What only some parts of the package need, brought in when they are used."""

import importlib
from types import ModuleType


def extra(module: str) -> ModuleType:
    """Return a module that `focal_jax[benchmarks]` brings, or say in one line how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(
            f'{name} is missing: pip install "focal_jax[benchmarks]" brings it ({error})'
        ) from error
