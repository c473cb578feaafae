"""What a training reads out of the residual stream: the cross-entropy of the next token.

`add_layer_norm_cross_entropy` adds what a block left to be added, norms the stream, multiplies by
the tied embedding and takes the cross-entropy, in one kernel forward and one backward: no logit and
no normed stream is ever written.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import arguments, dropout, targets
from pallas_kernels.derivatives import differentiable
from pallas_kernels.ops import instructions, reference, rows
from pallas_kernels.ops.rows import Options
from pallas_kernels.padding import MASKED, NARROWEST, padded

NUMBERS_A_PROGRAM = 8192
# Rows are also as long as the vocabulary: where the stream is narrow, those fill the chip.
MOST_ROWS = 128
# The table stays on the chip whole; wider or longer ones would not.
LARGEST_WIDTH = 512
LARGEST_VOCABULARY = 32


def add_layer_norm_cross_entropy(
    x: jax.Array,
    update: jax.Array,
    scale: jax.Array,
    table: jax.Array,
    wanted: jax.Array,
    weights: jax.Array,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`x + dropout(update)`, and the weighted sum of its tokens' cross-entropies.

    The logits are `layer_norm(stream) * scale` times the embedding of each token.

    Args:
      x: the residual stream, float32 `[..., width]`.
      update: what is added to it, `[..., width]` in the dtype of `table`.
      scale: of the norm, float32 `[width]`.
      table: embeddings of all tokens, `[vocabulary, width]`, in the dtype of the products.
      wanted: int32 `[...]`, the right tokens.
      weights: float32 `[...]`, of each token's cross-entropy.
      dropout_rate: share of the update that is dropped where `dropout_key` is given.
      dropout_key: PRNG key, as `add_layer_norm` takes it.
      implementation: "pallas" or "xla"; None takes the kernels on a GPU that they are for.

    Returns:
      The new stream in float32, and a float32 scalar.

    Raises:
      ValueError: shapes, dtypes or arguments that do not go together, naming them.
    """
    arguments.require_dtype("x", x, jnp.float32)
    width = jnp.shape(x)[-1] if jnp.ndim(x) else None
    if jnp.ndim(table) != 2 or table.shape[1] != width or len(table) == 0:
        raise ValueError(f"table is {list(jnp.shape(table))}: expected [vocabulary, {width}]")
    arguments.require_dtype("table", table, *arguments.FLOATS)
    arguments.require_shape("update", update, x.shape)
    arguments.require_shape("scale", scale, (width,))
    arguments.require_shape("wanted", wanted, x.shape[:-1])
    arguments.require_shape("weights", weights, x.shape[:-1])
    wanted = arguments.whole_numbers("wanted", wanted)
    arguments.require_dropout(dropout_rate, dropout_key)
    arguments.require_one_of("implementation", implementation, (*arguments.KERNELS_OR_PLAIN, None))
    dropping = dropout_key is not None and dropout_rate > 0
    vocabulary = len(table)
    if implementation is None:
        fits = width <= LARGEST_WIDTH and vocabulary <= LARGEST_VOCABULARY
        implementation = "pallas" if targets.kernels_run() and fits else "xla"
    if implementation == "xla" or x.size == 0:
        x = x + (dropout.dropout(update, dropout_rate, dropout_key) if dropping else update)
        return x, reference.cross_entropy(x, scale, table, wanted, weights, rows.EPSILON)
    options = Options(
        rows=x.size // width,
        width=width,
        held=numbers_held(width),
        num_warps=num_warps(width),
        rate=dropout_rate if dropping else 0.0,
        dtype=table.dtype.name,
        interpret=not targets.on_gpu(),
    )
    seed = dropout.dropout_words(dropout_key, options.rows) if dropping else None
    stream, score = run_kernels(
        (x.reshape(-1, width), update.reshape(-1, width), scale, table),
        (wanted.reshape(-1), weights.reshape(-1), seed),
        options,
    )
    return stream.reshape(x.shape), score


def numbers_held(width: int) -> int:
    """By one program: at least as many rows as a product on the tensor cores wants."""
    padded = pl.next_power_of_2(width)
    return max(min(NUMBERS_A_PROGRAM, MOST_ROWS * padded), NARROWEST * padded)


def num_warps(width: int) -> int:
    """Of a program: more have no part in the products of so few rows."""
    return 4 if numbers_held(width) <= 32 * width else 8


def _forward(given, others, options):
    (x, update, scale, table), (wanted, weights, seed) = given, others
    block, scalars = rows.rows_spec(options), rows.scalars_spec(options)
    stream, scores = rows.call(
        functools.partial(_forward_kernel, options=options, vocabulary=len(table)),
        "add_layer_norm_cross_entropy_forward",
        options,
        in_specs=[block, block, *_specs(scale, table, options), scalars, scalars]
        + [rows.whole_spec(seed)],
        out_specs=[block, pl.BlockSpec((1,), lambda i: (i,))],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            # One sum a program, added up outside: no atomics, the same bits on every run.
            jax.ShapeDtypeStruct((options.programs,), jnp.float32),
        ],
    )(x, update, scale, table, wanted, weights, seed)
    return (stream, scores.sum()), stream


