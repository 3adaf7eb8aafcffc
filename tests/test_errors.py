"""Invalid arguments raise an error with the argument's name, the value, and the valid values.

An option of each kind is tested once for each kind of loss, because losses of one kind share the
engine that checks the arguments.
"""

import copy
import inspect
import math
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers import KINDS, LOSSES, PROGRAMS, range_of

import focal_jax
from focal_jax import catalogue, engine

pytestmark = pytest.mark.quick

# Calls the loss or its reference, see `helpers.Row`.
BOTH = pytest.mark.parametrize("call", ["eager", "reference"])
ELEMENTWISE, DISTRIBUTION, INTEGER, LINEAR, INTERVAL, REGION = (
    next(row for row in KINDS if row.kind == kind)
    for kind in ("elementwise", "distribution", "position", "linear", "interval", "region")
)
HEADS = pytest.mark.parametrize("row", [INTEGER, LINEAR], ids=str)
KEYS = jax.random.split(jax.random.key(0), 4)


def _raises(call, row, changes, message):
    """Check that the changed arguments raise `InputError` with a message that starts with it."""
    arguments = row.arguments(0, (4, 3)) | changes
    with pytest.raises(focal_jax.InputError, match=f"^{message}") as caught:
        getattr(row, call)(**arguments)
    assert "Chex" not in str(caught.value)


def _id(x):
    return getattr(x, "__qualname__", str(x))[:40]


# ---------------------------------------------------------------- arrays


@BOTH
@pytest.mark.parametrize("row", KINDS, ids=str)
def test_arrays(call, row):
    first, labels = row.first, row.arguments(0, (4, 3))["labels"]
    for changes, message in (
        ({first: jnp.zeros((4, 3), jnp.int32)}, f"{first}: got dtype int32, wanted a floating"),
        ({first: KEYS}, f"{first}: got .*key"),
        ({first: "logits"}, f"{first}: got 'logits', wanted"),
        ({first: None}, f"{first}: got None, wanted"),
        ({"labels": jnp.zeros((5, 3), labels.dtype)}, r"labels: got shape \(5, 3\), wanted"),
        ({"labels": jnp.zeros((2, 4, 3), labels.dtype)}, r"labels: got shape \(2, 4, 3\), wanted"),
        ({"labels": KEYS}, "labels: got .*key"),
        ({"labels": ["cat", "dog"]}, "labels: got .*, wanted"),
        ({"labels": None}, "labels: got None, wanted"),
        ({"labels": labels.astype(complex)}, "labels: got dtype complex64, wanted"),
        ({"where": jnp.ones(4)}, "where: got dtype float32, wanted bool"),
        ({"where": jnp.ones(7, bool)}, r"where: got shape \(7,\), wanted a shape that broadcasts"),
        ({"where": "all"}, "where: got 'all', wanted"),
    ):
        _raises(call, row, changes, message)


@BOTH
@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        (INTEGER, {"labels": jnp.zeros(4)}, "labels: got dtype float32, wanted an integer dtype"),
        (INTEGER, {"labels": jnp.zeros(4, bool)}, "labels: got dtype bool, wanted an integer"),
        (INTEGER, {"labels": jnp.zeros((4, 1), int)}, r"labels: got shape \(4, 1\), wanted \(4,\)"),
        (INTEGER, {"labels": jnp.zeros((4, 3), int)}, r"labels: got shape \(4, 3\), wanted \(4,\)"),
        (DISTRIBUTION, {"labels": jnp.ones(3)}, r"labels: got shape \(3,\), wanted \(4, 3\)"),
        (DISTRIBUTION, {"labels": jnp.ones((4, 1))}, r"labels: got shape \(4, 1\), wanted \(4, 3"),
        (ELEMENTWISE, {"labels": jnp.zeros((4, 3, 1))}, r"labels: got shape \(4, 3, 1\), wanted"),
        (
            ELEMENTWISE,
            {"logits": jnp.zeros((4, 1)), "labels": jnp.zeros(4)},
            r"labels: got shape \(4,\), wanted",
        ),
        (INTERVAL, {"labels": jnp.zeros(3)}, r"labels: got shape \(3,\), wanted \(4,\)"),
        (REGION, {"labels": jnp.zeros(4)}, r"labels: got shape \(4,\), wanted \(4, 3\)"),
        (LINEAR, {"labels": jnp.zeros(4)}, "labels: got dtype float32, wanted an integer dtype"),
        (LINEAR, {"kernel": jnp.zeros((3, 3), int)}, "kernel: got dtype int32, wanted a floating"),
        (LINEAR, {"kernel": jnp.zeros((6, 3))}, r"kernel: got shape \(6, 3\), wanted"),
        (LINEAR, {"kernel": jnp.zeros(3)}, r"kernel: got shape \(3,\), wanted"),
        (LINEAR, {"kernel": jnp.zeros((1, 3, 3))}, r"kernel: got shape \(1, 3, 3\), wanted"),
        (
            LINEAR,
            {"kernel": jnp.zeros((3, 6)), "transpose_kernel": True},
            r"kernel: got shape \(3, 6\), wanted",
        ),
        (LINEAR, {"features": jnp.float32(1)}, r"kernel: got shape \(3, 3\), wanted"),
        (LINEAR, {"bias": jnp.zeros(6)}, r"bias: got shape \(6,\), wanted \(3,\)"),
        (LINEAR, {"bias": jnp.zeros((4, 3))}, r"bias: got shape \(4, 3\), wanted \(3,\)"),
        (LINEAR, {"bias": jnp.zeros(3, int)}, "bias: got dtype int32, wanted a floating"),
    ],
    ids=_id,
)
def test_shapes_and_dtypes_of_one_kind_of_loss(call, row, changes, message):
    _raises(call, row, changes, message)


