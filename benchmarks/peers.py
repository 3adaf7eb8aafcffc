"""Build the programs that are measured: focal_jax, plain JAX, optax, Keras's formula, PyTorch."""

import contextlib
import dataclasses
import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from focal_jax import reduce_loss

# The labels of the implementations in tables and figures. "plain JAX" is the fastest of several
# formulas that users write, differentiated by JAX, in the dtype of the logits and without a mask.
FOCAL_JAX, PLAIN_JAX, LINEAR = "focal_jax", "plain JAX", "focal_jax linear"
OTHER_VERSION, LINEAR_OTHER_VERSION = "other version", "other version, linear"

# ---------------------------------------------------------------- other versions

_PACKAGE = focal_jax.__name__


def _remove_modules() -> dict[str, ModuleType]:
    """Remove the modules of the package from `sys.modules` and return them."""
    names = [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]
    return {name: sys.modules.pop(name) for name in names}


@dataclasses.dataclass(frozen=True)
class Version:
    """The package in another checkout, imported in addition to the current package."""

    checkout: Path
    modules: dict[str, ModuleType] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Replace the modules of the current package by those of this version.

        The functions of this version are called in this context, because the package imports some
        modules on first use.
        """
        current = _remove_modules()
        sys.modules.update(self.modules)
        sys.path.insert(0, str(self.checkout))
        try:
            yield
        finally:
            sys.path.remove(str(self.checkout))
            self.modules.update(_remove_modules())
            sys.modules.update(current)

    def find(self, name: str) -> Callable[..., Array] | None:
        """Return a function of this version, or None if this version lacks the function."""
        with self.active():
            return getattr(self.modules[_PACKAGE], name, None)


def import_version(checkout: Path) -> Version:
    """Import the package of another checkout."""
    version = Version(checkout)
    with version.active():
        found = importlib.import_module(_PACKAGE)
        if not Path(found.__file__ or "").is_relative_to(checkout):
            raise FileNotFoundError(f"{checkout}: got a folder without {_PACKAGE}")
    return version


# ---------------------------------------------------------------- JAX


def _torchvision_sigmoid(logits: Array, labels: Array, gamma: float = 2.0) -> Array:
    """Compute the loss in the steps of torchvision's `sigmoid_focal_loss`, without alpha."""
    p = jax.nn.sigmoid(logits)
    cross_entropy = optax.losses.sigmoid_binary_cross_entropy(logits, labels)
    p_t = p * labels + (1 - p) * (1 - labels)
    return cross_entropy * (1 - p_t) ** gamma


def _log_sigmoid(logits: Array, labels: Array, gamma: float = 2.0) -> Array:
    p = jax.nn.sigmoid(logits)
    p_t = labels * p + (1 - labels) * (1 - p)
    log_p_t = labels * jax.nn.log_sigmoid(logits) + (1 - labels) * jax.nn.log_sigmoid(-logits)
    return -((1 - p_t) ** gamma) * log_p_t


def _optax_cross_entropy(logits: Array, labels: Array, axis: int, gamma: float = 2.0) -> Array:
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    n = cross_entropy(logits, labels, axis=axis)
    return (1 - jnp.exp(-n)) ** gamma * n


def _log_softmax(logits: Array, labels: Array, axis: int, gamma: float = 2.0) -> Array:
    log_p = jax.nn.log_softmax(logits, axis)
    log_p_t = jnp.take_along_axis(log_p, jnp.expand_dims(labels, axis), axis)
    return -((1 - jnp.exp(log_p_t)) ** gamma) * log_p_t


def _soft_log_softmax(logits: Array, labels: Array, axis: int, gamma: float = 2.0) -> Array:
    log_p = jax.nn.log_softmax(logits, axis)
    return -jnp.sum(labels * (1 - jnp.exp(log_p)) ** gamma * log_p, axis)


def _one_hot_softmax(logits: Array, labels: Array, axis: int, gamma: float = 2.0) -> Array:
    """Compute the loss of Keras's `CategoricalFocalCrossentropy` from logits.

    Keras normalizes the softmax a second time and clips it by 1e-7. The labels are one-hot or
    soft. XLA fuses the conversion of integer labels to one-hot labels into their use.
    """
    y = labels.astype(jnp.float32)
    if labels.ndim < logits.ndim:
        y = jax.nn.one_hot(labels, logits.shape[axis], axis=axis, dtype=jnp.float32)
    p = jax.nn.softmax(logits.astype(jnp.float32), axis)
    p = jnp.clip(p / jnp.sum(p, axis, keepdims=True), 1e-7, 1 - 1e-7)
    return jnp.sum((1 - p) ** gamma * (-y * jnp.log(p)), axis)


