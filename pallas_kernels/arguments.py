"""What public functions ask of their arguments: one line for what does not fit, naming it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

FLOATS = ("float32", "bfloat16", "float16")
# Of functions that have a plain version beside their kernels.
KERNELS_OR_PLAIN = ("pallas", "xla")


def require_shape(name: str, array, *shapes: tuple, words: str | None = None) -> None:
    """Raises ValueError unless the array has one of the shapes; `words` say which are allowed."""
    if jnp.shape(array) not in shapes:
        expected = words or " or ".join(map(_brackets, shapes))
        raise ValueError(f"{_are(name)} {_brackets(jnp.shape(array))}: expected {expected}")


def require_dtype(name: str, array, *dtypes) -> None:
    """Raises ValueError unless the array has one of the dtypes."""
    names = [jnp.dtype(dtype).name for dtype in dtypes]
    if jnp.result_type(array).name not in names:
        raise ValueError(f"{_are(name)} {jnp.result_type(array).name}: expected {', '.join(names)}")


def whole_numbers(name: str, array) -> jax.Array:
    """The array as int32, from integers of any type.

    Raises:
      ValueError: it has numbers of another kind.
    """
    dtype = jnp.result_type(array)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{_are(name)} {dtype.name}: expected integers")
    return jnp.asarray(array).astype(jnp.int32)


def token_positions(positions, batch: int, length: int) -> jax.Array:
    """The positions of tokens as int32, one for each token of a sequence or of every sequence.

    Raises:
      ValueError: they have another shape than `[length]` or `[batch, length]`, or are no integers.
    """
    shapes = (length,), (1, length), (batch, length)
    words = f"[{length}] or [batch, length]"
    require_shape("positions", positions, *shapes, words=words)
    return whole_numbers("positions", positions)


def require_one_of(name: str, value, allowed: Sequence) -> None:
    """Raises ValueError for a value that is not allowed."""
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}: one of {', '.join(map(repr, allowed))}")


def require_dropout(rate: float, key) -> None:
    """Raises ValueError for a rate outside of [0, 1), and for what is no one PRNG key."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate = {rate}: must be at least 0 and below 1")
    if key is None:
        return
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = isinstance(key, jax.Array) and key.dtype == jnp.uint32
    if not (typed and key.ndim == 0 or raw and key.ndim == 1):
        said = f"{key.dtype.name}{_brackets(key.shape)}" if hasattr(key, "dtype") else repr(key)
        raise ValueError(f"dropout_key = {said}: expected one PRNG key, as jax.random.key gives it")


def _are(name: str) -> str:
    return f"{name} are" if name.endswith("s") else f"{name} is"


def _brackets(shape: tuple) -> str:
    return f"[{', '.join(map(str, shape))}]"
