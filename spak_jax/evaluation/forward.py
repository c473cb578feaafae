"""Compiled passes over a model: logits of whole texts, and answers generated."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from spak_jax import models, tasks
from spak_jax.command_line import InputError
from spak_jax.config import Config
from spak_jax.config_sections import LoopedModel
from spak_jax.evaluation import generate
from spak_jax.evaluation.loops import Loops
from spak_jax.models.halting import AT_ONCE
from spak_jax.tasks import Task


class Halting(NamedTuple):
    """A rule that stops tokens, of `spak_jax.models.halting.RULES`, and its thresholds before the
    `=` of a problem and from it on."""

    rule: str
    before: float
    after: float

    @classmethod
    def with_doubt(cls, rule: str, doubt: float) -> "Halting":
        threshold = 1 - doubt if rule == "confidence" else doubt
        return cls(rule, threshold, threshold)


# "Wait to think": the original's thresholds.
PUBLISHED_HALTING = Halting("confidence", 0.90, 0.999)


def forward(
    config: Config, loops: int | Loops | None = None, halt: Halting | None = None
) -> Callable:
    """A pure function of (weights, tokens) that gives logits and the loops each token took.

    With `Loops`, whichever they are, it takes the int32 loops `[batch]` of each sequence, too, so
    that one program serves all numbers. With halting, loops are the most that are taken.

    Raises:
      InputError: loops or halting are asked of a model that does not loop.
    """
    looped = isinstance(config.model, LoopedModel)
    if loops is not None or halt:
        require_looped(config, "--halt" if halt else "--loops")
    definition, _ = models.abstract(config)
    task = tasks.of(config.data)

    def run(weights, tokens, *of_each):
        network, ids = nnx.merge(definition, weights), task.position_ids(tokens)
        [most] = of_each or [loops]
        if halt:
            return network.halting_logits(
                tokens,
                halting_thresholds(tokens, halt, task),
                rule=halt.rule,
                loops=most,
                position_ids=ids,
            )
        more = {} if most is None else {"loops": most}
        taken = (config.model.loops if most is None else most) if looped else 0
        taken = jnp.broadcast_to(jnp.int32(taken)[..., None], tokens.shape)
        return network(tokens, position_ids=ids, **more), taken

    return run


def require_looped(config: Config, asked: str) -> None:
    """Raises InputError where loops or halting are asked of a model that does not loop."""
    if not isinstance(config.model, LoopedModel):
        raise InputError(
            f"{asked}: {config.name} is {config.model.described};"
            " only a looped model has loops to choose"
        )


def answer_fn(
    config: Config, loops: int | Loops | None = None, halt: Halting | None = None
) -> Callable:
    """What writes answers, `generate_fn`, or in one pass puts them in their places: a pure
    function of weights, prompt, prompt_length and max_length that gives tokens and loops. With
    `Loops` it takes the int32 loops of each sequence, too.

    Raises:
      InputError: the model does not loop, or `Loops` are asked of one that writes symbol by symbol.
    """
    task = tasks.of(config.data)
    if not task.one_pass:
        return generate_fn(config, loops, halt)
    run = forward(config, loops, halt)

    def fill_in(weights, prompt, prompt_length, max_length, *loops):
        logits, taken = run(weights, prompt, *loops)
        chosen = logits.argmax(-1).astype(prompt.dtype)
        return jnp.where(task.answering(prompt), chosen, prompt), taken

    return fill_in


def generate_fn(
    config: Config, loops: int | Loops | None = None, halt: Halting | None = None
) -> Callable:
    """`generate.make_generate_fn` for a model, with loops and halting as `forward` takes them.

    Raises:
      InputError: the model does not loop, or `Loops` are asked, which a cache has no place for.
    """
    if isinstance(loops, Loops):
        raise InputError(
            f"loops = {loops}: a model that writes symbol by symbol takes one number for all"
            " problems"
        )
    sure, task = None, tasks.of(config.data)
    if halt:
        sure = functools.partial(halting_thresholds, halting=halt, task=task)
    # Whether a token has come to rest hangs on all before it, of which a cache keeps nothing.
    decoder = generate.WITHOUT_CACHE if halt and halt.rule != "confidence" else None
    return generate.make_generate_fn(
        config, forward(config, loops, halt), loops=loops, thresholds=sure, decoder=decoder
    )


def halting_thresholds(tokens: jax.Array, halting: Halting, task: Task) -> jax.Array:
    """Of each token, float32 `[rows, length]`."""
    asked = jnp.where(task.answering(tokens), halting.after, halting.before)
    # What fills a row up after its problem is not waited for; nothing before it sees it.
    return jnp.where(task.after_end(tokens), AT_ONCE[halting.rule], asked).astype(jnp.float32)
