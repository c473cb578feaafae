"""`GRU`: gated recurrent units, which read tokens one by one; what transformers are compared with.

A layer is `flax.nnx.GRUCell` over the sequence, its state h of the width of what it reads:

    r = sigmoid(W_ir x + b_ir + W_hr h)
    z = sigmoid(W_iz x + b_iz + W_hz h)
    n = tanh(W_in x + b_in + r * (W_hn h))
    h = (1 - z) * n + z * h

(Cho et al. 2014, arXiv 1406.1078, with the gate `r` behind the product as cuDNN and Flax have it.)
The next layer reads the states of the one below it, with nothing added to them. Dropout is between
layers alone, never from one token to the next (Zaremba et al. 2014, arXiv 1409.2329).

Head and embedding are one matrix, behind the same norm as in the other models: what is compared
then differs between embedding and head alone.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from spak_jax.models import fused
from spak_jax.models.block import dropout
from spak_jax.models.fused import Stream
from spak_jax.models.language_model import LanguageModel, Network, stacked

# The token that ends every problem and fills rows up (`spak_jax.tasks.Task.end`).
NEWLINE = 0


class GRUSettings(Network, Protocol):
    """What a configuration (`spak_jax.config_sections.GRUModel`) says."""

    layers: int


class Layer(nnx.Module):
    """One GRU over the sequence; where tokens may see all, two of half the width, one from each
    end."""

    def __init__(self, config: GRUSettings, dtype: Any, *, rngs: nnx.Rngs):
        size = config.width if config.causal else config.width // 2
        self.causal = config.causal
        self.forwards = nnx.GRUCell(config.width, size, dtype=dtype, rngs=rngs)
        if not self.causal:
            self.backwards = nnx.GRUCell(config.width, size, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
        """States at all tokens.

        Args:
          x: float32 `[batch, length, width]`.
          tokens: int `[batch, length]`.

        Returns:
          As x.
        """
        nowhere = jnp.zeros(tokens.shape, bool)
        states = _read(self.forwards, x, nowhere)
        if self.causal:
            return states
        # What fills rows up is behind the problem, and so before it here: the state begins anew at
        # the problem's end, and no answer depends on how long its row is.
        back = _read(self.backwards, x, tokens == NEWLINE, reverse=True)
        return jnp.concatenate([states, back], axis=-1)


class GRU(LanguageModel):
    """`config.layers` gated recurrent units, one above another."""

    def __init__(
        self,
        config: GRUSettings,
        vocabulary: int,
        dtype: Any,
        attention: str | None,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, vocabulary, dtype, rngs)
        self.layers = stacked(lambda rngs: Layer(config, dtype, rngs=rngs), config.layers, rngs)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Next-token logits.

        Args:
          tokens: int `[batch, length]`.
          positions, position_ids: as all models are given them; they change nothing here.
          key: PRNG key for dropout; None is deterministic.

        Returns:
          float32 `[batch, length, vocabulary]`.
        """
        return self.unembed(self._run(tokens, key))

    def supervised_losses(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
        *,
        position_ids: jax.Array | None = None,
        key: jax.Array | None = None,
        progress: jax.Array | float | None = None,
    ) -> jax.Array:
        """What the training loss averages over: float32 `[1]`, of the last layer's logits.

        The cross-entropies of `targets`, int32 `[batch, length]`, summed with `weights`, float32
        `[batch, length]`; the rest as in a plain call.
        """
        stream = Stream(self._run(tokens, key))
        return fused.add_loss(self, stream, None, targets, weights)[1][None]

    def _run(self, tokens, key):
        """The states of the last layer, float32 `[batch, length, width]`."""
        first, keys = None, None
        if key is not None:
            first, *rest = jax.random.split(key, 1 + self.config.layers)
            keys = jnp.stack(rest)
        definition, weights = nnx.split(self.layers)

        def step(x, given):
            layer, key = given
            states = nnx.merge(definition, layer)(x, tokens)
            return dropout(states, self.dropout, key), None

        x = dropout(self._embed_tokens(tokens), self.dropout, first)
        return jax.lax.scan(step, x, (weights, keys))[0]


def _read(cell: nnx.GRUCell, x: jax.Array, ends: jax.Array, *, reverse: bool = False) -> jax.Array:
    """The states of a cell behind each token, float32 `[batch, length, size]`.

    Args:
      cell: which.
      x: float32 `[batch, length, width]`.
      ends: bool `[batch, length]`, where the state is zero again.
      reverse: whether it reads from the last token to the first.
    """

    def step(state, given):
        x, end = given
        state = jnp.where(end[:, None], 0.0, cell(state, x)[0])
        return state, state

    first = jnp.zeros((len(x), cell.hidden_features), jnp.float32)
    by_time = jnp.moveaxis(x, 1, 0), jnp.moveaxis(ends, 1, 0)
    return jnp.moveaxis(jax.lax.scan(step, first, by_time, reverse=reverse)[1], 0, 1)
