"""The plain `jnp` truth: what every kernel here computes, written to be read and run anywhere."""

import jax
import jax.numpy as jnp

ROPE_BASE = 10_000.0


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding over the whole head, in halves (Su et al. 2021, RoFormer, eq. 34).

    Channel i < head_dim / 2 and channel i + head_dim / 2 make a pair, turned by
    `positions * ROPE_BASE ** (-2 i / head_dim)`.

    Args:
      x: `[batch, length, heads, head_dim]`, head_dim even.
      positions: int `[length]` or `[batch, length]`.

    Returns:
      As x, computed in float32.
    """
    half = x.shape[-1] // 2
    frequency = ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    low, high = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1)
    return turned.astype(x.dtype)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Causal attention scaled by `1 / sqrt(head_dim)`, softmax in float32.

    Args:
      q, k, v: `[batch, length, heads, head_dim]`.
      positions: int `[length]` or `[batch, length]`: q and k are rotated by them; None does not.
      dropout_rate: share of the probabilities set to zero, where `dropout_key` is given.
      dropout_key: PRNG key.

    Returns:
      `[batch, length, heads, head_dim]` in the dtype of q.
    """
    if positions is not None:
        q, k = rotate(q, positions), rotate(k, positions)
    length, head_dim = q.shape[1], q.shape[3]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    causal = jnp.tril(jnp.ones((length, length), bool))
    probabilities = jax.nn.softmax(jnp.where(causal, scores / head_dim**0.5, -jnp.inf))
    if dropout_key is not None and dropout_rate > 0:
        kept = jax.random.bernoulli(dropout_key, 1 - dropout_rate, probabilities.shape)
        probabilities = jnp.where(kept, probabilities / (1 - dropout_rate), 0)
    return jnp.einsum("bhqk,bkhd->bqhd", probabilities.astype(v.dtype), v)
