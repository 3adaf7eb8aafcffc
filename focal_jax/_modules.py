"""The options and the call that the linen and the nnx modules share; no Flax in here."""

import dataclasses
from typing import Any

import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from focal_jax import _arrays, _checks
from focal_jax._reduction import reduce_loss
from focal_jax._sigmoid import sigmoid_focal_loss
from focal_jax._softmax import softmax_focal_loss, softmax_focal_loss_with_integer_labels


def _constant(option: Any) -> Any:
    """Return an array of numbers as nested tuples, anything else as it is.

    A constant that hashes and compares: Flax modules are compared and hashed, and an
    array among an nnx module's attributes is state, there for a transform to differentiate
    or an optimizer to find. A traced array has no numbers yet and stays what it is.
    """
    if isinstance(option, list | np.ndarray | Array) and not isinstance(option, jax.core.Tracer):
        return _tuples(np.asarray(option).tolist())
    return option


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


def _positions(where: ArrayLike | None, labels: ArrayLike, ignore_label: int | None):
    """Return the mask of the positions that count: inside `where` and not ignored."""
    if ignore_label is None:
        return where
    labels = jnp.asarray(labels)
    mask = None if where is None else _arrays.aligned(jnp.asarray(where), labels.shape)
    return _arrays.not_ignored(_arrays.int32_labels(labels, labels.shape), ignore_label, mask)


# The identity stays an nnx module's hash, the fields become a linen module's; each
# framework has its own repr.
@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class _FocalLoss:
    alpha: ArrayLike | None = None
    gamma: ArrayLike = 2.0
    normalization: str | ArrayLike = "valid"
    loss_weight: ArrayLike = 1.0
    axis_name: str | tuple[str, ...] | None = None

    def __setattr__(self, name: str, value: Any):
        # Before nnx sees it: an attribute that has once held an array remains state.
        super().__setattr__(name, _constant(value))

    def _options(self, gamma: ArrayLike | None) -> dict[str, Any]:
        return {"alpha": self.alpha, "gamma": self.gamma if gamma is None else gamma}

    def _reduced(self, losses: Array, where: ArrayLike | None) -> Array:
        weight = _arrays.option("loss_weight", self.loss_weight, losses.dtype)
        _checks.shape("loss_weight", weight, (), "one weight for the reduced loss")
        return weight.astype(losses.dtype) * reduce_loss(
            losses, normalization=self.normalization, where=where, axis_name=self.axis_name
        )


class SigmoidFocalLoss(_FocalLoss):
    """`focal_jax.sigmoid_focal_loss`, reduced."""

    def __call__(
        self,
        logits: ArrayLike,
        labels: ArrayLike,
        *,
        where: ArrayLike | None = None,
        gamma: ArrayLike | None = None,
    ) -> Array:
        """Return `loss_weight * reduce_loss(sigmoid_focal_loss(logits, labels))`.

        Args:
          logits: `[...]`, floating.
          labels: real or bool in `[0, 1]`, broadcasts to the logits.
          where: bool, broadcasts to the losses: the positions that count.
          gamma: takes the place of the field for this call; may be traced, as a schedule's
            value is.

        Returns:
          A scalar: float32 for 16-bit logits, else of the logits' dtype.

        Raises:
          ValueError: as `focal_jax.sigmoid_focal_loss` and `focal_jax.reduce_loss` do, and
            for a `loss_weight` that is not a scalar.

        Differentiation: as `focal_jax.sigmoid_focal_loss`.
        """
        return self._reduced(
            sigmoid_focal_loss(logits, labels, where=where, **self._options(gamma)), where
        )


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class SoftmaxFocalLoss(_FocalLoss):
    """A softmax focal loss, reduced; the labels' dtype picks which."""

    axis: int = -1
    ignore_label: int | None = None

    def __call__(
        self,
        logits: ArrayLike,
        labels: ArrayLike,
        *,
        where: ArrayLike | None = None,
        gamma: ArrayLike | None = None,
    ) -> Array:
        """Return `loss_weight * reduce_loss(losses)` of the softmax focal losses.

        Args:
          logits: `[..., C, ...]`, floating.
          labels: integers of the logits' shape without the class axis, class indices for
            `focal_jax.softmax_focal_loss_with_integer_labels`; or floating and of the
            logits' shape, a distribution for `focal_jax.softmax_focal_loss`.
          where: bool, broadcasts to the losses: the positions that count. Those with
            `ignore_label` never do.
          gamma: takes the place of the field for this call; may be traced, as a schedule's
            value is.

        Returns:
          A scalar: float32 for 16-bit logits, else of the logits' dtype.

        Raises:
          ValueError: as the two losses and `focal_jax.reduce_loss` do, for labels that are
            neither integers nor floating, for a distribution where there is an
            `ignore_label` (it has none to ignore), and for a `loss_weight` that is not a
            scalar.

        Differentiation: as the two losses.
        """
        labels = jnp.asarray(labels)
        options = self._options(gamma) | {"axis": self.axis, "where": where}
        if jnp.issubdtype(labels.dtype, jnp.integer):
            losses = softmax_focal_loss_with_integer_labels(
                logits, labels, ignore_label=self.ignore_label, **options
            )
            return self._reduced(losses, _positions(where, labels, self.ignore_label))
        if not jnp.issubdtype(labels.dtype, jnp.floating):
            raise _checks.InputError(
                f"labels: got dtype {labels.dtype}, wanted integers, class indices, or a "
                "floating dtype, a distribution over the classes"
            )
        if self.ignore_label is not None:
            raise _checks.InputError(
                f"labels: got dtype {labels.dtype}, a distribution over the classes, wanted "
                f"integers: ignore_label is {self.ignore_label}; `where` masks either kind"
            )
        return self._reduced(softmax_focal_loss(logits, labels, **options), where)
