"""Products of many tokens with a block's matrices, forward and backward, and an MLP of two of them.

Three things are done that XLA leaves undone:
- The GELU and its slope are made of a product that is still on the chip, and the way back
  multiplies by the slope where it has just made the product that it belongs to.
- Weights' gradients need not be made block by block. Given `Operands`, the way back gives the two
  sides of a gradient's product as the "gradient" of those, and none of the matrix: whoever asked
  makes those of all blocks in one launch (`gradients`). One such product has too few tiles for a
  GPU, and has to be cut along its sum and added up again.
- Nothing is tried out while compiling, as XLA does with its own products.

Tiles are whole: sizes that are no multiples of them are left to XLA, as are those that it is faster
at.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import activation, arguments, targets, tile
from pallas_kernels.derivatives import differentiable

# What every side must be a multiple of, and the longest: longer ones are large enough for cuBLAS.
NARROWEST, LONGEST = 64, 1024
# Tokens up to which kernels are taken, and up to which, those of all seeds together, they make
# plain products, too. On an H200 XLA's own products are faster at 16,384 tokens, its whole block at
# 32,768.
MOST_TOKENS, MOST_OF_A_PRODUCT = 2**14, 2**13


class Tile(NamedTuple):
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
PRODUCT = Tile(128, 128, 64, num_warps=4, num_stages=2)
DEEP, DEEP_FROM = Tile(64, 128, 64, num_warps=4, num_stages=4), 512
GELU = Tile(64, 64, 64, num_warps=4, num_stages=3)
TIMES = Tile(64, 128, 64, num_warps=4, num_stages=2)
GRADIENT = Tile(128, 128, 64, num_warps=4, num_stages=3)
# Programs that keep every multiprocessor busy with gradients of weights.
ENOUGH_PROGRAMS = 96


class Operands(NamedTuple):
    """Of the product that is a matrix's gradient, `x.T @ d_y`.

    x: `[tokens, inputs]`, what the matrix multiplies. d_y: `[tokens, outputs]`, the gradient of
    what it makes.
    """

    x: Any
    d_y: Any


class _Options(NamedTuple):
    """What is fixed when a kernel is compiled.

    dtype: of the products. deferred: whether operands are asked for instead of the gradients of
    matrices. interpret: whether the kernels are interpreted.
    """

    dtype: str
    deferred: bool
    interpret: bool


def takes(tokens: int, inputs: int, outputs: int, dtype) -> bool:
    """Whether the kernels are for a product of such sizes on the device at hand."""
    whole = all(size % NARROWEST == 0 and size <= LONGEST for size in (inputs, outputs))
    whole = whole and tokens % PRODUCT.block_rows == 0 and 0 < tokens <= MOST_TOKENS
    return whole and targets.kernels_run() and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)


def no_operands(tokens: int, inputs: int, outputs: int, dtype) -> Operands:
    """What to ask for operands with: zeros, which nobody reads."""
    return Operands(jnp.zeros((tokens, inputs), dtype), jnp.zeros((tokens, outputs), dtype))


def linear(
    x: jax.Array,
    weights: jax.Array,
    *,
    dtype,
    operands: Operands | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`x @ weights`, added up in float32.

    Args:
      x: `[..., inputs]`.
      weights: float32 `[inputs, outputs]`.
      dtype: that both are multiplied in.
      operands: asks for those of the weights' gradient instead of the gradient, where the kernels
        are for such sizes (`takes`); None for the gradient.
      implementation: "xla", plain `jnp`; None takes the kernels where they are for such sizes.

    Returns:
      `[..., outputs]` in `dtype`.

    Raises:
      ValueError: shapes that do not go together, or another implementation, naming them.
    """
    arguments.require_one_of("implementation", implementation, ("xla", None))
    inputs, outputs = _sides("weights", weights, x)
    if implementation == "xla" or not takes(math.prod(x.shape[:-1]), inputs, outputs, dtype):
        return x.astype(dtype) @ weights.astype(dtype)
    flat = x.reshape(-1, inputs).astype(dtype)
    made = _linear((flat, weights, operands), (), _options(dtype, operands))
    return made.reshape(*x.shape[:-1], outputs)


