"""Turn a formula into a plain JAX loss: add the signature, checks, masks and the softmax.

Autodiff differentiates the plain loss. The plain loss and the engine share only the declared
options and the argument checks.
"""

import inspect
import numbers
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax.engine import arguments, checks
from focal_jax.engine.declaration import Loss
from focal_jax.engine.options import CLASS_WEIGHTS, LABEL_SMOOTHING, TEMPERATURE, Option, check_call


class Operations(NamedTuple):
    """The functions that a formula needs beyond arithmetic and powers."""

    exp: Callable[[Any], Any]
    log: Callable[[Any], Any]
    sigmoid: Callable[[Any], Any]
    log_sigmoid: Callable[[Any], Any]
    where: Callable[[Any, Any, Any], Any]
    stop_gradient: Callable[[Any], Any]


_JAX = Operations(
    jnp.exp, jnp.log, jax.nn.sigmoid, jax.nn.log_sigmoid, jnp.where, lax.stop_gradient
)


def from_formula(declaration: Loss, formula: Callable[..., Any]) -> Callable[..., Any]:
    """Return a plain JAX loss with the signature of the declared loss."""
    signature = inspect.signature(declaration.function)
    declared = dict(declaration.options)
    if declaration.has_class_axis and declaration.kind != "region":
        declared.pop("alpha", None)  # the class weight, which is not an argument of the formula

    def loss(*args, **keywords):
        bound = signature.bind(*args, **keywords)
        bound.apply_defaults()
        by_kind = _BY_KIND[declaration.kind]
        return by_kind(formula, declared, SimpleNamespace(**bound.arguments))

    loss.__name__ = loss.__qualname__ = declaration.name
    loss.__doc__ = (
        f"Compute `focal_jax.{declaration.name}` from its formula.\n\n"
        "Arguments, results and errors are the same. Every mode of differentiation works.\n"
    )
    loss.__signature__ = signature  # type: ignore[attr-defined]
    loss.__module__ = formula.__module__
    return check_call(loss)


# ---------------------------------------------------------------- arguments


def _float(name: str, x: ArrayLike) -> Array:
    x = arguments.floating_array(name, x)
    return x.astype(arguments.compute_dtype(x))


def _mask(where: ArrayLike | None, losses: tuple[int, ...], name: str = "where") -> Array:
    """Return a mask of the losses' shape; True everywhere for None."""
    mask: Any = arguments.mask_array(True if where is None else where, losses, name=name)
    return jnp.broadcast_to(mask, losses)


def _real(name: str, x: ArrayLike, where: Array, dtype: jnp.dtype) -> Array:
    """Return `x` broadcast to the shape of the mask, with 1 where the mask is False."""
    x = arguments.real_array(name, x)
    arguments.check_broadcastable(name, x, where.shape, "the losses")
    return jnp.where(where, jnp.broadcast_to(x, where.shape).astype(dtype), 1)


def _options(
    declared: Mapping[str, Option], a: Any, where: Array, dtype: Any, num_classes: int = 1
) -> dict[str, Any]:
    """Return the options broadcast to every position; Python exponents and flags unchanged."""
    out = {}
    for name, option in declared.items():
        x = option.check(name, getattr(a, name))
        if x is None or option.kind == "flag":
            out[name] = x
        elif option.kind == "mask":
            out[name] = _mask(x, where.shape, name)
        elif option.kind == "exponent" and isinstance(x, numbers.Real):
            out[name] = float(x)
        else:
            x = arguments.number_array(name, x, dtype)
            arguments.check_unambiguous(name, x, where.shape, (num_classes,), "the classes")
            out[name] = _real(name, x, where, dtype)
    return out


def _class_weights(alpha: ArrayLike | None, dtype: jnp.dtype, num_classes: int) -> Array | None:
    if CLASS_WEIGHTS.check("alpha", alpha) is None:
        return None
    return arguments.class_weights(alpha, num_classes, dtype).astype(dtype)


def _weighted(alpha: Array | None, loss: Array) -> Array:
    return loss if alpha is None else alpha * loss


# ---------------------------------------------------------------- from a formula to a loss
# Each function takes the formula, the declaration, and the arguments of the call as attributes.


def _elementwise(formula, declared, a) -> Array:
    z = _float("logits", a.logits)
    where = _mask(a.where, z.shape)
    labels = arguments.real_array("labels", a.labels)
    y, invalid = arguments.clip_labels(labels, _real("labels", labels, where, z.dtype), 1)
    z = jnp.where(where, z, 0)
    channels = z.shape[1] if z.ndim > 2 else 1  # axis 1 may be the classes
    losses = formula(_JAX, z, y, **_options(declared, a, where, z.dtype, channels))
    losses = jnp.where(invalid, jnp.nan, losses)
    return jnp.where(where, losses, 0)


