"""Dropout by a counter: what is dropped follows from where a number stands, so no mask is stored.

The same in plain `jnp` and inside every kernel, and over any number of devices.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import shards


def hash32(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which each bit of x moves about half of the others.

    Multiply and xor-shift, with the constants found by Wellons' search (hash-prospector, 2018,
    "lowbias32").
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def dropout_bits(seed0, seed1, row, counter) -> jax.Array:
    """The uint32 that decides about one probability.

    `hash32(hash32(counter + hash32(row ^ seed0)) ^ hash32(row + seed1))`: a function of where the
    probability stands, so that no mask is ever stored.

    Args:
      seed0, seed1: the uint32 words of `dropout_seed`.
      row: int32, `batch index * heads + head`.
      counter: int32, `query index * length + key index`.
    """
    row, counter = row.astype(jnp.uint32), counter.astype(jnp.uint32)
    return hash32(hash32(counter + hash32(row ^ seed0)) ^ hash32(row + seed1))


def dropout_threshold(rate: float) -> int:
    """Probabilities whose bits are below this are dropped: `rate * 2^32`, rounded."""
    return min(round(rate * 2**32), 2**32 - 1)


def dropout_seed(key: jax.Array) -> jax.Array:
    """The two uint32 words that a PRNG key gives to `dropout_bits`: its last two.

    No generator runs for them: `dropout_bits` mixes what keys that were split off one another have
    in common.
    """
    return jax.random.key_data(key)[..., -2:]


def dropout_words(key: jax.Array, rows: int) -> jax.Array:
    """What a kernel needs for dropout: uint32 `[2]`, the words of `dropout_seed`.

    Where rows are split over devices `[3]`: then also the number of the first of these `rows`, as
    `dropout_bits` counts them, among all.

    Raises:
      ValueError: they are split over a mesh axis that is not named `data` (`shards`).
    """
    shards.require_counted("dropout_key")
    seed = dropout_seed(key)
    if not shards.is_split():
        return seed
    return jnp.append(seed, shards.first_row(rows).astype(jnp.uint32))


def dropout_bits_of(words, row, counter) -> jax.Array:
    """`dropout_bits` inside a kernel that was given `words`; `row` counts its own rows."""
    if words.shape[0] == 3:
        row += words[2].astype(jnp.int32)
    return dropout_bits(words[0], words[1], row, counter)


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Sets a share `rate` of `[..., channels]` to zero and scales the rest up.

    `dropout_bits` decides, with the index of the row, counted over all leading axes (and over all
    devices that rows are split over), and of the channel.
    """
    return apply_dropout(x, rate, dropout_words(key, math.prod(x.shape[:-1])))


def apply_dropout(x: jax.Array, rate: float, words: jax.Array | None) -> jax.Array:
    """`dropout` by its `dropout_words`; the identity without them."""
    if words is None:
        return x
    rows = jnp.arange(math.prod(x.shape[:-1])).reshape(*x.shape[:-1], 1)
    bits = dropout_bits_of(words, rows, jnp.arange(x.shape[-1]))
    kept = bits >= jnp.uint32(dropout_threshold(rate))
    return jnp.where(kept, x / (1 - rate), 0)
