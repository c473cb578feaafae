"""How each kernel is launched: blocks, warps, pipeline stages. The one place to tune.

What the choices rest on so far: registers and spills of ahead-of-time compiles for h100 and
rtx5070, and for short rows of 64 one timing on an H100 (4 warps against 8). On rtx5070 the backward
kernels still spill some registers; nothing has been timed there.
"""

from pallas_kernels.tile import Options

# The longest row that one program holds without spilling on the H100.
LONGEST_SHORT = 64

# Warps of a whole-row program, by the rows of its tile.
SHORT_WARPS = {16: 1, 32: 2, 64: 4}

# By the bytes of one row of a padded head.
LONG_BLOCKS = {
    128: {"block_q": 64, "block_k": 64, "num_warps": 4, "num_stages": 2},
    256: {"block_q": 64, "block_k": 32, "num_warps": 4, "num_stages": 2},
    512: {"block_q": 32, "block_k": 32, "num_warps": 4, "num_stages": 1},
}


def short(rows: int) -> dict[str, int]:
    """Launch of `short.forward` and `short.backward` for a tile of `rows` rows."""
    return {"num_warps": SHORT_WARPS[rows]}


def long(options: Options, item_size: int) -> dict[str, int]:
    """Launch of `long.forward` and `long.backward` for numbers of `item_size` bytes."""
    return LONG_BLOCKS[max(128, options.padded_head * item_size)]
