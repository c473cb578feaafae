"""Faster ways through blocks that are known to give the same: everything here knows `Block` itself.

A block leaves its last addition to the stream pending: addition, dropout and the norm behind them
are then one kernel (`add_layer_norm`), or with the loss another (`add_layer_norm_cross_entropy`).
The gradients of all blocks' matrices are made in one launch each (`with_batched_weight_grads`). A
short sequence of a narrow looped model goes through all loops of inference in one launch
(`fused_forward`).

A block of any other class, a subclass too, is called as it is, and is not deferred or launched: it
may differ anywhere.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import (
    add_layer_norm,
    add_layer_norm_cross_entropy,
    derivatives,
    looped_block,
    targets,
)
from pallas_kernels.ops import linear, looped
from pallas_kernels.ops.linear import DeferredWeightGrad
from spak_jax.models.block import Block, dropout
from spak_jax.positions.base import PositionInputs


class Stream(NamedTuple):
    """The residual stream between two blocks.

    x: float32 `[batch, length, width]`. pending_residual: what is still to be added to it, in the
    compute dtype; None for nothing.
    """

    x: jax.Array
    pending_residual: jax.Array | None = None


class BlockWeightGrads(NamedTuple):
    """The gradients of a block's matrices, deferred: the operands of each."""

    qkv: DeferredWeightGrad
    attention_out: DeferredWeightGrad
    mlp_in: DeferredWeightGrad
    mlp_out: DeferredWeightGrad


def is_known(block: nnx.Module) -> bool:
    """Whether what is here equals the block: its class is `Block`, and no subclass."""
    return type(block) is Block


def first_stream(block: nnx.Module, x: jax.Array, dtype) -> Stream:
    """The stream before the first block; nothing is pending, but it looks as between blocks."""
    return Stream(x, jnp.zeros(x.shape, dtype) if is_known(block) else None)


def apply_block(
    block: nnx.Module,
    stream: Stream,
    position_inputs: PositionInputs,
    keys: jax.Array | None = None,
    shift: jax.Array | None = None,
    deferred: BlockWeightGrads | None = None,
) -> Stream:
    """The stream after one block.

    Args:
      block: of any class.
      stream: before it.
      position_inputs: of the tokens.
      keys: four PRNG keys, the first for the dropout of what is pending, the others those of a
        block; None is deterministic.
      shift: float32 `[width]`, added to every token first.
      deferred: asks for those of the block's gradients instead of the gradients (`linear`).
    """
    if not is_known(block):
        x = apply_pending(stream, None, 0.0)
        x = x if shift is None else x + shift
        own = None if keys is None else keys[1:]
        return Stream(block(x, position_inputs=position_inputs, keys=own))
    pending, of_probabilities, of_attention, _ = (None,) * 4 if keys is None else keys
    x, qkv = attention_inputs(block, stream, pending, shift, deferred)
    # All three side by side: kernels read them, and write their gradients, where they lie.
    mixed = block.mix_heads(q=qkv, position_inputs=position_inputs, key=of_probabilities)
    return add_attention(block, x, mixed, of_attention, deferred)


def run_block(
    block: nnx.Module, x: jax.Array, position_inputs: PositionInputs, shift: jax.Array | None
) -> jax.Array:
    """`apply_block` without dropout, nothing left pending."""
    stream = apply_block(block, Stream(x), position_inputs, shift=shift)
    return apply_pending(stream, None, 0.0)


def apply_pending(stream: Stream, key: jax.Array | None, rate: float) -> jax.Array:
    """The stream with what was still to be added to it.

    key: of the dropout of that; None for none. rate: of the dropout.
    """
    x, pending = stream
    return x if pending is None else x + dropout(pending, rate, key)


def attention_weights(
    block: nnx.Module, x: jax.Array, position_inputs: PositionInputs, shift: jax.Array | None
) -> jax.Array | None:
    """Where a block looks, as `Block.attention_weights`; None where its class does not say."""
    if is_known(block):
        _, qkv = attention_inputs(block, Stream(x), shift=shift)
        q, k, _ = jnp.moveaxis(qkv, 2, 0)
        return block.weights_of_keys(q, k, position_inputs=position_inputs)
    if "attention_weights" not in vars(type(block)):
        return None
    x = x if shift is None else x + shift
    return block.attention_weights(x, position_inputs=position_inputs)