@pytest.mark.parametrize("row", LOSSES, ids=str)
def test_checks_run_while_jax_traces(row):
    arguments = row.arguments(0, (4, 3)) | {"labels": jnp.zeros((5, 7), jnp.int32)}
    with pytest.raises(focal_jax.InputError, match=r"^labels"):
        row.compiled(**arguments)


@pytest.mark.parametrize("kind", [ValueError, TypeError, AssertionError])
def test_input_error_is_the_exception_that_a_caller_expects(kind):
    with pytest.raises(kind, match="logits"):
        focal_jax.sigmoid_focal_loss(jnp.zeros(3, int), jnp.zeros(3))


# Values that no argument of any function accepts.
MASKED = np.ma.array([0.0, 1.0, 0.0, 1.0], mask=[True, False, False, False])
INVALID = [
    object(),
    lambda x: x,
    {1: 2, "b": 3},
    {1, 2},
    [[1, 2], [3]],
    [jnp.ones(2), jnp.ones(3)],
    [1.0, None],
    KEYS,
    MASKED,
    [np.ma.masked, 1.0],
    np.zeros(4, [("x", "f4")]),
    np.timedelta64(1, "s"),
    bytearray(b"ab"),
    2j,
]


def _rejects(name, function, arguments):
    for invalid in INVALID:
        with pytest.raises(focal_jax.InputError, match=f"^{name}: got .*, wanted "):
            function(**arguments | {name: invalid})


@BOTH
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_every_argument_of_every_loss(call, row):
    for name in inspect.signature(row.loss.function).parameters:
        if (call, name) != ("reference", "chunk_size"):  # which the reference ignores
            _rejects(name, getattr(row, call), row.arguments(0, (4, 3)))


def _helpers():
    from focal_jax import training

    ema = training.positive_count_ema()
    losses = {"losses": jnp.ones(4), "labels": jnp.zeros(4, int)}
    yield focal_jax.reduce_loss, losses
    yield focal_jax.reference.reduce_loss, losses
    yield training.prior_bias_init, {}
    yield training.class_balanced_alpha, {"counts": [1, 2]}
    yield training.logit_adjustment, {"counts": [1, 2]}
    yield training.positive_weight, {"w": 1.0}
    yield training.sample_dependent_gamma, {"p_t": jnp.ones(3)}
    yield training.positive_count_ema, {}
    yield ema.update, {"count": 1, "state": ema.init()}


@pytest.mark.parametrize(
    "module", [focal_jax.training, focal_jax.detection], ids=["training", "detection"]
)
def test_helpers_name_an_unknown_keyword(module):
    functions = [x for name in module.__all__ if inspect.isfunction(x := getattr(module, name))]
    assert len(functions) >= 6
    for function in functions:
        with pytest.raises(focal_jax.InputError, match=f"^reduction: got .*{function.__name__}"):
            function(reduction="mean")


@pytest.mark.parametrize(("function", "arguments"), list(_helpers()), ids=_id)
def test_every_argument_of_every_helper(function, arguments):
    for name in inspect.signature(function).parameters:
        _rejects(name, function, arguments)


def test_masked_arrays_name_the_replacement():
    for changes in ({"labels": MASKED}, {"where": MASKED == 1}, {"alpha": MASKED}):
        with pytest.raises(focal_jax.InputError, match=r"\.filled\(\).*where=~mask"):
            focal_jax.sigmoid_focal_loss(**{"logits": jnp.ones(4), "labels": 1} | changes)


WORDS = (
    ("reduction", "reduce_loss"),
    ("ignore_index", "ignore_label"),
    ("from_logits", "logits"),
    ("pos_weight", "positive_weight"),
    ("class_weight", "alpha"),
)


