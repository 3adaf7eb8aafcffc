"""A small Llama of EasyDeL with its own loss and with the loss of docs/llm-trainers.md."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pages import run
from steps import assert_equal_trainings, three_steps

rng = np.random.default_rng(0)
PAGE = Path(__file__).parents[2] / "docs" / "llm-trainers.md"


@pytest.fixture(scope="module")
def llama():
    """Import the models of EasyDeL, without the ones that require PyTorch."""
    spec = importlib.util.find_spec("easydel") or pytest.skip("EasyDeL is not installed")
    modules = ModuleType("easydel.modules")
    modules.__path__ = [str(Path(spec.origin).parent / "modules")]
    sys.modules[modules.__name__] = modules
    environment = dict(os.environ)
    jax.devices()  # EasyDeL sets flags for GPUs, which XLA for a CPU refuses when it starts
    try:
        return pytest.importorskip("easydel.modules.llama", exc_type=ImportError)
    finally:
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture(scope="module")
def easydel_loss():
    pytest.importorskip("tunix")  # another section of the page imports it
    return run(PAGE, language="py")["easydel_loss"]


def _default_loss(model, input_ids, labels):
    """Return the loss of a model as EasyDeL's trainer does."""
    _, metrics = model.compute_loss(input_ids=input_ids, labels=labels)
    return metrics.loss


def _loss_of_parameters(llama, loss, input_ids, labels, **sizes):
    """Return a loss of the parameters of a new model, the parameters, and the mesh."""
    config = llama.LlamaConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=input_ids.shape[1],
        **sizes,
    )
    model = llama.LlamaForCausalLM(
        config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_of(params):
        return loss(nnx.merge(graph, params, rest), input_ids, labels)

    return loss_of, params, model.mesh


def test_trains_as_with_the_loss_of_easydel(llama, easydel_loss):
    ids = jnp.asarray(rng.integers(0, 256, (4, 12)), jnp.int32)
    lengths = jnp.array([12, 9, 6, 3])
    labels = jnp.where(jnp.arange(12) < lengths[:, None], ids, -100)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64}
    trainings = []
    for loss in _default_loss, easydel_loss:
        loss_of, params, mesh = _loss_of_parameters(llama, loss, ids, labels, **sizes)
        with mesh:
            params, values = three_steps(loss_of, params)
        trainings.append((nnx.to_pure_dict(params), values))
    assert_equal_trainings(*trainings)


def test_takes_a_tenth_of_the_memory(llama, easydel_loss):
    ids = jnp.zeros((4, 256), jnp.int32)
    sizes = {"vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 256}

    def temporaries(loss):
        loss_of, params, mesh = _loss_of_parameters(llama, loss, ids, ids, **sizes)
        with mesh:
            compiled = jax.jit(jax.grad(loss_of)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(easydel_loss) <= temporaries(_default_loss) / 10
