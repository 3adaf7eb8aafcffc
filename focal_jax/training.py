"""What a focal loss needs around it in training: priors, class weights, normalizers."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike

from focal_jax import _arrays, _checks

__all__ = [
    "PositiveCountEma",
    "PositiveCountEmaState",
    "class_balanced_alpha",
    "positive_count_ema",
    "prior_bias_init",
    "sample_dependent_gamma",
]


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
    if not 0 < prior < 1:
        raise _checks.InputError(f"prior: got {prior}, wanted a probability inside (0, 1)")
    return jax.nn.initializers.constant(math.log(prior) - math.log1p(-prior))


def class_balanced_alpha(counts: ArrayLike, *, beta: float = 0.999) -> Array:
    r"""Weigh each class by the inverse of its effective number of examples.

        alpha_c = w_c * C / sum(w),    w_c = (1 - beta) / (1 - beta**counts_c)

    `beta = 0` weighs every class alike; as beta nears 1 the weights near the inverse
    frequencies. They are right to the last digits for every beta and count.

    Args:
      counts: `[C]`, real: the number of examples of each class. A class with none gets
        weight 0, since no loss can depend on it, and does not change the others' weights in
        proportion to each other. A negative count, or none at all above 0, gives NaN.
      beta: in [0, 1).

    Returns:
      `[C]`, floating: weights that sum to C, for the `alpha` of a softmax focal loss.

    Raises:
      ValueError: for counts that are not a vector of real numbers, a beta outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.training import class_balanced_alpha
      >>> [f"{a:.3f}" for a in class_balanced_alpha(jnp.array([5000, 500, 50]))]
      ['0.126', '0.317', '2.557']

    References:
      Cui, Jia, Lin, Song, Belongie. [Class-Balanced Loss Based on Effective Number of
      Samples](https://arxiv.org/abs/1901.05555). CVPR 2019.
    """
    if not 0 <= beta < 1:
        raise _checks.InputError(f"beta: got {beta}, wanted a number in [0, 1)")
    counts = _arrays.option("counts", counts, jnp.dtype(jnp.result_type(float)))
    _checks.shape("counts", counts, (counts.size,), "one count per class")
    counts = jnp.where(counts >= 0, counts, jnp.nan)
    none = counts == 0
    # 1 - beta**n without cancellation; the numerator is the same for all and falls out.
    log_beta = math.log(beta) if beta else -math.inf
    weights = jnp.where(none, 0, -1 / jnp.expm1(jnp.where(none, 1, counts) * log_beta))
    return weights * (counts.size / jnp.sum(weights))


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
    p_t = jnp.asarray(p_t)
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
    if not 0 <= decay <= 1:
        raise _checks.InputError(f"decay: got {decay}, wanted a number in [0, 1]")
    if not 0 < initial < math.inf:
        raise _checks.InputError(f"initial: got {initial}, wanted a finite number above 0")

    def init() -> PositiveCountEmaState:
        return PositiveCountEmaState(jnp.asarray(initial, float))

    def update(
        count: ArrayLike,
        state: PositiveCountEmaState,
        *,
        axis_name: str | tuple[str, ...] | None = None,
    ) -> tuple[Array, PositiveCountEmaState]:
        old = state.normalizer
        count = _arrays.option("count", count, old.dtype).astype(old.dtype)
        _checks.shape("count", count, (), "the number of positives")
        if axis_name is not None:
            count = lax.psum(count, axis_name)
        new = decay * old + (1 - decay) * jnp.maximum(count, 1)
        return new, PositiveCountEmaState(new)

    return PositiveCountEma(init, update)
