"""Train the detector with one loss; checkpoints with orbax, so that a run can go on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from examples.retinanet_digits.data import canvases
from examples.retinanet_digits.model import RetinaNet, anchors
from focal_jax.detection import retinanet_loss


@dataclass(frozen=True)
class Recipe:
    """The loss, and where the network starts: all that the runs differ in."""

    gamma: float = 2.0
    alpha: float | None = 0.25
    prior: float | None = 0.01


@dataclass(frozen=True)
class Budget:
    """What every run has, whatever its loss."""

    steps: int = 900
    batch: int = 8
    learning_rate: float = 0.01
    canvases: int = 1500
    test_canvases: int = 300
    save_every: int = 100


def start(recipe: Recipe, budget: Budget, seed: int) -> tuple[RetinaNet, nnx.Optimizer]:
    """Return a fresh network and its optimizer."""
    # XLA compiles the default generator for many seconds, this one for one.
    model = RetinaNet(nnx.Rngs(jax.random.key(seed, impl="unsafe_rbg")), prior=recipe.prior)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, budget.learning_rate, min(50, budget.steps // 2), budget.steps
    )
    return model, nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)


def make_step(recipe: Recipe) -> Callable:
    """Return the jitted `step(model, optimizer, images, annotations) -> loss`."""
    boxes = anchors()

    @nnx.jit
    def step(model, optimizer, images, annotations):
        def loss(model):
            return sum(
                retinanet_loss(
                    *model(images),
                    boxes,
                    annotations,
                    alpha=recipe.alpha,
                    gamma=recipe.gamma,
                    normalization="batch",
                )
            )

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    return step


def train(
    recipe: Recipe,
    budget: Budget,
    seed: int,
    checkpoints: Path,
    tick: Callable[[int], None] = lambda step: None,
) -> tuple[RetinaNet, np.ndarray]:
    """Train from the last checkpoint, or from the start; return the network and its losses.

    `tick` is told the number of steps done.
    """
    model, optimizer = start(recipe, budget, seed)
    losses = np.zeros(budget.steps, np.float32)
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(checkpoints.absolute(), options=options) as manager:
        done = manager.latest_step() or 0
        if done:
            saved = {"state": nnx.state((model, optimizer)), "losses": losses}
            saved = manager.restore(done, args=ocp.args.StandardRestore(saved))
            nnx.update((model, optimizer), saved["state"])
            losses = np.array(saved["losses"])
        tick(done)
        if done < budget.steps:
            step = make_step(recipe)
            data = canvases("train", budget.canvases, seed)
        for number in range(done, budget.steps):
            random = np.random.default_rng((seed, number))  # the batch depends on the step alone
            batch = random.integers(budget.canvases, size=budget.batch)
            losses[number] = step(model, optimizer, *(x[batch] for x in data))
            tick(number + 1)
            if (number + 1) % budget.save_every == 0 or number + 1 == budget.steps:
                saved = {"state": nnx.state((model, optimizer)), "losses": losses}
                manager.save(number + 1, args=ocp.args.StandardSave(saved))
    return model, losses
