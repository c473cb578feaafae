"""Schemes that rotate queries and keys (Su et al. 2021, RoFormer) by the order of tokens alone."""

import jax
import jax.numpy as jnp

from pallas_kernels import shards
from spak_jax import jax_settings
from spak_jax.positions.base import PositionInputs, PositionScheme
from spak_jax.registry import POSITIONS

# The widest of random gaps.
WIDEST_GAP = 16


@POSITIONS.register("rope")
class Rope(PositionScheme):
    """By the token's place in its sequence."""

    rotates = True

    def inputs(self, tokens, *, positions, position_ids=None, key=None, progress=None):
        return PositionInputs(rope_positions=positions)


@POSITIONS.register("random-rope")
class RandomRope(PositionScheme):
    """By places with random gaps between them: longer sequences then meet distances that shorter
    ones have met in training (Ruoss et al. 2023, Randomized Positional Encodings Boost Length
    Generalization of Transformers).

    With a key each sequence draws gaps of its own. Without one gaps are always the same, each by
    its place alone: what a sequence comes to depends neither on its neighbours nor on its padding.
    """

    rotates = True

    def inputs(self, tokens, *, positions, position_ids=None, key=None, progress=None):
        widest = WIDEST_GAP + 1
        if key is None:
            # Partitionable: or a gap would depend on how many are drawn.
            with jax.threefry_partitionable(True):
                length, key = tokens.shape[-1:], jax_settings.key(0)
                gaps = jax.random.randint(key, length, 1, widest, dtype=jnp.int32)
        else:
            gaps = shards.drawn(
                lambda every: jax.random.randint(key, every.shape, 1, widest, dtype=jnp.int32),
                tokens,
            )
        return PositionInputs(rope_positions=jnp.cumsum(gaps, axis=-1))
