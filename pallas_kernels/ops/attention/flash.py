"""Attention for long rows: one side of a row stays in a program, the other is streamed past it.

The forward pass and the gradient of q hold a block of queries and stream blocks of keys; the
gradients of k and v hold a block of keys and stream blocks of queries. The softmax is kept up to
date as keys come (online softmax), so no row of scores is ever whole. Blocks above the diagonal are
never read, and blocks that no mask cuts skip the masks. Where a window or segments may cut any
block, a program visits those alone that `block_mask` lists for it. What is held is turned by RoPE
in the program; what is streamed is turned once, beforehand: it passes by many programs, and turning
it there each time was slower on an H100 in every tile tried. Each gradient is summed in one
program, in one order: no atomics, the same bits on every run.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.ops import instructions
from pallas_kernels.ops.attention import block_mask, block_specs, tile
from pallas_kernels.ops.attention.block_mask import BlockMask
from pallas_kernels.ops.attention.rope import rotate_halves
from pallas_kernels.ops.attention.tile import LEAST, AttentionInputs, Options
from pallas_kernels.ops.instructions import LOG2_E
from pallas_kernels.padding import MASKED


class BlockSizes(NamedTuple):
    """How one kernel is cut and launched.

    block_q, block_k: queries and keys of a tile, powers of two from 16. num_warps: of a program.
    num_stages: of the pipeline that loads what is streamed.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def forward(q, k, v, inputs: AttentionInputs, options: Options, block_sizes: BlockSizes):
    """Output `[batch, length, heads, head_dim]` and log-sum-exp, float32 `[batch, heads, length]`.

    The log-sum-exp is in units of log 2, and `LEAST` where a query sees no key.
    """
    batch, length, heads, _ = q.shape
    rows = _rows_covered(options, block_sizes)
    keys = _block_mask(inputs, options, block_sizes)
    return pl.pallas_call(
        functools.partial(_forward_kernel, options=options, heads=heads, block_sizes=block_sizes),
        grid=(pl.cdiv(length, block_sizes.block_q), heads, batch),
        in_specs=[block_specs.heads_spec(rows, options)] * 3
        + [block_specs.inputs_specs(rows, inputs, options), block_specs.block_mask_specs(keys)],
        out_specs=[block_specs.heads_spec(rows, options), block_specs.scalars_spec(rows)],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        compiler_params=_compiler_params(block_sizes),
        interpret=options.interpret,
        name="flash_forward",
    )(q, _rotated(k, inputs), v, inputs, keys)


def backward(
    q, k, v, inputs: AttentionInputs, out, lse, d_out, options: Options, *,
    d_q_block_sizes: BlockSizes, d_kv_block_sizes: BlockSizes,
):  # fmt: skip
    """Gradients of q, k and v, and of the bias table, float32 `[heads, entries]` or None.

    out, lse: what `forward` returned. d_out: the gradient of out, in its dtype.
    """
    # What the softmax's gradient takes from every pair of a query: float32 [batch, heads, length].
    # A plain sum, since a matrix product of float32 may be rounded to tf32.
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    # Queries that saw what is not finite: all their weights are 0.
    seeing = jnp.isfinite(lse) & jnp.isfinite(delta)
    lse, delta = jnp.where(seeing, lse, -MASKED), jnp.where(seeing, delta, 0)
    of_queries = (lse, delta, d_out)
    d_q, d_bias = d_q_and_bias(q, k, v, inputs, *of_queries, options, d_q_block_sizes)
    d_k, d_v = d_kv(q, k, v, inputs, *of_queries, options, d_kv_block_sizes)
    return d_q, d_k, d_v, d_bias


def d_q_and_bias(
    q, k, v, inputs: AttentionInputs, lse, delta, d_out, options: Options, block_sizes: BlockSizes
):
    """Gradients of q and of the bias table, float32 `[heads, entries]` or None."""
    batch, length, heads, _ = q.shape
    blocks = pl.cdiv(length, block_sizes.block_q)
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    specs = [block_specs.heads_spec(_rows_covered(options, block_sizes), options)]
    if inputs.bias is not None:
        entries = inputs.bias.shape[1]
        shapes.append(jax.ShapeDtypeStruct((batch, heads, blocks, entries), jnp.float32))
        specs.append(
            pl.BlockSpec(
                (None, None, None, pl.next_power_of_2(entries)),
                lambda i, h, b: (b, h, _from_last(i, options, block_sizes.block_q), 0),
            )
        )
    keys = _block_mask(inputs, options, block_sizes)
    d_q, *d_bias = pl.pallas_call(
        functools.partial(_d_q_kernel, options=options, heads=heads, block_sizes=block_sizes),
        grid=(blocks, heads, batch),
        in_specs=_backward_specs(inputs, keys, options, block_sizes),
        out_specs=specs,
        out_shape=shapes,
        compiler_params=_compiler_params(block_sizes),
        interpret=options.interpret,
        name="flash_d_q",
    )(q, _rotated(k, inputs), v, inputs, keys, lse, delta, d_out)
    return d_q, (d_bias[0].sum((0, 2)) if d_bias else None)


