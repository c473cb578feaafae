"""Products of many tokens with a block's matrices in Triton, and those that make its gradients.

The GELU and its slope are made of a product that is still on the chip. Nothing is tried out while
compiling, as XLA does with its own products. Tiles are whole: sizes that are no multiples of them
are for others.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import targets
from pallas_kernels.ops import gelu, instructions

# What every side must be a multiple of, and the longest: longer ones are large enough for cuBLAS.
NARROWEST, LONGEST = 64, 1024
# Tokens up to which kernels are taken, and up to which, those of all seeds together, they make
# plain products, too. On an H200 XLA's own products are faster at 16,384 tokens, its whole block at
# 32,768.
MOST_TOKENS, MOST_OF_A_PRODUCT = 2**14, 2**13


class BlockSizes(NamedTuple):
    """How a product is cut and launched.

    block_rows, block_columns: of what a program makes. block_inner: of the summed axis, a step.
    """

    block_rows: int
    block_columns: int
    block_inner: int
    num_warps: int
    num_stages: int


# All fit the 99 KiB of shared memory that a block of the smallest target has. Chosen by time on an
# H200 at 8,192 tokens of 256 channels, for one seed and five side by side. Small tiles let one
# program's GELU run beside another's product; long sums (from `DEEP_FROM` on) want more stages.
PRODUCT = BlockSizes(128, 128, 64, num_warps=4, num_stages=2)
DEEP, DEEP_FROM = BlockSizes(64, 128, 64, num_warps=4, num_stages=4), 512
GELU = BlockSizes(64, 64, 64, num_warps=4, num_stages=3)
TIMES = BlockSizes(64, 128, 64, num_warps=4, num_stages=2)
GRADIENT = BlockSizes(128, 128, 64, num_warps=4, num_stages=3)
# Programs that keep every multiprocessor busy with gradients of weights.
ENOUGH_PROGRAMS = 96


class DeferredWeightGrad(NamedTuple):
    """The two sides of the product that is a matrix's gradient, `x.T @ d_y`, yet to be multiplied.

    x: `[tokens, inputs]`, what the matrix multiplies. d_y: `[tokens, outputs]`, the gradient of
    what it makes.
    """

    x: Any
    d_y: Any

    @staticmethod
    def zeros(tokens: int, inputs: int, outputs: int, dtype) -> "DeferredWeightGrad":
        """What to ask for one with; nobody reads it."""
        return DeferredWeightGrad(
            jnp.zeros((tokens, inputs), dtype), jnp.zeros((tokens, outputs), dtype)
        )


def supports(tokens: int, inputs: int, outputs: int, dtype) -> bool:
    """Whether the kernels are for a product of such sizes on the device at hand."""
    whole = all(size % NARROWEST == 0 and size <= LONGEST for size in (inputs, outputs))
    whole = whole and tokens % PRODUCT.block_rows == 0 and 0 < tokens <= MOST_TOKENS
    return whole and targets.kernels_run() and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)


def matmul(a: jax.Array, b: jax.Array, *, transpose_b: bool = False, interpret: bool) -> jax.Array:
    """`a @ b`, or `a @ b.T`, in the dtype of a: `[rows, inner]` times `[inner, columns]`."""
    made = functools.partial(_matmul_of_seeds, transpose_b=transpose_b, interpret=interpret)
    alone = jax.custom_batching.custom_vmap(functools.partial(made, 1))

    @alone.def_vmap
    def together(seeds, batched, a, b):
        axes = tuple(0 if each else None for each in batched)
        return jax.vmap(functools.partial(made, seeds), axes)(a, b), True

    return alone(a, b)


def _matmul_of_seeds(seeds: int, a, b, *, transpose_b: bool, interpret: bool) -> jax.Array:
    """`matmul` of one of so many seeds side by side: several are enough work for XLA's own."""
    if seeds * len(a) > MOST_OF_A_PRODUCT:
        return a @ (b.T if transpose_b else b)
    deep = a.shape[1] >= DEEP_FROM
    name, block_sizes = ("matmul_deep", DEEP) if deep else ("matmul", PRODUCT)
    return _call(_matmul_kernel, name, block_sizes, a, b, (), transpose_b, 1, interpret)[0]


def matmul_gelu(a: jax.Array, b: jax.Array, *, slopes: bool, interpret: bool) -> list[jax.Array]:
    """The GELU (`gelu.gelu`) of `a @ b`, and with `slopes` its slope, in the dtype of a."""
    kernel = functools.partial(_gelu_kernel, interpret=interpret)
    return _call(kernel, "matmul_gelu", GELU, a, b, (), False, 1 + slopes, interpret)


def matmul_mul(a: jax.Array, b: jax.Array, by: jax.Array, *, interpret: bool) -> jax.Array:
    """`(a @ b.T) * by`, in the dtype of a."""
    return _call(_mul_kernel, "matmul_mul", TIMES, a, b, (by,), True, 1, interpret)[0]


