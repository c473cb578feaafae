"""Holds specifications to their invariants: `python -m spak_jax.check CONFIG ... [key.path=value
...] [--target NAME,...] [--results FILE ...]`.

Before a run: what can be known without a GPU, with `--target` also what a compiler knows of one
that is not there, and estimates. After it, with `--results`: what the run came to. Claims are held
against the results files that they name. Exit status 0 if nothing is broken, 1 if an invariant is
broken or a claim no longer holds, 2 if a specification cannot be used.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pallas_kernels.targets import TARGETS, parse_targets
from pallas_kernels.tuning import aot
from spak_jax.command_line import Failure, InputError, Table, console, progress, run_program
from spak_jax.config import Specification, read_specification
from spak_jax.config_words import add_words, files_and_overrides
from spak_jax.specs import check, claims


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.check", description="Hold specifications to their invariants."
    )
    add_words(parser, several=True)
    parser.add_argument(
        "--target",
        type=parse_targets,
        default=(),
        metavar="NAME,...",
        help=f"judge for these GPUs too, without having them: {', '.join(TARGETS)}",
    )
    parser.add_argument(
        "--results", type=Path, nargs="+", default=(), metavar="FILE", help="results of a run of it"
    )
    arguments = parser.parse_intermixed_args()
    paths, overrides = files_and_overrides(arguments)
    if arguments.results and len(paths) > 1:
        raise InputError(f"--results are of one specification: {len(paths)} are given")
    aot.touch_no_gpu()
    broken = []
    for path in paths:
        specification = read_specification(path, overrides)
        evaluated = (
            claims.read_evaluated(specification, arguments.results) if arguments.results else None
        )
        with progress(f"judging {path}"):
            findings = check.judge(specification, path.parent, arguments.target, evaluated)
            findings += claims.judge_claims(specification, path.parent)
        console.print(_table(specification, findings))
        broken += [f"{path}: {each.name}" for each in findings if each.verdict.holds is False]
    if broken:
        raise Failure(f"broken: {', '.join(broken)}")


def _table(specification: Specification, findings: Sequence[check.Finding]) -> Table:
    table = Table(title=f"{specification.name}: {specification.system.name}", title_justify="left")
    for heading in ("invariant", "on", "says", "measured", "verdict"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        says = finding.prose if finding.check is None else f"{finding.prose}\n{finding.check}"
        word = check.WORDS[finding.verdict.holds]
        table.add_row(
            finding.name, finding.target or "", says, check.measured(finding.verdict), word
        )
    return table


if __name__ == "__main__":
    run_program(main)
