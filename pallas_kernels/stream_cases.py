"""What `compile` compiles of the kernels around the residual stream."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import activation, readout, residual, rows

DROPOUT = 0.1
VOCABULARY = 13
OPERATIONS = ("add_and_norm", "add_and_score", "gelu")


class StreamShape(NamedTuple):
    """Tokens of a batch, and channels of each."""

    tokens: int
    width: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.width}"


# A training step of the configurations, 128 rows of 64 tokens, and of the narrowest, 256 of 24.
SHAPES = tuple(StreamShape(8192, width) for width in (128, 256, 768)) + (StreamShape(6144, 8),)


@dataclass(frozen=True)
class StreamCase:
    """One operation forward and backward, with all that it can be asked for.

    operation: of `OPERATIONS`; the numbers of "gelu" are four times the shape's.
    shape: of the stream. dtype: of the products around it.
    """

    operation: str
    shape: StreamShape
    dtype: str = "bfloat16"

    # Where nothing is multiplied, no tensor cores are missed.
    @property
    def multiplies(self) -> bool:
        return self.operation == "add_and_score"

    @property
    def kernels(self) -> tuple[str, str]:
        """Names of its kernels."""
        return f"{self.operation}_forward", f"{self.operation}_backward"

    def extras(self) -> str:
        """What comes beside the stream, in words."""
        return {"gelu": "", "add_and_norm": f"shift, dropout {DROPOUT:g}"}.get(
            self.operation, f"{VOCABULARY} tokens, dropout {DROPOUT:g}"
        )

    def program(self) -> tuple[Callable, tuple]:
        """A function of all inputs and gradients of outputs, and their shapes."""
        array, (tokens, width) = jax.ShapeDtypeStruct, self.shape
        stream, update = array((tokens, width), jnp.float32), array((tokens, width), self.dtype)
        scale, seed = array((width,), jnp.float32), array((2,), jnp.uint32)
        if self.operation == "gelu":
            numbers = array((4 * tokens * width,), self.dtype)
            return _with_gradients(lambda u: activation.run_kernels(u, False)), (
                (numbers,),
                numbers,
                (),
            )
        if self.operation == "add_and_norm":
            options = self._options(residual.NUMBERS_A_PROGRAM, residual.NUM_WARPS)
            function = lambda *given: residual.run_kernels(*given, options)  # noqa: E731
            return _with_gradients(function), (
                (stream, update, scale, scale),
                (stream, update),
                (seed,),
            )
        options = self._options(readout.numbers_held(width), readout.NUM_WARPS)
        function = lambda *given: readout.run_kernels(*given, options)  # noqa: E731
        wanted, weights = array((tokens,), jnp.int32), array((tokens,), jnp.float32)
        return _with_gradients(function), (
            (stream, update, scale, array((VOCABULARY, width), self.dtype)),
            (stream, array((), jnp.float32)),
            (wanted, weights, seed),
        )

    def _options(self, held: int, num_warps: int) -> rows.Options:
        return rows.Options(
            *self.shape, held, num_warps, rate=DROPOUT, dtype=self.dtype, interpret=False
        )


def _with_gradients(function: Callable) -> Callable:
    def both(differentiated, gradients, others):
        out, pull = jax.vjp(lambda *x: function(*x, *others), *differentiated)
        return out, pull(gradients)

    return both


# `add_and_score` leaves wide streams to plain `jnp`.
STREAM_CASES = [
    StreamCase(operation, shape)
    for operation in OPERATIONS
    for shape in SHAPES
    if operation != "add_and_score" or shape.width <= readout.LARGEST_WIDTH
]