# The formulas of plain JAX by loss, in addition to `focal_jax.reference`.
_FORMULAS: dict[str, dict[str, Callable[..., Array]]] = {
    SIGMOID: {"torchvision": _torchvision_sigmoid, "log_sigmoid": _log_sigmoid},
    SOFTMAX: {"optax cross entropy": _optax_cross_entropy, "log_softmax": _log_softmax},
    SOFT: {"log_softmax": _soft_log_softmax},
}
_PEERS = {
    SIGMOID: {"optax": optax.losses.sigmoid_focal_loss},
    SOFTMAX: {"one-hot": _one_hot_softmax},
    SOFT: {"one-hot": _one_hot_softmax},
}


def is_plain(label: str) -> bool:
    """Return whether a label is that of a formula of plain JAX."""
    return label.partition(":")[0] == PLAIN_JAX


def losses(
    workload: Workload, other_version: Version | None = None
) -> dict[str, Callable[[Array, Array], Array]]:
    """Return all JAX implementations of a workload's loss, by label.

    Each implementation is a function of logits and labels that returns one loss per position. The
    labels of plain JAX are "plain JAX: " and the name of the formula.
    """
    name = workload.loss
    formulas = _FORMULAS.get(name, {}) | {"reference": getattr(focal_jax.reference, name)}
    plain = {f"{PLAIN_JAX}: {formula}": loss for formula, loss in formulas.items()}
    found = {FOCAL_JAX: getattr(focal_jax, name), **plain, **_PEERS.get(name, {})}
    other = other_version and other_version.find(name)
    if other is not None:
        found[OTHER_VERSION] = other
    return {label: partial(loss, **workload.keywords) for label, loss in found.items()}


def summed(loss: Callable[..., Array], mode: str, argnums: Any = 0) -> Callable[..., Any]:
    """Return a function that computes the sum of the losses, with its gradient if `mode` says so.

    Args:
      loss: returns one loss per position.
      mode: `"value"` or `"value and gradient"`.
      argnums: the arguments that the gradient is taken in.
    """

    def total(*args):
        return reduce_loss(loss(*args), normalization="sum")

    return total if mode == VALUE else jax.value_and_grad(total, argnums)


def compile_losses(
    losses: Mapping[str, Callable[..., Array]],
    modes: Sequence[str],
    args: Sequence[Array],
    other_version: Version | None,
    argnums: Any = 0,
) -> list[Program]:
    """Compile the sum of the losses of every implementation in every mode."""
    programs = []
    for label, loss in losses.items():
        is_other = label in (OTHER_VERSION, LINEAR_OTHER_VERSION)
        with other_version.active() if is_other and other_version else contextlib.nullcontext():
            programs += [
                compile_program(label, mode, summed(loss, mode, argnums), *args) for mode in modes
            ]
    return programs


def jax_programs(
    workload: Workload, logits: Array, labels: Array, other_version: Version | None = None
) -> list[Program]:
    """Compile every JAX implementation in every mode."""
    return compile_losses(losses(workload, other_version), MODES, (logits, labels), other_version)


# ---------------------------------------------------------------- PyTorch


def _torch_loss(torch, workload: Workload) -> Callable:
    """Return torchvision's `sigmoid_focal_loss`, or the same formula for a softmax."""
    functional, gamma = torch.nn.functional, workload.options.get("gamma", 2.0)

    def sigmoid(z, y):
        p = torch.sigmoid(z)
        cross_entropy = functional.binary_cross_entropy_with_logits(z, y, reduction="none")
        p_t = p * y + (1 - p) * (1 - y)
        return cross_entropy * (1 - p_t) ** gamma

    def softmax(z, y):
        z = z.movedim(workload.axis, 1)  # PyTorch's class axis; a view
        cross_entropy = functional.cross_entropy(z, y, reduction="none")
        return cross_entropy * (1 - torch.exp(-cross_entropy)) ** gamma

    def soft(z, y):
        log_p = functional.log_softmax(z, workload.axis)
        return torch.sum(-y * (1 - torch.exp(log_p)) ** gamma * log_p, workload.axis)

    return {SIGMOID: sigmoid, SOFTMAX: softmax, SOFT: soft}[workload.loss]


