"""What the compiler of a pod of 1,024 TPUs makes of vocabulary heads and whole training steps.

Each is compiled for `v5p:8x8x16`, with every collective that it takes. Read of the program: what
a device moves in its memory, what it sends, and how much of either is the loss's.
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
TOKENS, FEATURES, VOCABULARY = 4096, 4096, 2**18  # tokens: of a device
SCOPE = "focal_loss"  # what the compiled operations of a loss are named by


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of shapes that are spread over the pod."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


def pod(slices: int = 1) -> Mesh:
    """Return the pod as a mesh of "data" and "model", `slices` along the latter."""
    compilers.device("v5p")  # or raises `Unavailable`
    devices = np.array(topologies.get_topology_desc(POD, "tpu").devices)
    return Mesh(devices.reshape(-1, slices), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def _spread(mesh: Mesh, tree: Any, spec: P) -> Any:
    """Return the shapes and dtypes of a tree, each array spread as `spec` says."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


# ---------------------------------------------------------------- vocabulary heads


def _of_logits(features: Array, kernel: Array, labels: Array) -> Array:
    features = lax.all_gather(features, "model", tiled=True)
    loss = focal_jax.softmax_focal_loss_with_integer_labels
    return loss(jnp.matmul(features, kernel), labels, class_axis_name="model")


def _linear(features: Array, kernel: Array, labels: Array) -> Array:
    loss = focal_jax.linear_softmax_focal_loss_with_integer_labels
    return loss(features, kernel, labels, class_axis_name="model")


def _tied(features: Array, table: Array, labels: Array) -> Array:
    return _linear(features, table.T, labels)


# How each takes its features, and its kernel: the first gathers the features, the others want the
# same on every slice.
HEADS = {
    "logits": (_of_logits, P(("data", "model")), P(None, "model")),
    "linear": (_linear, P("data"), P(None, "model")),
    "tied": (_tied, P("data"), P("model")),
}


def _head(mesh: Mesh, name: str) -> Callable[..., Array]:
    """Return the mean loss of features, a kernel and labels, the kernel cut by classes."""
    losses, of_features, of_kernel = HEADS[name]

    def share(*args):
        return lax.pmean(focal_jax.reduce_loss(losses(*args)), "data")

    specs = of_features, of_kernel, P("data")
    mapped = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=P())
    spread = NamedSharding(mesh, P(("data", "model")))

    def head(features, kernel, labels):
        with jax.named_scope(SCOPE):
            return mapped(lax.with_sharding_constraint(features, spread), kernel, labels)

    return head


def head(name: str, slices: int) -> Program:
    """Return a vocabulary head, value and gradient, with its classes cut into `slices`."""
    mesh = pod(slices)
    specs = P(("data", "model")), P(None, "model"), P("data")
    shapes = (DEVICES * TOKENS, FEATURES), (FEATURES, VOCABULARY), (DEVICES * TOKENS,)
    dtypes = "bfloat16", "bfloat16", "int32"
    structs = [jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes)]
    args = tuple(map(partial(_spread, mesh), structs, specs))
    return Program(jax.value_and_grad(_head(mesh, name), (0, 1)), args)


# ---------------------------------------------------------------- a detector's step


def _optimized(optimizer, loss, parameters, state, *more):
    """Return what a training step returns: its loss, and all that it has changed."""
    (value, others), gradients = jax.value_and_grad(loss, has_aux=True)(parameters, *more)
    updates, state = optimizer.update(gradients, state, parameters)
    return value, others, optax.apply_updates(parameters, updates), state


def detector(images: int = 4, classes: int = 80, boxes: int = 100) -> Program:
    """Return a training step of the detector of `examples/retinanet_digits`, at COCO's size.

    Four images of 608 by 1,024 pixels a device, 80 classes. Under `jit` alone: the batch is
    spread over all the devices, the parameters are on each.
    """
    # Here, since what the example draws its data with may not be installed.
    from examples.retinanet_digits import model as example

    mesh, size = pod(), (608, 1024)
    # Ten times as wide, with a cell for every 8 pixels at the finest.
    anchors = pyramid_anchors(size, (3, 4, 5), example.SCALES, example.RATIOS)
    widths = [10 * width for width in example.WIDTHS]

    def create():
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
    whole = (_spread(mesh, x, P()) for x in (parameters, state, others))
    split = (_spread(mesh, x, P(("data", "model"))) for x in batch)
    return Program(partial(_optimized, optimizer, loss), (*whole, *split))


# ---------------------------------------------------------------- a transformer's step


