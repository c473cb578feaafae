"""Which blocks of keys a block of queries has to visit, where masks leave it few.

A window over ids, segments and the causal mask hide most of a long row from most of its queries. A
block of keys in which no query of a block sees a key adds nothing to it, and is left out. The
blocks that are left are listed, in ascending order, so that a loop goes over them alone
(the layout of FlexAttention's BlockMask, Dong et al. 2024, arXiv 2412.05496).

Ids may stand in any order. Two blocks can only meet where one's ids reach the range of the other's,
seen from both sides: the range of a block at which ids start anew spans all of them, and would by
itself make that block visit the whole row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class BlockMask(NamedTuple):
    """The blocks that each block visits.

    blocks: int32 `[batch, blocks, blocks of the other side]`, the numbers of those to visit,
    ascending, and behind them, as often as there is room, the number of blocks. counts: int32
    `[batch, blocks]`, how many are to be visited.
    """

    blocks: jax.Array
    counts: jax.Array


def visited(
    length: int,
    block_q: int,
    block_k: int,
    *,
    ids: jax.Array | None,
    segment_ids: jax.Array | None,
    window: int | None,
    causal: bool,
) -> jax.Array:
    """Whether a block of queries may see anything of a block of keys.

    Args:
      length: of a row; the last block of each side may be cut by it.
      block_q, block_k: queries and keys of a block.
      ids: int32 `[batch, length]`, needed for a window; keys with 0 are seen by every query.
      segment_ids: int32 `[batch, length]`; None for one segment.
      window: differences of ids beyond which keys are masked; None for no window.
      causal: whether later keys are masked.

    Returns:
      bool `[batch or 1, blocks of queries, blocks of keys]`; never False where a query sees a key.
    """
    first_q, first_k = (jnp.arange(0, length, block, jnp.int32) for block in (block_q, block_k))
    last_q = first_q + block_q - 1
    met = jnp.full((1, len(first_q), len(first_k)), True)
    if causal:
        met &= last_q[:, None] >= first_k
    if segment_ids is not None:
        queries, keys = _blocks(segment_ids, block_q), _blocks(segment_ids, block_k)
        met &= _meet(queries, keys, jnp.full(keys.shape, True), 0)
    if window is not None:
        queries, keys = _blocks(ids, block_q), _blocks(ids, block_k)
        placed = keys > 0
        met &= _meet(queries, keys, placed, window) | ~placed.all(-1)[:, None]
    return met


def listed(visited: jax.Array) -> BlockMask:
    """The list of what is True in each row of bool `[batch, blocks, blocks of the other side]`."""
    others = visited.shape[-1]
    numbers = jnp.where(visited, jnp.arange(others, dtype=jnp.int32), others)
    return BlockMask(jnp.sort(numbers, axis=-1), visited.sum(-1, dtype=jnp.int32))


def _blocks(per_token: jax.Array, block: int) -> jax.Array:
    """`[batch, length]` as `[batch, blocks, block]`; the last token fills the last block up."""
    batch, length = per_token.shape
    filled = jnp.pad(per_token, [(0, 0), (0, -length % block)], mode="edge")
    return filled.reshape(batch, -1, block)


def _meet(queries: jax.Array, keys: jax.Array, counted: jax.Array, reach: int) -> jax.Array:
    """Whether two blocks may hold a query and a counted key that differ by `reach` at most.

    queries, keys: `[batch, blocks, block]`. counted: bool, as keys. Returns bool `[batch, blocks of
    queries, blocks of keys]`.
    """
    number = jnp.iinfo(keys.dtype)
    # A block in which no key counts has an empty range.
    low = jnp.where(counted, keys, number.max).min(-1)
    high = jnp.where(counted, keys, number.min).max(-1)
    of_keys = low[:, None, None, :], high[:, None, None, :]
    from_queries = _within(queries[..., None], *of_keys, reach).any(2)
    of_queries = queries.min(-1)[:, :, None, None], queries.max(-1)[:, :, None, None]
    from_keys = (_within(keys[:, None], *of_queries, reach) & counted[:, None]).any(-1)
    return from_queries & from_keys


def _within(numbers, low, high, reach: int):
    """Whether numbers are in a range, or at most `reach` away from it."""
    # Nothing is added to any: it may be the largest that there is.
    return (low - reach <= numbers) & (numbers - reach <= high)
