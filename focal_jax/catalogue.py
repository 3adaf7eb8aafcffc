"""The catalogue of losses: every loss that has a plain formula, by name, with its declared options.

The comparison with plain JAX, the reference implementation, the Flax modules, the tests, the
benchmarks and the documentation read the catalogue, so none of them has its own list of losses.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from focal_jax.engine.arguments import InputError, shown
from focal_jax.engine.declaration import Kind, Labels, Loss
from focal_jax.engine.options import check_call

__all__ = ["LOSSES", "Kind", "Labels", "Loss", "declaration_of", "declare", "function_of"]

F = TypeVar("F", bound=Callable[..., Any])

LOSSES: dict[str, Loss] = {}  # filled by `declare`


def declare(
    kind: Kind, labels: tuple[Labels, ...], options: Any, *, stop_gradient_weight: bool = False
) -> Callable[[F], F]:
    """Enter a public function in the catalogue (decorator).

    `options` is a loss of the engine, which the function calls, or a mapping of declarations.

    Raises at import if the function's signature does not have the declared options with the
    declared defaults.
    """
    made: Loss | None = getattr(options, "declaration", None)
    engine_loss, options = (None, options) if made is None else (options, made.options)

    def enter(function: Any) -> Any:
        function = check_call(function)
        parameters = inspect.signature(function).parameters
        for name, option in options.items():
            if name not in parameters or parameters[name].default != option.default:
                raise TypeError(
                    f"{function.__name__}: {name}={option.default} is declared, the signature "
                    f"has {parameters.get(name)}"
                )
        ordered = {name: options[name] for name in parameters if name in options}
        name, held = function.__name__, stop_gradient_weight
        loss = Loss(name, kind, labels, ordered, function, held, engine_loss)
        LOSSES[loss.name] = function.declaration = loss
        return function

    return enter


def function_of(loss: Any, name: str = "loss", kinds: tuple[Kind, ...] = ()) -> Callable[..., Any]:
    """Return a loss, given as a function or by the name of a loss of one of the `kinds`."""
    if callable(loss):
        return loss
    known = tuple(each.name for each in LOSSES.values() if not kinds or each.kind in kinds)
    if not isinstance(loss, str) or loss not in known:
        raise InputError(f"{name}: got {shown(loss)}, wanted a function or one of {known}")
    return LOSSES[loss].function


def declaration_of(function: Callable[..., Any]) -> Loss | None:
    """Return the declaration of a loss of this package or of `focal_jax.engine`, else None."""
    found = getattr(function, "declaration", None)
    return found if isinstance(found, Loss) else None


importlib.import_module("focal_jax.losses")  # every loss declares itself
