"""LayerNorm and cross-entropy in plain `jnp`: what the kernels of the stream must equal."""

import jax
import jax.numpy as jnp


def layer_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """LayerNorm over the last axis, without a bias (Ba et al. 2016, Layer Normalization, eq. 4)."""
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon) * scale


def cross_entropy(
    x: jax.Array,
    scale: jax.Array,
    table: jax.Array,
    wanted: jax.Array,
    weights: jax.Array,
    epsilon: float,
) -> jax.Array:
    """The weighted sum of the cross-entropies of `wanted` under the logits of `x`."""
    normed = layer_norm(x, scale, epsilon).astype(table.dtype)
    logits = jnp.einsum("...d,vd->...v", normed, table, preferred_element_type=jnp.float32)
    right = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
    entropies = jax.nn.logsumexp(logits, axis=-1) - right
    return (entropies * weights).sum()
