"""How a looped model comes to an answer: `python -m spak_jax.trace RUN PROBLEM [--out DIR]`.

Draws, for one problem, where each loop looks from the tokens that write the answer, and how sure
it is of each symbol after each loop; of a problem that is laid out in rows, as a maze is, the
answer after some of the loops. The numbers drawn are written beside the pictures.
"""

import argparse
import json
from pathlib import Path

from spak_jax.command_line import (
    InputError,
    check_range,
    console,
    prepare_drawing,
    progress,
    run_program,
    writable_folder,
    write_file,
)
from spak_jax.config_sections import MAX_LENGTH
from spak_jax.evaluation.loaded import load
from spak_jax.evaluation.loops import MAX_LOOPS
from spak_jax.evaluation.trace import as_json, trace
from spak_jax.reports.scores import warn_of_loops


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.trace", description="Draw how a looped model comes to an answer."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("problem", metavar="PROBLEM", help="such as 999999+1")
    parser.add_argument("--loops", type=int, help="instead of the trained number")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for the pictures (default: RUN/trace)"
    )
    arguments = parser.parse_intermixed_args()
    check_range("--loops", arguments.loops, 1, MAX_LOOPS)
    loaded = load(arguments.run)
    try:
        problem = loaded.task.parse(arguments.problem, MAX_LENGTH)
    except ValueError as error:
        raise InputError(str(error)) from None
    out = writable_folder(arguments.out or arguments.run / "trace")
    # Before the work, as the folder is.
    prepare_drawing()
    from spak_jax.reports import raster_figure, trace_figure
    from spak_jax.reports.canvas import saved
    from spak_jax.reports.style import style

    with progress("tracing"):
        traced = loaded.describe() | as_json(trace(loaded, problem, arguments.loops))
    draw = raster_figure.draw if "raster" in traced else trace_figure.draw
    files = {"trace.json": json.dumps(traced) + "\n"}
    with style():
        files |= saved("trace", draw(traced))
    for name, content in files.items():
        write_file(out / name, content)
        console.print(f"wrote {out / name}")
    warn_of_loops(traced["config"]["model"], traced["loops"])


if __name__ == "__main__":
    run_program(main)
