"""Train a segmentation network on canvases of digits with cross entropy and focal losses.

Most pixels are background. The pixels of a digit have the class of the digit. The blurred edge of
a digit is not labelled: its label is 255, which is the `ignore_label`. The network returns one
plane of logits per class, `[B, C, H, W]`, so the class axis is 1. Class-balanced weights are
computed from the training pixels. All losses use the same scenes, initial weights and batches. The
table and the figure take about ten minutes on two cores.

    python -m examples.segmentation --out out/segmentation
"""

import argparse
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from matplotlib.patches import Patch
from rich.console import Console
from rich.progress import Progress

from examples import common
from examples.retinanet_digits.data import crop_and_scale, digits, draw, find_room
from examples.retinanet_digits.pretrain import fast_rngs
from focal_jax.measure import style
from focal_jax.nnx import SoftmaxFocalLoss
from focal_jax.training import class_balanced_alpha

CLASSES = 11  # background and ten digits
VOID = 255
SIZE = 64


def scene(part: str, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return an image `[SIZE, SIZE, 1]` and the class of each pixel, both uint8."""
    images, labels = digits(part)
    picture = random.uniform(0, 0.4, (SIZE, SIZE)).astype(np.float32)
    classes, free = np.zeros((SIZE, SIZE), np.uint8), np.ones((SIZE, SIZE), bool)
    for chosen in random.integers(len(images), size=random.integers(2, 9)):
        patch = crop_and_scale(images[chosen], random.uniform(14, 30))
        if corner := find_room(patch, free, random):
            place = draw(picture, patch, *corner, random.uniform(0.6, 1))
            classes[place][patch > 0.2] = VOID
            classes[place][patch > 0.5] = 1 + labels[chosen]
    return np.uint8(255 * picture)[..., None], classes


def scenes(part: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` images and the classes of their pixels."""
    random = np.random.default_rng((seed, part == "test"))
    images, classes = zip(*(scene(part, random) for _ in range(count)))
    return np.stack(images), np.stack(classes)


_conv = partial(nnx.Conv, kernel_size=(3, 3), use_bias=False)


class Stage(nnx.Module):
    """Two convolutions that halve the resolution."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        """Initialize the layers from `rngs`."""
        self.down = _conv(inputs, outputs, strides=2, rngs=rngs)
        self.mix = _conv(outputs, outputs, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        """Return features of half the height and half the width."""
        for layer, norm in zip((self.down, self.mix), self.norms):
            x = nnx.relu(norm(layer(x)))
        return x


class Segmenter(nnx.Module):
    """A network with one plane of logits per class and features at three resolutions."""

    def __init__(self, rngs: nnx.Rngs, width: int = 24):
        """Initialize the layers from `rngs`."""
        self.stem = nnx.Conv(1, width // 2, (3, 3), rngs=rngs)
        widths = [width // 2, width, width, width]
        self.stages = nnx.List([Stage(*pair, rngs) for pair in pairwise(widths)])
        self.lateral = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in self.stages])
        self.last = nnx.Conv(width, CLASSES, (3, 3), rngs=rngs)

    def __call__(self, images):
        """Return logits `[B, CLASSES, H, W]` of images `[B, H, W, 1]` in [0, 255]."""
        x = nnx.relu(self.stem(images / 255))
        levels = []
        for stage, lateral in zip(self.stages, self.lateral):
            x = stage(x)
            levels.append(lateral(x))
        mixed = levels[-1]
        for level in levels[-2::-1]:
            mixed = level + mixed.repeat(2, 1).repeat(2, 2)
        planes = jnp.moveaxis(self.last(mixed), -1, 1)
        return jax.image.resize(planes, (*planes.shape[:2], *images.shape[1:3]), "linear")


def make_step(loss: SoftmaxFocalLoss):
    """Return a jitted training step, which all seeds share."""

    @nnx.jit
    def step(model, optimizer, images, classes):
        value, gradients = nnx.value_and_grad(lambda model: loss(model(images), classes))(model)
        optimizer.update(model, gradients)
        return value

    return step


def train(step, data, transformation, seed: int, args: argparse.Namespace, advance):
    """Return a trained network and the loss of each step."""
    model = Segmenter(fast_rngs(seed))
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    random, losses = np.random.default_rng(seed), []
    for _ in range(args.steps):
        batch = random.integers(args.scenes, size=args.batch)
        losses.append(float(step(model, optimizer, *(x[batch] for x in data))))
        advance()
    model.eval()  # batch norm uses the running statistics from here on
    return model, losses


@nnx.jit
def predict(model: Segmenter, images):
    """Return the class of each pixel."""
    return model(images).argmax(1).astype(jnp.uint8)


def mean_iou(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return the intersection over union, averaged over the classes, without void pixels."""
    labelled = truth != VOID
    pairs = CLASSES * truth[labelled].astype(int) + predicted[labelled]
    confusion = np.bincount(pairs, minlength=CLASSES**2).reshape(CLASSES, CLASSES)
    intersection = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - intersection
    return float(np.mean(intersection / np.maximum(union, 1)))


@style.applied()
def plot(images, truth, predictions: dict[str, np.ndarray], path: Path, columns: int = 4) -> None:
    """Draw a few images, their labels, and the predictions of each network below them."""
    palette = np.zeros((256, 3))
    palette[1:CLASSES] = matplotlib.colormaps["tab20"](np.r_[0:14:2, 16:22:2])[:, :3]
    palette[VOID] = 0.5
    rows = {"image": np.repeat(images / 255, 3, -1), "labels": palette[truth]}
    rows |= {name: palette[predicted] for name, predicted in predictions.items()}
    figure, axes = style.figure(len(rows), columns, height=1.1 * len(rows) + 1)
    for panels, (name, pictures) in zip(axes, rows.items()):
        panels[0].set_ylabel(name.replace(" ", "\n"))
        for panel, picture in zip(panels, pictures):
            panel.imshow(picture)
            panel.set(xticks=[], yticks=[])
    names = ["background", *map(str, range(CLASSES - 1)), "void"]
    patches = [
        Patch(facecolor=palette[i], edgecolor=style.INK, label=name)
        for i, name in zip([*range(CLASSES), VOID], names)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=4)
    common.save(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = common.parser("segmentation", __doc__)
    parser.add_argument("--seeds", type=int, default=3, help="networks per loss")
    parser.add_argument("--scenes", type=int, default=1000, help="for the training")
    parser.add_argument("--test-scenes", type=int, default=200, help="for the evaluation")
    parser.add_argument("--steps", type=int, default=300, help="of Adam, with a cosine decay")
    parser.add_argument("--batch", type=int, default=16, help="scenes per step")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="first rate")
    parser.add_argument("--gamma", type=float, default=2.0, help="of the focal losses")
    parser.add_argument("--beta", type=float, default=0.99999, help="of class_balanced_alpha")
    parser.add_argument("--out", type=Path, default=Path("out/segmentation"), help="folder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the training losses `[seeds, steps]` and the mean IoUs `[seeds]` of each loss."""
    args = parse(argv)
    seeds = range(args.seeds)
    data, tests = (
        [scenes(part, count, seed) for seed in seeds]
        for part, count in (("train", args.scenes), ("test", args.test_scenes))
    )
    counts = sum(np.bincount(classes.ravel(), minlength=CLASSES)[:CLASSES] for _, classes in data)
    alpha = class_balanced_alpha(counts / args.seeds, beta=args.beta)
    pixels = {"axis": 1, "ignore_label": VOID}
    functions = {
        "cross entropy": SoftmaxFocalLoss(gamma=0, **pixels),
        "balanced cross entropy": SoftmaxFocalLoss(gamma=0, alpha=alpha, **pixels),
        "focal loss": SoftmaxFocalLoss(gamma=args.gamma, **pixels),
        "balanced focal loss": SoftmaxFocalLoss(gamma=args.gamma, alpha=alpha, **pixels),
    }
    transformation = optax.adam(optax.cosine_decay_schedule(args.learning_rate, args.steps))
    console, results, predictions, rows = Console(), {}, {}, []
    with Progress(console=console) as progress:
        for name, function in functions.items():
            task = progress.add_task(f"{name:22}", total=args.seeds * args.steps)
            step, curves, scores = make_step(function), [], []
            for seed in seeds:
                advance = partial(progress.advance, task)
                model, losses = train(step, data[seed], transformation, seed, args, advance)
                predicted = np.asarray(predict(model, tests[seed][0]))
                predictions.setdefault(name, predicted)  # the figure shows the first seed
                curves.append(losses)
                scores.append(mean_iou(tests[seed][1], predicted))
            results[name] = np.array(curves), np.array(scores)
            rows.append([name, common.mean_and_deviation(100 * x for x in scores)])
    title, head = f"Segmentation of {args.test_scenes} test scenes", ("", "mean IoU, %")
    console.print(common.table(title, head, rows, common.seeds_caption(args.seeds)))
    plot(*tests[0], predictions, args.out / "segmentation.png")
    console.print(f"Figure: {args.out / 'segmentation.png'}", soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