@pytest.mark.parametrize("call", ["eager", "reference"])
@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.name in catalogue.LOSSES], ids=str)
def test_words_of_other_libraries(call, row):
    for word, hint in WORDS:
        _raises(call, row, {word: 1}, f"{word}: got an option that .*; .*{hint}")
    function = row.loss.function if call == "eager" else row.reference
    with pytest.raises(focal_jax.InputError, match="too many positional arguments"):
        function(*[jnp.zeros((4, 3))] * 5)
    with pytest.raises(focal_jax.InputError, match=r"missing a required argument"):
        function(jnp.zeros((4, 3)))


def _outside_the_catalogue():
    """Yield the functions that the catalogue does not contain, with arguments."""
    x, index, pairs = jnp.zeros((4, 3)), jnp.zeros(4, int), jnp.zeros((4, 2), int)
    linear = x, jnp.eye(3)
    yield focal_jax.reduce_loss, (x,)
    yield focal_jax.token_statistics, (x, index)
    yield focal_jax.linear_token_statistics, (*linear, index)
    yield focal_jax.softmax_focal_loss_with_sparse_labels, (x, pairs, jnp.ones((4, 2)))
    yield focal_jax.linear_softmax_focal_loss_with_sparse_labels, (*linear, pairs, pairs)
    yield focal_jax.linear_sigmoid_focal_loss, (*linear, pairs)
    yield focal_jax.linear_asymmetric_loss, (*linear, pairs)
    yield ELEMENTWISE.loss.engine_loss.linear, (*linear, pairs)
    yield INTEGER.loss.engine_loss.linear, (*linear, index)
    yield DISTRIBUTION.loss.engine_loss.of_distribution, (x, x)
    yield engine.of_log_probability, (INTEGER.loss.function, -jnp.ones(4))


@pytest.mark.parametrize(("function", "arrays"), list(_outside_the_catalogue()), ids=_id)
def test_words_of_other_libraries_outside_the_catalogue(function, arrays):
    for word, hint in WORDS:
        with pytest.raises(focal_jax.InputError, match=f"^{word}: got an option .*; .*{hint}"):
            function(*arrays, **{word: 1})
    with pytest.raises(focal_jax.InputError, match="too many positional arguments"):
        function(*arrays, *[jnp.zeros((4, 3))] * 5)
    with pytest.raises(focal_jax.InputError, match="missing a required argument"):
        function()


def test_sparse_labels_of_one_class_warn():
    linear, pairs = (jnp.zeros((4, 1)), jnp.ones((1, 1))), jnp.zeros((4, 2), int)
    for function, arrays in (
        (focal_jax.softmax_focal_loss_with_sparse_labels, linear[:1]),
        (focal_jax.linear_softmax_focal_loss_with_sparse_labels, linear),
    ):
        with pytest.warns(UserWarning, match="one class.*sigmoid_focal_loss"):
            function(*arrays, pairs, jnp.ones((4, 2)))


def test_checks_do_not_depend_on_chex():
    chex.disable_asserts()
    try:
        for row in KINDS:
            labels = row.arguments(0, (4, 3))["labels"]
            _raises("eager", row, {"labels": labels[:3]}, r"labels: got shape \(3,")
            _raises("eager", row, {"where": jnp.ones((4, 3))}, "where: got dtype float32")
    finally:
        chex.enable_asserts()


# ---------------------------------------------------------------- declared options


def _options(kind):
    """Return one option for each kind of loss and each declaration, but for the default."""
    found = {}
    for row in (*KINDS, *PROGRAMS):
        for name, option in row.options.items():
            if option.kind == kind:
                found.setdefault((row.kind, option.wanted, option.optional), (row, name, option))
    return list(found.values())


NUMBERS = [*_options("exponent"), *_options("number")]


@BOTH
@pytest.mark.parametrize(("row", "name", "option"), NUMBERS, ids=_id)
def test_numbers_and_exponents(call, row, name, option):
    for shape in ((7,), (2, 4, 3)):
        message = f"{name}: got shape {re.escape(str(shape))}, wanted"
        _raises(call, row, {name: jnp.full(shape, range_of(option)[0] + 0.5)}, message)
    _raises(call, row, {name: "2"}, f"{name}: got '2', wanted")
    _raises(call, row, {name: {"a": 1.0}}, f"{name}: got .*, wanted")
    _raises(call, row, {name: KEYS[0]}, f"{name}: got .*key")
    _raises(call, row, {name: 2j}, f"{name}: got .*, wanted")
    if not option.optional:
        _raises(call, row, {name: None}, f"{name}: got None, wanted")


