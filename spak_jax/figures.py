"""Results to figures and tables: `python -m spak_jax.figures RESULTS.json ... [--out DIR]`."""

import argparse
from pathlib import Path

from spak_jax.command_line import prepare_drawing, run_program


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.figures",
        description="Draw the figures and write the table that results files hold.",
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("runs") / "figures", help="(%(default)s)"
    )
    arguments = parser.parse_args()
    prepare_drawing()
    from spak_jax.reports.figures import export

    export(arguments.results, arguments.out)


if __name__ == "__main__":
    run_program(main)
