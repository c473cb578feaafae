"""All loops of one block, its readout and its halting in one launch: `looped_block`.

One program takes the tokens of a row, or of a few short ones, through all loops. Their float32
state lives in its registers from the first loop to the last; weights come tile by tile from the L2
cache, where all programs find the same ones; queries, keys and values of a loop pass through a
buffer of its own, which the caches hold (104 KiB at a width of 256). A program stops as soon as all
of its tokens have halted, whatever its neighbours do. Derivatives go loop by loop, and so do rows
that no program holds.

The state stands on its side, `[channels, tokens]`, in blocks of channels: weights are then the left
operands of all products and the normed state the right one. That one Triton keeps in shared memory,
where every tile of weights meets it; on the left it would be held in registers beside the state,
which no chip has enough of at a width of 256. Larger states do not fit into a multiprocessor's 256
KiB of registers together with what a product adds to them: 768 channels of 64 tokens are 192 KiB,
and with 256 channels of 128 tokens, 128 KiB, every tile tried spilled 260 to 640 bytes a thread.

What keeps registers free, seen in the compilers' output:
- Scales of norms are multiplied into the weights behind them, beforehand: read in the kernel, they
  are read once and kept through all loops.
- Each weight matrix is cut into tiles that lie in memory one after another in the order in which
  they are read.
- Queries, keys and values are made in one loop and read in another. In one, the normed state would
  be loaded as an operand of all three products and kept for them.
- What a halted token keeps is written to memory and read back after each loop; kept in registers it
  would take as many as the state.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import activation, arguments, linear, reference, targets, tile, tiles
from pallas_kernels.derivatives import differentiable
from pallas_kernels.dispatch import attention
from pallas_kernels.residual import add_and_norm
from pallas_kernels.rows import EPSILON
from pallas_kernels.tile import LEAST, NARROWEST, Columns, Extras

# When a token halts: its largest probability has reached its threshold, or its state and those of
# all before it have moved in a loop by no more than that share of themselves.
RULES = ("sure", "still")
# Thresholds of what is not waited for. No state moves by so many times its length.
AT_ONCE = {"sure": 0.0, "still": 1e6}
# What the registers of a program hold, and one tile of weights.
LARGEST_WIDTH = 256
LARGEST_HEAD = 64
LARGEST_VOCABULARY = 64
LONGEST_ROW = 128


class Weights(NamedTuple):
    """Of a looped block and its readout, float32, matrices `[inputs, outputs]`.

    norm1, norm2, final_norm: scales `[width]`. qkv: `[width, 3 * width]`, all heads of queries, of
    keys, of values. attention_out: `[width, width]`. mlp_in: `[width, hidden]`. mlp_out: `[hidden,
    width]`. head: token embeddings `[vocabulary, width]`. steps: `[steps, width]`, added to every
    token at the start of a loop; the last one repeats. mlp_value: as mlp_in, for SwiGLU; None for
    GELU. bias_table: `[heads, 2 * clip + 2]`, as `attention` takes it; None for none.
    """

    norm1: Any
    qkv: Any
    attention_out: Any
    norm2: Any
    mlp_in: Any
    mlp_out: Any
    final_norm: Any
    head: Any
    steps: Any
    mlp_value: Any = None
    bias_table: Any = None


class Tile(NamedTuple):
    """How a program is cut and launched.

    block_width: channels of the state that a tile of weights meets. block_hidden: queries, keys,
    values or hidden channels that it makes or takes; no more for a head's output than the head has.
    """

    block_width: int
    block_hidden: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Options:
    """What is fixed when the kernel is compiled.

    width, heads, vocabulary: the real sizes. loops: at most. rule: of `RULES`, None without
    halting. injected, normalized: whether each loop starts with the first state added, and from the
    last state under a LayerNorm. one_behind: whether hidden channels are taken in the round after
    the one that makes them. attention: of one head, over all tokens of a program.
    """

    width: int
    heads: int
    vocabulary: int
    loops: int
    rule: str | None
    injected: bool
    normalized: bool
    one_behind: bool
    attention: tile.Options

    @property
    def interpret(self) -> bool:
        return self.attention.interpret


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
    rule: str = "sure",
    inject_input: bool = False,
    normalize_state: bool = False,
    implementation: str | None = None,
    cut: Tile | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`loops` applications of one pre-norm transformer block to each row, and its logits.

    A loop: the state, under a LayerNorm with `normalize_state`, plus x with `inject_input`, plus
    the loop's step; plus causal attention of its norm; plus the MLP of the norm of that. Logits are
    the final norm times the embedding of each token.

    With `thresholds`, a token that has halted keeps its state; the others go on and still attend to
    it. It halts after the first loop after which its largest probability reaches its threshold
    (rule "sure"), or in which its state has moved, as a share of the length that it has now, by no
    more than its threshold, as have those of all tokens before it (rule "still": what one of these
    has yet to find out may still move it).

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
        rows (`takes`), else "xla".
      cut: how a program is cut; None takes what the table of tiles has for the device at hand.

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
    batch, length, width = x.shape
    if batch * length == 0:
        logits = jnp.zeros((batch, length, len(weights.head)), jnp.float32)
        return logits, jnp.full((batch, length), loops, jnp.int32)
    target = targets.target_at_hand()
    told_ids = window is not None or weights.bias_table is not None
    sizes = length, width, heads, len(weights.head), dtype
    if implementation is None:
        launched = cut is not None or takes(*sizes, with_ids=told_ids)
        implementation = "pallas" if launched else "xla"
    if implementation == "pallas" and cut is None and target is not None:
        cut = _tile_for(target, *sizes, told_ids)
    if implementation == "pallas" and cut is None:
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
        one_behind=cut is not None and cut.block_hidden < 16 * cut.num_warps,
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
    chosen = options, jnp.dtype(dtype).name, cut
    if implementation == "xla":
        return _loop_by_loop(given, (), chosen, implementation)
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
        shapes = (length,), (1, length), (batch, length)
        words = f"[{length}] or [batch, length]"
        arguments.require_shape("positions", positions, *shapes, words=words)
        positions = arguments.whole_numbers("positions", positions)
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
    options, dtype, cut = chosen
    batch, length, width = x.shape
    tokens = options.attention.length
    packed = functools.partial(_packed, rows=tokens // length, tokens=tokens)
    if thresholds is not None:
        # Where there is no token, one loop is enough.
        thresholds = packed(thresholds, filling=AT_ONCE[options.rule])
    logits, steps = run_kernel(
        packed(_padded(x, (batch, length, channels_of(width)))),
        arranged(weights, options.heads, dtype, cut),
        _extras(positions, ids, weights.bias_table, length, options, dtype, packed),
        thresholds,
        options,
        cut,
    )
    unpacked = lambda y: y[:, : tokens // length * length].reshape(-1, length, *y.shape[2:])[:batch]  # noqa: E731
    logits = unpacked(logits)[..., : options.vocabulary]
    if steps is None:
        return logits, jnp.full((batch, length), options.loops, jnp.int32)
    return logits, jnp.abs(unpacked(steps))


def _loop_by_loop(given, _, chosen, implementation: str | None = None):
    """The same by functions that can be differentiated: those that a training runs, or with "xla"
    plain `jnp` alone."""
    x, weights, positions, ids, thresholds = given
    options, dtype, _ = chosen
    (batch, length, width), told = x.shape, options.attention
    products = {"dtype": dtype, "implementation": implementation}
    linear_of = functools.partial(linear.linear, **products)
    norm_of = functools.partial(add_and_norm, dtype=jnp.dtype(dtype), implementation=implementation)

    def mlp(normed):
        if weights.mlp_value is None:
            return linear.mlp(normed, weights.mlp_in, weights.mlp_out, **products)
        gate = jax.nn.silu(linear_of(normed, weights.mlp_in))
        return linear_of(gate * linear_of(normed, weights.mlp_value), weights.mlp_out)

    def one_loop(state, shift):
        if options.normalized:
            state = reference.layer_norm(state, 1.0, EPSILON)
        state = state + x if options.injected else state
        state, normed = norm_of(state, None, weights.norm1, shift=shift)
        mixed = attention(
            linear_of(normed, weights.qkv).reshape(
                batch, length, 3, options.heads, width // options.heads
            ),
            positions=positions,
            ids=ids,
            bias_table=weights.bias_table,
            window=told.clip if told.windowed else None,
            implementation=implementation,
        )
        mixed = linear_of(mixed.reshape(batch, length, width), weights.attention_out)
        state, normed = norm_of(state, mixed, weights.norm2)
        return state + mlp(normed)

    def readout(state):
        normed = reference.layer_norm(state, weights.final_norm, EPSILON).astype(dtype)
        head = weights.head.astype(dtype)
        return jnp.einsum("...d,vd->...v", normed, head, preferred_element_type=jnp.float32)

    def step(carry, shift):
        state, halted, steps = carry
        new = jnp.where(halted[..., None], state, one_loop(state, shift))
        if options.rule == "sure":
            halts = jax.nn.softmax(readout(new)).max(-1) >= thresholds
        elif options.rule == "still":
            moved, size = ((v * v).sum(-1) for v in (new - state, new))
            settled = has_settled(moved, size, thresholds)
            halts = jax.lax.cummin(settled.astype(jnp.int32), axis=1) > 0
        else:
            halts = halted
        return (new, halted | halts, steps + ~halted), None

    index = jnp.minimum(jnp.arange(options.loops), len(weights.steps) - 1)
    nothing = jnp.zeros((batch, length), bool)
    first = x, nothing, nothing.astype(jnp.int32)
    (state, _, steps), _ = jax.lax.scan(step, first, weights.steps[index])
    return readout(state), steps


# Of `((x, weights, positions, ids, thresholds), (), (options, dtype, cut))`.
run = differentiable(_run, _loop_by_loop)


def takes(length: int, width: int, heads: int, vocabulary: int, dtype, *, with_ids: bool) -> bool:
    """Whether `looped_block` is for such rows on the device at hand, and that is a GPU."""
    sizes = length, width, heads, vocabulary
    target = targets.target_at_hand()
    return targets.kernels_run() and _tile_for(target, *sizes, dtype, with_ids) is not None


def _tile_for(target, length, width, heads, vocabulary, dtype, with_ids: bool) -> Tile | None:
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
    key = tiles.looped_key(length, channels_of(width), dtype.itemsize)
    entry = tiles.settings(target, tiles.LOOPED, key)
    return entry and Tile(**entry)


def channels_of(width: int) -> int:
    """That a state or a hidden layer takes on the chip."""
    return max(NARROWEST, pl.next_power_of_2(width))


class Arranged(NamedTuple):
    """Weights as the kernel reads them, transposed, padded with zeros and cut into tiles.

    qkv, mlp_in, mlp_value, head: `[tiles, rows, block_width]`. attention_out, mlp_out: `[tiles,
    block_width, columns]`, one head or `block_hidden` columns to a tile. In all of them the tiles
    of one block of rows or columns follow one another. steps: float32 `[steps, blocks,
    block_width]`.
    """

    qkv: Any
    attention_out: Any
    mlp_in: Any
    mlp_out: Any
    head: Any
    steps: Any
    mlp_value: Any

    @property
    def blocks(self) -> int:
        """Of the state."""
        return self.steps.shape[1]


def arranged(weights: Weights, heads: int, dtype, cut: Tile) -> Arranged:
    """The weights for one way to cut them; scales of norms are multiplied into what follows."""
    width, channels = weights.qkv.shape[0], channels_of(weights.qkv.shape[0])
    head_dim, padded_head = width // heads, tile.padded_head(width // heads)

    def into(matrix, scale, rows):
        """Tiles of what reads the state."""
        matrix = (matrix * scale[:, None]).T.astype(dtype)
        matrix = _padded(matrix, (pl.cdiv(len(matrix), rows) * rows, channels))
        matrix = matrix.reshape(-1, rows, channels // cut.block_width, cut.block_width)
        return matrix.swapaxes(1, 2).reshape(-1, rows, cut.block_width)

    def out_of(matrix, columns):
        """Tiles of what adds to the state."""
        matrix = matrix.T.astype(dtype)
        matrix = _padded(matrix, (channels, pl.cdiv(matrix.shape[1], columns) * columns))
        matrix = matrix.reshape(channels // cut.block_width, cut.block_width, -1, columns)
        return jnp.moveaxis(matrix, 2, 0).reshape(-1, cut.block_width, columns)

    by_head = weights.attention_out.reshape(heads, head_dim, width)
    by_head = _padded(by_head, (heads, padded_head, width)).reshape(-1, width)
    steps = weights.steps.astype(jnp.float32)
    value = weights.mlp_value
    return Arranged(
        qkv=into(weights.qkv, weights.norm1, cut.block_hidden),
        attention_out=out_of(by_head, padded_head),
        mlp_in=into(weights.mlp_in, weights.norm2, cut.block_hidden),
        mlp_out=out_of(weights.mlp_out, cut.block_hidden),
        head=into(weights.head.T, weights.final_norm, channels_of(len(weights.head))),
        steps=_padded(steps, (len(steps), channels)).reshape(len(steps), -1, cut.block_width),
        mlp_value=None if value is None else into(value, weights.norm2, cut.block_hidden),
    )


def _extras(positions, ids, bias_table, length, options: Options, dtype, packed) -> Extras:
    """What attention is told, for each program, or for one where all are alike."""
    heads = options.attention
    cos = sin = segment_ids = None
    if positions is not None:
        tables = reference.rope_tables(jnp.atleast_2d(positions), heads.head_dim)
        tables = (_padded(table, (*table.shape[:2], heads.padded_half)) for table in tables)
        cos, sin = (
            packed(table if len(table) > 1 else jnp.repeat(table, heads.length // length, axis=0))
            for table in (table.astype(tile.table_dtype(dtype)) for table in tables)
        )
    if heads.length // length > 1:
        # Rows that share a program do not see one another.
        segment_ids = (jnp.arange(heads.length, dtype=jnp.int32) // length)[None]
    if heads.clip is None:
        ids = None
    return Extras(
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
    array = _padded(array, (programs * rows, length, *rest), filling)
    array = array.reshape(programs, rows * length, *rest)
    return _padded(array, (programs, tokens, *rest), filling)


def _padded(array, shape, filling: float = 0):
    """Filled up at the end of each axis."""
    more = [(0, wanted - size) for wanted, size in zip(shape, array.shape, strict=True)]
    return jnp.pad(array, more, constant_values=filling) if any(map(max, more)) else array


def run_kernel(x, weights: Arranged, extras: Extras, thresholds, options: Options, cut: Tile):
    """The launch.

    Args:
      x: float32 `[programs, tokens, padded width]`.
      weights: as `arranged` gives them.
      extras: of `[programs or 1, tokens, ...]`, the bias flat.
      thresholds: float32 `[programs, tokens]` or None.
      options, cut: what is compiled.

    Returns:
      float32 logits `[programs, tokens, padded vocabulary]`; int32 loops that each token took,
      `[programs, tokens]`, below zero where it has halted, None without thresholds.
    """
    programs, tokens, channels = x.shape
    vocabulary = weights.head.shape[1]
    halts = options.rule is not None
    array = jax.ShapeDtypeStruct
    # Columns beyond the heads' are masked where they are read.
    columns = len(weights.qkv) // weights.blocks * weights.qkv.shape[1]
    columns += options.attention.padded_head
    out_shape = [
        array((programs, tokens, vocabulary), jnp.float32),
        array((programs, tokens), jnp.int32) if halts else None,
        array((programs, tokens, columns), weights.qkv.dtype),
        array((programs, weights.blocks, channels // weights.blocks, tokens), jnp.float32)
        if halts
        else None,
    ]
    extras_specs = Extras(*map(_program_spec, extras))._replace(bias=_whole_spec(extras.bias))
    logits, steps, *_ = pl.pallas_call(
        functools.partial(_kernel, options=options),
        grid=(programs,),
        in_specs=[
            _program_spec(x),
            Arranged(*map(_whole_spec, weights)),
            extras_specs,
            _program_spec(thresholds),
        ],
        out_specs=[*map(_program_spec, out_shape)],
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=cut.num_warps, num_stages=cut.num_stages),
        interpret=options.interpret,
        name=tiles.LOOPED,
    )(x, weights, extras, thresholds)
    return logits, steps


def _program_spec(array) -> pl.BlockSpec | None:
    """A program's part of an array; all of it for every program where there is one part."""
    if array is None:
        return None
    shared = array.shape[0] == 1
    rest = (0,) * (array.ndim - 1)
    return pl.BlockSpec((None, *array.shape[1:]), lambda i: (0 if shared else i, *rest))


