"""The residual stream between two sublayers: what is added to it, and its LayerNorm, in one kernel.

`add_and_norm(x, update, scale, ...)` reads the stream and what a sublayer adds to it once, and
writes the new stream and what the next sublayer reads once; its backward pass likewise, and the
mask of the dropout is made again from its key.
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
NUMBERS_A_PROGRAM = 4096
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
    def rows_held(self) -> int:
        """By one program."""
        return max(1, NUMBERS_A_PROGRAM // self.padded_width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def run_kernels(x, update, scale, shift, seed, options: Options):
    """The new stream and its norm; x, update `[rows, width]`, seed uint32 `[2]` or None."""
    return _forward(x, update, scale, shift, seed, options)[0]


def _forward(x, update, scale, shift, seed, options):
    rows = _rows_spec(options)
    changed = update is not None or shift is not None
    stream, normed = pl.pallas_call(
        functools.partial(_forward_kernel, options=options),
        grid=_grid(options),
        in_specs=[rows, None if update is None else rows, *map(_whole, (scale, shift, seed))],
        out_specs=[rows if changed else None, rows],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype) if changed else None,
            jax.ShapeDtypeStruct(x.shape, options.dtype),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=options.interpret,
        name="add_and_norm_forward",
    )(x, update, scale, shift, seed)
    stream = stream if changed else x
    return (stream, normed), (stream, update is not None, scale, shift is not None, seed)


def _forward_kernel(
    x_ref, update_ref, scale_ref, shift_ref, seed_ref, stream_ref, normed_ref, *, options
):
    x = _load(x_ref, options)
    if update_ref is not None:
        update = _load(update_ref, options)
        x += update if seed_ref is None else update * _kept(seed_ref, options)
    if shift_ref is not None:
        x += _load_channels(shift_ref, options)
    if stream_ref is not None:
        _store(stream_ref, x, options)
    normed, _ = _normed(x, options)
    _store(normed_ref, normed * _load_channels(scale_ref, options), options)


def _backward(options, saved, gradients):
    stream, updated, scale, shifted, seed = saved
    d_stream, d_normed = gradients
    rows = _rows_spec(options)
    (programs,) = _grid(options)
    # One sum a program, added up outside: no atomics, the same bits on every run.
    sums = jax.ShapeDtypeStruct((programs, options.width), jnp.float32)
    one_sum = pl.BlockSpec((None, options.padded_width), lambda i: (i, 0))
    d_x, d_update, d_scale, d_shift = pl.pallas_call(
        functools.partial(_backward_kernel, options=options),
        grid=(programs,),
        in_specs=[rows, rows, rows, *map(_whole, (scale, seed))],
        out_specs=[rows, rows if updated else None, one_sum, one_sum if shifted else None],
        out_shape=[
            jax.ShapeDtypeStruct(stream.shape, stream.dtype),
            jax.ShapeDtypeStruct(stream.shape, options.dtype) if updated else None,
            sums,
            sums if shifted else None,
        ],
        compiler_params=plgpu.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=options.interpret,
        name="add_and_norm_backward",
    )(stream, d_stream, d_normed, scale, seed)
    return d_x, d_update, d_scale.sum(0), d_shift.sum(0) if shifted else None, None


def _backward_kernel(
    stream_ref, d_stream_ref, d_normed_ref, scale_ref, seed_ref,
    d_x_ref, d_update_ref, d_scale_ref, d_shift_ref, *, options,
):  # fmt: skip
    normed, deviation = _normed(_load(stream_ref, options), options)
    d_normed = _load(d_normed_ref, options)
    _store_sum(d_scale_ref, d_normed * normed, options)
    d_normed *= _load_channels(scale_ref, options)
    mean = d_normed.sum(axis=1) / options.width
    along = (d_normed * normed).sum(axis=1) / options.width
    # Beyond the real channels this is not 0, and not stored.
    d_x = (d_normed - mean[:, None] - normed * along[:, None]) * deviation
    d_x += _load(d_stream_ref, options)
    _store(d_x_ref, d_x, options)
    if d_update_ref is not None:
        _store(d_update_ref, d_x if seed_ref is None else d_x * _kept(seed_ref, options), options)
    if d_shift_ref is not None:
        _store_sum(d_shift_ref, jnp.where(_inside_rows(options), d_x, 0.0), options)


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


def _grid(options: Options) -> tuple[int]:
    return (pl.cdiv(options.rows, options.rows_held),)


def _rows_spec(options: Options) -> pl.BlockSpec:
    return pl.BlockSpec((options.rows_held, options.padded_width), lambda i: (i, 0))


def _whole(array):
    if array is None:
        return None
    return pl.BlockSpec(array.shape, lambda i: (0,) * array.ndim)


def _kept(seed_ref, options: Options):
    """0 where a number is dropped, `1 / (1 - rate)` where it is kept."""
    channel = jnp.arange(options.padded_width)[None, :]
    bits = dropout_bits(seed_ref[0], seed_ref[1], _row(options), channel)
    kept = bits >= jnp.uint32(dropout_threshold(options.rate))
    return jnp.where(kept, 1 / (1 - options.rate), 0.0)


def _row(options: Options):
    held = options.rows_held
    return (pl.program_id(0) * held + jnp.arange(held))[:, None]


def _inside_rows(options: Options):
    return _row(options) < options.rows


def _part(ref, options: Options):
    """A program's rows, and the mask of what is real in them; None where all is."""
    mask = None
    if options.padded_width != options.width:
        mask = (jnp.arange(options.padded_width) < options.width)[None, :]
    if options.rows % options.rows_held:
        inside = _inside_rows(options)
        mask = inside if mask is None else mask & inside
    if mask is not None:
        mask = jnp.broadcast_to(mask, (options.rows_held, options.padded_width))
    return ref.at[pl.ds(0, options.rows_held), pl.ds(0, options.padded_width)], mask


