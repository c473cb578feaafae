"""A scheme that learns position ids from the tokens alone."""

import jax
import jax.numpy as jnp
from flax import nnx

from spak_jax.positions.base import PositionInputs, PositionScheme
from spak_jax.registry import POSITIONS

# How steeply a gate answers to its logit, and what all logits are at first.
GATE_SLOPE, FIRST_GATE = 6.0, -0.2
# The share of training after which gates are hard, and how much further the window reaches before:
# to tokens whose ids are to come closer.
SOFT_UNTIL, SOFT_SLACK = 0.4, 1.0
# The first biases favour differences spread over this much to either side.
FIRST_CENTRES = 1.5


class LearnedCounter(nnx.Module):
    """Position ids by a counter over the sequence that each token moves on or starts anew.

    `id_t = gate_t (id_{t-1} + 1)`, the gate a sigmoid of what is learned for each token of the
    vocabulary: nothing here knows what a digit is, or where numbers start, but for the first of a
    sequence, which begins with the counter at 0. (Contextual position encoding, Golovneva et al.
    2024, counts by gates too, of query and key, without starting anew.)

    A token that starts anew has the id 0, no place: every query sees it. Attention over a window
    needs such a one to weigh the others against, or two equal digits look like one.

    Gates are 0 or 1 and ids are whole, however long the sequence. In the first part of training
    (`SOFT_UNTIL`) they are soft, so that a gradient can move them; after it they are rounded and
    stay as they are, or the model would come to rely on what lies between. At first all tokens
    mostly start the counter anew. From gates of a half some trainings ended with a counter that
    nothing starts anew and that forgets a little at every token: good enough for short numbers.

    While gates are soft ids count from 1: if starting anew made a token seen by all, all would
    start anew.

    Args:
      vocabulary: number of different tokens.
    """

    def __init__(self, vocabulary: int):
        self.gate_logits = nnx.Param(jnp.full(vocabulary, FIRST_GATE, jnp.float32))

    def soft_gates(self) -> jax.Array:
        """How far each token moves the counter on, float32 `[vocabulary]`."""
        return jax.nn.sigmoid(GATE_SLOPE * self.gate_logits[...])

    def hard_gates(self) -> jax.Array:
        """Whether it moves the counter on or starts it anew, bool `[vocabulary]`."""
        return self.gate_logits[...] > 0

    def __call__(self, tokens: jax.Array, progress: jax.Array | float | None = None) -> jax.Array:
        """Ids, 0 at tokens that start anew; 1 more while gates are soft.

        Args:
          tokens: int `[batch, length]`.
          progress: share of the training that is done; None outside training.

        Returns:
          int32 `[batch, length]`; in training float32.
        """
        gates, first = self.hard_gates().astype(jnp.int32), 0
        if progress is not None:
            soft = progress < SOFT_UNTIL
            gates, first = jnp.where(soft, self.soft_gates(), gates), jnp.where(soft, 1.0, 0.0)
        gates = gates[tokens]

        def join(earlier, later):
            return earlier[0] * later[0], earlier[1] * later[0] + later[1]

        return first + jax.lax.associative_scan(join, (gates, gates), axis=1)[1]


@POSITIONS.register("learned")
class LearnedIds(PositionScheme):
    """Learned biases of differences of ids that a `LearnedCounter` gives."""

    has_ids = True
    anneals_until = SOFT_UNTIL

    def __init__(self, settings, *, rngs):
        self.counter = LearnedCounter(settings.vocabulary)

    def inputs(self, tokens, *, positions, position_ids=None, key=None, progress=None):
        ids = self.counter(tokens, progress)
        if progress is None:
            return PositionInputs(position_ids=ids)
        slack = jnp.where(progress < SOFT_UNTIL, SOFT_SLACK, 0.0)
        return PositionInputs(position_ids=ids, window_slack=slack)

    @classmethod
    def initial_bias(cls, heads, max_relative_distance):
        """Each head prefers another difference: ids have nothing else to go by at first."""
        table = super().initial_bias(heads, max_relative_distance)
        centres = jnp.linspace(-FIRST_CENTRES, FIRST_CENTRES, heads, dtype=jnp.float32)
        difference = jnp.arange(-max_relative_distance, max_relative_distance + 1)
        return table.at[:, :-1].set(-((difference - centres[:, None]) ** 2))
