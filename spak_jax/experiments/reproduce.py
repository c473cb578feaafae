"""Trains and scores the experiments of a study, and accounts for what was there already.

RUN/SYSTEM[/seedN]/                       the run folder of a training (`run_folder`)
RUN/SYSTEM[/seedN]/SYSTEM-seedN....json   its results files, one for each scoring
RUN/SYSTEM/commits                        whose code trained it, a commit a line
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spak_jax import tasks
from spak_jax.command_line import InputError, console, writable_folder, write_file
from spak_jax.config import Config, first_difference, parse_config
from spak_jax.evaluation.loaded import LoadedModel
from spak_jax.evaluation.results import read_results, write_results
from spak_jax.evaluation.score import Settings, score
from spak_jax.experiments.studies import Experiment, Scoring
from spak_jax.training import signals
from spak_jax.training.loop import train
from spak_jax.training.runs import per_seed_configs, run_folders

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
        for heading, paths in (("made now", self.made), ("kept as it was", self.kept)):
            if paths:
                console.print(f"{heading}: {len(paths):,} results file{'s' * (len(paths) > 1)}")
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
      account: takes down what was made and what was kept.

    Raises:
      InputError: a run folder or results file there is of another configuration.
      Failure: the training diverged.
    """
    config = experiment.config
    folders, seeds = run_folders(config, run_path), per_seed_configs(config)
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
        # A scoring keeps nothing on the way: a signal ends it at once.
        with signals.graceful_shutdown() as request:
            states = train(config, run_path, scoring.step, request=request)
        for i, one, path, settings in missing:
            loaded = LoadedModel(one, states[i].weights, int(states[i].step))
            write_results(path, score(loaded, settings, folders[i]))
            account.made.append(path)
            console.print(f"wrote {path}")


def _settings(config: Config, scoring: Scoring) -> Settings:
    asked = config.evaluation
    return Settings(
        asked.lengths,
        min(asked.examples, scoring.examples or asked.examples),
        asked.seed,
        scoring.loops,
        kinds=tasks.of(config.data).kinds if scoring.kinds else (),
    )


def _made_by(path: Path, config: Config, step: int | None, settings: Settings) -> str | None:
    """The commit that made a results file; None where there is no such file.

    Raises:
      InputError: it cannot be read, or is of another configuration or scoring.
    """
    if not path.exists():
        return None
    try:
        results = read_results(path)
        stored = parse_config(results.config.model_dump(mode="json", exclude_unset=True), str(path))
    except InputError as error:
        raise InputError(f"{error}; {WAY_OUT}") from None
    difference = first_difference(stored, config)
    pairs = {
        "step": (results.step, step or config.train.steps),
        "loops": (
            results.loops_label,
            str(settings.loops or getattr(config.model, "loops", None) or ""),
        ),
        "examples": (results.examples, settings.examples),
        "seed": (results.seed, settings.seed),
        "lengths": ([*map(int, results.lengths)], [*settings.lengths]),
        "kinds": ([*results.kinds], [*settings.kinds]),
    }
    for name, (there, here) in pairs.items():
        if there != here:
            difference = difference or f"{name} is {there} there and {here} here"
    if difference:
        raise InputError(f"{path} is of another run: {difference}; {WAY_OUT}")
    return name_commit(results.commit)


def _note_commit(run_path: Path, account: Account) -> None:
    """Keeps which commits' code has trained a run, and notes those that are not the present one."""
    path = writable_folder(run_path) / COMMITS
    commits = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for commit in commits:
        account.note(f"{run_path} was trained", commit)
    if account.commit not in commits:
        write_file(path, "".join(f"{commit}\n" for commit in [*commits, account.commit]))


def name_commit(commit: str | None) -> str:
    """As tables show it; None outside a checkout."""
    if commit is None:
        return "code without a commit"
    number, *changes = commit.split("+")
    return f"commit {'+'.join([number[:12], *changes])}"


def results_there(
    experiments: Sequence[Experiment], runs_path: Path, account: Account
) -> list[Path]:
    """The results files of the experiments, as far as they have been written.

    Systems that this process leaves to others may have been made otherwise: those files are left
    out, and noted.
    """
    found = []
    for config, scorings, _ in experiments:
        folders = run_folders(config, runs_path / config.name)
        for one, folder in zip(per_seed_configs(config), folders, strict=True):
            for scoring in scorings:
                path, settings = results_path(folder, one, scoring), _settings(one, scoring)
                try:
                    if _made_by(path, one, scoring.step, settings) is not None:
                        found.append(path)
                except InputError as error:
                    account.left_out[path] = str(error)
    return found
