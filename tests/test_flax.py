"""Tests of the Flax modules: tests of both frameworks, then of linen, then of nnx."""

import functools
import inspect
import itertools
import pydoc
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import focal_jax
import focal_jax.linen
import focal_jax.nnx
from focal_jax import InputError, engine
from focal_jax.catalogue import LOSSES

pytestmark = pytest.mark.quick

ALPHA = jnp.array([0.2, 0.5, 0.3])


@pytest.fixture(params=[focal_jax.linen, focal_jax.nnx], ids=lambda module: module.__name__)
def framework(request):
    return request.param


@pytest.fixture(scope="module")
def data():
    """Return logits of 20 positions and 3 classes, and integer labels."""
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], (4, 5, 3)), jax.random.randint(keys[1], (4, 5), 0, 3)


# ---------------------------------------------------------------- the named modules


def test_softmax_module_passes_options_to_loss_and_reduction(framework, data):
    logits, labels = data
    where = jnp.arange(5) > 0
    module = framework.SoftmaxFocalLoss(
        alpha=ALPHA, gamma=1.5, axis=1, ignore_label=2, normalization="valid", loss_weight=3.0
    )
    actual = module(jnp.moveaxis(logits, -1, 1), labels, where=where)
    losses = focal_jax.softmax_focal_loss_with_integer_labels(
        logits, labels, alpha=ALPHA, gamma=1.5
    )
    valid = np.asarray(where) & (np.asarray(labels) != 2)
    assert 0 < valid.sum() < where.sum() * 4
    np.testing.assert_allclose(actual, 3 * np.asarray(losses)[valid].mean(), rtol=1e-6)


def test_ignored_positions_may_hold_nan(framework, data):
    logits, labels = data
    labels = labels.at[0].set(-1).astype(jnp.int8)
    actual = framework.SoftmaxFocalLoss(ignore_label=-1)(logits.at[0].set(jnp.nan), labels)
    expected = framework.SoftmaxFocalLoss()(logits[1:], labels[1:])
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_softmax_module_takes_distributions(framework, data):
    logits, labels = data
    soft = optax.smooth_labels(jax.nn.one_hot(labels, 3), 0.1)
    actual = framework.SoftmaxFocalLoss(alpha=ALPHA, normalization="batch_size")(logits, soft)
    losses = focal_jax.softmax_focal_loss(logits, soft, alpha=ALPHA)
    np.testing.assert_allclose(actual, losses.sum() / 4, rtol=1e-6)


