"""Train a classifier with the focal loss: a minimal script to copy.

It takes ten seconds: 300 steps on half of scikit-learn's digits. Run: python examples/quickstart.py
"""

import argparse

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import focal_jax

argparse.ArgumentParser(description=__doc__).parse_args()  # --help

data = load_digits()
images, test_images, labels, test_labels = train_test_split(
    np.float32(data.data / 16), data.target, test_size=0.5, random_state=0
)

model = nnx.Sequential(
    nnx.Linear(64, 128, rngs=nnx.Rngs(0)),
    nnx.relu,
    nnx.Linear(128, 10, rngs=nnx.Rngs(1)),
)
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
focal = focal_jax.nnx.SoftmaxFocalLoss(gamma=2.0)  # returns the mean over the batch


@nnx.jit
def train_step(model, optimizer, images, labels):
    loss, gradients = nnx.value_and_grad(lambda model: focal(model(images), labels))(model)
    optimizer.update(model, gradients)
    return loss


random = np.random.default_rng(0)
for step in range(300):
    batch = random.integers(len(labels), size=64)
    loss = train_step(model, optimizer, images[batch], labels[batch])
    if step % 50 == 0:
        print(f"step {step}: loss {loss:.3f}")

accuracy = float((jax.jit(model)(test_images).argmax(-1) == test_labels).mean())
print(f"test accuracy: {100 * accuracy:.1f} %")
