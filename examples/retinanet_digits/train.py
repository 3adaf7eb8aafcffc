"""Train the detector with one loss; checkpoints with orbax, so that a run can go on."""

import shutil
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from examples.retinanet_digits.data import canvases
from examples.retinanet_digits.model import RetinaNet, anchors
from examples.retinanet_digits.pretrain import (
    ADAM,
    descend,
    fast_rngs,
    learning_rates,
    pretrained,
)
from focal_jax.detection import retinanet_loss


@dataclass(frozen=True)
class Recipe:
    """The loss, what was chosen for it, and where the network starts: all that runs differ in."""

    gamma: float = 2.0
    alpha: float | None = 0.25
    prior: float | None = 0.01
    learning_rate: float = 0.01
    class_weight: float = 1.0  # of the class loss, beside the box loss's 1


@dataclass(frozen=True)
class Budget:
    """What every run has, whatever its loss."""

    steps: int = 1000
    batch: int = 4
    canvases: int = 1000
    test_canvases: int = 300
    objects: float = 2.0  # on a canvas, in the mean
    pretrained: bool = True  # the backbone, as a classifier of single digits
    save_every: int = 250


@cache
def graph() -> nnx.GraphDef:
    """Return what all networks have in common: everything but their parameters.

    One object for all, since JAX compiles again for a graph that it does not know.
    """
    return nnx.graphdef(RetinaNet(fast_rngs(0)))


def start(recipe: Recipe, budget: Budget, seed: int) -> nnx.State:
    """Return the parameters of a fresh network, its backbone pretrained unless told otherwise."""
    parameters = nnx.state(RetinaNet(fast_rngs(seed), prior=recipe.prior))
    if budget.pretrained:
        parameters["pyramid"]["backbone"] = pretrained(parameters["pyramid"]["backbone"])
    return parameters


# Cached: what is compiled for one seed, and for one trial of a learning rate, serves the others.
@cache
def make_step(gamma: float, alpha: float | None) -> Callable:
    """Return a jitted step of training.

    `step(parameters, adam, images, annotations, rate, class_weight)` returns the parameters, the
    state of Adam, and the two losses.
    """
    boxes = anchors()

    @jax.jit
    def step(parameters, adam, images, annotations, rate, class_weight):
        def loss(parameters):
            predicted = nnx.merge(graph(), parameters)(images)
            losses = retinanet_loss(
                *predicted, boxes, annotations, alpha=alpha, gamma=gamma, normalization="batch"
            )
            return class_weight * losses.classification + losses.regression, losses

        gradients, losses = jax.grad(loss, has_aux=True)(parameters)
        return *descend(parameters, adam, gradients, rate), losses

    return step


def prepare(runs: Iterable) -> None:
    """Make what runs share, before they run side by side: canvases and jitted steps."""
    for run in runs:
        make_step(run.recipe.gamma, run.recipe.alpha)
        canvases("train", run.budget.canvases, run.seed, run.budget.objects)


# Orbax's managers disturb each other when two threads write at a time.
one_at_a_time = threading.Lock()


def save(checkpoints: Path, done: int, state: dict) -> None:
    """Write a checkpoint in place of the one before."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with one_at_a_time, ocp.CheckpointManager(checkpoints.absolute(), options=options) as manager:
        manager.save(done, args=ocp.args.StandardSave(state))


def restored(checkpoints: Path, like: dict) -> tuple[int, dict | None]:
    """Return the last checkpoint's step and what it holds; 0 and None where there is none.

    One that cannot be read is named and removed, with all that lies beside it.
    """
    try:
        with one_at_a_time, ocp.CheckpointManager(checkpoints.absolute()) as manager:
            done = manager.latest_step()
            if done is None:
                return 0, None
            return done, manager.restore(done, args=ocp.args.StandardRestore(like))
    except Exception as error:  # orbax and what it stands on raise errors of many kinds
        shutil.rmtree(checkpoints)
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"{checkpoints}: the checkpoint cannot be read, the run starts anew ({reason})",
            stacklevel=2,
        )
        return 0, None


def train(
    recipe: Recipe,
    budget: Budget,
    seed: int,
    checkpoints: Path,
    tick: Callable[[int, float], None],
) -> tuple[RetinaNet, np.ndarray]:
    """Train from the last checkpoint, or from the start; return the network and its losses.

    `tick` is told the number of steps done and the last step's loss. The losses are
    `[steps, 2]`: of the classes and of the boxes.
    """
    parameters = start(recipe, budget, seed)
    adam = ADAM.init(parameters)
    losses = np.zeros((budget.steps, 2), np.float32)
    step = make_step(recipe.gamma, recipe.alpha)
    rates = learning_rates(recipe.learning_rate, budget.steps)
    weight = np.float32(recipe.class_weight)
    data = canvases("train", budget.canvases, seed, budget.objects)

    def state():
        # On the host: what is restored then belongs to no device, and nothing compiles again.
        return {"state": jax.tree.map(np.asarray, (parameters, adam)), "losses": losses}

    done, saved = restored(checkpoints, state())
    if saved:
        parameters, adam = saved["state"]
        losses = np.array(saved["losses"])
    tick(done, losses[max(done - 1, 0)].sum())
    for number in range(done, budget.steps):
        random = np.random.default_rng((seed, number))  # the batch depends on the step alone
        batch = random.integers(budget.canvases, size=budget.batch)
        chosen = (x[batch] for x in data)
        parameters, adam, last = step(parameters, adam, *chosen, rates[number], weight)
        losses[number] = last
        done = number + 1
        tick(done, losses[number].sum())
        if done % budget.save_every == 0 or done == budget.steps:
            save(checkpoints, done, state())
    return nnx.merge(graph(), parameters), losses
