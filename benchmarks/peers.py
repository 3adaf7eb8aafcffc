"""The implementations that are measured side by side."""

import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import focal_jax
from benchmarks.measure import MODES, VALUE, Program, compile_program
from benchmarks.workloads import SIGMOID, SOFT, SOFTMAX, Workload

# PLAIN is the formula as one writes it down, in the logits' dtype and without any mask.
OURS, PLAIN, LINEAR = "focal_jax", "plain", "focal_jax linear"
BEFORE, LINEAR_BEFORE = "before", "before, linear"  # another version of the package

# ---------------------------------------------------------------- JAX


def _plain_sigmoid(logits: Array, labels: Array, gamma: float = 2.0) -> Array:
    p = jax.nn.sigmoid(logits)
    p_t = labels * p + (1 - labels) * (1 - p)
    log_p_t = labels * jax.nn.log_sigmoid(logits) + (1 - labels) * jax.nn.log_sigmoid(-logits)
    return -((1 - p_t) ** gamma) * log_p_t


def _plain_softmax(logits: Array, labels: Array, axis: int, gamma: float = 2.0) -> Array:
    log_p = jax.nn.log_softmax(logits, axis)
    log_p_t = jnp.take_along_axis(log_p, jnp.expand_dims(labels, axis), axis)
    return -((1 - jnp.exp(log_p_t)) ** gamma) * log_p_t


def _plain_soft(logits: Array, labels: Array, axis: int, gamma: float = 2.0) -> Array:
    log_p = jax.nn.log_softmax(logits, axis)
    return -jnp.sum(labels * (1 - jnp.exp(log_p)) ** gamma * log_p, axis)


def _one_hot_softmax(logits: Array, labels: Array, axis: int, gamma: float = 2.0) -> Array:
    """Return what Keras's `CategoricalFocalCrossentropy` computes of logits.

    The softmax, normalized once more and clipped by 1e-7, against one-hot or soft labels, in
    float32. Integers are made one-hot on the way, which XLA does without storing them.
    """
    y = labels.astype(jnp.float32)
    if labels.ndim < logits.ndim:
        y = jax.nn.one_hot(labels, logits.shape[axis], axis=axis, dtype=jnp.float32)
    p = jax.nn.softmax(logits.astype(jnp.float32), axis)
    p = jnp.clip(p / jnp.sum(p, axis, keepdims=True), 1e-7, 1 - 1e-7)
    return jnp.sum((1 - p) ** gamma * (-y * jnp.log(p)), axis)


_PLAIN = {SIGMOID: _plain_sigmoid, SOFTMAX: _plain_softmax, SOFT: _plain_soft}
_PEERS = {
    SIGMOID: {"optax": optax.losses.sigmoid_focal_loss},
    SOFTMAX: {"one-hot": _one_hot_softmax},
    SOFT: {"one-hot": _one_hot_softmax},
}


def losses(
    workload: Workload, before: ModuleType | None = None
) -> dict[str, Callable[[Array, Array], Array]]:
    """Return the losses per position of every implementation in JAX.

    What is nobody's three lines has the formula of `focal_jax.reference` for the plain one.
    `before` is another version of the package, which may lack the loss.
    """
    name = workload.loss
    plain = _PLAIN.get(name) or getattr(focal_jax.reference, name)
    found = {OURS: getattr(focal_jax, name), PLAIN: plain, **_PEERS.get(name, {})}
    if hasattr(before, name):
        found[BEFORE] = getattr(before, name)
    return {who: partial(loss, **workload.static) for who, loss in found.items()}


def version_in(checkout: Path) -> ModuleType:
    """Return the `focal_jax` of another checkout, beside the one that is imported already."""
    package = focal_jax.__name__

    def taken() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.partition(".")[0] == package]
        return {name: sys.modules.pop(name) for name in names}

    ours = taken()
    sys.path.insert(0, str(checkout))
    try:
        found = importlib.import_module(package)
        if not Path(found.__file__ or "").is_relative_to(checkout):
            raise FileNotFoundError(f"{checkout}: got a folder without {package}")
        return found
    finally:
        sys.path.remove(str(checkout))
        taken()
        sys.modules.update(ours)


def in_mode(mode: str, loss: Callable[..., Array], argnums: Any = 0) -> Callable[..., Any]:
    """Return the sum of the losses as a function, with its gradient where that is asked for."""

    def total(*args):
        return focal_jax.reduce_loss(loss(*args), normalization="none")

    return total if mode == VALUE else jax.value_and_grad(total, argnums)


