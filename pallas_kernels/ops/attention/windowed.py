"""Attention over a window of ids in plain `jnp`, by the blocks that the window reaches.

The numbers of `reference`, up to rounding, for time and memory that grow with the row's length
instead of its square: a block of queries visits the blocks of keys that `block_mask` lists, and its
softmax is kept up to date as they come (online softmax; Milakov & Gimelshein 2018, arXiv
1805.02867). Derivatives are those of the reference.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import targets
from pallas_kernels.derivatives import differentiable
from pallas_kernels.ops.attention import block_mask, reference
from pallas_kernels.ops.attention.rope import apply_rope

# Queries and keys of a block. Of 32, 64 and 128 the fastest on two CPU cores at 1,024 tokens.
BLOCK = 64
# The shortest row for which it is taken. Of a CPU's time it needed as much as the reference at 8
# rows of 128 tokens, less than half at 64 rows, a quarter at 256 tokens, a tenth at 1,024.
SHORTEST = 128
# Up to this clip biases are chosen, beyond it looked up: at 15 either took as long.
LARGEST_CHOSEN = 15
# Below all scores, and above `MASKED` by so much that a masked key's weight is 0.
LEAST = -1e29


class WindowedInputs(NamedTuple):
    """What has no gradient here: as `pallas_kernels.attention` takes them, ids as int32."""

    ids: jax.Array
    positions: jax.Array | None
    segment_ids: jax.Array | None


class WindowedOptions(NamedTuple):
    """What is fixed: as `reference.attention` takes it."""

    window: int
    clip: int
    scale: float
    causal: bool


def is_faster(length: int, ids: jax.Array | None, window: int | jax.Array | None) -> bool:
    """Whether to take it for rows of `length`, in place of the reference: on a CPU, for long rows
    with a window over whole ids. A GPU would wait for each of its many small steps."""
    if window is None or targets.on_gpu():
        return False
    return length >= SHORTEST and jnp.issubdtype(ids.dtype, jnp.integer)


def _run(given, inputs: WindowedInputs, options: WindowedOptions):
    q, k, v, bias_table = given
    ids, positions, segment_ids = inputs
    if positions is not None:
        q, k = apply_rope(q, positions), apply_rope(k, positions)
    batch, length, heads, head_dim = q.shape
    visited = block_mask.visited(
        length, BLOCK, BLOCK,
        ids=ids, segment_ids=segment_ids, window=options.window, causal=options.causal,
    )  # fmt: skip
    blocks, counts = block_mask.listed(visited)
    rows = {"q": q, "k": k, "v": v, "ids": ids, "segment_ids": segment_ids}
    rows = jax.tree.map(_by_block, rows)
    place = jnp.arange(BLOCK, dtype=jnp.int32)
    chosen = bias_table is not None and options.clip <= LARGEST_CHOSEN

    def attended(block):
        """The output of one block of queries, `[batch, BLOCK, heads, head_dim]`."""
        query = jax.tree.map(lambda x: x[:, block], rows)

        def step(i, carry):
            out, largest, total, lost = carry
            # A sequence with fewer blocks to visit waits for the others.
            number = blocks[:, block, i]
            key = jax.tree.map(lambda x: jax.vmap(_taken)(x, number), rows)
            index = (number[:, None] * BLOCK + place)[:, None]
            seen = (i < counts[:, block])[:, None, None] & (index < length)
            if options.causal:
                seen &= (block * BLOCK + place)[:, None] >= index
            if segment_ids is not None:
                seen &= query["segment_ids"][:, :, None] == key["segment_ids"][:, None]
            scores, seen, lost_here = reference.masked_scores(
                query["q"], key["k"], key["v"], seen[:, None], (query["ids"], key["ids"]),
                bias_table=None if chosen else bias_table, window=options.window, clip=options.clip,
                scale=options.scale,
            )  # fmt: skip
            if chosen:
                scores += _biases(bias_table, query["ids"], key["ids"], options.clip)
            grown = jnp.maximum(largest, scores.max(-1))
            shrink = jnp.exp(largest - grown)
            weights = jnp.exp(scores - grown[..., None])
            total = total * shrink + weights.sum(-1)
            mixed = jnp.einsum(
                "bhqk,bkhd->bhqd", weights.astype(v.dtype), reference.finite(key["v"]),
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            return out * shrink[..., None] + mixed, grown, total, lost | lost_here

        per_query = (batch, heads, BLOCK)
        carry = (
            jnp.zeros((*per_query, head_dim), jnp.float32),
            jnp.full(per_query, LEAST, jnp.float32),
            jnp.zeros(per_query, jnp.float32),
            jnp.full(per_query, False),
        )
        steps = counts[:, block].max()
        out, _, total, lost = jax.lax.fori_loop(0, steps, step, carry)
        out = jnp.swapaxes(out / jnp.where(total == 0, 1, total)[..., None], 1, 2)
        return reference.without_lost(out.astype(q.dtype), lost)

    out = jax.lax.map(attended, jnp.arange(blocks.shape[1], dtype=jnp.int32))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, head_dim)[:, :length]


def _plain(given, inputs: WindowedInputs, options: WindowedOptions):
    q, k, v, bias_table = given
    return reference.attention(
        q, k, v, bias_table=bias_table, dropout_rate=0.0, words=None,
        **inputs._asdict(), **options._asdict(),
    )  # fmt: skip


def _biases(bias_table, query_ids, key_ids, clip: int):
    """`[batch, heads, BLOCK, BLOCK]`, of pairs within the window; of others it does not matter.

    Chosen entry by entry: a CPU looks numbers up one at a time, which took as long as all else.
    """
    difference = query_ids[:, None, :, None] - key_ids[:, None, None, :]
    entry = jnp.where(key_ids[:, None, None, :] > 0, difference + clip, 2 * clip + 1)
    table = bias_table.astype(jnp.float32)[:, :, None, None]
    return sum(jnp.where(entry == number, table[:, number], 0) for number in range(2 * clip + 2))


def _by_block(x):
    """`[batch, length, ...]` as `[batch, blocks, BLOCK, ...]`, filled up with zeros."""
    filled = jnp.pad(x, [(0, 0), (0, -x.shape[1] % BLOCK), *[(0, 0)] * (x.ndim - 2)])
    return filled.reshape(x.shape[0], -1, BLOCK, *x.shape[2:])


def _taken(blocks, number):
    """One of `[blocks, ...]`, the last for a number beyond them."""
    return jax.lax.dynamic_index_in_dim(blocks, number, keepdims=False)


# Of `((q, k, v, bias_table), inputs, options)`; dropout apart, what `reference.attention` gives.
attention = differentiable(_run, _plain)
