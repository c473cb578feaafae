"""Rows of the residual stream, some whole ones to a program: what its kernels share.

Sizes on the chip are powers of two; rows and channels beyond the real ones are masked.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dropout import dropout_bits_of, dropout_threshold

EPSILON = 1e-5
# Wider rows would leave a program too few.
LARGEST_WIDTH = 1024


@dataclass(frozen=True)
class Options:
    """What is fixed when a kernel is compiled.

    rows, width: the real sizes. held: numbers that a program holds, a power of two. num_warps: of a
    program. rate: of dropout, 0 for none. dtype: of the products around the kernel. interpret:
    whether it is interpreted, not compiled.
    """

    rows: int
    width: int
    held: int
    num_warps: int
    rate: float
    dtype: str
    interpret: bool

    @property
    def padded_width(self) -> int:
        return pl.next_power_of_2(self.width)

    @property
    def rows_held(self) -> int:
        """By one program."""
        return max(1, self.held // self.padded_width)

    @property
    def programs(self) -> int:
        return pl.cdiv(self.rows, self.rows_held)


def call(kernel, name: str, options: Options, in_specs, out_specs, out_shape):
    """A kernel over all rows."""
    return pl.pallas_call(
        kernel,
        grid=(options.programs,),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=options.num_warps, num_stages=1),
        interpret=options.interpret,
        name=name,
    )


def rows_spec(options: Options) -> pl.BlockSpec:
    """A program's rows of `[rows, width]`."""
    return pl.BlockSpec((options.rows_held, options.padded_width), lambda i: (i, 0))


def scalars_spec(options: Options) -> pl.BlockSpec:
    """A program's rows of `[rows]`."""
    return pl.BlockSpec((options.rows_held,), lambda i: (i,))


def whole_spec(array, *sizes: int) -> pl.BlockSpec | None:
    """All of a small array, for every program; None for None.

    sizes: of what a program reads of it, where they are padded.
    """
    if array is None:
        return None
    return pl.BlockSpec(sizes or array.shape, lambda i: (0,) * array.ndim)


def sums_shape(options: Options, count: int) -> jax.ShapeDtypeStruct:
    """`count` sums over rows a program, `[programs, count, width]`, to be added up outside: no
    atomics, the same bits every run."""
    return jax.ShapeDtypeStruct((options.programs, count, options.width), jnp.float32)


def sums_spec(options: Options, count: int) -> pl.BlockSpec:
    """A program's part of `sums_shape`."""
    return pl.BlockSpec((None, count, options.padded_width), lambda i: (i, 0, 0))


def index(options: Options) -> jax.Array:
    """Which rows a program holds."""
    return pl.program_id(0) * options.rows_held + jnp.arange(options.rows_held)


def load(ref, options: Options) -> jax.Array:
    """A program's rows in float32, zero beyond the real ones."""
    source, mask = _part(ref, options)
    loaded = plgpu.load(source, mask=mask, other=None if mask is None else 0)
    return loaded.astype(jnp.float32)


def store(ref, value, options: Options) -> None:
    """The reverse of `load`, in the dtype of `ref`."""
    target, mask = _part(ref, options)
    plgpu.store(target, value.astype(ref.dtype), mask=mask)


def _part(ref, options: Options):
    """A program's rows, and the mask of what is real in them; None where all is."""
    mask = None
    if options.padded_width != options.width:
        mask = channels(options)[None, :]
    if options.rows % options.rows_held:
        inside = (index(options) < options.rows)[:, None]
        mask = inside if mask is None else mask & inside
    if mask is not None:
        mask = jnp.broadcast_to(mask, (options.rows_held, options.padded_width))
    return ref.at[pl.ds(0, options.rows_held), pl.ds(0, options.padded_width)], mask


def channels(options: Options) -> jax.Array:
    """Which channels are real."""
    return jnp.arange(options.padded_width) < options.width


def load_channels(ref, options: Options) -> jax.Array:
    """A vector, `[width]` of `[padded_width]`, beside every row: `[1, padded_width]`."""
    source = ref.at[pl.ds(0, options.padded_width)]
    return plgpu.load(source, mask=channels(options), other=0)[None, :]


def store_sum(ref, place: int, value, options: Options) -> None:
    """Stores a sum over a program's rows."""
    part = ref.at[pl.ds(place, 1), pl.ds(0, options.padded_width)]
    plgpu.store(part, value.sum(axis=0)[None, :], mask=channels(options)[None, :])


def apply_dropout(value, seed_ref, options: Options) -> jax.Array:
    """What `dropout.dropout` makes of a program's rows; as they are without a seed."""
    if seed_ref is None:
        return value
    channel = jnp.arange(options.padded_width)[None, :]
    bits = dropout_bits_of(seed_ref, index(options)[:, None], channel)
    keep = bits >= jnp.uint32(dropout_threshold(options.rate))
    return value * jnp.where(keep, 1 / (1 - options.rate), 0.0)


def normed(x: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    """Each row less its mean, over its standard deviation; and 1 over that, `[rows, 1]`.

    As in Ba, Kiros and Hinton 2016 (Layer Normalization, eq. 4), before gain and bias.
    """
    centred = x - (x.sum(axis=1) / options.width)[:, None]
    if options.padded_width != options.width:
        centred = jnp.where(channels(options)[None, :], centred, 0.0)
    variance = (centred * centred).sum(axis=1) / options.width
    deviation = jax.lax.rsqrt(variance + EPSILON)[:, None]
    return centred * deviation, deviation


def normed_backward(d_normed, normed_rows, deviation, options: Options) -> jax.Array:
    """The gradient of what `normed` was given; beyond the real channels it is not 0."""
    mean = d_normed.sum(axis=1) / options.width
    along = (d_normed * normed_rows).sum(axis=1) / options.width
    return (d_normed - mean[:, None] - normed_rows * along[:, None]) * deviation
