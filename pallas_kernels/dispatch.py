"""Attention with RoPE, dropout, learned biases and windows inside: `attention(q, k, v, ...)`."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import launch, long, reference, short
from pallas_kernels.tile import Extras, Options

IMPLEMENTATIONS = ("pallas", "xla")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    ids: jax.Array | None = None,
    bias_table: jax.Array | None = None,
    window: int | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    scale: float | None = None,
    causal: bool = True,
    implementation: str = "xla",
) -> jax.Array:
    """Attention of each token to the tokens before it in its row.

    The softmax is computed in float32. Gradients flow to q, k, v and `bias_table`.

    Args:
      q, k, v: `[batch, length, heads, head_dim]`, all float32, bfloat16 or float16; head_dim even.
      positions: int `[length]` or `[batch, length]`; q and k are turned by them (RoPE, base
        10,000). None turns nothing.
      segment_ids: int32 `[batch, length]`; a token sees its own segment only.
      ids: int32 `[batch, length]`, 0 for none; what `bias_table` and `window` speak of.
      bias_table: `[heads, 2 * clip + 2]`, added to the scores: entry `clip + difference` for a
        query's id minus a key's, clipped to plus and minus `clip`; the last where either is none.
      window: masks keys whose id differs from the query's by more than this; keys or queries
        without an id are never masked. With a `bias_table` it must be its `clip`.
      dropout_rate: share of the probabilities that is dropped where `dropout_key` is given.
      dropout_key: PRNG key; which probabilities it drops is the same in every implementation
        (`reference.dropout_bits`).
      scale: of the scores; None is `1 / sqrt(head_dim)`.
      causal: whether later keys are masked.
      implementation: "xla", plain `jnp`, or "pallas", the kernels; on a CPU those run in interpret
        mode, to be tested rather than used.

    Returns:
      `[batch, length, heads, head_dim]` in the dtype of q; zeros where a query sees no key.

    Raises:
      ValueError: shapes, dtypes or arguments that do not go together, naming them.
    """
    _check(q, k, v, positions, segment_ids, ids, bias_table, window, dropout_rate)
    length, heads, head_dim = q.shape[1:]
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation = {implementation!r}: one of {IMPLEMENTATIONS}")
    clip = window if bias_table is None else bias_table.shape[1] // 2 - 1
    scale = head_dim**-0.5 if scale is None else scale
    dropping = dropout_key is not None and dropout_rate > 0
    if implementation == "xla":
        return reference.attention(
            q,
            k,
            v,
            positions=positions,
            segment_ids=segment_ids,
            ids=ids,
            bias_table=bias_table,
            windowed=window is not None,
            clip=clip,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            scale=scale,
            causal=causal,
        )
    cos = sin = None
    if positions is not None:
        cos, sin = reference.rope_tables(jnp.atleast_2d(positions), head_dim)
    extras = Extras(
        cos=cos,
        sin=sin,
        ids=ids,
        segment_ids=segment_ids,
        bias=None if bias_table is None else bias_table.astype(jnp.float32),
        seed=reference.dropout_seed(dropout_key) if dropping else None,
    )
    options = Options(
        length=length,
        head_dim=head_dim,
        scale=scale,
        causal=causal,
        rate=dropout_rate if dropping else 0.0,
        clip=clip,
        windowed=window is not None,
    )
    return _attention(q, k, v, extras, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, extras: Extras, options: Options):
    return _forward(q, k, v, extras, options)[0]


def _forward(q, k, v, extras, options):
    if options.length <= launch.LONGEST_SHORT:
        out, lse = short.forward(q, k, v, extras, options, **_short_launch(options))
        # The backward pass of a whole row makes all else again.
        return out, (q, k, v, extras, None, lse)
    out, lse = long.forward(q, k, v, extras, options, **_long_launch(options, q))
    return out, (q, k, v, extras, out, lse)


def _backward(options, saved, d_out):
    q, k, v, extras, out, lse = saved
    d_out = d_out.astype(q.dtype)
    if options.length <= launch.LONGEST_SHORT:
        gradients = short.backward(q, k, v, extras, lse, d_out, options, **_short_launch(options))
    else:
        gradients = long.backward(
            q, k, v, extras, out, lse, d_out, options, **_long_launch(options, q)
        )
    *d_qkv, d_bias = gradients
    return *d_qkv, Extras(bias=d_bias)


_attention.defvjp(_forward, _backward)


def _short_launch(options: Options) -> dict:
    return launch.short(short.rows_held(options.length)) | {"interpret": _interpret()}


def _long_launch(options: Options, q: jax.Array) -> dict:
    return launch.long(options, q.dtype.itemsize) | {"interpret": _interpret()}


def _interpret() -> bool:
    return jax.default_backend() == "cpu"


def _check(q, k, v, positions, segment_ids, ids, bias_table, window, dropout_rate) -> None:
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q, k, v are {q.shape}, {k.shape}, {v.shape}: expected one shape"
            " [batch, length, heads, head_dim]"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (
        jnp.float32,
        jnp.bfloat16,
        jnp.float16,
    ):
        raise ValueError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: expected one of float32, bfloat16,"
            " float16 for all"
        )
    batch, length, heads, head_dim = q.shape
    if head_dim % 2:
        raise ValueError(f"head_dim = {head_dim}: must be even")
    if positions is not None and positions.shape not in ((length,), (1, length), (batch, length)):
        raise ValueError(f"positions are {positions.shape}: expected [{length}] or [batch, length]")
    for name, values in (("segment_ids", segment_ids), ("ids", ids)):
        if values is not None and values.shape != (batch, length):
            raise ValueError(f"{name} are {values.shape}: expected {(batch, length)}")
    if (bias_table is not None or window is not None) and ids is None:
        raise ValueError("bias_table and window need ids")
    if bias_table is not None:
        if bias_table.shape[0] != heads or bias_table.shape[1] % 2 or bias_table.shape[1] < 2:
            raise ValueError(f"bias_table is {bias_table.shape}: expected [{heads}, 2 * clip + 2]")
        if window is not None and window != bias_table.shape[1] // 2 - 1:
            raise ValueError(
                f"window = {window}: must be the clip of bias_table, {bias_table.shape[1] // 2 - 1}"
            )
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate = {dropout_rate}: must be at least 0 and below 1")
