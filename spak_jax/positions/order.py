"""Schemes that know the order of tokens without rotating anything."""

import jax.numpy as jnp

from spak_jax.positions.base import PositionInputs, PositionScheme
from spak_jax.registry import POSITIONS


@POSITIONS.register("none")
class NoPositions(PositionScheme):
    """Nothing: only the causal mask says which tokens came before."""

    def inputs(self, tokens, *, positions, position_ids=None, key=None, progress=None):
        return None


@POSITIONS.register("token-bias")
class TokenBias(PositionScheme):
    """Learned biases of the distance in the sequence (Shaw et al. 2018, Self-Attention with
    Relative Position Representations, have vectors there)."""

    has_ids = True

    def inputs(self, tokens, *, positions, position_ids=None, key=None, progress=None):
        ids = jnp.broadcast_to(positions + 1, tokens.shape).astype(jnp.int32)
        return PositionInputs(position_ids=ids)