def _outside(option):
    """Return numbers that are outside the range of an option."""
    values = [math.nan, math.inf, -math.inf] if option.differentiable else []
    if math.isfinite(option.low):
        values += [option.low - 1, option.low - 0.01, *([option.low] * option.above_low)]
    if math.isfinite(option.high):
        values += [option.high + 0.01, option.high + 1, *([option.high] * option.below_high)]
    return values


@BOTH
@pytest.mark.parametrize(("row", "name", "option"), NUMBERS, ids=_id)
def test_numbers_outside_their_range(call, row, name, option):
    wanted = re.escape(option.wanted)
    for value in _outside(option):
        for invalid in (value, np.float32(value), np.full((), value), jnp.float32(value)):
            _raises(call, row, {name: invalid}, f"{name}: got .*, wanted {wanted}")
    if option.kind == "exponent":
        _raises(call, row, {name: 10**400}, f"{name}: got .*, wanted {wanted}")


@BOTH
@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.numbers], ids=str)
def test_constants_of_16_bits_inside_a_program(call, row):
    # Their values are known while JAX traces.
    arguments = row.arguments(0, (4, 3))
    for name, option in row.numbers.items():
        valid, invalid = (jnp.bfloat16(x) for x in (range_of(option)[0] + 0.5, -jnp.inf))
        jax.eval_shape(lambda: getattr(row, call)(**arguments | {name: valid}))  # noqa: B023
        if math.isfinite(option.low):
            with pytest.raises(focal_jax.InputError, match=f"^{name}: got -inf, wanted"):
                jax.eval_shape(lambda: getattr(row, call)(**arguments | {name: invalid}))  # noqa: B023


@BOTH
@pytest.mark.parametrize("row", [ELEMENTWISE, DISTRIBUTION, INTEGER, LINEAR], ids=str)
def test_alpha_of_minus_one_names_none(call, row):
    # In other libraries -1 means no weighting.
    numbers = -1, -1.0, np.float32(-1), np.full((), -1), jnp.float32(-1), jnp.int32(-1)
    for alpha in (*numbers, np.array([0.5, -1, 1]), jnp.array([0.5, -1, 1]), [0.5, -1, 1]):
        _raises(call, row, {"alpha": alpha}, "alpha: got -1, wanted .*None means no weighting")


@BOTH
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_every_loss_checks_its_options(call, row):
    for name, option in row.options.items():
        for value in _outside(option)[:1]:
            _raises(call, row, {name: value}, f"{name}: got {value:g}, wanted")
    for name in row.exponents:
        _raises(call, row, {name: -0.5}, f"{name}: got -0.5, wanted a finite number >= 0")


@BOTH
@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.exponents], ids=str)
def test_huge_exponents_are_valid(call, row):
    # All probabilities are below 1, so that their powers are 0.
    arguments = row.arguments(0, (4, 3), scale=0.1)
    static = row.axis(-1)

    @jax.jit
    def losses(arrays):
        exponents = [dict.fromkeys(row.exponents, x) for x in (1e10, 10**9, 1e30, 200)]
        return [getattr(row, call)(**arrays, **static, **x) for x in exponents]

    found = losses({k: x for k, x in arguments.items() if k not in static})
    assert np.all(np.isfinite(found))


@BOTH
@pytest.mark.parametrize(("row", "name", "option"), _options("mask"), ids=_id)
def test_masks(call, row, name, option):
    _raises(call, row, {name: jnp.ones(3)}, f"{name}: got dtype float32, wanted bool")
    _raises(call, row, {name: jnp.ones(2, bool)}, rf"{name}: got shape \(2,\), wanted a shape th")


@BOTH
@pytest.mark.parametrize(("row", "name", "option"), _options("flag"), ids=_id)
def test_flags(call, row, name, option):
    for value in (1, None, "True", jnp.array(True)):
        _raises(call, row, {name: value}, f"{name}: got .*, wanted True or False")


@BOTH
@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.numbers], ids=str)
def test_vectors_that_fit_two_axes(call, row):
    # One number per class, or per position along the last axis?
    shape = (2, 3, 3) if row.softmax else (2, 3, 2, 3)
    arguments = row.arguments(0, shape)
    for name, option in row.numbers.items():
        if option.per_class:
            continue
        vector = np.full(3, range_of(option)[0] + 0.5, np.float32)
        with pytest.raises(focal_jax.InputError, match=f"^{name}: got .*reshape.*, 3\\)"):
            getattr(row, call)(**arguments | {name: vector})
        jax.eval_shape(lambda: getattr(row, call)(**arguments | {name: vector[None]}))  # noqa: B023