def test_sigmoid_module_passes_options_to_loss_and_reduction(framework, data):
    logits, labels = data[0], data[0] > 0.5
    where = data[1] > 0
    module = framework.SigmoidFocalLoss(alpha=0.25, gamma=3, normalization=7.0, loss_weight=0.5)
    losses = focal_jax.sigmoid_focal_loss(logits, labels, alpha=0.25, gamma=3)
    valid = np.broadcast_to(where[..., None], losses.shape)
    np.testing.assert_allclose(
        module(logits, labels, where=where[..., None]),
        np.asarray(losses)[valid].sum() / 14,
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", ["SigmoidFocalLoss", "SoftmaxFocalLoss"])
def test_gamma_of_the_call_replaces_gamma_of_the_module(framework, data, name):
    logits = data[0]
    soft = jax.nn.softmax(logits[::-1])
    schedule = optax.linear_schedule(0.0, 2.0, 10)
    make = getattr(framework, name)

    @jax.jit
    def loss_at(step):
        return make(gamma=5.0)(logits, soft, gamma=schedule(step))

    for step, gamma in ((0, 0.0), (5, 1.0), (10, 2.0)):
        expected = make(gamma=gamma)(logits, soft)
        np.testing.assert_allclose(loss_at(jnp.int32(step)), expected, rtol=1e-5)
    assert jnp.isfinite(jax.grad(loss_at)(5.0))


def test_mean_over_mapped_axis_equals_result_of_one_device(framework, data):
    logits, labels = data
    mapped = framework.SoftmaxFocalLoss(ignore_label=0, axis_name="batch")
    losses = jax.vmap(mapped, axis_name="batch")(logits, labels)
    expected = framework.SoftmaxFocalLoss(ignore_label=0)(logits, labels)
    np.testing.assert_allclose(losses.mean(), expected, rtol=1e-6)


@pytest.mark.parametrize("normalization", ["valid", "batch_size"])
def test_weights_are_passed_to_the_reduction(framework, data, normalization):
    logits, labels = data
    weights = jax.random.uniform(jax.random.key(2), labels.shape)
    module = framework.SoftmaxFocalLoss(normalization=normalization, ignore_label=1)
    losses = focal_jax.softmax_focal_loss_with_integer_labels(logits, labels, ignore_label=1)
    valid = np.asarray(labels) != 1
    denominator = np.sum(weights, where=valid) if normalization == "valid" else 4
    np.testing.assert_allclose(
        module(logits, labels, weights=weights),
        jnp.sum(weights * losses) / denominator,
        rtol=1e-6,
    )
    weights = weights[..., None]
    losses = focal_jax.sigmoid_focal_loss(logits, logits > 0)
    np.testing.assert_allclose(
        framework.SigmoidFocalLoss(normalization="sum")(logits, logits > 0, weights=weights),
        jnp.sum(weights * losses),
        rtol=1e-6,
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", ["SigmoidFocalLoss", "SoftmaxFocalLoss"])
def test_dtypes(framework, dtype, name, x64):
    module = getattr(framework, name)(alpha=np.float64([0.3, 0.7]), loss_weight=np.float64([2])[0])
    logits = jnp.ones((3, 2), dtype)
    loss, grad = jax.eval_shape(jax.value_and_grad(module), logits, logits)
    chex.assert_shape(loss, ())
    assert loss.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    assert grad.dtype == dtype


# ---------------------------------------------------------------- arrays as options


def test_arrays_are_constants_that_hash_and_keep_their_values(framework):
    alpha = jax.random.uniform(jax.random.key(0), (2, 3))
    module = framework.SigmoidFocalLoss(
        alpha=alpha, gamma=np.array([1, 2, 3]), loss_weight=jnp.array(2.0), normalization="sum"
    )
    assert hash(module) == hash(module)
    assert not isinstance(module.alpha, np.ndarray | jax.Array)
    assert hash(module.alpha) == hash(framework.SigmoidFocalLoss(alpha=alpha).alpha)
    assert np.asarray(module.gamma).tolist() == [1, 2, 3]
    assert module.loss_weight == 2.0
    chex.assert_trees_all_equal(jnp.array(module.alpha), alpha)
    logits = jnp.ones((2, 3))
    expected = 2 * focal_jax.sigmoid_focal_loss(
        logits, logits, alpha=alpha, gamma=jnp.array([1.0, 2.0, 3.0])
    )
    np.testing.assert_allclose(module(logits, logits), expected.sum(), rtol=1e-6)


def test_a_module_does_not_change_with_the_array_it_was_made_from(framework):
    alpha = np.array([0.25, 0.75])
    module = framework.SigmoidFocalLoss(alpha=alpha)
    alpha[:] = 0.0
    assert np.asarray(module.alpha).tolist() == [0.25, 0.75]


def test_traced_alpha_is_differentiated(framework, data):
    def module_loss(alpha):
        return framework.SoftmaxFocalLoss(alpha=alpha, normalization="sum")(*data)

    def function_loss(alpha):
        return focal_jax.softmax_focal_loss_with_integer_labels(*data, alpha=alpha).sum()

    def list_loss(alpha):
        return framework.SoftmaxFocalLoss(alpha=list(alpha), normalization="sum")(*data)

    expected = jax.value_and_grad(function_loss)(ALPHA)
    for loss in (module_loss, list_loss):
        actual = jax.jit(jax.value_and_grad(loss))(ALPHA)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, np.ndarray.tolist, tuple])
def test_construction_with_many_class_weights_is_fast(framework, kind):
    alpha = kind(np.linspace(0.5, 1.5, 131_072, dtype=np.float32))
    make = (
        framework.SoftmaxFocalLoss,
        functools.partial(framework.Reduced, "softmax_focal_loss_with_integer_labels"),
    )

    def seconds(make):
        start = time.process_time()
        module = make(alpha=alpha)
        hash(module)
        assert module == module
        return time.process_time() - start

    # A construction takes 1 to 30 ms.
    for each in make:
        assert min(seconds(each) for _ in range(3)) < 0.2


