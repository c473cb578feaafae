"""What one program computes on one tile, shared by every attention kernel here.

A tile has some rows of queries and some of keys. Heads are read as two halves, the pairs that RoPE
turns, so that no rotated query or key is ever written to memory. Sizes on the chip are powers of
two; rows and channels beyond the real ones are masked. Scores are kept in units of log 2, since
the chip's exponential has base 2.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dropout import dropout_bits_of, dropout_threshold
from pallas_kernels.ops.instructions import (
    LOG2_E,
    dot,
    finite,
    made_in_place,
    multiply_add,
    poisoned,
)
from pallas_kernels.padding import MASKED, padded_head

# What the largest score of a row is at least: finite, so that a row with no key makes no NaN, and
# so far from `MASKED` that its weights, 2 to their difference, are 0.
LEAST = -1e29


@dataclass(frozen=True)
class Options:
    """What is fixed when a kernel is compiled.

    length, head_dim: the real sizes. scale: of the scores. causal: whether keys after the query are
    masked. rate: of dropout, 0 for none. clip: of the difference of ids, for bias and window; None
    where there are no ids. windowed: whether keys beyond the clip are masked. target: the chip
    whose tiles are taken. interpret: whether the kernels are interpreted, not compiled.
    """

    length: int
    head_dim: int
    scale: float
    causal: bool
    rate: float
    clip: int | None
    windowed: bool
    target: str
    interpret: bool

    @property
    def half(self) -> int:
        return self.head_dim // 2

    @property
    def padded_half(self) -> int:
        return self.padded_head // 2

    @property
    def padded_head(self) -> int:
        return padded_head(self.head_dim)


def table_dtype(dtype) -> jnp.dtype:
    """Of RoPE's tables for q and k of `dtype`: beside 16 bits, 11 bits of a cosine are enough, and
    half the bytes."""
    return jnp.dtype(jnp.float32 if jnp.dtype(dtype) == jnp.float32 else jnp.float16)


class AttentionInputs(NamedTuple):
    """Inputs beside q, k and v; None for what a call does not use.

    cos, sin: `[1 or batch, length, head_dim / 2]`, float32 or, for 16-bit q and k, float16. ids,
    segment_ids: int32 `[batch, length]`. bias: float32 `[heads, 2 * clip + 2]`; a program reads its
    head's from a ref, or from a flat one as `HeadView`. seed: as `dropout.dropout_words`.
    """

    cos: Any = None
    sin: Any = None
    ids: Any = None
    segment_ids: Any = None
    bias: Any = None
    seed: Any = None


class QKBlock(NamedTuple):
    """Rows of queries or of keys: their two halves, turned, and what masks and biases need.

    Queries are scaled by `query_scale`. lost: of keys, 0 or NaN, which is added to scores.
    """

    low: jax.Array
    high: jax.Array
    index: jax.Array
    ids: jax.Array | None
    segment_ids: jax.Array | None
    lost: jax.Array | None = None


class HeadView(NamedTuple):
    """A ref from one of its columns on: one head of q, k and v, or of biases, side by side."""

    ref: Any
    first: Any

    @property
    def dtype(self):
        return self.ref.dtype


def _part(ref, start, rows: int, column: int, columns: int):
    first = 0
    if isinstance(ref, HeadView):
        ref, first = ref
    return ref.at[pl.ds(start, rows), pl.ds(first + column, columns)]


def load_rows(
    ref,
    start,
    rows: int,
    column: int,
    columns: int,
    real: int,
    options: Options,
    eviction_policy=None,
    wanted=None,
):
    """`[rows, columns]` from row `start` and column `column`, zero beyond the real ones, and in
    rows that are not `wanted`."""
    inside = _inside(start, rows, columns, real, options)
    if wanted is not None:
        wanted = jnp.broadcast_to(wanted[:, None], (rows, columns))
        inside = wanted if inside is None else inside & wanted
    source = _part(ref, start, rows, column, columns)
    other = None if inside is None else 0
    return plgpu.load(source, mask=inside, other=other, eviction_policy=eviction_policy)


def store_rows(ref, start, value, column: int, real: int, options: Options) -> None:
    """The reverse of `load_rows`, in the dtype of `ref`."""
    rows, columns = value.shape
    target = _part(ref, start, rows, column, columns)
    inside = _inside(start, rows, columns, real, options)
    plgpu.store(target, value.astype(ref.dtype), mask=inside)


def _inside(start, rows: int, columns: int, real: int, options: Options):
    """Mask of the real part of a tile; None where the tile is known to have nothing else."""
    inside = None
    # Tiles start at multiples of their rows.
    if options.length % rows:
        inside = (start + jnp.arange(rows) < options.length)[:, None]
    if columns != real:
        real_columns = (jnp.arange(columns) < real)[None, :]
        inside = real_columns if inside is None else inside & real_columns
    return None if inside is None else jnp.broadcast_to(inside, (rows, columns))


def load_heads(ref, start, rows: int, options: Options):
    """`[rows, padded_head]` of v or of the output's gradient, zero beyond the real ones."""
    return load_rows(ref, start, rows, 0, options.padded_head, options.head_dim, options)


