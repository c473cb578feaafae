"""The seed's whole table: `python -m spak_jax.reproduce [--seeds 5] [--width 256] [--out DIR]`.

Trains every system with several seeds, scores each run, LoopLM-12 also at other numbers of loops,
and draws figures and table from all of them. Stopped at any moment, it goes on where it was when
the same command is given again: trainings from their last checkpoint, results files that are there
are kept.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from spak_jax import evaluate, figures
from spak_jax.command_line import InputError, console, run_program, writable_folder
from spak_jax.config import Config, first_difference, parse_config, read_config
from spak_jax.train import train

# By the width of the residual stream; LoopLM-128e, by its name 128 wide, stands with the 256 ones.
SYSTEMS = {
    256: ("gpt12", "loop12", "loop30", "loop128e"),
    768: ("gpt12-w768", "loop12-w768", "loop30-w768"),
}
# Loops at test time beside the trained 12: half, twice (in the seed's table), and further.
TEST_TIME_LOOPS = {"loop12": (6, 18, 24, 48), "loop12-w768": (6, 18, 24, 48)}
DIGITS = (*range(1, 13), 16)
EXAMPLES = 10_000
CONFIGS = Path("configs")
RUNS = Path("runs")


class Run(NamedTuple):
    """One training, and the loops its model is scored at, None for as many as in training."""

    config: Config
    loops: tuple[int | None, ...]

    @property
    def name(self) -> str:
        return f"{self.config.name}-seed{self.config.train.seed}"


def plan(width: int, seeds: int, overrides: Sequence[str] = ()) -> Iterator[Run]:
    """All trainings, one seed of every system before the next seed of any.

    Raises:
      InputError: an override is not allowed.
    """
    for seed in range(seeds):
        for name in SYSTEMS[width]:
            config = read_config(CONFIGS / f"{name}.toml", [f"train.seed={seed}", *overrides])
            yield Run(config, (None, *TEST_TIME_LOOPS.get(name, ())))


def results_path(out: Path, run: Run, loops: int | None) -> Path:
    """Where a run's results at some number of loops are kept."""
    suffix = "" if loops is None else f"-loops{loops}"
    return out / "results" / f"{run.name}{suffix}.json"


def reproduce(run: Run, run_path: Path, out: Path, examples: int) -> list[Path]:
    """Trains and scores one run as far as that has not been done; returns its results files.

    Raises:
      InputError: a run folder or results file there is of another configuration.
      Failure: the training diverged.
    """
    wanted = {loops: results_path(out, run, loops) for loops in run.loops}
    missing = {
        loops: path for loops, path in wanted.items() if not _is_done(path, run.config, examples)
    }
    if missing:
        state = train(run.config, run_path)
        trained = evaluate.Trained(run.config, state.weights, int(state.step))
        for loops, path in missing.items():
            settings = evaluate.Settings(DIGITS, examples, run.config.evaluation.seed, loops)
            evaluate.write_results(path, evaluate.score_run(trained, settings, run_path))
            console.print(f"wrote {path}", markup=False)
    return list(wanted.values())


def _is_done(path: Path, config: Config, examples: int) -> bool:
    if not path.exists():
        return False
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        difference = first_difference(parse_config(results["config"], str(path)), config)
        scored = results["examples"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a results file: {error!r}") from None
    if scored != examples:
        difference = difference or f"examples is {scored} there and {examples} here"
    if difference:
        raise InputError(f"{path} is of another run: {difference}; name another folder with --out")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.reproduce",
        description="Train, score and draw every system of the seed's table.",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="changes to every configuration"
    )
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each system (5)")
    parser.add_argument("--width", type=int, choices=SYSTEMS, default=256, help="(256)")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="problems a length (10,000)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="results and figures (figures/reproduced-WIDTH)"
    )
    arguments = parser.parse_intermixed_args()
    for name, value in (("--seeds", arguments.seeds), ("--examples", arguments.examples)):
        if value < 1:
            raise InputError(f"{name} {value}: must be at least 1")
    out = arguments.out or Path("figures") / f"reproduced-{arguments.width}"
    runs = list(plan(arguments.width, arguments.seeds, arguments.overrides))
    writable_folder(out / "results")
    # One folder of runs for each folder of results, so that two experiments never meet.
    runs_path = RUNS / out.name
    started, files = time.monotonic(), []
    for number, run in enumerate(runs, 1):
        console.print(f"[{number}/{len(runs)}] {run.name}", markup=False)
        files += reproduce(run, runs_path / run.name, out, arguments.examples)
        # After each seed there is a table to look at.
        if number % len(SYSTEMS[arguments.width]) == 0:
            figures.export(files, out)
    console.print(f"done in {time.monotonic() - started:,.0f} s; the runs are in {runs_path}")


if __name__ == "__main__":
    run_program(main)
