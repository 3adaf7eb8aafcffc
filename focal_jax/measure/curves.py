"""Figures of the losses, drawn from the public functions and their gradients."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from focal_jax import catalogue
from focal_jax.catalogue import Loss
from focal_jax.measure import style

GAMMAS = tuple(style.GAMMAS)


@style.applied()
def gammas_figure(gammas: Sequence[float] = GAMMAS) -> Any:
    """Draw the focal loss (Figure 1 of its paper) and its gradient for several values of gamma."""
    p_t = np.linspace(0.001, 0.999, 999)
    logits = np.tile(np.log(p_t / (1 - p_t)), (len(gammas), 1))
    loss = catalogue.function_of("sigmoid_focal_loss")

    def total(logits, gammas):
        losses = loss(logits, jnp.ones_like(logits), gamma=gammas)
        return losses.sum(), losses

    gradients, losses = jax.grad(total, has_aux=True)(logits, jnp.float32(gammas)[:, None])
    figure, (left, right) = style.figure(1, 2)
    for i, gamma in enumerate(gammas):
        colour = style.GAMMAS.get(gamma, style.PALETTE[i % len(style.PALETTE)])
        line = {"color": colour, "label": rf"$\gamma$ = {gamma:g}"}
        left.plot(p_t, losses[i], **line)
        right.plot(p_t, -gradients[i], **line)
    left.set(ylabel=r"loss  $-(1 - p_t)^\gamma\,\log p_t$", ylim=(0, 5))
    right.set(ylabel=r"gradient  $-\partial\,$loss$\,/\,\partial\,$logit", ylim=(0, None))
    for panel in (left, right):
        panel.set(xlabel=r"$p_t$ (of the true class)", xlim=(0, 1))
    left.legend()
    return figure


class Curve(NamedTuple):
    """A loss and its gradient as functions of one logit x."""

    name: str  # describes the label
    losses: np.ndarray
    gradients: np.ndarray


def curves(loss: Loss, x: np.ndarray) -> Iterator[Curve]:
    """Yield the curves of a loss for several labels.

    A softmax loss has three classes with the logits (x, 0, -1), and the first class is the label.
    An interval loss has five classes with the logits (0, 0, x, 0, 0). A region loss has two
    classes and 100 positions, 50 of each class; the logit of the label's class is x, the other 0.
    """
    soft = {"label 1": 1.0, "label 0.6": 0.6, "label 0": 0.0}
    hard = {"label 1": 1.0, "label 0": 0.0}
    distributions = {"labels 1, 0, 0": [1.0, 0, 0], "labels 0.6, 0.3, 0.1": [0.6, 0.3, 0.1]}
    one_hot = np.repeat(np.eye(2), 50, 0)
    # The logits are `start + x * direction`.
    start, direction, labels = {
        "elementwise": (0, 1, soft if "soft" in loss.labels else hard),
        "position": ([0, 0, -1], [1, 0, 0], {"true class": 0}),
        "linear": ([0, 0, -1], [1, 0, 0], {"true class": 0}),
        "distribution": ([0, 0, -1], [1, 0, 0], distributions),
        "interval": ([0] * 5, [0, 0, 1, 0, 0], {"label 2": 2.0, "label 2.4": 2.4}),
        "region": (0 * one_hot, one_hot, {"both classes": one_hot}),
    }[loss.kind]
    start, direction = jnp.float32(start), jnp.float32(direction)
    kernel = [jnp.eye(3)] if loss.kind == "linear" else []
    for name, label in labels.items():
        label = jnp.asarray(label, jnp.int32 if "integer" in loss.labels else jnp.float32)

        def total(x, label=label):
            return loss.function(start + x * direction, *kernel, label).sum()

        losses, gradients = jax.jit(jax.vmap(jax.value_and_grad(total)))(jnp.float32(x))
        yield Curve(name, np.asarray(losses), np.asarray(gradients))


@style.applied()
def family_figure() -> Any:
    """Draw every loss and its gradient against the logit, one panel per loss."""
    losses, columns = catalogue.LOSSES.values(), 4
    rows = -(-len(losses) // columns)
    size = {"width": 12, "height": 2.6 * rows}
    figure, panels = style.figure(rows, columns, **size, sharex=True, sharey=True)
    figure.suptitle("Losses (solid) and gradients (dashed)")
    x = np.linspace(-6, 6, 241)
    for panel, loss in zip(panels.flat, losses):
        for colour, curve in zip(style.PALETTE, curves(loss, x)):
            panel.plot(x, curve.losses, color=colour, label=curve.name)
            panel.plot(x, curve.gradients, color=colour, linestyle="--", linewidth=1.2)
        panel.axhline(0, color=style.INK, linewidth=0.6)
        title = loss.name.replace("_with_integer_labels", "\nwith_integer_labels")
        panel.set_title(title, fontsize="small")
        panel.legend(fontsize="x-small", loc="upper center", handlelength=1)
        panel.set(ylim=(-1.6, 4), xlim=(x[0], x[-1]))
    for panel in panels.flat[len(losses) :]:
        panel.set_axis_off()
    for panel in panels[-1]:
        panel.set_xlabel("logit")
    return figure
