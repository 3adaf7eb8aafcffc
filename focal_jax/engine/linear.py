"""The linear head, a source of the logits `features @ kernel + bias`, and its checks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from focal_jax.engine import arguments, checks, chunks, linear_sums, row_statistics
from focal_jax.engine.arguments import InputError
from focal_jax.engine.chunks import Linear
from focal_jax.engine.class_axis import ClassSums
from focal_jax.engine.every_class import ClassArgs, Smoothing
from focal_jax.engine.layout import layout_of, on_mesh, replicate_on_mesh, whole_on_mesh
from focal_jax.engine.options import TEMPERATURE
from focal_jax.engine.sharding import AxisName, check_not_varying, place_like


class LinearSource(chunks.ChunkSpec):
    """Logits that are `features @ kernel + bias`; see `head.DenseSource`."""

    def on_shards(self, function: Any, static: Any, linear: Linear, name: Any, *others: Any) -> Any:
        return on_mesh(self, function, static, linear, name, *others)

    def logits_shape(self, linear: Linear) -> tuple[int, ...]:
        return (*linear.features.shape[:-1], linear.kernel.shape[self.class_axis])

    def axis(self, linear: Linear) -> int:
        return linear.features.ndim - 1

    def dtype(self, linear: Linear) -> jnp.dtype:
        return arguments.compute_dtype(jax.eval_shape(self.promoted, linear, None).features)

    def promoted(self, linear: Linear, where: Array | None) -> Linear:
        features, kernel = linear.features.dtype, linear.kernel.dtype
        try:
            with jax.numpy_dtype_promotion("standard"):
                dtype = jnp.promote_types(features, kernel)
        except ValueError:  # 8-bit floats
            wanted = f"the features' dtype {features}, or one that JAX promotes with it"
            raise InputError(f"kernel: got dtype {kernel}, wanted {wanted}") from None
        if dtype == linear.features.dtype:
            return linear
        return linear._replace(features=linear.features.astype(dtype)).mask(where)

    def for_two_cotangents(self, linear: Linear) -> Linear:
        return linear  # wider features would make the products slower

    def class_sums(self, linear: Linear, labels: Array, where: Array | None) -> ClassSums:
        return linear_sums.class_sums(self, linear, labels, where)

    def row_statistics(self, linear: Linear, indices: Array | None, where: Array | None) -> Any:
        return row_statistics.of_linear(self, linear, indices, where)

    def sum_over_classes(self, loss: Any, args: ClassArgs, smoothing: Smoothing) -> Array:
        # The cotangents of the chunks are added up in the dtype of the loss.
        dtype = self.dtype(args.logits)
        options = arguments.cast_and_mask(args.options, dtype, None)
        args = args._replace(logits=args.logits._replace(alpha=args.alpha), alpha=None)
        return linear_sums.sum_over_classes(loss, self, args._replace(options=options), smoothing)


def linear_source(
    features: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None,
    transpose_kernel: bool,
    logit_softcap: float | None,
    chunk_size: int | None,
    mesh: Any = None,
    class_axis_name: AxisName | None = None,
    temperature: ArrayLike = 1.0,
) -> tuple[LinearSource, Linear, AxisName | None]:
    """Return the source, its arrays, checked, and the mapped axes of the classes."""
    arguments.check_axis_name("class_axis_name", class_axis_name)
    features = arguments.floating_array("features", features)
    kernel = arguments.floating_array("kernel", kernel)
    class_axis = 0 if arguments.static_bool("transpose_kernel", transpose_kernel) else 1
    if kernel.ndim != 2 or features.shape[-1:] != (kernel.shape[1 - class_axis],):
        wanted = "(C, D) with transpose_kernel=True" if transpose_kernel else "(D, C)"
        raise InputError(
            f"kernel: got shape {kernel.shape}, wanted {wanted}, with D the last axis of the "
            f"features, whose shape is {features.shape}"
        )
    num_classes = kernel.shape[class_axis]
    if not isinstance(num_classes, int):
        raise InputError(f"kernel: got {num_classes} classes, wanted a number that is not symbolic")
    if bias is not None:
        bias = arguments.floating_array("bias", bias)
        arguments.check_shape("bias", bias, (num_classes,), "one number per class")
    chunk_size = checks.static_chunk_size(chunk_size)
    softcap = checks.static_logit_softcap(logit_softcap)
    linear = Linear(features, kernel, bias)
    layout = layout_of(linear, class_axis, mesh, class_axis_name)
    if layout is None:
        linear = linear._replace(
            features=whole_on_mesh(features, -1),
            kernel=replicate_on_mesh(kernel, features),
            bias=None if bias is None else replicate_on_mesh(bias, features),
        )
    source = LinearSource(chunk_size, softcap, 0 if class_axis == 0 else -1, layout)
    positions = features.shape[:-1]
    dtype, axis = source.dtype(linear), len(positions)
    divisor = prepare_temperature(temperature, positions, dtype, axis, num_classes)
    linear = linear._replace(temperature=place_like(features, divisor))
    same = {"features": features} | ({} if divisor is None else {"temperature": divisor})
    check_not_varying(same, class_axis_name)
    is_local = layout is None or layout.classes is None
    return source, linear, class_axis_name if is_local else None


def prepare_temperature(
    temperature: ArrayLike, losses: tuple[int, ...], dtype: jnp.dtype, axis: int, num_classes: int
) -> Array | None:
    """Return the divisor of the logits, aligned with the logits; None for the number 1."""
    divisor = TEMPERATURE.prepare("temperature", temperature, losses, dtype, axis, num_classes)
    with jax.debug_nans(False):  # the mask is applied in the compiled function
        return None if arguments.real_number(temperature) == 1 else divisor.astype(dtype)
