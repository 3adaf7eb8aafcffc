"""Focal Tversky loss: the overlap of each class with its region, over all the positions."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _checks, _inputs, _scalar
from focal_jax._class_sums import classes_along, kept
from focal_jax._largest_apart import Apart, apart, in_one_pass, in_passes, row
from focal_jax._scalar import Terms
from focal_jax._varying import aligned_varying


def _terms(axis: int, logits: Array, where: Array | None, *, again: bool) -> tuple[Terms, Apart]:
    """Return the terms of each class of a position in turn, and what stands apart of the row."""
    of_row = row(axis, logits, where)
    of_row = of_row._replace(top=lax.stop_gradient(of_row.top))
    log_whole = jnp.log(of_row.apart.own + of_row.apart.rest)
    z, classes = kept(logits, where), classes_along(logits, axis)
    return of_row.terms(z, classes, log_whole, again=again), of_row.apart


def _probabilities(axis: int, logits: Array, where: Array | None) -> tuple[Array, Array]:
    """Return the probability of each class, and what it lacks of 1 without cancellation."""
    t, _ = _terms(axis, logits, where, again=False)
    return t.p, t.q


def _forward(axis, *args):
    return _probabilities(axis, *args), args


def _backward(axis, args, cts):
    logits, where = args
    (t, of_row), (of_p, of_q) = _terms(axis, *args, again=True), cts
    by_log_p = t.p * (of_p - of_q)
    on_cpu, elsewhere = (partial(apart, form, axis) for form in (in_passes, in_one_pass))
    sums, _ = lax.platform_dependent(of_row.place, by_log_p, cpu=on_cpu, default=elsewhere)
    others = sums.others_of(by_log_p, classes_along(logits, axis), again=True)
    dz = t.q * by_log_p - t.p * others
    return _inputs.keep(dz, where).astype(logits.dtype), None


_core = jax.custom_vjp(_probabilities, nondiff_argnums=(0,))
_core.defvjp(_forward, _backward)


@partial(jax.jit, static_argnums=(0, 1))
def _losses(axis, axis_name, logits, labels, options, where):
    dtype = _inputs.compute_dtype(logits)
    y = _inputs.Kept(dtype, where)(labels)
    alpha, beta, gamma, smooth = _inputs.Kept(dtype, None)(options)
    y = jnp.where((y >= 0) & (y <= 1), y, jnp.nan)
    p, q = _core(axis, logits, where)
    positions = tuple(i for i in range(logits.ndim) if i != axis)
    # True positives, false negatives and false positives.
    counts = [jnp.sum(_inputs.keep(x, where), positions) for x in (y * p, y * q, (1 - y) * p)]
    tp, fn, fp = counts if axis_name is None else lax.psum(counts, axis_name)
    # 1 - TI is the share of what is wrong: never a difference.
    wrong, right = alpha * fn + beta * fp, tp + smooth
    share, index = (_scalar.divide(x, right + wrong) for x in (wrong, right))
    index = jnp.where(right + wrong == 0, 1, index)  # nothing there, and nothing wrong
    return _scalar.power_of_size(share, _scalar.log_size(share, index), gamma)


def focal_tversky_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike = 0.7,
    beta: ArrayLike = 0.3,
    gamma: ArrayLike = 0.75,
    axis: int = -1,
    smooth: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    r"""Compute the focal Tversky loss of each class, over all positions together.

    With `p` the softmax of the logits along the class axis, `y` the labels, and TP, FN and FP
    the sums of `y p`, `y (1 - p)` and `(1 - y) p` over all the positions, each class's loss is

        TI = (TP + smooth) / (TP + alpha FN + beta FP + smooth)
        (1 - TI)**gamma

    With `alpha = beta = 0.5` the index is Dice's. MONAI's `TverskyLoss` weighs the false
    positives by its alpha, and Abraham and Khan write the exponent as `1 / gamma`, of 4/3.

    Args:
      logits: `[..., C, ...]`, floating: unnormalized log-probabilities.
      labels: of the logits' shape, real or bool: one-hot, or the probabilities of the classes
        (`jax.nn.one_hot` makes it of class indices). One outside `[0, 1]` makes the loss of
        its class NaN.
      alpha: weight of the false negatives: a number, or `[C]`.
      beta: weight of the false positives, likewise.
      gamma: exponent, 0 or more. A Python number or an array, likewise.
      axis: the class axis. All others are summed over, the batch's too: `jax.vmap` makes it a
        loss of each image.
      smooth: is added above and below, likewise: with 0, a class that is neither there nor
        predicted has a loss of 0 all the same.
      where: bool, broadcasts to the logits' shape without the class axis: positions where it
        is False are not counted, whatever the inputs hold there.
      axis_name: one name or several of mapped axes (`shard_map`, `pmap`, `vmap`) that the
        positions are spread over: TP, FN and FP are summed over them.

    Returns:
      The losses, `[C]`, not reduced. float32 for 16-bit logits (which are computed in
      float32), else of the logits' dtype.

    Raises:
      ValueError: for logits that are not floating, labels of another shape, an axis out of
        range, options that are neither numbers nor `[C]`, a `where` that is not bool or does
        not broadcast, a negative Python `gamma`.
      NameError: for an `axis_name` that is not bound here.

    Differentiation: reverse mode in logits, labels and the options, any number of times, and
      forward over reverse. Forward mode alone is refused by `jax.custom_vjp`;
      `focal_jax.reference.focal_tversky_loss` has it. A gradient taken inside `pmap`, or
      inside `shard_map` with `check_vma=False`, is that of the sum of what all the devices
      return, as JAX has it for every collective: with `axis_name`, divide it by their number.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from focal_jax import focal_tversky_loss
      >>> logits = jnp.array([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
      >>> labels = jax.nn.one_hot(jnp.array([0, 1, 1]), 2)
      >>> [round(x, 4) for x in focal_tversky_loss(logits, labels).tolist()]
      [0.234, 0.3071]

    References:
      Abraham, Khan. [A Novel Focal Tversky loss function with improved Attention U-Net for
      lesion segmentation](https://arxiv.org/abs/1810.07842). ISBI 2019.
      Salehi, Erdogmus, Gholipour. [Tversky loss function for image segmentation using 3D
      fully convolutional deep networks](https://arxiv.org/abs/1706.05721). 2017.
    """
    logits = _inputs.floating("logits", logits)
    axis = _checks.axis(axis, logits.ndim)
    labels = _checks.array("labels", labels)
    _checks.real("labels", labels)
    why = "as the logits; of class indices, jax.nn.one_hot makes one"
    _checks.shape("labels", labels, logits.shape, why)
    exponent = _inputs.exponent("gamma", gamma)
    given = {"alpha": alpha, "beta": beta, "gamma": exponent, "smooth": smooth}
    options = _inputs.options(given, (logits.shape[axis],), _inputs.compute_dtype(logits))
    positions = logits.shape[:axis] + logits.shape[axis + 1 :]
    mask = _inputs.aligned_mask(where, positions, axis)
    # Not the options: what the sums over the devices have in common stays so.
    logits, labels, mask = aligned_varying(logits, labels, mask)
    return _losses(axis, axis_name, logits, labels, options, mask)
