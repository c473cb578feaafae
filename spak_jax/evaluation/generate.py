"""Greedy generation: answers written token by token, for a batch of prompts of any lengths.

Two decoders give the same tokens. `with_cache` makes one pass over the prompts that keeps what
later tokens see of them, the keys and values of every block or loop; each token then takes a pass
over itself alone. `without_cache` takes a pass over the whole sequences for each token, and serves
every model. `pick_decoder` chooses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from spak_jax import models, tasks
from spak_jax.config import Config
from spak_jax.config_sections import Architecture, Network
from spak_jax.models import kv_cache
from spak_jax.registry import BLOCKS

# The decoders, by name.
WITH_CACHE, WITHOUT_CACHE = "with cache", "without cache"
# The most numbers that a cache holds: 1 GiB in float32.
CACHED_NUMBERS = 2**28


class Decoder(NamedTuple):
    """How the next token of each sequence is found.

    prefill: a function of weights and int32 tokens `[batch, length]`; what it gives is handed on
    from token to token. decode_step: a function of weights, tokens, int32 `cache_position`,
    `[batch]`, and what was handed on; gives the float32 logits `[batch, vocabulary]` behind the
    token at that place of each sequence, the int32 loops `[batch]` that token took, and what is
    handed on. `cache_position` moves on by one from call to call, and prompts end at the first.
    """

    prefill: Callable
    decode_step: Callable


def with_cache(
    config: Config, *, loops: int | None = None, thresholds: Callable | None = None
) -> Decoder:
    """Keeps what later tokens see of earlier ones.

    Args:
      config: of the model.
      loops: of a model that loops; None for as many as in training.
      thresholds: of tokens `[batch, length]`, where each token halts once it is sure; None for
        never.
    """
    definition, _ = models.abstract(config)
    task = tasks.of(config.data)
    given = lambda tokens: {  # noqa: E731
        "position_ids": task.position_ids(tokens),
        "thresholds": None if thresholds is None else thresholds(tokens),
    }

    def prefill(weights, tokens):
        model = nnx.merge(definition, weights)
        return kv_cache.prefill(model, tokens, loops=loops, **given(tokens))

    def decode_step(weights, tokens, cache_position, cache):
        model = nnx.merge(definition, weights)
        logits, blocks, cache = kv_cache.decode_step(
            model, tokens, cache_position, cache, **given(tokens)
        )
        # A stack has no loops.
        return logits, blocks if isinstance(model, models.LoopLM) else 0 * blocks, cache

    return Decoder(prefill, decode_step)


def without_cache(forward: Callable) -> Decoder:
    """Runs a model over the whole sequences for each token.

    Args:
      forward: a function of weights and tokens `[batch, length]` that gives logits
        `[batch, length, vocabulary]` and loops `[batch, length]`.
    """

    def decode_step(weights, tokens, cache_position, nothing):
        batch = jnp.arange(len(tokens))
        logits, loops = forward(weights, tokens)
        return logits[batch, cache_position], loops[batch, cache_position], nothing

    return Decoder(lambda weights, tokens: (), decode_step)


def generate(
    decoder: Decoder,
    end: int,
    weights: Any,
    prompt: jax.Array,
    prompt_length: jax.Array,
    max_length: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes until each sequence has its end or may not become longer.

    Args:
      decoder: how.
      end: the token that ends a text, and fills sequences up.
      weights: of the model.
      prompt: int32 `[batch, length]`, texts up to and with `=`; what follows them is ignored.
      prompt_length: int32 `[batch]`, at least 1.
      max_length: int32 `[batch]`, how long each text may become, so that what is written does not
        depend on how wide the buffer is for others; None for as long as the buffer.

    Returns:
      int32 tokens `[batch, length]`, newlines after each answer, and int32 loops `[batch, length]`
      that the token before each took to choose it.
    """
    batch, length = jnp.arange(len(prompt)), prompt.shape[1]
    tokens = jnp.where(jnp.arange(length) < prompt_length[:, None], prompt, end)
    max_length = length if max_length is None else jnp.minimum(max_length, length)

    def cond_fn(carry):
        return ~carry[-1].all()

    def body_fn(carry):
        tokens, loops, cache_position, cache, done = carry
        logits, taken, cache = decoder.decode_step(weights, tokens, cache_position, cache)
        # What is chosen behind the newline or the greatest length goes nowhere.
        place = jnp.where(done, length, cache_position + 1)
        chosen = logits.argmax(-1).astype(tokens.dtype)
        tokens = tokens.at[batch, place].set(chosen, mode="drop")
        loops = loops.at[batch, place].set(taken.astype(loops.dtype), mode="drop")
        cache_position = jnp.minimum(cache_position + 1, length - 1)
        done |= (chosen == end) | (cache_position + 1 >= max_length)
        return tokens, loops, cache_position, cache, done

    cache = decoder.prefill(weights, tokens)
    full = prompt_length >= max_length
    carry = (tokens, jnp.zeros_like(tokens), prompt_length - 1, cache, full)
    tokens, loops, *_ = jax.lax.while_loop(cond_fn, body_fn, carry)
    return tokens, loops


def make_generate_fn(
    config: Config,
    forward: Callable,
    *,
    loops: int | None = None,
    thresholds: Callable | None = None,
    decoder: str | None = None,
) -> Callable:
    """`generate` for a model, its first argument chosen.

    Args:
      config: of the model.
      forward: as `without_cache` takes it, of the same model, loops and thresholds.
      loops, thresholds: as `with_cache` takes them.
      decoder: `WITH_CACHE` or `WITHOUT_CACHE`; None for what `pick_decoder` says.

    Returns:
      A pure function of weights, prompt, prompt_length and, if wanted, max_length.

    Raises:
      ValueError: there is no decoder of that name.
    """
    if decoder not in (WITH_CACHE, WITHOUT_CACHE, None):
        raise ValueError(f"decoder = {decoder!r}: {WITH_CACHE!r}, {WITHOUT_CACHE!r} or None")

    def generate_fn(weights, prompt, prompt_length, max_length=None):
        name = decoder or pick_decoder(config.model, prompt.shape, loops)
        if name == WITH_CACHE:
            chosen = with_cache(config, loops=loops, thresholds=thresholds)
        else:
            chosen = without_cache(forward)
        return generate(
            chosen, tasks.of(config.data).end, weights, prompt, prompt_length, max_length
        )

    return generate_fn


def pick_decoder(architecture: Network, shape: tuple[int, int], loops: int | None) -> str:
    """The faster decoder (`benchmarks.models --generation`) for sequences of a shape, their number
    and length: with a cache, unless it is too large or serves no such block, or
    there is no attention whose keys and values could be kept."""
    batch, length = shape
    attends = isinstance(architecture, Architecture)
    if not (attends and kv_cache.supports_cache(BLOCKS.get(architecture.block))):
        return WITHOUT_CACHE
    return WITH_CACHE if batch <= max_cached_batch(architecture, length, loops) else WITHOUT_CACHE


def max_cached_batch(architecture: Network, length: int, loops: int | None) -> int:
    """Sequences of so many tokens whose cache is not too large."""
    return CACHED_NUMBERS // (2 * architecture.depth(loops) * length * architecture.width)