# ---------------------------------------------------------------- signatures

REDUCTION = {"normalization": "valid", "loss_weight": 1.0, "axis_name": None}
FOCAL = {"alpha": None, "gamma": 2.0, **REDUCTION}
CALL = ["logits", "labels", "where", "weights", "gamma"]


def _defaults(function):
    parameters = inspect.signature(function).parameters
    return {name: x.default for name, x in parameters.items() if x.default is not x.empty}


@pytest.mark.parametrize(
    ("name", "options", "call"),
    [
        ("SigmoidFocalLoss", FOCAL, CALL),
        ("SoftmaxFocalLoss", FOCAL | {"axis": -1, "ignore_label": None}, CALL),
        ("Reduced", REDUCTION, ["arrays", "weights", "options"]),
    ],
)
def test_signatures_of_constructor_and_call(framework, name, options, call):
    cls = getattr(framework, name)
    defaults = _defaults(cls)
    assert {name: defaults.pop(name) for name in options} == options
    assert set(defaults) <= {"parent", "name"}  # the fields of every linen module
    module = cls("sigmoid_focal_loss") if name == "Reduced" else cls()
    assert list(inspect.signature(module).parameters) == call
    help_text = pydoc.plain(pydoc.render_doc(cls))
    signature = help_text.partition(f" {name}(")[2].partition("Reduce ")[0]
    assert all(f"{option}:" in signature for option in options)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "labels", "message"),
    [
        ({}, jnp.zeros((2, 3), bool), "labels: got dtype bool"),
        ({}, jnp.zeros(2), "labels: got shape"),
        ({}, jnp.zeros((2, 3), int), "labels: got shape"),
        ({"ignore_label": -1}, jnp.zeros((2, 3)), "labels: .* ignore_label"),
        ({"alpha": jnp.ones(4)}, jnp.zeros(2, int), "alpha: got shape"),
        ({"axis": 2}, jnp.zeros(2, int), "axis: got 2"),
    ],
)
def test_errors_of_the_call_name_the_argument(framework, options, labels, message):
    module = framework.SoftmaxFocalLoss(**options)
    with pytest.raises(InputError, match=message):
        module(jnp.zeros((2, 3)), labels)


LINEAR = "linear_softmax_focal_loss_with_integer_labels"
INVALID = [
    ({"gamma": -1}, "gamma: got -1"),
    ({"gamma": jnp.array(-1.0)}, "gamma: got -1"),
    ({"gamma": "2"}, "gamma: got '2'"),
    ({"gamma": None}, "gamma: got None"),
    ({"alpha": {"positive": 1}}, "alpha: got {'positive': 1}"),
    ({"normalization": "median"}, "normalization: got 'median'"),
    ({"normalization": "none"}, "normalization: got 'none'.*'sum'"),
    ({"normalization": None}, "normalization: got None"),
    ({"normalization": (1, 2)}, r"normalization: got shape \(2,\)"),
    ({"loss_weight": jnp.ones(2)}, r"loss_weight: got shape \(2,\)"),
    ({"loss_weight": "1"}, "loss_weight: got '1'"),
    ({"loss_weight": float("nan")}, "loss_weight: got nan"),
    ({"normalization": -1}, "normalization: got -1"),
]


@pytest.mark.parametrize(("options", "message"), INVALID)
def test_constructors_reject_invalid_options(framework, options, message):
    for make in (
        framework.SoftmaxFocalLoss,
        framework.SigmoidFocalLoss,
        functools.partial(framework.Reduced, "sigmoid_focal_loss"),
    ):
        with pytest.raises(InputError, match=message):
            make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": 1.0}, "axis: got 1.0"),
        ({"ignore_label": 0.5}, "ignore_label: got 0.5"),
        ({"ignore_label": "void"}, "ignore_label: got 'void'"),
    ],
)
def test_constructors_reject_invalid_options_of_softmax(framework, options, message):
    for make in (
        framework.SoftmaxFocalLoss,
        functools.partial(framework.Reduced, "softmax_focal_loss_with_integer_labels"),
    ):
        with pytest.raises(InputError, match=message):
            make(**options)


