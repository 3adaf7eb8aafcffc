"""What training over a vocabulary needs of the heads for integer labels.

The softmax head takes logits, the linear head features and a kernel; here both are functions
of (features, kernel, bias), so that one test holds both to one reference.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, jit
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

import focal_jax
from focal_jax import _linear as _linear_room, reference

pytestmark = pytest.mark.quick

DEPTH, CLASSES, POSITIONS = 5, 12, (4, 3)


def _inputs(seed=0, dtype=np.float32, scale=1.0):
    """Return features, kernel, bias, alpha, gamma and labels, of which one is no class."""
    rng = np.random.default_rng(seed)
    shapes = (*POSITIONS, DEPTH), (DEPTH, CLASSES), (CLASSES,)
    arrays = [scale * rng.normal(size=shape) for shape in shapes]
    arrays += [rng.uniform(0.1, 0.9, CLASSES), rng.uniform(0.2, 4, POSITIONS)]
    labels = jnp.asarray(rng.integers(0, CLASSES, POSITIONS), jnp.int32)
    return [jnp.asarray(x, dtype) for x in arrays], labels


def _linear(features, kernel, bias, labels, **options):
    return focal_jax.linear_softmax_focal_loss_with_integer_labels(
        features, kernel, labels, bias=bias, chunk_size=5, **options
    )


def _softmax(features, kernel, bias, labels, logit_softcap=None, **options):
    assert logit_softcap is None
    logits = jnp.einsum("...d,dc->...c", features, kernel) + bias.reshape((1,) * 2 + (-1,))
    return focal_jax.softmax_focal_loss_with_integer_labels(logits, labels, **options)


def _reference(features, kernel, bias, labels, **options):
    return reference.linear_softmax_focal_loss_with_integer_labels(
        features, kernel, labels, bias=bias, **options
    )


HEADS = [pytest.param(_softmax, id="softmax"), pytest.param(_linear, id="linear")]


def _total(head, labels, **options):
    """Return the sum of squares of all that the head returns, as a function of arrays."""

    def total(features, kernel, bias, alpha, gamma):
        found = head(features, kernel, bias, labels, alpha=alpha, gamma=gamma, **options)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(found))

    return total


def _gradients(head, args, labels, **options):
    return jit(jax.value_and_grad(_total(head, labels, **options), range(5)))(*args)


# ---------------------------------------------------------------- the log-sum-exp


@pytest.mark.parametrize("head", HEADS)
def test_logsumexp_is_that_of_the_logits(head):
    args, labels = _inputs(1, scale=3.0)
    features, kernel, bias, *_ = args
    labels = labels.at[0, 0].set(CLASSES).at[1, 1].set(-3)
    losses, found = head(features, kernel, bias, labels, return_logsumexp=True, ignore_label=-3)
    np.testing.assert_array_equal(losses, head(*args[:3], labels, ignore_label=-3))
    want = jax.nn.logsumexp(jnp.einsum("...d,dc->...c", features, kernel) + bias[None, None], -1)
    assert np.isnan(losses[0, 0])  # no class, which the log-sum-exp does not depend on
    assert_close(found, want.at[1, 1].set(0), 1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_a_z_loss_has_the_gradients_of_its_definition(head):
    args, labels = _inputs(2)
    where = jnp.ones(POSITIONS, bool).at[2].set(False)
    if head is _linear:  # 0 times NaN is NaN in a product that is not the head's own
        args[0] = args[0].at[2].set(jnp.nan)
    options = {"return_logsumexp": True, "where": where}
    assert_close(_gradients(head, args, labels, **options), _z_loss(args, labels, where), 1e-5)


def _z_loss(args, labels, where):
    """Return the same by the definition of the log-sum-exp."""

    def total(features, kernel, bias, alpha, gamma):
        features = jnp.where(where[..., None], features, 0)
        logits = features @ kernel + bias[None, None]
        losses = _reference(features, kernel, bias, labels, alpha=alpha, gamma=gamma)
        both = losses**2 + jax.nn.logsumexp(logits, -1) ** 2
        return jnp.sum(jnp.where(where, both, 0))

    return jit(jax.value_and_grad(total, range(5)))(*args)


@pytest.mark.quick(False)
@pytest.mark.parametrize("margin", [-80.0, 0.0, 12.0, 25.0, 80.0])
def test_logsumexp_keeps_its_digits(margin, x64):
    # Logits around 0, so that nothing but the excess over the largest is left of it.
    logits = np.array([[0.0, -margin, -margin - 1]])
    top = np.max(logits)
    want = top + np.log1p(np.sum(np.sort(np.exp(logits - top))[0, :-1]))
    for label in range(3):
        _, got = focal_jax.softmax_focal_loss_with_integer_labels(
            jnp.asarray(logits, jnp.float32), jnp.array([label]), return_logsumexp=True
        )
        # To the last digit where the label is the largest, else to that of the largest's 1.
        exact = logits[0, label] == top
        np.testing.assert_allclose(got, [want], rtol=1e-6, atol=0 if exact else 1e-7)


# ---------------------------------------------------------------- meshes


def _mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("options", [{}, {"return_logsumexp": True, "logit_softcap": 3.0}], ids=str)
def test_the_classes_of_the_kernel_spread_over_a_mesh(check_vma, options):
    args, labels = _inputs(3)
    specs = P("data"), P(None, "model"), P("model"), P(), P("data")

    def spread(features, kernel, bias, labels, **options):
        alpha, gamma = options.pop("alpha"), options.pop("gamma")

        def local(features, kernel, bias, alpha, gamma, labels):
            return _linear_in_twos(
                *(features, kernel, bias, labels),
                **{"alpha": alpha, "gamma": gamma, "class_axis_name": "model"} | options,
            )

        mapped = jax.shard_map(
            local,
            mesh=_mesh(),
            in_specs=(*specs, P("data")),
            out_specs=P("data"),
            check_vma=check_vma,
        )
        return mapped(features, kernel, bias, alpha, gamma, labels)

    got = _gradients(spread, args, labels, **options)
    assert_close(got, _gradients(_linear, args, labels, **options), 1e-5)


def _linear_in_twos(features, kernel, bias, labels, **options):
    return focal_jax.linear_softmax_focal_loss_with_integer_labels(
        features, kernel, labels, bias=bias, chunk_size=2, **options
    )


def test_the_gradient_inside_of_the_mesh():
    args, labels = _inputs(4)
    specs = P("data"), P(None, "model"), P("model"), P(), P("data")

    def local(features, kernel, bias, alpha, gamma, labels):
        total = _total(_linear_in_twos, labels, class_axis_name="model", return_logsumexp=True)
        return jax.grad(total, range(5))(features, kernel, bias, alpha, gamma)

    mapped = jax.shard_map(local, mesh=_mesh(), in_specs=(*specs, P("data")), out_specs=specs)
    want = _gradients(_linear, args, labels, return_logsumexp=True)[1]
    assert_close(jit(mapped)(*args, labels), want, 1e-5)


@pytest.mark.quick(False)
def test_spread_classes_cross_the_network_as_numbers_per_position():
    features, kernel, labels = jnp.ones((64, 32)), jnp.ones((32, 1024)), jnp.zeros(64, jnp.int32)

    def local(features, kernel, labels):
        head = focal_jax.linear_softmax_focal_loss_with_integer_labels
        return head(features, kernel, labels, class_axis_name="model")

    mapped = jax.shard_map(
        local,
        mesh=_mesh(),
        in_specs=(P("data"), P(None, "model"), P("data")),
        out_specs=P("data"),
    )
    total = jax.grad(lambda *args: jnp.sum(mapped(*args)), (0, 1))
    text = jax.jit(total).lower(features, kernel, labels).compile().as_text()
    reduced = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    shapes = [shape for types in reduced for shape in re.findall(r"\w+\[([\d,]*)\]", types)]
    sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
    # Over the classes three numbers a position and the features' gradient, over the batch the
    # kernel's slice.
    assert sorted(sizes) == sorted([32] * 3 + [32 * 32] + [32 * 256])
    assert not re.search("all-gather|all-to-all|collective-permute", text)


def test_features_that_vary_over_the_class_axis_are_refused():
    (features, kernel, *_), labels = _inputs(5)

    def local(features, kernel, labels):
        head = focal_jax.linear_softmax_focal_loss_with_integer_labels
        return head(features, kernel, labels, class_axis_name="model")

    specs = P("model"), P(None, "model"), P()
    mapped = jax.shard_map(local, mesh=_mesh(), in_specs=specs, out_specs=P())
    with pytest.raises(ValueError, match="features: got values that vary over"):
        mapped(features, kernel, labels[:1])


def test_slices_that_do_not_divide_the_classes_are_refused():
    (features, kernel, bias, alpha, _), labels = _inputs(6)
    specs = P(None, "model"), P("model")

    def spread(kernel, bias):
        def local(kernel, bias):
            return _linear(features, kernel, bias, labels, class_axis_name="model", alpha=alpha)

        mapped = jax.shard_map(local, mesh=_mesh(), in_specs=specs, out_specs=P())
        return mapped(kernel, bias)

    with pytest.raises(ValueError, match="divisible"):
        spread(kernel[:, :-1], bias[:-1])
    # Equally long, they are counted: alpha has a weight for each of the classes of them all.
    with pytest.raises(ValueError, match=r"alpha: got shape \(12,\), wanted"):
        spread(kernel[:, :-4], bias[:-4])


@pytest.mark.parametrize("name", ["kernel", "bias"])
def test_classes_spread_over_an_explicit_mesh_are_refused_in_words(name):
    (features, kernel, bias, *_), labels = _inputs(6)
    with jax.set_mesh(_mesh(AxisType.Explicit)):
        if name == "kernel":
            kernel = jax.device_put(kernel, P(None, "model"))
        else:
            bias = jax.device_put(bias, P("model"))
        with pytest.raises(ValueError, match=f"{name}: got classes that are spread over"):
            _linear(features, kernel, bias, labels)


def test_a_class_axis_that_is_not_bound():
    (features, kernel, bias, *_), labels = _inputs(7)
    for head in (_linear, _reference):
        with pytest.raises(NameError, match="vocabulary"):
            head(features, kernel, bias, labels, class_axis_name="vocabulary")


# ---------------------------------------------------------------- the soft cap


def test_softcap_is_a_tanh_before_all_else():
    args, labels = _inputs(8, scale=2.0)
    got = _gradients(_linear, args, labels, logit_softcap=3.0)
    assert_close(got, _gradients(_reference, args, labels, logit_softcap=3.0), 1e-4)

    def by_hand(features, kernel, bias, labels, **options):
        logits = 3.0 * jnp.tanh((features @ kernel + bias[None, None]) / 3.0)
        return focal_jax.softmax_focal_loss_with_integer_labels(logits, labels, **options)

    assert_close(got, _gradients(by_hand, args, labels), 1e-5)


def test_softcap_keeps_the_digits_of_a_saturated_slope(x64):
    # 1 - tanh(10)**2 is 8e-9: as a difference it would be 0 in float32.
    kernel, labels = np.array([[30.0, 0.0]]), jnp.array([1])

    def gradient(dtype):
        def total(features):
            return jnp.sum(
                focal_jax.linear_softmax_focal_loss_with_integer_labels(
                    features, jnp.asarray(kernel, dtype), labels, gamma=0, logit_softcap=3.0
                )
            )

        return jax.grad(total)(jnp.ones((1, 1), dtype))

    np.testing.assert_allclose(gradient(np.float32), gradient(np.float64), rtol=1e-5)


def test_higher_derivatives_through_the_softcap(x64):
    args, labels = _inputs(9, np.float64)
    args[0] = args[0].at[0].set(0)  # where an absolute value would have a kink
    options = {"logit_softcap": 3.0, "return_logsumexp": True}
    direction = jax.tree.map(jnp.cos, args)

    def third(head):
        along = _total(head, labels, **options)
        for _ in range(2):
            along = _derivative(along, direction)
        return jit(jax.grad(along))(*args)

    assert_close(third(_linear), third(_reference), 1e-8)


def _derivative(function, direction):
    """Return the derivative along a direction, by reverse mode."""

    def along(*args):
        gradient = jax.grad(function, range(len(args)))(*args)
        return sum(jnp.vdot(g, v) for g, v in zip(gradient, direction))

    return along


def test_a_class_switched_off_by_its_bias_stays_off_under_a_softcap():
    args, labels = _inputs(10)
    args[2] = args[2].at[7].set(-jnp.inf)
    value, gradients = _gradients(_linear, args, labels * 0, logit_softcap=2.0)
    assert np.isfinite(value)
    assert np.all(gradients[1][:, 7] == 0)


@pytest.mark.parametrize("value", [0, 0.0, -3.0, np.nan, np.inf, True, "30"])
def test_a_softcap_that_is_none(value):
    (features, kernel, bias, *_), labels = _inputs()
    for head in (_linear, _reference):
        with pytest.raises(
            ValueError, match=r"logit_softcap: got .*, wanted (None or a|a finite) number"
        ):
            head(features, kernel, bias, labels, logit_softcap=value)


# ---------------------------------------------------------------- label smoothing


def _soft(features, kernel, bias, labels, *, label_smoothing, ignore_label=None, **options):
    """Return the losses of labels that are smoothed by hand."""
    logits = jnp.einsum("...d,dc->...c", features, kernel) + bias[None, None]
    one_hot = jax.nn.one_hot(labels, CLASSES, dtype=logits.dtype)
    smooth = (1 - label_smoothing) * one_hot + label_smoothing / CLASSES
    where = None if ignore_label is None else labels != ignore_label
    return focal_jax.softmax_focal_loss(logits, smooth, where=where, **options)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("smoothing", [1e-3, 0.1, 0.9])
def test_smoothing_is_that_of_the_labels(head, smoothing):
    args, labels = _inputs(11, scale=2.0)
    options = {"label_smoothing": smoothing, "ignore_label": int(labels[0, 0])}
    got = _gradients(head, args, labels, **options)
    assert_close(got, _gradients(_soft, args, labels, **options), 1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_smoothing_has_the_formula_of_the_reference(head, x64):
    args, labels = _inputs(11, np.float64, scale=2.0)
    options = {"label_smoothing": 0.01, "ignore_label": int(labels[0, 0])}
    want = _gradients(_reference, args, labels, **options)
    assert_close(_gradients(head, args, labels, **options), want, 1e-9)


@pytest.mark.quick(False)
@pytest.mark.parametrize("gamma", [0, 0.5, 1, 1.3, 2.0, 3, 5])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_smoothing_from_margin_minus_80_to_80(gamma, dtype):
    margins = np.array([-80, -30, -17, -10, -3, -1, 0, 0.5, 2, 6, 12, 17, 30, 80], np.float32)
    logits = jnp.stack([margins, jnp.zeros(margins.size), jnp.full(margins.size, -1.0)], 1)
    logits, labels = logits.astype(dtype), jnp.zeros(margins.size, jnp.int32)
    smooth = 0.9 * jax.nn.one_hot(labels, 3) + 0.1 / 3

    def both(loss, labels, **options):
        total = lambda z: jnp.sum(loss(z, labels, gamma=gamma, **options))  # noqa: E731
        losses = loss(logits, labels, gamma=gamma, **options)
        return losses, jax.grad(total)(logits).astype(np.float32)

    head = focal_jax.softmax_focal_loss_with_integer_labels
    got = both(head, labels, label_smoothing=0.1)
    want = both(focal_jax.softmax_focal_loss, smooth)
    assert_close(got[0], want[0], 1e-5, 0)
    tolerance = 1e-5 if dtype is np.float32 else 0.01
    assert_close(got[1], want[1], tolerance, 1e-7)


@pytest.mark.parametrize("head", HEADS)
def test_second_derivatives_of_smoothed_losses(head, x64):
    args, labels = _inputs(12, np.float64)
    direction = jax.tree.map(jnp.cos, args)

    def second(head):
        total = _total(head, labels, label_smoothing=0.2)
        return jit(jax.grad(_derivative(total, direction), range(5)))(*args)

    assert_close(second(head), second(_reference), 1e-8)


@pytest.mark.parametrize("head", HEADS)
def test_a_smoothed_label_that_is_no_class_is_nan_at_its_position_only(head):
    args, labels = _inputs(13)
    bad = labels.at[1, 2].set(CLASSES)
    features, kernel, bias, *_ = args

    def losses(features, labels):
        return head(features, kernel, bias, labels, label_smoothing=0.1)

    assert np.array_equal(np.isnan(losses(features, bad)), bad == CLASSES)
    gradient = jax.grad(lambda x: jnp.sum(losses(x, bad)))(features)
    want = jax.grad(lambda x: jnp.sum(losses(x, labels)))(features)
    assert_close(gradient, want.at[1, 2].set(jnp.nan), 1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_a_class_that_is_off_counts_only_with_its_weight(head):
    args, labels = _inputs(14)
    features, kernel, bias, alpha, _ = args
    labels, bias = labels % 7, bias.at[7].set(-jnp.inf)
    assert np.all(np.isinf(head(features, kernel, bias, labels, label_smoothing=0.1)))

    def total(features, kernel, bias, alpha):
        options = {"alpha": alpha.at[7].set(0), "label_smoothing": 0.1}
        return jnp.sum(head(features, kernel, bias, labels, **options))

    value, gradients = jax.value_and_grad(total, range(4))(features, kernel, bias, alpha)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in gradients)
    assert np.all(gradients[1][:, 7] == 0)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_smoothing_with_the_classes_spread(head, check_vma):
    args, labels = _inputs(15)
    specs = P("data"), P(None, "model"), P("model"), P(), P("data"), P("data")

    def spread(features, kernel, bias, labels, *, alpha, gamma, **options):
        def local(features, kernel, bias, alpha, gamma, labels):
            options = {"alpha": alpha, "gamma": gamma, "label_smoothing": 0.1}
            return head(features, kernel, bias, labels, class_axis_name="model", **options)

        mapped = jax.shard_map(
            local, mesh=_mesh(), in_specs=specs, out_specs=P("data"), check_vma=check_vma
        )
        return mapped(features, kernel, bias, alpha, gamma, labels)

    want = _gradients(head, args, labels, label_smoothing=0.1)
    assert_close(_gradients(spread, args, labels), want, 1e-5)


def test_the_reference_spreads_smoothed_classes():
    args, labels = _inputs(16)
    features, kernel, bias, alpha, _ = args
    options = {"alpha": alpha, "label_smoothing": 0.1, "return_logsumexp": True}
    mapped = jax.shard_map(
        lambda k, b: _reference(features, k, b, labels, class_axis_name="model", **options),
        mesh=_mesh(),
        in_specs=(P(None, "model"), P("model")),
        out_specs=P(),
    )
    assert_close(mapped(kernel, bias), _reference(features, kernel, bias, labels, **options), 1e-5)


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, np.nan, True, "0.1", None])
def test_a_smoothing_that_is_none(value):
    (features, kernel, bias, *_), labels = _inputs()
    for head in (_linear, _softmax, _reference):
        with pytest.raises(ValueError, match=r"label_smoothing: got .*, wanted a number in"):
            head(features, kernel, bias, labels, label_smoothing=value)


# ---------------------------------------------------------------- memory


def _compiled(head, shape, **options):
    positions, classes = shape
    logits = jax.ShapeDtypeStruct((positions, classes), jnp.float32)
    labels = jnp.zeros(positions, jnp.int32)
    return jax.jit(jax.grad(lambda z: jnp.sum(head(z, labels, **options)))).lower(logits).compile()


@pytest.mark.quick(False)
def test_smoothing_makes_no_one_hot():
    head = focal_jax.softmax_focal_loss_with_integer_labels
    smooth = _compiled(head, (256, 4096), label_smoothing=0.1).memory_analysis()
    without = _compiled(head, (256, 4096)).memory_analysis()
    logits = 256 * 4096 * 4
    assert smooth.temp_size_in_bytes < without.temp_size_in_bytes + 1.1 * logits


@pytest.mark.quick(False)
def test_smoothing_of_0_is_no_other_program():
    head = focal_jax.softmax_focal_loss_with_integer_labels
    texts = [
        re.sub("metadata={[^}]*}", "", _compiled(head, (8, 32), **options).as_text())
        for options in ({}, {"label_smoothing": 0.0})
    ]
    assert texts[0] == texts[1]


# ---------------------------------------------------------------- the sums in one pass


@pytest.mark.parametrize(
    "logits",
    [
        [0.0, 1.0, 2.0, 3.0, 2.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 60.0, 0.0, 0.0, 30.0],  # up by almost what is allowed, and down
        [0.0, 0.0, 0.0, 1e3, 1.0, 1e4, 0.0],  # by more
        [0.0, 0.0, 0.0, -1e4, 0.0, 100.0, 99.0],
        [-np.inf, -np.inf, -np.inf, 3.0, 4.0, -np.inf, 5.0],  # nothing to begin from
        [-1e30, 1e30, 0.0, 0.0, 0.0, 0.0, 0.0],
    ],
    ids=str,
)
@pytest.mark.parametrize("label", [0, 3, 6, 7])
def test_the_sums_in_one_pass_are_those_in_passes(logits, label):
    how = _linear_room._How(size=2, softcap=None)
    # The logits come by the bias, at a second position with something added.
    features, kernel = jnp.array([[0.0], [1.0]]), jnp.cos(jnp.arange(7.0))[None]
    place = jnp.full((2, 1), label, jnp.int32)

    def sums(form):
        def total(features, kernel, bias):
            args = _linear_room._Args(features, kernel, bias, place, None)
            top, true, rest = form(how, args)
            return jnp.sum(jnp.log1p(rest)) + jnp.sum(jnp.cos(true - top)), (top, true, rest)

        # Differentiated by JAX, as the second derivatives have it.
        gradients = jit(jax.grad(total, range(3), has_aux=True))
        return gradients(features, kernel, jnp.array(logits))

    few = _linear_room._chunk
    try:
        # All seven classes would be the few to begin from.
        _linear_room._chunk = lambda how, args, size, start: few(how, args, min(size, 2), start)
        got = sums(_linear_room._in_one_pass)
    finally:
        _linear_room._chunk = few
    assert_close(got, sums(_linear_room._in_passes), 1e-6)


def test_mapped_examples_share_the_condition_of_the_sums():
    how = _linear_room._How(size=2, softcap=None)
    features, kernel = jnp.ones((3, 2, 1)), jnp.cos(jnp.arange(7.0))[None]
    place = jnp.full((2, 1), 3, jnp.int32)
    # Nothing jumps in the first example, far too much in the second, something in the third.
    biases = jnp.zeros((3, 7)).at[1, 5].set(1e3).at[2, 5].set(20.0)

    def sums(form):
        def of_one(features, bias):
            top, true, rest = form(how, _linear_room._Args(features, kernel, bias, place, None))
            return jnp.sum(true - top - jnp.log1p(rest))

        return jax.vmap(jax.value_and_grad(of_one, (0, 1)))

    few = _linear_room._chunk
    try:
        _linear_room._chunk = lambda how, args, size, start: few(how, args, min(size, 2), start)
        got = jax.jit(sums(_linear_room._in_one_pass))
        assert " cond[" in str(jax.make_jaxpr(got)(features, biases))
        found = got(features, biases)
    finally:
        _linear_room._chunk = few
    assert_close(found, sums(_linear_room._in_passes)(features, biases), 1e-6)


# ---------------------------------------------------------------- sixteen bits


@pytest.mark.quick(False)
@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999])
def test_the_true_classs_gradient_in_bfloat16(probability, x64):
    rng = np.random.default_rng(17)
    features, kernel = (
        jnp.asarray(rng.normal(size=shape) / 4, jnp.bfloat16) for shape in ((32, 64), (64, 50))
    )
    exact = np.asarray(features, np.float64) @ np.asarray(kernel, np.float64)
    labels = jnp.asarray(rng.integers(0, 50, 32), jnp.int32)
    own = np.eye(50, dtype=bool)[labels]
    others = np.log(np.sum(np.where(own, 0, np.exp(exact)), 1))
    # A shift of the true logit gives it the probability; in bfloat16, and so the same for all.
    shift = np.log(probability / (1 - probability)) + others - exact[own]
    shifts = jnp.asarray(np.where(own, shift[:, None], 0), jnp.bfloat16)

    def ours(shift, x, label):
        head = focal_jax.linear_softmax_focal_loss_with_integer_labels
        return head(x, kernel, label, bias=shift)

    def plain(shift, x, label):
        log_p = jax.nn.log_softmax(x @ kernel + shift)[label]
        return -((1 - jnp.exp(log_p)) ** 2) * log_p

    def slopes(loss, shifts):
        return jax.jit(jax.vmap(jax.grad(loss)))(shifts, features, labels)[own]

    logits = exact + np.asarray(shifts, np.float64)
    rest = np.sum(np.where(own, 0, np.exp(logits - logits[own][:, None])), 1)
    p, q = 1 / (1 + rest), rest / (1 + rest)
    want = -(q**2) * (q + 2 * p * np.log1p(rest))

    def error(got):
        return np.max(np.abs(np.asarray(got, np.float64) / want - 1))

    rounding = float(jnp.finfo(jnp.bfloat16).eps) / 2
    assert error(slopes(ours, shifts)) <= 1.01 * rounding < error(slopes(plain, shifts))
    assert error(slopes(ours, shifts.astype(jnp.float32))) < 1e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_smoothed_gradient_in_sixteen_bits_is_two_and_their_sum(dtype):
    rng = np.random.default_rng(18)
    arrays = rng.normal(size=(64, 256)), rng.normal(size=(256, 300)) / 16
    arrays = [jnp.asarray(x, dtype) for x in arrays]
    labels = jnp.asarray(rng.integers(0, 300, 64), jnp.int32)

    def smoothed(features, kernel):
        head = focal_jax.linear_softmax_focal_loss_with_integer_labels
        return jnp.sum(head(features, kernel, labels, label_smoothing=0.3))

    def of_every_class(features, kernel):
        logits = features @ kernel
        n = lax.stop_gradient(jax.nn.logsumexp(logits, -1, keepdims=True)) - logits
        return 0.3 / 300 * jnp.sum((1 - jnp.exp(-n)) ** 2 * n)

    exact = [x.astype(np.float32) for x in arrays]
    got, want = (jax.jit(jax.grad(smoothed, (0, 1)))(*x) for x in (arrays, exact))
    rounding = 0.51 * float(jnp.finfo(dtype).eps)
    for a, b, part in zip(got, want, jax.jit(jax.grad(of_every_class, (0, 1)))(*exact)):
        terms = np.abs(part) + np.abs(b - part) + np.abs(b)
        error = np.abs(a.astype(np.float32) - b)
        assert np.all(error <= rounding * terms + 1e-6)
        assert np.any(error > rounding * np.abs(b) + 1e-6)  # else once would be true, and better