# A weight of 0 times NaN is NaN: what masks hide from a query is made finite before the product.
# Numbers of 16 bits are changed in the registers, two at a time. Those of 32 bits, multiplied
# without tensor cores, would fill the registers if they were changed: rows that are to be nothing
# are not loaded.


def load_values(ref, key: QKBlock, start, options: Options):
    """`load_heads` of v, with zeros for what is not finite (or for its row); and the key, by which
    scores of queries that see it are NaN."""
    rows, half, padded = len(key.index), options.half, options.padded_half
    low = load_rows(ref, start, rows, 0, padded, half, options)
    high = load_rows(ref, start, rows, half, padded, half, options)
    whole = start, rows, 0, options.padded_head, options.head_dim, options
    if ref.dtype == jnp.float32:
        lost = _lost(low, high)
        return load_rows(ref, *whole, wanted=lost == 0), key._replace(lost=lost)
    # Loaded twice, once in the layout of the key: to sum up each row would take longer.
    low, high = (
        poisoned(half, by, options.interpret) for half, by in ((key.low, low), (key.high, high))
    )
    return finite(load_rows(ref, *whole), options.interpret), key._replace(low=low, high=high)


def _lost(low, high) -> jax.Array:
    """Per row 0, or NaN where something is not finite."""
    return (low * 0 + high * 0).sum(axis=1)


def query_scale(options: Options) -> float:
    """By what queries are multiplied, so that scores come out scaled and in units of log 2."""
    return options.scale * LOG2_E


def load_qk(
    ref,
    inputs: AttentionInputs,
    start,
    rows: int,
    options: Options,
    scale: float | None = None,
    *,
    only_finite: bool = False,
) -> QKBlock:
    """Rows of q or k from `[length, head_dim]`, turned by RoPE where there are tables for it, and
    scaled; with `only_finite` zeros for what is not finite (or for its row)."""
    half, padded = options.half, options.padded_half
    low = load_rows(ref, start, rows, 0, padded, half, options)
    high = load_rows(ref, start, rows, half, padded, half, options)
    if only_finite and ref.dtype == jnp.float32:
        wanted = _lost(low, high) == 0
        low = load_rows(ref, start, rows, 0, padded, half, options, wanted=wanted)
        high = load_rows(ref, start, rows, half, padded, half, options, wanted=wanted)
    elif only_finite:
        low, high = finite(low, options.interpret), finite(high, options.interpret)
    dtype = low.dtype
    if inputs.cos is not None:
        cos, sin = _load_tables(inputs, start, rows, options)
        sin = made_in_place(sin)
        low, high = rotate(low, high, cos, sin, options)
    if scale is not None:
        low, high = low.astype(jnp.float32) * scale, high.astype(jnp.float32) * scale
    index = start + jnp.arange(rows)
    per_token = lambda source: (  # noqa: E731
        None
        if source is None
        else plgpu.load(source.at[pl.ds(start, rows)], mask=index < options.length, other=0)
    )
    return QKBlock(
        low.astype(dtype),
        high.astype(dtype),
        index,
        per_token(inputs.ids),
        per_token(inputs.segment_ids),
    )


def _load_tables(inputs: AttentionInputs, start, rows: int, options: Options, eviction_policy=None):
    half, padded = options.half, options.padded_half
    return (
        load_rows(inputs.cos, start, rows, 0, padded, half, options, eviction_policy),
        load_rows(inputs.sin, start, rows, 0, padded, half, options, eviction_policy),
    )


def store_rotated_back(
    ref, inputs: AttentionInputs, start, d_low, d_high, scale, options: Options
) -> None:
    """Stores the gradient of q or k: scaled, and turned back by the inverse of RoPE."""
    d_low, d_high = d_low * scale, d_high * scale
    if inputs.cos is not None:
        # Loaded once more rather than held in registers all the time; the compiler would merge two
        # loads that are alike.
        cos, sin = _load_tables(inputs, start, d_low.shape[0], options, "evict_last")
        d_low, d_high = rotate(d_low, d_high, cos, -sin, options)
    store_rows(ref, start, d_low, 0, options.half, options)
    store_rows(ref, start, d_high, options.half, options.half, options)


