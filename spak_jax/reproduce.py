"""The seed's whole table: `python -m spak_jax.reproduce [--seeds 5] [--width 256] [--out DIR]`.

Trains every system, all seeds in one program, scores each run, LoopLM-12 also at other numbers of
loops, and draws figures and table from all of them. Stopped at any moment, it goes on where it was
when the same command is given again: trainings from their last checkpoint, results files that are
there are kept. With several GPUs, give each some of the systems (`--system`); the figures show all
that is there.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from spak_jax import evaluate, figures
from spak_jax.command_line import InputError, console, run_program, writable_folder
from spak_jax.config import Config, first_difference, parse_config, read_config
from spak_jax.train import one_by_one, run_folders, train

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


class Experiment(NamedTuple):
    """One system's trainings, all seeds together, and the loops that its models are scored at.

    None stands for as many as in training.
    """

    config: Config
    loops: tuple[int | None, ...]


def plan(width: int, seeds: int, overrides: Sequence[str] = ()) -> list[Experiment]:
    """The experiments of one width.

    Raises:
      InputError: an override is not allowed.
    """
    experiments = []
    for name in SYSTEMS[width]:
        config = read_config(CONFIGS / f"{name}.toml", [f"train.seeds={seeds}", *overrides])
        experiments.append(Experiment(config, (None, *TEST_TIME_LOOPS.get(name, ()))))
    return experiments


def results_path(out: Path, config: Config, loops: int | None) -> Path:
    """Where the results of one seed at some number of loops are kept."""
    suffix = "" if loops is None else f"-loops{loops}"
    return out / "results" / f"{config.name}-seed{config.train.seed}{suffix}.json"


def reproduce(experiment: Experiment, run_path: Path, out: Path, examples: int) -> None:
    """Trains and scores what has not been trained and scored.

    Raises:
      InputError: a run folder or results file there is of another configuration.
      Failure: the training diverged.
    """
    config = experiment.config
    missing = [
        (i, loops, path)
        for i, one in enumerate(one_by_one(config))
        for loops in experiment.loops
        if not _is_done(path := results_path(out, one, loops), one, examples)
    ]
    if not missing:
        return
    states = train(config, run_path)
    folders = run_folders(config, run_path)
    for i, loops, path in missing:
        one, state = one_by_one(config)[i], states[i]
        trained = evaluate.Trained(one, state.weights, int(state.step))
        settings = evaluate.Settings(DIGITS, examples, one.evaluation.seed, loops)
        evaluate.write_results(path, evaluate.score_run(trained, settings, folders[i]))
        console.print(f"wrote {path}", markup=False)


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
        "--system", action="append", metavar="NAME", help="this one only; repeatable (all)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="results and figures (figures/reproduced-WIDTH)"
    )
    arguments = parser.parse_intermixed_args()
    for name, value in (("--seeds", arguments.seeds), ("--examples", arguments.examples)):
        if value < 1:
            raise InputError(f"{name} {value}: must be at least 1")
    systems = SYSTEMS[arguments.width]
    for name in arguments.system or ():
        if name not in systems:
            raise InputError(f"--system {name}: must be of {', '.join(systems)}")
    out = arguments.out or Path("figures") / f"reproduced-{arguments.width}"
    experiments = plan(arguments.width, arguments.seeds, arguments.overrides)
    writable_folder(out / "results")
    # One folder of runs for each folder of results, so that two experiments never meet.
    runs_path = RUNS / out.name
    started = time.monotonic()
    for experiment in experiments:
        name = experiment.config.name
        if name in (arguments.system or systems):
            console.print(f"{name}, {arguments.seeds} seeds", markup=False)
            reproduce(experiment, runs_path / name, out, arguments.examples)
            # After each system there is a table to look at.
            figures.export(_results_there(experiments, out), out)
    console.print(f"done in {time.monotonic() - started:,.0f} s; the runs are in {runs_path}")


def _results_there(experiments: Sequence[Experiment], out: Path) -> list[Path]:
    """The results files of the experiments, as far as they have been written."""
    paths = [
        results_path(out, one, loops)
        for config, scored_loops in experiments
        for one in one_by_one(config)
        for loops in scored_loops
    ]
    return [path for path in paths if path.exists()]


if __name__ == "__main__":
    run_program(main)
