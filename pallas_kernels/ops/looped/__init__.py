"""All loops of one block in one launch, or one after another in plain `jnp`."""

from pallas_kernels.ops.looped.api import looped_block, supports_fused
from pallas_kernels.ops.looped.halting import AT_ONCE, RULES, has_converged
from pallas_kernels.ops.looped.weights import BlockSizes, Weights

__all__ = [
    "AT_ONCE",
    "RULES",
    "BlockSizes",
    "Weights",
    "has_converged",
    "looped_block",
    "supports_fused",
]
