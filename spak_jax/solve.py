"""Answers problems: `python -m spak_jax.solve RUN "123+456" ...`, as people write them."""

import argparse
from pathlib import Path

from spak_jax.command_line import InputError, Table, console, progress, run_program
from spak_jax.config_sections import MAX_LENGTH, LoopedModel
from spak_jax.evaluation.answers import solve
from spak_jax.evaluation.loaded import load
from spak_jax.evaluation.loops import asked_loops


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.solve", description="Let a trained model answer problems."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("problems", nargs="+", metavar="PROBLEM", help="such as 123+456")
    parser.add_argument(
        "--loops",
        help="instead of the trained number, or so many times the length of each problem: 2x, 2x+8",
    )
    arguments = parser.parse_intermixed_args()
    loops = asked_loops(arguments.loops)
    loaded = load(arguments.run)
    task = loaded.task
    try:
        asked = [task.parse(text, MAX_LENGTH) for text in arguments.problems]
    except ValueError as error:
        raise InputError(str(error)) from None
    with progress("answering"):
        answers = solve(loaded, asked, loops)
    table = Table()
    headings = ["problem", "answer", ""]
    if isinstance(loaded.config.model, LoopedModel):
        headings += [f"each symbol settled after, of {loops or loaded.config.model.loops} loops"]
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for problem, answer in zip(asked, answers, strict=True):
        right = task.solve(problem)
        verdict = "right" if answer.text == right else f"wrong: {right}"
        settled = [" ".join(map(str, answer.settled))] * (len(headings) - 3)
        table.add_row(task.format(problem), answer.text, verdict, *settled)
    console.print(table)


if __name__ == "__main__":
    run_program(main)