def _whole_spec(array) -> pl.BlockSpec | None:
    if array is None:
        return None
    return pl.BlockSpec(array.shape, lambda i: (0,) * array.ndim)


def _kernel(
    x_ref, weights, extras, thresholds_ref, logits_ref, steps_ref, qkv_ref, kept_ref, *, options
):
    def one_loop(i, xs):
        if options.normalized:
            xs = _normed(xs, options)
        if options.injected:
            xs = tuple(x + first for x, first in zip(xs, _load_state(x_ref, weights), strict=True))
        step = jnp.minimum(i, weights.steps.shape[0] - 1)
        shifts = (plgpu.load(weights.steps.at[step, _index(j)]) for j in range(len(xs)))
        xs = tuple(x + shift[:, None] for x, shift in zip(xs, shifts, strict=True))
        _project(_rounded_norm(xs, weights, options), weights, qkv_ref, options)
        xs = _attend(xs, weights, qkv_ref, extras, options)
        return _mlp(xs, _rounded_norm(xs, weights, options), weights, options)

    xs = _load_state(x_ref, weights)
    if options.rule is None:
        xs = jax.lax.fori_loop(0, options.loops, one_loop, xs)
    else:
        refs = thresholds_ref, steps_ref, kept_ref
        xs = _until_halted(one_loop, xs, weights, extras, refs, options)
    plgpu.store(logits_ref, _logits(xs, weights, options).T)


