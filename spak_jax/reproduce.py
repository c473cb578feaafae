"""Runs the experiments behind the tables here: `python -m spak_jax.reproduce [--study NAME] ...`.

Without a study's name it makes the baseline's whole table. A study
(`spak_jax.experiments.studies`) trains every system, all
seeds in one program, scores each run, and draws figures and tables from all of them.

    RUN/SYSTEM[/seedN]/                       the run folder of a training (`run_folder`)
    RUN/SYSTEM[/seedN]/SYSTEM-seedN....json   its results files, one for each scoring
    RUN/SYSTEM/commits                        whose code trained it, a commit a line
    RUN/figures/                              figures and tables, of several tasks a folder each

RUN is `runs/STUDY` unless another is named. Nothing outside it is read or written: the results that
this repository comes with are no run's own. `--out DIR` publishes, as `figures/` was made here.

Stopped at any moment, it goes on where it was when the same command is given again: trainings from
their last checkpoint; a results file that lies in its run folder, of the same configuration and
scored alike, is kept, and said to be. With several GPUs, or cores to spare, give each process some
of the systems (`--system`); the figures show all that is there.
"""

import argparse
import time
from pathlib import Path

from spak_jax import provenance
from spak_jax.command_line import (
    InputError,
    console,
    prepare_drawing,
    run_program,
    writable_folder,
    write_file,
)
from spak_jax.experiments import studies
from spak_jax.experiments.reproduce import Account, name_commit, reproduce, results_there
from spak_jax.experiments.studies import Experiment
from spak_jax.training.runs import move_aside

TABLE = "table"
RUNS = Path("runs")


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
        help=f"of {', '.join(named)} (the baseline's table)",
    )
    parser.add_argument("--width", type=int, choices=(256, 768), help="of the table (256)")
    parser.add_argument("--seeds", type=int, help="trainings of each system (the study's)")
    parser.add_argument("--examples", type=int, help="problems a length (the study's)")
    parser.add_argument(
        "--system", action="append", metavar="NAME", help="this one only; repeatable (all)"
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help="the runs (default: runs/STUDY)")
    parser.add_argument(
        "--fresh", action="store_true", help="start over; runs that are there are moved aside"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="figures, tables and a copy of the results, over what is there (default: figures and"
        " tables alone, beside the runs)",
    )
    arguments = parser.parse_intermixed_args()
    for name, value in (("--seeds", arguments.seeds), ("--examples", arguments.examples)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: must be at least 1")
    name, run = arguments.study, arguments.study
    if name == TABLE:
        width = arguments.width or 256
        name, run = f"{TABLE}-{width}", f"reproduced-{width}"
    elif arguments.width:
        raise InputError(f"--width {arguments.width}: of the baseline's table, not of {name}")
    runs_path = arguments.run or RUNS / run
    experiments = _experiments(name, arguments)
    systems = [experiment.config.name for experiment in experiments]
    for system in arguments.system or ():
        if system not in systems:
            raise InputError(f"--system {system}: must be of {', '.join(systems)}")
    chosen = [e for e in experiments if e.config.name in (arguments.system or systems)]
    out = arguments.out or runs_path / "figures"
    writable_folder(out / "results" if arguments.out else out)
    if arguments.fresh:
        for experiment in chosen:
            move_aside(runs_path / experiment.config.name)
    prepare_drawing()
    from spak_jax.reports import figures

    started = time.monotonic()
    account = Account(name_commit(provenance.commit()))
    try:
        for experiment in chosen:
            system = experiment.config.name
            console.print(f"{system}, {experiment.config.train.seeds} seeds")
            reproduce(experiment, runs_path / system, account)
            # After each system there is a table to look at.
            together = [each for each in experiments if each.drawn == experiment.drawn]
            found = results_there(together, runs_path, account)
            figures.export(found, out / experiment.drawn)
            if arguments.out:
                for path in found:
                    write_file(out / "results" / path.name, path.read_bytes())
    finally:
        account.show()
    console.print(
        f"done in {time.monotonic() - started:,.0f} s; the runs are in {runs_path}, figures and"
        f" tables in {out}"
    )


def _experiments(name: str, arguments: argparse.Namespace) -> list[Experiment]:
    """The study's, as the command line wants them.

    Raises:
      InputError: an override is not allowed, or contradicts an option.
    """
    seeds = arguments.seeds or studies.SEEDS.get(name, studies.MOST_SEEDS)
    words = [f"train.seeds={seeds}"]
    if arguments.examples:
        words.append(f"evaluation.examples={arguments.examples}")
    experiments = studies.STUDIES[name]([*words, *arguments.overrides])
    for config, *_ in experiments:
        for option, key, asked, given in (
            ("--seeds", "train.seeds", arguments.seeds, config.train.seeds),
            ("--examples", "evaluation.examples", arguments.examples, config.evaluation.examples),
        ):
            if asked not in (None, given):
                raise InputError(f"{option} {asked} and the override {key}={given}: name one")
    return experiments


if __name__ == "__main__":
    run_program(main)
