"""The linear head is the softmax head on `features @ kernel + bias`, in less memory."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, jit
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P

import focal_jax
from focal_jax import _linear
from focal_jax._varying import aligned_varying

pytestmark = pytest.mark.quick

LINEAR = focal_jax.linear_softmax_focal_loss_with_integer_labels
REFERENCE = focal_jax.reference.linear_softmax_focal_loss_with_integer_labels
# Chunks of one class, some that divide the 7 and none that do, all at once, and more.
CHUNKS = [1, 2, 3, 7, 100, None]


def _inputs(seed=0, positions=(4, 3), depth=5, classes=7, dtype=np.float32):
    """Return features, kernel, bias, alpha, gamma and labels."""
    rng = np.random.default_rng(seed)
    shapes = (*positions, depth), (depth, classes), (classes,)
    arrays = [rng.normal(size=shape) for shape in shapes]
    arrays += [rng.uniform(0.1, 0.9, classes), rng.uniform(0.2, 4, positions)]
    labels = jnp.asarray(rng.integers(0, classes, positions), jnp.int32)
    return [jnp.asarray(x, dtype) for x in arrays], labels


def _plain(features, kernel, labels, *, bias=None, **options):
    """Return the softmax head's losses of all the logits."""
    logits = features @ kernel
    logits = logits if bias is None else logits + jnp.broadcast_to(bias, logits.shape)
    return focal_jax.softmax_focal_loss_with_integer_labels(logits, labels, **options)


def _total(function, labels, weights=1.0, **options):
    def total(features, kernel, bias, alpha, gamma):
        losses = function(features, kernel, labels, bias=bias, alpha=alpha, gamma=gamma, **options)
        return jnp.sum(weights * losses)

    return total


def _gradients(function, args, labels, *options, **static):
    total = _total(function, labels, *options, **static)
    return jit(jax.value_and_grad(total, range(len(args))))(*args)


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_it_is_the_softmax_head_of_the_product(chunk_size):
    args, labels = _inputs()
    weights = np.random.default_rng(1).normal(size=labels.shape).astype(np.float32)
    got = _gradients(LINEAR, args, labels, weights, chunk_size=chunk_size)
    want = _gradients(_plain, args, labels, weights)
    assert_close(got, want, 1e-5)
    assert_close(got, _gradients(REFERENCE, args, labels, weights, chunk_size=chunk_size), 1e-4)


@pytest.mark.parametrize("gamma", [0, 0.5, 2, 5])
def test_static_gamma_and_no_options(gamma, x64):
    (features, kernel, *_), labels = _inputs(2, dtype=np.float64)

    def both(function, **options):
        def total(f, k):
            return jnp.sum(function(f, k, labels, gamma=gamma, **options) ** 2)

        return jit(jax.value_and_grad(total, (0, 1)))(features, kernel)

    assert_close(both(LINEAR, chunk_size=2), both(_plain), 1e-12)
    assert_close(both(LINEAR, chunk_size=2), both(REFERENCE), 1e-9)


def test_any_number_of_positions():
    for positions in ((), (0,), (3,), (2, 0), (1, 2, 1, 3)):
        args, labels = _inputs(3, positions)
        got = _gradients(LINEAR, args, labels, chunk_size=3)
        assert got[1][0].shape == (*positions, 5)
        assert_close(got, _gradients(_plain, args, labels), 1e-5)


def test_options_broadcast():
    (features, kernel, bias, *_), labels = _inputs(4)
    gamma, where = jnp.array([[0.5], [1.0], [2.0], [3.0]]), jnp.array([True, False, True])
    for options in ({"alpha": 0.3, "gamma": gamma}, {"gamma": gamma[0, 0], "where": where}):
        got = LINEAR(features, kernel, labels, bias=bias, chunk_size=4, **options)
        want = _plain(features, kernel, labels, bias=bias, **options)
        assert_close(got, want, 1e-5)


# ---------------------------------------------------------------- higher derivatives


def test_second_derivatives_are_the_plain_heads(x64):
    args, labels = _inputs(6, (3,), 2, 5, np.float64)
    every = tuple(range(len(args)))
    got, want = (_total(f, labels, **o) for f, o in ((LINEAR, {"chunk_size": 2}), (_plain, {})))
    want = jit(jax.jacrev(jax.grad(want, every), every))(*args)
    assert_close(jit(jax.jacrev(jax.grad(got, every), every))(*args), want, 1e-10)
    assert_close(jit(jax.jacfwd(jax.grad(got, every), every))(*args), want, 1e-10)