def _until_halted(one_loop, xs, weights: Arranged, extras: Extras, refs, options: Options):
    """The state after the last loop, each token's from where it halted; stores the loops taken.

    In memory stands what is read back after a loop: of the tokens that have halted, by the rule
    "still" of all tokens as the loop found them; and the loops that each token has taken, below
    zero once it has halted. Carried from loop to loop, these would bring the layout that the logits
    have in the registers to the state, which products with weights have in another.
    """
    thresholds_ref, steps_ref, kept_ref = refs
    tokens, still = options.attention.length, options.rule == "still"

    def keep(xs, mask=None):
        for j, x in enumerate(xs):
            plgpu.store(kept_ref.at[_index(j)], x, mask=mask)

    def goes_on(carry):
        i, _, going = carry
        return (i < options.loops) & (going > 0)

    def body(carry):
        i, xs, _ = carry
        new = one_loop(i, xs)
        thresholds, taken = plgpu.load(thresholds_ref), plgpu.load(steps_ref)
        halted = jnp.broadcast_to((taken < 0)[None, :], new[0].shape)
        mask, other = (None, None) if still else (halted, 0.0)
        xs, moved, size = [], 0.0, 0.0
        for j, x in enumerate(new):
            old = plgpu.load(kept_ref.at[_index(j)], mask=mask, other=other)
            x = jnp.where(halted, old, x)
            xs.append(x)
            if still:
                moved += ((x - old) ** 2).sum(axis=0)
                size += (x * x).sum(axis=0)
        # Numbers, not truth values: see `tile._placed`.
        if still:
            halts = _up_to_here(jnp.where(has_settled(moved, size, thresholds), 1, 0), extras)
        else:
            logits = _logits(xs, weights, options)
            sure = 1 / jnp.exp(logits - logits.max(axis=0)[None, :]).sum(axis=0) >= thresholds
            halts = jnp.where(sure, 1, 0)
        running = jnp.where(taken < 0, 0, 1)
        # What one warp writes here, another may be yet to read.
        _wait_for_all_warps(options)
        keep(xs, None if still else jnp.broadcast_to((running * halts > 0)[None, :], new[0].shape))
        plgpu.store(steps_ref, jnp.where(taken < 0, taken, (i + 1) * (1 - 2 * halts)))
        return i + 1, tuple(xs), (running * (1 - halts)).max()

    if still:
        keep(xs)
    plgpu.store(steps_ref, jnp.zeros(tokens, jnp.int32))
    _, xs, _ = jax.lax.while_loop(goes_on, body, (jnp.int32(0), xs, jnp.int32(1)))
    return xs


