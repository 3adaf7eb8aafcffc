"""`focal_jax.compat.keras` with Keras itself, on the JAX backend."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from pages import jax_defaults

import focal_jax
from focal_jax import InputError, training
from focal_jax.compat import keras as compat

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("_promotion")]
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 4)).astype(np.float32)
INDICES = RNG.integers(0, 4, 6)
ONE_HOT = np.eye(4, dtype=np.float32)[INDICES]


@pytest.fixture
def _promotion():
    """Use JAX's default promotion, which Keras needs."""
    with jax_defaults():
        yield


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("labels", [INDICES, INDICES[:, None], INDICES.astype(np.uint8), ONE_HOT])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", None])
def test_softmax_equals_keras(from_logits, labels, reduction):
    of_keras = keras.losses.CategoricalFocalCrossentropy(
        alpha=0.25, gamma=2.0, from_logits=from_logits, reduction=reduction
    )
    of_focal_jax = compat.SoftmaxFocalLoss(0.25, 2.0, from_logits=from_logits, reduction=reduction)
    predictions, weights = LOGITS if from_logits else softmax(LOGITS), np.arange(6.0)
    for weight in (None, weights):
        wanted = of_keras(ONE_HOT, predictions, weight)
        np.testing.assert_allclose(of_focal_jax(labels, predictions, weight), wanted, rtol=1e-5)


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sigmoid_equals_keras(from_logits, smoothing):
    shared = {"gamma": 2.0, "label_smoothing": smoothing, "from_logits": from_logits}
    of_keras = keras.losses.BinaryFocalCrossentropy(True, alpha=0.25, **shared)
    of_focal_jax = compat.SigmoidFocalLoss(alpha=0.25, **shared)
    predictions = LOGITS if from_logits else 1 / (1 + np.exp(-LOGITS))
    for weight in (None, np.arange(6.0)):
        wanted = of_keras(ONE_HOT, predictions, weight)
        np.testing.assert_allclose(of_focal_jax(ONE_HOT, predictions, weight), wanted, rtol=2e-6)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean", "sum", None])
def test_ignore_class_and_masks_divide_as_keras_does(reduction):
    labels = np.where(np.arange(6) % 3 == 0, 255, INDICES)
    of_keras = keras.losses.SparseCategoricalCrossentropy(True, 255, reduction)
    of_focal_jax = compat.SoftmaxFocalLoss(gamma=0, ignore_class=255, reduction=reduction)
    for weight in (None, np.arange(6.0, dtype=np.float32)):
        wanted = of_keras(labels, LOGITS, weight)
        np.testing.assert_allclose(of_focal_jax(labels, LOGITS, weight), wanted, rtol=2e-6)
    predictions = jnp.asarray(LOGITS)
    keras.src.backend.set_keras_mask(predictions, jnp.arange(6) > 1)
    wanted = of_keras(labels, predictions)
    np.testing.assert_allclose(of_focal_jax(labels, predictions), wanted, rtol=2e-6)
    keras.src.backend.set_keras_mask(predictions, jnp.zeros(6, bool))
    assert not np.any(of_focal_jax(labels, predictions))


def test_gradient_where_keras_clips():
    logits, labels = jnp.array([[80.0, 0.0]]), jnp.array([1])
    clipped = keras.losses.CategoricalFocalCrossentropy(alpha=1.0, from_logits=True)
    of_keras = jax.grad(lambda z: clipped(jax.nn.one_hot(labels, 2), z))(logits)
    of_focal_jax = jax.grad(lambda z: compat.SoftmaxFocalLoss()(labels, z))(logits)
    assert not of_keras.any()
    np.testing.assert_allclose(of_focal_jax, [[1.0, -1.0]], rtol=1e-6)


def test_probabilities():
    p = jnp.array([0.3, 1.0 + 1e-7, 0.0, -0.01, 1.5])[:, None]
    loss = compat.SigmoidFocalLoss(gamma=0, from_logits=False, reduction=None)
    value, gradient = jax.vmap(jax.value_and_grad(lambda p: loss(jnp.ones(1), p).sum()))(p)
    np.testing.assert_allclose(value[:3], [-np.log(0.3), 0, np.inf], rtol=2e-6)
    np.testing.assert_allclose(gradient[0, 0], -1 / 0.3, rtol=2e-6)
    assert np.isfinite(gradient[:3]).all()
    assert np.isnan(value[3:]).all()
    rows = compat.SoftmaxFocalLoss(gamma=0, from_logits=False, reduction=None)
    losses = rows(np.array([0, 0, 0]), np.array([[0.2, 0.6], [1.0, 0.0], [3.0, -1.0]], np.float32))
    np.testing.assert_allclose(losses, [np.log(4), 0, np.nan], rtol=1e-6)


