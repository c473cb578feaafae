"""Attention for short rows: a whole row of one head in one program, forward and backward.

Nothing is streamed: queries, keys, scores and probabilities of the row stay on the chip, so the
forward pass reads q, k and v once and writes the output once; the backward pass makes the
probabilities again from the log-sum-exp and writes each gradient once.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import tile
from pallas_kernels.tile import MASKED, NARROWEST, Extras, Options


def forward(q, k, v, extras: Extras, options: Options, *, num_warps: int, interpret: bool):
    """Output `[batch, length, heads, head_dim]` and log-sum-exp, float32 `[batch, heads, length]`.

    The log-sum-exp is in units of log 2.
    """
    batch, length, heads, _ = q.shape
    rows = rows_held(length)
    return pl.pallas_call(
        lambda *refs: _forward_kernel(*refs, options=options, heads=heads),
        grid=(heads, batch),
        in_specs=[tile.heads_spec(rows, options)] * 3 + [tile.extras_specs(rows, extras, options)],
        out_specs=[tile.heads_spec(rows, options), tile.scalars_spec(rows)],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="short_attention_forward",
    )(q, k, v, extras)


def backward(q, k, v, extras, lse, d_out, options: Options, *, num_warps: int, interpret: bool):
    """Gradients of q, k and v, and of the bias table `[heads, entries]` or None."""
    batch, length, heads, _ = q.shape
    rows = rows_held(length)
    entries = 0 if extras.bias is None else extras.bias.shape[1]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    specs = [tile.heads_spec(rows, options)] * 3
    if entries:
        # One sum a row and head, added up outside: no atomics, the same bits on every run.
        shapes.append(jax.ShapeDtypeStruct((batch, heads, entries), jnp.float32))
        specs.append(pl.BlockSpec((None, None, entries), lambda h, b: (b, h, 0)))
    d_q, d_k, d_v, *d_bias = pl.pallas_call(
        lambda *refs: _backward_kernel(*refs, options=options, heads=heads),
        grid=(heads, batch),
        in_specs=[tile.heads_spec(rows, options)] * 3
        + [
            tile.extras_specs(rows, extras, options),
            tile.scalars_spec(rows),
            tile.heads_spec(rows, options),
        ],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="short_attention_backward",
    )(q, k, v, extras, lse, d_out)
    return d_q, d_k, d_v, (d_bias[0].sum(0) if d_bias else None)


def rows_held(length: int) -> int:
    """Rows of a tile for rows of `length`: a power of two that tensor cores accept."""
    return max(NARROWEST, pl.next_power_of_2(length))


def _forward_kernel(q_ref, k_ref, v_ref, extras, out_ref, lse_ref, *, options, heads):
    query, key, value = _load(q_ref, k_ref, v_ref, extras, options)
    scores = tile.scores(query, key, extras, options, masked=True)
    largest = scores.max(axis=1)
    weights = jnp.where(scores > MASKED / 2, jnp.exp2(scores - largest[:, None]), 0.0)
    total = weights.sum(axis=1)
    total = jnp.where(total == 0, 1.0, total)
    row = pl.program_id(1) * heads + pl.program_id(0)
    kept = tile.dropout_scale(query, key, extras, row, options)
    weights = weights if kept is None else weights * kept
    out = tile.dot(weights.astype(value.dtype), value) / total[:, None]
    tile.store_rows(out_ref, 0, out, 0, options.head_dim, options)
    plgpu.store(
        lse_ref.at[pl.ds(0, len(total))],
        largest + jnp.log2(total),
        mask=query.index < options.length,
    )


def _backward_kernel(
    q_ref, k_ref, v_ref, extras, lse_ref, d_out_ref, d_q_ref, d_k_ref, d_v_ref, *d_bias_ref,
    options, heads,
):  # fmt: skip
    query, key, value = _load(q_ref, k_ref, v_ref, extras, options)
    rows, dtype = len(query.index), value.dtype
    d_out = tile.load_rows(d_out_ref, 0, rows, 0, options.padded_head, options.head_dim, options)
    lse = plgpu.load(lse_ref.at[pl.ds(0, rows)], mask=query.index < options.length, other=0.0)
    scores = tile.scores(query, key, extras, options, masked=True)
    weights = jnp.where(scores > MASKED / 2, jnp.exp2(scores - lse[:, None]), 0.0)
    d_weights = tile.dot(d_out, value, transpose_b=True)
    row = pl.program_id(1) * heads + pl.program_id(0)
    kept = tile.dropout_scale(query, key, extras, row, options)
    dropped = weights
    if kept is not None:
        dropped, d_weights = weights * kept, d_weights * kept
    d_v = tile.dot(dropped.astype(dtype), d_out, transpose_a=True)
    tile.store_rows(d_v_ref, 0, d_v, 0, options.head_dim, options)
    d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1)[:, None])
    if d_bias_ref:
        for entry in range(2 * options.clip + 2):
            d_bias_ref[0][entry] = tile.bias_gradient(d_scores, query, key, entry, options)
    d_scores = (d_scores * options.scale).astype(dtype)
    for ref, side, other, transposed in (
        (d_q_ref, query, key, False),
        (d_k_ref, key, query, True),
    ):
        d_low = tile.dot(d_scores, other.low, transpose_a=transposed)
        d_high = tile.dot(d_scores, other.high, transpose_a=transposed)
        if side.cos is not None:
            d_low, d_high = tile.turn(d_low, d_high, side.cos, -side.sin, jnp.float32)
        tile.store_rows(ref, 0, d_low, 0, options.half, options)
        tile.store_rows(ref, 0, d_high, options.half, options.half, options)


def _load(q_ref, k_ref, v_ref, extras, options):
    rows = rows_held(options.length)
    query = tile.load_side(q_ref, extras, 0, rows, options)
    key = tile.load_side(k_ref, extras, 0, rows, options)
    value = tile.load_rows(v_ref, 0, rows, 0, options.padded_head, options.head_dim, options)
    return query, key, value
