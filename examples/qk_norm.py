"""A block of one's own: queries and keys are normed (Henry et al. 2020, Query-Key Normalization).

    python examples/qk_norm.py train quickstart model.block=qk-norm name=qk-norm

`Block` with one equation changed; weights, training, checkpoints, scores and answers are as ever.
The fused ways and the cache, which are known to equal `Block` alone, are left by themselves.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import spak_jax as spak
from spak_jax.models import Block
from spak_jax.registry import BLOCKS


@BLOCKS.register("qk-norm")
class QKNormBlock(Block):
    """Each head's queries and keys have a length of `sqrt(head_dim)`, times a learned scale."""

    def __init__(self, settings, *, rngs):
        super().__init__(settings, rngs=rngs)
        self.q_scale = nnx.Param(jnp.ones(settings.head_dim))
        self.k_scale = nnx.Param(jnp.ones(settings.head_dim))

    def queries_keys_values(self, x):
        q, k, v = super().queries_keys_values(x)
        return rms_norm(q, self.q_scale[...]), rms_norm(k, self.k_scale[...]), v

    # Made of queries and keys as above: what it shows is true of this block, too.
    attention_weights = Block.attention_weights


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x / sqrt(mean(x^2)) * scale` over the last axis (Zhang and Sennrich 2019), in float32."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-6)
    return (normed * scale).astype(x.dtype)


if __name__ == "__main__":
    spak.main()
