"""Rotary position embedding in plain `jnp` (Su et al. 2021, RoFormer)."""

import jax
import jax.numpy as jnp

ROPE_BASE = 10_000.0


def rope_tables(positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angles of rotary position embedding.

    Pair i of channels turns by `positions * ROPE_BASE ** (-2 i / head_dim)` (Su et al. 2021,
    RoFormer, eq. 34).

    Args:
      positions: int `[..., length]`.
      head_dim: even.

    Returns:
      Two float32 arrays `[..., length, head_dim / 2]`.
    """
    half = head_dim // 2
    frequency = ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding over the whole head, in halves.

    Channel i < head_dim / 2 and channel i + head_dim / 2 make a pair.

    Args:
      x: `[batch, length, heads, head_dim]`, head_dim even.
      positions: int `[length]` or `[batch, length]`.

    Returns:
      As x, computed in float32.
    """
    return rotate_halves(x, *(table[..., None, :] for table in rope_tables(positions, x.shape[-1])))


def rotate_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The two halves of x's last axis as pairs, each turned by its angle, in float32."""
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([low * cos - high * sin, low * sin + high * cos], axis=-1)
    return turned.astype(x.dtype)
