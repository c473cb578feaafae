"""Where tokens are, as the models know it: the position schemes by name.

Attention is told of places in two ways: RoPE turns queries and keys by an integer each, and a
learned bias is looked up by the difference of two tokens' ids, beyond which a window may end.

| scheme | turned by | bias and window over |
| --- | --- | --- |
| rope | the token's place in the row | |
| random-rope | places with random gaps between them | |
| none | | |
| token-bias | | the token's place in the row |
| coupled-rope | coupled ids | |
| coupled-embedding | | ; a learned embedding of coupled ids is added to the tokens |
| coupled-bias | | coupled ids |
| learned | | ids that the model finds itself, by `Pointer` |

Coupled ids are given to a model, by the task (`Task.position_ids`): they say which
digits belong together. All others know of tokens and their order only.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import shards
from spak_jax import jax_settings
from spak_jax.config import BIASED, Architecture

# The widest of random gaps.
WIDEST_GAP = 16
# Ids that a learned embedding has; training moves each row's ids by a random offset within them.
EMBEDDED_IDS = 128
# How steeply a gate answers to its logit, and what all logits are at first.
GATE_SLOPE, FIRST_GATE = 6.0, -0.2
# The share of training after which gates are decided, and how much further a window reaches before:
# to tokens whose ids are to come closer.
SOFT_UNTIL, SOFT_FURTHER = 0.4, 1.0
# The first biases of learned ids favour differences spread over this much to either side.
FIRST_CENTRES = 1.5


class Places(NamedTuple):
    """What attention is told: integers to turn by, and ids (0 for no place); None for nothing.

    turned_by: int32 `[length]` or `[batch, length]`. ids: int32 `[batch, length]`, or float32 for
    learned ids in training. further: by how much the window is wider then than `config.clip`.
    """

    turned_by: jax.Array | None = None
    ids: jax.Array | None = None
    further: jax.Array | None = None


class Pointer(nnx.Module):
    """Ids that a model finds itself: a counter over the row that each token moves or starts anew.

    `id_t = gate_t (id_{t-1} + 1)`, the gate a sigmoid of what is learned for each token of the
    vocabulary: nothing here knows what a digit is, or where numbers start, but for the first of a
    row, which begins with the counter at 0. (Contextual position encoding, Golovneva et al. 2024,
    counts by gates too, of query and key, without starting anew.)

    A token that starts anew has the id 0, no place: every query sees it. Attention over a window
    needs such a one to weigh the others against, or two equal digits look like one.

    Gates are 0 or 1 and ids are whole, however long the row. In the first part of training
    (`SOFT_UNTIL`) they are soft, so that a gradient can move them; after it they are rounded and
    stay as they are, or the model would come to rely on what lies between. At first all tokens
    mostly start the counter anew. From gates of a half some trainings ended with a counter that
    nothing starts anew and that forgets a little at every token: good enough for short numbers.

    While gates are soft ids count from 1: if starting anew made a token seen by all, all would
    start anew.
    """

    def __init__(self, vocabulary: int):
        self.gate_logits = nnx.Param(jnp.full(vocabulary, FIRST_GATE, jnp.float32))

    def soft(self) -> jax.Array:
        """How far each token moves the counter on, float32 `[vocabulary]`."""
        return jax.nn.sigmoid(GATE_SLOPE * self.gate_logits[...])

    def decided(self) -> jax.Array:
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
        gates, first = self.decided().astype(jnp.int32), 0
        if progress is not None:
            soft = progress < SOFT_UNTIL
            gates, first = jnp.where(soft, self.soft(), gates), jnp.where(soft, 1.0, 0.0)
        gates = gates[tokens]

        def join(earlier, later):
            return earlier[0] * later[0], earlier[1] * later[0] + later[1]

        return first + jax.lax.associative_scan(join, (gates, gates), axis=1)[1]


def learned_places(
    pointer: Pointer, tokens: jax.Array, progress: jax.Array | float | None
) -> Places:
    """What attention is told by the scheme "learned"; as `Pointer` takes its arguments."""
    ids = pointer(tokens, progress)
    if progress is None:
        return Places(ids=ids)
    return Places(ids=ids, further=jnp.where(progress < SOFT_UNTIL, SOFT_FURTHER, 0.0))


def places(
    config: Architecture,
    tokens: jax.Array,
    positions: jax.Array | None,
    ids: jax.Array | None,
    key: jax.Array | None,
) -> Places:
    """What attention is told by every scheme but "learned".

    Args:
      config: names the scheme.
      tokens: int `[batch, length]`.
      positions: int `[length]` or `[batch, length]`, the tokens' places; None counts from 0.
      ids: int32 `[batch, length]`, coupled ids.
      key: PRNG key of random gaps, of each row its own; None for always the same in all rows, each
        gap by its place alone: what a row comes to depends neither on its neighbours nor on what
        fills it up.

    Raises:
      ValueError: the scheme needs ids and there are none.
    """
    if positions is None:
        positions = jnp.arange(tokens.shape[-1])
    scheme = config.positions
    if scheme.startswith("coupled") and ids is None:
        raise ValueError(f"model.positions = {scheme!r} needs ids")
    if scheme == "rope":
        return Places(turned_by=positions)
    if scheme == "random-rope":
        # Longer rows meet distances then that shorter ones have met in training (Ruoss et al. 2023,
        # Randomized Positional Encodings Boost Length Generalization of Transformers).
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
        return Places(turned_by=jnp.cumsum(gaps, axis=-1))
    if scheme == "coupled-rope":
        return Places(turned_by=ids)
    if scheme == "token-bias":
        return Places(ids=jnp.broadcast_to(positions + 1, tokens.shape).astype(jnp.int32))
    return Places(ids=ids if scheme == "coupled-bias" else None)


def offset_ids(ids: jax.Array, key: jax.Array | None) -> jax.Array:
    """Ids for a learned embedding: each row's moved by a random offset where a key is given."""
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


def first_bias(config: Architecture) -> jax.Array | None:
    """The bias table `[heads, 2 * clip + 2]` before training; None for a scheme without one.

    Zeros; for learned ids, which have nothing to go by at first, each head prefers another
    difference.
    """
    if config.positions not in BIASED:
        return None
    table = jnp.zeros((config.heads, 2 * config.clip + 2), jnp.float32)
    if config.positions == "learned":
        centres = jnp.linspace(-FIRST_CENTRES, FIRST_CENTRES, config.heads, dtype=jnp.float32)
        difference = jnp.arange(-config.clip, config.clip + 1)
        table = table.at[:, :-1].set(-((difference - centres[:, None]) ** 2))
    return table
