"""What the stacked and the looped model share: positions, and blocks by their configuration."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from spak_jax.models.block import BlockSettings, dropout
from spak_jax.models.language_model import LanguageModel, Network
from spak_jax.positions.base import PositionInputs, SchemeSettings
from spak_jax.registry import BLOCKS, POSITIONS


class Architecture(Network, Protocol):
    """What a configuration (`spak_jax.config_sections.Architecture`) says of a model."""

    heads: int
    mlp: str
    hidden: int | None
    block: str
    positions: str
    max_relative_distance: int
    window: bool


class Embedded(NamedTuple):
    """What blocks are given of tokens.

    x: the stream before the first, float32 `[batch, length, width]`. position_inputs: of the
    tokens. keys: `[depth, 4]`, as `fused.apply_block` takes them; None without dropout.
    """

    x: jax.Array
    position_inputs: PositionInputs
    keys: jax.Array | None


class Transformer(LanguageModel):
    """A language model with a position scheme.

    Args:
      config: the architecture.
      vocabulary: number of different tokens.
      dtype: of the products.
      rngs: for initial values.
    """

    def __init__(self, config: Architecture, vocabulary: int, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config, vocabulary, dtype, rngs)
        scheme = POSITIONS.get(config.positions)
        sizes = SchemeSettings(vocabulary, config.width, config.max_relative_distance)
        self.position_scheme = scheme(sizes, rngs=rngs)

    # Private methods are those of the package: `nnx.tabulate` shows a line for each public one.

    def _embed(self, tokens, positions, position_ids, key, depth, progress=None) -> Embedded:
        """Arguments as of a call; `depth` blocks are given keys."""
        position_inputs = self._position_inputs(tokens, positions, position_ids, key, progress)
        x = self._embed_tokens(tokens)
        if position_inputs.embedding is not None:
            x += position_inputs.embedding
        first, keys = None, None
        if key is not None:
            first, rest = jax.random.split(key)
            rest = jax.random.split(rest, (depth + 1, 3))
            # The last of a block's keys is for what it leaves pending: the next one's first.
            keys = jnp.concatenate([rest[:-1], rest[1:, :1]], axis=1)
        return Embedded(dropout(x, self.dropout, first), position_inputs, keys)

    def _position_inputs(
        self, tokens, positions=None, position_ids=None, key=None, progress=None
    ) -> PositionInputs:
        scheme, name = self.position_scheme, self.config.positions
        if scheme.needs_position_ids and position_ids is None:
            raise ValueError(f"model.positions = {name!r} needs position_ids")
        found = scheme.inputs(
            tokens,
            positions=jnp.arange(tokens.shape[-1]) if positions is None else positions,
            position_ids=position_ids,
            key=None if key is None else jax.random.fold_in(key, scheme.key_stream),
            progress=progress if scheme.anneals_until else None,
        )
        found = PositionInputs() if found is None else found
        if found.window_slack is not None and progress is None:
            raise ValueError(f"model.positions = {name!r} gives window_slack outside training")
        return found


def make_block(
    config: Architecture, depth: int, dtype: Any, attention: str | None, rngs: nnx.Rngs
) -> nnx.Module:
    """A block of the class that an architecture names.

    Args:
      config: the architecture.
      depth: blocks that add to one residual stream.
      dtype: of the products.
      attention: implementation, as `pallas_kernels.attention` takes it; None the fastest.
      rngs: for initial values.
    """
    scheme, distance = POSITIONS.get(config.positions), config.max_relative_distance
    settings = BlockSettings(
        width=config.width,
        heads=config.heads,
        hidden=hidden_width(config),
        gated=config.mlp == "swiglu",
        dropout=config.dropout,
        depth=depth,
        dtype=dtype,
        window=distance if config.window else None,
        causal=config.causal,
        init_std=config.init_std,
        bias_table=scheme.initial_bias(config.heads, distance),
        attention=attention,
    )
    return BLOCKS.get(config.block)(settings, rngs=rngs)


def hidden_width(config: Architecture) -> int:
    """Channels of the MLP."""
    if config.hidden is not None:
        return config.hidden
    # 8/3 of the width keeps the number of weights where there is a third matrix.
    return 8 * config.width // 3 if config.mlp == "swiglu" else 4 * config.width