class Block(nnx.Module):
    """Causal attention and a feed-forward network, each added to its own input."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        """Initialize the layers from `rngs`."""
        linear = partial(nnx.Linear, dtype=jnp.bfloat16, use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(width, dtype=jnp.bfloat16, rngs=rngs) for _ in "ab"])
        self.mixed, self.joined = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)
        self.heads = heads

    def __call__(self, x: Array) -> Array:
        """Return features of the shape of `x`, `[B, T, D]`."""
        attend, forward = self.norms
        mixed = self.mixed(attend(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = (mixed[:, :, i] for i in range(3))
        x += self.joined(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(forward(x))))


class Transformer(nnx.Module):
    """What stands between the embedding of the tokens and the head."""

    def __init__(self, layers: int, width: int, heads: int, rngs: nnx.Rngs):
        """Initialize the layers from `rngs`."""
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Return features of the shape of `x`, `[B, T, D]`."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def transformer(slices: int = 8, layers: int = 8, width: int = 1024, length: int = 1024) -> Program:
    """Return a training step of a small language model with a vocabulary of 262,144.

    Eight layers of width 1,024, 4,096 tokens a device. The batch is spread over all the devices,
    and the vocabulary, both as the tokens' embedding and as the linear head, over `slices`.
    """
    mesh = pod(slices)
    create = partial(Transformer, layers, width, width // 128)
    graph, inner = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    every = P(("data", "model"))

    def embedded(table, tokens):
        # The slice that has a token gives its embedding, to the device that works on it.
        place = tokens - len(table) * lax.axis_index("model")
        here = (place >= 0) & (place < len(table))
        own = jnp.where(here[..., None], table[jnp.where(here, place, 0)], 0)
        return lax.psum_scatter(own, "model", tiled=True)

    specs = P("model"), P("data")
    embedding = jax.shard_map(embedded, mesh=mesh, in_specs=specs, out_specs=every)
    head = _head(mesh, "tied")

    def loss(parameters, tokens, labels):
        table = parameters["table"].astype(jnp.bfloat16)
        features = nnx.merge(graph, parameters["inner"])(embedding(table, tokens))
        return head(features, table, labels), ()

    table = jax.ShapeDtypeStruct((VOCABULARY, width), "float32")
    parameters = {"inner": _spread(mesh, inner, P()), "table": _spread(mesh, table, P("model"))}
    optimizer = optax.adamw(1e-3)
    state = optax.tree.map_params(
        optimizer,
        lambda x, parameter: _spread(mesh, x, parameter.sharding.spec),
        jax.eval_shape(optimizer.init, parameters),
        parameters,
        transform_non_params=lambda x: _spread(mesh, x, P()),
    )
    tokens = jax.ShapeDtypeStruct((DEVICES * TOKENS // length, length), "int32")
    batch = _spread(mesh, tokens, every), _spread(mesh, tokens, P("data"))
    step = partial(_optimized, optimizer, loss)
    return Program(step, (parameters, state, *batch))


# ---------------------------------------------------------------- what the compiler made of them

PROGRAMS: dict[str, Callable[[], Program]] = {
    "logits, data parallel": partial(head, "logits", 1),
    "logits, class parallel": partial(head, "logits", 8),
    "linear head, data parallel": partial(head, "linear", 1),
    "linear head, class parallel": partial(head, "linear", 8),
    "detector step": detector,
    "transformer step": transformer,
}


def row(name: str) -> dict[str, Any]:
    """Compile a program and return what a device of the pod does, and the loss's part of it."""
    device = compilers.device("v5p")
    try:
        program = PROGRAMS[name]()
        compiled = jax.jit(program.function).lower(*program.args).compile()
    except Exception as error:
        raise compilers.Unavailable(f"{POD}: {compilers.first_line(error)}") from error
    return {"program": name, **read(device, compiled)}


def read(device: compilers.Device, compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Return what the compiler made of a program."""
    hlo = compiled.as_text() or ""
    kernels, sent = compilers.kernels(hlo), compilers.sent(hlo)
    of_loss = [k for k in kernels if SCOPE in k.operation.scope]
    return {
        **dataclasses.asdict(compilers.read(device, compiled)),
        "loss_bytes": sum(k.bytes for k in of_loss),
        "loss_cycles": sum(k.cycles for k in of_loss),
        "sent": [x._asdict() for x in sent],
        "sent_bytes": sum(x.bytes for x in sent),
        "loss_sent_bytes": sum(x.bytes for x in sent if SCOPE in x.scope),
    }


def table(rows: Sequence[dict[str, Any]]) -> report.Table:
    """Return a line for each program: what a device moves and sends, and the loss's share."""

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
        "program",
        "moved GB",
        "loss",
        "Mcycles",
        "loss",
        "sent MB",
        "loss",
        "temporaries GB",
    )
    title = f"A device of {DEVICES:,}, {POD}, as compiled"
    return report.Table(title, headings, [line(row) for row in rows], 1)
