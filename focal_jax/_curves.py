"""Figures of the losses themselves: drawn from the library's own losses and gradients."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from focal_jax import _catalogue, _style
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


def of_one_logit(loss: _catalogue.Loss, label: float) -> Callable[[Array], Array]:
    """Return a loss as a function of one logit; the other two of a softmax are 0."""
    function = getattr(importlib.import_module("focal_jax"), loss.name)
    if not loss.softmax:
        return lambda z: function(z, jnp.float32(label))
    labels: Any = {
        "integer": jnp.zeros(1, jnp.int32),
        "one-hot": jnp.eye(3)[:1],
        "real": jnp.full(1, 0.25),  # three quarters of it for the first class
    }[loss.labels[0]]
    kernel = [jnp.eye(3)] if loss.kind == "linear" else []
    return lambda z: function(jnp.stack([z, 0 * z, 0 * z])[None], *kernel, labels).sum()


@_style.applied()
def family_figure() -> Any:
    """Draw the loss and the gradient of every member against the logit, on one sheet."""
    columns = 4
    rows = -(-len(_catalogue.LOSSES) // columns)
    figure, panels = _style.figure(
        rows, columns, width=12, height=2.6 * rows, sharex=True, sharey=True
    )
    z = jnp.linspace(-6, 6, 241)
    for panel, loss in zip(panels.flat, _catalogue.LOSSES):
        labels = {"label 1": (1.0, _style.BLUE), "label 0": (0.0, _style.VERMILION)}
        if loss.softmax:
            labels = {"the true class's logit": (0.0, _style.GREEN)}
        for name, (label, colour) in labels.items():
            curve = jax.jit(jax.vmap(jax.value_and_grad(of_one_logit(loss, label))))
            losses, gradients = curve(z)
            panel.plot(z, losses, color=colour, label=name)
            panel.plot(z, gradients, color=colour, linestyle="--", linewidth=1.2)
        panel.axhline(0, color=_style.INK, linewidth=0.6)
        panel.set_title(loss.name.replace("_with_integer_labels", "\nwith_integer_labels"))
        panel.title.set_fontsize("small")
        panel.set(ylim=(-1.6, 4), xlim=(-6, 6))
    for panel in panels.flat[len(_catalogue.LOSSES) :]:
        panel.set_axis_off()
    for panel in panels[-1]:
        panel.set_xlabel("logit")
    handles = dict(
        pair for panel in panels.flat for pair in zip(*reversed(panel.get_legend_handles_labels()))
    )
    dashed = panels.flat[0].plot([], [], "--", color=_style.INK, linewidth=1.2)
    solid = panels.flat[0].plot([], [], color=_style.INK)
    handles |= {"loss": solid[0], "its gradient": dashed[0]}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles))
    return figure