def _distribution(formula, declared, a) -> Array:
    z, y, axis, losses = checks.distribution_over_classes(a.logits, a.labels, a.axis)
    z, where = _float("logits", z), _mask(a.where, losses)
    inside = jnp.broadcast_to(jnp.expand_dims(where, axis), z.shape)
    y, invalid = arguments.clip_labels(y, jnp.where(inside, y.astype(z.dtype), 0), jnp.inf)
    z = jnp.where(inside, z, 0)
    options = _options(declared, a, where, z.dtype, z.shape[axis])
    options = _over_classes(options, z, axis)
    alpha = _class_weights(a.alpha, z.dtype, z.shape[axis])
    if alpha is not None:
        alpha = lax.broadcast_in_dim(alpha, z.shape, (axis,) if alpha.ndim else ())
        alpha = jnp.where(inside, alpha, 1)
    log_p = jax.nn.log_softmax(z, axis)
    # A class with weight 0 contributes 0, even if its log p is -inf.
    weightless = (y == 0) | (alpha == 0) if alpha is not None else y == 0
    log_p = jnp.where(weightless & (log_p == -jnp.inf), 0, log_p)
    losses = jnp.sum(y * _weighted(alpha, formula(_JAX, log_p, **options)), axis)
    losses = jnp.where(jnp.any(invalid, axis), jnp.nan, losses)
    return jnp.where(where, losses, 0)


def _over_classes(options: Mapping[str, Any], z: Array, axis: int) -> dict[str, Any]:
    """Return the options of the positions, broadcast along the class axis."""
    return {
        name: jnp.broadcast_to(jnp.expand_dims(x, axis), z.shape) if isinstance(x, Array) else x
        for name, x in options.items()
    }


def _integer(formula, declared, a) -> Any:
    z, name = _float("logits", a.logits), a.class_axis_name
    arguments.check_axis_name("class_axis_name", name)
    axis = arguments.static_axis(a.axis, z.ndim)
    smoothing = LABEL_SMOOTHING.static("label_smoothing", getattr(a, "label_smoothing", 0.0))
    z = z if name is None else _gather_shards(z, axis, name)
    num_classes, losses = z.shape[axis], z.shape[:axis] + z.shape[axis + 1 :]
    labels = arguments.integer_labels(a.labels, z.shape, axis, a.ignore_label)
    where: Any = arguments.not_ignored(labels, a.ignore_label, _mask(a.where, losses))
    z = jnp.where(jnp.expand_dims(where, axis), z, 0)
    options = _options(declared, a, where, z.dtype, num_classes)
    valid = (labels >= 0) & (labels < num_classes)
    index = jnp.expand_dims(jnp.where(valid & where, labels, 0), axis)
    alpha = _class_weights(a.alpha, z.dtype, num_classes)

    total = jax.nn.logsumexp(z, axis, keepdims=True)
    log_p = jnp.take_along_axis(z, index, axis) - total
    weight = alpha
    if alpha is not None:
        weight = jnp.where(where, alpha[index.squeeze(axis)] if alpha.ndim else alpha, 1)
    row = {}
    if "log_probabilities" in inspect.signature(formula).parameters:
        row = {"log_probabilities": jnp.moveaxis(z - total, axis, -1)}
    result = _weighted(weight, formula(_JAX, log_p.squeeze(axis), **options, **row))
    if smoothing:
        of_all = _sum_over_classes(formula, z - total, alpha, options, axis)
        share = 0 if num_classes == 0 else smoothing / num_classes
        result = (1 - smoothing) * result + share * of_all
    result = jnp.where(where, jnp.where(valid, result, jnp.nan), 0)
    pair = arguments.static_bool("return_logsumexp", a.return_logsumexp)
    return (result, jnp.where(where, total.squeeze(axis), 0)) if pair else result


def _sum_over_classes(formula, log_p: Array, alpha: Array | None, options, axis: int) -> Array:
    """Return the sum over the classes of the loss with that class as the label."""
    if alpha is not None:
        alpha = lax.broadcast_in_dim(alpha, log_p.shape, (axis,) if alpha.ndim else ())
        log_p = jnp.where((alpha == 0) & (log_p == -jnp.inf), 0, log_p)
    losses = formula(_JAX, log_p, **_over_classes(options, log_p, axis))
    return jnp.sum(_weighted(alpha, losses), axis)


def _gather_shards(z: Array, axis: int, name: str | tuple[str, ...]) -> Array:
    """Return the logits of all shards of the classes."""
    is_own = jnp.arange(lax.axis_size(name)) == lax.axis_index(name)
    is_own = lax.broadcast_in_dim(is_own, (is_own.size, *z.shape), (0,))
    shards = lax.psum(jnp.where(is_own, jnp.broadcast_to(z, is_own.shape), 0), name)
    return jnp.concatenate(list(shards), axis)