def test_masked_positions_may_hold_anything():
    logits, labels = jnp.asarray(LOGITS).at[0].set(jnp.nan), INDICES.copy()
    labels[0] = -7
    wanted = compat.SoftmaxFocalLoss()(labels[1:], logits[1:])
    keras.src.backend.set_keras_mask(logits, jnp.arange(6) > 0)
    np.testing.assert_allclose(compat.SoftmaxFocalLoss()(labels, logits), wanted, rtol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid_focal_loss", "softmax_focal_loss"])
def test_functions_of_focal_jax_are_refused(name):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="sigmoid")])
    model.compile("sgd", loss=getattr(focal_jax, name))
    with pytest.raises(InputError, match=r"wanted focal_jax\.compat\.keras"):
        model.fit(LOGITS[:, :3], ONE_HOT, verbose=0)


def _linear(declaration, predictions, labels):
    """Return the losses of a linear head whose kernel is the identity."""
    logits, kernel = predictions
    if "sparse" in declaration.name:
        return declaration.function(logits, kernel, labels, jnp.ones(labels.shape))
    return declaration.function(logits, kernel, labels)


@pytest.mark.parametrize("name", sorted(focal_jax.catalogue.LOSSES))
def test_every_loss_by_name(name):
    declaration = focal_jax.catalogue.LOSSES[name]
    loss = compat.Loss(name, reduction=None)
    labels = INDICES if declaration.labels in (("integer",), ("real",)) else ONE_HOT
    if declaration.kind == "linear":
        labels = INDICES
        if "sigmoid" in name or "asymmetric" in name:
            labels = INDICES[:, None]
        predictions = jnp.asarray(LOGITS), jnp.eye(4)
        wanted = _linear(declaration, predictions, labels)
        np.testing.assert_allclose(loss(labels, predictions), wanted, rtol=1e-6)
        return
    losses = declaration.function(LOGITS, labels)
    wanted = losses.mean(-1) if declaration.kind == "elementwise" else losses
    np.testing.assert_allclose(loss(labels, LOGITS), wanted, rtol=1e-6)
    again = compat.Loss.from_config(loss.get_config())
    np.testing.assert_array_equal(again(labels, LOGITS), loss(labels, LOGITS))


class _Weighted(compat.SoftmaxFocalLoss):
    def __init__(self, **keywords):
        super().__init__(**keywords)


class _Varifocal(compat.Loss):
    def __init__(self, **keywords):
        super().__init__("varifocal_loss", **keywords)


class _Forwarding(compat.Loss):
    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)


class _Fixed(compat.SigmoidFocalLoss):
    def __init__(self, gamma=3.0):
        super().__init__(gamma=gamma)


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (_Weighted(alpha=[0.5, 1, 1, 1], gamma=1.0, reduction="sum"), INDICES),
        (_Varifocal(alpha=0.5, name="quality"), ONE_HOT),
        (_Forwarding("asymmetric_loss", margin=0.2), ONE_HOT),
        (_Fixed(gamma=1.0), ONE_HOT),
    ],
)
def test_subclasses_are_restored_from_their_configuration(loss, labels):
    again = type(loss).from_config(loss.get_config())
    assert (again.name, again.reduction) == (loss.name, loss.reduction)
    np.testing.assert_array_equal(again(labels, LOGITS), loss(labels, LOGITS))


@pytest.mark.parametrize("probability", [[[1.1]], [[-0.1]]])
def test_gradient_of_an_invalid_probability_is_nan(probability):
    loss = compat.SigmoidFocalLoss(from_logits=False)
    value, gradient = jax.value_and_grad(lambda p: loss(jnp.ones((1, 1)), p))(
        jnp.array(probability)
    )
    assert jnp.isnan(value)
    assert jnp.all(jnp.isnan(gradient))
    # A position without weight has no gradient.
    both = jnp.array([probability[0], [0.3]])
    of_weights = jax.grad(lambda p: loss(jnp.ones((2, 1)), p, jnp.array([0.0, 1.0])))(both)
    assert of_weights[0] == 0
    assert of_weights[1] < 0


