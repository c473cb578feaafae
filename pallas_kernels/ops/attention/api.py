"""Attention with RoPE, dropout, learned biases and windows inside: `attention(q, k, v, ...)`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import arguments, targets, tiles
from pallas_kernels.derivatives import by_vjp, differentiable
from pallas_kernels.dropout import dropout_words
from pallas_kernels.ops.attention import flash, fused_row, reference, windowed
from pallas_kernels.ops.attention.rope import apply_rope, rope_tables, rotate_halves
from pallas_kernels.ops.attention.tile import AttentionInputs, Options, table_dtype

IMPLEMENTATIONS = ("pallas", "xla", "cudnn")
# Of the kernels, and of cuDNN.
LARGEST_HEAD = 128


class Choice(NamedTuple):
    """An implementation, and why it is taken."""

    implementation: str
    reason: str


def attention(
    q: jax.Array,
    k: jax.Array | None = None,
    v: jax.Array | None = None,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    ids: jax.Array | None = None,
    bias_table: jax.Array | None = None,
    window: int | jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    scale: float | None = None,
    causal: bool = True,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of each token to the tokens before it in its row.

    The softmax is computed in float32. Gradients flow to q, k, v and `bias_table`. Works under
    `jit`, `grad`, `vmap`, `scan`, and over devices under `jax.shard_map(..., check_vma=False)`;
    where that splits the batch over an axis named `data`, the same is dropped as on one device. By
    other axes alone every shard would drop the same: that is refused.

    Args:
      q, k, v: `[batch, length, heads, head_dim]`, all float32, bfloat16 or float16; head_dim even.
        Or, as `q` alone, all three side by side, `[batch, length, 3, heads, head_dim]`, as one
        projection makes them: kernels that hold a whole row read them, and write their gradients,
        where they lie.
      positions: int `[length]` or `[batch, length]`; q and k are turned by them (RoPE, base
        10,000). None turns nothing.
      segment_ids: int `[batch, length]`; a token sees its own segment only.
      ids: int `[batch, length]`, never negative; what `bias_table` and `window` speak of. A key
        with 0 has no place, and every query sees it. On the plain path also float32, with a
        gradient: biases are interpolated, the window ends half way to the next difference, and may
        be a scalar array. Integers of all kinds here may be of any type, below 2^31.
      bias_table: `[heads, 2 * clip + 2]`, added to the scores: entry `clip + difference` for a
        query's id minus a key's, clipped to plus and minus `clip`; the last for keys without a
        place.
      window: masks keys whose id differs from the query's by more than this, but none without a
        place. With a `bias_table` it must be its `clip`.
      dropout_rate: share of the probabilities that is dropped where `dropout_key` is given.
      dropout_key: PRNG key; which probabilities it drops is the same in every implementation
        (`dropout.dropout_bits`).
      scale: of the scores; None is `1 / sqrt(head_dim)`.
      causal: whether later keys are masked.
      implementation: "pallas", the kernels, which a CPU runs in interpret mode, to be tested rather
        than used; "xla", plain `jnp`; "cudnn", which takes causal and full attention in bfloat16 or
        float16 on an NVIDIA GPU, without dropout, segments and ids. None takes what `choose` says.

    Returns:
      `[batch, length, heads, head_dim]` in the dtype of q; zeros where a query sees no key.

    Raises:
      ValueError: shapes, dtypes or arguments that do not go together, naming them.
    """
    qkv = (q,) if k is None and v is None else (q, k, v)
    arguments.require_one_of("implementation", implementation, (*IMPLEMENTATIONS, None))
    arguments.require_dropout(dropout_rate, dropout_key)
    positions, segment_ids, ids = _checked(qkv, positions, segment_ids, ids, bias_table, window)
    # NumPy's arrays take no traced indices.
    qkv, bias_table = jax.tree.map(jnp.asarray, (qkv, bias_table))
    q = qkv[0]
    length, head_dim = q.shape[1], q.shape[-1]
    if q.size == 0:
        return jnp.zeros((q.shape[0], length, *q.shape[-2:]), q.dtype)
    clip = window if bias_table is None else bias_table.shape[1] // 2 - 1
    scale = head_dim**-0.5 if scale is None else scale
    dropping = dropout_key is not None and dropout_rate > 0
    words = dropout_words(dropout_key, q.shape[0] * q.shape[-2]) if dropping else None
    plain = segment_ids is None and ids is None and not dropping
    if ids is not None and jnp.issubdtype(ids.dtype, jnp.floating):
        if implementation not in ("xla", None):
            raise ValueError(f"implementation = {implementation!r}: takes integer ids only")
        implementation = "xla"
    if implementation is None:
        implementation = choose(length, head_dim, q.dtype, plain=plain).implementation
    if implementation == "cudnn":
        if not targets.on_gpu() or not plain or not _cudnn_takes(head_dim, q.dtype):
            raise ValueError(
                "implementation = 'cudnn': needs a GPU, bfloat16 or float16, head_dim a multiple of"
                " 8 up to 128, no dropout, no segment_ids, no ids"
            )
        q, k, v = _apart(qkv)
        if positions is not None:
            q, k = apply_rope(q, positions), apply_rope(k, positions)
        return _cudnn((q, k, v), (), (causal, scale))
    if implementation == "xla" and not dropping and windowed.is_faster(length, ids, window):
        return windowed.attention(
            (*_apart(qkv), bias_table),
            windowed.WindowedInputs(ids=ids, positions=positions, segment_ids=segment_ids),
            windowed.WindowedOptions(window=window, clip=clip, scale=scale, causal=causal),
        )
    if implementation == "xla":
        return reference.attention(
            *_apart(qkv),
            positions=positions,
            segment_ids=segment_ids,
            ids=ids,
            bias_table=bias_table,
            window=window,
            clip=clip,
            dropout_rate=dropout_rate,
            words=words,
            scale=scale,
            causal=causal,
        )
    target = targets.target_at_hand()
    if target is None or head_dim > LARGEST_HEAD:
        raise ValueError(
            f"implementation = 'pallas': needs head_dim up to {LARGEST_HEAD}, not {head_dim}, and"
            " an NVIDIA GPU of compute capability 8.0 or more, or a CPU;"
            f" this is {jax.devices()[0].device_kind}"
        )
    cos = sin = None
    if positions is not None:
        tables = rope_tables(jnp.atleast_2d(positions), head_dim)
        cos, sin = (table.astype(table_dtype(q.dtype)) for table in tables)
    inputs = AttentionInputs(
        cos=cos,
        sin=sin,
        ids=ids,
        segment_ids=segment_ids,
        seed=words,
    )
    bias = None if bias_table is None else bias_table.astype(jnp.float32)
    options = Options(
        length=length,
        head_dim=head_dim,
        scale=scale,
        causal=causal,
        rate=dropout_rate if dropping else 0.0,
        clip=clip,
        windowed=window is not None,
        target=target,
        interpret=not targets.on_gpu(),
    )
    return run_kernels((qkv, bias), inputs, options)


