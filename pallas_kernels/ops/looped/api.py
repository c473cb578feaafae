"""All loops of one block, its readout and its halting: `looped_block`."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import arguments, targets, tiles
from pallas_kernels.derivatives import differentiable
from pallas_kernels.ops.attention import tile
from pallas_kernels.ops.attention.rope import rope_tables
from pallas_kernels.ops.attention.tile import AttentionInputs
from pallas_kernels.ops.looped.halting import AT_ONCE, RULES
from pallas_kernels.ops.looped.kernel import Options, run_kernel
from pallas_kernels.ops.looped.reference import loop_by_loop
from pallas_kernels.ops.looped.weights import BlockSizes, Weights, pad_end, tile_weights
from pallas_kernels.padding import padded

# What the registers of a program hold, and one tile of weights.
LARGEST_WIDTH = 256
LARGEST_HEAD = 64
LARGEST_VOCABULARY = 64
LONGEST_ROW = 128


def looped_block(
    x: jax.Array,
    weights: Weights,
    *,
    heads: int,
    loops: int,
    dtype=jnp.bfloat16,
    positions: jax.Array | None = None,
    ids: jax.Array | None = None,
    window: int | None = None,
    thresholds: jax.Array | None = None,
    rule: str = "confidence",
    inject_input: bool = False,
    normalize_state: bool = False,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`loops` applications of one pre-norm transformer block to each row, and its logits.

    A loop: the state, under a LayerNorm with `normalize_state`, plus x with `inject_input`, plus
    the loop's step; plus causal attention of its norm; plus the MLP of the norm of that. Logits are
    the final norm times the embedding of each token.

    With `thresholds`, a token that has halted keeps its state; the others go on and still attend to
    it. It halts after the first loop after which its largest probability reaches its threshold
    (rule "confidence"), or in which its state has moved, as a share of the length that it has now,
    by no more than its threshold, as have those of all tokens before it (rule "convergence": what
    one of these has yet to find out may still move it).

    Args:
      x: the state before the first loop, float32 `[batch, length, width]`.
      weights: of the block and the readout.
      heads: of attention.
      loops: at most.
      dtype: of the products, bfloat16 or float32, loop by loop also float16; sums, norms and the
        state are float32.
      positions: int `[length]` or `[batch, length]`; queries and keys are turned by them (RoPE).
      ids, window: as `attention` takes them, ids integers alone.
      thresholds: float, broadcastable to `[batch, length]`; None runs all loops.
      rule: of `RULES`.
      inject_input, normalize_state: as above.
      implementation: "pallas", one launch, which a CPU interprets; "xla", plain `jnp` loop by loop,
        for rows of any length and width. None takes one launch on a GPU where a program holds the
        rows (`supports_fused`), else "xla".
      block_sizes: of the weights that a program reads at once; None takes what the table of tiles
        has for the device at hand.

    Returns:
      float32 logits `[batch, length, vocabulary]`, and the int32 number of loops that each token
      took, `[batch, length]`.

    Raises:
      ValueError: with "pallas", the shape is none that a program can hold here; shapes, dtypes or
        arguments that do not go together, naming them.
    """
    clip = window if weights.bias_table is None else weights.bias_table.shape[1] // 2 - 1
    positions, ids, thresholds = _checked(
        x, weights, heads, loops, positions, ids, window, thresholds, rule
    )
    arguments.require_one_of("implementation", implementation, (*arguments.KERNELS_OR_PLAIN, None))
    arguments.require_dtype("dtype", jnp.zeros((), dtype), *arguments.FLOATS)
    # NumPy's arrays take no traced indices.
    x, weights = jax.tree.map(jnp.asarray, (x, weights))
    batch, length, width = x.shape
    if batch * length == 0:
        logits = jnp.zeros((batch, length, len(weights.head)), jnp.float32)
        return logits, jnp.full((batch, length), loops, jnp.int32)
    target = targets.target_at_hand()
    with_ids = window is not None or weights.bias_table is not None
    sizes = length, width, heads, len(weights.head), dtype
    if implementation is None:
        launched = block_sizes is not None or supports_fused(*sizes, with_ids=with_ids)
        implementation = "pallas" if launched else "xla"
    if implementation == "pallas" and block_sizes is None and target is not None:
        block_sizes = _block_sizes_for(target, *sizes, with_ids)
    if implementation == "pallas" and block_sizes is None:
        raise ValueError(
            f"x is {x.shape}, {jnp.dtype(dtype).name}: no program on {target or 'this device'}"
            f" holds {length} tokens of {width} channels through all loops"
        )
    options = Options(
        width=width,
        heads=heads,
        vocabulary=len(weights.head),
        loops=loops,
        rule=None if thresholds is None else rule,
        injected=inject_input,
        normalized=normalize_state,
        # Of a product whose result goes into another, Triton gives each warp 16 rows; where there
        # are fewer rows than that, several warps would make the same ones, and their GELU.
        one_behind=block_sizes is not None
        and block_sizes.block_hidden < 16 * block_sizes.num_warps,
        attention=tile.Options(
            length=tiles.looped_tokens(length),
            head_dim=width // heads,
            scale=(width // heads) ** -0.5,
            causal=True,
            rate=0.0,
            clip=clip,
            windowed=window is not None,
            target=target,
            interpret=not targets.on_gpu(),
        ),
    )
    given = x, weights, positions, ids if clip is not None else None, thresholds
    chosen = options, jnp.dtype(dtype).name, block_sizes
    if implementation == "xla":
        return loop_by_loop(given, (), chosen, implementation)
    return run(given, (), chosen)


def _checked(x, weights: Weights, heads, loops, positions, ids, window, thresholds, rule):
    """Positions and ids as int32, and thresholds as float32 `[batch, length]`.

    Raises:
      ValueError: as `looped_block` does.
    """
    arguments.require_dtype("x", x, jnp.float32)
    if jnp.ndim(x) != 3:
        raise ValueError(f"x is {list(jnp.shape(x))}: expected [batch, length, width]")
    batch, length, width = x.shape
    if heads < 1 or width % heads:
        raise ValueError(f"heads = {heads}: must divide the width, {width}")
    if loops < 0:
        raise ValueError(f"loops = {loops}: must be at least 0")
    arguments.require_one_of("rule", rule, RULES)
    hidden = jnp.shape(weights.mlp_in)[-1]
    for name, shape in {
        "norm1": (width,), "qkv": (width, 3 * width), "attention_out": (width, width),
        "norm2": (width,), "mlp_in": (width, hidden), "mlp_out": (hidden, width),
        "final_norm": (width,), "head": (jnp.shape(weights.head)[0], width),
        "steps": (jnp.shape(weights.steps)[0], width), "mlp_value": (width, hidden),
    }.items():  # fmt: skip
        if getattr(weights, name) is not None:
            arguments.require_shape(f"weights.{name}", getattr(weights, name), shape)
    table = weights.bias_table
    if (table is not None or window is not None) and ids is None:
        raise ValueError("weights.bias_table and window need ids")
    if table is not None:
        columns = table.shape[1] if table.ndim == 2 and table.shape[1] % 2 == 0 else 4
        arguments.require_shape("weights.bias_table", table, (heads, columns))
        if window is not None and window != columns // 2 - 1:
            raise ValueError(
                f"window = {window}: must be the clip of bias_table, {columns // 2 - 1}"
            )
    if positions is not None:
        positions = arguments.token_positions(positions, batch, length)
    if ids is not None:
        arguments.require_shape("ids", ids, (batch, length))
        ids = arguments.whole_numbers("ids", ids)
    if thresholds is not None:
        try:
            thresholds = jnp.broadcast_to(thresholds, (batch, length)).astype(jnp.float32)
        except ValueError:
            shape = list(jnp.shape(thresholds))
            words = f"expected what broadcasts to [{batch}, {length}]"
            raise ValueError(f"thresholds is {shape}: {words}") from None
    return positions, ids, thresholds


def _run(given, _, chosen):
    """`looped_block` with all that is chosen: packs rows into programs and launches them."""
    x, weights, positions, ids, thresholds = given
    options, dtype, block_sizes = chosen
    batch, length, width = x.shape
    tokens = options.attention.length
    packed = functools.partial(_packed, rows=tokens // length, tokens=tokens)
    if thresholds is not None:
        # Where there is no token, one loop is enough.
        thresholds = packed(thresholds, filling=AT_ONCE[options.rule])
    logits, steps = run_kernel(
        packed(pad_end(x, (batch, length, padded(width)))),
        tile_weights(weights, options.heads, dtype, block_sizes),
        _attention_inputs(positions, ids, weights.bias_table, length, options, dtype, packed),
        thresholds,
        options,
        block_sizes,
    )
    unpacked = lambda y: y[:, : tokens // length * length].reshape(-1, length, *y.shape[2:])[:batch]  # noqa: E731
    logits = unpacked(logits)[..., : options.vocabulary]
    if steps is None:
        return logits, jnp.full((batch, length), options.loops, jnp.int32)
    return logits, jnp.abs(unpacked(steps))


# Of `((x, weights, positions, ids, thresholds), (), (options, dtype, block_sizes))`.
run = differentiable(_run, loop_by_loop)


def supports_fused(
    length: int, width: int, heads: int, vocabulary: int, dtype, *, with_ids: bool
) -> bool:
    """Whether `looped_block` is for such rows on the device at hand, and that is a GPU."""
    sizes = length, width, heads, vocabulary
    target = targets.target_at_hand()
    return targets.kernels_run() and _block_sizes_for(target, *sizes, dtype, with_ids) is not None


def _block_sizes_for(
    target, length, width, heads, vocabulary, dtype, with_ids: bool
) -> BlockSizes | None:
    """The tile that rows get on a target; None where a program cannot hold them."""
    dtype = jnp.dtype(dtype)
    if (
        length > (tiles.LONGEST_BIASED_ROW if with_ids else LONGEST_ROW)
        or width > LARGEST_WIDTH
        or width // heads > LARGEST_HEAD
        or width // heads % 2
        or vocabulary > LARGEST_VOCABULARY
        or dtype not in (jnp.bfloat16, jnp.float32)
    ):
        return None
    key = tiles.looped_key(length, padded(width), dtype.itemsize)
    entry = tiles.settings(target, tiles.LOOPED, key)
    return entry and BlockSizes(**entry)


def _attention_inputs(
    positions, ids, bias_table, length, options: Options, dtype, packed
) -> AttentionInputs:
    """The inputs of attention, for each program, or for one where all are alike."""
    heads = options.attention
    cos = sin = segment_ids = None
    if positions is not None:
        tables = rope_tables(jnp.atleast_2d(positions), heads.head_dim)
        tables = (pad_end(table, (*table.shape[:2], heads.padded_half)) for table in tables)
        cos, sin = (
            packed(table if len(table) > 1 else jnp.repeat(table, heads.length // length, axis=0))
            for table in (table.astype(tile.table_dtype(dtype)) for table in tables)
        )
    if heads.length // length > 1:
        # Rows that share a program do not see one another.
        segment_ids = (jnp.arange(heads.length, dtype=jnp.int32) // length)[None]
    if heads.clip is None:
        ids = None
    return AttentionInputs(
        cos=cos,
        sin=sin,
        ids=None if ids is None else packed(ids.astype(jnp.int32)),
        segment_ids=segment_ids,
        bias=None if bias_table is None else bias_table.astype(jnp.float32).reshape(-1),
    )


def _packed(array, rows: int, tokens: int, filling: float = 0):
    """`[batch, length, ...]` as `[programs, tokens, ...]`, `rows` rows to a program."""
    batch, length, *rest = array.shape
    programs = pl.cdiv(batch, rows)
    array = pad_end(array, (programs * rows, length, *rest), filling)
    array = array.reshape(programs, rows * length, *rest)
    return pad_end(array, (programs, tokens, *rest), filling)
