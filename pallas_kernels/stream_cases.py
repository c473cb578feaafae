"""What `compile` compiles of the kernels around the residual stream and of those of a block."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import activation, linear, readout, residual, rows, targets

DROPOUT = 0.1
VOCABULARY = 13
# And the kernels of each, forward first.
OPERATIONS = {
    "add_and_norm": ("add_and_norm_forward", "add_and_norm_backward"),
    "add_and_score": ("add_and_score_forward", "add_and_score_backward"),
    "gelu": ("gelu_forward", "gelu_backward"),
    "linear": ("product", "weight_gradients"),
    "mlp": ("gelu_product", "deep_product", "product_times"),
}
# Those that are for some widths only, and the narrowest and widest.
WIDTHS = {
    "add_and_score": (1, readout.LARGEST_WIDTH),
    "linear": (linear.NARROWEST, linear.LONGEST // 4),
    "mlp": (linear.NARROWEST, linear.LONGEST // 4),
}


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
        return self.operation not in ("add_and_norm", "gelu")

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of its kernels."""
        return OPERATIONS[self.operation]

    def extras(self) -> str:
        """What comes beside the stream, in words."""
        return {
            "add_and_norm": f"shift, dropout {DROPOUT:g}",
            "add_and_score": f"{VOCABULARY} tokens, dropout {DROPOUT:g}",
            "linear": "to three times the width",
            "mlp": "four times the width inside",
        }.get(self.operation, "")

    def program(self, target: str) -> tuple[Callable, tuple]:
        """A function of all inputs and gradients of outputs, and their shapes."""
        array, (tokens, width) = jax.ShapeDtypeStruct, self.shape
        stream, update = array((tokens, width), jnp.float32), array((tokens, width), self.dtype)
        scale, seed = array((width,), jnp.float32), array((2,), jnp.uint32)
        if self.operation == "gelu":
            numbers = array((4 * tokens * width,), self.dtype)
            return _with_gradients(lambda u: activation.run_kernels(u, (), False), target), (
                (numbers,),
                numbers,
                (),
            )
        if self.operation == "add_and_norm":
            options = self._options(residual.NUMBERS_A_PROGRAM, residual.NUM_WARPS)
            function = lambda *given: residual.run_kernels(given[:-1], given[-1], options)  # noqa: E731
            return _with_gradients(function, target), (
                (stream, update, scale, scale),
                (stream, update),
                (seed,),
            )
        if self.operation in ("linear", "mlp"):
            return self._products(target, update)
        options = self._options(readout.numbers_held(width), readout.num_warps(width))
        function = lambda *given: readout.run_kernels(given[:4], given[4:], options)  # noqa: E731
        wanted, weights = array((tokens,), jnp.int32), array((tokens,), jnp.float32)
        return _with_gradients(function, target), (
            (stream, update, scale, array((VOCABULARY, width), self.dtype)),
            (stream, array((), jnp.float32)),
            (wanted, weights, seed),
        )

    def _products(self, target: str, x):
        tokens, width = self.shape
        matrix = lambda *sides: jax.ShapeDtypeStruct(sides, jnp.float32)  # noqa: E731
        if self.operation == "linear":
            function, matrices, columns = linear.linear, (matrix(width, 3 * width),), 3 * width
        else:
            function, columns = linear.mlp, width
            matrices = matrix(width, 4 * width), matrix(4 * width, width)
        function = functools.partial(function, dtype=self.dtype)
        made = jax.ShapeDtypeStruct((tokens, columns), self.dtype)
        return _with_gradients(function, target), ((x, *matrices), made, ())

    def _options(self, held: int, num_warps: int) -> rows.Options:
        return rows.Options(
            *self.shape, held, num_warps, rate=DROPOUT, dtype=self.dtype, interpret=False
        )


def _with_gradients(function: Callable, target: str) -> Callable:
    def both(differentiated, gradients, others):
        with targets.compiling_for(target):
            out, pull = jax.vjp(lambda *x: function(*x, *others), *differentiated)
            return out, pull(gradients)

    return both


def _is_for(operation: str, width: int) -> bool:
    narrowest, widest = WIDTHS.get(operation, (1, width))
    return narrowest <= width <= widest


STREAM_CASES = [
    StreamCase(operation, shape)
    for operation in OPERATIONS
    for shape in SHAPES
    if _is_for(operation, shape.width)
]