def choose(length: int, head_dim: int, dtype, *, plain: bool) -> Choice:
    """The implementation that `attention` takes by itself, for a shape on the device at hand.

    Args:
      length, head_dim: of q.
      dtype: of q.
      plain: whether there is neither dropout nor segment_ids nor ids.
    """
    target = targets.target_at_hand()
    if not targets.kernels_run():
        return Choice("xla", f"{jax.devices()[0].device_kind} is no GPU that the kernels are for")
    if head_dim > LARGEST_HEAD:
        return Choice("xla", f"head_dim {head_dim}: the kernels take at most {LARGEST_HEAD}")
    key = tiles.head_key(head_dim, jnp.dtype(dtype).itemsize)
    from_length = tiles.settings(target, "cudnn_from", key)
    if plain and _cudnn_takes(head_dim, dtype) and from_length and length >= from_length["length"]:
        return Choice("cudnn", f"{target}, {key}: {tiles.evidence(target, 'cudnn_from', key)}")
    return Choice("pallas", f"{target}, {key}: no other was measured to be faster")


def _cudnn_takes(head_dim: int, dtype) -> bool:
    return dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= LARGEST_HEAD


def _forward(given, inputs, options):
    qkv, bias = given
    inputs = inputs._replace(bias=bias)
    whole_row = _whole_row("fused_row_forward", inputs, options, qkv[0])
    if whole_row:
        out, lse = fused_row.forward(qkv, inputs, options, **whole_row)
        # The backward pass of a whole row makes all else again.
        return out, (None, lse)
    q, k, v = _apart(qkv)
    out, lse = flash.forward(
        q, k, v, inputs, options, _flash_block_sizes("flash_forward", options, q)
    )
    return out, (out, lse)


def _backward(given, inputs, kept, d_out, options):
    (qkv, bias), (out, lse) = given, kept
    inputs = inputs._replace(bias=bias)
    if out is None:
        whole_row = _whole_row("fused_row_backward", inputs, options, qkv[0])
        d_qkv, d_bias = fused_row.backward(qkv, inputs, lse, d_out, options, **whole_row)
    else:
        q, k, v = _apart(qkv)
        *d_qkv, d_bias = flash.backward(
            q, k, v, inputs, out, lse, d_out, options,
            d_q_block_sizes=_flash_block_sizes("flash_d_q", options, q),
            d_kv_block_sizes=_flash_block_sizes("flash_d_kv", options, q),
        )  # fmt: skip
        if len(qkv) == 1:
            d_qkv = [jnp.stack(d_qkv, axis=2)]
    return tuple(d_qkv), d_bias


