"""Figures of the losses themselves: drawn from the library's own losses and gradients."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from focal_jax import _catalogue, _style
from focal_jax._modules import function_of
from focal_jax._sigmoid import sigmoid_focal_loss

GAMMAS = tuple(_style.GAMMAS)  # those of the paper's Figure 1


@_style.applied()
def gammas_figure(gammas: Sequence[float] = GAMMAS) -> Any:
    """Draw the focal loss against p_t, the paper's Figure 1, and its gradient beside it."""
    p_t = np.linspace(0.001, 0.999, 999)
    logits = np.tile(np.log(p_t / (1 - p_t)), (len(gammas), 1))

    def total(logits, gammas):
        losses = sigmoid_focal_loss(logits, jnp.ones_like(logits), gamma=gammas)
        return losses.sum(), losses

    curves = jax.jit(jax.grad(total, has_aux=True))
    gradients, losses = curves(logits, np.array(gammas, np.float32)[:, None])

    figure, (left, right) = _style.figure(1, 2)
    for i, gamma in enumerate(gammas):
        colour = _style.GAMMAS.get(gamma, _style.PALETTE[i % len(_style.PALETTE)])
        style = {"color": colour, "label": rf"$\gamma$ = {gamma:g}"}
        left.plot(p_t, losses[i], **style)
        right.plot(p_t, -gradients[i], **style)
    left.set(ylabel=r"loss  $-(1 - p_t)^\gamma\,\log p_t$", ylim=(0, 5))
    right.set(ylabel=r"gradient  $-\partial\,$loss$\,/\,\partial\,$logit", ylim=(0, None))
    for panel in (left, right):
        panel.set(xlabel=r"$p_t$, the probability of the true class", xlim=(0, 1))
    left.legend()
    return figure


class Curve(NamedTuple):
    """A loss and its gradient as one logit varies."""

    name: str  # of the label
    losses: np.ndarray
    gradients: np.ndarray


def curves(loss: _catalogue.Loss, logit: np.ndarray) -> Iterator[Curve]:
    """Yield what a loss makes of one logit, for each of several labels.

    A softmax has three classes with the logits (x, 0, -1), the first of them the true one; an
    interval has five bins, of which the middle one varies; a region has two classes and a
    hundred positions, half of each class, whose true logits are all x.
    """
    function = function_of(loss.name)

    def row(x: Array) -> Array:
        return jnp.stack([x, jnp.zeros_like(x), jnp.full_like(x, -1)])

    match loss.kind:
        case "elementwise":
            soft = "soft" in loss.labels
            of = {
                f"label {y:g}": lambda x, y=y: function(x, jnp.float32(y))
                for y in (1.0, 0.6, 0.0)
                if soft or y % 1 == 0
            }
        case "position":
            of = {"true class": lambda x: function(row(x), jnp.int32(0))}
        case "linear":
            of = {"true class": lambda x: function(row(x), jnp.eye(3), jnp.int32(0))}
        case "distribution":
            ys = [1.0, 0.0, 0.0], [0.6, 0.3, 0.1]
            of = {
                "labels " + ", ".join(f"{w:g}" for w in y): lambda x, y=y: function(
                    row(x), jnp.array(y)
                )
                for y in ys
            }
        case "interval":
            of = {
                f"label {y:g}": lambda x, y=y: function(jnp.zeros(5).at[2].set(x), y)
                for y in (2.0, 2.4)
            }
        case "region":
            true = jnp.repeat(jnp.eye(2), 50, 0)
            of = {"of both classes": lambda x: function(x * true, true).sum()}
    for name, of_one in of.items():
        losses, gradients = jax.jit(jax.vmap(jax.value_and_grad(of_one)))(jnp.float32(logit))
        yield Curve(name, np.asarray(losses), np.asarray(gradients))


# Of the losses of one logit.
_LABELS = {"label 1": _style.BLUE, "label 0.6": _style.VERMILION, "label 0": _style.GREEN}


@_style.applied()
def family_figure() -> Any:
    """Draw the loss and the gradient of every member against the logit, on one sheet."""
    columns = 4
    rows = -(-len(_catalogue.LOSSES) // columns)
    figure, panels = _style.figure(
        rows, columns, width=12, height=2.6 * rows, sharex=True, sharey=True
    )
    logit = np.linspace(-6, 6, 241)
    for panel, loss in zip(panels.flat, _catalogue.LOSSES):
        for spare, curve in zip(_style.PALETTE, curves(loss, logit)):
            colour = _LABELS.get(curve.name, spare)
            panel.plot(logit, curve.losses, color=colour, label=curve.name)
            panel.plot(logit, curve.gradients, color=colour, linestyle="--", linewidth=1.2)
        panel.axhline(0, color=_style.INK, linewidth=0.6)
        title = loss.name.replace("_with_integer_labels", "\nwith_integer_labels")
        panel.set_title(title, fontsize="small")
        if loss.softmax:  # whose labels are its own
            panel.legend(fontsize="x-small", loc="upper right", handlelength=1)
        panel.set(ylim=(-1.6, 4), xlim=(logit[0], logit[-1]))
    for panel in panels.flat[len(_catalogue.LOSSES) :]:
        panel.set_axis_off()
    for panel in panels[-1]:
        panel.set_xlabel("logit")
    lines = {name: {"color": colour} for name, colour in _LABELS.items()}
    lines |= {"the loss": {"color": _style.INK}}
    lines |= {"its gradient": {"color": _style.INK, "linestyle": "--", "linewidth": 1.2}}
    handles = [panels.flat[0].plot([], [], **style)[0] for style in lines.values()]
    figure.legend(handles, lines, loc="outside upper center", ncols=len(lines))
    return figure
