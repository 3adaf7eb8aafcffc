"""Pretrain the backbone as a classifier of single digits. The paper pretrains on ImageNet.

    python -m examples.retinanet_digits.pretrain

writes `backbone.npz`, from which the detectors of all losses and seeds start, in about a minute.
Only training digits are used.
"""

from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import track

from examples import common
from examples.retinanet_digits.data import single_digits
from examples.retinanet_digits.model import Classifier

FILE = Path(__file__).with_name("backbone.npz")
ADAM = optax.scale_by_adam()


def fast_rngs(seed: int) -> nnx.Rngs:
    """Return random number generators that XLA compiles in one second; the default takes many."""
    return nnx.Rngs(jax.random.key(seed, impl="unsafe_rbg"))


def learning_rates(peak: float, steps: int) -> np.ndarray:
    """Return the learning rate of each step: a linear warm-up and a cosine decay to 0."""
    warmup = min(50, steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))
    return np.asarray(schedule(np.arange(1, steps + 1)), np.float32)


def adam_step(parameters, adam, gradients, rate):
    """Return the parameters and the state of Adam after one step."""
    # The rate is an argument, so that all learning rates share one compiled step.
    updates, adam = ADAM.update(gradients, adam)
    return jax.tree.map(lambda x, update: x - rate * update, parameters, updates), adam


def _arrays_by_path(state: nnx.State) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(state)}


def load_pretrained(backbone: nnx.State) -> nnx.State:
    """Return the pretrained parameters in the structure of `backbone`."""
    with np.load(FILE) as saved:
        arrays = [saved[path].astype(np.float32) for path in _arrays_by_path(backbone)]
    return jax.tree.unflatten(jax.tree.structure(backbone), arrays)


def main(argv: list[str] | None = None) -> float:
    """Train the classifier, write the file, and return the accuracy on validation digits."""
    parser = common.parser("retinanet_digits.pretrain", __doc__)
    parser.add_argument("--steps", type=int, default=4000, help="of Adam")
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    parser.add_argument("--images", type=int, default=16000, help="for the training")
    parser.add_argument("--learning-rate", type=float, default=0.004, help="largest rate")
    parser.add_argument("--out", type=Path, default=FILE, help="file to write")
    args = parser.parse_args(argv)

    graph, parameters = nnx.split(Classifier(fast_rngs(0)))
    adam = ADAM.init(parameters)

    @jax.jit
    def step(parameters, adam, images, labels, rate):
        def loss(parameters):
            logits = nnx.merge(graph, parameters)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return adam_step(parameters, adam, jax.grad(loss)(parameters), rate)

    images, labels = single_digits("train", args.images)
    random = np.random.default_rng(0)
    for rate in track(learning_rates(args.learning_rate, args.steps), "pretraining"):
        chosen = random.integers(len(labels), size=args.batch)
        parameters, adam = step(parameters, adam, images[chosen], labels[chosen], rate)

    images, labels = single_digits("validation", 500)
    accuracy = float((nnx.merge(graph, parameters)(images).argmax(-1) == labels).mean())
    backbone = _arrays_by_path(parameters["backbone"])
    arrays = {k: np.float16(x) for k, x in backbone.items()}
    common.write(args.out, lambda path: np.savez_compressed(path, **arrays))
    Console().print(f"Validation accuracy: {100 * accuracy:.0f} %. Written to {args.out}")
    return accuracy


if __name__ == "__main__":
    main()
