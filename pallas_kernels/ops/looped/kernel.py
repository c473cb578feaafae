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

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import tiles
from pallas_kernels.ops import gelu, instructions
from pallas_kernels.ops.attention import tile
from pallas_kernels.ops.attention.tile import LEAST, AttentionInputs, HeadView
from pallas_kernels.ops.looped.halting import has_converged
from pallas_kernels.ops.looped.weights import BlockSizes, TiledWeights
from pallas_kernels.ops.rows import EPSILON
from pallas_kernels.padding import MASKED


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


def run_kernel(
    x,
    weights: TiledWeights,
    inputs: AttentionInputs,
    thresholds,
    options: Options,
    block_sizes: BlockSizes,
):
    """The launch.

    Args:
      x: float32 `[programs, tokens, padded width]`.
      weights: as `tile_weights` gives them.
      inputs: of `[programs or 1, tokens, ...]`, the bias flat.
      thresholds: float32 `[programs, tokens]` or None.
      options, block_sizes: what is compiled.

    Returns:
      float32 logits `[programs, tokens, padded vocabulary]`; int32 loops that each token took,
      `[programs, tokens]`, below zero where it has halted, None without thresholds.
    """
    programs, tokens, channels = x.shape
    vocabulary = weights.head.shape[1]
    halts = options.rule is not None
    array = jax.ShapeDtypeStruct
    # HeadView beyond the heads' are masked where they are read.
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
    inputs_specs = AttentionInputs(*map(_program_spec, inputs))._replace(
        bias=_whole_spec(inputs.bias)
    )
    logits, steps, *_ = pl.pallas_call(
        functools.partial(_kernel, options=options),
        grid=(programs,),
        in_specs=[
            _program_spec(x),
            TiledWeights(*map(_whole_spec, weights)),
            inputs_specs,
            _program_spec(thresholds),
        ],
        out_specs=[*map(_program_spec, out_shape)],
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(
            num_warps=block_sizes.num_warps, num_stages=block_sizes.num_stages
        ),
        interpret=options.interpret,
        name=tiles.LOOPED,
    )(x, weights, inputs, thresholds)
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
    x_ref, weights, inputs, thresholds_ref, logits_ref, steps_ref, qkv_ref, kept_ref, *, options
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
        xs = _attend(xs, weights, qkv_ref, inputs, options)
        return _mlp(xs, _rounded_norm(xs, weights, options), weights, options)

    xs = _load_state(x_ref, weights)
    if options.rule is None:
        xs = jax.lax.fori_loop(0, options.loops, one_loop, xs)
    else:
        refs = thresholds_ref, steps_ref, kept_ref
        xs = _until_halted(one_loop, xs, weights, inputs, refs, options)
    plgpu.store(logits_ref, _logits(xs, weights, options).T)


def _until_halted(
    one_loop, xs, weights: TiledWeights, inputs: AttentionInputs, refs, options: Options
):
    """The state after the last loop, each token's from where it halted; stores the loops taken.

    In memory stands what is read back after a loop: of the tokens that have halted, by the rule
    "convergence" of all tokens as the loop found them; and the loops that each token has taken,
    below zero once it has halted. Carried from loop to loop, these would bring the layout that the
    logits have in the registers to the state, which products with weights have in another.
    """
    thresholds_ref, steps_ref, kept_ref = refs
    tokens, converging = options.attention.length, options.rule == "convergence"

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
        mask, other = (None, None) if converging else (halted, 0.0)
        xs, moved, size = [], 0.0, 0.0
        for j, x in enumerate(new):
            old = plgpu.load(kept_ref.at[_index(j)], mask=mask, other=other)
            x = jnp.where(halted, old, x)
            xs.append(x)
            if converging:
                moved += ((x - old) ** 2).sum(axis=0)
                size += (x * x).sum(axis=0)
        # Numbers, not truth values: see `tile._placed`.
        if converging:
            halts = _up_to_here(jnp.where(has_converged(moved, size, thresholds), 1, 0), inputs)
        else:
            logits = _logits(xs, weights, options)
            confident = 1 / jnp.exp(logits - logits.max(axis=0)[None, :]).sum(axis=0) >= thresholds
            halts = jnp.where(confident, 1, 0)
        running = jnp.where(taken < 0, 0, 1)
        # What one warp writes here, another may be yet to read.
        _wait_for_all_warps(options)
        keep(
            xs,
            None if converging else jnp.broadcast_to((running * halts > 0)[None, :], new[0].shape),
        )
        plgpu.store(steps_ref, jnp.where(taken < 0, taken, (i + 1) * (1 - 2 * halts)))
        return i + 1, tuple(xs), (running * (1 - halts)).max()

    if converging:
        keep(xs)
    plgpu.store(steps_ref, jnp.zeros(tokens, jnp.int32))
    _, xs, _ = jax.lax.while_loop(goes_on, body, (jnp.int32(0), xs, jnp.int32(1)))
    return xs


