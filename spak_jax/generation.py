"""Greedy generation: answers written token by token, for a batch of prompts of any lengths.

Two ways give the same tokens. With caches, one pass over the prompts keeps what later tokens see of
them, the keys and values of every block or loop, and each token then takes a pass over itself
alone. Recomputing, each token takes a pass over the whole rows. `takes_caches` chooses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from spak_jax import model, tasks
from spak_jax.config import Architecture, Config, LoopedModel

# The most numbers that caches hold: 1 GiB in float32.
CACHED_NUMBERS = 2**28


class Way(NamedTuple):
    """How the next token of each row is found.

    prepare: a function of weights and int32 tokens `[rows, length]`; what it gives is handed on
    from token to token. following: a function of weights, tokens, int32 `at`, `[rows]`, and what
    was handed on; gives the float32 logits `[rows, vocabulary]` behind the token at that place of
    each row, the int32 loops `[rows]` that token took, and what is handed on. `at` moves on by
    one from call to call, and prompts end at the first.
    """

    prepare: Callable
    following: Callable


def with_caches(
    config: Config, *, loops: int | None = None, thresholds: Callable | None = None
) -> Way:
    """Keeps what later tokens see of earlier ones.

    Args:
      config: of the model.
      loops: of a model that loops; None for as many as in training.
      thresholds: of tokens `[rows, length]`, where each token halts once it is sure; None for
        never.
    """
    definition, _ = model.abstract(config)
    task = tasks.of(config.data)
    told = lambda tokens: {  # noqa: E731
        "ids": task.position_ids(tokens),
        "thresholds": None if thresholds is None else thresholds(tokens),
    }

    def prepare(weights, tokens):
        return nnx.merge(definition, weights).remember(tokens, loops=loops, **told(tokens))

    def following(weights, tokens, at, seen):
        network = nnx.merge(definition, weights)
        logits, blocks, seen = network.continued(tokens, at, seen, **told(tokens))
        # A stack has no loops.
        return logits, blocks if isinstance(network, model.LoopLM) else 0 * blocks, seen

    return Way(prepare, following)


def recomputing(run: Callable) -> Way:
    """Runs a model over the whole rows for each token.

    Args:
      run: a function of weights and tokens `[rows, length]` that gives logits
        `[rows, length, vocabulary]` and loops `[rows, length]`.
    """

    def following(weights, tokens, at, nothing):
        rows = jnp.arange(len(tokens))
        logits, taken = run(weights, tokens)
        return logits[rows, at], taken[rows, at], nothing

    return Way(lambda weights, tokens: (), following)


def generate(
    way: Way,
    end: int,
    weights: Any,
    prompt: jax.Array,
    prompt_length: jax.Array,
    room: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes until each row has its end or its room is full.

    Args:
      way: how.
      end: the token that ends a text, and fills rows up.
      weights: of the model.
      prompt: int32 `[rows, length]`, texts up to and with `=`; what follows them is ignored.
      prompt_length: int32 `[rows]`, at least 1.
      room: int32 `[rows]`, how long each text may become, so that what is written does not depend
        on how wide the buffer is for others; None for as long as the buffer.

    Returns:
      int32 tokens `[rows, length]`, newlines after each answer, and int32 loops `[rows, length]`
      that the token before each took to choose it.
    """
    rows, length = jnp.arange(len(prompt)), prompt.shape[1]
    tokens = jnp.where(jnp.arange(length) < prompt_length[:, None], prompt, end)
    room = length if room is None else jnp.minimum(room, length)

    def going_on(carry):
        return ~carry[-1].all()

    def step(carry):
        tokens, steps, at, memory, done = carry
        logits, taken, memory = way.following(weights, tokens, at, memory)
        # What is chosen behind the newline or the end of the room goes nowhere.
        place = jnp.where(done, length, at + 1)
        chosen = logits.argmax(-1).astype(tokens.dtype)
        tokens = tokens.at[rows, place].set(chosen, mode="drop")
        steps = steps.at[rows, place].set(taken.astype(steps.dtype), mode="drop")
        at = jnp.minimum(at + 1, length - 1)
        return tokens, steps, at, memory, done | (chosen == end) | (at + 1 >= room)

    memory = way.prepare(weights, tokens)
    full = prompt_length >= room
    carry = (tokens, jnp.zeros_like(tokens), prompt_length - 1, memory, full)
    tokens, steps, *_ = jax.lax.while_loop(going_on, step, carry)
    return tokens, steps


def fastest(
    config: Config,
    run: Callable,
    *,
    loops: int | None = None,
    thresholds: Callable | None = None,
) -> Callable:
    """`generate` for a model, its first argument chosen by what is faster.

    Args:
      config: of the model.
      run: as `recomputing` takes it, of the same model, loops and thresholds.
      loops, thresholds: as `with_caches` takes them.

    Returns:
      A pure function of weights, prompt, prompt_length and, if wanted, room.
    """

    def write(weights, prompt, prompt_length, room=None):
        caches = takes_caches(config.model, prompt.shape, loops)
        way = with_caches(config, loops=loops, thresholds=thresholds)
        chosen = way if caches else recomputing(run)
        return generate(chosen, tasks.of(config.data).end, weights, prompt, prompt_length, room)

    return write


def takes_caches(architecture: Architecture, shape: tuple[int, int], loops: int | None) -> bool:
    """Whether rows of a shape, their number and length, are written with caches: they are the
    faster way (`benchmarks.models --generation`) unless they are too large."""
    rows, length = shape
    return rows <= most_rows(architecture, length, loops)


def most_rows(architecture: Architecture, length: int, loops: int | None) -> int:
    """Rows of so many tokens whose caches are not too large."""
    looped = isinstance(architecture, LoopedModel)
    depth = (loops or architecture.loops) if looped else architecture.layers
    return CACHED_NUMBERS // (2 * depth * length * architecture.width)