def test_masks_of_bound_arguments(framework, data):
    logits, labels = data
    bound = functools.partial(
        focal_jax.softmax_focal_loss_with_integer_labels, axis=1, ignore_label=2
    )
    logits = jnp.moveaxis(logits, -1, 1)
    losses = framework.Reduced(bound)(logits, labels)
    assert losses == framework.SoftmaxFocalLoss(axis=1, ignore_label=2)(logits, labels)
    region = functools.partial(focal_jax.focal_tversky_loss, smooth=0.5)
    one_hot = jax.nn.one_hot(labels, 3, axis=1)
    got = framework.Reduced(region, axis=1)(logits, one_hot, where=labels > 0)
    losses = region(logits, one_hot, axis=1, where=labels > 0)
    np.testing.assert_allclose(got, losses.mean(), rtol=1e-6)
    pairs = functools.partial(bound, return_logsumexp=True)
    with pytest.raises(InputError, match="losses: got a tuple of arrays"):
        framework.Reduced(pairs)(logits, labels)


def test_very_deep_lists(framework):
    deep = [1.0]
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InputError, match="alpha: got list"):
        framework.SoftmaxFocalLoss(alpha=deep)


def test_wide_labels_are_not_the_smallest_ignore_label(framework):
    loss = framework.SoftmaxFocalLoss(ignore_label=-(2**31))
    assert jnp.isnan(loss(jnp.zeros((2, 3)), np.array([2**40, 1])))


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("asymmetric_loss", {"margin": 1.5}, "margin: got 1.5"),
        ("gaussian_focal_loss", {"beta": -1}, "beta: got -1"),
        ("sigmoid_focal_loss_star", {"gamma": 0}, "gamma: got 0"),
        ("varifocal_loss", {"stop_weight_gradient": 1}, "stop_weight_gradient: got 1"),
        ("focal_tversky_loss", {"gamma": -0.5}, "gamma: got -0.5"),
        ("distribution_focal_loss", {"axis": "a"}, "axis: got 'a'"),
        ("softmax_focal_loss_with_integer_labels", {"label_smoothing": 1.0}, "label_smoothing: "),
        ("softmax_focal_loss_with_integer_labels", {"alpha": np.ones((2, 2))}, "alpha: got shape"),
        (LINEAR, {"logit_softcap": -1}, "logit_softcap: "),
        (LINEAR, {"return_logsumexp": True}, "return_logsumexp: got True"),
        (LINEAR, {"temperature": -1.0}, "temperature: got -1"),
        (LINEAR, {"temperature": [jnp.ones(2), jnp.ones(3)]}, "temperature: got"),
        (LINEAR, {"chunk_size": 0}, "chunk_size: got 0"),
        ("focal_loss", {}, "loss: got 'focal_loss', wanted a function or one of"),
        (max, {}, "loss: got <built-in function max>, wanted a Python function"),
    ],
)
def test_reduced_rejects_invalid_options_of_its_loss(framework, loss, options, message):
    with pytest.raises(InputError, match=message):
        framework.Reduced(loss, **options)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("focal_loss", {}, "loss: got 'focal_loss', wanted a function or one of .*'sigmoid_focal"),
        ("reduce_loss", {}, "loss: got 'reduce_loss'"),
        (None, {}, "loss: got None"),
        ("sigmoid_focal_loss", {"axis": 1}, r"axis: got an option .* wanted one of \['alpha', 'ga"),
        ("sigmoid_focal_loss", {"gama": 1}, "gama: got an option that sigmoid_focal_loss does not"),
    ],
)
def test_reduced_rejects_unknown_losses_and_options(framework, loss, options, message):
    with pytest.raises(InputError, match=message):
        framework.Reduced(loss, **options)
    if options:
        with pytest.raises(InputError, match=message):
            framework.Reduced(loss)(jnp.zeros(2), jnp.zeros(2), **options)


def test_reduced_rejects_a_positional_argument_given_by_keyword(framework, data):
    logits, labels = data
    loss = framework.Reduced("softmax_focal_loss_with_integer_labels", ignore_label=1)
    with pytest.raises(InputError, match="labels: got a keyword argument, wanted a positional"):
        loss(logits, labels=labels)


def test_reduced_rejects_too_many_arrays(framework, data):
    logits, labels = data
    with pytest.raises(InputError, match=r"softmax_focal_loss.*: too many positional arguments"):
        framework.Reduced("softmax_focal_loss_with_integer_labels")(logits, labels, labels)


