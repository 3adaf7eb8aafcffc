"""Compile vocabulary heads and training steps for a pod of 1,024 TPUs.

Every program is compiled for `v5p:8x8x16`, with its collectives. The table shows the bytes that
one device moves in its memory, the bytes that it sends, and the percentage of each that belongs to
the loss.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import focal_jax
from benchmarks import compilers, report
from focal_jax.detection import pyramid_anchors, retinanet_loss

POD, DEVICES = "v5p:8x8x16", 1024
TOKENS_PER_DEVICE, FEATURES, VOCABULARY = 4096, 4096, 2**18
SCOPE = "focal_loss"  # the JAX name scope of the loss in the compiled programs


@dataclasses.dataclass(frozen=True)
class Program:
    """A function, and the shapes and shardings of its arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


def pod_mesh(slices: int = 1) -> Mesh:
    """Return the mesh of the pod with axes "data" and "model". `slices` is the size of "model"."""
    compilers.device("v5p")  # raises `Unavailable` without the compiler
    devices = np.array(topologies.get_topology_desc(POD, "tpu").devices)
    return Mesh(devices.reshape(-1, slices), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def _shard(mesh: Mesh, tree: Any, spec: P) -> Any:
    """Return the shapes and dtypes of a tree, with the sharding `spec` for every array."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


# ---------------------------------------------------------------- vocabulary heads


def _logits_losses(features: Array, kernel: Array, labels: Array) -> Array:
    features = lax.all_gather(features, "model", tiled=True)
    loss = focal_jax.softmax_focal_loss_with_integer_labels
    return loss(jnp.matmul(features, kernel), labels, class_axis_name="model")


def _linear_losses(features: Array, kernel: Array, labels: Array, **options: Any) -> Array:
    loss = focal_jax.linear_softmax_focal_loss_with_integer_labels
    return loss(features, kernel, labels, class_axis_name="model", **options)


# For each head: its losses, and the shardings of features and kernel. The first head gathers the
# features itself. The others take equal features on every device along "model".
HEADS = {
    "logits": (_logits_losses, P(("data", "model")), P(None, "model")),
    "linear": (_linear_losses, P("data"), P(None, "model")),
    "tied": (partial(_linear_losses, transpose_kernel=True), P("data"), P("model")),
}


def _mean_loss(mesh: Mesh, name: str) -> Callable[..., Array]:
    """Return the mean loss as a function of features, kernel and labels.

    The batch is sharded over "data" and the classes over "model".
    """
    losses, features_spec, kernel_spec = HEADS[name]

    def per_device(*args):
        return lax.pmean(focal_jax.reduce_loss(losses(*args)), "data")

    specs = features_spec, kernel_spec, P("data")
    mapped = jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=P())
    sharding = NamedSharding(mesh, P(("data", "model")))

    def mean_loss(features, kernel, labels):
        with jax.named_scope(SCOPE):
            return mapped(lax.with_sharding_constraint(features, sharding), kernel, labels)

    return mean_loss


def head(name: str, slices: int) -> Program:
    """Return value and gradient of a vocabulary head whose classes are in `slices` shards."""
    mesh = pod_mesh(slices)
    tokens = DEVICES * TOKENS_PER_DEVICE
    specs = P(("data", "model")), P(None, "model"), P("data")
    shapes = (tokens, FEATURES), (FEATURES, VOCABULARY), (tokens,)
    dtypes = "bfloat16", "bfloat16", "int32"
    structs = [jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes)]
    args = tuple(map(partial(_shard, mesh), structs, specs))
    return Program(jax.value_and_grad(_mean_loss(mesh, name), (0, 1)), args)


# ---------------------------------------------------------------- training step of a detector


def _training_step(optimizer, loss, parameters, state, *more):
    """Compute the loss and update everything that a training step updates."""
    (value, others), gradients = jax.value_and_grad(loss, has_aux=True)(parameters, *more)
    updates, state = optimizer.update(gradients, state, parameters)
    return value, others, optax.apply_updates(parameters, updates), state


def detector(images: int = 4, classes: int = 80, boxes: int = 100) -> Program:
    """Return a training step of the detector of `examples/retinanet_digits` at the size of COCO.

    The network is ten times as wide as the example. Each device has four images of 608 by 1,024
    pixels. The batch is sharded over all devices and the parameters are replicated, under `jit`.
    """
    # Imported here: the data of the example need packages that may not be installed.
    from examples.retinanet_digits import model as example

    mesh, size = pod_mesh(), (608, 1024)
    anchors = pyramid_anchors(size, (3, 4, 5), example.SCALES, example.RATIOS)
    widths = [10 * width for width in example.WIDTHS]

    def create():
        # `patch=8` gives the finest level the stride 8.
        return example.RetinaNet(nnx.Rngs(0), classes=classes, patch=8, widths=widths)

    graph, parameters, others = nnx.split(nnx.eval_shape(create), nnx.Param, ...)

    def loss(parameters, others, images, annotations):
        model = nnx.merge(graph, parameters, others, copy=True)
        predicted = model(images)
        with jax.named_scope(SCOPE):
            parts = retinanet_loss(*predicted, anchors, annotations, normalization="batch")
        return sum(parts), nnx.split(model, nnx.Param, ...)[2]

    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(optimizer.init, parameters)
    count = DEVICES * images
    batch = (
        jax.ShapeDtypeStruct((count, *size, 1), "bfloat16"),
        jax.ShapeDtypeStruct((count, boxes, 5), "float32"),
    )
    replicated = (_shard(mesh, x, P()) for x in (parameters, state, others))
    sharded = (_shard(mesh, x, P(("data", "model"))) for x in batch)
    return Program(partial(_training_step, optimizer, loss), (*replicated, *sharded))


# ---------------------------------------------------------------- training step of a transformer


class Block(nnx.Module):
    """Causal self-attention and a feed-forward network, with residual connections."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        """Initialize the layers."""
        linear = partial(nnx.Linear, dtype=jnp.bfloat16, use_bias=False, rngs=rngs)
        norm = partial(nnx.RMSNorm, width, dtype=jnp.bfloat16, rngs=rngs)
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)
        self.heads = heads

    def __call__(self, x: Array) -> Array:
        """Map features `[B, T, D]` to features of the same shape."""
        qkv = self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = (qkv[:, :, i] for i in range(3))
        x += self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
    """A transformer without its embedding and its head."""

    def __init__(self, layers: int, width: int, heads: int, rngs: nnx.Rngs):
        """Initialize the layers."""
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Map features `[B, T, D]` to features of the same shape."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def transformer(slices: int = 8, layers: int = 8, width: int = 1024, length: int = 1024) -> Program:
    """Return a training step of a language model with a vocabulary of 262,144.

    Each device has 4,096 tokens. The batch is sharded over all devices. The table, which is both
    the token embedding and the kernel of the linear head, is sharded by class into `slices`.
    """
    mesh = pod_mesh(slices)
    create = partial(Transformer, layers, width, width // 128)
    graph, inner = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    all_devices = P(("data", "model"))

    def embed(table, tokens):
        # Each device looks up the tokens of its shard. `psum_scatter` adds the shards and leaves
        # each device the tokens that it processes.
        index = tokens - len(table) * lax.axis_index("model")
        is_own = (index >= 0) & (index < len(table))
        own = jnp.where(is_own[..., None], table[jnp.where(is_own, index, 0)], 0)
        return lax.psum_scatter(own, "model", tiled=True)

    specs = P("model"), P("data")
    embedding = jax.shard_map(embed, mesh=mesh, in_specs=specs, out_specs=all_devices)
    mean_loss = _mean_loss(mesh, "tied")

    def loss(parameters, tokens, labels):
        table = parameters["table"].astype(jnp.bfloat16)
        features = nnx.merge(graph, parameters["inner"])(embedding(table, tokens))
        return mean_loss(features, table, labels), ()

    table = jax.ShapeDtypeStruct((VOCABULARY, width), "float32")
    parameters = {"inner": _shard(mesh, inner, P()), "table": _shard(mesh, table, P("model"))}
    optimizer = optax.adamw(1e-3)
    state = optax.tree.map_params(
        optimizer,
        lambda x, parameter: _shard(mesh, x, parameter.sharding.spec),
        jax.eval_shape(optimizer.init, parameters),
        parameters,
        transform_non_params=lambda x: _shard(mesh, x, P()),
    )
    tokens = jax.ShapeDtypeStruct((DEVICES * TOKENS_PER_DEVICE // length, length), "int32")
    batch = _shard(mesh, tokens, all_devices), _shard(mesh, tokens, P("data"))
    step = partial(_training_step, optimizer, loss)
    return Program(step, (parameters, state, *batch))


# ---------------------------------------------------------------- compiled programs

PROGRAMS: dict[str, Callable[[], Program]] = {
    "logits, data parallel": partial(head, "logits", 1),
    "logits, class parallel": partial(head, "logits", 8),
    "linear head, data parallel": partial(head, "linear", 1),
    "linear head, class parallel": partial(head, "linear", 8),
    "detector step": detector,
    "transformer step": transformer,
}


def row(name: str) -> dict[str, Any]:
    """Compile a program and return its row: the statistics of one device."""
    device = compilers.device("v5p")
    try:
        program = PROGRAMS[name]()
        compiled = jax.jit(program.function).lower(*program.args).compile()
    except Exception as error:
        raise compilers.Unavailable(f"{POD}: {compilers.first_line(error)}") from error
    return {"program": name, **read(device, compiled)}


def read(device: compilers.Device, compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Return the statistics of a compiled program, and those of the loss alone."""
    hlo = compiled.as_text() or ""
    kernels, sent = compilers.kernels(hlo), compilers.sent(hlo)
    loss_kernels = [k for k in kernels if SCOPE in k.operation.scope]
    return {
        **dataclasses.asdict(compilers.read(device, compiled)),
        "loss_bytes": sum(k.bytes for k in loss_kernels),
        "loss_cycles": sum(k.cycles for k in loss_kernels),
        "sent": [x._asdict() for x in sent],
        "sent_bytes": sum(x.bytes for x in sent),
        "loss_sent_bytes": sum(x.bytes for x in sent if SCOPE in x.scope),
    }


def table(rows: Sequence[dict[str, Any]]) -> report.Table:
    """Return a table with one line per program."""

    def line(row: dict[str, Any]) -> tuple[str, ...]:
        return (
            row["program"],
            f"{row['bytes'] / 1e9:,.1f}",
            f"{row['loss_bytes'] / row['bytes']:.0%}",
            f"{row['cycles'] / 1e6:,.0f}",
            f"{row['loss_cycles'] / row['cycles']:.0%}",
            f"{row['sent_bytes'] / 1e6:,.0f}",
            f"{row['loss_sent_bytes'] / row['sent_bytes']:.0%}",
            f"{row['temporaries'] / 1e9:,.2f}",
        )

    headings = (
        *("program", "moved GB", "of the loss", "Mcycles", "of the loss"),
        *("sent MB", "of the loss", "temporaries GB"),
    )
    title = f"One device of {DEVICES:,}, {POD}, compiled"
    return report.Table(title, headings, [line(row) for row in rows], 1)
