"""The residual stream between two sublayers: `x + dropout(y)` and its LayerNorm, in one kernel.

`add_and_norm(x, y, scale, ...)` reads the stream and what a sublayer adds to it once, and writes
the new stream and what the next sublayer reads once; its backward pass likewise, and the mask of
the dropout is made again from its key.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import reference, targets
from pallas_kernels.reference import dropout_bits, dropout_threshold

EPSILON = 1e-5
# Rows of one tile and rows of one program, which adds up its gradient of `scale`.
TILE_ELEMENTS = 4096
ROWS_A_PROGRAM = 64
NUM_WARPS = 4
# Wider tiles would hold too few rows.
LARGEST_WIDTH = 1024


@dataclass(frozen=True)
class Options:
    """What is fixed when the kernels are compiled: sizes, rate of dropout, dtype of the norm."""

    rows: int
    width: int
    rate: float
    dtype: str
    interpret: bool

    @property
    def padded_width(self) -> int:
        return pl.next_power_of_2(self.width)

    @property
    def tile_rows(self) -> int:
        return min(ROWS_A_PROGRAM, max(1, TILE_ELEMENTS // self.padded_width))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def run_kernels(x, y, scale, seed, options: Options):
    """The new stream and its norm; x, y `[rows, width]`, seed uint32 `[2]` or None."""
    return _forward(x, y, scale, seed, options)[0]


def _forward(x, y, scale, seed, options):
    rows = pl.BlockSpec((options.tile_rows, options.padded_width), lambda i: (i, 0))
    added = None if y is None else rows
    stream, normed = pl.pallas_call(
        functools.partial(_forward_kernel, options=options),
        grid=(pl.cdiv(options.rows, options.tile_rows),),
        in_specs=[rows, added, _whole(scale), _whole(seed)],
        out_specs=[added, rows],
        out_shape=[
            None if y is None else jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(x.shape, options.dtype),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=options.interpret,
        name="add_and_norm_forward",
    )(x, y, scale, seed)
    stream = x if y is None else stream
    return (stream, normed), (stream, y is None, scale, seed)


def _forward_kernel(x_ref, y_ref, scale_ref, seed_ref, stream_ref, normed_ref, *, options):
    first = pl.program_id(0) * options.tile_rows
    x = _load(x_ref, 0, first, options)
    if y_ref is not None:
        y = _load(y_ref, 0, first, options)
        if seed_ref is not None:
            y *= _kept(seed_ref, first, options)
        x += y
        _store(stream_ref, 0, first, x, options)
    normed, _ = _normed(x, options)
    _store(normed_ref, 0, first, normed * _load_scale(scale_ref, options), options)


def _backward(options, saved, gradients):
    stream, alone, scale, seed = saved
    d_stream, d_normed = gradients
    block = pl.BlockSpec((ROWS_A_PROGRAM, options.padded_width), lambda i: (i, 0))
    programs = pl.cdiv(options.rows, ROWS_A_PROGRAM)
    shapes = [
        jax.ShapeDtypeStruct(stream.shape, stream.dtype),
        None if alone else jax.ShapeDtypeStruct(stream.shape, options.dtype),
        # One sum a program, added up outside: no atomics, the same bits on every run.
        jax.ShapeDtypeStruct((programs, options.width), jnp.float32),
    ]
    d_x, d_y, d_scale = pl.pallas_call(
        functools.partial(_backward_kernel, options=options),
        grid=(programs,),
        in_specs=[block, block, block, _whole(scale), _whole(seed)],
        out_specs=[
            block,
            None if alone else block,
            pl.BlockSpec((None, options.padded_width), lambda i: (i, 0)),
        ],
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=options.interpret,
        name="add_and_norm_backward",
    )(stream, d_stream, d_normed, scale, seed)
    return d_x, d_y, d_scale.sum(0), None


def _backward_kernel(
    stream_ref, d_stream_ref, d_normed_ref, scale_ref, seed_ref, d_x_ref, d_y_ref, d_scale_ref,
    *, options,
):  # fmt: skip
    scale = _load_scale(scale_ref, options)
    first = pl.program_id(0) * ROWS_A_PROGRAM

    def one_tile(i, d_scale):
        start = i * options.tile_rows
        x = _load(stream_ref, start, first, options)
        d_normed = _load(d_normed_ref, start, first, options)
        normed, deviation = _normed(x, options)
        d_scale += (d_normed * normed).sum(axis=0)
        d_normed *= scale
        mean = d_normed.sum(axis=1) / options.width
        along = (d_normed * normed).sum(axis=1) / options.width
        # Beyond the real channels this is not 0, and not stored.
        d_x = (d_normed - mean[:, None] - normed * along[:, None]) * deviation
        d_x += _load(d_stream_ref, start, first, options)
        _store(d_x_ref, start, first, d_x, options)
        if d_y_ref is not None:
            d_y = d_x if seed_ref is None else d_x * _kept(seed_ref, first + start, options)
            _store(d_y_ref, start, first, d_y, options)
        return d_scale

    tiles = ROWS_A_PROGRAM // options.tile_rows
    d_scale = jnp.zeros(options.padded_width, jnp.float32)
    d_scale = jax.lax.fori_loop(0, tiles, one_tile, d_scale)
    channel = jnp.arange(options.padded_width)
    plgpu.store(d_scale_ref.at[:], d_scale, mask=channel < options.width)


run_kernels.defvjp(_forward, _backward)


def _normed(x, options: Options):
    """Each row less its mean, over its standard deviation; and 1 over that, `[rows, 1]`.

    As in Ba, Kiros and Hinton 2016 (Layer Normalization, eq. 4), before gain and bias.
    """
    centred = x - (x.sum(axis=1) / options.width)[:, None]
    if options.padded_width != options.width:
        real = (jnp.arange(options.padded_width) < options.width)[None, :]
        centred = jnp.where(real, centred, 0.0)
    variance = (centred * centred).sum(axis=1) / options.width
    deviation = jax.lax.rsqrt(variance + EPSILON)[:, None]
    return centred * deviation, deviation


def _kept(seed_ref, first, options: Options):
    """0 where a number is dropped, `1 / (1 - rate)` where it is kept."""
    row = (first + jnp.arange(options.tile_rows))[:, None]
    channel = jnp.arange(options.padded_width)[None, :]
    bits = dropout_bits(seed_ref[0], seed_ref[1], row, channel)
    kept = bits >= jnp.uint32(dropout_threshold(options.rate))
    return jnp.where(kept, 1 / (1 - options.rate), 0.0)


def _part(ref, start, first, options: Options):
    """A tile of a program's rows, and the mask of what is real in it; None where all is."""
    channel = jnp.arange(options.padded_width)
    mask = None
    if options.padded_width != options.width:
        mask = (channel < options.width)[None, :]
    if options.rows % ROWS_A_PROGRAM:
        row = first + start + jnp.arange(options.tile_rows)
        inside = (row < options.rows)[:, None]
        mask = inside if mask is None else mask & inside
    if mask is not None:
        mask = jnp.broadcast_to(mask, (options.tile_rows, options.padded_width))
    return ref.at[pl.ds(start, options.tile_rows), pl.ds(0, options.padded_width)], mask