def mlp(
    x: jax.Array,
    inner: jax.Array,
    outer: jax.Array,
    *,
    dtype,
    operands: tuple[Operands, Operands] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`gelu(x @ inner) @ outer`.

    Args:
      x: `[..., width]`.
      inner, outer: float32 `[width, hidden]` and `[hidden, width]`.
      dtype, operands, implementation: as of `linear`, operands for both matrices.

    Returns:
      As x, in `dtype`.

    Raises:
      ValueError: shapes that do not go together, or another implementation, naming them.
    """
    arguments.require_one_of("implementation", implementation, ("xla", None))
    width, hidden = _sides("inner", inner, x)
    arguments.require_shape("outer", outer, (hidden, width))
    if implementation == "xla" or not takes(math.prod(x.shape[:-1]), width, hidden, dtype):
        made = x.astype(dtype) @ inner.astype(dtype)
        return activation.gelu(made, implementation) @ outer.astype(dtype)
    flat = x.reshape(-1, width).astype(dtype)
    return _mlp((flat, inner, outer, operands), (), _options(dtype, operands)).reshape(x.shape)


def _sides(name: str, matrix, x) -> tuple[int, int]:
    """Inputs and outputs of a matrix that multiplies the last axis of x."""
    inputs = jnp.shape(x)[-1] if jnp.ndim(x) else None
    if jnp.ndim(matrix) != 2 or matrix.shape[0] != inputs:
        raise ValueError(f"{name} is {list(jnp.shape(matrix))}: expected [{inputs}, outputs]")
    return matrix.shape


def _options(dtype, operands) -> _Options:
    return _Options(jnp.dtype(dtype).name, operands is not None, not targets.on_gpu())


def _linear_forward(given, _, options):
    x, weights, _ = given
    matrix = weights.astype(options.dtype)
    return product(x, matrix, interpret=options.interpret), matrix


def _linear_backward(given, _, matrix, d_out, options):
    x, *_ = given
    d_x = product(d_out, matrix, transpose_b=True, interpret=options.interpret)
    return d_x, *_of_matrix(x, d_out, options)


def _linear_plain(given, _, options):
    x, weights, _ = given
    return x @ weights.astype(options.dtype)


# Of `((x, weights, operands), (), options)`.
_linear = differentiable(
    lambda *given: _linear_forward(*given)[0],
    _linear_plain,
    gradient=(_linear_forward, _linear_backward),
)


def _mlp_run(given, _, options):
    x, inner, outer, _ = given
    inner, outer = inner.astype(options.dtype), outer.astype(options.dtype)
    (hidden,) = gelu_product(x, inner, slopes=False, interpret=options.interpret)
    return product(hidden, outer, interpret=options.interpret)


def _mlp_forward(given, _, options):
    x, inner, outer, _ = given
    inner, outer = inner.astype(options.dtype), outer.astype(options.dtype)
    hidden, slope = gelu_product(x, inner, slopes=True, interpret=options.interpret)
    out = product(hidden, outer, interpret=options.interpret)
    return out, (inner, outer, hidden, slope)


def _mlp_backward(given, _, kept, d_out, options):
    (x, *_), (inner, outer, hidden, slope) = given, kept
    d_made = product_times(d_out, outer, slope, interpret=options.interpret)
    d_x = product(d_made, inner, transpose_b=True, interpret=options.interpret)
    d_inner, of_inner = _of_matrix(x, d_made, options)
    d_outer, of_outer = _of_matrix(hidden, d_out, options)
    return d_x, d_inner, d_outer, (of_inner, of_outer) if options.deferred else None


def _mlp_plain(given, _, options):
    x, inner, outer, _ = given
    inner, outer = inner.astype(options.dtype), outer.astype(options.dtype)
    made = jnp.matmul(x, inner, preferred_element_type=jnp.float32)
    return activation.plain(made).astype(options.dtype) @ outer


# Of `((x, inner, outer, operands), (), options)`.
_mlp = differentiable(_mlp_run, _mlp_plain, gradient=(_mlp_forward, _mlp_backward))


def _of_matrix(x, d_y, options: _Options):
    """The gradient of a matrix that made y of x, and the operands of it: one of the two."""
    if options.deferred:
        return None, Operands(x, d_y)
    pair = Operands(x, d_y)
    return gradients([pair], interpret=options.interpret).sum((0, 1)), None


def product(a: jax.Array, b: jax.Array, *, transpose_b: bool = False, interpret: bool) -> jax.Array:
    """`a @ b`, or `a @ b.T`, in the dtype of a: `[rows, inner]` times `[inner, columns]`."""
    made = functools.partial(_product_of_seeds, transpose_b=transpose_b, interpret=interpret)
    alone = jax.custom_batching.custom_vmap(functools.partial(made, 1))

    @alone.def_vmap
    def together(seeds, batched, a, b):
        axes = tuple(0 if each else None for each in batched)
        return jax.vmap(functools.partial(made, seeds), axes)(a, b), True

    return alone(a, b)


def _product_of_seeds(seeds: int, a, b, *, transpose_b: bool, interpret: bool) -> jax.Array:
    """`product` of one of so many seeds side by side: several are enough work for XLA's own."""
    if seeds * len(a) > MOST_OF_A_PRODUCT:
        return a @ (b.T if transpose_b else b)
    deep = a.shape[1] >= DEEP_FROM
    name, cut = ("deep_product", DEEP) if deep else ("product", PRODUCT)
    return _call(_product_kernel, name, cut, a, b, (), transpose_b, 1, interpret)[0]


def gelu_product(a: jax.Array, b: jax.Array, *, slopes: bool, interpret: bool) -> list[jax.Array]:
    """The GELU (`activation.gelu`) of `a @ b`, and with `slopes` its slope, in the dtype of a."""
    kernel = functools.partial(_gelu_kernel, interpret=interpret)
    return _call(kernel, "gelu_product", GELU, a, b, (), False, 1 + slopes, interpret)


def product_times(a: jax.Array, b: jax.Array, by: jax.Array, *, interpret: bool) -> jax.Array:
    """`(a @ b.T) * by`, in the dtype of a."""
    return _call(_times_kernel, "product_times", TIMES, a, b, (by,), True, 1, interpret)[0]


def _call(kernel, name, cut: Tile, a, b, beside, transpose_b: bool, outputs: int, interpret: bool):
    """A kernel over all tiles of a product; `beside` and the outputs are cut as the product is."""
    (count, inner), columns = a.shape, b.shape[0 if transpose_b else 1]
    cut = cut._replace(block_columns=math.gcd(cut.block_columns, columns))
    # Programs that share rows follow one another: what they read of `a` is still in the cache.
    made = pl.BlockSpec((cut.block_rows, cut.block_columns), lambda j, i: (i, j))
    if transpose_b:
        right = pl.BlockSpec((cut.block_columns, inner), lambda j, i: (j, 0))
    else:
        right = pl.BlockSpec((inner, cut.block_columns), lambda j, i: (0, j))
    return pl.pallas_call(
        lambda a_ref, b_ref, *refs: kernel(_sum(a_ref, b_ref, cut, transpose_b), *refs),
        grid=(columns // cut.block_columns, count // cut.block_rows),
        in_specs=[pl.BlockSpec((cut.block_rows, inner), lambda j, i: (i, 0)), right]
        + [made] * len(beside),
        out_specs=[made] * outputs,
        out_shape=[jax.ShapeDtypeStruct((count, columns), a.dtype)] * outputs,
        compiler_params=_compiler_params(cut),
        interpret=interpret,
        name=name,
    )(a, b, *beside)


def _sum(a_ref, b_ref, cut: Tile, transpose_b: bool) -> jax.Array:
    """A program's tile of `a @ b`, or of `a @ b.T`, in float32."""

    def step(k, total):
        part = pl.ds(k * cut.block_inner, cut.block_inner)
        a = plgpu.load(a_ref.at[:, part])
        b = plgpu.load(b_ref.at[:, part] if transpose_b else b_ref.at[part, :])
        return total + tile.dot(a, b, transpose_b=transpose_b)

    total = jnp.zeros((cut.block_rows, cut.block_columns), jnp.float32)
    return jax.lax.fori_loop(0, a_ref.shape[1] // cut.block_inner, step, total)


def _product_kernel(total, out_ref):
    plgpu.store(out_ref, total.astype(out_ref.dtype))


def _gelu_kernel(u, out_ref, slope_ref=None, *, interpret):
    below, bell = activation.normal(u, interpret)
    plgpu.store(out_ref, (u * below).astype(out_ref.dtype))
    if slope_ref is not None:
        slope = activation.slope(u, below, bell, interpret)
        plgpu.store(slope_ref, slope.astype(slope_ref.dtype))


def _times_kernel(total, by_ref, out_ref):
    by = plgpu.load(by_ref).astype(jnp.float32)
    plgpu.store(out_ref, (total * by).astype(out_ref.dtype))


def gradients(operands: Sequence[Operands], *, interpret: bool | None = None) -> jax.Array:
    """The product of every pair of operands of one size, all in one launch.

    Args:
      operands: the pairs.
      interpret: whether the kernel is interpreted; None where there is no GPU.

    Returns:
      float32 `[pairs, parts, inputs, outputs]`: sums over parts of the tokens, to be added up.
    """
    interpret = not targets.on_gpu() if interpret is None else interpret
    xs, d_ys = map(list, zip(*operands, strict=True))
    (count, inputs), outputs = xs[0].shape, d_ys[0].shape[1]
    cut = GRADIENT._replace(
        block_rows=math.gcd(GRADIENT.block_rows, inputs),
        block_columns=math.gcd(GRADIENT.block_columns, outputs),
    )
    across = outputs // cut.block_columns
    tiles = inputs // cut.block_rows * across
    parts = 1
    while tiles * parts * len(xs) < ENOUGH_PROGRAMS and count % (2 * parts * cut.block_inner) == 0:
        parts *= 2

    def whole_part(columns, place):
        return pl.BlockSpec((count // parts, columns), place)

    return pl.pallas_call(
        functools.partial(_gradients_kernel, cut=cut),
        grid=(tiles, parts, len(xs)),
        in_specs=[
            [whole_part(cut.block_rows, lambda t, part, _: (part, t // across))] * len(xs),
            [whole_part(cut.block_columns, lambda t, part, _: (part, t % across))] * len(xs),
        ],
        out_specs=pl.BlockSpec(
            (None, None, cut.block_rows, cut.block_columns),
            lambda t, part, pair: (pair, part, t // across, t % across),
        ),
        out_shape=jax.ShapeDtypeStruct((len(xs), parts, inputs, outputs), jnp.float32),
        compiler_params=_compiler_params(cut),
        interpret=interpret,
        name="weight_gradients",
    )(xs, d_ys)


def _gradients_kernel(x_refs, d_y_refs, out_ref, *, cut: Tile):
    # A program works on one pair, which its place in the grid tells.
    for pair, refs in enumerate(zip(x_refs, d_y_refs, strict=True)):
        pl.when(pl.program_id(2) == pair)(functools.partial(_one_gradient, *refs, out_ref, cut))


def _one_gradient(x_ref, d_y_ref, out_ref, cut: Tile):
    def step(k, total):
        part = pl.ds(k * cut.block_inner, cut.block_inner)
        x, d_y = plgpu.load(x_ref.at[part, :]), plgpu.load(d_y_ref.at[part, :])
        return total + tile.dot(x, d_y, transpose_a=True)

    total = jnp.zeros(out_ref.shape, jnp.float32)
    plgpu.store(out_ref, jax.lax.fori_loop(0, x_ref.shape[0] // cut.block_inner, step, total))


def _compiler_params(cut: Tile):
    return plgpu.CompilerParams(num_warps=cut.num_warps, num_stages=cut.num_stages)
