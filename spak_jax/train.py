"""Training: `python -m spak_jax.train [CONFIG] [key.path=value ...] [--run DIR] [--fresh]`."""

import argparse
import contextlib
from pathlib import Path

from spak_jax.command_line import console, run_program
from spak_jax.config import read_specification
from spak_jax.config_words import add_words, file_and_overrides
from spak_jax.evaluation.loaded import LoadedModel
from spak_jax.evaluation.results import write_results
from spak_jax.evaluation.score import Settings, score
from spak_jax.reports.scores import print_over_seeds, print_results
from spak_jax.specs.check import require_invariants
from spak_jax.training import parallel, run_folder, signals
from spak_jax.training.loop import train
from spak_jax.training.runs import move_aside, per_seed_configs, run_folders


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.train",
        description="Train a model, or go on with a training, and score it.",
    )
    add_words(parser, default="quickstart")
    parser.add_argument(
        "--run", type=run_folder.run_folder, help="the run folder (default: runs/NAME)"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over; a run that is there is moved aside"
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="be one of several processes, as Slurm, Open MPI or JAX_COORDINATOR_ADDRESS,"
        " JAX_NUM_PROCESSES and JAX_PROCESS_ID say",
    )
    arguments = parser.parse_intermixed_args()
    with parallel.distributed_session() if arguments.distributed else contextlib.nullcontext():
        _train_and_score(arguments)


def _train_and_score(arguments: argparse.Namespace) -> None:
    path, overrides = file_and_overrides(arguments)
    specification = read_specification(path, overrides)
    config = specification.config
    for line in require_invariants(specification, path, overrides):
        console.print(line)
    run_path = arguments.run or Path("runs") / config.name
    if arguments.fresh:
        parallel.on_primary_process(lambda: move_aside(run_path))
    with signals.graceful_shutdown() as request:
        states = train(config, run_path, request=request)
    if not parallel.is_primary_process():
        return
    settings = Settings.of(config.evaluation)
    runs = zip(states, per_seed_configs(config), run_folders(config, run_path), strict=True)
    every = []
    for state, one, path in runs:
        results = score(LoadedModel(one, state.weights, int(state.step)), settings, path)
        write_results(path / run_folder.RESULTS, results)
        print_results(results)
        console.print(f"results: {path / run_folder.RESULTS}")
        every.append(results)
    if len(every) > 1:
        print_over_seeds(every)


if __name__ == "__main__":
    run_program(main)
