"""The residual stream between two sublayers: what is added to it, and its LayerNorm, in one kernel.

`add_layer_norm(x, update, scale, ...)` reads the stream and what a sublayer adds to it once, and
writes the new stream and what the next sublayer reads once; its backward pass likewise, and the
mask of the dropout is made again from its key.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import arguments, dropout, targets
from pallas_kernels.derivatives import differentiable
from pallas_kernels.ops import reference, rows
from pallas_kernels.ops.rows import Options

# By time on an H200, 8,192 rows of 256. The way back sums over a program's rows, so has fewer
# programs: the sums of each are written out.
NUMBERS_A_PROGRAM, NUM_WARPS = 4096, 4
FORWARD_NUMBERS_A_PROGRAM, FORWARD_NUM_WARPS = 2048, 8


def _forward(given, seed, options):
    x, update, scale, shift = given
    options = dataclasses.replace(
        options, held=FORWARD_NUMBERS_A_PROGRAM, num_warps=FORWARD_NUM_WARPS
    )
    block = rows.rows_spec(options)
    changed = update is not None or shift is not None
    stream, normed = rows.call(
        functools.partial(_forward_kernel, options=options),
        "add_layer_norm_forward",
        options,
        in_specs=[
            block,
            None if update is None else block,
            rows.whole_spec(scale, options.padded_width),
            rows.whole_spec(shift, options.padded_width),
            rows.whole_spec(seed),
        ],
        out_specs=[block if changed else None, block],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype) if changed else None,
            jax.ShapeDtypeStruct(x.shape, options.dtype),
        ],
    )(x, update, scale, shift, seed)
    stream = stream if changed else x
    return (stream, normed), stream


def _forward_kernel(
    x_ref, update_ref, scale_ref, shift_ref, seed_ref, stream_ref, normed_ref, *, options
):
    x = rows.load(x_ref, options)
    if update_ref is not None:
        x += rows.apply_dropout(rows.load(update_ref, options), seed_ref, options)
    if shift_ref is not None:
        x += rows.load_channels(shift_ref, options)
    if stream_ref is not None:
        rows.store(stream_ref, x, options)
    normed, _ = rows.normed(x, options)
    rows.store(normed_ref, normed * rows.load_channels(scale_ref, options), options)


def _backward(given, seed, stream, gradients, options):
    _, update, scale, shift = given
    updated, shifted = update is not None, shift is not None
    d_stream, d_normed = gradients
    block = rows.rows_spec(options)
    count = 2 if shifted else 1
    d_x, d_update, sums = rows.call(
        functools.partial(_backward_kernel, options=options),
        "add_layer_norm_backward",
        options,
        in_specs=[
            block,
            block,
            block,
            rows.whole_spec(scale, options.padded_width),
            rows.whole_spec(seed),
        ],
        out_specs=[block, block if updated else None, rows.sums_spec(options, count)],
        out_shape=[
            jax.ShapeDtypeStruct(stream.shape, stream.dtype),
            jax.ShapeDtypeStruct(stream.shape, options.dtype) if updated else None,
            rows.sums_shape(options, count),
        ],
    )(stream, d_stream, d_normed, scale, seed)
    d_scale, *d_shift = sums.sum(0)
    return d_x, d_update, d_scale, d_shift[0] if shifted else None


def _backward_kernel(
    stream_ref, d_stream_ref, d_normed_ref, scale_ref, seed_ref,
    d_x_ref, d_update_ref, sums_ref, *, options,
):  # fmt: skip
    normed, deviation = rows.normed(rows.load(stream_ref, options), options)
    d_normed = rows.load(d_normed_ref, options)
    rows.store_sum(sums_ref, 0, d_normed * normed, options)
    d_normed *= rows.load_channels(scale_ref, options)
    d_x = rows.normed_backward(d_normed, normed, deviation, options)
    d_x += rows.load(d_stream_ref, options)
    rows.store(d_x_ref, d_x, options)
    if d_update_ref is not None:
        rows.store(d_update_ref, rows.apply_dropout(d_x, seed_ref, options), options)
    if sums_ref.shape[0] == 2:
        # Rows beyond the real ones are zero: they were loaded so.
        rows.store_sum(sums_ref, 1, d_x, options)


def _plain(given, seed, options):
    x, update, scale, shift = given
    if update is not None:
        x = x + dropout.apply_dropout(update, options.rate, seed)
    if shift is not None:
        x = x + shift
    return x, reference.layer_norm(x, scale, rows.EPSILON).astype(options.dtype)


# The new stream and its norm, of `((x, update, scale, shift), seed, options)`: `[rows, width]` and
# `dropout.dropout_words`. What options say of programs is of the way back.
run_kernels = differentiable(
    lambda *given: _forward(*given)[0], _plain, gradient=(_forward, _backward)
)


def add_layer_norm(
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
        (`dropout.dropout`).
      dtype: of the norm.
      implementation: "pallas" or "xla"; None takes the kernels on a GPU that they are for.

    Returns:
      The new stream in float32, and its norm in `dtype`.

    Raises:
      ValueError: shapes, dtypes or arguments that do not go together, naming them.
    """
    width = jnp.shape(x)[-1] if jnp.ndim(x) else None
    arguments.require_dtype("x", x, jnp.float32)
    arguments.require_dtype("dtype", jnp.zeros((), dtype), *arguments.FLOATS)
    if update is not None:
        arguments.require_shape("update", update, x.shape)
        arguments.require_dtype("update", update, *arguments.FLOATS)
    for name, channels in (("scale", scale), ("shift", shift)):
        if channels is not None:
            arguments.require_shape(name, channels, (width,))
    arguments.require_dropout(dropout_rate, dropout_key)
    arguments.require_one_of("implementation", implementation, (*arguments.KERNELS_OR_PLAIN, None))
    dropping = update is not None and dropout_key is not None and dropout_rate > 0
    if implementation is None:
        usable = targets.kernels_run() and x.shape[-1] <= rows.LARGEST_WIDTH
        implementation = "pallas" if usable else "xla"
    if implementation == "xla" or x.size == 0:
        if update is not None:
            x = x + (dropout.dropout(update, dropout_rate, dropout_key) if dropping else update)
        if shift is not None:
            x = x + shift
        return x, reference.layer_norm(x, scale, rows.EPSILON).astype(dtype)
    options = Options(
        rows=x.size // width,
        width=width,
        held=NUMBERS_A_PROGRAM,
        num_warps=NUM_WARPS,
        rate=dropout_rate if dropping else 0.0,
        dtype=jnp.dtype(dtype).name,
        interpret=not targets.on_gpu(),
    )
    flat = x.reshape(-1, width), None if update is None else update.reshape(-1, width)
    seed = dropout.dropout_words(dropout_key, options.rows) if dropping else None
    stream, normed = run_kernels((*flat, scale, shift), seed, options)
    return stream.reshape(x.shape), normed.reshape(x.shape)
