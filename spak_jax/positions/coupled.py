"""Schemes that are given position ids by the task: the same id for digits that belong together."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import shards
from spak_jax.positions.base import PositionInputs, PositionScheme
from spak_jax.registry import POSITIONS

INIT_STD = 0.02
# Ids that have an embedding; training moves each sequence's ids by a random offset within them.
EMBEDDED_IDS = 128


@POSITIONS.register("coupled-rope")
class CoupledRope(PositionScheme):
    """Queries and keys are rotated by the ids."""

    rotates = True
    needs_position_ids = True

    def inputs(self, tokens, *, positions, position_ids=None, key=None, progress=None):
        return PositionInputs(rope_positions=position_ids)


@POSITIONS.register("coupled-embedding")
class CoupledEmbedding(PositionScheme):
    """A learned embedding of the ids is added to the tokens, in training at random offsets (McLeish
    et al. 2024, Transformers Can Do Arithmetic with the Right Embeddings)."""

    needs_position_ids = True
    key_stream = 0

    def __init__(self, settings, *, rngs):
        self.id_embedding = nnx.Embed(
            EMBEDDED_IDS,
            settings.width,
            embedding_init=nnx.initializers.normal(INIT_STD),
            rngs=rngs,
        )

    def inputs(self, tokens, *, positions, position_ids=None, key=None, progress=None):
        return PositionInputs(embedding=self.id_embedding(offset_ids(position_ids, key)))


@POSITIONS.register("coupled-bias")
class CoupledBias(PositionScheme):
    """Learned biases of differences of the ids."""

    has_ids = True
    needs_position_ids = True

    def inputs(self, tokens, *, positions, position_ids=None, key=None, progress=None):
        return PositionInputs(position_ids=position_ids)


def offset_ids(ids: jax.Array, key: jax.Array | None) -> jax.Array:
    """Ids below `EMBEDDED_IDS`; with a key each sequence's are moved by a random offset.

    Args:
      ids: int32 `[batch, length]`; 0, no place, stays 0.
      key: PRNG key of the offsets.
    """
    if key is not None:
        room = EMBEDDED_IDS - ids.max(-1, keepdims=True)
        offset = shards.drawn(
            lambda every: jax.random.randint(
                key, every.shape, 0, jnp.maximum(every, 1), dtype=jnp.int32
            ),
            room,
        )
        ids = jnp.where(ids > 0, ids + offset, 0)
    return jnp.minimum(ids, EMBEDDED_IDS - 1)