def _plain(given, inputs, options):
    qkv, bias = given
    q, k, v = _apart(qkv)
    if inputs.cos is not None:
        cos, sin = (table[:, :, None].astype(jnp.float32) for table in (inputs.cos, inputs.sin))
        q, k = rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)
    return reference.attention(
        q,
        k,
        v,
        positions=None,
        segment_ids=inputs.segment_ids,
        ids=inputs.ids,
        bias_table=bias,
        window=options.clip if options.windowed else None,
        clip=options.clip,
        dropout_rate=options.rate,
        words=inputs.seed,
        scale=options.scale,
        causal=options.causal,
    )


# The kernels that `options` chooses, of `((qkv, bias), inputs, options)`: q, k and v, or one array
# with all three, as `attention` takes them, and what else there is, without the bias.
run_kernels = differentiable(
    lambda *given: _forward(*given)[0], _plain, gradient=(_forward, _backward)
)


def _run_cudnn(qkv, _, options):
    causal, scale = options
    return jax.nn.dot_product_attention(*qkv, is_causal=causal, scale=scale, implementation="cudnn")


def _cudnn_plain(qkv, _, options):
    causal, scale = options
    return reference.attention(
        *qkv, positions=None, segment_ids=None, ids=None, bias_table=None, window=None, clip=None,
        dropout_rate=0.0, words=None, scale=scale, causal=causal,
    )  # fmt: skip


# Of `(qkv, (), (causal, scale))`.
_cudnn = differentiable(_run_cudnn, _cudnn_plain, gradient=by_vjp(_run_cudnn))


def _apart(qkv):
    """q, k and v as three arrays."""
    return qkv if len(qkv) == 3 else tuple(jnp.moveaxis(qkv[0], 2, 0))


def _whole_row(kernel: str, inputs: AttentionInputs, options: Options, q: jax.Array):
    return tiles.whole_row(
        options.target,
        kernel,
        options.length,
        options.head_dim,
        q.dtype.itemsize,
        biased=inputs.bias is not None,
    )


def _flash_block_sizes(kernel: str, options: Options, q: jax.Array) -> flash.BlockSizes:
    return flash.BlockSizes(
        **tiles.streamed(
            options.target,
            kernel,
            options.head_dim,
            q.dtype.itemsize,
            with_ids=options.clip is not None,
        )
    )


def _checked(qkv, positions, segment_ids, ids, bias_table, window):
    """Positions, segment_ids and ids, whole ones as int32.

    Raises:
      ValueError: as `attention` does.
    """
    q = qkv[0]
    given = [None if x is None else jnp.shape(x) for x in qkv]
    together = len(qkv) == 1 and q.ndim == 5 and q.shape[2] == 3
    apart = len(qkv) == 3 and q.ndim == 4 and given == [q.shape] * 3
    if not (together or apart):
        raise ValueError(
            f"q, k, v are {', '.join(map(str, given))}: expected one shape"
            " [batch, length, heads, head_dim], or q alone [batch, length, 3, heads, head_dim]"
        )
    dtypes = [x.dtype.name for x in qkv]
    if dtypes != [q.dtype.name] * len(qkv) or q.dtype.name not in arguments.FLOATS:
        raise ValueError(
            f"q, k, v are {', '.join(dtypes)}: expected one of {', '.join(arguments.FLOATS)}"
            " for all"
        )
    (batch, length), (heads, head_dim) = q.shape[:2], q.shape[-2:]
    if head_dim % 2 or head_dim == 0:
        raise ValueError(f"head_dim = {head_dim}: must be even, and at least 2")
    if positions is not None:
        positions = arguments.token_positions(positions, batch, length)
    if segment_ids is not None:
        arguments.require_shape("segment_ids", segment_ids, (batch, length))
        segment_ids = arguments.whole_numbers("segment_ids", segment_ids)
    soft = ids is not None and jnp.result_type(ids) == jnp.float32
    if ids is not None:
        arguments.require_shape("ids", ids, (batch, length))
        if not soft and not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
            raise ValueError(f"ids are {jnp.result_type(ids).name}: expected integers or float32")
        ids = ids if soft else arguments.whole_numbers("ids", ids)
    if (bias_table is not None or window is not None) and ids is None:
        raise ValueError("bias_table and window need ids")
    if bias_table is not None and not _is_table(bias_table, heads):
        raise ValueError(
            f"bias_table is {bias_table.dtype.name} {list(bias_table.shape)}: expected floating"
            f" point [{heads}, 2 * clip + 2]"
        )
    if window is not None and not soft:
        if not isinstance(window, int | np.integer) or window < 0:
            raise ValueError(
                f"window = {window!r}: with ids of integers, a number from 0 on, no array"
            )
        if bias_table is not None and window != bias_table.shape[1] // 2 - 1:
            raise ValueError(
                f"window = {window}: must be the clip of bias_table, {bias_table.shape[1] // 2 - 1}"
            )
    return positions, segment_ids, ids


def _is_table(table, heads: int) -> bool:
    if table.ndim != 2 or table.shape[0] != heads or not jnp.issubdtype(table.dtype, jnp.floating):
        return False
    return table.shape[1] >= 2 and table.shape[1] % 2 == 0
