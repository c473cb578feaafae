"""Attention in plain `jnp`: what its kernels must equal, written to be read and run anywhere."""

import jax
import jax.numpy as jnp

from pallas_kernels.dropout import dropout_bits_of, dropout_threshold
from pallas_kernels.ops.attention.rope import apply_rope
from pallas_kernels.padding import MASKED


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    dropout_rate: float,
    words: jax.Array | None,
    **options,
) -> jax.Array:
    """`pallas_kernels.attention` in plain `jnp`, softmax in float32; see its arguments.

    words: `dropout_words` of all heads' rows, None without dropout. Ids may also be float32: biases
    are then interpolated between the entries of the table, and the window ends half way to the next
    difference.
    """
    probabilities, lost = _attended(q, k, v, **options)
    batch, length, heads, _ = q.shape
    if words is not None:
        place = jnp.arange(length)
        row = jnp.arange(batch * heads).reshape(batch, heads, 1, 1)
        bits = dropout_bits_of(words, row, place[:, None] * length + place)
        kept = bits >= jnp.uint32(dropout_threshold(dropout_rate))
        probabilities = jnp.where(kept, probabilities / (1 - dropout_rate), 0)
    return _mixed(probabilities, v, lost)


def attention_weights(q: jax.Array, k: jax.Array, **options) -> jax.Array:
    """What each query takes of each key's value, before dropout; arguments as of `attention`.

    Returns:
      float32 `[batch, heads, length, length]`, keys last.
    """
    probabilities, lost = _attended(q, k, None, **options)
    return jnp.where(lost[..., None], jnp.nan, probabilities)


def _attended(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    *,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    ids: jax.Array | None,
    bias_table: jax.Array | None,
    window: int | jax.Array | None,
    clip: int | None,
    scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """As `_weights`, of whole rows."""
    if positions is not None:
        q, k = apply_rope(q, positions), apply_rope(k, positions)
    length = q.shape[1]
    place = jnp.arange(length)
    counts = (place[:, None] >= place) if causal else jnp.ones((length, length), bool)
    counts = counts[None, None]
    if segment_ids is not None:
        counts &= segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    pair = None if ids is None else (ids, ids)
    return _weights(
        q, k, v, counts, pair, bias_table=bias_table, window=window, clip=clip, scale=scale
    )


def decode_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    cache_position: jax.Array,
    *,
    ids: jax.Array | None,
    bias_table: jax.Array | None,
    window: int | None,
    clip: int | None,
    scale: float,
) -> jax.Array:
    """Attention of one token of each row to itself and the tokens before it.

    Args:
      q: `[batch, heads, head_dim]`, turned already.
      keys, values: `[batch, length, heads, head_dim]` of the row's tokens, keys turned already;
        what stands behind `cache_position` is not looked at.
      cache_position: int32 `[batch]`, the token's place in its row.
      ids: int32 `[batch, length]`, of the row's tokens.
      bias_table, window, clip, scale: as `attention` takes them.

    Returns:
      As q.
    """
    counts = jnp.arange(keys.shape[1]) <= cache_position[:, None, None, None]
    pair = None if ids is None else (jnp.take_along_axis(ids, cache_position[:, None], axis=1), ids)
    probabilities, lost = _weights(
        q[:, None], keys, values, counts, pair,
        bias_table=bias_table, window=window, clip=clip, scale=scale,
    )  # fmt: skip
    return _mixed(probabilities, values, lost)[:, 0]


def _mixed(probabilities, v, lost):
    """What is taken of values; NaN for queries that are lost, and no gradient from there."""
    mixed = jnp.einsum("bhqk,bkhd->bqhd", probabilities.astype(v.dtype), finite(v))
    return without_lost(mixed, lost)


def without_lost(mixed, lost):
    """`[batch, queries, heads, head_dim]`, NaN for queries `[batch, heads, queries]` that are."""
    return jnp.where(jnp.swapaxes(lost, 1, 2)[..., None], jnp.nan, mixed)


def finite(x):
    """With 0 for NaN and infinity: a weight of 0 times one of these would not be 0."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _weights(q, k, v, counts, ids, **options):
    """Softmax of the scores of queries and keys, turned already: `[batch, heads, queries, keys]`.

    Args: as of `masked_scores`. Returns also which queries are lost, as that does.
    """
    scores, counts, lost = masked_scores(q, k, v, counts, ids, **options)
    # A query that sees no key at all gets zeros.
    return jax.nn.softmax(scores) * counts, lost


def masked_scores(q, k, v, counts, ids, *, bias_table, window, clip, scale):
    """Scores of queries and keys, turned already: float32 `[batch, heads, queries, keys]`, `MASKED`
    where a query does not see a key.

    counts: bool, broadcastable to it. ids: of queries and of keys, or None. v: values, None where
    nothing is taken of them.

    Returns also `counts` with the window's mask, and which queries are lost, `[batch, heads,
    queries]`: not finite themselves, or seeing a key or value that is not. To all others these are
    nothing.
    """
    scores = scale * jnp.einsum(
        "bqhd,bkhd->bhqk", finite(q), finite(k), preferred_element_type=jnp.float32
    )
    if ids is not None:
        query, key = ids[0][:, None, :, None], ids[1][:, None, None, :]
        if bias_table is not None:
            table = bias_table.astype(jnp.float32)
            scores += _biases(table, (query - key)[:, 0], key[:, 0], clip)
        if window is not None:
            counts &= (key < 0.5) | (jnp.abs(query - key) <= window + 0.5)
    broken = lambda x: jnp.swapaxes(~jnp.isfinite(x).all(-1), 1, 2)  # noqa: E731
    of_key = broken(k) if v is None else broken(k) | broken(v)
    lost = broken(q) | (counts & of_key[:, :, None]).any(-1)
    return jnp.where(counts, scores, MASKED), counts, lost


def _biases(table, difference, key, clip: int) -> jax.Array:
    """`[batch, heads, length, length]` of differences of ids `[batch, length, length]` and the ids
    of the keys, which broadcast to them."""
    place = jnp.clip(difference, -clip, clip) + clip
    if jnp.issubdtype(difference.dtype, jnp.floating):
        # Each entry under a hat as wide as its neighbours are away: linear between them.
        hats = (jax.nn.relu(1 - jnp.abs(place - entry)) for entry in range(2 * clip + 1))
        bias = sum(table[:, entry, None, None, None] * hat for entry, hat in enumerate(hats))
        bias = jnp.where(key >= 0.5, bias, table[:, -1, None, None, None])
    else:
        bias = table[:, jnp.where(key > 0, place, 2 * clip + 1)]
    return jnp.moveaxis(bias, 0, 1)