def test_error_names_an_invalid_mask_beside_an_ignore_label(framework):
    with pytest.raises(InputError, match="where: got shape"):
        framework.SoftmaxFocalLoss(ignore_label=0)(
            jnp.zeros((2, 3)), jnp.zeros(2, int), where=jnp.ones(3, bool)
        )


# ---------------------------------------------------------------- Reduced


@pytest.mark.parametrize("name", LOSSES)
def test_reduced_takes_the_options_of_any_loss(framework, name):
    loss = LOSSES[name]
    numbers = {k: max(option.low, 0.0) + 0.5 for k, option in loss.numbers.items()}
    per_class = {k: (x,) * 5 for k, x in numbers.items() if loss.options[k].per_class}
    framework.Reduced(name, **numbers)
    framework.Reduced(name, **numbers | per_class)
    if loss.has_class_axis and loss.kind != "linear":
        framework.Reduced(name, axis=-3, **per_class)


def test_bias_of_the_linear_loss(framework):
    features, kernel, bias = jnp.ones((2, 4)), jnp.ones((4, 3)), jnp.arange(3.0)
    name, labels = "linear_softmax_focal_loss_with_integer_labels", jnp.array([0, 2])
    expected = getattr(focal_jax, name)(features, kernel, labels, bias=bias).mean()
    for module in (framework.Reduced(name), framework.Reduced(name, alpha=jnp.ones(3))):
        actual = module(features, kernel, labels, bias=bias)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    module = framework.Reduced(name, bias=bias)
    np.testing.assert_allclose(module(features, kernel, labels), expected, rtol=1e-6)


def test_reduced_equals_the_named_modules(framework, data):
    logits, labels = data
    where = jnp.arange(5) > 0
    shared = {"gamma": 1.5, "normalization": "valid", "loss_weight": 3.0}
    softmax = {"alpha": ALPHA, "ignore_label": 2, "axis": 1}
    chex.assert_trees_all_equal(
        framework.Reduced("softmax_focal_loss_with_integer_labels", **shared, **softmax)(
            jnp.moveaxis(logits, -1, 1), labels, where=where
        ),
        framework.SoftmaxFocalLoss(**shared, **softmax)(
            jnp.moveaxis(logits, -1, 1), labels, where=where
        ),
    )
    chex.assert_trees_all_equal(
        framework.Reduced(focal_jax.sigmoid_focal_loss, **shared)(logits, logits > 0),
        framework.SigmoidFocalLoss(**shared)(logits, logits > 0),
    )


def test_reduced_masks_the_denominator_of_the_linear_loss(framework, data):
    features, labels = data
    kernel = jax.random.normal(jax.random.key(3), (3, 7))
    where, weights = jnp.arange(5) > 0, jnp.arange(4.0)[:, None]
    module = framework.Reduced(
        focal_jax.linear_softmax_focal_loss_with_integer_labels, ignore_label=0, chunk_size=4
    )
    losses = focal_jax.softmax_focal_loss_with_integer_labels(features @ kernel, labels)
    masked = np.asarray(weights) * (np.asarray(where) & (np.asarray(labels) != 0))
    np.testing.assert_allclose(
        module(features, kernel, labels, where=where, weights=weights),
        (masked * np.asarray(losses)).sum() / masked.sum(),
        rtol=1e-5,
    )


def test_options_of_the_call_replace_those_of_the_module(framework, data):
    logits = data[0]
    module = framework.Reduced("sigmoid_focal_loss", gamma=5.0, alpha=0.25)
    loss = jax.jit(lambda gamma: module(logits, logits > 0, gamma=gamma, alpha=None))
    for gamma in (0.0, 1.5):
        expected = framework.SigmoidFocalLoss(gamma=gamma)(logits, logits > 0)
        np.testing.assert_allclose(loss(gamma), expected, rtol=1e-5)


def test_reduced_differentiates_a_traced_option(framework, data):
    def reduced_loss(alpha):
        module = framework.Reduced("softmax_focal_loss_with_integer_labels", alpha=alpha)
        return module(*data)

    def named_loss(alpha):
        return framework.SoftmaxFocalLoss(alpha=alpha)(*data)

    chex.assert_trees_all_close(
        jax.jit(jax.value_and_grad(reduced_loss))(ALPHA),
        jax.value_and_grad(named_loss)(ALPHA),
        rtol=1e-5,
    )


