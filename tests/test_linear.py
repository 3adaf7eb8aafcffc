"""The linear head is the softmax head on `features @ kernel + bias`, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from helpers import GAMMAS, assert_close
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jax.test_util import check_grads

import focal_jax
from focal_jax._varying import aligned_varying

LINEAR = focal_jax.linear_softmax_focal_loss_with_integer_labels
REFERENCE = focal_jax.reference.linear_softmax_focal_loss_with_integer_labels
TINY = float(jnp.finfo(jnp.float32).tiny)
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
    return jax.jit(jax.value_and_grad(total, range(len(args))))(*args)


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

        return jax.jit(jax.value_and_grad(total, (0, 1)))(features, kernel)

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


def test_to_60_digits():
    # With an identity for a kernel the logits are exact, and the features' gradient is theirs.
    rng = np.random.default_rng(0)
    margins = np.concatenate([np.linspace(-60, 60, 25), rng.uniform(-60, 60, 10)])
    rows = rng.normal(size=(margins.size, 6)) * rng.choice([0.0, 1.0, 5.0], (margins.size, 1))
    labels = np.arange(margins.size) % 6
    own = labels[:, None] == np.arange(6)
    rows = np.where(
        own, np.where(own, -np.inf, rows).max(1, keepdims=True) + margins[:, None], rows
    )
    rows = rows.astype(np.float32)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def both(gamma, static, chunk_size):
        def losses(z):
            exponent = gamma if static is None else static
            return LINEAR(z, jnp.eye(6), labels, gamma=exponent, chunk_size=chunk_size)

        values, vjp = jax.vjp(losses, rows)
        return values, *vjp(jnp.ones_like(values))

    for gamma in GAMMAS:
        want = [truth.softmax(z, y, gamma)[:2] for z, y in zip(rows, own)]
        for static, chunk_size in ((None, 1), (None, 4), (None, None), (gamma, 4)):
            got = both(jnp.float32(gamma), static, chunk_size)
            for a, b in zip(got, zip(*want)):
                assert truth.relative_error(a, np.array(b, dtype=object), TINY) < 1e-5


# ---------------------------------------------------------------- higher derivatives


@pytest.mark.parametrize("gamma", [0.5, "traced"])
def test_finite_differences_to_second_order(gamma, x64):
    (features, kernel, bias, alpha, gammas), labels = _inputs(5, (2,), 2, 3, np.float64)
    args = (features, kernel, bias, alpha, gammas)[: 5 if gamma == "traced" else 4]

    @jax.jit
    def function(features, kernel, bias, alpha, exponent=gamma):
        return LINEAR(
            features, kernel, labels, bias=bias, alpha=alpha, gamma=exponent, chunk_size=2
        )

    check_grads(function, args, order=2, modes=["rev"], atol=1e-5, rtol=1e-5)


def test_second_derivatives_are_the_plain_heads(x64):
    args, labels = _inputs(6, (3,), 2, 5, np.float64)
    every = tuple(range(len(args)))
    got, want = (_total(f, labels, **o) for f, o in ((LINEAR, {"chunk_size": 2}), (_plain, {})))
    want = jax.jit(jax.jacrev(jax.grad(want, every), every))(*args)
    assert_close(jax.jit(jax.jacrev(jax.grad(got, every), every))(*args), want, 1e-10)
    assert_close(jax.jit(jax.jacfwd(jax.grad(got, every), every))(*args), want, 1e-10)


def test_forward_mode_alone_is_refused_and_the_reference_has_it():
    args, labels = _inputs(7)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(_total(LINEAR, labels), args, args)
    tangent = jax.jvp(_total(REFERENCE, labels), args, args)[1]
    gradient = _gradients(LINEAR, args, labels)[1]
    assert_close(tangent, sum(jnp.vdot(a, b) for a, b in zip(gradient, args)), 1e-4)


def test_vmap_is_a_loop():
    args, labels = _inputs(8)
    in_axes = 0, None, None, None, 0

    def one(*args):
        *args, y = args
        total = _total(LINEAR, y, chunk_size=3)
        return jax.value_and_grad(total, range(5))(*args)

    got = jax.vmap(one, (*in_axes, 0))(*args, labels)
    rows = [
        one(*(x if a is None else x[i] for x, a in zip(args, in_axes)), labels[i]) for i in range(4)
    ]
    assert_close(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows), 1e-5)


# ---------------------------------------------------------------- extremes


@pytest.mark.parametrize("how", ["where", "ignore_label"])
def test_a_mask_shields_every_gradient(how):
    args, labels = _inputs(9, (4,))
    where = jnp.array([True, False, True, False])
    soiled = jnp.where(where, labels, -100)
    options = {"where": where} if how == "where" else {"ignore_label": -100}
    total = _total(LINEAR, soiled, chunk_size=3, **options)
    every = tuple(range(5))

    @jax.jit
    def derivatives(*args):
        first = jax.grad(total, every)
        return total(*args), first(*args), jax.jvp(lambda f: first(f, *args[1:]), *[args[:1]] * 2)

    want = derivatives(*args)
    assert_close(want[:2], _gradients(_plain, args, labels, where=where), 1e-5)
    for poison in (jnp.nan, jnp.inf, -jnp.inf):
        got = derivatives(jnp.where(where[:, None], args[0], poison), *args[1:])
        assert np.all(got[1][0][1::2] == 0)
        # The second derivative is along the features themselves.
        assert_close(got[:2], want[:2], 1e-6)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got))
        losses = LINEAR(jnp.full((4, 5), poison), args[1], soiled, **options)
        assert losses[1::2].tolist() == [0, 0]


def test_nothing_valid_is_zero():
    args, labels = _inputs(9, (4,))
    args = [jnp.full_like(x, jnp.nan) for x in args]
    nothing = _gradients(LINEAR, args, labels, where=jnp.zeros(4, bool))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize("gamma", [0, 2, jnp.float32(0.5)])
def test_an_impossible_label_is_nan(gamma):
    (features, kernel, bias, alpha, _), _ = _inputs(10, (5,))
    labels = jnp.array([0, -1, 7, 2**31 - 1, 2])
    impossible = [False, True, True, True, False]

    def total(features, kernel, bias):
        losses = LINEAR(features, kernel, labels, bias=bias, alpha=alpha, gamma=gamma, chunk_size=3)
        return jnp.sum(losses), losses

    gradients, losses = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(features, kernel, bias)
    assert np.isnan(losses).tolist() == impossible
    assert np.isnan(gradients[0]).all(1).tolist() == impossible
    assert np.isnan(gradients[0]).any(1).tolist() == impossible
    assert np.isnan(gradients[1]).all()
    assert np.isnan(gradients[2]).all()


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


def test_derivatives_are_finite_at_saturation():
    margins = np.float32([-1e4, -100, -60, 0, 60, 100, 1e4])
    labels = np.arange(7) % 3
    features = np.where(labels[:, None] == np.arange(3), margins[:, None], np.float32(0))

    @jax.jit
    def derivatives(*args):
        first = jax.grad(lambda *a: jnp.sum(LINEAR(*a, labels, gamma=0.5, chunk_size=2)), (0, 1))
        second = jax.grad(lambda *a: jnp.sum(jnp.stack([jnp.sum(g) for g in first(*a)])), (0, 1))
        return first(*args), second(*args), jax.jvp(first, args, args)

    got = derivatives(features, np.eye(3, dtype=np.float32))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got))
    np.testing.assert_allclose(np.abs(got[0][0]).max(1)[:2], 1, rtol=1e-6)


# ---------------------------------------------------------------- dtypes


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


def test_every_cotangent_has_its_primals_dtype(x64):
    for features in (jnp.bfloat16, jnp.float32, jnp.float64):
        dtypes = features, jnp.float32, jnp.bfloat16, jnp.float64, jnp.float32
        args, labels = _inputs(13, (3,))
        args = [x.astype(dtype) for x, dtype in zip(args, dtypes)]
        with jax.numpy_dtype_promotion("standard"):
            value, gradients = _gradients(LINEAR, args, labels, chunk_size=3)
        assert value.dtype == (jnp.float64 if features == jnp.float64 else jnp.float32)
        assert [g.dtype for g in gradients] == list(dtypes)
        assert [g.shape for g in gradients] == [x.shape for x in args]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_narrow_labels_do_not_wrap(dtype):
    (features, kernel, *_), _ = _inputs(14, (4,), 5, 300)
    labels = np.array([0, 44, 100, 127])
    want = LINEAR(features, kernel, labels.astype(np.int32), chunk_size=70)
    assert_close(LINEAR(features, kernel, labels.astype(dtype), chunk_size=70), want, 0)


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


@pytest.mark.parametrize("shape", [(2048, 512, 32000), (512, 256, 4096), (256, 64, 1000)])
def test_temporaries_are_a_tenth_of_the_logits(shape):
    # Beside the gradients themselves: a step's part of the features' is as large as that.
    positions, depth, classes = shape
    tenth, gradient = positions * classes * 4 / 10, positions * depth * 4
    memory = _compiled(LINEAR, *shape).memory_analysis()
    assert memory.temp_size_in_bytes < tenth + gradient
    plain = _compiled(_plain, *shape).memory_analysis()
    assert plain.temp_size_in_bytes >= 10 * tenth  # that it measures


def test_second_derivatives_do_not_hold_the_logits_either():
    memory = _compiled(LINEAR, 2048, 64, 32000, order=2).memory_analysis()
    assert memory.temp_size_in_bytes < 2048 * 32000 * 4 / 2


def test_residuals_are_the_inputs_and_a_few_numbers_a_position():
    args, labels = _inputs(15, (512,), 8, 300)
    forward = jax.jit(lambda *args: jax.vjp(_total(LINEAR, labels), *args)[1])
    kept = sum(x.nbytes for x in jax.tree.leaves(forward(*args)))
    assert kept <= sum(x.nbytes for x in [*args, labels]) + 8 * 4 * 512


# ---------------------------------------------------------------- meshes


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("inside", [True, False], ids=["grad inside", "grad outside"])
@pytest.mark.parametrize("axes", [("data",), ("data", "seq")])
def test_shard_map_with_the_batch_sharded(check_vma, inside, axes):
    args, labels = _inputs(16, (8, 4))
    shape = (4,) if len(axes) == 1 else (4, 2)
    mesh = Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), axes)
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


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_jit_with_the_batch_sharded(kind):
    args, labels = _inputs(17, (8, 2))
    # One weight for all: a gather by labels that are sharded has to be told its sharding.
    args[3] = args[3][0]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        specs = P("data"), P(), P(), P(), P("data")
        placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(args, specs)]
        y = jax.device_put(labels, NamedSharding(mesh, P("data")))
        got = jax.jit(
            lambda y, *args: jax.value_and_grad(_total(LINEAR, y, chunk_size=3), range(5))(*args)
        )(y, *placed)
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


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("function", [LINEAR, REFERENCE], ids=["ours", "reference"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": jnp.zeros((4, 5), int)}, "features: got dtype int32, wanted a floating"),
        ({"kernel": jnp.zeros((5, 7), int)}, "kernel: got dtype int32, wanted a floating"),
        ({"kernel": jnp.zeros((6, 7))}, r"kernel: got shape \(6, 7\), wanted"),
        ({"kernel": jnp.zeros((5,))}, r"kernel: got shape \(5,\), wanted"),
        ({"kernel": jnp.zeros((1, 5, 7))}, r"kernel: got shape \(1, 5, 7\), wanted"),
        ({"features": jnp.float32(1)}, r"kernel: got shape \(5, 7\), wanted"),
        ({"bias": jnp.zeros(6)}, r"bias: got shape \(6,\), wanted \(7,\)"),
        ({"bias": jnp.zeros((4, 7))}, r"bias: got shape \(4, 7\), wanted \(7,\)"),
        ({"bias": jnp.zeros(7, int)}, "bias: got dtype int32, wanted a floating"),
        ({"labels": jnp.zeros(4)}, "labels: got dtype float32, wanted an integer dtype"),
        ({"labels": jnp.zeros(5, int)}, r"labels: got shape \(5,\), wanted \(4,\)"),
        ({"alpha": jnp.ones(6)}, r"alpha: got shape \(6,\), wanted a scalar or \(7,\)"),
        ({"gamma": -1}, "gamma: got -1, wanted a finite number >= 0"),
        ({"gamma": jnp.ones(3)}, r"gamma: got shape \(3,\), wanted one that broadcasts"),
        ({"where": jnp.ones(4)}, "where: got dtype float32, wanted bool"),
        ({"where": jnp.ones(3, bool)}, r"where: got shape \(3,\), wanted one that broadcasts"),
    ],
)
def test_bad_input(function, changes, message):
    (features, kernel, *_), labels = _inputs(18, (4,))
    arguments = {"features": features, "kernel": kernel, "labels": labels} | changes
    with pytest.raises(ValueError, match=message):
        function(**arguments)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0, "all"])
def test_bad_chunk_sizes(chunk_size):
    (features, kernel, *_), labels = _inputs(19, (4,))
    with pytest.raises(ValueError, match=f"chunk_size: got {chunk_size!r}, wanted None or an"):
        LINEAR(features, kernel, labels, chunk_size=chunk_size)
