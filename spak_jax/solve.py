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


def solve(trained: evaluate.Trained, pairs: list[tuple[int, int]]) -> list[Answer]:
    """Generates the answers greedily, with all the loops of training.

    Args:
      trained: the model.
      pairs: operands.
    """
    problems = addition.problems_from_integers(pairs)
    tokens, answer = addition.render(problems, addition.text_length(problems.a.shape[1]))
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
    try:
        pairs = [addition.parse_problem(text) for text in arguments.problems]
    except ValueError as error:
        raise InputError(str(error)) from None
    answers = solve(evaluate.load(arguments.run), pairs)
    table = Table()
    for heading in ("problem", "answer", "", "loops for each digit"):
        table.add_column(heading, overflow="fold")
    for (a, b), answer in zip(pairs, answers, strict=True):
        verdict = "right" if answer.text == str(a + b) else f"wrong: {a + b}"
        table.add_row(f"{a}+{b}", answer.text, verdict, " ".join(map(str, answer.loops)))
    console.print(table)


if __name__ == "__main__":
    run_program(main)
