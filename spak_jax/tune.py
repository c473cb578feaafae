"""Chooses tiles of kernels as a specification declares them: `python -m spak_jax.tune SPEC
[--target NAME,...] [--out DIR | --write]`.

The candidates are those of its design spaces, at the shape of its training; what breaks an
invariant of it is left out. Without `--target` they are timed on the GPU at hand; with it the
compiler is asked, for chips that are not there. What was found is a claim of the specification,
with a file of evidence. (`python -m pallas_kernels.tune` searches for all that the kernels' own
table is read for.)

What comes of it lies in `runs/tuned`, or the folder that `--out` names: a table of tiles, and
evidence. With `--write` it goes where it has an effect: into the kernels' own table,
`figures/results` and the specification.
"""

import argparse
from pathlib import Path

import jax

from pallas_kernels.targets import TARGETS, parse_targets
from pallas_kernels.tuning.tune import OUT
from spak_jax.command_line import InputError, console, run_program
from spak_jax.config_files import NAMED, specification_file
from spak_jax.specs.tune import tune_by


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.tune",
        description="Choose tiles of kernels within the invariants of a specification.",
    )
    parser.add_argument("specification", metavar="SPEC", help=NAMED)
    parser.add_argument(
        "--target",
        type=parse_targets,
        default=(),
        metavar="NAME,...",
        help=f"ask the compiler, for some of {', '.join(TARGETS)}; no GPU needed",
    )
    places = parser.add_mutually_exclusive_group()
    places.add_argument(
        "--out", type=Path, metavar="DIR", default=OUT, help="what is found (default: %(default)s)"
    )
    places.add_argument(
        "--write",
        action="store_true",
        help="into the kernels' own table, figures/results and the specification",
    )
    arguments = parser.parse_args()
    if not arguments.target and jax.default_backend() != "gpu":
        raise InputError(f"needs a GPU or --target; JAX's backend here is {jax.default_backend()}")
    tune_by(
        specification_file(arguments.specification),
        arguments.target,
        console.print,
        out=arguments.out,
        write=arguments.write,
    )


if __name__ == "__main__":
    run_program(main)
