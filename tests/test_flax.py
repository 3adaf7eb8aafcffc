"""The linen and the nnx modules: one set of properties for both, then what each adds."""

import functools

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
from focal_jax import _catalogue
from focal_jax._checks import InputError

ROOMS = [focal_jax.linen, focal_jax.nnx]
ALPHA = jnp.array([0.2, 0.5, 0.3])


@pytest.fixture(params=ROOMS, ids=lambda room: room.__name__)
def room(request):
    return request.param


@pytest.fixture(scope="module")
def data():
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], (4, 5, 3)), jax.random.randint(keys[1], (4, 5), 0, 3)


def test_options_reach_the_integer_loss_and_the_reduction(room, data):
    logits, labels = data
    where = jnp.arange(5) > 0
    module = room.SoftmaxFocalLoss(
        alpha=ALPHA, gamma=1.5, axis=1, ignore_label=2, normalization="valid", loss_weight=3.0
    )
    actual = module(jnp.moveaxis(logits, -1, 1), labels, where=where)
    losses = focal_jax.softmax_focal_loss_with_integer_labels(
        logits, labels, alpha=ALPHA, gamma=1.5
    )
    counts = np.asarray(where) & (np.asarray(labels) != 2)
    assert 0 < counts.sum() < where.sum() * 4
    np.testing.assert_allclose(actual, 3 * np.asarray(losses)[counts].mean(), rtol=1e-6)


def test_ignored_labels_do_not_count_whatever_their_logits_hold(room, data):
    logits, labels = data
    labels = labels.at[0].set(-1).astype(jnp.int8)
    actual = room.SoftmaxFocalLoss(ignore_label=-1)(logits.at[0].set(jnp.nan), labels)
    np.testing.assert_allclose(actual, room.SoftmaxFocalLoss()(logits[1:], labels[1:]), rtol=1e-6)


def test_a_distribution_goes_to_the_soft_loss(room, data):
    logits, labels = data
    soft = optax.smooth_labels(jax.nn.one_hot(labels, 3), 0.1)
    actual = room.SoftmaxFocalLoss(alpha=ALPHA, normalization="batch_size")(logits, soft)
    losses = focal_jax.softmax_focal_loss(logits, soft, alpha=ALPHA)
    np.testing.assert_allclose(actual, losses.sum() / 4, rtol=1e-6)


