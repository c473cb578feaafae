"""Compiles the kernels for GPUs that are not there and says what each takes of them:
`python -m pallas_kernels.compile [--target NAME,...] [--kernel NAME ... | --shape BxTxHxD ...]
[--json FILE]`.

Exit status 1 if a kernel does not compile, does not fit, spills too much or misses the tensor
cores; 2 if the command cannot be carried out.
"""

import argparse
import datetime
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import tiles
from pallas_kernels.programs import Table, console, progress, run_program
from pallas_kernels.targets import TARGETS, parse_targets
from pallas_kernels.tuning import aot, stream_cases
from pallas_kernels.tuning.cases import DROPOUT, Case, attention_cases, standard_cases
from pallas_kernels.tuning.shapes import parse_shape

ALL_KERNELS = (
    *tiles.KERNELS,
    tiles.LOOPED,
    *(name for kernels in stream_cases.OPERATIONS.values() for name in kernels),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.compile", description=__doc__)
    parser.add_argument(
        "--target",
        type=parse_targets,
        default=tuple(TARGETS),
        metavar="NAME,...",
        help=f"of {', '.join(TARGETS)}; all unless given",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--kernel",
        choices=ALL_KERNELS,
        action="append",
        metavar="NAME",
        help=f"this one alone, of {', '.join(ALL_KERNELS)}; repeatable",
    )
    chosen.add_argument(
        "--shape",
        type=parse_shape,
        action="append",
        metavar="BxTxHxD",
        help="instead of the standard ones: with RoPE and dropout, both directions; repeatable",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the reports")
    arguments = parser.parse_args()
    cases = standard_cases()
    if arguments.kernel:
        taken = lambda case: {k for target in arguments.target for k in case.kernels(target)}  # noqa: E731
        cases = [case for case in cases if taken(case) & set(arguments.kernel)]
    if arguments.shape:
        cases = attention_cases(arguments.shape, rate=DROPOUT)
        for case in cases:
            _check_heads(parser, case, arguments.target)
    if arguments.json:
        # Said now, not after minutes of compiling.
        _save(parser, arguments.json, mode="a")
    try:
        reports = _measure_visibly(arguments.target, cases)
    except aot.Unavailable as error:
        parser.error(str(error))
    if arguments.json:
        _save(parser, arguments.json, json.dumps(_as_json(reports), indent=1) + "\n")
    console.print(table(reports) if console.is_terminal else table(reports, box=None))
    console.print(
        "Batch and heads make no other kernel: of shapes that differ in them alone, one is shown."
        " Seconds are of the program that a kernel is part of."
    )
    failed = sum(report.problem is not None for report in reports)
    console.print(f"{len(reports)} kernels, {failed} with a problem")
    raise SystemExit(1 if failed else 0)


def _measure_visibly(targets: Sequence[str], cases: Sequence[Case]) -> list[aot.Report]:
    """`measure` within `progress`; a problem is said when it is found."""
    with progress("compiling", len(targets) * len(cases), unit="programs") as bar:

        def done(reports: list[aot.Report]) -> None:
            first = reports[0]
            what = f"{first.target} {first.case.shape} {', '.join(r.kernel for r in reports)}"
            if problems := "; ".join(r.problem for r in reports if r.problem):
                console.print(f"{what}: {problems}")
            bar.advance(status=what)

        return aot.measure(targets, cases, done)


def _save(parser: argparse.ArgumentParser, path: Path, text: str = "", mode: str = "w") -> None:
    try:
        with path.open(mode) as file:
            file.write(text)
    except OSError as error:
        parser.error(f"--json {path}: cannot be written ({error.strerror})")


def _as_json(reports: Iterable[aot.Report]) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "kernels": [report.as_json() for report in reports],
    }


def _check_heads(parser: argparse.ArgumentParser, case: Case, targets: Iterable[str]) -> None:
    head_dim = case.shape.head_dim
    key = tiles.head_key(head_dim, case.item_size)
    if head_dim % 2:
        parser.error(f"--shape {case.shape}: head_dim {head_dim} must be even")
    for target in targets:
        if tiles.settings(target, "flash_forward", key) is None:
            parser.error(
                f"--shape {case.shape}: head_dim {head_dim} is too large,"
                f" {tiles.FILE.name} has no tiles for it on {target}"
            )


def table(reports: Iterable[aot.Report], **style) -> Table:
    """The reports as a table, a row a kernel; the style is rich's."""
    drawn = Table("target", "kernel", "shape", "extras", **style)
    for name in ("registers", "spilled B", "shared B / limit"):
        drawn.add_column(name, justify="right")
    drawn.add_column("tensor cores")
    drawn.add_column("seconds", justify="right")
    drawn.add_column("result")
    for report in reports:
        limit = TARGETS[report.target].shared_memory
        instructions = [f"{count} {name}" for name, count in report.tensor_cores.items()]
        drawn.add_row(
            report.target,
            report.kernel,
            str(report.case.shape),
            report.case.asked(),
            _shown(report.registers),
            _shown(report.spilled),
            f"{_shown(report.shared_memory)} / {limit}",
            ", ".join(instructions) or "-",
            "-" if report.seconds is None else f"{report.seconds:.1f}",
            report.problem or "ok",
        )
    return drawn


def _shown(value: int | None) -> str:
    return "-" if value is None else str(value)


if __name__ == "__main__":
    run_program(main)