def _up_to_here(settled: jax.Array, inputs: AttentionInputs) -> jax.Array:
    """1 for tokens that are settled as all before them in their row are, else 0."""
    place = jnp.arange(len(settled))
    waits = (1 - settled)[:, None] * jnp.where(place[:, None] <= place[None, :], 1, 0)
    if inputs.segment_ids is not None:
        row = plgpu.load(inputs.segment_ids)
        waits *= jnp.where(row[:, None] == row[None, :], 1, 0)
    return 1 - waits.max(axis=0)


def _load_state(ref, weights: TiledWeights):
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


def _rounded_norm(xs, weights: TiledWeights, options: Options):
    return tuple(normed.astype(weights.qkv.dtype) for normed in _normed(xs, options))


def _project(normed, weights: TiledWeights, qkv_ref, options: Options) -> None:
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


def _attend(xs, weights: TiledWeights, qkv_ref, inputs: AttentionInputs, options: Options):
    """The state with what attention adds to it; one head after another."""
    heads, tokens = options.attention, options.attention.length
    product = functools.partial(_dot, options=options)

    def one(head, xs):
        q_ref, k_ref, v_ref = (
            HeadView(qkv_ref, (options.heads * i + head) * heads.head_dim) for i in range(3)
        )
        head_inputs = inputs
        if inputs.bias is not None:
            head_inputs = inputs._replace(bias=HeadView(inputs.bias, head * (2 * heads.clip + 2)))
        query = tile.load_qk(q_ref, head_inputs, 0, tokens, heads, tile.query_scale(heads))
        key = tile.load_qk(k_ref, head_inputs, 0, tokens, heads)
        value, key = tile.load_values(v_ref, key, 0, heads)
        scores = tile.scores(query, key, head_inputs, heads, masked=True, product=product)
        largest = jnp.maximum(scores.max(axis=1), LEAST)
        probs = instructions.exp2(scores - largest[:, None], options.interpret)
        total = probs.sum(axis=1)
        mixed = product(probs.astype(value.dtype), value) * (1 / total)[:, None]
        return _added(xs, weights.attention_out, head, mixed.astype(value.dtype).T, options)

    return jax.lax.fori_loop(0, options.heads, one, xs)


def _mlp(xs, normed, weights: TiledWeights, options: Options):
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


def _hidden(normed, weights: TiledWeights, t, options: Options):
    """The t-th of the blocks of hidden channels, `[block_hidden, tokens]`."""
    hidden = _product(weights.mlp_in, t, normed, options)
    if weights.mlp_value is None:
        below, _ = gelu.normal(hidden, options.interpret)
        hidden = hidden * below
    else:
        gate = 1 / (1 + instructions.exp2(-instructions.LOG2_E * hidden, options.interpret))
        hidden = hidden * gate * _product(weights.mlp_value, t, normed, options)
    return hidden.astype(normed[0].dtype)


def _logits(xs, weights: TiledWeights, options: Options):
    """`[padded vocabulary, tokens]`."""
    logits = _product(weights.head, 0, _rounded_norm(xs, weights, options), options)
    real = jnp.arange(weights.head.shape[1]) < options.vocabulary
    return jnp.where(real[:, None], logits, MASKED)


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
    """As `instructions.dot`; float32 operands as sums of two tf32 numbers each, in three products.

    That loses no more than float32's last two bits or so, and runs on the tensor cores; products
    that they have no part in would be unrolled into more code than registers can serve.
    """
    if a.dtype != jnp.float32 or options.interpret:
        return instructions.dot(a, b, transpose_b=transpose_b)
    b = b.T if transpose_b else b
    precise = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jax.lax.dot(a, b, precision=precise, preferred_element_type=jnp.float32)
