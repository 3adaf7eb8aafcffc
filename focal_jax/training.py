"""What a focal loss needs around it in training: priors, class weights, normalizers."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs

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


def _static(name: str, x: Any, inside: Callable[[float], bool], wanted: str) -> float:
    """Return `x` as a Python number, checked."""
    try:
        if not isinstance(x, str) and inside(value := float(x)):
            return value
    except (TypeError, ValueError):  # no number, or a traced one
        pass
    raise _checks.InputError(f"{name}: got {x!r}, wanted {wanted}")


def _counts(counts: ArrayLike | Sequence[float]) -> Array:
    """Return one count per class, at least float32, and NaN for what is no count."""
    counts = _inputs.option("counts", counts, jnp.dtype(jnp.result_type(float)))
    counts = counts.astype(_inputs.compute_dtype(counts))
    if counts.ndim > 1:
        raise _checks.InputError(
            f"counts: got shape {counts.shape}, wanted one count per class; of labels they are "
            "jnp.bincount(labels.ravel(), length=classes)"
        )
    _checks.shape("counts", counts, (counts.size,), "one count per class")
    return jnp.where(counts >= 0, counts, jnp.nan)


def prior_bias_init(prior: float = 0.01) -> Initializer:
    r"""Make the initializer of the last bias with which every sigmoid starts at `prior`.

        bias = -log((1 - prior) / prior)

    The many easy negatives then start with a small loss each, and do not drown the rest in
    the first steps.

    Args:
      prior: the probability that the network is to give every positive class at first,
        inside (0, 1).

    Returns:
      A function of `(key, shape, dtype)`, as those of `jax.nn.initializers`; the key is not
      used. For `bias_init` of a Flax layer, linen or nnx.

    Raises:
      ValueError: for a prior that is not inside (0, 1).

    Example:
      >>> import jax
      >>> from focal_jax.training import prior_bias_init
      >>> bias = prior_bias_init(0.01)(jax.random.key(0), (2,))
      >>> [f"{p:.4f}" for p in jax.nn.sigmoid(bias)]
      ['0.0100', '0.0100']

    References:
      Lin, Goyal, Girshick, He, Dollar. [Focal Loss for Dense Object
      Detection](https://arxiv.org/abs/1708.02002), section 3.3. ICCV 2017.
    """
    prior = _static("prior", prior, lambda p: 0 < p < 1, "a probability inside (0, 1)")
    return jax.nn.initializers.constant(math.log(prior) - math.log1p(-prior))


def class_balanced_alpha(
    counts: ArrayLike | Sequence[float],
    *,
    beta: float = 0.999,
    num_classes: int | None = None,
    ignore_label: int | None = None,
) -> Array:
    r"""Weigh each class by the inverse of its effective number of examples.

        alpha_c = w_c * C / sum(w),    w_c = (1 - beta) / (1 - beta**counts_c)

    `beta = 0` weighs every class alike; as beta nears 1 the weights near the inverse
    frequencies. They are right to the last digits for every beta and count.

    Args:
      counts: `[C]`, real: the number of examples of each class, usually a `bincount` of the
        labels. A class with none gets weight 0, since no loss can depend on it, and does not
        change the others' weights in proportion to each other. A negative count, or none at
        all above 0, gives NaN.
      beta: in [0, 1).
      num_classes: how many classes there are, where the counts have another length: classes
        that are missing have no examples, and counts beyond the classes have to be 0 or that
        of `ignore_label`. Another one is of labels that do not exist, and gives NaN.
      ignore_label: the label that the loss ignores. What was counted of it does not count.

    Returns:
      `[C]`, floating, at least float32: weights that sum to C, for the `alpha` of a softmax
      focal loss.

    Raises:
      ValueError: for counts that are not a vector of real numbers, such as labels, a beta
        outside [0, 1), a `num_classes` that is no integer above 0.

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

    References:
      Cui, Jia, Lin, Song, Belongie. [Class-Balanced Loss Based on Effective Number of
      Samples](https://arxiv.org/abs/1901.05555). CVPR 2019.
    """
    beta = _static("beta", beta, lambda beta: 0 <= beta < 1, "a number in [0, 1)")
    counts = _counts(counts)
    ignore_label = _checks.ignore_label(ignore_label)
    if ignore_label is not None:
        counts = jnp.where(jnp.arange(counts.size) == ignore_label, 0, counts)
    if num_classes is not None:
        integer = isinstance(num_classes, numbers.Integral) and num_classes is not True
        if not (integer and num_classes > 0):
            raise _checks.InputError(f"num_classes: got {num_classes!r}, wanted an integer above 0")
        classes = jnp.pad(counts, (0, max(0, int(num_classes) - counts.size)))[:num_classes]
        counts = jnp.where(jnp.any(counts[num_classes:] != 0), jnp.nan, classes)
    none = counts == 0
    # 1 - beta**n without cancellation; the numerator is the same for all and falls out.
    log_beta = math.log(beta) if beta else -math.inf
    weights = jnp.where(none, 0, -1 / jnp.expm1(jnp.where(none, 1, counts) * log_beta))
    return weights * (counts.size / jnp.sum(weights))


def logit_adjustment(counts: ArrayLike | Sequence[float], *, tau: float = 1.0) -> Array:
    r"""Return what to add to the logits of a softmax, so that rare classes learn as well.

        tau * log(counts_c / sum(counts))

    Added in training only, to the logits or as the bias of a linear head, it teaches the
    network the logits of balanced classes. For `tau = 1` this is the balanced softmax.

    Args:
      counts: `[C]`, real: the number of examples of each class. A class with none gets
        -inf, which switches it off: its probability and its gradient are 0, and the loss of
        a label of it is infinite. A negative count, or none at all above 0, gives NaN.
      tau: zero or more; 0 adjusts nothing, not even a class without examples.

    Returns:
      `[C]`, floating, at least float32.

    Raises:
      ValueError: for counts that are not a vector of real numbers, such as labels, or a tau
        that is not a finite number, zero or more.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.training import logit_adjustment
      >>> [f"{a:.3f}" for a in logit_adjustment(jnp.array([90, 10, 0]))]
      ['-0.105', '-2.303', '-inf']

    References:
      Menon, Jayasumana, Rawat, Jain, Veit, Kumar. [Long-tail Learning via Logit
      Adjustment](https://arxiv.org/abs/2007.07314). ICLR 2021.
    """
    tau = _static("tau", tau, lambda tau: 0 <= tau < math.inf, "a finite number >= 0")
    counts = _counts(counts)
    return jax.scipy.special.xlogy(jnp.asarray(tau, counts.dtype), counts / jnp.sum(counts))


class PositiveWeight(NamedTuple):
    """The options that equal PyTorch's `pos_weight`: see `positive_weight`."""

    alpha: ArrayLike
    factor: ArrayLike


def positive_weight(w: ArrayLike | Sequence[float]) -> PositiveWeight:
    r"""Return the `alpha`, and the factor on the loss, that equal PyTorch's `pos_weight=w`.

        alpha = w / (1 + w),    factor = 1 + w

    `factor * sigmoid_focal_loss(logits, labels, alpha=alpha, gamma=0)` is then PyTorch's
    `BCEWithLogitsLoss(pos_weight=w, reduction="none")` of hard labels, which weighs
    positives by w and negatives by 1; other gammas modulate that loss. Of a soft label
    PyTorch weighs the two terms apart, and the focal loss their sum by a mean weight.

    Args:
      w: a number or an array that broadcasts to the losses, such as one weight for each
        class along the last axis; zero or more. A negative one gives NaN in an array.

    Returns:
      `PositiveWeight(alpha, factor)`: Python numbers for a number, else floating arrays of
      the shape of w.

    Raises:
      ValueError: for a w that is not real, or a number that is not finite, zero or more.

    Differentiation: any mode, in an array.

    Example:
      >>> from focal_jax.training import positive_weight
      >>> positive_weight(3.0)
      PositiveWeight(alpha=0.75, factor=4.0)

    References:
      [torch.nn.BCEWithLogitsLoss](
      https://docs.pytorch.org/docs/stable/generated/torch.nn.BCEWithLogitsLoss.html).
    """
    if isinstance(w, numbers.Real):
        w = _static("w", w, lambda w: 0 <= w < math.inf, "a finite number >= 0")
    else:
        w = _inputs.option("w", w, jnp.dtype(jnp.result_type(float)))
        w = jnp.where(w < 0, jnp.nan, w.astype(_inputs.compute_dtype(w)))
    return PositiveWeight(w / (1 + w), 1 + w)


def sample_dependent_gamma(p_t: ArrayLike) -> Array:
    """Choose gamma by the probability of the true class: 5 below 0.2, else 3.

    The schedule FLSD-53. The threshold is a constant of its input: no gradient flows
    through it.

    Args:
      p_t: `[...]`, floating: the probability that the network gives the true class.

    Returns:
      `[...]`, of the dtype of `p_t`: the `gamma` of a focal loss, position by position.

    Raises:
      ValueError: for a `p_t` that is not floating.

    Differentiation: the derivative is 0 everywhere.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.training import sample_dependent_gamma
      >>> sample_dependent_gamma(jnp.array([0.0, 0.19, 0.2, 1.0])).tolist()
      [5.0, 5.0, 3.0, 3.0]

    References:
      Mukhoti, Kulharia, Sanyal, Golodetz, Torr, Dokania. [Calibrating Deep Neural Networks
      using Focal Loss](https://arxiv.org/abs/2002.09437). NeurIPS 2020.
    """
    p_t = _checks.array("p_t", p_t)
    _checks.floating("p_t", p_t)
    return jnp.where(p_t < 0.2, 5, 3).astype(p_t.dtype)


class PositiveCountEmaState(NamedTuple):
    """The state of `positive_count_ema`: the running count."""

    normalizer: Array


class PositiveCountEma(NamedTuple):
    """The two functions of `positive_count_ema`, as optax has its transformations."""

    init: Callable[[], PositiveCountEmaState]
    update: Callable[..., tuple[Array, PositiveCountEmaState]]


def positive_count_ema(decay: float = 0.9, initial: float = 100.0) -> PositiveCountEma:
    r"""Keep a running mean of the number of positives, a steadier divisor than the number.

        normalizer = decay * normalizer + (1 - decay) * max(count, 1)

    Without correction for the start, and used in the step that computes it, as in
    Detectron2's RetinaNet.

    Args:
      decay: in [0, 1]: the share of the past.
      initial: the normalizer before the first step, above 0: any number of positives that
        is not too small.

    Returns:
      A pair of functions, fit for `jit` and `scan`: `init() -> state`, and
      `update(count, state, *, axis_name=None) -> (normalizer, state)`. `count` is a real
      scalar; with `axis_name`, one name or several of mapped axes, it is summed over them,
      for one normalizer of the whole batch (in Detectron2 every process keeps its own). The
      normalizer is a floating scalar, for `normalization` of `focal_jax.reduce_loss`.

    Raises:
      ValueError: for a decay outside [0, 1], an initial that is not above 0, a count that
        is not a real scalar.

    Example:
      >>> from focal_jax.training import positive_count_ema
      >>> ema = positive_count_ema()
      >>> state = ema.init()
      >>> normalizer, state = ema.update(20, state)
      >>> float(normalizer)
      92.0

    References:
      [Detectron2](https://github.com/facebookresearch/detectron2),
      `modeling/meta_arch/retinanet.py` and `dense_detector.py`.
    """
    decay = _static("decay", decay, lambda decay: 0 <= decay <= 1, "a number in [0, 1]")
    initial = _static("initial", initial, lambda x: 0 < x < math.inf, "a finite number above 0")

    def init() -> PositiveCountEmaState:
        return PositiveCountEmaState(jnp.asarray(initial, float))

    def update(
        count: ArrayLike,
        state: PositiveCountEmaState,
        *,
        axis_name: str | tuple[str, ...] | None = None,
    ) -> tuple[Array, PositiveCountEmaState]:
        old = state.normalizer
        count = _inputs.option("count", count, old.dtype).astype(old.dtype)
        _checks.shape("count", count, (), "the number of positives")
        if axis_name is not None:
            count = lax.psum(count, axis_name)
        new = decay * old + (1 - decay) * jnp.maximum(count, 1)
        return new, PositiveCountEmaState(new)

    return PositiveCountEma(init, update)
