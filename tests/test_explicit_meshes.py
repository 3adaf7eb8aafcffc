"""Tests of losses over meshes outside of `shard_map`: explicit meshes, and the argument `mesh`."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads import LINEAR_HEADS, inputs
from helpers import assert_close
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from meshes import GATHERS, make_mesh, result_sizes

import focal_jax

pytestmark = [pytest.mark.quick, pytest.mark.every_form, pytest.mark.slow]

POSITIONS, CLASSES, DEPTH = 8, 6, 4
INTEGER = focal_jax.softmax_focal_loss_with_integer_labels


def _arrays():
    rng = np.random.default_rng(0)
    return {
        "logits": rng.normal(size=(POSITIONS, CLASSES)).astype(np.float32),
        "indices": rng.integers(0, CLASSES, POSITIONS).astype(np.int32),
        "labels": rng.dirichlet(np.ones(CLASSES), POSITIONS).astype(np.float32),
        "alpha": rng.uniform(0.1, 1, CLASSES).astype(np.float32),
        "gamma": rng.uniform(0.5, 2, POSITIONS).astype(np.float32),
    }


def _integer(a, **options):
    return INTEGER(a["logits"], a["indices"], alpha=a["alpha"], gamma=a["gamma"], **options)


def _statistics(a):
    options = {"temperature": a["gamma"], "where": np.arange(POSITIONS) > 0}
    log_p, lse, entropy, _ = focal_jax.token_statistics(a["logits"], a["indices"], **options)
    return log_p + 2 * lse + 3 * entropy


def _sparse(a):
    pairs = a["indices"][:, None], a["gamma"][:, None]
    loss = focal_jax.softmax_focal_loss_with_sparse_labels
    return loss(a["logits"], *pairs, alpha=a["alpha"])


LOSSES = {
    "integer": _integer,
    "smoothed": partial(_integer, label_smoothing=0.1),
    "logsumexp": lambda a: _integer(a, return_logsumexp=True)[1],
    "distribution": lambda a: focal_jax.softmax_focal_loss(
        a["logits"], a["labels"], alpha=a["alpha"], gamma=a["gamma"]
    ),
    "sigmoid": lambda a: focal_jax.sigmoid_focal_loss(
        a["logits"], a["labels"], gamma=a["gamma"][:, None]
    ),
    "dual": lambda a: focal_jax.dual_focal_loss_with_integer_labels(
        a["logits"], a["indices"], alpha=a["alpha"]
    ),
    "tversky": lambda a: focal_jax.focal_tversky_loss(a["logits"], a["labels"], gamma=2.0),
    "interval": lambda a: focal_jax.distribution_focal_loss(a["logits"], 2 * a["gamma"]),
    "of the log-probability": lambda a: focal_jax.engine.of_log_probability(
        INTEGER, -a["gamma"], gamma=a["gamma"], where=a["indices"] > 0
    ),
    "statistics": _statistics,
    "sparse": _sparse,
}
# The specs of the logits, of the labels and of alpha; None for arrays that are not placed.
LAYOUTS = {
    "batch": (P("data", None), P("data", None), P()),
    "batch, weights spread": (P("data", None), None, P("model")),
    "classes": (P(None, "model"), P(None, "model"), P()),
    "classes, labels not placed": (P(None, "model"), None, P("model")),
    "both": (P("data", "model"), P("data", "model"), P("model")),
    "both, others not placed": (P("data", "model"), None, None),
}


def _value_and_gradients(loss, arrays):
    differentiated = {k: v for k, v in arrays.items() if k != "indices"}

    def total(given):
        return jnp.sum(loss(arrays | given))

    return jax.jit(jax.value_and_grad(total))(differentiated)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_layout_has_the_values_of_one_device(name, layout):
    arrays, (logits, labels, alpha) = _arrays(), LAYOUTS[layout]
    mesh = make_mesh((4, 2), AxisType.Explicit)
    positions = None if labels is None else P(labels[0])
    specs = dict(zip(arrays, (logits, positions, labels, alpha, positions)))
    placed = {
        k: x if specs[k] is None else jax.device_put(x, NamedSharding(mesh, specs[k]))
        for k, x in arrays.items()
    }
    want = _value_and_gradients(LOSSES[name], arrays)
    with jax.sharding.set_mesh(mesh):
        found = _value_and_gradients(LOSSES[name], placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        assert_close(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "features",
    [P("data", None), P(), P("data", "model")],
    ids=["batch", "replicated", "batch and features"],
)
@pytest.mark.parametrize("kernel", [P("data", None), P(None, "model"), P("data", "model"), P()])
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_kernels_of_every_layout(name, kernel, features):
    rng, mesh = np.random.default_rng(1), make_mesh((4, 2), AxisType.Explicit)
    x, w = (rng.normal(size=s).astype(np.float32) for s in ((POSITIONS, DEPTH), (DEPTH, CLASSES)))
    labels = rng.integers(0, CLASSES, POSITIONS).astype(np.int32)

    def total(x, w):
        if name == "softmax":
            losses = focal_jax.linear_softmax_focal_loss_with_integer_labels(x, w, labels)
        else:
            losses = focal_jax.linear_sigmoid_focal_loss(x, w, labels[:, None])
        return jnp.sum(losses)

    def placed():
        args = (jax.device_put(v, NamedSharding(mesh, s)) for v, s in ((x, features), (w, kernel)))
        return jax.jit(jax.value_and_grad(total, (0, 1)))(*args)

    with jax.sharding.set_mesh(mesh):
        value, (of_x, of_w) = placed()
        assert jax.typeof(of_w).sharding.spec == P(*kernel, *(None,) * (2 - len(kernel)))
    want = jax.jit(jax.value_and_grad(total, (0, 1)))(x, w)
    for a, b in zip((value, of_x, of_w), jax.tree.leaves(want)):
        assert_close(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


def _linear_statistics(x, w, labels, temperature):
    found = focal_jax.linear_token_statistics(x, w, labels, temperature=temperature)
    return found.log_probability + 2 * found.entropy


_LINEAR = focal_jax.linear_softmax_focal_loss_with_integer_labels
WITH_TEMPERATURE = {
    "integer": lambda x, w, y, t: _LINEAR(x, w, y, temperature=t),
    "smoothed": lambda x, w, y, t: _LINEAR(x, w, y, temperature=t, label_smoothing=0.1),
    "statistics": _linear_statistics,
}


@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_temperatures_and_labels_of_every_placement(name):
    mesh, arrays = make_mesh((8,), AxisType.Explicit), _arrays()
    x, labels, temperature = arrays["logits"], arrays["indices"], arrays["gamma"]
    w = np.eye(CLASSES, dtype=np.float32)

    def total(x, labels, temperature):
        return jnp.sum(WITH_TEMPERATURE[name](x, w, labels, temperature))

    compute = jax.jit(jax.value_and_grad(total, (0, 2)))
    want = compute(x, labels, temperature)
    places = lambda v: [v, *(jax.device_put(v, NamedSharding(mesh, s)) for s in (P(), P("data")))]  # noqa: E731
    with jax.sharding.set_mesh(mesh):
        for args in itertools.product(*map(places, (x, labels, temperature))):
            assert_close(compute(*args), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_statistics_and_losses_with_labels_placed_in_another_way(jit):
    mesh, arrays = make_mesh((4, 2), AxisType.Explicit), _arrays()

    def total(logits, labels, where):
        losses = INTEGER(logits, labels, where=where)
        return jnp.sum(losses + focal_jax.token_statistics(logits, labels, where=where).entropy)

    compute = jax.value_and_grad(total)
    compute = jax.jit(compute) if jit else compute
    where = arrays["indices"] > 0
    want = compute(arrays["logits"], arrays["indices"], where)
    put = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, P(*spec)))  # noqa: E731
    with jax.sharding.set_mesh(mesh):
        labels, where = put(arrays["indices"], "data"), put(where)
        z = arrays["logits"]
        for logits in (z, put(z), put(z, "data"), put(z, None, "model")):
            assert_close(compute(logits, labels, where), want, rtol=1e-5, atol=1e-6)


HEADS_OF_EMBEDDINGS = {
    "integer": lambda x, w, y: _LINEAR(x, w, y, transpose_kernel=True),
    "smoothed": lambda x, w, y: _LINEAR(x, w, y, label_smoothing=0.1, transpose_kernel=True),
    "statistics": lambda x, w, y: (
        focal_jax.linear_token_statistics(x, w, y, transpose_kernel=True).log_probability
    ),
    "sparse": lambda x, w, y: focal_jax.linear_softmax_focal_loss_with_sparse_labels(
        x, w, y[..., None], jnp.ones((*y.shape, 1)), transpose_kernel=True
    ),
    "sigmoid": lambda x, w, y: focal_jax.linear_sigmoid_focal_loss(
        x, w, y[..., None], transpose_kernel=True
    ),
}


@pytest.mark.parametrize("embedding", [P("data"), P("model"), P(("data", "model"))], ids=str)
@pytest.mark.parametrize("features", [P("data"), P("data", "model"), P(None, "data")], ids=str)
@pytest.mark.parametrize("name", HEADS_OF_EMBEDDINGS)
def test_a_mesh_axis_that_shards_the_positions_and_the_classes(name, features, embedding):
    rng, mesh = np.random.default_rng(2), make_mesh((4, 2), AxisType.Explicit)
    x, w = (rng.normal(size=s).astype(np.float32) for s in ((8, 4, DEPTH), (16, DEPTH)))
    labels = rng.integers(0, 16, (8, 4)).astype(np.int32)
    compute = jax.jit(
        jax.value_and_grad(lambda *args: jnp.sum(HEADS_OF_EMBEDDINGS[name](*args)), (0, 1))
    )
    want = compute(x, w, labels)
    with jax.sharding.set_mesh(mesh):
        specs = (features, embedding, features)
        placed = [jax.device_put(v, NamedSharding(mesh, s)) for v, s in zip((x, w, labels), specs)]
        assert_close(compute(*placed), want, rtol=1e-5, atol=1e-5)


def test_masks_of_the_tversky_loss_placed_in_another_way():
    mesh, arrays = make_mesh((4, 2), AxisType.Explicit), _arrays()
    where = arrays["indices"] > 0
    compute = jax.jit(
        jax.grad(lambda z, y, m: jnp.sum(focal_jax.focal_tversky_loss(z, y, where=m)))
    )
    want = compute(arrays["logits"], arrays["labels"], where)
    with jax.sharding.set_mesh(mesh):
        for spec in (P(), P("data"), P("data", "model")):
            logits = jax.device_put(arrays["logits"], NamedSharding(mesh, spec))
            mask = jax.device_put(where, NamedSharding(mesh, P("data")))
            assert_close(compute(logits, arrays["labels"], mask), want, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- detection

BOXES = np.float32([[0, 0, 9, 9], [5, 5, 20, 20], [30, 30, 50, 60], [0, 0, 4, 4]] * 4)


@pytest.mark.parametrize("anchors", [P(), P("data", None), P("model", None)], ids=str)
@pytest.mark.parametrize("logits", [P("data"), P("data", "model"), P(None, None, "model")], ids=str)
def test_retinanet_loss_of_every_layout(logits, anchors):
    rng, mesh = np.random.default_rng(2), make_mesh((4, 2), AxisType.Explicit)
    z, offsets = (rng.normal(size=(4, len(BOXES), n)).astype(np.float32) for n in (2, 4))
    annotations = np.tile(np.float32([0, 0, 10, 10, 1]), (4, 3, 1))
    loss = focal_jax.detection.retinanet_loss

    def total(z, offsets, boxes):
        return sum(loss(z, offsets, boxes, annotations))

    gradients = jax.jit(jax.value_and_grad(total, (0, 1)))
    want = gradients(z, offsets, BOXES)
    with jax.sharding.set_mesh(mesh):
        specs = logits, P(*logits[:2]), anchors
        placed = (
            jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((z, offsets, BOXES), specs)
        )
        found = gradients(*placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        assert_close(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


def test_matching_and_iou_of_sharded_boxes():
    mesh, boxes = make_mesh((4, 2), AxisType.Explicit), np.pad(BOXES, ((0, 0), (0, 1)))
    want = (
        focal_jax.detection.match_anchors(BOXES, boxes),
        focal_jax.detection.box_iou(BOXES, BOXES),
    )
    with jax.sharding.set_mesh(mesh):
        sharded = jax.device_put(BOXES, NamedSharding(mesh, P("data", None)))
        matches = focal_jax.detection.match_anchors(sharded, boxes)
        found = matches, focal_jax.detection.box_iou(sharded, sharded)
    for a, b in zip(found, want):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# ---------------------------------------------------------------- sharded classes

# One head for each computation over the classes.
SHARDED_HEADS = [
    "softmax_focal_loss_with_integer_labels",
    "label smoothing and logsumexp",
    "sparse labels",
    "linear_sigmoid_focal_loss",
]


def _of_head(name, labels, order=1, **options):
    """Return the value and the gradients in features, kernel and bias; or of order 2."""

    def total(x, w, b):
        return jnp.sum(jnp.sin(LINEAR_HEADS[name](x, w, b, labels, **options)))

    def squared_norm(*args):
        return sum(jnp.sum(g**2) for g in jax.grad(total, (0, 1, 2))(*args))

    return jax.value_and_grad(total if order == 1 else squared_norm, (0, 1, 2))


def _placed(kind, transpose, positions):
    """Return a mesh, the arguments of a head sharded over it, and their options."""
    mesh = make_mesh((4, 2), kind)
    (x, w, b, *_), labels = inputs(1, (8, 3), classes=64)
    specs = positions, P("model", None) if transpose else P(None, "model"), P("model")
    args = x, w.T if transpose else w, b
    shardings = tuple(NamedSharding(mesh, s) for s in specs)
    options = {"transpose_kernel": transpose}
    return mesh, jax.device_put(args, shardings), labels, options


@pytest.mark.parametrize("name", SHARDED_HEADS)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "mesh="])
def test_heads_shard_the_classes(name, kind):
    transpose = kind == AxisType.Explicit
    mesh, args, labels, options = _placed(kind, transpose, P("data"))
    want = jax.jit(_of_head(name, labels, **options))(*(jnp.asarray(np.asarray(x)) for x in args))
    given = {} if transpose else {"mesh": mesh, "class_axis_name": "model"}
    with jax.sharding.set_mesh(mesh):
        compiled = jax.jit(_of_head(name, labels, **options, **given)).lower(*args).compile()
        found = compiled(*args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        assert_close(np.asarray(a), np.asarray(b), 1e-5)
    text = compiled.as_text()
    assert not result_sizes(text, GATHERS)
    # The largest message is the gradient of the slice of the kernel, once for all chunks.
    assert max(result_sizes(text, "all-reduce")) <= args[1].size // 2
    for x, gradient in zip(args[1:], found[1][1:]):
        assert gradient.sharding.is_equivalent_to(x.sharding, x.ndim)


def test_xla_gathers_classes_without_a_mesh():
    _, args, labels, options = _placed(AxisType.Auto, False, P("data"))
    text = jax.jit(_of_head(SHARDED_HEADS[0], labels, **options)).lower(*args).compile().as_text()
    assert max(result_sizes(text, GATHERS)) >= args[1].size // 2


@pytest.mark.parametrize("name", SHARDED_HEADS[1::2])
def test_second_derivatives_with_any_sharding_of_the_positions(name):
    mesh, args, labels, options = _placed(AxisType.Auto, False, P("data"))
    options |= {"mesh": NamedSharding(mesh, P("data", None)), "class_axis_name": "model"}
    found = jax.jit(_of_head(name, labels, 2, **options))(*args)
    want = jax.jit(_of_head(name, labels, 2))(*(jnp.asarray(np.asarray(x)) for x in args))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        assert_close(np.asarray(a), np.asarray(b), 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": 8}, "mesh: got 8, wanted None, a jax.sharding.Mesh"),
        ({"class_axis_name": "classes"}, "class_axis_name: got .'classes'., wanted axes of the"),
        ({"class_axis_name": "data"}, "kernel: got 6 classes, wanted a multiple of 4"),
        ({"class_axis_name": None}, "features: got 4 positions, wanted a multiple of 8"),
    ],
)
def test_meshes_that_do_not_fit(options, message):
    (x, w, *_), labels = inputs(1, (4, 3), classes=6)
    options = {"mesh": make_mesh((4, 2)), "class_axis_name": "model"} | options
    with pytest.raises(focal_jax.InputError, match=message):
        focal_jax.linear_token_statistics(x, w, labels, **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["reduce", "tversky", "sparse", "linear", "linear sigmoid"])
def test_arguments_placed_at_random(name, seed):
    mesh, arrays = make_mesh((4, 2), AxisType.Explicit), _arrays()
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(CLASSES, CLASSES)).astype(np.float32)
    pairs = arrays["indices"][:, None], arrays["gamma"][:, None]
    where = arrays["indices"] > 0
    z, alpha = arrays["logits"], arrays["alpha"]
    function, args = {
        "reduce": (
            lambda losses, weights, where: focal_jax.reduce_loss(
                losses, weights=weights, where=where
            ),
            (z[:, 0], arrays["gamma"], where),
        ),
        "tversky": (
            lambda z, y, alpha, where: focal_jax.focal_tversky_loss(z, y, alpha=alpha, where=where),
            (z, arrays["labels"], alpha, where),
        ),
        "sparse": (
            lambda z, i, w, alpha, where: focal_jax.softmax_focal_loss_with_sparse_labels(
                z, i, w, alpha=alpha, where=where
            ),
            (z, *pairs, alpha, where),
        ),
        "linear": (
            lambda x, w, b, y, alpha, where: _LINEAR(
                x, w, y, bias=b, alpha=alpha, where=where, label_smoothing=0.1
            ),
            (z, kernel, alpha, arrays["indices"], alpha, where),
        ),
        "linear sigmoid": (
            lambda x, w, b, i, where: focal_jax.linear_sigmoid_focal_loss(
                x, w, i, bias=b, where=where
            ),
            (z, kernel, alpha, pairs[0], where),
        ),
    }[name]
    compute = jax.jit(jax.value_and_grad(lambda *args: jnp.sum(function(*args))))
    want = compute(*args)
    sizes = {None: 1, "data": 4, "model": 2, ("data", "model"): 8}
    with jax.sharding.set_mesh(mesh):
        for _ in range(4):
            placed = []
            for x in args:
                fits = [axis for axis, size in sizes.items() if x.shape[0] % size == 0]
                spec = P(fits[rng.integers(len(fits))])
                is_placed = rng.random() < 0.75
                placed.append(jax.device_put(x, NamedSharding(mesh, spec)) if is_placed else x)
            assert_close(compute(*placed), want, rtol=1e-5, atol=1e-5)
