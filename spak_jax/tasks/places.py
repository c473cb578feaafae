"""Walks along the places of sequences, one after another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def over_places(step: Callable, state: Any, sequence) -> tuple[Any, Any]:
    """Carries a state along the last axis of a sequence, from its first place on.

    In programs it is `jax.lax.scan`, compiled once for all places; arrays of the host are walked in
    a loop, so that nothing is compiled for each length.

    Args:
      step: `step(xp, state, symbols)`, with the module of the arrays, `jnp` or `np`, and the
        symbols `[...]` of one place; returns the next state and what it gives for the place.
      state: a tree of arrays, the state before the first place.
      sequence: `[..., places]`, of the device or of the host.

    Returns:
      The last state, and what was given, stacked along a new last axis: a tree of arrays
      `[..., places]`.
    """
    if isinstance(sequence, np.ndarray):
        given = []
        for place in range(sequence.shape[-1]):
            state, one = step(np, state, sequence[..., place])
            given.append(one)
        return state, jax.tree.map(lambda *parts: np.stack(parts, -1), *given)
    state, stacked = jax.lax.scan(
        lambda state, symbols: step(jnp, state, symbols), state, jnp.moveaxis(sequence, -1, 0)
    )
    return state, jax.tree.map(lambda array: jnp.moveaxis(array, 0, -1), stacked)
