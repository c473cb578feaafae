"""Gradients of whole models where all kernels run, against those of plain `jnp`.

Only where kernels are compiled are they taken together: this needs a GPU.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import targets
from spak_jax import models, tasks
from spak_jax.config import read_config
from spak_jax.data import make_dataset, training_batch
from spak_jax.tasks.arithmetic import Addition
from spak_jax.training.step import loss

ADDITION = Addition()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("exact_products"),
    pytest.mark.skipif(
        jax.default_backend() != "gpu", reason="compares what is compiled for a GPU; needs one"
    ),
]
FEW_ROWS = "train.batch=4"


@pytest.mark.parametrize("asked", ["training", "call"])
@pytest.mark.parametrize("name", ["loop12", "gpt12", "quickstart", "pointer"])
def test_gradients_are_as_near_to_the_truth_as_without_kernels(name, asked):
    """Those of the training loss, with dropout, and of a loss that a user writes around a call."""
    gradient = {"training": training_gradient, "call": gradient_of_a_call}[asked]
    truth_config, config = (configured(name, dtype) for dtype in ("float32", "bfloat16"))
    with targets.without_kernels():
        truth, plain = gradient(truth_config), gradient(config)
    by_kernels = gradient(config)
    assert off(by_kernels, truth) < 1.5 * off(plain, truth) + 1e-3


def configured(name: str, dtype: str):
    return read_config(Path(f"configs/{name}.toml"), [f'model.dtype="{dtype}"', FEW_ROWS])


def start(config):
    """A model's definition, its weights and a batch."""
    network = models.build(config, jax.random.key(1))
    dataset = make_dataset(config.data)
    batch = training_batch(jax.random.key(2), config.data, config.train.batch, dataset.training)
    return *nnx.split(network), batch


def training_gradient(config):
    definition, weights, batch = start(config)
    task = tasks.of(config.data)
    of = lambda weights: loss(  # noqa: E731
        nnx.merge(definition, weights), batch, task, jax.random.key(3), 0.5
    )
    return jax.jit(jax.grad(of))(weights)


def gradient_of_a_call(config):
    definition, weights, batch = start(config)

    def of_a_call(weights):
        network = nnx.merge(definition, weights)
        logits = network(batch.tokens, position_ids=ADDITION.position_ids(batch.tokens))
        chances = jax.nn.log_softmax(logits.astype(jnp.float32))
        return -jnp.take_along_axis(chances, batch.targets[..., None], axis=-1).mean()

    return jax.jit(jax.grad(of_a_call))(weights)


def off(found, truth) -> float:
    """By how much of its length the gradient of all weights is off."""
    found, truth = (
        np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])
        for tree in (found, truth)
    )
    assert np.isfinite(found).all()
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