# ---------------------------------------------------------------- extremes


@pytest.mark.parametrize("chunk_size", [1, 3, 8])
def test_a_class_at_minus_infinity_is_switched_off(chunk_size):
    args, labels = _inputs(11)
    features, kernel, bias, alpha, gamma = args
    wide = [
        features,
        jnp.pad(kernel, ((0, 0), (0, 1))),
        jnp.append(bias, -jnp.inf),
        jnp.append(alpha, 1.0),
        gamma,
    ]
    value, got = _gradients(LINEAR, wide, labels, chunk_size=chunk_size)
    assert_close(value, _gradients(LINEAR, args, labels)[0], 1e-6)
    _, want = _gradients(_plain, wide, labels)
    assert_close(got, want, 1e-5)
    assert np.all(got[1][:, 7] == 0)
    # And a true class at -inf: an infinite loss, finite gradients.
    value, got = _gradients(LINEAR, wide, jnp.full_like(labels, 7), chunk_size=chunk_size)
    assert value == np.inf
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got[:3]))


# ---------------------------------------------------------------- dtypes


@pytest.mark.quick(False)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits_are_added_up_in_float32(dtype):
    # Deep and wide enough that 16-bit sums, or cotangents rounded between the chunks, show.
    args, labels = _inputs(12, (64,), 256, 300)
    args[0], args[1] = args[0].astype(dtype), (args[1] / 16).astype(dtype)
    wide = [x.astype(jnp.float32) for x in args]
    assert LINEAR(*args[:2], labels).dtype == jnp.float32
    value, got = _gradients(LINEAR, args, labels, chunk_size=7)
    want_value, want = _gradients(LINEAR, wide, labels, chunk_size=7)
    assert_close(value, want_value, 1e-6)
    assert [g.dtype for g in got] == [x.dtype for x in args]
    eps = float(jnp.finfo(dtype).eps)
    for a, b in zip(got[:2], want[:2]):
        # The float32 result, rounded once.
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=0.51 * eps, atol=1e-6)
    assert_close(got[2:], want[2:], 1e-5)


# ---------------------------------------------------------------- memory


def _compiled(function, positions, depth, classes, order=1):
    shapes = (positions, depth), (depth, classes)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    labels = jnp.zeros(positions, jnp.int32)
    total = jax.grad(lambda f, k: jnp.sum(function(f, k, labels)), (0, 1))
    if order == 2:
        inner = total
        total = jax.grad(lambda f, k: sum(jnp.sum(g**2) for g in inner(f, k)), (0, 1))
    return jax.jit(total).lower(*args).compile()


@pytest.mark.quick(False)
@pytest.mark.parametrize("shape", [(2048, 512, 32000), (512, 256, 4096), (256, 64, 1000)])
def test_temporaries_are_a_tenth_of_the_logits(shape):
    # Beside the gradients themselves: a step's part of the features' is as large as that.
    positions, depth, classes = shape
    tenth, gradient = positions * classes * 4 / 10, positions * depth * 4
    memory = _compiled(LINEAR, *shape).memory_analysis()
    assert memory.temp_size_in_bytes < tenth + gradient
    plain = _compiled(_plain, *shape).memory_analysis()
    assert plain.temp_size_in_bytes >= 10 * tenth  # that it measures


@pytest.mark.quick(False)
def test_second_derivatives_do_not_hold_the_logits_either():
    memory = _compiled(LINEAR, 2048, 64, 32000, order=2).memory_analysis()
    assert memory.temp_size_in_bytes < 2048 * 32000 * 4 / 2


# ---------------------------------------------------------------- tied embeddings


def _tied(features, embedding, labels, **options):
    return jnp.sum(LINEAR(features, embedding.T, labels, chunk_size=64, **options))


def _tied_over_devices(features, embedding, labels):
    mesh, axes = Mesh(np.array(jax.devices()), ("data",)), (P("data"), P(), P("data"))
    share = lambda *args: lax.psum(_tied(*args), "data")  # noqa: E731
    return jax.shard_map(share, mesh=mesh, in_specs=axes, out_specs=P())(
        features, embedding, labels
    )


def _tied_slices(features, embedding, labels):
    mesh, axes = Mesh(np.array(jax.devices()), ("model",)), (P(), P("model"), P())
    share = partial(_tied, class_axis_name="model")
    return jax.shard_map(share, mesh=mesh, in_specs=axes, out_specs=P())(
        features, embedding, labels
    )


