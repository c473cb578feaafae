"""A specification as one self-contained page: `python -m spak_jax.brief SPEC [--target NAME,...]
[--results FILE ...]`.
"""

import argparse
from pathlib import Path

from pallas_kernels.targets import TARGETS, parse_targets
from pallas_kernels.tuning import aot
from spak_jax.command_line import run_program
from spak_jax.config import read_specification
from spak_jax.config_files import NAMED, specification_file
from spak_jax.specs import check, claims
from spak_jax.specs.page import page


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.brief", description="Print a specification as one page."
    )
    parser.add_argument(
        "specification",
        metavar="SPEC",
        help=NAMED,
    )
    parser.add_argument(
        "--target",
        type=parse_targets,
        default=(),
        metavar="NAME,...",
        help=f"with what is known of these GPUs: {', '.join(TARGETS)}",
    )
    parser.add_argument(
        "--results", type=Path, nargs="+", default=(), metavar="FILE", help="results of a run of it"
    )
    arguments = parser.parse_args()
    path, targets = specification_file(arguments.specification), arguments.target
    aot.touch_no_gpu()
    specification = read_specification(path)
    given = arguments.results
    evaluated = claims.read_evaluated(specification, given) if given else None
    findings = check.judge(specification, path.parent, targets, evaluated)
    found = claims.judge_claims(specification, path.parent)
    # Not through the console: Markdown for a file.
    print(page(specification, path, targets, findings, found), end="")


if __name__ == "__main__":
    run_program(main)
