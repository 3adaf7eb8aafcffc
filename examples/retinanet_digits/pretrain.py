"""Train the backbone to tell single digits apart, as the paper's is trained on ImageNet.

    python -m examples.retinanet_digits.pretrain

writes `backbone.npz`, which the detectors of all losses and seeds start from. It takes about a
minute. Only training digits are used.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import track

from examples.retinanet_digits.data import single_digits
from examples.retinanet_digits.model import Classifier

FILE = Path(__file__).with_name("backbone.npz")
ADAM = optax.scale_by_adam()


def fast_rngs(seed: int) -> nnx.Rngs:
    """Return random numbers that XLA compiles in one second, where the default takes many."""
    return nnx.Rngs(jax.random.key(seed, impl="unsafe_rbg"))


def learning_rates(peak: float, steps: int) -> np.ndarray:
    """Return the learning rate of each step: a short warm-up, then half a cosine down to 0."""
    warmup = min(50, steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))
    return np.asarray(schedule(np.arange(1, steps + 1)), np.float32)


def descend(parameters, adam, gradients, rate):
    """Return the parameters and the state of Adam after one step."""
    # The rate is an argument, so that all trials of a loss share what is compiled for it.
    updates, adam = ADAM.update(gradients, adam)
    return jax.tree.map(lambda x, update: x - rate * update, parameters, updates), adam


def _names_and_arrays(state: nnx.State) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(state)}


def pretrained(backbone: nnx.State) -> nnx.State:
    """Return the parameters of a backbone, those that `backbone` has replaced by the file's."""
    with np.load(FILE) as saved:
        named = {name: saved[name].astype(np.float32) for name in _names_and_arrays(backbone)}
    return jax.tree.unflatten(jax.tree.structure(backbone), named.values())


def main(argv: list[str] | None = None) -> float:
    """Train, write the file, and return the share of validation digits that are told rightly."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=16000)
    parser.add_argument("--learning-rate", type=float, default=0.004)
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args(argv)

    graph, parameters = nnx.split(Classifier(fast_rngs(0)))
    adam = ADAM.init(parameters)

    @jax.jit
    def step(parameters, adam, images, labels, rate):
        def loss(parameters):
            logits = nnx.merge(graph, parameters)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return descend(parameters, adam, jax.grad(loss)(parameters), rate)

    images, labels = single_digits("train", args.images)
    random = np.random.default_rng(0)
    for rate in track(learning_rates(args.learning_rate, args.steps), "pretraining"):
        chosen = random.integers(len(labels), size=args.batch)
        parameters, adam = step(parameters, adam, images[chosen], labels[chosen], rate)

    images, labels = single_digits("validation", 500)
    right = float((nnx.merge(graph, parameters)(images).argmax(-1) == labels).mean())
    backbone = _names_and_arrays(parameters["backbone"])
    np.savez_compressed(args.out, **{k: np.float16(x) for k, x in backbone.items()})
    Console().print(f"{100 * right:.0f} % of validation digits are told rightly: {args.out}")
    return right


if __name__ == "__main__":
    main()
