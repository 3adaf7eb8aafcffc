"""Training utilities for focal losses: bias priors, class weights, gamma schedules, normalizers.

Invalid arguments raise `focal_jax.InputError`.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike

from focal_jax.engine import arguments, checks
from focal_jax.engine.arguments import InputError
from focal_jax.engine.options import Option, check_call, known_numbers, number

__all__ = [
    "PositiveCountEma",
    "PositiveCountEmaState",
    "PositiveWeight",
    "class_balanced_alpha",
    "logit_adjustment",
    "positive_count_ema",
    "positive_weight",
    "prior_bias_init",
    "sample_dependent_gamma",
]


_UNIT = number(0.5, low=0, high=1)
_BELOW_1 = number(0.5, low=0, high=1, below_high=True)
_INSIDE = number(0.5, low=0, high=1, above_low=True, below_high=True)
_AT_LEAST_0, _ABOVE_0 = number(1.0, low=0), number(1.0, low=0, above_low=True)


def _static(option: Option, name: str, x: Any) -> float:
    """Return a Python, NumPy or concrete JAX number as a float; raise if it is not valid."""
    known = known_numbers(x, name, option.wanted) if isinstance(x, Array) else None
    return option.static(name, x if known is None or known.ndim else known.item())


def _class_counts(counts: ArrayLike | Sequence[float]) -> Array:
    """Return counts `[C]` in float32 or a wider dtype, with NaN for negative counts."""
    counts = arguments.number_array("counts", counts, jnp.dtype(jnp.result_type(float)))
    counts = counts.astype(arguments.compute_dtype(counts))
    if counts.ndim > 1:
        raise InputError(
            f"counts: got shape {counts.shape}, wanted one count per class; labels are counted by "
            "jnp.bincount(labels.ravel(), length=num_classes)"
        )
    arguments.check_shape("counts", counts, (counts.size,), "one count per class")
    return jnp.where(counts >= 0, counts, jnp.nan)


@check_call
def prior_bias_init(prior: float = 0.01) -> Initializer:
    r"""Make an initializer for the last bias so that every sigmoid starts at a given probability.

        bias = -log((1 - prior) / prior)

    With a small prior, the many easy negatives do not dominate the first steps.

    Example:
      >>> import jax
      >>> from focal_jax.training import prior_bias_init
      >>> bias = prior_bias_init(0.01)(jax.random.key(0), (2,))
      >>> [f"{p:.4f}" for p in jax.nn.sigmoid(bias)]
      ['0.0100', '0.0100']

    Args:
      prior: the initial probability of every class, inside (0, 1).

    Returns:
      An initializer `(key, shape, dtype)` as in `jax.nn.initializers` and Flax, or without the
      key `(shape, dtype)` as in Haiku and Keras.

    References:
      Lin, Goyal, Girshick, He, Dollar. [Focal Loss for Dense Object
      Detection](https://arxiv.org/abs/1708.02002), section 3.3. ICCV 2017.
    """
    return PriorBias(prior)


@dataclasses.dataclass(frozen=True)
class PriorBias:
    """The initializer of `prior_bias_init`. Keras saves and loads it by its config."""

    prior: float

    def __post_init__(self):
        """Check the prior."""
        object.__setattr__(self, "prior", _static(_INSIDE, "prior", self.prior))

    def __call__(self, *args: Any, **options: Any) -> Array:
        """Return the bias for `(key, shape, dtype)` or `(shape, dtype)`."""
        if args and isinstance(args[0], tuple | list):  # a shape, not a key
            args = (None, *args)
        elif not args:
            options.setdefault("key", None)
        logit = math.log(self.prior) - math.log1p(-self.prior)
        constant: Any = jax.nn.initializers.constant(logit)
        try:
            bias = constant(*args, **options)
        except (TypeError, ValueError) as error:
            raise InputError(f"shape or dtype: {error}, wanted ([key,] shape, dtype)") from error
        is_floating = jnp.issubdtype(bias.dtype, jnp.floating)
        arguments.require(is_floating, f"dtype: got {bias.dtype}, wanted a floating dtype")
        return bias

    def get_config(self) -> dict[str, float]:
        """Return the arguments of the constructor."""
        return {"prior": self.prior}

    @classmethod
    def from_config(cls, config: dict[str, float]) -> "PriorBias":
        """Return the initializer of a config."""
        return cls(**config)


@check_call
def class_balanced_alpha(
    counts: ArrayLike | Sequence[float],
    *,
    beta: float = 0.999,
    num_classes: int | None = None,
    ignore_label: int | None = None,
) -> Array:
    r"""Compute class weights that are inverse to the effective number of examples of each class.

        alpha_c = w_c * C / sum(w),    w_c = (1 - beta) / (1 - beta**counts_c)

    With `beta=0` all classes with examples have the same weight. As beta approaches 1, the weights
    approach the inverse class frequencies. The formula is evaluated without cancellation.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.training import class_balanced_alpha
      >>> [f"{a:.3f}" for a in class_balanced_alpha(jnp.array([5000, 500, 50]))]
      ['0.126', '0.317', '2.557']
      >>> labels = jnp.array([[0, 0, 1], [255, 1, 0]])
      >>> counts = jnp.bincount(labels.ravel(), length=256)
      >>> alpha = class_balanced_alpha(counts, num_classes=3, ignore_label=255)
      >>> [f"{a:.3f}" for a in alpha]
      ['1.200', '1.800', '0.000']

    Args:
      counts: `[C]`, real: the number of examples of each class, usually from `jnp.bincount`. A
        class without examples gets the weight 0 and does not change the ratios of the other
        weights. A negative count gives NaN, and so do counts that are all 0.
      beta: a number in [0, 1).
      num_classes: the number of classes, if the counts have another length. Missing counts are
        0. A nonzero count of a class that does not exist gives NaN, except the count of
        `ignore_label`.
      ignore_label: the label that the loss ignores. Its count is set to 0.

    Returns:
      `[C]`, floating: weights with the sum C, for `alpha` of a softmax focal loss.

    References:
      Cui, Jia, Lin, Song, Belongie. [Class-Balanced Loss Based on Effective Number of
      Samples](https://arxiv.org/abs/1901.05555). CVPR 2019.
    """
    beta = _static(_BELOW_1, "beta", beta)
    counts = _class_counts(counts)
    ignore_label = arguments.static_ignore_label(ignore_label)
    if ignore_label is not None:
        counts = jnp.where(jnp.arange(counts.size) == ignore_label, 0, counts)
    if num_classes is not None:
        wanted = "an integer above 0"
        num_classes = arguments.static_integer("num_classes", num_classes, wanted)
        got = f"num_classes: got {arguments.shown(num_classes)}"
        arguments.require(0 < num_classes <= arguments.INT32.max, f"{got}, wanted {wanted}")
        padded = jnp.pad(counts, (0, max(0, num_classes - counts.size)))[:num_classes]
        counts = jnp.where(jnp.any(counts[num_classes:] != 0), jnp.nan, padded)
    is_empty = counts == 0
    # expm1 computes 1 - beta**n without cancellation. The factor 1 - beta cancels in alpha.
    log_beta = math.log(beta) if beta else -math.inf
    weights = jnp.where(is_empty, 0, -1 / jnp.expm1(jnp.where(is_empty, 1, counts) * log_beta))
    return weights * (counts.size / jnp.sum(weights))


@check_call
def logit_adjustment(counts: ArrayLike | Sequence[float], *, tau: float = 1.0) -> Array:
    r"""Compute the logit adjustment for long-tailed class distributions.

        tau * log(counts_c / sum(counts))

    Add it to the logits, or use it as the bias of a linear head, during training only. The model
    then learns the logits of balanced classes. `tau=1` is the balanced softmax.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.training import logit_adjustment
      >>> [f"{a:.3f}" for a in logit_adjustment(jnp.array([90, 10, 0]))]
      ['-0.105', '-2.303', '-inf']

    Args:
      counts: `[C]`, real: the number of examples of each class. A class without examples gets
        -inf: its probability and its gradient are 0, and the loss of a label of this class is
        infinite. A negative count gives NaN, and so do counts that are all 0.
      tau: a number >= 0. With 0 nothing is adjusted, not even a class without examples.

    Returns:
      `[C]`, floating.

    References:
      Menon, Jayasumana, Rawat, Jain, Veit, Kumar. [Long-tail Learning via Logit
      Adjustment](https://arxiv.org/abs/2007.07314). ICLR 2021.
    """
    tau = _static(_AT_LEAST_0, "tau", tau)
    counts = _class_counts(counts)
    # Scaled down, because the sum of large counts could overflow.
    size = counts.size if isinstance(counts.size, int) else arguments.INT32.max  # or symbolic
    counts *= 0.5 ** (3 + size.bit_length())
    share = counts / jnp.sum(counts)
    share = jnp.where(share == 0, lax.stop_gradient(share), share)  # the slope of log 0 is infinite
    return jax.scipy.special.xlogy(jnp.asarray(tau, counts.dtype), share)


class PositiveWeight(NamedTuple):
    """The result of `positive_weight`: `alpha` of the loss, and a factor on the loss."""

    alpha: ArrayLike
    factor: ArrayLike


@check_call
def positive_weight(w: ArrayLike | Sequence[float]) -> PositiveWeight:
    r"""Convert PyTorch's `pos_weight` to `alpha` and a factor on the loss.

        alpha = w / (1 + w),    factor = 1 + w

    For hard labels, `factor * sigmoid_focal_loss(logits, labels, alpha=alpha, gamma=0)` equals
    `BCEWithLogitsLoss(pos_weight=w, reduction="none")`. For soft labels the two differ: PyTorch
    weights the two terms of the cross entropy, and the focal loss weights their sum.

    Example:
      >>> from focal_jax.training import positive_weight
      >>> positive_weight(3.0)
      PositiveWeight(alpha=0.75, factor=4.0)

    Args:
      w: a number >= 0, or an array that broadcasts to the losses, such as one weight per class
        along the last axis. A negative entry of an array gives NaN.

    Returns:
      `PositiveWeight(alpha, factor)`: Python numbers for a number, else arrays of the shape of w,
      which are differentiable in w.

    References:
      [torch.nn.BCEWithLogitsLoss](
      https://docs.pytorch.org/docs/stable/generated/torch.nn.BCEWithLogitsLoss.html).
    """
    if isinstance(w, numbers.Real | str | bytes):
        w = _static(_AT_LEAST_0, "w", w)
    else:
        w = arguments.number_array("w", w, jnp.dtype(jnp.result_type(float)))
        w = jnp.where(w < 0, jnp.nan, w.astype(arguments.compute_dtype(w)))
    # Two forms, because JAX's derivative of the first cancels for a large w.
    alpha = w / (1 + w) if isinstance(w, float) else jnp.where(w < 1, w / (1 + w), 1 - 1 / (1 + w))
    return PositiveWeight(alpha, 1 + w)


@check_call
def sample_dependent_gamma(p_t: ArrayLike) -> Array:
    """Return gamma by the FLSD-53 schedule: 5 where the probability is below 0.2, else 3.

    The derivative in `p_t` is 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.training import sample_dependent_gamma
      >>> sample_dependent_gamma(jnp.array([0.0, 0.19, 0.2, 1.0])).tolist()
      [5.0, 5.0, 3.0, 3.0]

    Args:
      p_t: `[...]`, floating: the predicted probability of the true class.

    Returns:
      `[...]`, of the dtype of `p_t`: one `gamma` per position.

    References:
      Mukhoti, Kulharia, Sanyal, Golodetz, Torr, Dokania. [Calibrating Deep Neural Networks
      using Focal Loss](https://arxiv.org/abs/2002.09437). NeurIPS 2020.
    """
    p_t = arguments.floating_array("p_t", p_t)
    return jnp.where(p_t < 0.2, 5, 3).astype(p_t.dtype)


class PositiveCountEmaState(NamedTuple):
    """The state of `positive_count_ema`."""

    normalizer: Array


class PositiveCountEma(NamedTuple):
    """A pair of functions, like an optax transformation: see `positive_count_ema`."""

    init: Callable[[], PositiveCountEmaState]
    update: Callable[..., tuple[Array, PositiveCountEmaState]]


@check_call
def positive_count_ema(decay: float = 0.9, initial: float = 100.0) -> PositiveCountEma:
    r"""Keep an exponential moving average of the number of positives, as a loss normalizer.

        normalizer = decay * normalizer + (1 - decay) * max(count, 1)

    The average has no bias correction, and contains the count of the current step.

    Example:
      >>> from focal_jax.training import positive_count_ema
      >>> ema = positive_count_ema()
      >>> state = ema.init()
      >>> normalizer, state = ema.update(20, state)
      >>> float(normalizer)
      92.0

    Args:
      decay: a number in [0, 1].
      initial: the normalizer before the first step, a finite number above 0.

    Returns:
      Two functions that work under `jit` and `scan`: `init() -> state`, and
      `update(count, state, *, axis_name=None) -> (normalizer, state)`. The count is a scalar
      >= 0. With `axis_name`, the names of mapped axes, it is summed over them, so that there is
      one normalizer for the whole batch (Detectron2 has one per process). The normalizer is a
      floating scalar for `normalization` of `focal_jax.reduce_loss`.

    References:
      [Detectron2](https://github.com/facebookresearch/detectron2),
      `modeling/meta_arch/retinanet.py` and `dense_detector.py`.
    """
    decay = _static(_UNIT, "decay", decay)
    initial = _static(_ABOVE_0, "initial", initial)

    def init():
        return PositiveCountEmaState(jnp.asarray(initial, float))

    @check_call
    def update(count, state, *, axis_name=None):
        arguments.require(
            isinstance(state, PositiveCountEmaState),
            f"state: got {type(state).__name__}, wanted the state that init or update returned",
        )
        old = arguments.floating_array("state", state.normalizer)
        arguments.check_shape("state", old, (), "one normalizer")
        checks.check_known_numbers("count", count, old.dtype)
        count = arguments.number_array("count", count, old.dtype).astype(old.dtype)
        arguments.check_shape("count", count, (), "the number of positives")
        arguments.check_axis_name("axis_name", axis_name)
        if axis_name is not None:
            count = lax.psum(count, axis_name)
        new = decay * old + (1 - decay) * jnp.maximum(count, 1)
        return new, PositiveCountEmaState(new)

    return PositiveCountEma(init, update)