def attention_inputs(
    block: Block,
    stream: Stream,
    key: jax.Array | None = None,
    shift: jax.Array | None = None,
    deferred: BlockWeightGrads | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The first part of a known block: the stream, nothing pending, and queries, keys and values,
    `[batch, length, 3, heads, head_dim]`, before any rotation.

    key: of the dropout of what is pending. shift, deferred: as of `apply_block`.
    """
    x, normed = _add_layer_norm(block, *stream, block.norm1, key, shift)
    qkv = _linear(block, normed, block.qkv, deferred and deferred.qkv)
    return x, qkv.reshape(*x.shape[:2], 3, block.heads, x.shape[-1] // block.heads)


def add_attention(
    block: Block,
    x: jax.Array,
    mixed: jax.Array,
    key: jax.Array | None = None,
    deferred: BlockWeightGrads | None = None,
) -> Stream:
    """The rest of a known block.

    mixed: what heads took of values, `[batch, length, heads, head_dim]`. key: of the dropout of
    what attention adds. deferred: as of `apply_block`.
    """
    mixed = mixed.reshape(x.shape)
    mixed = _linear(block, mixed, block.attention_out, deferred and deferred.attention_out)
    x, normed = _add_layer_norm(block, x, mixed, block.norm2, key)
    if block.gated:
        return Stream(x, block.feed_forward(normed))
    inner, outer = block.mlp_in.kernel[...], block.mlp_out.kernel[...]
    of_mlp = deferred and deferred[2:]
    return Stream(x, linear.mlp(normed, inner, outer, dtype=block.dtype, deferred=of_mlp))


def _add_layer_norm(block, x, pending, norm: nnx.LayerNorm, key, shift=None):
    return add_layer_norm(
        x,
        pending,
        norm.scale[...],
        shift=shift,
        dropout_rate=block.dropout,
        dropout_key=key,
        dtype=block.dtype,
    )


def _linear(block, x, layer: nnx.Linear, deferred: DeferredWeightGrad | None):
    return linear.linear(x, layer.kernel[...], dtype=block.dtype, deferred=deferred)


def scan_or_unroll(step, carry, inputs, deferred: list[BlockWeightGrads] | None):
    """`lax.scan` of a step that is also given what is deferred of its block.

    On a GPU one step stands after another in the program: the loop would copy what each keeps for
    the backward pass, which took two fifths of a training step, and what is deferred would be
    stacked. On a CPU nothing is gained, and compiling takes longer.
    """
    if deferred is None and not targets.on_gpu():
        return jax.lax.scan(lambda carry, given: step(carry, given, None), carry, inputs)
    outputs = []
    for i in range(len(jax.tree.leaves(inputs)[0])):
        given = jax.tree.map(lambda x: x[i], inputs)  # noqa: B023
        carry, output = step(carry, given, None if deferred is None else deferred[i])
        outputs.append(output)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *outputs) if outputs else None


def add_loss(
    model: nnx.Module, stream: Stream, key: jax.Array | None, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As `apply_pending`, and the weighted sum of the cross-entropies of the model's logits.

    Args:
      model: whose final norm and embedding make the logits.
      stream: behind a block.
      key: PRNG key of the dropout of what is pending.
      targets: int `[batch, length]`, the right next tokens.
      weights: float32 `[batch, length]`.
    """
    x, pending = stream
    return add_layer_norm_cross_entropy(
        x,
        jnp.zeros(x.shape, model.dtype) if pending is None else pending,
        model.final_norm.scale[...],
        model.unembedding(),
        targets,
        weights,
        dropout_rate=model.dropout,
        dropout_key=None if pending is None else key,
    )


def with_batched_weight_grads(
    losses: Callable, model: nnx.Module, blocks: str, depth: int, given: tuple
) -> jax.Array:
    """`losses(model, *given)`, whose gradient makes those of all blocks' matrices in one launch
    each, where the blocks are known and kernels are for the batch.

    Args:
      losses: a function that takes a list of `BlockWeightGrads`, one a block, as a last argument.
      model: to be differentiated by.
      blocks: name of the model's attribute that holds them, or the one.
      depth: how many are gone through.
      given: other arguments, of which the first are the tokens, int `[batch, length]`.
    """
    count = given[0].size
    if _no_grads(getattr(model, blocks), count) is None:
        return losses(model, *given)
    definition, weights = nnx.split(model)

    def plain(weights, given, _):
        return losses(nnx.merge(definition, weights), *given)

    def forward(weights, given, _):
        none = _no_grads(getattr(nnx.merge(definition, weights), blocks), count)

        def deferring(weights, deferred):
            return losses(nnx.merge(definition, weights), *given, deferred)

        return jax.vjp(deferring, weights, [none] * depth)

    def backward(weights, given, pull, d_losses, _):
        d_weights, deferred = pull(d_losses)
        gradients = nnx.merge(definition, d_weights)
        _add_grads(getattr(gradients, blocks), deferred)
        return nnx.state(gradients)

    # Derivatives of other kinds are those of the same losses, a matrix at a time.
    derived = derivatives.differentiable(plain, plain, gradient=(forward, backward))
    return derived(weights, given, None)


def _no_grads(block: nnx.Module, tokens: int) -> BlockWeightGrads | None:
    """What asks for deferred gradients, for so many tokens; None where all are made at once."""
    if not is_known(block) or block.gated:
        return None
    sizes = [kernel.shape[-2:] for kernel in _matrices(block)]
    if not all(linear.supports(tokens, *size, block.dtype) for size in sizes):
        return None
    return BlockWeightGrads(
        *(linear.DeferredWeightGrad.zeros(tokens, *size, block.dtype) for size in sizes)
    )


def _add_grads(block: Block, deferred: list[BlockWeightGrads]) -> None:
    """To a block, whose weights are gradients, adds those that were deferred.

    deferred: of each loop; of a stack, whose matrices have an axis for them, of each layer.
    """
    for kernel, pairs in zip(_matrices(block), zip(*deferred, strict=True), strict=True):
        kernel[...] += linear.weight_grads(pairs).sum((0, 1) if kernel.ndim == 2 else 1)


def _matrices(block: Block) -> tuple[nnx.Param, ...]:
    layers = block.qkv, block.attention_out, block.mlp_in, block.mlp_out
    return tuple(layer.kernel for layer in layers)


def supports_fused(model: nnx.Module, tokens: jax.Array) -> bool:
    """Whether inference of a looped model takes one launch for such tokens: where its block is
    known and a program holds them, which is then the fastest (`benchmarks.models --inference`).
    Asked for an implementation of attention, the model runs its loops one by one."""
    block = model.block
    return (
        is_known(block)
        and block.causal
        and not model.config.answer_feedback
        and block.attention_implementation is None
        and looped.supports_fused(
            tokens.shape[1],
            model.config.width,
            block.heads,
            len(model.unembedding()),
            model.dtype,
            with_ids=block.biased or block.window is not None,
        )
    )


def fused_forward(
    model: nnx.Module,
    x: jax.Array,
    position_inputs: PositionInputs,
    *,
    loops: int,
    thresholds: jax.Array | None = None,
    rule: str = "confidence",
) -> tuple[jax.Array, jax.Array]:
    """All loops of a looped model, halting and logits in one launch.

    Args:
      model: a looped one.
      x: the embedded input, float32 `[batch, length, width]`.
      position_inputs: of the tokens.
      loops: how many.
      thresholds, rule: as `LoopLM.halting_logits` takes them; None runs all loops.

    Returns:
      As `LoopLM.halting_logits`.

    Raises:
      ValueError: the block is of a class that this does not know, or no program holds such rows.
    """
    block, kernel = model.block, lambda layer: layer.kernel[...]
    if not is_known(block):
        raise ValueError(f"model.block is a {type(block).__name__}: one launch knows Block alone")
    if not block.causal:
        raise ValueError("model.causal = false: one launch knows causal attention alone")
    if model.config.answer_feedback:
        raise ValueError("model.answer_feedback = true: one launch hands states on alone")
    weights = looped.Weights(
        norm1=block.norm1.scale[...],
        qkv=kernel(block.qkv),
        attention_out=kernel(block.attention_out),
        norm2=block.norm2.scale[...],
        mlp_in=kernel(block.mlp_in),
        mlp_out=kernel(block.mlp_out),
        final_norm=model.final_norm.scale[...],
        head=model.embedding.embedding[...],
        steps=model.step_embedding.embedding[...],
        mlp_value=kernel(block.mlp_value) if block.gated else None,
        bias_table=block._biases_of(position_inputs),
    )
    return looped_block(
        x,
        weights,
        heads=block.heads,
        loops=loops,
        dtype=model.dtype,
        positions=position_inputs.rope_positions,
        ids=position_inputs.position_ids,
        window=block._window_of(position_inputs),
        thresholds=thresholds,
        rule=rule,
        inject_input=model.config.inject_input,
        normalize_state=model.config.normalize_state,
        implementation="pallas",
    )
