"""The toy model of tunix with its trainers and with the losses of docs/llm-trainers.md."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from pages import run
from steps import assert_equal_trainings

pytest.importorskip("tunix")
from tunix.rl import algo_core, common
from tunix.sft import peft_trainer
from tunix.sft.dpo import dpo_trainer
from tunix.tests.test_common import ModelConfig

PAGE = Path(__file__).parents[2] / "docs" / "llm-trainers.md"
rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def page():
    return run(PAGE, language="py")


def _model(page, vocabulary=256):
    config = ModelConfig(num_layers=2, vocab_size=vocabulary)
    return page["Model"](config, rngs=nnx.Rngs(0))


def _sft_inputs(examples=4, tokens=12, vocabulary=256):
    ids = rng.integers(1, vocabulary, (examples, tokens)).astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens), ids.shape)
    return {
        "input_tokens": jnp.asarray(ids),
        "input_mask": jnp.asarray(positions < tokens - 3 * np.arange(examples)[:, None]),
        "positions": jnp.asarray(positions),
        "attention_mask": jnp.ones((examples, tokens, tokens), bool),
    }


def _trained(trainer, batches):
    """Return the parameters after a training."""
    trainer.train(batches)
    assert trainer.train_steps == len(batches)
    return nnx.to_pure_dict(nnx.state(trainer.model, nnx.Param))


def test_sft_trains_as_with_the_loss_of_tunix(page):
    arrays = [_sft_inputs() for _ in range(3)]
    names = "input_tokens", "input_mask"
    batches = [peft_trainer.TrainingInput(**{name: x[name] for name in names}) for x in arrays]

    def inputs(batch):
        x = _sft_inputs()
        return x | {"input_tokens": batch.input_tokens, "input_mask": batch.input_mask}

    def trainer(make):
        config = peft_trainer.TrainingConfig(eval_every_n_steps=100, max_steps=3)
        found = make(_model(page), optax.sgd(0.1), config)
        return found.with_gen_model_input_fn(inputs)

    trainings = [
        _trained(trainer(make), batches) for make in (peft_trainer.PeftTrainer, page["sft_trainer"])
    ]
    untrained = nnx.to_pure_dict(nnx.state(_model(page), nnx.Param))
    with pytest.raises(AssertionError):
        assert_equal_trainings(untrained, trainings[0])
    assert_equal_trainings(*trainings)


def test_dpo_trains_as_with_the_loss_of_tunix(page):
    def half(tokens):
        ids = rng.integers(1, 256, (4, tokens)).astype(np.int32)
        return jnp.asarray(ids), jnp.asarray(rng.random((4, tokens)) < 0.8).astype(jnp.int32)

    batches = []
    for _ in range(3):
        (prompt, prompt_mask), (chosen, chosen_mask), (rejected, rejected_mask) = map(
            half, (5, 6, 6)
        )
        batches.append(
            dpo_trainer.TrainingInput(
                prompt_ids=prompt,
                prompt_mask=prompt_mask,
                chosen_ids=chosen,
                chosen_mask=chosen_mask,
                rejected_ids=rejected,
                rejected_mask=rejected_mask,
            )
        )

    def trained(make):
        config = dpo_trainer.DPOTrainingConfig(
            eval_every_n_steps=100, max_steps=3, beta=0.2, label_smoothing=0.1
        )
        return _trained(make(_model(page), _model(page), optax.sgd(0.1), config), batches)

    assert_equal_trainings(trained(dpo_trainer.DPOTrainer), trained(page["dpo"]))


def _value_and_gradient(loss, model):
    value, gradient = nnx.jit(nnx.value_and_grad(loss))(model)
    return value, nnx.to_pure_dict(gradient)


def test_orpo_equals_the_loss_of_tunix(page):
    ids = jnp.asarray(rng.integers(1, 256, (4, 9)), jnp.int32)
    mask = jnp.asarray(rng.random((4, 5)) < 0.8).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(9), ids.shape)
    example = dpo_trainer.TrainExample(
        input_ids=ids,
        positions=positions,
        attention_mask=jnp.ones((4, 9, 9), bool),
        ref_chosen_logps=None,
        ref_rejected_logps=None,
        completion_mask=mask,
        logits_to_keep=5,
    )
    options = {"lambda_orpo": 0.3, "label_smoothing": 0.1}

    def original(model):
        return dpo_trainer.dpo_loss_fn(model, example, algorithm="orpo", **options)[0]

    found = _value_and_gradient(
        lambda model: page["orpo_loss"](model, example, **options), _model(page)
    )
    assert_equal_trainings(_value_and_gradient(original, _model(page)), found)


def test_grpo_equals_the_loss_of_tunix(page):
    prompt, completion = (jnp.asarray(rng.integers(1, 256, (4, n)), jnp.int32) for n in (4, 5))
    mask = jnp.arange(5) < jnp.array([5, 3, 1, 4])[:, None]
    near = [jnp.asarray(rng.normal(-5.5, 0.3, (4, 5)), jnp.float32) for _ in range(2)]
    example = common.TrainExample(
        prompt_ids=prompt,
        prompt_mask=jnp.ones_like(prompt),
        completion_ids=completion,
        completion_mask=mask.astype(jnp.int32),
        advantages=jnp.array([1.0, -0.5, 0.7, -1.2]),
        ref_per_token_logps=near[0],
        old_per_token_logps=near[1],
    )
    config = SimpleNamespace(
        beta=0.1,
        epsilon=0.3,
        loss_algo="grpo",
        loss_agg_mode="token-mean",
        temperature=0.8,
        kl_loss_mode="low_var_kl",
        kl_clamp_value=None,
    )

    def original(model):
        return algo_core.grpo_loss_fn(model, example, config, pad_id=0, eos_id=1)[0]

    def with_focal_jax(model):
        return page["grpo_loss"](model, example, ratio_bound=0.3, beta=0.1, temperature=0.8)

    found = _value_and_gradient(with_focal_jax, _model(page))
    assert_equal_trainings(_value_and_gradient(original, _model(page)), found)


def test_sft_takes_an_eighth_of_the_memory(page):
    model, inputs = _model(page, 32_000), _sft_inputs(4, 256, 32_000)
    graph, state = nnx.split(model)

    def temporaries(loss):
        def total(state):
            return loss(nnx.merge(graph, state), **inputs)

        compiled = jax.jit(jax.grad(total)).lower(state).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    default = temporaries(peft_trainer._default_loss_fn)
    assert temporaries(page["sft_loss"]) <= default / 8


def _maxtext_losses():
    """Return the cross entropy of maxtext with z-loss and softcap, and that of the page."""
    max_utils = pytest.importorskip("maxtext.utils.max_utils")
    loss = run(PAGE)["maxtext_loss"]

    def original(features, embedding, data):
        logits = jnp.tanh(features @ embedding.T / jnp.sqrt(features.shape[-1]) / 2) * 2
        one_hot = jax.nn.one_hot(data["targets"], embedding.shape[0])
        # The first result contains the second.
        xent, _ = max_utils.cross_entropy_with_logits(logits, one_hot, z_loss=0.01)
        is_token = data["targets_segmentation"] != 0
        return jnp.sum(xent * is_token) / jnp.sum(is_token)

    def with_focal_jax(features, embedding, data):
        return loss(features, embedding, data, z_loss=0.01, softcap=2.0)

    return original, with_focal_jax


def test_maxtext_cross_entropy_with_z_loss():
    features = jnp.asarray(rng.normal(size=(2, 6, 16)), jnp.float32)
    embedding = jnp.asarray(rng.normal(size=(40, 16)), jnp.float32)
    segments = jnp.asarray([[1] * 6, [1, 1, 1, 0, 0, 0]])
    data = {"targets": jnp.asarray(rng.integers(40, size=(2, 6))), "targets_segmentation": segments}
    want, got = (
        jax.value_and_grad(f, (0, 1))(features, embedding, data) for f in _maxtext_losses()
    )
    assert_equal_trainings(want, got)


def test_maxtext_takes_an_eighth_of_the_memory():
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    data = {"targets": tokens, "targets_segmentation": tokens}
    features = jax.ShapeDtypeStruct((4, 256, 256), jnp.float32)
    embedding = jax.ShapeDtypeStruct((32_000, 256), jnp.float32)
    default, of_focal_jax = (
        jax.jit(jax.grad(f, (0, 1))).lower(features, embedding, data).compile()
        for f in _maxtext_losses()
    )
    temporaries = [x.memory_analysis().temp_size_in_bytes for x in (default, of_focal_jax)]
    assert temporaries[1] <= temporaries[0] / 8
