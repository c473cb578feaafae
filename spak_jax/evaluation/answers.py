"""Answers that a model writes, and when each of their symbols was settled."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spak_jax import jax_settings, models
from spak_jax.config_sections import LoopedModel
from spak_jax.evaluation import generate
from spak_jax.evaluation.batching import calls, power_of_two, rows_per_call
from spak_jax.evaluation.forward import Halting, answer_fn
from spak_jax.evaluation.loaded import LoadedModel
from spak_jax.evaluation.loops import Loops


class Answer(NamedTuple):
    """What a model wrote behind `=`, in people's order, and the loops of each symbol.

    loops: that the token that chose it took. settled: after which of them it no longer changed;
    None where that was not asked for. Both empty for a model that does not loop.
    """

    text: str
    loops: list[int]
    settled: list[int] | None = None


@jax_settings.fixed()
def write_answers(
    loaded: LoadedModel,
    asked: Sequence[tuple[str, ...]],
    loops: int | Loops | None = None,
    halt: Halting | None = None,
) -> list[Answer]:
    """The most probable answers to problems, each as if it were asked alone: generated symbol by
    symbol, or read out in one pass.

    Args:
      loaded: the model.
      asked: the inputs of each problem.
      loops: None for as many as in training; `Loops` in one pass.
      halt: how each token stops; None for never.

    Returns:
      What was written. A text has room for the longest answer to such operands, its newline, and
      nothing more: a model that does not stop is cut off there.
    """
    config, task = loaded.config, loaded.task
    looped = isinstance(config.model, LoopedModel)
    write = jax.jit(answer_fn(config, loops, halt))
    sizes = np.array([task.length(problem) for problem in asked])

    def most(length: int) -> int:
        if task.one_pass:
            return rows_per_call(length)
        held = generate.max_cached_batch(config.model, length, loops)
        return min(rows_per_call(length), power_of_two(held))

    answers: list[Answer] = [Answer("", [])] * len(asked)
    for chosen, filled, length in calls(sizes, task, most):
        prompts = [task.prompt(asked[i]) for i in filled]
        tokens = np.array([task.encode(prompt.ljust(length, "\n")) for prompt in prompts])
        starts = np.array([task.answer_start(asked[i]) for i in filled], np.int32)
        room = np.array([task.filled_length(sizes[i]) for i in filled], np.int32)
        more = (loops.of(sizes[filled]),) if isinstance(loops, Loops) else ()
        written, taken = jax.device_get(
            write(loaded.weights, tokens.astype(np.int32), starts, room, *more)
        )
        for row, i in enumerate(chosen):
            start, end = starts[row], room[row]
            text = task.decode(written[row, start:end]).partition("\n")[0]
            spent = taken[row, start : start + len(text)].tolist() if looped else []
            order = task.in_written_order
            answers[i] = Answer(order(text), order(spent))
    return answers


@jax_settings.fixed()
def solve(
    loaded: LoadedModel, asked: Sequence[tuple[str, ...]], loops: int | Loops | None = None
) -> list[Answer]:
    """`write_answers` without halting.

    Args:
      loaded: the model.
      asked: the inputs of each problem.
      loops: None for as many as in training; `Loops` in one pass.

    Returns:
      Answers with the loops after which each symbol was settled.
    """
    config, task = loaded.config, loaded.task
    answers = write_answers(loaded, asked, loops)
    if not isinstance(config.model, LoopedModel):
        return [answer._replace(settled=[]) for answer in answers]
    definition, _ = models.abstract(config)

    @functools.partial(jax.jit, static_argnums=2)
    def choices(weights, tokens, most: int):
        network = nnx.merge(definition, weights)
        logits, _ = network.forward_with_intermediates(
            tokens, loops=most, position_ids=task.position_ids(tokens)
        )
        return logits.argmax(-1).astype(jnp.int16)

    order = task.in_written_order
    texts = [order(answer.text) for answer in answers]
    # Where each answer is chosen: a place before it was written, or where it is read out.
    shift = 0 if task.one_pass else 1
    prompts = [task.prompt(problem) for problem in asked]
    starts = [task.answer_start(problem) for problem in asked]
    if not task.one_pass:
        prompts = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    sizes = np.array([task.length(problem) for problem in asked])
    if not isinstance(loops, Loops):
        loops = Loops(loops or config.model.loops)
    own = loops.of(sizes)
    for chosen, filled, length in calls(sizes, task):
        rows = [task.encode(prompts[i].ljust(length, "\n")) for i in filled]
        most = int(own[filled].max())
        after_each = np.asarray(choices(loaded.weights, np.array(rows, np.int32), most))
        for row, i in enumerate(chosen):
            chosen_at = slice(starts[i] - shift, starts[i] - shift + len(texts[i]))
            same = after_each[: own[i], row, chosen_at] == np.array(task.encode(texts[i]))
            # The last loop that says otherwise, and one more; rounding may part the two passes.
            otherwise = np.where(same, 0, np.arange(1, own[i] + 1)[:, None]).max(0, initial=0)
            settled = np.minimum(otherwise + 1, own[i]).tolist()
            answers[i] = answers[i]._replace(settled=order(settled))
    return answers