def test_weights_that_fit_two_axes():
    for module in (focal_jax, focal_jax.reference):
        with pytest.raises(focal_jax.InputError, match=r"^weights: got .*batch.*reshape\(1, 3\)"):
            module.reduce_loss(jnp.ones((3, 3)), weights=np.ones(3))
        assert module.reduce_loss(jnp.ones((3, 3)), weights=np.ones((3, 1))) == 1
        with pytest.raises(focal_jax.InputError, match=r"reshape\(1, 2, 2\).*reshape\(2, 2, 1\)"):
            module.reduce_loss(jnp.ones((2, 2, 2)), weights=np.ones((2, 2)))


def test_masks_that_fit_two_axes():
    mask, images = np.ones(3, bool), np.ones((3, 3, 3), np.float32)
    for module in (focal_jax, focal_jax.reference):
        for call in (
            partial(module.reduce_loss, images[0]),
            partial(module.sigmoid_focal_loss, images[0], images[0]),
            partial(module.softmax_focal_loss, images, images),
        ):
            with pytest.raises(focal_jax.InputError, match=r"^where: got .*batch.*reshape\(1, 3\)"):
                call(where=mask)
            call(where=mask[None])


def test_bool_weights_are_numbers():
    for module in (focal_jax, focal_jax.reference):
        for weights in (np.array([True, False]), jnp.array([True, False]), [True, False]):
            assert module.reduce_loss(jnp.array([1.0, 5.0]), weights=weights) == 1


def test_temperatures_that_fit_two_axes():
    for loss, arrays in (
        (focal_jax.token_statistics, [np.ones((3, 3, 3), "f")]),
        (focal_jax.linear_token_statistics, [np.ones((3, 3, 4), "f"), np.ones((4, 3), "f")]),
    ):
        with pytest.raises(focal_jax.InputError, match=r"^temperature: got .*reshape\(1, 3\)"):
            loss(*arrays, np.zeros((3, 3), int), temperature=np.ones(3))


def test_numbers_of_a_parameter_are_checked():
    with pytest.raises(focal_jax.InputError, match="alpha: got -1"):
        focal_jax.sigmoid_focal_loss(jnp.ones(2), jnp.ones(2), alpha=nnx.Param(jnp.array(-1.0)))


# ---------------------------------------------------------------- other options


@BOTH
@pytest.mark.parametrize("row", [DISTRIBUTION, INTEGER, LINEAR], ids=str)
def test_class_weights(call, row):
    for alpha, shape in ((jnp.ones((4, 3)), r"\(4, 3\)"), (jnp.ones(1), r"\(1,\)")):
        message = rf"alpha: got shape {shape}, wanted a scalar or \(3,\)"
        _raises(call, row, {"alpha": alpha}, message)


@BOTH
@pytest.mark.parametrize("row", [DISTRIBUTION, INTEGER, INTERVAL, REGION], ids=str)
def test_axis(call, row):
    _raises(call, row, {"axis": 2}, r"axis: got 2, wanted an axis in \[-2, 2\)")
    _raises(call, row, {"axis": -3}, r"axis: got -3, wanted an axis in \[-2, 2\)")
    _raises(call, row, {"axis": 1.0}, "axis: got 1.0, wanted an integer")
    _raises(call, row, {"logits": jnp.float32(1)}, "axis: got -1, wanted an axis in")


@BOTH
@HEADS
def test_ignore_label(call, row):
    for ignored, message in (
        (1.0, "got 1.0, wanted None or an integer"),
        ("background", "got 'background', wanted None or an integer"),
        (2**31, "got 2147483648, wanted an integer that fits int32"),
        (-(2**31) - 1, "got -2147483649, wanted an integer that fits int32"),
        (np.zeros(2, int), "got .*, wanted None or an integer"),
    ):
        _raises(call, row, {"ignore_label": ignored}, f"ignore_label: {message}")


@BOTH
@HEADS
def test_traced_ignore_label(call, row):
    arguments = row.arguments(0, (4, 3))
    with pytest.raises(focal_jax.InputError, match=r"^ignore_label: got .*, wanted None or an int"):
        jax.jit(lambda i: getattr(row, call)(**arguments, ignore_label=i))(1)


@BOTH
@HEADS
def test_label_smoothing(call, row):
    message = r"label_smoothing: got .*, wanted a number in \[0, 1\)"
    for smoothing in (-0.1, 1, 1.5, math.nan, "0.1", None, True, jnp.float32(0.1)):
        _raises(call, row, {"label_smoothing": smoothing}, message)


@pytest.mark.parametrize("module", [focal_jax, focal_jax.reference], ids=["losses", "reference"])
def test_the_dual_focal_loss_has_no_label_smoothing(module):
    loss = module.dual_focal_loss_with_integer_labels
    assert "label_smoothing" not in inspect.signature(loss).parameters
    with pytest.raises(TypeError, match="label_smoothing"):
        loss(jnp.zeros((4, 3)), jnp.zeros(4, int), label_smoothing=0.1)