def has_settled(moved: jax.Array, size: jax.Array, thresholds: jax.Array) -> jax.Array:
    """Whether a state has moved by no more than a share of its length; never below a share of 0.

    moved, size: the squared lengths of its change and of itself.
    """
    return moved <= thresholds * jnp.abs(thresholds) * size


def _up_to_here(settled: jax.Array, extras: Extras) -> jax.Array:
    """1 for tokens that are settled as all before them in their row are, else 0."""
    place = jnp.arange(len(settled))
    waits = (1 - settled)[:, None] * jnp.where(place[:, None] <= place[None, :], 1, 0)
    if extras.segment_ids is not None:
        row = plgpu.load(extras.segment_ids)
        waits *= jnp.where(row[:, None] == row[None, :], 1, 0)
    return 1 - waits.max(axis=0)


def _load_state(ref, weights: Arranged):
    """The state in blocks of channels, each `[block_width, tokens]`."""
    blocks, width = weights.steps.shape[1:]
    return tuple(plgpu.load(ref.at[:, pl.ds(j * width, width)]).T for j in range(blocks))


def _normed(xs, options: Options):
    """Each token less its mean, over its standard deviation; as `rows.normed`."""
    width = xs[0].shape[0]
    mean = (sum(x.sum(axis=0) for x in xs) / options.width)[None, :]

    def centred(j):
        channels = j * width + jnp.arange(width)
        return jnp.where((channels < options.width)[:, None], xs[j] - mean, 0.0)

    whole = len(xs) * width == options.width
    if not whole:
        variance = sum((centred(j) ** 2).sum(axis=0) for j in range(len(xs))) / options.width
        deviation = jax.lax.rsqrt(variance + EPSILON)[None, :]
        return tuple(centred(j) * deviation for j in range(len(xs)))
    variance = sum(((x - mean) ** 2).sum(axis=0) for x in xs) / options.width
    deviation = jax.lax.rsqrt(variance + EPSILON)[None, :]
    # Not `(x - mean) * deviation`: the differences would be kept from the sum above, as many as the
    # state is.
    shift = mean * deviation
    return tuple(x * deviation - shift for x in xs)


