"""Which part of an array a program is given.

The last two axes of a grid are heads and batch rows.
"""

from jax.experimental import pallas as pl

from pallas_kernels.ops.attention.block_mask import BlockMask
from pallas_kernels.ops.attention.tile import AttentionInputs, Options


def heads_spec(rows: int, options: Options) -> pl.BlockSpec:
    """One head of `[batch, length, heads, head_dim]`, `rows` long."""
    # The padded second half starts at the real half.
    width = max(options.half + options.padded_half, options.padded_head)
    return pl.BlockSpec((None, rows, None, width), lambda *at: (at[-1], 0, at[-2], 0))


def scalars_spec(rows: int) -> pl.BlockSpec:
    """One head of `[batch, heads, length]`, `rows` long."""
    return pl.BlockSpec((None, None, rows), lambda *at: (at[-1], at[-2], 0))


def inputs_specs(rows: int, inputs: AttentionInputs, options: Options) -> AttentionInputs:
    """What belongs to one head and batch row of the inputs, `rows` long."""
    per_token = pl.BlockSpec((None, rows), lambda *at: (at[-1], 0))
    specs = {}
    if inputs.cos is not None:
        shared = inputs.cos.shape[0] == 1
        table = pl.BlockSpec(
            (None, rows, options.padded_half), lambda *at: (0 if shared else at[-1], 0, 0)
        )
        specs |= {"cos": table, "sin": table}
    if inputs.ids is not None:
        specs["ids"] = per_token
    if inputs.segment_ids is not None:
        specs["segment_ids"] = per_token
    if inputs.bias is not None:
        specs["bias"] = pl.BlockSpec((None, inputs.bias.shape[1]), lambda *at: (at[-2], 0))
    if inputs.seed is not None:
        specs["seed"] = pl.BlockSpec(inputs.seed.shape, lambda *at: (0,))
    return AttentionInputs(**specs)


def block_mask_specs(visits: BlockMask | None) -> BlockMask | None:
    """What belongs to one batch row of a list of blocks, if there is one."""
    if visits is None:
        return None
    return BlockMask(
        pl.BlockSpec((None, *visits.blocks.shape[1:]), lambda *at: (at[-1], 0, 0)),
        pl.BlockSpec((None, *visits.counts.shape[1:]), lambda *at: (at[-1], 0)),
    )
