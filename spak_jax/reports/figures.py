"""Results files to figures and tables.

All input is checked and all output is built in memory before the first file is written.
"""

from collections.abc import Sequence
from pathlib import Path

from spak_jax.command_line import InputError, console, write_file
from spak_jax.evaluation.results import read_results
from spak_jax.reports.canvas import saved
from spak_jax.reports.grouping import Evaluated, gather
from spak_jax.reports.length_figures import draw_generalization, draw_schemes
from spak_jax.reports.loops_figure import draw_test_time_loops
from spak_jax.reports.reach_figure import draw_reach
from spak_jax.reports.style import style
from spak_jax.reports.tables import latex_table, markdown_table, table_rows
from spak_jax.reports.training_figure import draw_training

# More systems in one panel cannot be read; where there are schemes, their figure has them all.
MOST_LINES = 12


def render(evaluated: Sequence[Evaluated]) -> dict[str, str | bytes]:
    """All files by name; the same contents for the same systems.

    Figures that the results hold nothing for are left out, and so are the tables where there are
    only the user's own problems.
    """
    files: dict[str, str | bytes] = {}
    with style():
        schemes = draw_schemes(evaluated)
        is_crowded = schemes is not None and len(evaluated) > MOST_LINES
        drawings = {
            "generalization": None if is_crowded else draw_generalization(evaluated),
            "schemes": schemes,
            "test_time_loops": draw_test_time_loops(evaluated),
            "reach": draw_reach(evaluated),
            "training": draw_training(evaluated),
        }
        for name, figure in drawings.items():
            if figure:
                files |= saved(name, figure)
    if table_rows(evaluated):
        files["table.md"] = markdown_table(evaluated)
        files["table.tex"] = latex_table(evaluated)
    return files


def export(paths: Sequence[Path], out: Path) -> None:
    """Draws the figures and writes the tables of results files into a folder.

    Raises:
      InputError: a file is no results file, or the folder cannot be written.
    """
    evaluated, repeats = gather([(path, read_results(path)) for path in paths])
    files = {out / name: content for name, content in render(evaluated).items()}
    for sentence in repeats:
        console.print(sentence)
    for path in files:
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder")
    for path, content in files.items():
        write_file(path, content)
        console.print(f"wrote {path}")