def test_reduced_over_a_mapped_axis(framework, data):
    options = {"loss": "softmax_focal_loss_with_integer_labels", "ignore_label": 0}
    losses = jax.vmap(framework.Reduced(**options, axis_name="batch"), axis_name="batch")(*data)
    np.testing.assert_allclose(losses.mean(), framework.Reduced(**options)(*data), rtol=1e-6)


def test_a_loss_with_axis_name_sums_over_the_devices_itself(framework):
    def dice(logits, labels, *, smooth=1.0, where=None, axis_name=None):
        """Return one loss per class, summed over all positions."""
        mask = jnp.where(True if where is None else where[:, None], 1.0, 0.0)
        sums = jnp.stack([jnp.sum(mask * x, 0) for x in (logits * labels, logits + labels)])
        intersection, total = sums if axis_name is None else jax.lax.psum(sums, axis_name)
        return 1 - (2 * intersection + smooth) / (total + smooth)

    logits, labels, where = jnp.ones((4, 5, 3)) * 0.3, jnp.ones((4, 5, 3)), jnp.ones((4, 5), bool)
    module = framework.Reduced(dice, smooth=0.5, axis_name="batch")
    losses = jax.vmap(lambda *args: module(*args[:2], where=args[2]), axis_name="batch")(
        logits, labels, where
    )
    expected = 1 - (2 * 6 + 0.5) / (26 + 0.5)
    np.testing.assert_allclose(losses, np.full(4, expected), rtol=1e-6)


