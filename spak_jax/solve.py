"""Answers additions: `python -m spak_jax.solve RUN "123+456" ...`, in ordinary digit order."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spak_jax import addition, evaluate, jax_settings, models
from spak_jax.command_line import InputError, Table, console, progress, run_program
from spak_jax.config import LoopedModel


class Answer(NamedTuple):
    """What a model wrote behind `=`, most significant digit first, and when it was settled.

    `settled` counts, for each symbol of `text`, the loops after which it no longer changed; all
    loops are run all the same. Empty for a model that does not loop.
    """

    text: str
    settled: list[int]


@jax_settings.fixed()
def solve(trained: evaluate.Trained, asked: Sequence[tuple[int, ...]]) -> list[Answer]:
    """Generates the answers greedily, with all the loops of training.

    Args:
      trained: the model.
      asked: operands of each problem.
    """
    config, task = trained.config, trained.config.data.task
    texts = [answer.text for answer in evaluate.write_answers(trained, asked)]
    if not isinstance(config.model, LoopedModel):
        return [Answer(text, []) for text in texts]
    definition, _ = models.abstract(config, addition.VOCABULARY_SIZE)

    @jax.jit
    def choices(weights, tokens):
        network = nnx.merge(definition, weights)
        logits, _ = network.forward_with_intermediates(
            tokens, position_ids=addition.coupled_ids(tokens)
        )
        return logits.argmax(-1).astype(jnp.int8)

    prompts = [addition.prompt_text(numbers, task) for numbers in asked]
    digits = np.array([max(len(str(number)) for number in numbers) for numbers in asked])
    answers = [Answer(text, []) for text in texts]
    for chosen, filled, length in evaluate.calls(digits, task):
        rows = [addition.encode((prompts[i] + texts[i][::-1]).ljust(length, "\n")) for i in filled]
        tokens = np.array(rows, np.int32)
        after_each = np.asarray(choices(trained.weights, tokens))
        for row, i in enumerate(chosen):
            # The token before each symbol is the one that chose it.
            start, stop = len(prompts[i]), len(prompts[i]) + len(texts[i])
            same = after_each[:, row, start - 1 : stop - 1] == tokens[row, start:stop]
            loops = len(same)
            # The last loop that says otherwise, and one more; rounding may part the two passes.
            otherwise = np.where(same, 0, np.arange(1, loops + 1)[:, None]).max(0, initial=0)
            answers[i] = Answer(texts[i], np.minimum(otherwise + 1, loops)[::-1].tolist())
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.solve", description="Let a trained model add."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("problems", nargs="+", metavar="PROBLEM", help="such as 123+456")
    arguments = parser.parse_intermixed_args()
    trained = evaluate.load(arguments.run)
    task = trained.config.data.task
    try:
        asked = [addition.parse_problem(text, task) for text in arguments.problems]
    except ValueError as error:
        raise InputError(str(error)) from None
    with progress("answering"):
        answers = solve(trained, asked)
    table = Table()
    headings = ["problem", "answer", ""]
    if isinstance(trained.config.model, LoopedModel):
        headings += [f"each digit settled after, of {trained.config.model.loops} loops"]
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for numbers, answer in zip(asked, answers, strict=True):
        right = addition.answer_of(numbers, task)
        verdict = "right" if answer.text == right else f"wrong: {right}"
        settled = [" ".join(map(str, answer.settled))] * (len(headings) - 3)
        table.add_row(addition.shown(numbers, task), answer.text, verdict, *settled)
    console.print(table)


if __name__ == "__main__":
    run_program(main)