def _linear(formula, declared, a) -> Any:
    """Return the losses of one array with all logits; `chunk_size` is ignored."""
    features, kernel = _float("features", a.features), _float("kernel", a.kernel)
    transposed = arguments.static_bool("transpose_kernel", a.transpose_kernel)
    depth, classes = features.shape[-1:], kernel.shape[:1] if transposed else kernel.shape[-1:]
    wanted, shape = (classes + depth, "(C, D)") if transposed else (depth + classes, "(D, C)")
    arguments.check_shape("kernel", kernel, wanted, f"{shape}, with D the features' last axis")
    kernel = kernel.T if transposed else kernel
    arguments.check_axis_name("class_axis_name", a.class_axis_name)
    checks.check_mesh(a.mesh)
    if a.mesh is not None:  # then the kernel has all classes
        a.class_axis_name = None
    shards = 1 if a.class_axis_name is None else lax.axis_size(a.class_axis_name)
    positions = features.shape[:-1]
    shape = (*positions, shards * kernel.shape[1])
    labels = arguments.integer_labels(a.labels, shape, len(positions), a.ignore_label)
    where: Any = arguments.not_ignored(labels, a.ignore_label, _mask(a.where, positions))
    logits = jnp.where(where[..., None], features, 0) @ kernel
    if a.bias is not None:
        bias = _float("bias", a.bias)
        arguments.check_shape("bias", bias, kernel.shape[1:], "one number per class")
        logits = logits + jnp.broadcast_to(bias.astype(logits.dtype), logits.shape)
    cap = checks.static_logit_softcap(a.logit_softcap)
    if cap is not None:  # a logit of -inf stays -inf, and one that is small beside the cap
        small = jnp.abs(logits / cap) < jnp.finfo(logits.dtype).eps ** 0.5
        capped = cap * jnp.tanh(logits / cap)
        logits = jnp.where(small | (logits == -jnp.inf), logits, capped)
    divisor = TEMPERATURE.check("temperature", a.temperature)
    logits = logits / _real("temperature", divisor, where, logits.dtype)[..., None]
    given = {"logits": logits, "labels": labels, "where": where, "axis": -1, "ignore_label": None}
    return _integer(formula, declared, SimpleNamespace(**vars(a) | given))


def _interval(formula, declared, a) -> Array:
    del declared
    z, labels = _float("logits", a.logits), arguments.real_array("labels", a.labels)
    axis = arguments.static_axis(a.axis, z.ndim)
    arguments.check_label_shape(labels, z.shape, axis)
    where = _mask(a.where, labels.shape)
    z, last = jnp.where(jnp.expand_dims(where, axis), z, 0), z.shape[axis] - 1
    y = jnp.where(where, _real("labels", labels, where, z.dtype), 0)
    y, invalid = arguments.clip_labels(labels, y, last)
    left = jnp.clip(jnp.floor(y), 0, max(last - 1, 0))
    index = left.astype(jnp.int32)
    log_p = jax.nn.log_softmax(z, axis)

    def at(index):
        return jnp.take_along_axis(log_p, jnp.expand_dims(index, axis), axis).squeeze(axis)

    losses = formula(_JAX, y, left, at(index), at(jnp.minimum(index + 1, last)))
    losses = jnp.where(invalid, jnp.nan, losses)
    return jnp.where(where, losses, 0)


def _region(formula, declared, a) -> Array:
    z, y, axis, losses = checks.distribution_over_classes(a.logits, a.labels, a.axis)
    arguments.check_axis_name("axis_name", a.axis_name)
    z, where = _float("logits", z), jnp.expand_dims(_mask(a.where, losses), axis)
    where = jnp.broadcast_to(where, z.shape)
    y, invalid = arguments.clip_labels(y, jnp.where(where, y.astype(z.dtype), 0), 1)
    z = jnp.where(where, z, 0)
    p = jnp.where(where, jax.nn.softmax(z, axis), 0)
    y = jnp.where(invalid, jnp.nan, y)
    positions = tuple(i for i in range(z.ndim) if i != axis)
    counts = [x.sum(positions) for x in (y * p, y * (1 - p), (1 - y) * p)]
    tp, fn, fp = counts if a.axis_name is None else lax.psum(counts, a.axis_name)
    options = _options(declared, a, jnp.ones(z.shape[axis], bool), z.dtype)
    # A class that is absent and not predicted has loss 0.
    tp = jnp.where(tp + fn + fp + options["smooth"] == 0, 1, tp)
    return formula(_JAX, tp, fn, fp, **options)


_BY_KIND = {
    "elementwise": _elementwise,
    "position": _integer,
    "linear": _linear,
    "distribution": _distribution,
    "interval": _interval,
    "region": _region,
}
