"""Attention for short rows: a whole row of one head in one program, forward and backward.

Queries, keys, scores and probabilities of the row stay on the chip, so the forward pass reads q, k
and v once and writes the output once; the backward pass makes the probabilities again from the
log-sum-exp and writes each gradient once.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.ops import instructions
from pallas_kernels.ops.attention import block_specs, tile
from pallas_kernels.ops.attention.tile import LEAST, AttentionInputs, Options
from pallas_kernels.ops.instructions import LOG2_E
from pallas_kernels.padding import MASKED, padded


def forward(qkv: Sequence[jax.Array], inputs: AttentionInputs, options: Options, *, num_warps: int):
    """Output `[batch, length, heads, head_dim]` and log-sum-exp, float32 `[batch, heads, length]`.

    qkv: q, k and v of that shape, or one array with all of them, `[batch, length, 3, heads,
    head_dim]`. The log-sum-exp is in units of log 2.
    """
    batch, length, *_, heads, head_dim = qkv[0].shape
    rows = padded(length)
    return pl.pallas_call(
        functools.partial(_forward_kernel, options=options, heads=heads),
        grid=(heads, batch),
        in_specs=[_qkv_specs(qkv, rows, options), block_specs.inputs_specs(rows, inputs, options)],
        out_specs=[block_specs.heads_spec(rows, options), block_specs.scalars_spec(rows)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, length, heads, head_dim), qkv[0].dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=options.interpret,
        name="fused_row_forward",
    )(_flat(qkv), inputs)


def backward(
    qkv: Sequence[jax.Array],
    inputs: AttentionInputs,
    lse,
    d_out,
    options: Options,
    *,
    num_warps: int,
):
    """Gradients as `qkv` is given, and of the bias table, float32 `[heads, entries]` or None.

    lse: what `forward` returned. d_out: the gradient of its output, in its dtype.
    """
    batch, length, heads, _ = d_out.shape
    rows = padded(length)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _flat(qkv)]
    specs = _qkv_specs(qkv, rows, options)
    if inputs.bias is not None:
        # One sum a row and head, added up outside: no atomics, the same bits on every run.
        entries = inputs.bias.shape[1]
        shapes.append(jax.ShapeDtypeStruct((batch, heads, entries), jnp.float32))
        columns = pl.next_power_of_2(entries)
        specs.append(pl.BlockSpec((None, None, columns), lambda h, b: (b, h, 0)))
    gradients = pl.pallas_call(
        functools.partial(_backward_kernel, options=options, heads=heads),
        grid=(heads, batch),
        in_specs=[
            _qkv_specs(qkv, rows, options),
            block_specs.inputs_specs(rows, inputs, options),
            block_specs.scalars_spec(rows),
            block_specs.heads_spec(rows, options),
        ],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=options.interpret,
        name="fused_row_backward",
    )(_flat(qkv), inputs, lse, d_out)
    d_qkv, d_bias = gradients[: len(qkv)], gradients[len(qkv) :]
    d_qkv = [gradient.reshape(x.shape) for gradient, x in zip(d_qkv, qkv, strict=True)]
    return d_qkv, (d_bias[0].sum(0) if d_bias else None)


def _flat(qkv: Sequence[jax.Array]) -> list[jax.Array]:
    """What a program reads a head of: all heads of q, k and v as columns, if they are one array."""
    if len(qkv) == 1:
        return [qkv[0].reshape(*qkv[0].shape[:2], -1)]
    return list(qkv)


def _qkv_specs(qkv: Sequence[jax.Array], rows: int, options: Options) -> list[pl.BlockSpec]:
    if len(qkv) == 1:
        # Padded columns are masked.
        columns = qkv[0].size // math.prod(qkv[0].shape[:2]) + options.padded_head
        return [pl.BlockSpec((None, rows, columns), lambda h, b: (b, 0, 0))]
    return [block_specs.heads_spec(rows, options)] * 3


def _head(refs, heads: int, options: Options) -> Sequence:
    """This program's head of q, k and v, or of their gradients."""
    if len(refs) == 3:
        return refs
    head = pl.program_id(0)
    return [tile.HeadView(refs[0], (heads * i + head) * options.head_dim) for i in range(3)]


