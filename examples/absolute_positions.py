r"""A position scheme of one's own: a learned embedding of each place, as GPT-2 has it.

    python examples/absolute_positions.py train quickstart \
        model.positions=absolute model.window=false name=absolute

What it learns is one table; what it gives the model, a vector to add to each token.
"""

import jax.numpy as jnp
from flax import nnx

import spak_jax as spak
from spak_jax.positions.base import PositionInputs, PositionScheme
from spak_jax.registry import POSITIONS

# Places that have an embedding; all behind the last one share its.
PLACES = 256


@POSITIONS.register("absolute")
class AbsolutePositions(PositionScheme):
    """`x_t = embedding(token_t) + table[t]` (Radford et al. 2019), the table learned."""

    def __init__(self, settings, *, rngs):
        self.table = nnx.Embed(
            PLACES,
            settings.width,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )

    def inputs(self, tokens, *, positions, position_ids=None, key=None, progress=None):
        places = jnp.minimum(jnp.broadcast_to(positions, tokens.shape), PLACES - 1)
        return PositionInputs(embedding=self.table(places))


if __name__ == "__main__":
    spak.main()
