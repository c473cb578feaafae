"""Scores a run over lengths and loops: `python -m spak_jax.grid RUN [options]`.

Each number of loops becomes a results file, as `evaluate --loops` writes it, and all together a
picture of how far a model reaches: `reach.png`. A model that does not loop becomes one file, and a
panel beside others where `spak_jax.figures` draws them together.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from spak_jax.command_line import (
    check_range,
    console,
    parse_lengths,
    prepare_drawing,
    run_program,
    writable_folder,
)
from spak_jax.config import Config
from spak_jax.config_sections import MAX_LENGTH, LoopedModel
from spak_jax.evaluation.forward import require_looped
from spak_jax.evaluation.loaded import load, seed_folders
from spak_jax.evaluation.loops import MAX_LOOPS, Loops
from spak_jax.evaluation.results import Results, write_results
from spak_jax.evaluation.score import Settings, score

# Times the longest trained length, and times the trained loops.
FACTORS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.grid",
        description="Score a run over lengths and loops, and draw how far it reaches.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or one of several")
    parser.add_argument(
        "--lengths", help="of problems, such as 8,16,32 (1, 2, 4 and 8 times the longest trained)"
    )
    parser.add_argument(
        "--loops", help="such as 8,16,32 (1, 2, 4 and 8 times the trained number; not of a stack)"
    )
    parser.add_argument("--examples", type=int, help="problems a length")
    parser.add_argument("--seed", type=int, help="of the problems")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the files (RUN/grid)")
    arguments = parser.parse_intermixed_args()
    check_range("--examples", arguments.examples, 1, 10_000_000)
    check_range("--seed", arguments.seed, 0, 2**31 - 1)
    runs = seed_folders(arguments.run) or [arguments.run]
    first = load(runs[0])
    config = first.config
    defaults = config.evaluation
    longest = config.data.longest
    lengths = tuple(factor * longest for factor in FACTORS if factor * longest <= MAX_LENGTH)
    if arguments.lengths is not None:
        lengths = parse_lengths("--lengths", arguments.lengths, MAX_LENGTH)
    settings = Settings(
        lengths=lengths,
        examples=arguments.examples or defaults.examples,
        seed=defaults.seed if arguments.seed is None else arguments.seed,
        published=False,
    )
    rows = _rows(config, arguments.loops)
    out = writable_folder(arguments.out or arguments.run / "grid")
    # Before the work, as the folder is.
    prepare_drawing()
    from spak_jax.reports.figures import export

    paths = []
    for run in runs:
        loaded = first if run is runs[0] else load(run)
        for loops in rows:
            given = settings if loops is None else replace(settings, loops=Loops(loops))
            results = score(loaded, given, run)
            parts = [loaded.config.name, run.name] if len(runs) > 1 else [loaded.config.name]
            parts += [] if loops is None else [f"loops{loops}"]
            paths.append(out / f"{'-'.join(parts)}.json")
            write_results(paths[-1], results)
            console.print(f"{_summary(results)}: {paths[-1]}")
    export(paths, out)


def _rows(config: Config, asked: str | None) -> tuple[int | None, ...]:
    """The numbers of loops; None for a model that has none to choose."""
    if asked is not None:
        require_looped(config, "--loops")
        return parse_lengths("--loops", asked, MAX_LOOPS)
    if not isinstance(config.model, LoopedModel):
        return (None,)
    return tuple(factor * config.model.loops for factor in FACTORS)


def _summary(results: Results) -> str:
    loops = f"{results.loops:,} loops" if results.loops else "as it is"
    scores = (f"{length}: {100 * each.accuracy:.1f}%" for length, each in results.lengths.items())
    return f"{loops}, right at {', '.join(scores)}"


if __name__ == "__main__":
    run_program(main)