def _call(
    kernel,
    name,
    block_sizes: BlockSizes,
    a,
    b,
    beside,
    transpose_b: bool,
    outputs: int,
    interpret: bool,
):
    """A kernel over all tiles of a product; `beside` and the outputs are cut as the product is."""
    (count, inner), columns = a.shape, b.shape[0 if transpose_b else 1]
    block_sizes = block_sizes._replace(block_columns=math.gcd(block_sizes.block_columns, columns))
    # Programs that share rows follow one another: what they read of `a` is still in the cache.
    made = pl.BlockSpec((block_sizes.block_rows, block_sizes.block_columns), lambda j, i: (i, j))
    if transpose_b:
        right = pl.BlockSpec((block_sizes.block_columns, inner), lambda j, i: (j, 0))
    else:
        right = pl.BlockSpec((inner, block_sizes.block_columns), lambda j, i: (0, j))
    return pl.pallas_call(
        lambda a_ref, b_ref, *refs: kernel(_sum(a_ref, b_ref, block_sizes, transpose_b), *refs),
        grid=(columns // block_sizes.block_columns, count // block_sizes.block_rows),
        in_specs=[pl.BlockSpec((block_sizes.block_rows, inner), lambda j, i: (i, 0)), right]
        + [made] * len(beside),
        out_specs=[made] * outputs,
        out_shape=[jax.ShapeDtypeStruct((count, columns), a.dtype)] * outputs,
        compiler_params=_compiler_params(block_sizes),
        interpret=interpret,
        name=name,
    )(a, b, *beside)


def _sum(a_ref, b_ref, block_sizes: BlockSizes, transpose_b: bool) -> jax.Array:
    """A program's tile of `a @ b`, or of `a @ b.T`, in float32."""

    def step(k, total):
        part = pl.ds(k * block_sizes.block_inner, block_sizes.block_inner)
        a = plgpu.load(a_ref.at[:, part])
        b = plgpu.load(b_ref.at[:, part] if transpose_b else b_ref.at[part, :])
        return total + instructions.dot(a, b, transpose_b=transpose_b)

    total = jnp.zeros((block_sizes.block_rows, block_sizes.block_columns), jnp.float32)
    return jax.lax.fori_loop(0, a_ref.shape[1] // block_sizes.block_inner, step, total)


def _matmul_kernel(total, out_ref):
    plgpu.store(out_ref, total.astype(out_ref.dtype))


def _gelu_kernel(u, out_ref, slope_ref=None, *, interpret):
    below, bell = gelu.normal(u, interpret)
    plgpu.store(out_ref, (u * below).astype(out_ref.dtype))
    if slope_ref is not None:
        slope = gelu.slope(u, below, bell, interpret)
        plgpu.store(slope_ref, slope.astype(slope_ref.dtype))


def _mul_kernel(total, by_ref, out_ref):
    by = plgpu.load(by_ref).astype(jnp.float32)
    plgpu.store(out_ref, (total * by).astype(out_ref.dtype))


def weight_grads(
    deferred: Sequence[DeferredWeightGrad], *, interpret: bool | None = None
) -> jax.Array:
    """The gradients of matrices of one size, all in one launch.

    Args:
      deferred: the two sides of each.
      interpret: whether the kernel is interpreted; None where there is no GPU.

    Returns:
      float32 `[matrices, parts, inputs, outputs]`: sums over parts of the tokens, to be added up.
    """
    interpret = not targets.on_gpu() if interpret is None else interpret
    xs, d_ys = map(list, zip(*deferred, strict=True))
    (count, inputs), outputs = xs[0].shape, d_ys[0].shape[1]
    block_sizes = GRADIENT._replace(
        block_rows=math.gcd(GRADIENT.block_rows, inputs),
        block_columns=math.gcd(GRADIENT.block_columns, outputs),
    )
    across = outputs // block_sizes.block_columns
    tiles = inputs // block_sizes.block_rows * across
    parts = 1
    while (
        tiles * parts * len(xs) < ENOUGH_PROGRAMS
        and count % (2 * parts * block_sizes.block_inner) == 0
    ):
        parts *= 2

    def whole_part(columns, place):
        return pl.BlockSpec((count // parts, columns), place)

    return pl.pallas_call(
        functools.partial(_weight_grads_kernel, block_sizes=block_sizes),
        grid=(tiles, parts, len(xs)),
        in_specs=[
            [whole_part(block_sizes.block_rows, lambda t, part, _: (part, t // across))] * len(xs),
            [whole_part(block_sizes.block_columns, lambda t, part, _: (part, t % across))]
            * len(xs),
        ],
        out_specs=pl.BlockSpec(
            (None, None, block_sizes.block_rows, block_sizes.block_columns),
            lambda t, part, pair: (pair, part, t // across, t % across),
        ),
        out_shape=jax.ShapeDtypeStruct((len(xs), parts, inputs, outputs), jnp.float32),
        compiler_params=_compiler_params(block_sizes),
        interpret=interpret,
        name="weight_grads",
    )(xs, d_ys)


def _weight_grads_kernel(x_refs, d_y_refs, out_ref, *, block_sizes: BlockSizes):
    # A program works on one matrix, which its place in the grid tells.
    for pair, refs in enumerate(zip(x_refs, d_y_refs, strict=True)):
        pl.when(pl.program_id(2) == pair)(
            functools.partial(_one_weight_grad, *refs, out_ref, block_sizes)
        )


def _one_weight_grad(x_ref, d_y_ref, out_ref, block_sizes: BlockSizes):
    def step(k, total):
        part = pl.ds(k * block_sizes.block_inner, block_sizes.block_inner)
        x, d_y = plgpu.load(x_ref.at[part, :]), plgpu.load(d_y_ref.at[part, :])
        return total + instructions.dot(x, d_y, transpose_a=True)

    total = jnp.zeros(out_ref.shape, jnp.float32)
    plgpu.store(
        out_ref, jax.lax.fori_loop(0, x_ref.shape[0] // block_sizes.block_inner, step, total)
    )


def _compiler_params(block_sizes: BlockSizes):
    return plgpu.CompilerParams(num_warps=block_sizes.num_warps, num_stages=block_sizes.num_stages)
