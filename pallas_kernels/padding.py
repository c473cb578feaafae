"""Sizes on the chip: powers of two, at least as long as a side of a product on tensor cores."""

from jax.experimental import pallas as pl

# The narrowest side of a matrix product on the tensor cores.
NARROWEST = 16
# Scores and logits that do not count: finite, so that no NaN comes of them.
MASKED = -1e30


def padded(size: int) -> int:
    """What a side of `size` rows or channels takes on the chip."""
    return max(NARROWEST, pl.next_power_of_2(size))


def padded_head(head_dim: int) -> int:
    """Channels that a head takes on the chip: each half is padded by itself."""
    return 2 * padded(head_dim // 2)