def d_kv(
    q, k, v, inputs: AttentionInputs, lse, delta, d_out, options: Options, block_sizes: BlockSizes
):
    """Gradients of k and v."""
    batch, length, heads, _ = q.shape
    scaled = _rotated(q.astype(jnp.float32), inputs) * tile.query_scale(options)
    scaled = jnp.where(jnp.isfinite(scaled), scaled, 0)
    queries = _block_mask(inputs, options, block_sizes, of_keys=True)
    return pl.pallas_call(
        functools.partial(_d_kv_kernel, options=options, heads=heads, block_sizes=block_sizes),
        grid=(pl.cdiv(length, block_sizes.block_k), heads, batch),
        in_specs=_backward_specs(inputs, queries, options, block_sizes),
        out_specs=[block_specs.heads_spec(_rows_covered(options, block_sizes), options)] * 2,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        compiler_params=_compiler_params(block_sizes),
        interpret=options.interpret,
        name="flash_d_kv",
    )(scaled.astype(q.dtype), k, v, inputs, queries, lse, delta, d_out)


def _backward_specs(
    inputs: AttentionInputs, visits: BlockMask | None, options: Options, block_sizes: BlockSizes
):
    rows = _rows_covered(options, block_sizes)
    heads, scalars = block_specs.heads_spec(rows, options), block_specs.scalars_spec(rows)
    return [
        heads,
        heads,
        heads,
        block_specs.inputs_specs(rows, inputs, options),
        block_specs.block_mask_specs(visits),
        scalars,
        scalars,
        heads,
    ]


def _compiler_params(block_sizes: BlockSizes):
    return plgpu.CompilerParams(num_warps=block_sizes.num_warps, num_stages=block_sizes.num_stages)


def _rotated(x, inputs: AttentionInputs):
    """q or k turned by RoPE, where there are tables for it."""
    if inputs.cos is None:
        return x
    cos, sin = (table[:, :, None].astype(jnp.float32) for table in (inputs.cos, inputs.sin))
    return rotate_halves(x, cos, sin)


def _rotated_already(inputs: AttentionInputs) -> AttentionInputs:
    """The inputs by which what is streamed is loaded."""
    return inputs._replace(cos=None, sin=None)


def _forward_kernel(
    q_ref, k_ref, v_ref, inputs, keys, out_ref, lse_ref, *, options, heads, block_sizes
):
    block_q, block_k = block_sizes.block_q, block_sizes.block_k
    start_q = _from_last(pl.program_id(0), options, block_q) * block_q
    query = tile.load_qk(q_ref, inputs, start_q, block_q, options, tile.query_scale(options))
    row, streamed = _row_index(heads), _rotated_already(inputs)

    def step(block, carry, masked):
        out, largest, total = carry
        key = tile.load_qk(k_ref, streamed, block * block_k, block_k, options)
        if masked:
            value, key = tile.load_values(v_ref, key, block * block_k, options)
        else:
            # All queries see what is not finite.
            value = tile.load_heads(v_ref, block * block_k, block_k, options)
        scores = tile.scores(query, key, inputs, options, masked=masked)
        grown = jnp.maximum(largest, scores.max(axis=1))
        shrink = instructions.exp2(largest - grown, options.interpret)
        weights = instructions.exp2(scores - grown[:, None], options.interpret)
        total = total * shrink + weights.sum(axis=1)
        kept = tile.dropout_scale(query, key, inputs, row, options)
        weights = weights if kept is None else weights * kept
        out = out * shrink[:, None] + instructions.dot(weights.astype(value.dtype), value)
        return out, grown, total

    carry = (
        jnp.zeros((block_q, options.padded_head), jnp.float32),
        jnp.full((block_q,), LEAST, jnp.float32),
        jnp.zeros((block_q,), jnp.float32),
    )
    out, largest, total = _over_keys(step, carry, start_q, keys, options, block_q, block_k)
    total = jnp.where(total == 0, 1.0, total)
    out *= (1 / total)[:, None]
    tile.store_rows(out_ref, start_q, out, 0, options.head_dim, options)
    plgpu.store(
        lse_ref.at[pl.ds(start_q, block_q)],
        largest + jnp.log2(total),
        mask=query.index < options.length,
    )


