"""Models with large random weights, which what several test files compare is computed by."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spak_jax import models
from spak_jax.config import Config, parse_config
from spak_jax.registry import POSITIONS
from spak_jax.tasks import Batch
from spak_jax.tasks.arithmetic import Addition
from spak_jax.training.named_arrays import from_named, named_arrays

ADDITION = Addition()

WIDTH, HEADS, LENGTH = 32, 2, 14

# What float32 leaves of a comparison with float64, relative to the norm of all that is compared.
ROUNDING = 1e-5

GPT = {"kind": "gpt", "layers": 3}
LOOP = {"kind": "loop", "loops": 4}
ARCHITECTURES = {
    "gpt": GPT,
    "gpt-swiglu": GPT | {"mlp": "swiglu"},
    "loop": LOOP,
    "loop-odd-swiglu": LOOP | {"loops": 5, "mlp": "swiglu"},
    "loop-odd-injected": LOOP | {"loops": 3, "inject_input": True},
    "loop-injected-swiglu": LOOP | {"inject_input": True, "mlp": "swiglu"},
}


def make_config(**architecture) -> Config:
    sizes = {"width": WIDTH, "heads": HEADS, "dtype": "float32", "dropout": 0.0}
    return parse_config({"name": "t", "system": "t", "model": sizes | architecture}, "test")


def random_weights(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by name, far larger than initial ones, so that nothing hides in rounding."""
    _, state = models.abstract(config)
    random = np.random.default_rng(seed)
    return {
        name: (
            random.normal(1, 0.3, leaf.shape)
            if name.endswith("scale")
            else random.normal(0, 0.6 if name.startswith("embedding") else 0.2, leaf.shape)
        ).astype(np.float32)
        for name, leaf in named_arrays(nnx.to_pure_dict(state)).items()
    }


def build(config: Config, weights: dict[str, np.ndarray]):
    """The Flax model with these weights."""
    definition, state = models.abstract(config)
    named = from_named(nnx.to_pure_dict(state), jax.tree.map(jnp.asarray, weights))
    nnx.replace_by_pure_dict(state, named)
    return nnx.merge(definition, state)


def random_model(**architecture):
    config = make_config(**architecture)
    return build(config, random_weights(config))


def random_batch(seed: int = 0, rows: int = 3, length: int = LENGTH) -> Batch:
    random = np.random.default_rng(seed)
    text = random.integers(0, len(ADDITION.vocabulary), (rows, length + 1))
    return Batch(text[:, :-1], text[:, 1:], random.random((rows, length)) < 0.5)


@nnx.jit(static_argnames="loops")
def logits_of(network, tokens, positions=None, key=None, loops=None, position_ids=None):
    more = {"positions": positions, "position_ids": position_ids, "key": key}
    more |= {} if loops is None else {"loops": loops}
    return network(jnp.asarray(tokens), **more)


def error(found, expected) -> float:
    """The norm of the difference relative to that of what is expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def config_of(scheme: str, kind: str) -> Config:
    """Every switch of the architecture is on in one of the two kinds, where there is one."""
    depth = {"layers": 3, "mlp": "swiglu"}
    if kind == "loop":
        depth = {"loops": 4, "inject_input": True, "normalize_state": scheme != "rope"}
    windowed = {}
    if kind == "loop" and POSITIONS.get(scheme).has_ids:
        windowed = {"window": True, "max_relative_distance": 2}
    return make_config(kind=kind, positions=scheme, **depth, **windowed)


def weights_of(config: Config) -> nnx.State:
    return nnx.state(build(config, random_weights(config)))
