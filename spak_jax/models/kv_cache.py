"""Writing token by token: keys and values of earlier tokens are kept, and one token passes alone.

For models of `Block` alone: what any other block computes of earlier tokens is not known here, and
models of those run over the whole sequence for each token (`spak_jax.evaluation.generate`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.ops.attention import reference as attention_reference
from pallas_kernels.ops.attention import rope
from spak_jax.models import fused
from spak_jax.models.block import Block
from spak_jax.models.fused import Stream
from spak_jax.models.halting import init_halting, update_halting
from spak_jax.positions.base import PositionInputs


class KVCache(NamedTuple):
    """What later tokens see of earlier ones: of every block, or loop, the keys, rotated, and the
    values.

    Both in the compute dtype, `[depth, batch, length, heads, head_dim]`.
    """

    keys: jax.Array
    values: jax.Array


def supports_cache(block_class: type) -> bool:
    """Whether models of blocks of a class write with a cache."""
    return block_class is Block


def prefill(
    model: nnx.Module,
    tokens: jax.Array,
    thresholds: jax.Array | None = None,
    *,
    loops: int | None = None,
    position_ids: jax.Array | None = None,
) -> KVCache:
    """What tokens behind these will see of them: where `decode_step` begins.

    Args:
      model: of blocks that are known.
      tokens: int `[batch, length]`.
      thresholds: where tokens halt once they are sure, as `LoopLM.halting_logits` takes them.
      loops: of a model that loops; None for as many as in training.
      position_ids: as in a plain call.

    Raises:
      ValueError: the blocks are of another class.
    """
    embedded = model._embed(tokens, None, position_ids, None, 0)
    position_inputs = embedded.position_inputs
    enter, given = model._inference(embedded.x, loops)

    def step(state, given):
        block, x, shift = enter(state.x, given)
        _require_known(block)
        x, qkv = fused.attention_inputs(block, Stream(x), shift=shift)
        _, k, v = jnp.moveaxis(qkv, 2, 0)
        if position_inputs.rope_positions is not None:
            k = rope.apply_rope(k, position_inputs.rope_positions)
        mixed = block.mix_heads(qkv, position_inputs=position_inputs)
        x = fused.apply_pending(fused.add_attention(block, x, mixed), None, 0.0)
        return update_halting(state, x, thresholds, model.unembed), KVCache(k, v)

    return jax.lax.scan(step, init_halting(embedded.x), given)[1]


def decode_step(
    model: nnx.Module,
    tokens: jax.Array,
    cache_position: jax.Array,
    cache: KVCache,
    thresholds: jax.Array | None = None,
    *,
    position_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, KVCache]:
    """Next-token logits of one token of each sequence: a pass over it alone.

    As a call, or `LoopLM.halting_logits`, over the whole sequences gives them: no token's position
    depends on what stands behind it, in any scheme.

    Args:
      model: as of `prefill`.
      tokens: int `[batch, length]`; what stands behind `cache_position` is not looked at.
      cache_position: int32 `[batch]`, the token's place in its sequence.
      cache: of all tokens before it.
      thresholds: float, broadcastable to `[batch, length]`.
      position_ids: as in a plain call, of the whole sequences.

    Returns:
      float32 logits `[batch, vocabulary]`, the int32 number of blocks that the token took,
      `[batch]`, and the cache with the token's own at its place.

    Raises:
      ValueError: the blocks are of another class.
    """
    of_token = lambda of_all: jnp.take_along_axis(  # noqa: E731
        jnp.broadcast_to(of_all, tokens.shape), cache_position[:, None], axis=1
    )
    position_inputs = model._position_inputs(tokens, position_ids=position_ids)
    x = model._embed_tokens(of_token(tokens))
    if position_inputs.embedding is not None:
        x += jnp.take_along_axis(position_inputs.embedding, cache_position[:, None, None], axis=1)
    thresholds = None if thresholds is None else of_token(thresholds)
    depths = len(cache.keys)
    enter, given = model._inference(x, depths)

    def step(carry, given):
        (state, cache), (depth, given) = carry, given
        block, x, shift = enter(state.x, given)
        x, cache = _decode_block(block, x, position_inputs, cache_position, cache, depth, shift)
        return (update_halting(state, x, thresholds, model.unembed), cache), None

    carry = init_halting(x), cache
    (state, cache), _ = jax.lax.scan(step, carry, (jnp.arange(depths), given))
    return model.unembed(state.x)[:, 0], state.steps[:, 0], cache


def _decode_block(
    block: Block,
    x: jax.Array,
    position_inputs: PositionInputs,
    cache_position: jax.Array,
    cache: KVCache,
    depth: jax.Array,
    shift: jax.Array | None,
) -> tuple[jax.Array, KVCache]:
    """One block, or loop, of one token of each sequence: the stream, `[batch, 1, width]`, and the
    cache with the token's own keys and values at `depth`."""
    _require_known(block)
    x, qkv = fused.attention_inputs(block, Stream(x), shift=shift)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    rope_positions = position_inputs.rope_positions
    if rope_positions is not None:
        by = jnp.broadcast_to(rope_positions, (len(x), rope_positions.shape[-1]))
        by = jnp.take_along_axis(by, cache_position[:, None], axis=1)
        q, k = rope.apply_rope(q, by), rope.apply_rope(k, by)
    place = depth, jnp.arange(len(x)), cache_position
    keys, values = cache.keys.at[place].set(k[:, 0]), cache.values.at[place].set(v[:, 0])
    mixed = attention_reference.decode_attention(
        q[:, 0],
        keys[depth],
        values[depth],
        cache_position,
        ids=position_inputs.position_ids,
        **block.scoring(position_inputs, q.shape[-1]),
    )
    x = fused.apply_pending(fused.add_attention(block, x, mixed[:, None]), None, 0.0)
    return x, KVCache(keys, values)


def _require_known(block: nnx.Module) -> None:
    if not supports_cache(type(block)):
        raise ValueError(f"the block is a {type(block).__name__}: a cache serves Block alone")