def test_options_reach_the_sigmoid_loss_and_the_reduction(room, data):
    logits, labels = data[0], data[0] > 0.5
    where = data[1] > 0
    module = room.SigmoidFocalLoss(alpha=0.25, gamma=3, normalization=7.0, loss_weight=0.5)
    losses = focal_jax.sigmoid_focal_loss(logits, labels, alpha=0.25, gamma=3)
    counts = np.broadcast_to(where[..., None], losses.shape)
    np.testing.assert_allclose(
        module(logits, labels, where=where[..., None]),
        np.asarray(losses)[counts].sum() / 14,
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", ["SigmoidFocalLoss", "SoftmaxFocalLoss"])
def test_a_schedule_takes_the_place_of_gamma(room, data, name):
    logits = data[0]
    soft = jax.nn.softmax(logits[::-1])
    schedule = optax.linear_schedule(0.0, 2.0, 10)

    @jax.jit
    def at(step):
        return getattr(room, name)(gamma=5.0)(logits, soft, gamma=schedule(step))

    for step, gamma in ((0, 0.0), (5, 1.0), (10, 2.0)):
        expected = getattr(room, name)(gamma=gamma)(logits, soft)
        np.testing.assert_allclose(at(jnp.int32(step)), expected, rtol=1e-5)
    assert jnp.isfinite(jax.grad(at)(5.0))


def test_axis_name_gives_the_result_of_one_device(room, data):
    logits, labels = data
    spread = room.SoftmaxFocalLoss(ignore_label=0, axis_name="batch")
    losses = jax.vmap(spread, axis_name="batch")(logits, labels)
    np.testing.assert_allclose(
        losses.mean(), room.SoftmaxFocalLoss(ignore_label=0)(logits, labels), rtol=1e-6
    )


def test_arrays_are_constants_that_hash_and_lose_no_digit(room):
    alpha = jax.random.uniform(jax.random.key(0), (2, 3))
    module = room.SigmoidFocalLoss(
        alpha=alpha, gamma=np.array([1, 2, 3]), loss_weight=jnp.array(2.0), normalization="none"
    )
    assert hash(module) == hash(module)
    assert isinstance(module.alpha, tuple)
    assert (module.gamma, module.loss_weight) == ((1, 2, 3), 2.0)
    chex.assert_trees_all_equal(jnp.array(module.alpha), alpha)
    logits = jnp.ones((2, 3))
    expected = 2 * focal_jax.sigmoid_focal_loss(
        logits, logits, alpha=alpha, gamma=jnp.array([1.0, 2.0, 3.0])
    )
    np.testing.assert_allclose(module(logits, logits), expected.sum(), rtol=1e-6)


def test_a_traced_alpha_is_used_and_differentiated(room, data):
    def through_module(alpha):
        return room.SoftmaxFocalLoss(alpha=alpha, normalization="none")(*data)

    def through_function(alpha):
        return focal_jax.softmax_focal_loss_with_integer_labels(*data, alpha=alpha).sum()

    chex.assert_trees_all_close(
        jax.jit(jax.value_and_grad(through_module))(ALPHA),
        jax.value_and_grad(through_function)(ALPHA),
        rtol=1e-5,
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", ["SigmoidFocalLoss", "SoftmaxFocalLoss"])
def test_dtypes(room, dtype, name, x64):
    module = getattr(room, name)(alpha=np.float64([0.3, 0.7]), loss_weight=np.float64([2])[0])
    logits = jnp.ones((3, 2), dtype)
    loss, grad = jax.eval_shape(jax.value_and_grad(module), logits, logits)
    chex.assert_shape(loss, ())
    assert loss.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    assert grad.dtype == dtype


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
def test_errors_name_the_argument(room, options, labels, message):
    module = room.SoftmaxFocalLoss(**options)
    with pytest.raises(InputError, match=message):
        module(jnp.zeros((2, 3)), labels)


BAD = [
    ({"gamma": -1}, "gamma: got -1"),
    ({"gamma": jnp.array(-1.0)}, "gamma: got -1"),
    ({"gamma": "2"}, "gamma: got '2'"),
    ({"gamma": None}, "gamma: got None"),
    ({"alpha": {"positive": 1}}, "alpha: got {'positive': 1}"),
    ({"normalization": "median"}, "normalization: got 'median'"),
    ({"normalization": None}, "normalization: got None"),
    ({"normalization": (1, 2)}, r"normalization: got shape \(2,\)"),
    ({"loss_weight": jnp.ones(2)}, r"loss_weight: got shape \(2,\)"),
    ({"loss_weight": "1"}, "loss_weight: got '1'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_a_bad_option_is_refused_when_the_module_is_made(room, options, message):
    for make in (
        room.SoftmaxFocalLoss,
        room.SigmoidFocalLoss,
        functools.partial(room.Reduced, "sigmoid_focal_loss"),
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
def test_a_bad_option_of_softmax_is_refused_when_the_module_is_made(room, options, message):
    for make in (
        room.SoftmaxFocalLoss,
        functools.partial(room.Reduced, "softmax_focal_loss_with_integer_labels"),
    ):
        with pytest.raises(InputError, match=message):
            make(**options)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("asymmetric_loss", {"margin": 1.5}, "margin: got 1.5"),
        ("quality_focal_loss", {"beta": -1}, "beta: got -1"),
        ("sigmoid_focal_loss_star", {"gamma": 0}, "gamma: got 0"),
        ("varifocal_loss", {"stop_weight_gradient": 1}, "stop_weight_gradient: got 1"),
        ("focal_tversky_loss", {"gamma": -0.5}, "gamma: got -0.5"),
        ("distribution_focal_loss", {"axis": "a"}, "axis: got 'a'"),
        ("softmax_focal_loss_with_integer_labels", {"label_smoothing": 1.0}, "label_smoothing: "),
        ("softmax_focal_loss_with_integer_labels", {"alpha": np.ones((2, 2))}, "alpha: got shape"),
        ("linear_softmax_focal_loss_with_integer_labels", {"logit_softcap": -1}, "logit_softcap: "),
        (
            "linear_softmax_focal_loss_with_integer_labels",
            {"return_logsumexp": True},
            "return_logsumexp: got True",
        ),
        ("focal_loss", {}, "loss: got 'focal_loss', wanted a function or one of"),
    ],
)
def test_a_bad_option_of_any_loss_is_refused_when_the_module_is_made(room, loss, options, message):
    with pytest.raises(InputError, match=message):
        room.Reduced(loss, **options)


def test_a_bias_of_the_linear_head(room):
    features, kernel, bias = jnp.ones((2, 4)), jnp.ones((4, 3)), jnp.arange(3.0)
    name, labels = "linear_softmax_focal_loss_with_integer_labels", jnp.array([0, 2])
    wanted = getattr(focal_jax, name)(features, kernel, labels, bias=bias).mean()
    for module in (room.Reduced(name), room.Reduced(name, alpha=jnp.ones(3))):
        np.testing.assert_allclose(module(features, kernel, labels, bias=bias), wanted, rtol=1e-6)
    held = room.Reduced(name, bias=bias)
    np.testing.assert_allclose(held(features, kernel, labels), wanted, rtol=1e-6)


def test_an_array_by_its_name_is_told_its_place(room, data):
    logits, labels = data
    loss = room.Reduced("softmax_focal_loss_with_integer_labels", ignore_label=1)
    with pytest.raises(InputError, match="labels: got it by name, wanted it in its place"):
        loss(logits, labels=labels)


@pytest.mark.parametrize("loss", _catalogue.LOSSES, ids=lambda loss: loss.name)
def test_any_loss_is_made_with_what_it_takes(room, loss):
    options = {name: option.low + 0.5 for name, option in loss.options.items()}
    per_class = {k: (v,) * 5 for k, v in options.items() if loss.options[k].per_class}
    room.Reduced(loss.name, **options)
    room.Reduced(loss.name, **options | per_class)
    if loss.softmax and loss.kind != "linear":
        room.Reduced(loss.name, axis=-3, **per_class)


@pytest.mark.parametrize("normalization", ["valid", "batch_size"])
def test_weights_reach_the_reduction(room, data, normalization):
    logits, labels = data
    weights = jax.random.uniform(jax.random.key(2), labels.shape)
    module = room.SoftmaxFocalLoss(normalization=normalization, ignore_label=1)
    losses = focal_jax.softmax_focal_loss_with_integer_labels(logits, labels, ignore_label=1)
    divisor = np.sum(weights, where=np.asarray(labels) != 1) if normalization == "valid" else 4
    np.testing.assert_allclose(
        module(logits, labels, weights=weights), jnp.sum(weights * losses) / divisor, rtol=1e-6
    )
    weights = weights[..., None]
    losses = focal_jax.sigmoid_focal_loss(logits, logits > 0)
    np.testing.assert_allclose(
        room.SigmoidFocalLoss(normalization="sum")(logits, logits > 0, weights=weights),
        jnp.sum(weights * losses),
        rtol=1e-6,
    )


# ------------------------------------------------------------------------------- any loss


def test_reduced_is_the_named_modules(room, data):
    logits, labels = data
    where = jnp.arange(5) > 0
    shared = {"gamma": 1.5, "normalization": "valid", "loss_weight": 3.0}
    softmax = {"alpha": ALPHA, "ignore_label": 2, "axis": 1}
    chex.assert_trees_all_equal(
        room.Reduced("softmax_focal_loss_with_integer_labels", **shared, **softmax)(
            jnp.moveaxis(logits, -1, 1), labels, where=where
        ),
        room.SoftmaxFocalLoss(**shared, **softmax)(
            jnp.moveaxis(logits, -1, 1), labels, where=where
        ),
    )
    chex.assert_trees_all_equal(
        room.Reduced(focal_jax.sigmoid_focal_loss, **shared)(logits, logits > 0),
        room.SigmoidFocalLoss(**shared)(logits, logits > 0),
    )


def test_reduced_counts_as_the_linear_loss_does(room, data):
    features, labels = data
    kernel = jax.random.normal(jax.random.key(3), (3, 7))
    where, weights = jnp.arange(5) > 0, jnp.arange(4.0)[:, None]
    module = room.Reduced(
        focal_jax.linear_softmax_focal_loss_with_integer_labels, ignore_label=0, chunk_size=4
    )
    losses = focal_jax.softmax_focal_loss_with_integer_labels(features @ kernel, labels)
    counts = np.asarray(weights) * (np.asarray(where) & (np.asarray(labels) != 0))
    np.testing.assert_allclose(
        module(features, kernel, labels, where=where, weights=weights),
        (counts * np.asarray(losses)).sum() / counts.sum(),
        rtol=1e-5,
    )


def test_a_call_s_options_take_the_place_of_the_module_s(room, data):
    logits = data[0]
    module = room.Reduced("sigmoid_focal_loss", gamma=5.0, alpha=0.25)
    scheduled = jax.jit(lambda gamma: module(logits, logits > 0, gamma=gamma, alpha=None))
    for gamma in (0.0, 1.5):
        expected = room.SigmoidFocalLoss(gamma=gamma)(logits, logits > 0)
        np.testing.assert_allclose(scheduled(gamma), expected, rtol=1e-5)


def test_reduced_differentiates_a_traced_option(room, data):
    def through_module(alpha):
        module = room.Reduced("softmax_focal_loss_with_integer_labels", alpha=alpha)
        return module(*data)

    chex.assert_trees_all_close(
        jax.jit(jax.value_and_grad(through_module))(ALPHA),
        jax.value_and_grad(lambda alpha: room.SoftmaxFocalLoss(alpha=alpha)(*data))(ALPHA),
        rtol=1e-5,
    )


def test_reduced_over_mapped_axes(room, data):
    logits, labels = data
    options = {"loss": "softmax_focal_loss_with_integer_labels", "ignore_label": 0}
    losses = jax.vmap(room.Reduced(**options, axis_name="batch"), axis_name="batch")(*data)
    np.testing.assert_allclose(losses.mean(), room.Reduced(**options)(logits, labels), rtol=1e-6)


def test_a_loss_that_sums_over_the_devices_itself(room):
    def dice(logits, labels, *, smooth=1.0, where=None, axis_name=None):
        """Return a loss a class, summed over all positions, as a Tversky loss is."""
        kept = jnp.where(True if where is None else where[:, None], 1.0, 0.0)
        sums = jnp.stack([jnp.sum(kept * x, 0) for x in (logits * labels, logits + labels)])
        both, either = sums if axis_name is None else jax.lax.psum(sums, axis_name)
        return 1 - (2 * both + smooth) / (either + smooth)

    logits, labels, where = jnp.ones((4, 5, 3)) * 0.3, jnp.ones((4, 5, 3)), jnp.ones((4, 5), bool)
    spread = room.Reduced(dice, smooth=0.5, axis_name="batch")
    losses = jax.vmap(lambda *args: spread(*args[:2], where=args[2]), axis_name="batch")(
        logits, labels, where
    )
    want = 1 - (2 * 6 + 0.5) / (26 + 0.5)
    np.testing.assert_allclose(losses, np.full(4, want), rtol=1e-6)


def test_reduced_holds_constants(room):
    def make(alpha):
        return room.Reduced("sigmoid_focal_loss", alpha=alpha, gamma=np.float32(1))

    module = make(ALPHA)
    assert dict(module.options)["alpha"] == tuple(ALPHA.tolist())
    assert module.loss is focal_jax.sigmoid_focal_loss
    if room is focal_jax.linen:
        same = room.Reduced(focal_jax.sigmoid_focal_loss, gamma=1.0, alpha=np.asarray(ALPHA))
        assert module == same
        assert hash(module) == hash(same)
        assert module.clone() == module != make(0.5)
        assert module.init(jax.random.key(0), ALPHA, ALPHA) == {}
    else:
        graph, state = nnx.split(module)
        assert jax.tree.leaves(state) == []
        assert graph == nnx.split(make(np.asarray(ALPHA)))[0]


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("focal_loss", {}, "loss: got 'focal_loss', wanted a function or one of .*'sigmoid_focal"),
        ("reduce_loss", {}, "loss: got 'reduce_loss'"),
        (None, {}, "loss: got None"),
        ("sigmoid_focal_loss", {"axis": 1}, r"axis: got an option .* wanted one of \['alpha', 'ga"),
        ("sigmoid_focal_loss", {"gama": 1}, "gama: got an option that the loss does not have"),
    ],
)
def test_reduced_errors(room, loss, options, message):
    with pytest.raises(InputError, match=message):
        room.Reduced(loss, **options)
    if options:
        with pytest.raises(InputError, match=message):
            room.Reduced(loss)(jnp.zeros(2), jnp.zeros(2), **options)


def test_a_wrong_mask_is_named_also_beside_an_ignore_label(room):
    with pytest.raises(InputError, match="where: got shape"):
        room.SoftmaxFocalLoss(ignore_label=0)(
            jnp.zeros((2, 3)), jnp.zeros(2, int), where=jnp.ones(3, bool)
        )


# ----------------------------------------------------------------------------- linen


def test_linen_has_no_parameters_and_compares_by_its_options(data):
    module = focal_jax.linen.SoftmaxFocalLoss(alpha=ALPHA)
    assert jax.tree.leaves(module.init(jax.random.key(0), *data)) == []
    assert module == focal_jax.linen.SoftmaxFocalLoss(alpha=np.asarray(ALPHA))
    assert module != focal_jax.linen.SoftmaxFocalLoss(alpha=2 * ALPHA)
    compiled = jax.jit(lambda module, *args: module.apply({}, *args), static_argnums=0)
    chex.assert_trees_all_close(compiled(module, *data), module(*data), rtol=1e-6)


class Classifier(nn.Module):
    loss: nn.Module

    @nn.compact
    def __call__(self, images, labels):
        logits = nn.Dense(3)(images)
        mine = focal_jax.linen.SigmoidFocalLoss(alpha=ALPHA, name="mine")
        return self.loss(logits, labels) + mine(logits, jax.nn.one_hot(labels, 3))


def test_linen_trains_as_a_submodule(data):
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


def test_linen_shows_the_loss_among_its_modules(data):
    model = Classifier(focal_jax.linen.SoftmaxFocalLoss(alpha=ALPHA))
    table = nn.tabulate(model, jax.random.key(0), console_kwargs={"width": 200})(*data)
    assert "SoftmaxFocalLoss" in table
    assert "mine" in table


# ------------------------------------------------------------------------------- nnx


class Trainee(nnx.Module):
    def __init__(self, rngs):
        self.last = nnx.Linear(3, 3, rngs=rngs)
        self.loss = focal_jax.nnx.SoftmaxFocalLoss(alpha=ALPHA, loss_weight=jnp.array(1.0))

    def __call__(self, images, labels):
        return self.loss(self.last(images), labels)


def test_nnx_has_no_state_and_splits_and_merges(data):
    module = focal_jax.nnx.SoftmaxFocalLoss(alpha=ALPHA, gamma=jnp.array(1.0))
    graph, state = nnx.split(module)
    assert jax.tree.leaves(state) == []
    assert graph == nnx.split(focal_jax.nnx.SoftmaxFocalLoss(alpha=ALPHA, gamma=1.0))[0]
    chex.assert_trees_all_close(nnx.merge(graph, state)(*data), module(*data), rtol=1e-6)
    module.alpha = 2 * ALPHA
    assert jax.tree.leaves(nnx.split(module)[1]) == []
    parameters = nnx.split(Trainee(nnx.Rngs(0)), nnx.Param)[1]  # one filter takes all of it
    assert set(parameters) == {"last"}


def test_nnx_trains_under_jit_and_an_optimizer(data):
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


def test_nnx_module_passes_through_jit_without_recompiling(data):
    traces = []

    @nnx.jit
    def apply(module, *args):
        traces.append(module)
        return module(*args)

    for _ in range(2):
        apply(focal_jax.nnx.SoftmaxFocalLoss(alpha=ALPHA), *data)
    assert len(traces) == 1
