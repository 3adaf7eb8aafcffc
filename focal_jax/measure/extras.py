"""Import of optional packages."""

import importlib
from types import ModuleType

from focal_jax.engine.arguments import InputError


def require_extra(module: str) -> ModuleType:
    """Import a module of the extra `benchmarks`, or raise an error that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(
            f"{name} is missing; install it in a checkout: pip install '.[benchmarks]' ({error})"
        ) from error
    except ValueError as error:  # matplotlib does not know the backend of MPLBACKEND
        raise InputError(f"{module}: {str(error).partition(';')[0]}") from None