def _d_q_kernel(
    q_ref, k_ref, v_ref, inputs, keys, lse_ref, delta_ref, d_out_ref, d_q_ref, *d_bias_ref,
    options, heads, block_sizes,
):  # fmt: skip
    block_q, block_k = block_sizes.block_q, block_sizes.block_k
    start_q = _from_last(pl.program_id(0), options, block_q) * block_q
    query = tile.load_qk(q_ref, inputs, start_q, block_q, options, tile.query_scale(options))
    d_out = tile.load_heads(d_out_ref, start_q, block_q, options)
    lse, delta = _load_scalars(lse_ref, delta_ref, query.index, start_q, options)
    row, streamed = _row_index(heads), _rotated_already(inputs)

    def step(block, carry, masked):
        d_low, d_high, *d_bias = carry
        start_k = block * block_k
        key = tile.load_qk(k_ref, streamed, start_k, block_k, options, only_finite=masked)
        value = tile.load_heads(v_ref, start_k, block_k, options)
        scores = tile.scores(query, key, inputs, options, masked=masked)
        weights = instructions.exp2(scores - lse[:, None], options.interpret)
        if masked:
            d_weights = tile.d_weights(d_out, value, weights, options)
        else:
            d_weights = instructions.dot(d_out, value, transpose_b=True)
        kept = tile.dropout_scale(query, key, inputs, row, options)
        d_weights = d_weights if kept is None else d_weights * kept
        d_scores = weights * (d_weights - delta[:, None])
        if d_bias:
            d_bias = [d_bias[0] + tile.bias_sums(d_scores, query, key, len(d_bias[0]), options)]
        d_scores = d_scores.astype(value.dtype)
        d_low += instructions.dot(d_scores, key.low)
        d_high += instructions.dot(d_scores, key.high)
        return d_low, d_high, *d_bias

    half = jnp.zeros((block_q, options.padded_half), jnp.float32)
    carry = (half, half)
    if d_bias_ref:
        carry += (jnp.zeros(d_bias_ref[0].shape, jnp.float32),)
    d_low, d_high, *d_bias = _over_keys(step, carry, start_q, keys, options, block_q, block_k)
    tile.store_rotated_back(d_q_ref, inputs, start_q, d_low, d_high, options.scale, options)
    if d_bias_ref:
        tile.store_bias_sums(d_bias_ref[0], d_bias[0], options)


def _d_kv_kernel(
    q_ref, k_ref, v_ref, inputs, queries, lse_ref, delta_ref, d_out_ref, d_k_ref, d_v_ref, *,
    options, heads, block_sizes,
):  # fmt: skip
    block_q, block_k = block_sizes.block_q, block_sizes.block_k
    start_k = pl.program_id(0) * block_k
    key = tile.load_qk(k_ref, inputs, start_k, block_k, options)
    value = tile.load_heads(v_ref, start_k, block_k, options)
    row, streamed = _row_index(heads), _rotated_already(inputs)

    # Tiles are `[keys, queries]` here: what multiplies d_out and the queries needs no transposing.
    def step(block, carry, masked):
        d_low, d_high, d_v = carry
        start_q = block * block_q
        query = tile.load_qk(q_ref, streamed, start_q, block_q, options)
        d_out = tile.load_heads(d_out_ref, start_q, block_q, options)
        lse, delta = _load_scalars(lse_ref, delta_ref, query.index, start_q, options)
        scores = tile.scores(query, key, inputs, options, masked=masked, keys_first=True)
        weights = instructions.exp2(scores - lse[None, :], options.interpret)
        d_weights = instructions.dot(value, d_out, transpose_b=True)
        kept = tile.dropout_scale(query, key, inputs, row, options, keys_first=True)
        dropped = weights
        if kept is not None:
            dropped, d_weights = weights * kept, d_weights * kept
        d_v += instructions.dot(dropped.astype(value.dtype), d_out)
        d_scores = (weights * (d_weights - delta[None, :])).astype(value.dtype)
        d_low += instructions.dot(d_scores, query.low)
        d_high += instructions.dot(d_scores, query.high)
        return d_low, d_high, d_v

    half = jnp.zeros((block_k, options.padded_half), jnp.float32)
    carry = (half, half, jnp.zeros((block_k, options.padded_head), jnp.float32))
    d_low, d_high, d_v = _over_queries(step, carry, start_k, queries, options, block_q, block_k)
    tile.store_rows(d_v_ref, start_k, d_v, 0, options.head_dim, options)
    # The queries carry the scale, and the units of log 2.
    tile.store_rotated_back(d_k_ref, inputs, start_k, d_low, d_high, 1 / LOG2_E, options)


