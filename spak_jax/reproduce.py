"""Runs the experiments behind the tables here: `python -m spak_jax.reproduce [--study NAME] ...`.

Without a study's name it makes the seed's whole table. A study (`studies`) trains every system, all
seeds in one program, scores each run, and draws figures and tables from all of them.

    RUN/SYSTEM[/seedN]/                       the run folder of a training (`checkpoint`)
    RUN/SYSTEM[/seedN]/SYSTEM-seedN....json   its results files, one for each scoring
    RUN/SYSTEM/commits                        whose code trained it, a commit a line
    RUN/figures/                              figures and tables

RUN is `runs/STUDY` unless another is named. Nothing outside it is read or written: the results that
this repository comes with are no run's own. `--out DIR` publishes, as `figures/` was made here.

Stopped at any moment, it goes on where it was when the same command is given again: trainings from
their last checkpoint; a results file that lies in its run folder, of the same configuration and
scored alike, is kept, and said to be. With several GPUs, or cores to spare, give each process some
of the systems (`--system`); the figures show all that is there.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spak_jax import addition, evaluate, figures, studies
from spak_jax.command_line import InputError, console, run_program, writable_folder, write_file
from spak_jax.config import Config, first_difference, parse_config
from spak_jax.studies import Experiment, Scoring
from spak_jax.train import move_aside, one_by_one, run_folders, train

TABLE = "table"
RUNS = Path("runs")
COMMITS = "commits"
WAY_OUT = "name another folder with --run, or start over with --fresh"


@dataclass
class Account:
    """What a reproduction made, and what it found made.

    commit: of the code that runs. made, kept: results files. notes: where other code had a part.
    left_out: files that figures do not show, and why.
    """

    commit: str
    made: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)

    def note(self, what: str, commit: str) -> None:
        """Notes that what is there rests on a commit, if that may be other code than runs now."""
        if commit != self.commit or commit.endswith("+changes"):
            changes = "" if commit != self.commit else ", perhaps with other changes"
            sentence = f"{what} by {commit}; the code here is {self.commit}{changes}"
            if sentence not in self.notes:
                self.notes.append(sentence)

    def show(self) -> None:
        for told, paths in (("made now", self.made), ("kept as it was", self.kept)):
            if paths:
                console.print(f"{told}: {len(paths):,} results file{'s' * (len(paths) > 1)}")
            for path in paths:
                console.print(f"  {path}")
        for note in self.notes:
            console.print(note)
        if self.notes:
            console.print("the same command with --fresh makes all of it anew")
        for why in self.left_out.values():
            console.print(f"not drawn: {why}")


def results_path(folder: Path, config: Config, scoring: Scoring) -> Path:
    """Where the results of one seed's run are kept: in its run folder."""
    suffix = "" if scoring.step is None else f"-step{scoring.step}"
    suffix += "" if scoring.loops is None else f"-loops{scoring.loops}"
    return folder / f"{config.name}-seed{config.train.seed}{suffix}.json"


def reproduce(experiment: Experiment, run_path: Path, account: Account) -> None:
    """Trains and scores what has not been trained and scored.

    Args:
      experiment: a system's trainings and scorings.
      run_path: the run folder of all its seeds.
      account: is told what was made and what kept.

    Raises:
      InputError: a run folder or results file there is of another configuration.
      Failure: the training diverged.
    """
    config = experiment.config
    folders, seeds = run_folders(config, run_path), one_by_one(config)
    for scoring in experiment.scorings:
        missing = []
        for i, (one, folder) in enumerate(zip(seeds, folders, strict=True)):
            path, settings = results_path(folder, one, scoring), _settings(one, scoring)
            made_by = _made_by(path, one, scoring.step, settings)
            if made_by is None:
                missing.append((i, one, path, settings))
                continue
            account.kept.append(path)
            account.note(f"{path} was made", made_by)
        if not missing:
            continue
        _note_commit(run_path, account)
        states = train(config, run_path, scoring.step)
        for i, one, path, settings in missing:
            trained = evaluate.Trained(one, states[i].weights, int(states[i].step))
            evaluate.write_results(path, evaluate.score_run(trained, settings, folders[i]))
            account.made.append(path)
            console.print(f"wrote {path}")