@HEADS
def test_return_logsumexp(row):
    for value in ([], 1, None, jnp.array(True)):
        message = "return_logsumexp: got .*, wanted True or False"
        _raises("eager", row, {"return_logsumexp": value}, message)


AXIS_NAMES = (3, 0, True, 1.5, b"i", ["i"], ("i", 0), {"i": 1}, np.zeros(1), jnp.array(0), [0])


@BOTH
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_axis_names_that_are_no_names(call, row):
    for name in {"axis_name", "class_axis_name"} & {*inspect.signature(row.eager).parameters}:
        for value in AXIS_NAMES:
            message = f"{name}: got .*, wanted the name of a mapped axis"
            _raises(call, row, {name: value}, message)


@BOTH
@pytest.mark.parametrize("row", [row for row in PROGRAMS if row.softmax], ids=str)
def test_python_bools_are_no_numbers(call, row):
    for name in {"axis", "ignore_label", *row.numbers}:
        if name in inspect.signature(row.loss.function).parameters:
            _raises(call, row, {name: True}, f"{name}: got True, wanted")
    for name in row.numbers:
        for bools in (np.array(True), jnp.array(True), [True, False]):
            _raises(call, row, {name: bools}, f"{name}: got dtype bool, wanted")


@BOTH
@pytest.mark.parametrize("row", PROGRAMS, ids=str)
def test_a_softmax_over_one_class_warns(call, row):
    arguments = row.all(0, (4, 1))
    if not row.softmax or (row.kind == "interval" and call != "eager"):
        return
    with pytest.warns(UserWarning, match="one class.*sigmoid_focal_loss"):
        getattr(row, call)(**arguments)


def test_losses_of_the_engine():
    for make, arrays in ((engine.elementwise_loss, 2), (engine.position_loss, 1)):
        value = lambda *args: args[0] if arrays == 2 else args[0].n  # noqa: E731, B023
        for options, message in (
            ({"where": 1.0}, "where: got the name of an argument"),
            ({"labels": 1.0}, "labels: got the name of an argument"),
            ({"axis_name": 1.0}, "axis_name: got the name of an argument"),
            ({"chunk_size": 1.0}, "chunk_size: got the name of an argument"),
            ({"value": 1.0}, r"loss: got multiple values for argument 'value', wanted \w+_loss\("),
            ({"gamma": "2"}, "gamma: got '2', wanted a finite number"),
            ({"gamma": engine.exponent(-1)}, "gamma: got -1, wanted"),
            ({"gamma": engine.exponent(1, per_class=True)}, "gamma: got per_class=True"),
            (
                {"gamma": engine.number(1.0, low="x")},
                "gamma: got Option.*, wanted numbers as bounds",
            ),
        ):
            with pytest.raises(focal_jax.InputError, match=message):
                make(value, **options)
        for invalid in (3, "value", lambda x, y, *, beta: x, lambda x: x):
            with pytest.raises(focal_jax.InputError, match=r"^value: got .*, wanted"):
                make(invalid, gamma=1.0)
        for result in (1.0, (jnp.ones(4),), jnp.ones(2), None, jnp.ones((4, 2), jnp.float16)):
            loss = make(lambda *args: result)  # noqa: B023
            with pytest.raises(focal_jax.InputError, match=r"^value: got .*, wanted an array"):
                loss(jnp.ones((4, 2)), jnp.zeros((4, 2)[:arrays], int))
            with pytest.raises(focal_jax.InputError, match=r"^value: got .*, wanted an array"):
                loss.linear(jnp.ones((4, 3)), jnp.ones((3, 2)), jnp.zeros((4, 1)[:arrays], int))
        assert copy.deepcopy(loss) is loss
        # A parameter with a default that is not declared keeps its default.
        twice = lambda *args, gamma, scale=2.0: scale * value(*args)  # noqa: E731, B023
        default = make(twice, gamma=1.0)
        arrays_of = jnp.ones((4, 2)), jnp.zeros((4, 2)[:arrays], int)
        np.testing.assert_allclose(default(*arrays_of), 2 * make(value)(*arrays_of), rtol=1e-6)
    for name in ("alpha", "axis", "label_smoothing", "kernel"):
        with pytest.raises(focal_jax.InputError, match=f"{name}: got the name of an argument"):
            engine.position_loss(lambda *args: args[0].n, **{name: 1.0})


@pytest.mark.parametrize("result", [None, jnp.ones(5, bool), jnp.ones(2)])
def test_invalid_labels_of_the_engine_are_a_mask(result):
    loss = engine.elementwise_loss(lambda z, y: z * y, label_is_invalid=lambda y: result)
    with pytest.raises(focal_jax.InputError, match="label_is_invalid: got"):
        loss(jnp.ones(2), jnp.ones(2))
    with pytest.raises(focal_jax.InputError, match="label_is_invalid: got"):
        loss.linear(jnp.ones((2, 3)), jnp.ones((3, 2)), jnp.zeros((2, 1), int))
    for function in (3, lambda: result):
        with pytest.raises(focal_jax.InputError, match=r"label_is_invalid: got .*, wanted"):
            engine.elementwise_loss(lambda z, y: z * y, label_is_invalid=function)


