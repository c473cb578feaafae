"""Finds tiles, for the table that the kernels read:
`python -m pallas_kernels.tune [--target NAME,...] [--kernel NAME ...] [--write]`

Without `--target`, the candidates are timed on the GPU at hand: bfloat16, causal, with RoPE,
without dropout, one shape for each key of the table; `--kernel cudnn_from` compares whole calls
with cuDNN, for the length from which on that is faster, `--kernel looped_block` times all loops of
a block. With `--target`, for chips that are not there, the compiler is asked instead: of the
candidates that spill least, the one with the largest tile. Whole rows whose kernels all spill
heavily are left to the streaming ones; `looped_block` is not asked about. Lines for other targets
stay as they are.

What comes of it lies in `runs/tuned`, or the folder that `--out` names: the kernels' table, or the
one that is there, with the new lines. With `--write` it goes where it has an effect: into the
kernels' own table.
"""

import argparse
from pathlib import Path

import jax

from pallas_kernels import tiles
from pallas_kernels.programs import console, run_program
from pallas_kernels.targets import TARGETS, parse_targets, target_at_hand
from pallas_kernels.tuning import aot, looped_tune, tune


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__)
    parser.add_argument(
        "--target",
        type=parse_targets,
        default=(),
        metavar="NAME,...",
        help=f"ask the compiler, for some of {', '.join(TARGETS)}; no GPU needed",
    )
    parser.add_argument(
        "--kernel",
        choices=(choices := (*tiles.KERNELS, tiles.LOOPED, tune.CUDNN)),
        action="append",
        metavar="NAME",
        help=f"of {', '.join(choices)}; repeatable (default: all but the last two;"
        f" {tune.CUDNN} uses the table as it is)",
    )
    places = parser.add_mutually_exclusive_group()
    places.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=tune.OUT,
        help="what is found (default: %(default)s)",
    )
    places.add_argument(
        "--write",
        action="store_true",
        help="into the kernels' own table",
    )
    arguments = parser.parse_args()
    names = arguments.target
    if not names and jax.default_backend() != "gpu":
        parser.error(f"needs a GPU or --target; JAX's backend here is {jax.default_backend()}")
    path = tiles.FILE if arguments.write else arguments.out / tiles.FILE.name
    table = tune.table_so_far(path)
    kernels = arguments.kernel or tiles.KERNELS
    if names and tiles.LOOPED in kernels:
        parser.error(f"--kernel {tiles.LOOPED}: is timed on the GPU at hand, without --target")
    tried = tune.candidates(kernel for kernel in kernels if kernel in tiles.KERNELS)
    found = {}
    if names:
        for name in names:
            console.print(f"{name}: compiling {len(tried)} candidates, plain and with everything")
            try:
                found[name] = tune.best_compiled(tried, name, console.print)
            except aot.Unavailable as error:
                parser.error(str(error))
    else:
        device = jax.devices()[0].device_kind
        console.print(f"{device}: compiling {len(tried)} candidates")
        lines = tune.fastest(tried, tune.time_all(tried, console.print), device)
        if tune.CUDNN in kernels:
            lines[tune.CUDNN] = tune.cudnn_from(console.print)
        if tiles.LOOPED in kernels:
            lines[tiles.LOOPED] = looped_tune.fastest(target_at_hand(), console.print)
        found[target_at_hand()] = lines
    for target, lines in found.items():
        kept = {kernel: tune.kept_lines(table[target], kernel, tried) for kernel in lines}
        new = {kernel: kept[kernel] | entries for kernel, entries in lines.items()}
        table[target] = tune.whole_rows(table[target] | new)
    tune.write_table(table, path, console.print)


if __name__ == "__main__":
    run_program(main)