@pytest.mark.parametrize(
    ("loss", "y_true", "y_pred", "match"),
    [
        (compat.SoftmaxFocalLoss(), LOGITS, INDICES, "y_pred: got dtype int64, wanted a floating"),
        (compat.SoftmaxFocalLoss(), INDICES[:5], LOGITS, r"y_true: .*\(5,\)"),
        (compat.SoftmaxFocalLoss(), INDICES > 0, LOGITS, "y_true: got dtype bool"),
        (compat.SoftmaxFocalLoss(), np.zeros(2, np.uint8), np.zeros((2, 300), "f"), "uint8.*299"),
        (compat.SoftmaxFocalLoss(), np.zeros(2, "e"), np.zeros((2, 4000), "f"), "float16.*3999"),
        (
            compat.SoftmaxFocalLoss(ignore_class=1),
            ONE_HOT,
            LOGITS,
            "wanted class indices for ignore_class",
        ),
        (compat.SigmoidFocalLoss(), ONE_HOT[:, :3], LOGITS, r"y_true: .*\(6, 3\)"),
        (compat.Loss("dual_focal_loss_with_integer_labels"), ONE_HOT[:, :2], LOGITS, "y_true"),
    ],
)
def test_errors_of_calls(loss, y_true, y_pred, match):
    y_pred = y_pred.astype(np.int32) if y_pred.dtype == np.int64 else y_pred
    with pytest.raises(InputError, match=match.replace("int64", "int32")):
        loss(y_true, y_pred)


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": -1},
        {"alpha": -1.0},
        {"label_smoothing": 2.0},
        {"from_logits": "yes"},
        {"gamma": "2"},
        {"reduction": ["mean"]},
        {"name": 5},
        {"dtype": np.ones(3)},
        {"ignore_index": 0},
        {"apply_class_balancing": True},
    ],
)
@pytest.mark.parametrize("make", [compat.SigmoidFocalLoss, compat.SoftmaxFocalLoss])
def test_errors_at_construction(make, options):
    with pytest.raises(InputError, match=next(iter(options))):
        make(**options)


@pytest.mark.parametrize(
    "weight", [np.ma.array([1.0, 2.0], mask=[0, 1]), np.ones(5), "a", object(), [[1], [1, 2]]]
)
def test_invalid_sample_weights(weight):
    with pytest.raises(InputError, match="sample_weight: got"):
        compat.SoftmaxFocalLoss()(INDICES[:2], LOGITS[:2], weight)


def test_sample_weights_of_dtype_bool():
    weights = np.arange(len(INDICES)) > 0
    loss = compat.SoftmaxFocalLoss()
    assert loss(INDICES, LOGITS, weights) == loss(INDICES, LOGITS, weights.astype("float32"))


@pytest.mark.parametrize("y_pred", [None, 3.0, (), (LOGITS,)])
def test_a_linear_loss_names_its_predictions(y_pred):
    loss = compat.Loss("linear_softmax_focal_loss_with_integer_labels")
    with pytest.raises(InputError, match=r"y_pred: got .*, wanted \(features, kernel\)"):
        loss(INDICES, y_pred)
    with pytest.raises(InputError, match="features: got a head without weights"):
        compat.LinearHead(4).loss(loss, INDICES, LOGITS)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras
@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_fit_save_and_load(policy, tmp_path):
    x = RNG.normal(size=(64, 8)).astype(np.float32)
    y = np.argmax(x[:, :3], -1)
    bias = training.prior_bias_init(0.3)
    layer = keras.layers.Dense(3, bias_initializer=bias, dtype=policy)
    model = keras.Sequential([keras.Input((8,)), layer])
    np.testing.assert_allclose(layer.bias, np.log(0.3 / 0.7), rtol=1e-6)
    optimizer = keras.optimizers.Adam(0.05)
    if policy == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    alpha = np.array([1.0, 2.0, 3.0])
    model.compile(optimizer, compat.SoftmaxFocalLoss(alpha, label_smoothing=0.1))
    history = model.fit(x, y, epochs=8, verbose=0, sample_weight=np.ones(64)).history["loss"]
    assert history[-1] < 0.7 * history[0]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", custom_objects={"init": bias})
    np.testing.assert_allclose(again.evaluate(x, y, verbose=0), model.evaluate(x, y, verbose=0))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras
@pytest.mark.parametrize("jit_compile", [True, False])
def test_class_weight_of_fit(jit_compile):
    x, y = RNG.normal(size=(64, 8)).astype(np.float32), np.arange(64) % 3
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    losses = focal_jax.softmax_focal_loss_with_integer_labels(model(x), y)
    weight = np.array([1.0, 2.0, 0.5])
    want = focal_jax.reduce_loss(losses, weights=weight[y], normalization=64)
    optimizer = keras.optimizers.SGD(0.0)
    model.compile(optimizer, compat.SoftmaxFocalLoss(), jit_compile=jit_compile)
    history = model.fit(x, y, batch_size=64, class_weight=dict(enumerate(weight)), verbose=0)
    np.testing.assert_allclose(history.history["loss"][0], want, rtol=1e-5)


