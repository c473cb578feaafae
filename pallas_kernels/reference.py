"""The plain `jnp` truth: what every kernel here computes, written to be read and run anywhere."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import shards

ROPE_BASE = 10_000.0


def rope_tables(positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angles of rotary position embedding.

    Pair i of channels turns by `positions * ROPE_BASE ** (-2 i / head_dim)` (Su et al. 2021,
    RoFormer, eq. 34).

    Args:
      positions: int `[..., length]`.
      head_dim: even.

    Returns:
      Two float32 arrays `[..., length, head_dim / 2]`.
    """
    half = head_dim // 2
    frequency = ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding over the whole head, in halves.

    Channel i < head_dim / 2 and channel i + head_dim / 2 make a pair.

    Args:
      x: `[batch, length, heads, head_dim]`, head_dim even.
      positions: int `[length]` or `[batch, length]`.

    Returns:
      As x, computed in float32.
    """
    return turn(x, *(table[..., None, :] for table in rope_tables(positions, x.shape[-1])))


def turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The two halves of x's last axis as pairs, each turned by its angle, in float32."""
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1)
    return turned.astype(x.dtype)


def mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which each bit of x moves about half of the others.

    Multiply and xor-shift, with the constants found by Wellons' search (hash-prospector, 2018,
    "lowbias32").
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def dropout_bits(seed0, seed1, row, counter) -> jax.Array:
    """The uint32 that decides about one probability.

    `mix(mix(counter + mix(row ^ seed0)) ^ mix(row + seed1))`: a function of where the probability
    stands, so that no mask is ever stored.

    Args:
      seed0, seed1: the uint32 words of `dropout_seed`.
      row: int32, `batch index * heads + head`.
      counter: int32, `query index * length + key index`.
    """
    row, counter = row.astype(jnp.uint32), counter.astype(jnp.uint32)
    return mix(mix(counter + mix(row ^ seed0)) ^ mix(row + seed1))


def dropout_threshold(rate: float) -> int:
    """Probabilities whose bits are below this are dropped: `rate * 2^32`, rounded."""
    return min(round(rate * 2**32), 2**32 - 1)


def dropout_seed(key: jax.Array) -> jax.Array:
    """The two uint32 words that a PRNG key gives to `dropout_bits`: its last two.

    No generator runs for them: `dropout_bits` mixes what keys that were split off one another have
    in common.
    """
    return jax.random.key_data(key)[..., -2:]


def dropout_words(key: jax.Array, rows: int) -> jax.Array:
    """What a kernel is told of dropout: uint32 `[2]`, the words of `dropout_seed`.

    Where rows are split over devices `[3]`: then also the number of the first of these `rows`, as
    `dropout_bits` counts them, among all.

    Raises:
      ValueError: they are split over a mesh axis that is not named `data` (`shards`).
    """
    shards.require_counted("dropout_key")
    seed = dropout_seed(key)
    if not shards.is_split():
        return seed
    return jnp.append(seed, shards.first_row(rows).astype(jnp.uint32))


