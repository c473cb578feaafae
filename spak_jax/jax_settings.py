"""JAX's settings that numbers depend on, as all results here were made with.

A user's program, or the environment (`JAX_ENABLE_X64`, `JAX_DEFAULT_PRNG_IMPL`, ...), may have
others. The same seed is to draw the same problems and the same weights all the same, and a
checkpoint to be read. `JAX_DEFAULT_MATMUL_PRECISION` is left to the user.
"""

import contextlib
from collections.abc import Iterator

import jax

PRNG = "threefry2x32"


@contextlib.contextmanager
def fixed() -> Iterator[None]:
    """Within it, and within what it decorates, JAX's settings are those of our results."""
    with (
        jax.enable_x64(False),
        jax.default_prng_impl(PRNG),
        jax.threefry_partitionable(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def key(seed: int | jax.Array) -> jax.Array:
    """The PRNG key of a seed, of one kind whatever the default one is."""
    return jax.random.key(seed, impl=PRNG)
