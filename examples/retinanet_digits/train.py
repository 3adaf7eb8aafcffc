"""Train the detector with one loss; checkpoints with orbax, so that a run can go on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
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


# Cached, as the steps are: what is compiled for one seed serves the others.
@cache
def _adam(budget: Budget) -> optax.GradientTransformation:
    warmup = min(50, budget.steps // 2)
    return optax.adam(
        optax.warmup_cosine_decay_schedule(0.0, budget.learning_rate, warmup, budget.steps)
    )


def start(recipe: Recipe, budget: Budget, seed: int) -> tuple[RetinaNet, nnx.Optimizer]:
    """Return a fresh network and its optimizer."""
    # XLA compiles the default generator for many seconds, this one for one.
    model = RetinaNet(nnx.Rngs(jax.random.key(seed, impl="unsafe_rbg")), prior=recipe.prior)
    return model, nnx.Optimizer(model, _adam(budget), wrt=nnx.Param)


@cache
def make_step(recipe: Recipe) -> Callable:
    """Return the jitted `step(model, optimizer, images, annotations) -> loss`."""
    boxes, options = anchors(), {"alpha": recipe.alpha, "gamma": recipe.gamma}

    @nnx.jit
    def step(model, optimizer, images, annotations):
        def loss(model):
            predicted = model(images)
            return sum(
                retinanet_loss(*predicted, boxes, annotations, **options, normalization="batch")
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
    tick: Callable[[int], None],
) -> tuple[RetinaNet, np.ndarray]:
    """Train from the last checkpoint, or from the start; return the network and its losses.

    `tick` is told the number of steps done.
    """
    model, optimizer = start(recipe, budget, seed)
    losses = np.zeros(budget.steps, np.float32)
    step, data = make_step(recipe), canvases("train", budget.canvases, seed)

    def state():
        # On the host: what is restored then belongs to no device, and nothing compiles again.
        return {
            "state": jax.tree.map(np.asarray, nnx.state((model, optimizer))),
            "losses": losses,
        }

    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(checkpoints.absolute(), options=options) as manager:
        done = manager.latest_step() or 0
        if done:
            saved = manager.restore(done, args=ocp.args.StandardRestore(state()))
            nnx.update((model, optimizer), saved["state"])
            losses = np.array(saved["losses"])
        tick(done)
        for number in range(done, budget.steps):
            random = np.random.default_rng((seed, number))  # the batch depends on the step alone
            batch = random.integers(budget.canvases, size=budget.batch)
            losses[number] = step(model, optimizer, *(x[batch] for x in data))
            done = number + 1
            tick(done)
            if done % budget.save_every == 0 or done == budget.steps:
                manager.save(done, args=ocp.args.StandardSave(state()))
    return model, losses