def _forward_kernel(
    x_ref, update_ref, scale_ref, table_ref, wanted_ref, weights_ref, seed_ref,
    stream_ref, score_ref, *, options, vocabulary,
):  # fmt: skip
    update = rows.apply_dropout(rows.load(update_ref, options), seed_ref, options)
    x = rows.load(x_ref, options) + update
    rows.store(stream_ref, x, options)
    normed, _ = rows.normed(x, options)
    head = _load_table(table_ref, vocabulary, options)
    scaled = normed * rows.load_channels(scale_ref, options)
    logits = _logits(scaled.astype(head.dtype), head, vocabulary)
    right, weight = _load_wanted(wanted_ref, weights_ref, head.shape[0], options)
    largest = logits.max(axis=1)
    entropy = largest + jnp.log(jnp.exp(logits - largest[:, None]).sum(axis=1))
    entropy -= jnp.where(right, logits, 0.0).sum(axis=1)
    plgpu.store(score_ref.at[:], (entropy * weight).sum()[None])


def _backward(given, others, stream, gradients, options):
    (_, _, scale, table), (wanted, weights, seed) = given, others
    d_stream, d_score = gradients
    block, scalars = rows.rows_spec(options), rows.scalars_spec(options)
    vocabulary = len(table)
    d_x, d_update, d_scale, d_table = rows.call(
        functools.partial(_backward_kernel, options=options, vocabulary=vocabulary),
        "add_layer_norm_cross_entropy_backward",
        options,
        in_specs=[block, block, pl.BlockSpec((1,), lambda i: (0,))]
        + [*_specs(scale, table, options), scalars, scalars, rows.whole_spec(seed)],
        out_specs=[
            block,
            block,
            rows.sums_spec(options, 1),
            pl.BlockSpec((None, padded(vocabulary), options.padded_width), lambda i: (i, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(stream.shape, stream.dtype),
            jax.ShapeDtypeStruct(stream.shape, options.dtype),
            rows.sums_shape(options, 1),
            jax.ShapeDtypeStruct((options.programs, *table.shape), jnp.float32),
        ],
    )(stream, d_stream, d_score[None], scale, table, wanted, weights, seed)
    d_table = d_table.sum(0).astype(table.dtype)
    return d_x, d_update, d_scale.sum(0)[0], d_table


def _backward_kernel(
    stream_ref, d_stream_ref, d_score_ref, scale_ref, table_ref, wanted_ref, weights_ref, seed_ref,
    d_x_ref, d_update_ref, d_scale_ref, d_table_ref, *, options, vocabulary,
):  # fmt: skip
    stream, d_stream = (rows.load(ref, options) for ref in (stream_ref, d_stream_ref))
    normed, deviation = rows.normed(stream, options)
    head = _load_table(table_ref, vocabulary, options)
    scale = rows.load_channels(scale_ref, options)
    scaled = (normed * scale).astype(head.dtype)
    logits = _logits(scaled, head, vocabulary)
    right, weight = _load_wanted(wanted_ref, weights_ref, head.shape[0], options)
    odds = jnp.exp(logits - logits.max(axis=1)[:, None])
    probability = odds / odds.sum(axis=1)[:, None]
    d_logits = (probability - jnp.where(right, 1.0, 0.0)) * (weight * d_score_ref[0])[:, None]
    d_logits = d_logits.astype(head.dtype)
    d_table = instructions.dot(d_logits, scaled, transpose_a=True)
    mask = (jnp.arange(head.shape[0]) < vocabulary)[:, None]
    mask = jnp.broadcast_to(mask & rows.channels(options)[None, :], head.shape)
    plgpu.store(
        d_table_ref.at[pl.ds(0, head.shape[0]), pl.ds(0, options.padded_width)], d_table, mask=mask
    )
    d_normed = instructions.dot(d_logits, head)
    rows.store_sum(d_scale_ref, 0, d_normed * normed, options)
    d_x = rows.normed_backward(d_normed * scale, normed, deviation, options)
    d_x += d_stream
    rows.store(d_x_ref, d_x, options)
    rows.store(d_update_ref, rows.apply_dropout(d_x, seed_ref, options), options)


def _plain(given, others, options):
    (x, update, scale, table), (wanted, weights, seed) = given, others
    x = x + dropout.apply_dropout(update, options.rate, seed)
    return x, reference.cross_entropy(x, scale, table, wanted, weights, rows.EPSILON)


# As `add_layer_norm_cross_entropy`, of `((x, update, scale, table), (wanted, weights, seed),
# options)`, x and update `[rows, width]`, seed as `dropout.dropout_words` or None.
run_kernels = differentiable(
    lambda *given: _forward(*given)[0], _plain, gradient=(_forward, _backward)
)


def _specs(scale, table, options: Options) -> list[pl.BlockSpec]:
    """What every program reads of the norm's scale and of the table."""
    width = options.padded_width
    return [rows.whole_spec(scale, width), rows.whole_spec(table, padded(len(table)), width)]


def _load_table(ref, vocabulary: int, options: Options):
    """`[padded vocabulary, padded width]`, zero beyond the real ones."""
    mask = (jnp.arange(len(ref)) < vocabulary)[:, None] & rows.channels(options)[None, :]
    return plgpu.load(ref, mask=mask, other=0)


def _logits(scaled, head, vocabulary: int):
    logits = instructions.dot(scaled, head, transpose_b=True)
    real = (jnp.arange(head.shape[0]) < vocabulary)[None, :]
    return jnp.where(real, logits, MASKED)


def _load_wanted(wanted_ref, weights_ref, tokens: int, options: Options):
    """Which logit is the right one, `[rows, tokens]`, and each row's weight, 0 beyond the real."""
    inside = rows.index(options) < options.rows
    part = pl.ds(0, options.rows_held)
    wanted = plgpu.load(wanted_ref.at[part], mask=inside, other=0)
    weight = plgpu.load(weights_ref.at[part], mask=inside, other=0)
    return wanted[:, None] == jnp.arange(tokens)[None, :], weight