def test_a_linear_head_needs_the_labels_0_and_1():
    signs = engine.elementwise_loss(
        lambda z, y: engine.cross_entropy(z * y, jnp.ones_like(y)),
        label_is_invalid=lambda y: jnp.abs(y) != 1,
    )
    assert jnp.isnan(signs(jnp.ones(2), jnp.array([-1.0, 0.0]))).tolist() == [False, True]
    arrays = jnp.ones((2, 3)), jnp.ones((3, 2)), jnp.zeros((2, 1), int)
    with pytest.raises(
        focal_jax.InputError, match="label_is_invalid: got True for the label 0 or 1"
    ):
        jax.jit(signs.linear)(*arrays)
    from_0_to_1 = engine.elementwise_loss(
        engine.cross_entropy, label_is_invalid=lambda y: (y < 0) | (y > 1)
    )
    wanted = engine.elementwise_loss(engine.cross_entropy).linear(*arrays)
    np.testing.assert_array_equal(jax.jit(from_0_to_1.linear)(*arrays), wanted)


@pytest.mark.parametrize("slope", [np.ones(4), np.ones((4, 1, 1)), np.ones(7), "a", 1j])
@pytest.mark.parametrize("place", [0, 1])
def test_slopes_of_a_wrong_shape(slope, place):
    """A slope that broadcasts would change the gradient without an error."""

    def slopes_of(right):
        def slopes(*args, scale):
            return tuple(slope if i == place else x for i, x in enumerate(right(*args, scale)))

        return slopes

    position = engine.position_loss(
        lambda t, scale: scale * t.q,
        slopes_of(lambda t, scale: (scale * t.p, t.q)),
        scale=1.0,
    )
    elementwise = engine.elementwise_loss(
        lambda z, y, scale: scale * z * y,
        slopes_of(lambda z, y, scale: (scale * y, scale * z, z * y)),
        scale=1.0,
    )
    logits = jnp.ones((4, 3))
    for loss, labels in ((position, jnp.zeros(4, int)), (elementwise, jnp.ones((4, 3)))):
        with pytest.raises(focal_jax.InputError, match=r"^slopes: got"):
            jax.grad(lambda z: jnp.sum(loss(z, labels)))(logits)  # noqa: B023


@BOTH
def test_logit_softcap(call):
    for softcap in (0, -1.0, math.nan, math.inf, 1e-40, "2", True, jnp.float32(2)):
        _raises(call, LINEAR, {"logit_softcap": softcap}, "logit_softcap: got .*, wanted .*number")


@BOTH
def test_transpose_kernel(call):
    for value in (1, None, jnp.array(True)):
        message = "transpose_kernel: got .*, wanted True or False"
        _raises(call, LINEAR, {"transpose_kernel": value}, message)


def test_chunk_size():
    for chunk_size in (0, -1, 2.0, "all"):
        message = f"chunk_size: got {chunk_size!r}, wanted None or an integer"
        _raises("eager", LINEAR, {"chunk_size": chunk_size}, message)


# ---------------------------------------------------------------- the reduction


@pytest.mark.parametrize("module", [focal_jax, focal_jax.reference], ids=["losses", "reference"])
@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        (jnp.ones(3), {"normalization": "average"}, "normalization: got 'average', wanted"),
        (jnp.ones(3), {"normalization": None}, "normalization: got None, wanted"),
        (jnp.ones(3), {"normalization": jnp.ones(3)}, r"normalization: got shape \(3,\), wanted"),
        (jnp.float32(1), {"normalization": "batch_size"}, "normalization: got 'batch_size'"),
        (jnp.ones(3, int), {}, "losses: got dtype int32, wanted a floating dtype"),
        (jnp.ones(3), {"where": jnp.ones(3)}, "where: got dtype float32, wanted bool"),
        (jnp.ones(3), {"where": jnp.ones(4, bool)}, r"where: got shape \(4,\), wanted"),
        (jnp.ones(3), {"labels": jnp.ones(3), "ignore_label": 1}, "labels: got dtype float32"),
        (jnp.ones(3), {"labels": jnp.ones(4, int), "ignore_label": 1}, r"labels: got shape \(4,\)"),
        (
            jnp.ones(3),
            {"labels": jnp.ones(3, int), "ignore_label": 0.5},
            "ignore_label: got 0.5, wanted",
        ),
    ],
    ids=_id,
)
def test_reduction(module, losses, options, message):
    with pytest.raises(focal_jax.InputError, match=f"^{message}"):
        module.reduce_loss(losses, **options)


