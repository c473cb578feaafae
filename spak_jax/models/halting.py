"""Tokens that stop once they have thought enough: what each keeps from block to block, and when the
whole batch is done."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ops import looped

# When a token halts: by the rules of one launch, or when what it reads out of its state, and what
# all before it do, has agreed with what was read out a loop before for some loops in a row. Geiping
# et al. 2025 (Scaling up Test-Time Compute with Latent Reasoning, arXiv 2502.05171) stop so, each
# token by itself and at once; the patience is that of Zhou et al. 2020 (BERT Loses Patience, arXiv
# 2006.04152). What is handed on from place to place may rest for a loop on its way.
RULES = (*looped.RULES, "agreement")
PATIENCE = 3
# Thresholds of what is not waited for. No two distributions differ by more than 1.
AT_ONCE = looped.AT_ONCE | {"agreement": 2.0}


class HaltingState(NamedTuple):
    """x: the stream, float32 `[batch, length, width]`. halted: bool `[batch, length]`. steps: int32
    `[batch, length]`, the blocks that each token took. rested: int32 `[batch, length]`, the last of
    them that changed nothing, by the rule "agreement"."""

    x: jax.Array
    halted: jax.Array
    steps: jax.Array
    rested: jax.Array


def init_halting(x: jax.Array) -> HaltingState:
    """Of tokens before the first block."""
    nothing = jnp.zeros(x.shape[:-1], bool)
    return HaltingState(x, nothing, *2 * (nothing.astype(jnp.int32),))


def update_halting(
    state: HaltingState,
    x: jax.Array,
    thresholds: jax.Array | None,
    unembed: Callable[[jax.Array], jax.Array],
    rule: str = "confidence",
    *,
    causal: bool = True,
    most: int | jax.Array | None = None,
) -> HaltingState:
    """The same after one more block: what has halted keeps its state.

    Args:
      state: before the block.
      x: the stream that the block made of it.
      thresholds, rule: as `LoopLM.halting_logits` takes them; None halts nothing.
      unembed: gives the logits of a stream.
      causal: whether a token sees those before it alone.
      most: blocks that a token takes at most, broadcastable to `[batch, length]`; None for no end.
    """
    if thresholds is None and most is None:
        return HaltingState(x, state.halted, state.steps + 1, state.rested)
    x = jnp.where(state.halted[..., None], state.x, x)
    steps = state.steps + ~state.halted
    halted, rested = state.halted, state.rested
    if thresholds is not None and rule == "confidence":
        halted |= jax.nn.softmax(unembed(x)).max(-1) >= thresholds
    elif thresholds is not None:
        if rule == "agreement":
            before, now = (jax.nn.softmax(unembed(v)) for v in (state.x, x))
            settled = jnp.abs(now - before).sum(-1) / 2 <= thresholds
        else:
            moved, size = ((v * v).sum(-1) for v in (x - state.x, x))
            settled = looped.has_converged(moved, size, thresholds)
        # What still moves may move all that see it: those behind it, or the whole sequence.
        if causal:
            settled = jax.lax.cummin(settled.astype(jnp.int32), axis=1) > 0
        else:
            settled = jnp.broadcast_to(settled.all(1, keepdims=True), settled.shape)
        rested = jnp.where(settled, rested + 1, 0)
        halted |= rested >= (PATIENCE if rule == "agreement" else 1)
    return HaltingState(x, halted if most is None else halted | (steps >= most), steps, rested)


Step = Callable[[HaltingState], HaltingState]


def until_halted(step: Step, state: HaltingState) -> HaltingState:
    """The state once every token of the batch has halted; not a step more is computed."""
    return jax.lax.while_loop(lambda state: ~state.halted.all(), step, state)


def for_steps(count: int) -> Callable[[Step, HaltingState], HaltingState]:
    """As `until_halted` where that comes in so many steps; all of them are computed, so that
    gradients can go back through them."""

    def repeat(step, state):
        return jax.lax.scan(lambda state, _: (step(state), None), state, length=count)[0]

    return repeat