def _forward_kernel(qkv_refs, inputs, out_ref, lse_ref, *, options, heads):
    rows = padded(options.length)
    q_ref, k_ref, v_ref = _head(qkv_refs, heads, options)
    query = tile.load_qk(q_ref, inputs, 0, rows, options, tile.query_scale(options))
    key = tile.load_qk(k_ref, inputs, 0, rows, options)
    value, key = tile.load_values(v_ref, key, 0, options)
    scores = tile.scores(query, key, inputs, options, masked=True)
    largest = jnp.maximum(scores.max(axis=1), LEAST)
    weights = instructions.exp2(scores - largest[:, None], options.interpret)
    total = weights.sum(axis=1)
    total = jnp.where(total == 0, 1.0, total)
    row = pl.program_id(1) * heads + pl.program_id(0)
    kept = tile.dropout_scale(query, key, inputs, row, options)
    weights = weights if kept is None else weights * kept
    out = instructions.dot(weights.astype(value.dtype), value) * (1 / total)[:, None]
    tile.store_rows(out_ref, 0, out, 0, options.head_dim, options)
    plgpu.store(
        lse_ref.at[pl.ds(0, rows)],
        largest + jnp.log2(total),
        mask=query.index < options.length,
    )


def _backward_kernel(qkv_refs, inputs, lse_ref, d_out_ref, *d_refs, options, heads):
    rows, dtype = padded(options.length), d_out_ref.dtype
    d_refs, d_bias_ref = d_refs[: len(qkv_refs)], d_refs[len(qkv_refs) :]
    q_ref, k_ref, v_ref = _head(qkv_refs, heads, options)
    d_q_ref, d_k_ref, d_v_ref = _head(d_refs, heads, options)
    load_qk = functools.partial(tile.load_qk, only_finite=True)
    query = load_qk(q_ref, inputs, 0, rows, options, tile.query_scale(options))
    key = load_qk(k_ref, inputs, 0, rows, options)
    value = tile.load_heads(v_ref, 0, rows, options)
    d_out = tile.load_heads(d_out_ref, 0, rows, options)
    inside = query.index < options.length
    lse = plgpu.load(lse_ref.at[pl.ds(0, rows)], mask=inside, other=-MASKED)
    # Rows beyond the length, and queries that saw what is not finite: all their weights are 0.
    lse = jnp.where(jnp.isfinite(lse), lse, -MASKED)
    scores = tile.scores(query, key, inputs, options, masked=True)
    weights = instructions.exp2(scores - lse[:, None], options.interpret)
    d_weights = tile.d_weights(d_out, value, weights, options)
    row = pl.program_id(1) * heads + pl.program_id(0)
    kept = tile.dropout_scale(query, key, inputs, row, options)
    dropped = weights
    if kept is not None:
        dropped, d_weights = weights * kept, d_weights * kept
    d_v = instructions.dot(dropped.astype(dtype), d_out, transpose_a=True)
    tile.store_rows(d_v_ref, 0, d_v, 0, options.head_dim, options)
    d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1)[:, None])
    if d_bias_ref:
        entries = len(d_bias_ref[0])
        d_bias = tile.bias_sums(d_scores, query, key, entries, options)
        tile.store_bias_sums(d_bias_ref[0], d_bias, options)
    d_scores = d_scores.astype(dtype)
    for ref, other, transposed, scale in (
        # The queries carry the scale, and the units of log 2.
        (d_k_ref, query, True, 1 / LOG2_E),
        (d_q_ref, key, False, options.scale),
    ):
        d_low = instructions.dot(d_scores, other.low, transpose_a=transposed)
        d_high = instructions.dot(d_scores, other.high, transpose_a=transposed)
        tile.store_rotated_back(ref, inputs, 0, d_low, d_high, scale, options)