@pytest.mark.parametrize("module", [focal_jax, focal_jax.reference], ids=["losses", "reference"])
def test_axis_names_of_the_reduction(module):
    for value in AXIS_NAMES:
        with pytest.raises(ValueError, match=r"^axis_name: got .*, wanted the name"):
            module.reduce_loss(jnp.ones(3), axis_name=value)


@pytest.mark.parametrize("module", [focal_jax, focal_jax.reference], ids=["losses", "reference"])
def test_negative_weights(module):
    for weights in (-1, -1.0, [1, -1, 1], (1, -1.0, 1), np.array([1, -1, 1]), np.float32(-1)):
        with pytest.raises(ValueError, match=r"^weights: got -1.*, wanted numbers >= 0"):
            module.reduce_loss(jnp.ones(3), weights=weights)


@pytest.mark.parametrize("module", [focal_jax, focal_jax.reference], ids=["losses", "reference"])
def test_invalid_denominators(module):
    for value in (math.nan, math.inf, -math.inf, -1, np.float32(np.nan), np.array(np.inf), 10**400):
        with pytest.raises(ValueError, match=r"^normalization: got .*, wanted finite numbers >= 0"):
            module.reduce_loss(jnp.ones(3), normalization=value)


def test_axis_name_that_is_not_bound():
    with pytest.raises(NameError, match="batch"):
        focal_jax.reduce_loss(jnp.ones(3), axis_name="batch")


_ZERO = np.zeros(1, np.float32)


def _bfloat16(x):
    return np.asarray(x, ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("name", "call"),
    list(
        {
            "alpha": lambda: focal_jax.sigmoid_focal_loss(_ZERO, _ZERO, alpha=_bfloat16(-1)),
            "alpha of a list": lambda: focal_jax.sigmoid_focal_loss(
                _ZERO, _ZERO, alpha=[_bfloat16(2)]
            ),
            "alpha of an int4": lambda: focal_jax.sigmoid_focal_loss(
                _ZERO, _ZERO, alpha=np.array(-1, ml_dtypes.int4)
            ),
            "gamma": lambda: focal_jax.sigmoid_focal_loss(_ZERO, _ZERO, gamma=_bfloat16(-2)),
            "alpha of classes": lambda: focal_jax.softmax_focal_loss_with_integer_labels(
                np.zeros((2, 2), np.float32), [0, 1], alpha=_bfloat16([-1, 1])
            ),
            "temperature": lambda: focal_jax.token_statistics(
                np.zeros((1, 2), np.float32), [0], temperature=_bfloat16(-2)
            ),
            "normalization": lambda: focal_jax.reduce_loss(_ZERO, normalization=_bfloat16(-4)),
            "weights": lambda: focal_jax.reduce_loss(_ZERO, weights=_bfloat16([-1])),
            "annotations": lambda: focal_jax.detection.match_anchors(
                np.float32([[0, 0, 4, 4]]), _bfloat16([[0, 0, 4, 4, 257]])
            ),
        }.items()
    ),
)
def test_ranges_of_numbers_in_dtypes_that_numpy_does_not_have(name, call):
    with pytest.raises(focal_jax.InputError, match=f"^{name.split()[0]}: got "):
        call()


def test_numbers_in_lists_of_jax_arrays_are_checked():
    z, y = jnp.zeros(2), jnp.ones(2)
    with pytest.raises(focal_jax.InputError, match="gamma: got -3"):
        focal_jax.sigmoid_focal_loss(z, y, gamma=[jnp.array(-3.0), 1.0])
    want = focal_jax.sigmoid_focal_loss(z, y, gamma=jnp.array([0.5, 1.0]))
    got = jax.jit(lambda g: focal_jax.sigmoid_focal_loss(z, y, gamma=[g, 1.0]))(0.5)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("index", [0, 1])
def test_class_indices_without_an_axis(index):
    x, kernel = jnp.ones(3), jnp.ones((3, 2))
    calls = {
        "indices": (
            lambda: focal_jax.softmax_focal_loss_with_sparse_labels(x, 0, 1.0),
            lambda: focal_jax.linear_softmax_focal_loss_with_sparse_labels(x, kernel, 0, 1.0),
        ),
        "labels": (
            lambda: focal_jax.linear_sigmoid_focal_loss(x, kernel, 0),
            lambda: focal_jax.linear_asymmetric_loss(x, kernel, 1),
        ),
    }
    for name, functions in calls.items():
        with pytest.raises(focal_jax.InputError, match=rf"^{name}: got shape \(\), wanted \(1,\)"):
            functions[index]()
