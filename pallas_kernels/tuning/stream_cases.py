"""The operations around the residual stream, and those of a block, as cases: forward and backward,
with all that they can be asked for."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import targets
from pallas_kernels.ops import add_layer_norm, cross_entropy, gelu, linear, matmul, rows
from pallas_kernels.tuning.shapes import StreamShape

VOCABULARY = 13
# And the kernels of each, forward first.
OPERATIONS = {
    "add_layer_norm": ("add_layer_norm_forward", "add_layer_norm_backward"),
    "add_layer_norm_cross_entropy": (
        "add_layer_norm_cross_entropy_forward",
        "add_layer_norm_cross_entropy_backward",
    ),
    "gelu": ("gelu_forward", "gelu_backward"),
    "linear": ("matmul", "weight_grads"),
    "mlp": ("matmul_gelu", "matmul_deep", "matmul_mul"),
}
WITHOUT_PRODUCTS = ("add_layer_norm", "gelu")
# Those that are for some widths only, and the narrowest and widest.
WIDTHS = {
    "add_layer_norm_cross_entropy": (1, cross_entropy.LARGEST_WIDTH),
    "linear": (matmul.NARROWEST, matmul.LONGEST // 4),
    "mlp": (matmul.NARROWEST, matmul.LONGEST // 4),
}
# A training step of the configurations, 128 rows of 64 tokens, and of the narrowest, 256 of 24.
SHAPES = tuple(StreamShape(8192, width) for width in (128, 256, 768)) + (StreamShape(6144, 8),)


def is_for(operation: str, width: int) -> bool:
    """Whether an operation has kernels for a stream of so many channels."""
    narrowest, widest = WIDTHS.get(operation, (1, width))
    return narrowest <= width <= widest


def kernels(case, target: str) -> tuple[str, ...]:
    """Names of its kernels on a target, forward first."""
    return OPERATIONS[case.operation]


def asked(case) -> str:
    """What is asked for beside its main inputs, in words."""
    return {
        "add_layer_norm": f"shift, dropout {case.rate:g}",
        "add_layer_norm_cross_entropy": f"{VOCABULARY} tokens, dropout {case.rate:g}",
        "linear": "to three times the width",
        "mlp": "four times the width inside",
    }.get(case.operation, "")


def program(case, target: str) -> tuple[Callable, tuple]:
    """A function of all inputs and gradients of outputs; their shapes."""
    array, (tokens, width) = jax.ShapeDtypeStruct, case.shape
    stream, update = array((tokens, width), jnp.float32), array((tokens, width), case.dtype)
    scale, seed = array((width,), jnp.float32), array((2,), jnp.uint32)
    if case.operation == "gelu":
        numbers = array((4 * tokens * width,), case.dtype)
        return _with_gradients(lambda u: gelu.run_kernels(u, (), False), target), (
            (numbers,),
            numbers,
            (),
        )
    if case.operation == "add_layer_norm":
        options = _options(case, add_layer_norm.NUMBERS_A_PROGRAM, add_layer_norm.NUM_WARPS)
        function = lambda *given: add_layer_norm.run_kernels(given[:-1], given[-1], options)  # noqa: E731
        return _with_gradients(function, target), (
            (stream, update, scale, scale),
            (stream, update),
            (seed,),
        )
    if case.operation in ("linear", "mlp"):
        return _products(case, target, update)
    options = _options(case, cross_entropy.numbers_held(width), cross_entropy.num_warps(width))
    function = lambda *given: cross_entropy.run_kernels(given[:4], given[4:], options)  # noqa: E731
    wanted, weights = array((tokens,), jnp.int32), array((tokens,), jnp.float32)
    return _with_gradients(function, target), (
        (stream, update, scale, array((VOCABULARY, width), case.dtype)),
        (stream, array((), jnp.float32)),
        (wanted, weights, seed),
    )


def _products(case, target: str, x):
    tokens, width = case.shape
    matrix = lambda *sides: jax.ShapeDtypeStruct(sides, jnp.float32)  # noqa: E731
    if case.operation == "linear":
        function, matrices, columns = linear.linear, (matrix(width, 3 * width),), 3 * width
    else:
        function, columns = linear.mlp, width
        matrices = matrix(width, 4 * width), matrix(4 * width, width)
    function = functools.partial(function, dtype=case.dtype)
    made = jax.ShapeDtypeStruct((tokens, columns), case.dtype)
    return _with_gradients(function, target), ((x, *matrices), made, ())


def _options(case, held: int, num_warps: int) -> rows.Options:
    return rows.Options(
        *case.shape, held, num_warps, rate=case.rate, dtype=case.dtype, interpret=False
    )


def _with_gradients(function: Callable, target: str) -> Callable:
    def both(differentiated, gradients, others):
        with targets.compiling_for(target):
            out, pull = jax.vjp(lambda *x: function(*x, *others), *differentiated)
            return out, pull(gradients)

    return both
