"""Train the detector with one loss, with orbax checkpoints."""

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
    adam_step,
    fast_rngs,
    learning_rates,
    load_pretrained,
)
from focal_jax.detection import retinanet_loss


@dataclass(frozen=True)
class Recipe:
    """The loss, its tuned hyperparameters, and the prior of the last bias."""

    gamma: float = 2.0
    alpha: float | None = 0.25
    prior: float | None = 0.01
    learning_rate: float = 0.01
    class_weight: float = 1.0  # weight of the class loss; that of the box loss is 1


@dataclass(frozen=True)
class Budget:
    """The setting, which is the same for all losses."""

    steps: int = 1000
    batch: int = 4
    canvases: int = 1000
    test_canvases: int = 300
    objects: float = 2.0  # mean number per canvas
    pretrained: bool = True  # whether the backbone is pretrained
    save_every: int = 250


@cache
def graph() -> nnx.GraphDef:
    """Return the graph definition of all networks.

    It is cached because JAX compiles again for every new graph definition.
    """
    return nnx.graphdef(RetinaNet(fast_rngs(0)))


def start(recipe: Recipe, budget: Budget, seed: int) -> nnx.State:
    """Return the initial parameters."""
    parameters = nnx.state(RetinaNet(fast_rngs(seed), prior=recipe.prior))
    if budget.pretrained:
        parameters["pyramid"]["backbone"] = load_pretrained(parameters["pyramid"]["backbone"])
    return parameters


# Cached, so that all seeds and learning rates share one compiled step.
@cache
def make_step(gamma: float, alpha: float | None) -> Callable:
    """Return a jitted training step.

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
        return *adam_step(parameters, adam, gradients, rate), losses

    return step


def prepare(runs: Iterable) -> None:
    """Create the canvases and the steps that runs share, before threads use them."""
    for run in runs:
        make_step(run.recipe.gamma, run.recipe.alpha)
        canvases("train", run.budget.canvases, run.seed, run.budget.objects)


# The checkpoint managers of orbax are not safe in concurrent threads.
_checkpoint_lock = threading.Lock()


def save(checkpoints: Path, done: int, state: dict) -> None:
    """Write a checkpoint, which replaces the previous one."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with (
        _checkpoint_lock,
        ocp.CheckpointManager(checkpoints.absolute(), options=options) as manager,
    ):
        manager.save(done, args=ocp.args.StandardSave(state))


def restore(checkpoints: Path, like: dict) -> tuple[int, dict | None]:
    """Return the step and the state of the last checkpoint, or 0 and None without a checkpoint.

    If the checkpoint cannot be read, warn and remove its folder.
    """
    try:
        with _checkpoint_lock, ocp.CheckpointManager(checkpoints.absolute()) as manager:
            done = manager.latest_step()
            if done is None:
                return 0, None
            return done, manager.restore(done, args=ocp.args.StandardRestore(like))
    except Exception as error:  # orbax and its dependencies raise many types of errors
        shutil.rmtree(checkpoints)
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"{checkpoints}: the checkpoint cannot be read, the run starts from step 0 ({reason})",
            stacklevel=2,
        )
        return 0, None


def train(
    recipe: Recipe,
    budget: Budget,
    seed: int,
    checkpoints: Path,
    on_step: Callable[[int, float], None],
) -> tuple[RetinaNet, np.ndarray]:
    """Train a network, from the last checkpoint if there is one.

    Args:
      recipe: the loss and its hyperparameters.
      budget: the setting.
      seed: of the initial parameters, the canvases and the batches.
      checkpoints: the folder of the checkpoints.
      on_step: is called with the number of finished steps and the loss of the last step.

    Returns:
      The network, and the class and box losses `[steps, 2]`.
    """
    parameters = start(recipe, budget, seed)
    adam = ADAM.init(parameters)
    losses = np.zeros((budget.steps, 2), np.float32)
    step = make_step(recipe.gamma, recipe.alpha)
    rates = learning_rates(recipe.learning_rate, budget.steps)
    weight = np.float32(recipe.class_weight)
    data = canvases("train", budget.canvases, seed, budget.objects)

    def state():
        # NumPy arrays have no device. A restored state then does not trigger a compilation.
        return {"state": jax.tree.map(np.asarray, (parameters, adam)), "losses": losses}

    done, saved = restore(checkpoints, state())
    if saved:
        parameters, adam = saved["state"]
        losses = np.array(saved["losses"])
    on_step(done, losses[max(done - 1, 0)].sum())
    for number in range(done, budget.steps):
        # The batch depends only on the seed and the step, so a resumed run sees the same batches.
        random = np.random.default_rng((seed, number))
        batch = random.integers(budget.canvases, size=budget.batch)
        chosen = (x[batch] for x in data)
        parameters, adam, last = step(parameters, adam, *chosen, rates[number], weight)
        losses[number] = last
        done = number + 1
        on_step(done, losses[number].sum())
        if done % budget.save_every == 0 or done == budget.steps:
            save(checkpoints, done, state())
    return nnx.merge(graph(), parameters), losses