@pytest.mark.parametrize("use_bias", [True, False])
def test_linear_head(use_bias):
    head = compat.LinearHead(4, use_bias=use_bias)
    features = jnp.asarray(RNG.normal(size=(6, 5)).astype(np.float32))
    logits, labels = head(features), np.where(np.arange(6) == 2, -1, INDICES)
    loss = compat.Loss("linear_softmax_focal_loss_with_integer_labels", ignore_class=-1)
    wanted = compat.SoftmaxFocalLoss(ignore_class=-1)(labels, logits)
    np.testing.assert_allclose(head.loss(loss, labels, features), wanted, rtol=1e-6)
    with pytest.raises(InputError, match="loss: got"):
        head.loss(compat.SoftmaxFocalLoss(), labels, features)
    head = compat.LinearHead(4, activation="softmax")
    with pytest.raises(InputError, match="activation: got softmax, wanted None"):
        head.loss(loss, labels, features)


@pytest.mark.slow
def test_data_parallel():
    code = """
import keras, numpy as np
from focal_jax.compat.keras import SoftmaxFocalLoss
def loss_after(distribution):
    keras.utils.set_random_seed(0)
    keras.distribution.set_distribution(distribution)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    model.compile("sgd", SoftmaxFocalLoss(ignore_class=0))
    x = np.random.default_rng(0).normal(size=(64, 8)).astype("f")
    return model.fit(x, x[:, :3].argmax(-1), batch_size=32, epochs=2, verbose=0).history["loss"][-1]
import jax
assert jax.device_count() == 8
print(loss_after(None), loss_after(keras.distribution.DataParallel()))
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "KERAS_BACKEND": "jax"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | flags, capture_output=True, timeout=300
    )
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    one, eight = map(float, run.stdout.split())
    assert np.isclose(one, eight, rtol=1e-5)


@pytest.mark.parametrize(
    ("setup", "match"),
    [
        ("sys.modules['keras'] = None", "install Keras 3 in a checkout: pip install"),
        ("import os; os.environ['KERAS_BACKEND'] = 'numpy'", "'numpy', wanted 'jax'"),
    ],
)
def test_missing_keras_and_other_backends(setup, match):
    code = f"import sys; {setup}\nimport focal_jax.compat.keras"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert run.returncode
    assert match in run.stderr.decode().splitlines()[-1]


@pytest.mark.parametrize("backend", ["jax", "numpy"])
def test_help_of_the_package_lists_what_can_be_imported(backend):
    code = (
        "import pydoc, focal_jax; pydoc.render_doc(focal_jax.compat); print(dir(focal_jax.compat))"
    )
    environment = os.environ | {"KERAS_BACKEND": backend}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, timeout=300, check=True)
    assert ("'keras'" in run.stdout.decode()) == (backend == "jax")


def test_prior_bias_init_in_three_forms():
    init = training.prior_bias_init(0.1)
    key, shape = jax.random.key(0), (2,)
    forms = init(key, shape, jnp.float32), init(shape, jnp.float32), init(shape, dtype="float32")
    for bias in forms:
        assert bias.dtype == jnp.float32
        np.testing.assert_allclose(bias, np.full(2, -np.log(9)), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning")
def test_initializer_of_the_prior_is_saved_and_cloned(tmp_path):
    layer = keras.layers.Dense(8, bias_initializer=training.prior_bias_init(0.02))
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile("sgd", loss=compat.SigmoidFocalLoss(alpha=0.25))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for other in (
        loaded,
        keras.models.clone_model(model),
        type(model).from_config(model.get_config()),
    ):
        assert other.layers[0].bias_initializer == training.prior_bias_init(0.02)
    found, want = (keras.ops.convert_to_numpy(each(np.ones((1, 4)))) for each in (loaded, model))
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_one_hot_labels_for_a_loss_of_the_label_only():
    loss = compat.Loss("dual_focal_loss_with_integer_labels")
    with pytest.raises(InputError, match=r"y_true: got shape \(6, 4\), wanted class indices"):
        loss(ONE_HOT, LOGITS)


@pytest.mark.parametrize("dtype", ["int32", "bool", "uint8"])
def test_dtype_of_a_loss_is_floating(dtype):
    with pytest.raises(InputError, match=f"dtype: got '{dtype}'.* wanted a floating dtype"):
        compat.SoftmaxFocalLoss(dtype=dtype)