@pytest.mark.quick(False)
@pytest.mark.parametrize(
    ("function", "options", "slices", "copies"),
    [
        pytest.param(_tied, {}, 1, 1, id="plain"),
        pytest.param(_tied, {"label_smoothing": 0.1, "logit_softcap": 9.0}, 1, 2, id="options"),
        pytest.param(jax.checkpoint(_tied), {}, 1, 1, id="checkpoint"),
        pytest.param(_tied_over_devices, {}, 1, 1, id="batch over devices"),
        pytest.param(_tied_slices, {}, 8, 1, id="classes over devices"),
    ],
)
def test_a_tied_embedding_is_not_transposed_in_memory(function, options, slices, copies):
    depth, classes = 24, 1000
    (features, kernel, *_), labels = _inputs(17, (16,), depth, classes)
    labels = labels.at[0].set(classes - 1)
    gradient = jax.jit(jax.grad(partial(function, **options), (0, 1)))
    compiled = gradient.lower(features, kernel.T, labels).compile()
    # Of the kernel's size nothing but itself, copied into the place of each gradient of it.
    copied = r"= \w+\[(?:{0},{1}|{1},{0})\]\S* (?:copy|transpose)\("
    found = re.findall(copied.format(depth, classes // slices), compiled.as_text())
    assert len(found) <= copies

    def untied(features, kernel):
        return jnp.sum(LINEAR(features, kernel, labels, chunk_size=64, **options))

    by_features, by_kernel = jax.jit(jax.grad(untied, (0, 1)))(features, kernel)
    assert_close(compiled(features, kernel.T, labels), (by_features, by_kernel.T), 1e-5)


def test_a_kernel_is_known_for_an_embedding():
    known = []

    def found(x):
        known.append(_linear._transposed(x))
        return jnp.sum(x)

    embedding = jnp.ones((6, 4))
    for kernel in (
        lambda e: e.T,
        lambda e: jnp.swapaxes(e, 0, 1),
        lambda e: e.astype(jnp.bfloat16).T,
        lambda e: e.T.astype(jnp.bfloat16),
        lambda e: e.T + 1,
        lambda e: e,
    ):
        jax.jit(jax.grad(lambda e, k=kernel: found(k(e))))(embedding)
    found(embedding.T)
    assert known == [True] * 4 + [False] * 3


# ---------------------------------------------------------------- meshes


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("inside", [True, False], ids=["grad inside", "grad outside"])
def test_shard_map_with_the_batch_over_two_axes(check_vma, inside):
    args, labels = _inputs(16, (8, 4))
    axes = "data", "seq"
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), axes)
    split, whole = P(*axes), P()
    specs = split, whole, whole, whole, split

    def local(*args):
        total = _total(LINEAR, args[-1], chunk_size=3)
        value, gradients = jax.value_and_grad(total, range(5))(*args[:-1])
        if not check_vma:  # else the sum over the devices is in the gradient already
            gradients = [
                lax.psum(g, axes) if spec == whole else g for g, spec in zip(gradients, specs)
            ]
        return lax.psum(value, axes), tuple(gradients)

    def mapped(function, out_specs):
        return jax.shard_map(
            function, mesh=mesh, in_specs=(*specs, split), out_specs=out_specs, check_vma=check_vma
        )

    if inside:
        got = jax.jit(mapped(local, (whole, specs)))(*args, labels)
    else:
        losses = mapped(
            lambda f, k, b, a, g, y: LINEAR(f, k, y, bias=b, alpha=a, gamma=g, chunk_size=3), split
        )
        total = lambda *args: jnp.sum(losses(*args, labels))  # noqa: E731
        got = jax.jit(jax.value_and_grad(total, range(5)))(*args)
    assert_close(got, _gradients(LINEAR, args, labels, chunk_size=3), 1e-5)


def test_aligned_varying_casts_to_the_union_and_back():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))

    def local(x, y, z):
        total = lambda x, y, z: jnp.sum(jnp.stack(aligned_varying(x, y, z, None)[:3]))  # noqa: E731
        return jax.grad(total, (0, 1, 2))(x, y, z)

    specs = P("data"), P("model"), P()
    ones = jnp.ones(8)
    got = jax.shard_map(
        lambda x, y, z: local(x[:2], y[:2], z[:2]), mesh=mesh, in_specs=specs, out_specs=specs
    )(ones, ones, ones)
    # The transpose of the cast is a psum over the axes that were added.
    assert [float(x[0]) for x in got] == [2, 4, 8]
    x = jnp.ones(3)
    assert aligned_varying(x, None)[0] is x
