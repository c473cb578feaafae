"""Runs the experiments behind the tables here: `python -m spak_jax.reproduce [--study NAME] ...`.

Without a study's name it makes the seed's whole table. A study (`studies`) trains every system, all
seeds in one program, scores each run, and draws figures and tables from all of them. Stopped at any
moment, it goes on where it was when the same command is given again: trainings from their last
checkpoint, results files that are there are kept. With several GPUs, or cores to spare, give each
process some of the systems (`--system`); the figures show all that is there.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from spak_jax import addition, evaluate, figures, studies
from spak_jax.command_line import InputError, console, run_program, writable_folder
from spak_jax.config import Config, first_difference, parse_config
from spak_jax.studies import Experiment, Scoring, Study
from spak_jax.train import one_by_one, run_folders, train

TABLE = "table"
RUNS = Path("runs")


def results_path(out: Path, config: Config, scoring: Scoring) -> Path:
    """Where the results of one seed are kept."""
    suffix = "" if scoring.step is None else f"-step{scoring.step}"
    suffix += "" if scoring.loops is None else f"-loops{scoring.loops}"
    return out / "results" / f"{config.name}-seed{config.train.seed}{suffix}.json"


def reproduce(experiment: Experiment, run_path: Path, out: Path, study: Study) -> None:
    """Trains and scores what has not been trained and scored.

    Raises:
      InputError: a run folder or results file there is of another configuration.
      Failure: the training diverged.
    """
    config = experiment.config
    for scoring in experiment.scorings:
        examples = scoring.examples or study.examples
        missing = [
            (i, one, path)
            for i, one in enumerate(one_by_one(config))
            if not _is_done(path := results_path(out, one, scoring), one, examples)
        ]
        if not missing:
            continue
        states = train(config, run_path, scoring.step)
        folders = run_folders(config, run_path)
        for i, one, path in missing:
            trained = evaluate.Trained(one, states[i].weights, int(states[i].step))
            settings = evaluate.Settings(
                study.digits,
                examples,
                one.evaluation.seed,
                scoring.loops,
                kinds=addition.KINDS if scoring.kinds else (),
            )
            evaluate.write_results(path, evaluate.score_run(trained, settings, folders[i]))
            console.print(f"wrote {path}")


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
        description="Train, score and draw every system of a study.",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="changes to every configuration"
    )
    named = [name for name in studies.STUDIES if not name.startswith(TABLE)]
    parser.add_argument(
        "--study",
        choices=[TABLE, *named],
        default=TABLE,
        metavar="NAME",
        help=f"of {', '.join(named)} (the seed's table)",
    )
    parser.add_argument("--width", type=int, choices=(256, 768), help="of the table (256)")
    parser.add_argument("--seeds", type=int, help="trainings of each system (the study's)")
    parser.add_argument("--examples", type=int, help="problems a length (the study's)")
    parser.add_argument(
        "--system", action="append", metavar="NAME", help="this one only; repeatable (all)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="results and figures")
    arguments = parser.parse_intermixed_args()
    for name, value in (("--seeds", arguments.seeds), ("--examples", arguments.examples)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: must be at least 1")
    name, out = arguments.study, Path("figures") / arguments.study
    if name == TABLE:
        width = arguments.width or 256
        name, out = f"{TABLE}-{width}", Path("figures") / f"reproduced-{width}"
    elif arguments.width:
        raise InputError(f"--width {arguments.width}: of the seed's table, not of {name}")
    seeds = arguments.seeds or studies.SEEDS.get(name, studies.MOST_SEEDS)
    study = studies.STUDIES[name]([f"train.seeds={seeds}", *arguments.overrides])
    if arguments.examples:
        study = study.with_examples(arguments.examples)
    systems = [experiment.config.name for experiment in study.experiments]
    for system in arguments.system or ():
        if system not in systems:
            raise InputError(f"--system {system}: must be of {', '.join(systems)}")
    out = arguments.out or out
    writable_folder(out / "results")
    # One folder of runs for each folder of results, so that two experiments never meet.
    runs_path = RUNS / out.name
    started = time.monotonic()
    for experiment in study.experiments:
        system = experiment.config.name
        if system in (arguments.system or systems):
            console.print(f"{system}, {seeds} seeds")
            reproduce(experiment, runs_path / system, out, study)
            # After each system there is a table to look at.
            figures.export(_results_there(study.experiments, out), out)
    console.print(f"done in {time.monotonic() - started:,.0f} s; the runs are in {runs_path}")


def _results_there(experiments: Sequence[Experiment], out: Path) -> list[Path]:
    """The results files of the experiments, as far as they have been written."""
    paths = [
        results_path(out, one, scoring)
        for config, scorings in experiments
        for one in one_by_one(config)
        for scoring in scorings
    ]
    return [path for path in paths if path.exists()]


if __name__ == "__main__":
    run_program(main)