def dropout_bits_of(words, row, counter) -> jax.Array:
    """`dropout_bits` inside a kernel that was told `words`; `row` counts its own rows."""
    if words.shape[0] == 3:
        row += words[2].astype(jnp.int32)
    return dropout_bits(words[0], words[1], row, counter)


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Sets a share `rate` of `[..., channels]` to zero and scales the rest up.

    `dropout_bits` decides, with the index of the row, counted over all leading axes (and over all
    devices that rows are split over), and of the channel.
    """
    return dropped(x, rate, dropout_words(key, math.prod(x.shape[:-1])))


def dropped(x: jax.Array, rate: float, words: jax.Array | None) -> jax.Array:
    """`dropout` told its `dropout_words`; the identity without them."""
    if words is None:
        return x
    rows = jnp.arange(math.prod(x.shape[:-1])).reshape(*x.shape[:-1], 1)
    bits = dropout_bits_of(words, rows, jnp.arange(x.shape[-1]))
    kept = bits >= jnp.uint32(dropout_threshold(rate))
    return jnp.where(kept, x / (1 - rate), 0)


def layer_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """LayerNorm over the last axis, without a bias (Ba et al. 2016, Layer Normalization, eq. 4)."""
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon) * scale


def score(
    x: jax.Array,
    scale: jax.Array,
    table: jax.Array,
    wanted: jax.Array,
    weights: jax.Array,
    epsilon: float,
) -> jax.Array:
    """The weighted sum of the cross-entropies of `wanted` under the logits of `x`."""
    normed = layer_norm(x, scale, epsilon).astype(table.dtype)
    logits = jnp.einsum("...d,vd->...v", normed, table, preferred_element_type=jnp.float32)
    right = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
    entropies = jax.nn.logsumexp(logits, axis=-1) - right
    return (entropies * weights).sum()


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    dropout_rate: float,
    words: jax.Array | None,
    **told,
) -> jax.Array:
    """`pallas_kernels.attention` in plain `jnp`, softmax in float32; see its arguments.

    words: `dropout_words` of all heads' rows, None without dropout. Ids may also be float32: biases
    are then interpolated between the entries of the table, and the window ends half way to the next
    difference.
    """
    probabilities, lost = _attended(q, k, v, **told)
    batch, length, heads, _ = q.shape
    if words is not None:
        place = jnp.arange(length)
        row = jnp.arange(batch * heads).reshape(batch, heads, 1, 1)
        bits = dropout_bits_of(words, row, place[:, None] * length + place)
        kept = bits >= jnp.uint32(dropout_threshold(dropout_rate))
        probabilities = jnp.where(kept, probabilities / (1 - dropout_rate), 0)
    return _mixed(probabilities, v, lost)


def attention_weights(q: jax.Array, k: jax.Array, **told) -> jax.Array:
    """What each query takes of each key's value, before dropout; told as `attention` is.

    Returns:
      float32 `[batch, heads, length, length]`, keys last.
    """
    probabilities, lost = _attended(q, k, None, **told)
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
        q, k = rotate(q, positions), rotate(k, positions)
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


def newest_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    at: jax.Array,
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
        what stands behind `at` is not looked at.
      at: int32 `[batch]`, the token's place in its row.
      ids: int32 `[batch, length]`, of the row's tokens.
      bias_table, window, clip, scale: as `attention` takes them.

    Returns:
      As q.
    """
    counts = jnp.arange(keys.shape[1]) <= at[:, None, None, None]
    pair = None if ids is None else (jnp.take_along_axis(ids, at[:, None], axis=1), ids)
    probabilities, lost = _weights(
        q[:, None], keys, values, counts, pair,
        bias_table=bias_table, window=window, clip=clip, scale=scale,
    )  # fmt: skip
    return _mixed(probabilities, values, lost)[:, 0]


def _mixed(probabilities, v, lost):
    """What is taken of values; NaN for queries that are lost, and no gradient from there."""
    mixed = jnp.einsum("bhqk,bkhd->bqhd", probabilities.astype(v.dtype), _finite(v))
    return jnp.where(jnp.swapaxes(lost, 1, 2)[..., None], jnp.nan, mixed)


def _finite(x):
    """With 0 for NaN and infinity: a weight of 0 times one of these would not be 0."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _weights(q, k, v, counts, ids, *, bias_table, window, clip, scale):
    """Softmax of the scores of queries and keys, turned already: `[batch, heads, queries, keys]`.

    counts: bool, broadcastable to it. ids: of queries and of keys, or None. v: values, None where
    nothing is taken of them.

    Returns also which queries are lost, `[batch, heads, queries]`: not finite themselves, or seeing
    a key or value that is not. To all others these are nothing.
    """
    finite = _finite(q), _finite(k)
    scores = scale * jnp.einsum("bqhd,bkhd->bhqk", *finite, preferred_element_type=jnp.float32)
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
    # A query that sees no key at all gets zeros.
    return jax.nn.softmax(jnp.where(counts, scores, -1e30)) * counts, lost


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