def _load(ref, options: Options):
    source, mask = _part(ref, options)
    loaded = plgpu.load(source, mask=mask, other=None if mask is None else 0)
    return loaded.astype(jnp.float32)


def _store(ref, value, options: Options) -> None:
    target, mask = _part(ref, options)
    plgpu.store(target, value.astype(ref.dtype), mask=mask)


def _channels(options: Options):
    return jnp.arange(options.padded_width) < options.width


def _load_channels(ref, options: Options):
    source = ref.at[pl.ds(0, options.padded_width)]
    return plgpu.load(source, mask=_channels(options), other=0)[None, :]


def _store_sum(ref, value, options: Options) -> None:
    """Stores the sum over a program's rows."""
    plgpu.store(ref.at[:], value.sum(axis=0), mask=_channels(options))


def add_and_norm(
    x: jax.Array,
    update: jax.Array | None,
    scale: jax.Array,
    *,
    shift: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    dtype=jnp.float32,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`x + dropout(update) + shift`, and its LayerNorm times `scale`.

    Args:
      x: the residual stream, float32 `[..., width]`.
      update: what is added to it, in `dtype`; None for nothing.
      scale: float32 `[width]`.
      shift: float32 `[width]`, added to every row; None for nothing.
      dropout_rate: share of the update that is dropped where `dropout_key` is given.
      dropout_key: PRNG key; which numbers it drops is the same in every implementation
        (`reference.dropout`).
      dtype: of the norm.
      implementation: "pallas" or "xla"; None takes the kernels on a GPU that they are for.

    Returns:
      The new stream in float32, and its norm in `dtype`.
    """
    dropping = update is not None and dropout_key is not None and dropout_rate > 0
    if implementation is None:
        usable = targets.on_gpu() and x.shape[-1] <= LARGEST_WIDTH
        implementation = "pallas" if usable else "xla"
    if implementation == "xla":
        if update is not None:
            x = x + (reference.dropout(update, dropout_rate, dropout_key) if dropping else update)
        if shift is not None:
            x = x + shift
        return x, reference.layer_norm(x, scale, EPSILON).astype(dtype)
    width = x.shape[-1]
    options = Options(
        rows=x.size // width,
        width=width,
        rate=dropout_rate if dropping else 0.0,
        dtype=jnp.dtype(dtype).name,
        interpret=jax.default_backend() == "cpu",
    )
    stream, normed = run_kernels(
        x.reshape(-1, width),
        None if update is None else update.reshape(-1, width),
        scale,
        shift,
        reference.dropout_seed(dropout_key) if dropping else None,
        options,
    )
    return stream.reshape(x.shape), normed.reshape(x.shape)
