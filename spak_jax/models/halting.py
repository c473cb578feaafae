"""Tokens that stop once they have thought enough: what each keeps from block to block."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ops import looped


class HaltingState(NamedTuple):
    """x: the stream, float32 `[batch, length, width]`. halted: bool `[batch, length]`. steps: int32
    `[batch, length]`, the blocks that each token took."""

    x: jax.Array
    halted: jax.Array
    steps: jax.Array


def init_halting(x: jax.Array) -> HaltingState:
    """Of tokens before the first block."""
    nothing = jnp.zeros(x.shape[:-1], bool)
    return HaltingState(x, nothing, nothing.astype(jnp.int32))


def update_halting(
    state: HaltingState,
    x: jax.Array,
    thresholds: jax.Array | None,
    unembed: Callable[[jax.Array], jax.Array],
    rule: str = "confidence",
) -> HaltingState:
    """The same after one more block: what has halted keeps its state.

    Args:
      state: before the block.
      x: the stream that the block made of it.
      thresholds, rule: as `LoopLM.halting_logits` takes them; None halts nothing.
      unembed: gives the logits of a stream.
    """
    if thresholds is None:
        return HaltingState(x, state.halted, state.steps + 1)
    x = jnp.where(state.halted[..., None], state.x, x)
    if rule == "confidence":
        halts = jax.nn.softmax(unembed(x)).max(-1) >= thresholds
    else:
        moved, size = ((v * v).sum(-1) for v in (x - state.x, x))
        settled = looped.has_converged(moved, size, thresholds)
        halts = jax.lax.cummin(settled.astype(jnp.int32), axis=1) > 0
    return HaltingState(x, state.halted | halts, state.steps + ~state.halted)