def test_reduced_takes_a_plain_function(framework):
    def squared(predictions, targets, scale=1.0):
        return scale * (predictions - targets) ** 2

    x, y = jnp.arange(4.0), jnp.ones(4)
    module = framework.Reduced(squared, scale=np.array([1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_allclose(module(x, y), (1 + 0 + 3 + 16) / 4, rtol=1e-6)
    with pytest.raises(InputError, match="scales: got an option that squared does not have"):
        framework.Reduced(squared, scales=2.0)


def test_reduced_takes_a_loss_of_the_engine(framework, data):
    def scaled(logit, label, scale):
        return scale * engine.cross_entropy(logit, label)

    logits = data[0]
    loss = engine.elementwise_loss(scaled, scale=engine.number(1.0, low=0.0))
    module = framework.Reduced(loss, scale=2.0)
    losses = optax.sigmoid_binary_cross_entropy(logits, logits > 0)
    np.testing.assert_allclose(module(logits, logits > 0), 2 * losses.mean(), rtol=1e-6)
    with pytest.raises(InputError, match="scale: got -1"):
        framework.Reduced(loss, scale=-1.0)
    with pytest.raises(InputError, match="alpha: got an option"):
        framework.Reduced(loss, alpha=1.0)


def test_reduced_holds_constants(framework):
    def make(alpha):
        return framework.Reduced("sigmoid_focal_loss", alpha=alpha, gamma=np.float32(1))

    module = make(ALPHA)
    assert np.asarray(dict(module.options)["alpha"]).tolist() == ALPHA.tolist()
    assert module.loss is focal_jax.sigmoid_focal_loss
    if framework is focal_jax.linen:
        same = framework.Reduced(focal_jax.sigmoid_focal_loss, gamma=1.0, alpha=np.asarray(ALPHA))
        assert module == same
        assert hash(module) == hash(same)
        assert module.clone() == module != make(0.5)
        assert module.clone(alpha=0.5) == make(0.5)
        assert module.init(jax.random.key(0), ALPHA, ALPHA) == {}
    else:
        graph, state = nnx.split(module)
        assert jax.tree.leaves(state) == []
        assert graph == nnx.split(make(np.asarray(ALPHA)))[0]


# ---------------------------------------------------------------- linen


def test_linen_module_has_no_parameters_and_compares_by_its_options(data):
    module = focal_jax.linen.SoftmaxFocalLoss(alpha=ALPHA)
    assert jax.tree.leaves(module.init(jax.random.key(0), *data)) == []
    assert module == focal_jax.linen.SoftmaxFocalLoss(alpha=np.asarray(ALPHA))
    assert module != focal_jax.linen.SoftmaxFocalLoss(alpha=2 * ALPHA)
    assert module.clone(gamma=1.0) == focal_jax.linen.SoftmaxFocalLoss(alpha=ALPHA, gamma=1.0)
    compiled = jax.jit(lambda module, *args: module.apply({}, *args), static_argnums=0)
    chex.assert_trees_all_close(compiled(module, *data), module(*data), rtol=1e-6)


class Classifier(nn.Module):
    loss: nn.Module

    @nn.compact
    def __call__(self, images, labels):
        logits = nn.Dense(3)(images)
        second = focal_jax.linen.SigmoidFocalLoss(alpha=ALPHA, name="second")
        return self.loss(logits, labels) + second(logits, jax.nn.one_hot(labels, 3))


def test_linen_module_trains_as_a_submodule(data):
    model = Classifier(focal_jax.linen.SoftmaxFocalLoss(alpha=ALPHA))
    parameters = model.init(jax.random.key(0), *data)
    assert list(parameters["params"]) == ["Dense_0"]
    optimizer = optax.sgd(0.5)

    @jax.jit
    def step(carry, _):
        parameters, state = carry
        loss, gradients = jax.value_and_grad(model.apply)(parameters, *data)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(parameters, updates), state), loss

    _, losses = jax.lax.scan(step, (parameters, optimizer.init(parameters)), length=30)
    assert losses[-1] < 0.8 * losses[0]


def test_options_of_a_loss_with_names_of_the_arguments_are_errors(framework):
    def value(logit, label, loss_weight):
        return loss_weight * engine.cross_entropy(logit, label)

    loss = engine.elementwise_loss(value, loss_weight=1.0)
    with pytest.raises(InputError, match=r"options \['loss_weight'\], wanted other names"):
        framework.Reduced(loss)


def test_nnx_option_after_construction_is_used(data):
    module = focal_jax.nnx.Reduced("softmax_focal_loss_with_integer_labels", gamma=1.0)
    module.gamma = 0.0
    want = focal_jax.softmax_focal_loss_with_integer_labels(*data, gamma=0.0)
    np.testing.assert_allclose(module(*data), want.mean(), rtol=1e-6)


@pytest.mark.parametrize("name", ["alpha", "ignore_label", "axis", "label_smoothing", "where"])
def test_option_after_construction_is_an_error(framework, name):
    module = framework.Reduced("softmax_focal_loss_with_integer_labels", gamma=1.0)
    with pytest.raises(InputError, match=f"{name}: got an option after the construction"):
        setattr(module, name, 0)


def test_nnx_tabulate_lists_the_modules(data):
    table = nnx.tabulate(Trainee(nnx.Rngs(0)), *data, console_kwargs={"width": 200})
    assert "SoftmaxFocalLoss" in table


def test_linen_tabulate_lists_the_modules(data):
    model = Classifier(focal_jax.linen.SoftmaxFocalLoss(alpha=ALPHA))
    table = nn.tabulate(model, jax.random.key(0), console_kwargs={"width": 200})(*data)
    assert "SoftmaxFocalLoss" in table
    assert "second" in table


# ---------------------------------------------------------------- nnx


class Trainee(nnx.Module):
    def __init__(self, rngs):
        self.last = nnx.Linear(3, 3, rngs=rngs)
        self.loss = focal_jax.nnx.SoftmaxFocalLoss(alpha=ALPHA, loss_weight=jnp.array(1.0))

    def __call__(self, images, labels):
        return self.loss(self.last(images), labels)


def test_nnx_module_has_no_state_and_splits_and_merges(data):
    module = focal_jax.nnx.SoftmaxFocalLoss(alpha=ALPHA, gamma=jnp.array(1.0))
    graph, state = nnx.split(module)
    assert jax.tree.leaves(state) == []
    assert graph == nnx.split(focal_jax.nnx.SoftmaxFocalLoss(alpha=ALPHA, gamma=1.0))[0]
    chex.assert_trees_all_close(nnx.merge(graph, state)(*data), module(*data), rtol=1e-6)
    module.alpha = 2 * ALPHA
    assert jax.tree.leaves(nnx.split(module)[1]) == []
    parameters = nnx.split(Trainee(nnx.Rngs(0)), nnx.Param)[1]  # raises if state is left over
    assert set(parameters) == {"last"}


def test_nnx_module_trains_under_jit_with_an_optimizer(data):
    model = Trainee(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda model: model(*data))(model)
        optimizer.update(model, gradients)
        return loss, gradients

    losses = [step(model, optimizer) for _ in range(30)]
    assert losses[-1][0] < 0.8 * losses[0][0]
    assert set(losses[0][1]) == {"last"}
    chex.assert_trees_all_equal(jnp.array(model.loss.alpha), ALPHA)


def test_nnx_jit_does_not_recompile_for_an_equal_module(data):
    traces = []

    @nnx.jit
    def apply(module, *args):
        traces.append(module)
        return module(*args)

    for _ in range(2):
        apply(focal_jax.nnx.SoftmaxFocalLoss(alpha=ALPHA), *data)
    assert len(traces) == 1


# ---------------------------------------------------------------- values that are no arrays

NO_ARRAYS = [object(), {1: 2, "b": 3}, [[1, 2], [3]], np.ma.array([1.0], mask=[1]), 2j]
NO_ARRAYS += [jax.random.key(0), jax.random.split(jax.random.key(0), 3)]


def test_modules_name_the_argument_that_is_no_array(framework, data):
    logits, labels = data
    modules = [framework.SigmoidFocalLoss, framework.SoftmaxFocalLoss]
    modules += [functools.partial(framework.Reduced, name) for name in LOSSES]
    options = {"alpha", "gamma", "axis", "ignore_label", "axis_name", "normalization", "where"}
    options |= {"margin", "positive", "stop_weight_gradient", "bias", "class_axis_name", "smooth"}
    for make, name, value in itertools.product(modules, options, NO_ARRAYS):
        with pytest.raises(InputError, match=f"^{name}: got .*"):
            make(**{name: value})
    for value in [*NO_ARRAYS, None, "labels"]:
        with pytest.raises(InputError, match=r"^labels: got .*, wanted"):
            framework.SoftmaxFocalLoss()(logits, value)
        with pytest.raises(InputError, match=r"^logits: got .*, wanted"):
            framework.SoftmaxFocalLoss()(value, labels)
    for name in ("SigmoidFocalLoss", "SoftmaxFocalLoss"):
        make = getattr(framework, name)
        with pytest.raises(InputError, match=r"^reduction: got an option .*; .*reduce_loss"):
            make(reduction="mean")
        with pytest.raises(InputError, match=r"^reduction: got an option .*; .*reduce_loss"):
            make()(logits, labels, reduction="mean")
    for axis_name in (0, ["i"], {"i": 1}, np.zeros(1)):
        with pytest.raises(InputError, match=r"^axis_name: got .*, wanted the name of a mapped ax"):
            framework.Reduced("sigmoid_focal_loss", axis_name=axis_name)


@pytest.mark.parametrize("lift", [nn.remat, nn.jit], ids=["remat", "jit"])
def test_lifted_reduced_has_the_constructor_of_reduced(lift):
    logits, labels = jnp.array([0.5, -1.0]), jnp.array([1, 0])
    want = focal_jax.linen.Reduced("sigmoid_focal_loss", alpha=0.25)(logits, labels)
    module = lift(focal_jax.linen.Reduced)("sigmoid_focal_loss", alpha=0.25)
    np.testing.assert_allclose(module.apply({}, logits, labels), want, rtol=1e-6)


def test_subclass_of_reduced_keeps_the_constructor():
    class Own(focal_jax.linen.Reduced):
        pass

    assert Own("sigmoid_focal_loss", gamma=1.0).clone().options == (("gamma", 1.0),)


def test_errors_of_an_inherited_call_name_the_class(framework):
    with pytest.raises(InputError, match=r"option that SoftmaxFocalLoss.__call__ does not have"):
        framework.SoftmaxFocalLoss()(jnp.zeros((2, 3)), jnp.array([0, 1]), alpha=None)
    with pytest.raises(InputError, match=r"^SoftmaxFocalLoss.__call__: got missing"):
        framework.SoftmaxFocalLoss()(jnp.zeros((2, 3)))


def test_linen_options_are_pairs():
    with pytest.raises(InputError, match="options: got 1, wanted pairs"):
        focal_jax.linen.Reduced("sigmoid_focal_loss", options=1)