def _rounded_norm(xs, weights: Arranged, options: Options):
    return tuple(normed.astype(weights.qkv.dtype) for normed in _normed(xs, options))


def _project(normed, weights: Arranged, qkv_ref, options: Options) -> None:
    """Queries, keys and values of all heads, to `[tokens, columns]`."""
    rows = weights.qkv.shape[1]

    def some(t, nothing):
        made = _product(weights.qkv, t, normed, options)
        plgpu.store(qkv_ref.at[:, pl.ds(t * rows, rows)], made.astype(qkv_ref.dtype).T)
        return nothing

    # No warp may still read those of the loop before, nor read these before all are there.
    _wait_for_all_warps(options)
    jax.lax.fori_loop(0, weights.qkv.shape[0] // weights.blocks, some, ())
    _wait_for_all_warps(options)


def _wait_for_all_warps(options: Options) -> None:
    if not options.interpret:
        plgpu.debug_barrier()


def _attend(xs, weights: Arranged, qkv_ref, extras: Extras, options: Options):
    """The state with what attention adds to it; one head after another."""
    heads, tokens = options.attention, options.attention.length
    product = functools.partial(_dot, options=options)

    def one(head, xs):
        q_ref, k_ref, v_ref = (
            Columns(qkv_ref, (options.heads * i + head) * heads.head_dim) for i in range(3)
        )
        told = extras
        if extras.bias is not None:
            told = extras._replace(bias=Columns(extras.bias, head * (2 * heads.clip + 2)))
        query = tile.load_side(q_ref, told, 0, tokens, heads, tile.query_scale(heads))
        key = tile.load_side(k_ref, told, 0, tokens, heads)
        value, key = tile.load_values(v_ref, key, 0, heads)
        scores = tile.scores(query, key, told, heads, masked=True, product=product)
        largest = jnp.maximum(scores.max(axis=1), LEAST)
        chances = tile.exp2(scores - largest[:, None], options.interpret)
        total = chances.sum(axis=1)
        mixed = product(chances.astype(value.dtype), value) * (1 / total)[:, None]
        return _added(xs, weights.attention_out, head, mixed.astype(value.dtype).T, options)

    return jax.lax.fori_loop(0, options.heads, one, xs)


def _mlp(xs, normed, weights: Arranged, options: Options):
    """The state with what the MLP adds to it; some hidden channels after others."""
    rounds = weights.mlp_in.shape[0] // weights.blocks

    def at_once(t, xs):
        return _added(xs, weights.mlp_out, t, _hidden(normed, weights, t, options), options)

    def one_behind(t, carry):
        xs, before = carry
        xs = _added(xs, weights.mlp_out, jnp.maximum(t - 1, 0), before, options)
        return xs, _hidden(normed, weights, jnp.minimum(t, rounds - 1), options)

    if not options.one_behind:
        return jax.lax.fori_loop(0, rounds, at_once, xs)
    nothing = jnp.zeros((weights.mlp_in.shape[1], options.attention.length), normed[0].dtype)
    return jax.lax.fori_loop(0, rounds + 1, one_behind, (xs, nothing))[0]


def _hidden(normed, weights: Arranged, t, options: Options):
    """The t-th of the blocks of hidden channels, `[block_hidden, tokens]`."""
    hidden = _product(weights.mlp_in, t, normed, options)
    if weights.mlp_value is None:
        below, _ = activation.normal(hidden, options.interpret)
        hidden = hidden * below
    else:
        gate = 1 / (1 + tile.exp2(-tile.LOG2_E * hidden, options.interpret))
        hidden = hidden * gate * _product(weights.mlp_value, t, normed, options)
    return hidden.astype(normed[0].dtype)


def _logits(xs, weights: Arranged, options: Options):
    """`[padded vocabulary, tokens]`."""
    logits = _product(weights.head, 0, _rounded_norm(xs, weights, options), options)
    real = jnp.arange(weights.head.shape[1]) < options.vocabulary
    return jnp.where(real[:, None], logits, tile.MASKED)


def _product(ref, t, normed, options: Options):
    """`[rows, tokens]`: the t-th block of rows of a matrix times the normed state."""
    tiles_of_it = (plgpu.load(ref.at[_index(t * len(normed) + j)]) for j in range(len(normed)))
    return sum(_dot(a, b, options=options) for a, b in zip(tiles_of_it, normed, strict=True))


def _added(xs, ref, t, values, options: Options):
    """The state plus the t-th block of columns of a matrix times `values`, `[columns, tokens]`."""
    return tuple(
        x + _dot(plgpu.load(ref.at[_index(t * len(xs) + j)]), values, options=options)
        for j, x in enumerate(xs)
    )


def _index(number):
    """As an array: refs that are interpreted take no plain numbers."""
    return jnp.asarray(number, jnp.int32)


def _dot(a, b, *, transpose_b=False, options: Options):
    """As `tile.dot`; float32 operands as sums of two tf32 numbers each, in three products.

    That loses no more than float32's last two bits or so, and runs on the tensor cores; products
    that they have no part in would be unrolled into more code than registers can serve.
    """
    if a.dtype != jnp.float32 or options.interpret:
        return tile.dot(a, b, transpose_b=transpose_b)
    b = b.T if transpose_b else b
    precise = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jax.lax.dot(a, b, precision=precise, preferred_element_type=jnp.float32)
