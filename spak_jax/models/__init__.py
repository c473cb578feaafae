"""The models as Flax NNX modules: `GPT`, which stacks blocks, `LoopLM`, which repeats one, and
`GRU`, which both are compared with.

| | |
| --- | --- |
| `block` | attention, MLP and block, as their equations read |
| `language_model` | embedding, final norm and tied head, which all models share |
| `transformer` | positions, which the two transformers share |
| `stacked`, `looped`, `gru` | the models |
| `flops` | what passes and trainings cost, counted |
| `halting` | tokens that stop early |
| `kv_cache` | writing token by token |
| `fused` | all that chooses kernels, or defers gradients, for blocks that it is known to equal |

Weights and the residual stream are float32; products run in the compute dtype. Dropout keys are
arguments: a call without one is deterministic.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import targets
from spak_jax import tasks
from spak_jax.config import Config
from spak_jax.models.block import Block, BlockSettings
from spak_jax.models.gru import GRU
from spak_jax.models.looped import LoopLM
from spak_jax.models.stacked import GPT
from spak_jax.models.transformer import hidden_width

__all__ = [
    "GPT",
    "GRU",
    "Block",
    "BlockSettings",
    "LoopLM",
    "abstract",
    "build",
    "compute_dtype",
    "hidden_width",
    "parameter_count",
    "parameters_of",
]

KINDS = {"gpt": GPT, "loop": LoopLM, "gru": GRU}


def build(config: Config, key: jax.Array, attention: str | None = None) -> GPT | LoopLM | GRU:
    """The model that a configuration describes, freshly initialised.

    Args:
      config: its section `model` is the architecture; its task has the vocabulary.
      key: PRNG key of the initial values.
      attention: implementation, as `pallas_kernels.attention` takes it; None the fastest. A GRU
        has none.
    """
    architecture, vocabulary = config.model, len(tasks.of(config.data).vocabulary)
    dtype = compute_dtype(architecture.dtype)
    model = KINDS[architecture.kind]
    return model(architecture, vocabulary, dtype, attention, rngs=nnx.Rngs(key))


def abstract(config: Config, attention: str | None = None):
    """The structure of a configuration's model and its weights as shapes: nothing is computed.

    Returns:
      What `nnx.merge` makes a model from: graph definition, and state of `ShapeDtypeStruct`.
    """
    return nnx.split(nnx.eval_shape(lambda: build(config, jax.random.key(0), attention)))


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of products: "auto" is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if targets.on_gpu() else "float32"
    return jnp.dtype(name)


def parameter_count(weights) -> int:
    """The number of weights in a pytree."""
    return sum(leaf.size for leaf in jax.tree.leaves(weights))


def parameters_of(config: Config) -> int:
    """The number of weights of a configuration's model; none are made."""
    return _parameters_of(config.model_only())


@functools.cache
def _parameters_of(config: Config) -> int:
    return parameter_count(abstract(config)[1])
