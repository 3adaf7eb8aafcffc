"""The choice between the form of a computation for CPUs and the form for accelerators."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from jax import lax

Form = Literal["cpu", "accelerator", "tpu"]

_forced: Form | None = None


def by_platform(
    on_cpu: Callable[..., Any],
    elsewhere: Callable[..., Any],
    *args: Any,
    on_tpu: Callable[..., Any] | None = None,
    form: Form | None = None,
) -> Any:
    """Return `on_cpu(*args)` on CPUs and `elsewhere(*args)` on GPUs and TPUs.

    The forms compute the same values. A TPU uses `on_tpu` if it is given. JAX chooses the form
    when it lowers the program, because the platform is not known while it traces. `form`, or else
    `forced_form`, selects a form on every platform.
    """
    form = form or _forced
    if form is None:
        tpu = {} if on_tpu is None else {"tpu": on_tpu}
        return lax.platform_dependent(*args, cpu=on_cpu, default=elsewhere, **tpu)
    return {"cpu": on_cpu, "accelerator": elsewhere, "tpu": on_tpu or elsewhere}[form](*args)


@contextlib.contextmanager
def forced_form(form: Form) -> Iterator[None]:
    """Select one form on every platform for programs that are traced in this context.

    Tests use it to compare the forms on one machine. JAX's caches are cleared on entry and exit,
    because their keys do not contain the form.
    """
    global _forced
    outer, _forced = _forced, form
    jax.clear_caches()
    try:
        yield
    finally:
        _forced = outer
        jax.clear_caches()