def _settings(config: Config, scoring: Scoring) -> evaluate.Settings:
    asked = config.evaluation
    return evaluate.Settings(
        asked.digits,
        min(asked.examples, scoring.examples or asked.examples),
        asked.seed,
        scoring.loops,
        kinds=addition.KINDS if scoring.kinds else (),
    )


def _made_by(
    path: Path, config: Config, step: int | None, settings: evaluate.Settings
) -> str | None:
    """The commit that made a results file; None where there is no such file.

    Raises:
      InputError: it cannot be read, or is of another configuration or scoring.
    """
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        difference = first_difference(parse_config(results["config"], str(path)), config)
        pairs = {
            "step": (results["step"], step or config.train.steps),
            "loops": (results["loops"], settings.loops or getattr(config.model, "loops", None)),
            "examples": (results["examples"], settings.examples),
            "seed": (results["seed"], settings.seed),
            "digits": ([int(length) for length in results["lengths"]], [*settings.digits]),
            "kinds": ([*results["kinds"]], [*settings.kinds]),
        }
        commit = _named(results["commit"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as a results file: {error!r}; {WAY_OUT}") from None
    for name, (there, here) in pairs.items():
        if there != here:
            difference = difference or f"{name} is {there} there and {here} here"
    if difference:
        raise InputError(f"{path} is of another run: {difference}; {WAY_OUT}")
    return commit


def _note_commit(run_path: Path, account: Account) -> None:
    """Keeps which commits' code has trained a run, and notes those that are not the present one."""
    path = writable_folder(run_path) / COMMITS
    commits = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for commit in commits:
        account.note(f"{run_path} was trained", commit)
    if account.commit not in commits:
        write_file(path, "".join(f"{commit}\n" for commit in [*commits, account.commit]))


def _named(commit: str | None) -> str:
    """As tables show it; None outside a checkout."""
    if commit is None:
        return "code without a commit"
    number, *changes = commit.split("+")
    return f"commit {'+'.join([number[:12], *changes])}"


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
        raise InputError(f"--width {arguments.width}: of the seed's table, not of {name}")
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
    started = time.monotonic()
    account = Account(_named(evaluate.commit()))
    try:
        for experiment in chosen:
            system = experiment.config.name
            console.print(f"{system}, {experiment.config.train.seeds} seeds")
            reproduce(experiment, runs_path / system, account)
            # After each system there is a table to look at.
            found = _results_there(experiments, runs_path, account)
            figures.export(found, out)
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
    for config, _ in experiments:
        for option, key, asked, given in (
            ("--seeds", "train.seeds", arguments.seeds, config.train.seeds),
            ("--examples", "evaluation.examples", arguments.examples, config.evaluation.examples),
        ):
            if asked not in (None, given):
                raise InputError(f"{option} {asked} and the override {key}={given}: name one")
    return experiments


def _results_there(
    experiments: Sequence[Experiment], runs_path: Path, account: Account
) -> list[Path]:
    """The results files of the experiments, as far as they have been written.

    Systems that this process leaves to others may have been made otherwise: those files are left
    out, and noted.
    """
    found = []
    for config, scorings in experiments:
        folders = run_folders(config, runs_path / config.name)
        for one, folder in zip(one_by_one(config), folders, strict=True):
            for scoring in scorings:
                path, settings = results_path(folder, one, scoring), _settings(one, scoring)
                try:
                    if _made_by(path, one, scoring.step, settings) is not None:
                        found.append(path)
                except InputError as error:
                    account.left_out[path] = str(error)
    return found


if __name__ == "__main__":
    run_program(main)