def torch_programs(workload: Workload, logits: np.ndarray, labels: np.ndarray) -> list[Program]:
    """Build PyTorch's programs, or return an empty list if PyTorch is not installed.

    The programs compute in the dtype of the logits and sum in float32. They run on the GPU if
    JAX runs on a GPU.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return []

    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        return []
    torch.set_num_threads(os.cpu_count() or 1)
    torch.compiler.reset()  # torch.compile stops compiling after eight functions otherwise
    device = "cuda" if on_gpu else "cpu"
    z = torch.tensor(logits.astype(np.float32)).to(device, getattr(torch, logits.dtype.name))
    integer = labels.dtype.kind == "i"
    y = torch.tensor(labels.astype(np.int64 if integer else np.float32))
    y = y.to(device, torch.int64 if integer else z.dtype)
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
        first_call = time.perf_counter() - start
        temporary = None
        if on_gpu:  # the peak minus the inputs and the result
            torch.cuda.reset_peak_memory_stats()
            result = call()
            temporary = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            del result
        compile_seconds = None if name == "torch" else first_call
        return Program(name, mode, call, wait, compile_seconds, temporary)

    programs = [program("torch", mode, total) for mode in MODES]
    try:
        compiled = torch.compile(total, dynamic=False)
        programs += [program("torch.compile", mode, compiled) for mode in MODES]
    except Exception as error:  # its compilers raise exceptions of many types
        warnings.warn(f"torch.compile is not measured: {error}", stacklevel=1)
    return programs


# ---------------------------------------------------------------- linear heads

# The number of positive classes per position, for the sigmoid head.
POSITIVES = 8


def _linear_sigmoid(features: Array, kernel: Array, labels: Array) -> Array:
    return focal_jax.linear_sigmoid_focal_loss(features, kernel, labels)


def _plain_linear_sigmoid(features: Array, kernel: Array, labels: Array) -> Array:
    logits = jnp.matmul(features, kernel, preferred_element_type=jnp.float32)
    index = jnp.arange(kernel.shape[1], dtype=jnp.int32)[None]
    is_label = sum((labels[:, k : k + 1] == index).astype(jnp.float32) for k in range(POSITIVES))
    return jnp.sum(_torchvision_sigmoid(logits, jnp.minimum(is_label, 1)), -1)


def _statistics(features: Array, kernel: Array, labels: Array) -> Array:
    log_p, lse, entropy, _ = focal_jax.linear_token_statistics(features, kernel, labels[:, 0])
    return log_p + lse + entropy


def _plain_statistics(features: Array, kernel: Array, labels: Array) -> Array:
    logits = jnp.matmul(features, kernel, preferred_element_type=jnp.float32)
    log_p, lse = jax.nn.log_softmax(logits), jax.nn.logsumexp(logits, -1)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
    return jnp.take_along_axis(log_p, labels[:, :1], -1)[:, 0] + lse + entropy


# Heads of features, kernel and labels `[positions, POSITIVES]`.
MORE_HEADS = {
    "linear sigmoid head": {LINEAR: _linear_sigmoid, PLAIN_JAX: _plain_linear_sigmoid},
    "token statistics": {LINEAR: _statistics, PLAIN_JAX: _plain_statistics},
}


def linear_losses(
    other_version: Version | None = None,
) -> dict[str, Callable[[Array, Array, Array], Array]]:
    """Return all implementations of the loss of `features @ kernel`, by label.

    Each implementation is a function of features, kernel and labels. The linear head computes
    the loss without materializing the logits; the others compute the logits first.
    """

    def with_logits(loss):
        return lambda features, kernel, labels: loss(features @ kernel, labels)

    name = focal_jax.linear_softmax_focal_loss_with_integer_labels.__name__
    linear = {LINEAR: getattr(focal_jax, name)}
    other = other_version and other_version.find(name)
    if other is not None:
        linear[LINEAR_OTHER_VERSION] = other
    with_all_logits = {
        label: with_logits(loss)
        for label, loss in losses(Workload("linear", SOFTMAX, ())).items()
        if label == FOCAL_JAX or is_plain(label)
    }
    return with_all_logits | linear


def linear_programs(
    features: Array, kernel: Array, labels: Array, other_version: Version | None = None
) -> list[Program]:
    """Compile the implementations of the linear head in every mode."""
    args = features, kernel, labels
    return compile_losses(linear_losses(other_version), MODES, args, other_version, (0, 1))
