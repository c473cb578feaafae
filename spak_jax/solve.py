"""Answers additions: `python -m spak_jax.solve RUN "123+456" ...`, in ordinary digit order."""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.table import Table

from spak_jax import addition, evaluate
from spak_jax.command_line import InputError, console, run_program
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
    problems, task = addition.problems_from_integers(asked), trained.config.data.task
    tokens, answer = addition.render(problems, addition.text_length(problems.digits, task), task)
    looped = isinstance(trained.config.model, LoopedModel)
    run = evaluate.forward(trained.config)

    @jax.jit
    def written(weights, prompt, prompt_length):
        return evaluate.generate(run, weights, prompt, prompt_length)[0]

    @jax.jit
    def loops_taken(weights, tokens):
        return evaluate.forward(trained.config, halt=True)(weights, tokens)[1]

    starts = np.asarray(answer.argmax(-1))
    generated = written(trained.weights, tokens, starts)
    loops = np.asarray(loops_taken(trained.weights, generated)) if looped else None
    answers = []
    for row, start in enumerate(starts):
        digits = addition.decode(np.asarray(generated[row, start:])).partition("\n")[0]
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