def rotate(low, high, cos, sin, options: Options):
    """RoPE on two halves, in float32; with `-sin` its inverse, which is also its transpose."""
    low, high, cos, sin = (x.astype(jnp.float32) for x in (low, high, cos, sin))
    return (
        multiply_add(low, cos, -(high * sin), options.interpret),
        multiply_add(low, sin, high * cos, options.interpret),
    )


def pair(of_query, of_key, keys_first: bool):
    """Two vectors, one value a query and one a key, that broadcast to a tile."""
    if keys_first:
        return of_query[None, :], of_key[:, None]
    return of_query[:, None], of_key[None, :]


def bias_index(query: QKBlock, key: QKBlock, clip: int, keys_first=False) -> jax.Array:
    """Which entry of the bias table each pair takes: the clipped difference, or the last."""
    query_id, key_id = pair(query.ids, key.ids, keys_first)
    last = 2 * clip + 1
    difference = jnp.clip(query_id - key_id, -clip, clip) + clip
    return last + _placed(key_id) * (difference - last)


def _placed(key_id: jax.Array) -> jax.Array:
    """1 where a key has an id, else 0. Counted, not compared: where Triton brings a tile of truth
    values from one layout to another through shared memory, it fails to compile."""
    return jnp.minimum(key_id, 1)


def scores(
    query: QKBlock,
    key: QKBlock,
    inputs: AttentionInputs,
    options: Options,
    *,
    masked: bool,
    keys_first: bool = False,
    product=dot,
):
    """Biased scores in units of log 2: `[queries, keys]`, or `[keys, queries]`.

    With `masked`, scores that do not count are `MASKED`; without, all are known to count. `product`
    multiplies as `dot` does.
    """
    rows, columns = (key, query) if keys_first else (query, key)
    raw = product(rows.low, columns.low, transpose_b=True)
    raw += product(rows.high, columns.high, transpose_b=True)
    if key.lost is not None:
        raw += key.lost[None, :]
    if inputs.bias is not None:
        ref, first = inputs.bias if isinstance(inputs.bias, HeadView) else (inputs.bias, 0)
        entry = bias_index(query, key, options.clip, keys_first)
        raw += LOG2_E * plgpu.load(ref.at[first + entry])
    if not masked:
        return raw
    query_index, key_index = pair(query.index, key.index, keys_first)
    # Under the causal mask no query sees keys beyond the length anyway.
    counts = (query_index >= key_index) if options.causal else (key_index < options.length)
    if query.segment_ids is not None:
        query_segment, key_segment = pair(query.segment_ids, key.segment_ids, keys_first)
        counts &= query_segment == key_segment
    if options.windowed:
        query_id, key_id = pair(query.ids, key.ids, keys_first)
        beyond = jnp.maximum(jnp.abs(query_id - key_id) - options.clip, 0)
        # Chosen, not added: NaN of a key that is too far stays NaN whatever is added to it.
        counts &= beyond * _placed(key_id) == 0
    return jnp.where(counts, raw, MASKED)


def d_weights(d_out, value, weights, options: Options):
    """Gradients of weights, `[queries, keys]`: finite where a weight is 0, whatever the value."""
    if value.dtype == jnp.float32:
        return jnp.where(weights > 0, dot(d_out, value, transpose_b=True), 0.0)
    return dot(d_out, finite(value, options.interpret), transpose_b=True)


def dropout_scale(
    query: QKBlock, key: QKBlock, inputs: AttentionInputs, row, options, *, keys_first=False
):
    """0 where a probability is dropped, `1 / (1 - rate)` where it is kept; None without dropout."""
    if options.rate == 0:
        return None
    query_index, key_index = pair(query.index, key.index, keys_first)
    counter = query_index * options.length + key_index
    bits = dropout_bits_of(inputs.seed, row, counter)
    kept = bits >= jnp.uint32(dropout_threshold(options.rate))
    return jnp.where(kept, 1 / (1 - options.rate), 0.0)


def bias_sums(d_scores, query: QKBlock, key: QKBlock, entries: int, options: Options):
    """What a tile `[queries, keys]` adds to the gradient of each entry of the bias table.

    `entries` is their number, padded to a power of two.
    """
    place = jnp.arange(entries)
    index = bias_index(query, key, options.clip)

    def add(entry, sums):
        return jnp.where(place == entry, jnp.where(index == entry, d_scores, 0.0).sum(), sums)

    return jax.lax.fori_loop(0, 2 * options.clip + 2, add, jnp.zeros(entries, jnp.float32))


def store_bias_sums(ref, sums, options: Options) -> None:
    """Stores what `bias_sums` gave, without its padding."""
    plgpu.store(ref.at[:], sums, mask=jnp.arange(len(sums)) < 2 * options.clip + 2)
