"""Weights of a looped block: as they are given, and as its kernel reads them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.padding import padded, padded_head


class Weights(NamedTuple):
    """Of a looped block and its readout, float32, matrices `[inputs, outputs]`.

    norm1, norm2, final_norm: scales `[width]`. qkv: `[width, 3 * width]`, all heads of queries, of
    keys, of values. attention_out: `[width, width]`. mlp_in: `[width, hidden]`. mlp_out: `[hidden,
    width]`. head: token embeddings `[vocabulary, width]`. steps: `[steps, width]`, added to every
    token at the start of a loop; the last one repeats. mlp_value: as mlp_in, for SwiGLU; None for
    GELU. bias_table: `[heads, 2 * clip + 2]`, as `attention` takes it; None for none.
    """

    norm1: Any
    qkv: Any
    attention_out: Any
    norm2: Any
    mlp_in: Any
    mlp_out: Any
    final_norm: Any
    head: Any
    steps: Any
    mlp_value: Any = None
    bias_table: Any = None


class BlockSizes(NamedTuple):
    """How a program is cut and launched.

    block_width: channels of the state that a tile of weights meets. block_hidden: queries, keys,
    values or hidden channels that it makes or takes; no more for a head's output than the head has.
    """

    block_width: int
    block_hidden: int
    num_warps: int
    num_stages: int


class TiledWeights(NamedTuple):
    """Weights as the kernel reads them, transposed, padded with zeros and cut into tiles.

    qkv, mlp_in, mlp_value, head: `[tiles, rows, block_width]`. attention_out, mlp_out: `[tiles,
    block_width, columns]`, one head or `block_hidden` columns to a tile. In all of them the tiles
    of one block of rows or columns follow one another. steps: float32 `[steps, blocks,
    block_width]`.
    """

    qkv: Any
    attention_out: Any
    mlp_in: Any
    mlp_out: Any
    head: Any
    steps: Any
    mlp_value: Any

    @property
    def blocks(self) -> int:
        """Of the state."""
        return self.steps.shape[1]


def tile_weights(weights: Weights, heads: int, dtype, block_sizes: BlockSizes) -> TiledWeights:
    """The weights for one way to cut them; scales of norms are multiplied into what follows."""
    width, channels = weights.qkv.shape[0], padded(weights.qkv.shape[0])
    head_dim, head_channels = width // heads, padded_head(width // heads)

    def into(matrix, scale, rows):
        """Tiles of what reads the state."""
        matrix = (matrix * scale[:, None]).T.astype(dtype)
        matrix = pad_end(matrix, (pl.cdiv(len(matrix), rows) * rows, channels))
        matrix = matrix.reshape(
            -1, rows, channels // block_sizes.block_width, block_sizes.block_width
        )
        return matrix.swapaxes(1, 2).reshape(-1, rows, block_sizes.block_width)

    def out_of(matrix, columns):
        """Tiles of what adds to the state."""
        matrix = matrix.T.astype(dtype)
        matrix = pad_end(matrix, (channels, pl.cdiv(matrix.shape[1], columns) * columns))
        matrix = matrix.reshape(
            channels // block_sizes.block_width, block_sizes.block_width, -1, columns
        )
        return jnp.moveaxis(matrix, 2, 0).reshape(-1, block_sizes.block_width, columns)

    by_head = weights.attention_out.reshape(heads, head_dim, width)
    by_head = pad_end(by_head, (heads, head_channels, width)).reshape(-1, width)
    steps = weights.steps.astype(jnp.float32)
    value = weights.mlp_value
    return TiledWeights(
        qkv=into(weights.qkv, weights.norm1, block_sizes.block_hidden),
        attention_out=out_of(by_head, head_channels),
        mlp_in=into(weights.mlp_in, weights.norm2, block_sizes.block_hidden),
        mlp_out=out_of(weights.mlp_out, block_sizes.block_hidden),
        head=into(weights.head.T, weights.final_norm, padded(len(weights.head))),
        steps=pad_end(steps, (len(steps), channels)).reshape(
            len(steps), -1, block_sizes.block_width
        ),
        mlp_value=None if value is None else into(value, weights.norm2, block_sizes.block_hidden),
    )


def pad_end(array, shape, filling: float = 0):
    """Filled up at the end of each axis."""
    more = [(0, wanted - size) for wanted, size in zip(shape, array.shape, strict=True)]
    return jnp.pad(array, more, constant_values=filling) if any(map(max, more)) else array