def _over_keys(step, carry, start_q, visits, options, block_q, block_k):
    """Carry after the blocks of keys that queries from `start_q` see: whole ones, then cut ones.

    visits: those of a row that are to be visited at all; None for no such list.
    """
    if visits is not None:
        return _over_listed(step, carry, jax.lax.div(start_q, block_q), visits)
    if options.causal:
        full = jax.lax.div(start_q + 1, block_k)
        last = pl.cdiv(jnp.minimum(start_q + block_q, options.length), block_k)
    else:
        full, last = options.length // block_k, pl.cdiv(options.length, block_k)
    carry = _loop(functools.partial(step, masked=False), carry, 0, full)
    return _loop(functools.partial(step, masked=True), carry, full, last)


def _over_queries(step, carry, start_k, visits, options, block_q, block_k):
    """Carry after the blocks of queries that see keys from `start_k`: cut ones, then whole ones.

    The length cuts nothing here: what lies beyond it is in rows that are never stored, or has
    weights of 0 (`_load_scalars`). visits: as of `_over_keys`.
    """
    if visits is not None:
        return _over_listed(step, carry, jax.lax.div(start_k, block_k), visits)
    last = pl.cdiv(options.length, block_q)
    first = full = 0
    if options.causal:
        first = jax.lax.div(start_k, block_q)
        full = jnp.minimum(pl.cdiv(start_k + block_k - 1, block_q), last)
    carry = _loop(functools.partial(step, masked=True), carry, first, full)
    return _loop(functools.partial(step, masked=False), carry, full, last)


def _over_listed(step, carry, held, visits: BlockMask):
    """Carry after the blocks that the block of number `held` visits."""

    def visit(i, carry):
        return step(plgpu.load(visits.blocks.at[held, i]), carry, masked=True)

    return jax.lax.fori_loop(0, plgpu.load(visits.counts.at[held]), visit, carry)


def _loop(step, carry, first, end):
    """`fori_loop`, left out where it is known to be empty when the kernel is compiled."""
    if isinstance(first, int) and isinstance(end, int) and first >= end:
        return carry
    return jax.lax.fori_loop(first, end, step, carry)


def _block_mask(
    inputs: AttentionInputs, options: Options, block_sizes: BlockSizes, *, of_keys: bool = False
) -> BlockMask | None:
    """The blocks of keys that blocks of queries visit, or `of_keys` the other way round. None where
    masks cut blocks at the diagonal and at the end alone."""
    if inputs.segment_ids is None and not options.windowed:
        return None
    visited = block_mask.visited(
        options.length,
        block_sizes.block_q,
        block_sizes.block_k,
        ids=inputs.ids,
        segment_ids=inputs.segment_ids,
        window=options.clip if options.windowed else None,
        causal=options.causal,
    )
    return block_mask.listed(visited.swapaxes(1, 2) if of_keys else visited)


def _from_last(i, options: Options, block_q: int):
    """The block of queries of program `i`: the last first, since under the causal mask it sees the
    most keys, and short programs fill the end of the launch better than long ones."""
    return pl.cdiv(options.length, block_q) - 1 - i


def _row_index(heads: int):
    """`batch index * heads + head`, by which dropout tells rows apart."""
    return pl.program_id(2) * heads + pl.program_id(1)


def _load_scalars(lse_ref, delta_ref, index, start, options: Options):
    """lse and delta of queries; beyond the length, an lse that makes all weights 0."""
    inside, rows = index < options.length, pl.ds(start, len(index))
    lse = plgpu.load(lse_ref.at[rows], mask=inside, other=-MASKED)
    return lse, plgpu.load(delta_ref.at[rows], mask=inside, other=0.0)


def _rows_covered(options: Options, block_sizes: BlockSizes) -> int:
    """Rows of a reference that whole blocks of both sides cover."""
    block = max(block_sizes.block_q, block_sizes.block_k)
    return pl.cdiv(options.length, block) * block
