"""Answers additions: `python -m spak_jax.solve RUN "123+456" ...`, in ordinary digit order."""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from spak_jax import addition, evaluate
from spak_jax.command_line import InputError, Table, console, progress, run_program
from spak_jax.config import LoopedModel


class Answer(NamedTuple):
    """What a model wrote behind `=`, most significant digit first, and the loops each digit took.

    `loops` counts, for each symbol of `text`, the loops until the model was sure enough of it to
    halt; empty for a model that does not loop.
    """

    text: str
    loops: list[int]


def solve(trained: evaluate.Trained, asked: list[tuple[int, ...]]) -> list[Answer]:
    """Generates the answers greedily, with all the loops of training.

    Args:
      trained: the model.
      asked: operands of each problem.
    """
    task = trained.config.data.task
    prompts = [addition.problem_text(numbers, task).partition("=")[0] + "=" for numbers in asked]
    digits = max(len(str(number)) for numbers in asked for number in numbers)
    length = addition.text_length(digits, task)
    tokens = np.array([addition.encode(prompt.ljust(length, "\n")) for prompt in prompts], np.int32)
    starts = np.array([len(prompt) for prompt in prompts], np.int32)
    looped = isinstance(trained.config.model, LoopedModel)

    @jax.jit
    def written(weights, prompt, prompt_length):
        tokens, _ = evaluate.writer(trained.config)(weights, prompt, prompt_length)
        if not looped:
            return tokens, None
        return tokens, evaluate.forward(trained.config, halt=True)(weights, tokens)[1]

    generated, loops = jax.device_get(written(trained.weights, tokens, starts))
    answers = []
    for row, start in enumerate(starts):
        digits = addition.decode(generated[row, start:]).partition("\n")[0]
        # The token before each digit is the one that chose it.
        taken = loops[row, start - 1 : start - 1 + len(digits)].tolist() if looped else []
        answers.append(Answer(digits[::-1], taken[::-1]))
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
    for heading in ("problem", "answer", "", "loops for each digit"):
        table.add_column(heading, overflow="fold")
    for numbers, answer in zip(asked, answers, strict=True):
        right = addition.answer_of(numbers, task)
        verdict = "right" if answer.text == right else f"wrong: {right}"
        loops = " ".join(map(str, answer.loops))
        table.add_row(addition.shown(numbers, task), answer.text, verdict, loops)
    console.print(table)


if __name__ == "__main__":
    run_program(main)