def _load(ref, start, first, options: Options):
    source, mask = _part(ref, start, first, options)
    loaded = plgpu.load(source, mask=mask, other=None if mask is None else 0)
    return loaded.astype(jnp.float32)


def _store(ref, start, first, value, options: Options) -> None:
    target, mask = _part(ref, start, first, options)
    plgpu.store(target, value.astype(ref.dtype), mask=mask)


def _load_scale(ref, options: Options):
    mask = jnp.arange(options.padded_width) < options.width
    return plgpu.load(ref.at[pl.ds(0, options.padded_width)], mask=mask, other=0)[None, :]


def _whole(array):
    if array is None:
        return None
    return pl.BlockSpec(array.shape, lambda i: (0,) * array.ndim)


def add_and_norm(
    x: jax.Array,
    y: jax.Array | None,
    scale: jax.Array,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    dtype=jnp.float32,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`x + dropout(y)`, and its LayerNorm times `scale`.

    Args:
      x: the residual stream, float32 `[..., width]`.
      y: what is added to it, in `dtype`; None for nothing.
      scale: float32 `[width]`.
      dropout_rate: share of y that is dropped where `dropout_key` is given.
      dropout_key: PRNG key; which numbers it drops is the same in every implementation
        (`reference.dropout`).
      dtype: of the norm.
      implementation: "pallas" or "xla"; None takes the kernels on a GPU that they are for.

    Returns:
      The new stream in float32, and its norm in `dtype`.
    """
    dropping = dropout_key is not None and dropout_rate > 0
    if implementation is None:
        usable = jax.default_backend() != "cpu" and targets.target_at_hand() is not None
        implementation = "pallas" if usable and x.shape[-1] <= LARGEST_WIDTH else "xla"
    if implementation == "xla":
        if y is not None:
            x = x + (reference.dropout(y, dropout_rate, dropout_key) if dropping else y)
        return x, reference.layer_norm(x, scale, EPSILON).astype(dtype)
    options = Options(
        rows=x.size // x.shape[-1],
        width=x.shape[-1],
        rate=dropout_rate if dropping else 0.0,
        dtype=jnp.dtype(dtype).name,
        interpret=jax.default_backend() == "cpu",
    )
    flat = (options.rows, options.width)
    seed = reference.dropout_seed(dropout_key) if dropping else None
    stream, normed = run_kernels(
        x.reshape(flat), None if y is None else y.reshape(flat), scale, seed, options
    )
    return stream.reshape(x.shape), normed.reshape(x.shape)
