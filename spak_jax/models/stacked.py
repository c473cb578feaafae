"""`GPT`: a transformer of blocks with weights of their own, one after another."""

from typing import Protocol

import jax
from flax import nnx

from spak_jax.models import fused
from spak_jax.models.language_model import stacked
from spak_jax.models.transformer import Architecture, Transformer, make_block


class StackedArchitecture(Architecture, Protocol):
    """What a configuration (`spak_jax.config_sections.StaticModel`) says."""

    layers: int


class GPT(Transformer):
    """A transformer of `config.layers` blocks with weights of their own.

    One `lax.scan` over the stacked weights of its blocks: on a CPU it compiles one block whatever
    the depth (`fused.scan_or_unroll`).
    """

    def __init__(
        self,
        config: StackedArchitecture,
        vocabulary: int,
        dtype,
        attention: str | None,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, vocabulary, dtype, rngs)
        self.layers = config.layers
        make = lambda rngs: make_block(config, config.layers, dtype, attention, rngs)  # noqa: E731
        self.blocks = stacked(make, config.layers, rngs)

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
          positions: int `[length]` or `[batch, length]`; None counts from 0.
          position_ids: int32 `[batch, length]`, the task's, for the schemes that go by them.
          key: PRNG key for dropout; None is deterministic.

        Returns:
          float32 `[batch, length, vocabulary]`.
        """
        stream, last = self._run(tokens, positions, position_ids, key)
        return self.unembed(fused.apply_pending(stream, last, self.dropout))

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
        """What the training loss averages over: float32 `[1]`, of the last block's logits.

        The cross-entropies of `targets`, int32 `[batch, length]`, summed with `weights`, float32
        `[batch, length]`; `progress`, the share of the training that is done, which annealed
        position schemes go by; the rest as in a plain call.
        """
        given = tokens, targets, weights, position_ids, key, progress
        return fused.with_batched_weight_grads(GPT._losses, self, "blocks", self.layers, given)

    def _losses(self, tokens, targets, weights, position_ids, key, progress, deferred=None):
        """`supervised_losses`; deferred: of each layer, as of `fused.apply_block`."""
        stream, last = self._run(tokens, None, position_ids, key, progress, deferred)
        return fused.add_loss(self, stream, last, targets, weights)[1][None]

    def _run(self, tokens, positions, position_ids, key, progress=None, deferred=None):
        """The stream after all blocks, and the key of the dropout of what is pending."""
        embedded = self._embed(tokens, positions, position_ids, key, self.layers, progress)
        definition, weights = nnx.split(self.blocks)

        def step(stream, given, deferred):
            layer, keys = given
            block = nnx.merge(definition, layer)
            return fused.apply_block(
                block, stream, embedded.position_inputs, keys, deferred=deferred
            ), None

        stream = fused.first_stream(self.blocks, embedded.x, self.dtype)
        keys = embedded.keys
        stream, _ = fused.scan_or_unroll(step, stream, (weights, keys), deferred)
        return stream, None if keys is None else keys[-1, -1]

    def _inference(self, first, loops):
        """As of `LoopLM`; there are no loops to choose."""
        definition, weights = nnx.split(self.blocks)
        return lambda x, layer: (nnx.merge(definition, layer), x, None), weights