def jax_programs(
    workload: Workload, logits: Array, labels: Array, before: ModuleType | None = None
) -> list[Program]:
    """Compile every implementation in JAX, in every mode."""
    return [
        compile_program(name, mode, in_mode(mode, loss), logits, labels)
        for name, loss in losses(workload, before).items()
        for mode in MODES
    ]


# ---------------------------------------------------------------- PyTorch


def _torch_loss(torch, workload: Workload) -> Callable:
    """Return torchvision's `sigmoid_focal_loss`, or the like with a softmax."""
    functional, gamma = torch.nn.functional, workload.options.get("gamma", 2.0)

    def sigmoid(z, y):
        p = torch.sigmoid(z)
        cross_entropy = functional.binary_cross_entropy_with_logits(z, y, reduction="none")
        p_t = p * y + (1 - p) * (1 - y)
        return cross_entropy * (1 - p_t) ** gamma

    def softmax(z, y):
        z = z.movedim(workload.axis, 1)  # where PyTorch wants the classes; a view
        cross_entropy = functional.cross_entropy(z, y, reduction="none")
        return cross_entropy * (1 - torch.exp(-cross_entropy)) ** gamma

    def soft(z, y):
        log_p = functional.log_softmax(z, workload.axis)
        return torch.sum(-y * (1 - torch.exp(log_p)) ** gamma * log_p, workload.axis)

    return {SIGMOID: sigmoid, SOFTMAX: softmax, SOFT: soft}[workload.loss]


def torch_programs(workload: Workload, logits: np.ndarray, labels: np.ndarray) -> list[Program]:
    """Return PyTorch's programs, on the GPU where JAX runs on one; none without PyTorch.

    They compute in the logits' dtype and add up in float32.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return []

    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        return []
    torch.set_num_threads(os.cpu_count() or 1)
    torch.compiler.reset()  # or it gives up after eight functions
    device = "cuda" if on_gpu else "cpu"
    z = torch.tensor(logits.astype(np.float32)).to(device, getattr(torch, logits.dtype.name))
    whole = labels.dtype.kind == "i"
    y = torch.tensor(labels.astype(np.int64 if whole else np.float32))
    y = y.to(device, torch.int64 if whole else z.dtype)
    z_with_gradient = z.clone().requires_grad_()
    loss = _torch_loss(torch, workload)

    def total(z, y):
        return loss(z, y).sum(dtype=torch.float32)

    def program(name: str, mode: str, total: Callable) -> Program:
        def value():
            with torch.no_grad():
                return total(z, y)

        def value_and_gradient():
            value = total(z_with_gradient, y)
            return value.detach(), torch.autograd.grad(value, z_with_gradient)[0]

        def wait(_):
            if on_gpu:
                torch.cuda.synchronize()

        call = value if mode == VALUE else value_and_gradient
        start = time.perf_counter()
        wait(call())
        first = time.perf_counter() - start
        temporary = None
        if on_gpu:  # what was held at the peak beside the inputs and the result
            torch.cuda.reset_peak_memory_stats()
            result = call()
            temporary = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            del result
        return Program(name, mode, call, wait, None if name == "torch" else first, temporary)

    programs = [program("torch", mode, total) for mode in MODES]
    try:
        compiled = torch.compile(total, dynamic=False)
        programs += [program("torch.compile", mode, compiled) for mode in MODES]
    except Exception as error:  # whatever its compilers may raise
        warnings.warn(f"torch.compile is not measured: {error}", stacklevel=1)
    return programs


# ---------------------------------------------------------------- the linear head


def linear_losses(
    before: ModuleType | None = None,
) -> dict[str, Callable[[Array, Array, Array], Array]]:
    """Return the losses of `features @ kernel`: by way of the logits, and without them."""

    def of_logits(loss):
        return lambda features, kernel, labels: loss(features @ kernel, labels)

    loss = losses(Workload("linear", SOFTMAX, ()))
    name = "linear_softmax_focal_loss_with_integer_labels"
    linear = {LINEAR: getattr(focal_jax, name)}
    if hasattr(before, name):
        linear[LINEAR_BEFORE] = getattr(before, name)
    return {name: of_logits(loss[name]) for name in (OURS, PLAIN)} | linear


def linear_programs(
    features: Array, kernel: Array, labels: Array, before: ModuleType | None = None
) -> list[Program]:
    """Compile the vocabulary heads."""
    return [
        compile_program(name, mode, in_mode(mode, head, (0, 1)), features, kernel, labels)
        for name, head in linear_losses(before).items()
        for mode in MODES
    ]
