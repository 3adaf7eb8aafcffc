"""Losses of kauldron with the values of focal_jax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from steps import assert_equal_trainings, three_steps

import focal_jax

pytest.importorskip("kauldron")
from kauldron import kontext
from kauldron.losses import base, simple

rng = np.random.default_rng(0)
X = rng.normal(size=(32, 6)).astype(np.float32)
LABELS, MASK = rng.integers(4, size=(32, 1)), rng.random((32, 1)) < 0.8


@dataclasses.dataclass(eq=True, frozen=True, kw_only=True)
class SoftmaxFocalLoss(base.Loss):
    """A loss of kauldron, whose labels have a last axis of size 1."""

    logits: kontext.Key = kontext.REQUIRED
    labels: kontext.Key = kontext.REQUIRED
    gamma: float = 2.0

    def get_values(self, logits, labels):
        loss = focal_jax.softmax_focal_loss_with_integer_labels
        return loss(logits, labels[..., 0], gamma=self.gamma)[..., None]


def test_the_trainer_on_eight_devices(tmp_path):
    train = pytest.importorskip("kauldron.train")
    from kauldron import data

    assert jax.device_count() == 8  # over which the trainer shards the batch

    class Classifier(nn.Module):
        x: kontext.Key = "batch.x"

        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(x)

    def trained(loss):
        batches = data.InMemoryPipeline(
            loader=lambda: {"x": X, "labels": LABELS}, batch_size=16, shuffle=False, seed=0
        )
        trainer = train.Trainer(
            workdir=tmp_path,
            train_ds=batches,
            model=Classifier(),
            num_train_steps=3,
            train_losses={"loss": loss},
            optimizer=optax.sgd(0.5),
        )
        state, _ = trainer.train()
        return jax.device_get(state.params)

    keys = {"logits": "preds", "labels": "batch.labels"}
    losses = simple.SoftmaxCrossEntropyWithIntLabels(**keys), SoftmaxFocalLoss(gamma=0.0, **keys)
    assert_equal_trainings(*map(trained, losses))


def test_trains_as_with_the_loss_of_kauldron():
    keys = {"logits": "preds", "labels": "batch.labels", "mask": "batch.mask"}
    params = {"w": jnp.zeros((6, 4)), "b": jnp.zeros(4)}

    def total(loss):
        def value(params):
            batch = {"labels": jnp.asarray(LABELS), "mask": jnp.asarray(MASK)}
            context = {"step": 0, "preds": X @ params["w"] + params["b"], "batch": batch}
            return loss.get_state_from_context(context).compute()

        return value

    losses = simple.SoftmaxCrossEntropyWithIntLabels(**keys), SoftmaxFocalLoss(gamma=0.0, **keys)
    assert_equal_trainings(*(three_steps(total(loss), params) for loss in losses))


def test_gradients_on_eight_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(X, jax.NamedSharding(mesh, jax.P("data")))
    loss = SoftmaxFocalLoss(logits="logits", labels="labels")

    def value(kernel, x):
        state = loss.get_state(logits=x @ kernel, labels=jnp.asarray(LABELS))
        return state.compute()

    kernel = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    gradient = jax.jit(jax.value_and_grad(value))
    assert_equal_trainings(gradient(kernel, X), gradient(kernel, placed))
