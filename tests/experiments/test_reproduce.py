"""The program that makes the baseline's whole table, on one tiny system."""

import contextlib
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, assert_refused, run_program
from hypothesis import given, settings
from hypothesis import strategies as st

from spak_jax import provenance, reproduce
from spak_jax.command_line import InputError
from spak_jax.config import read_config
from spak_jax.evaluation.results import read_results
from spak_jax.experiments import reproduce as reproducing
from spak_jax.experiments import studies
from spak_jax.experiments.reproduce import Account
from spak_jax.experiments.studies import Experiment, Scoring
from spak_jax.reports import figures
from spak_jax.reports.tables import PUBLISHED
from spak_jax.training import signals
from spak_jax.training.loop import train

WORDS = "--seeds 2 --examples 4 data.max_length=2 data.bridge_fraction=0.0"
FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def tiny_system(tmp_path, monkeypatch):
    """The tiny configuration as the only system, in an empty working folder."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.toml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(provenance, "commit", lambda: FIRST)

    def study(overrides):
        scored = ["evaluation.lengths=[1, 3]", "evaluation.examples=1000"]
        config = read_config(tmp_path / "configs" / "tiny.toml", [*scored, *overrides])
        scorings = (Scoring(step=6), Scoring(kinds=True), Scoring(loops=2))
        return [Experiment(config, scorings)]

    monkeypatch.setitem(studies.STUDIES, "table-256", study)
    return tmp_path


def run(monkeypatch, words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce", *words.split()])
    reproduce.main()


# Of tasks that are not trained on at most 6 digits.
LONGEST = {"parity": 16, "hops": 4, "mazes": 5, "binary-multiplication": 12}
LONGEST |= dict.fromkeys(("s3", "s4", "s5"), 8)


@pytest.mark.parametrize("name", studies.STUDIES)
def test_systems_of_a_study_can_be_distinguished(name):
    experiments = studies.STUDIES[name](["train.seeds=2"])
    configs = [experiment.config for experiment in experiments]
    assert all(config.train.seeds == 2 for config in configs)
    for names in ([c.name for c in configs], [c.system for c in configs]):
        assert len(set(names)) == len(names)
    for config in configs:
        # Nothing longer than what its claims are about is ever trained on; that nothing longer is
        # drawn is proved in test_base.
        assert config.data.longest == LONGEST.get(config.data.task, 6)


def test_every_published_row_is_reproduced():
    for width, suffix in ((256, ""), (768, "-w768")):
        experiments = studies.table(width, [])
        scored = {
            (config.name, scoring.loops or getattr(config.model, "loops", None))
            for config, scorings, *_ in experiments
            for scoring in scorings
            if scoring.step is None
        }
        for name, loops in PUBLISHED:
            # There is no 768-wide LoopLM-128e: it is 128 wide by its name.
            if not (name == "loop128e" and suffix):
                assert (name + suffix, loops) in scored


def test_what_is_done_is_kept_and_what_is_missing_is_made_again(tiny_system, monkeypatch, capsys):
    run(monkeypatch, WORDS)
    runs = tiny_system / "runs" / "reproduced-256"
    out = runs / "figures"
    files = sorted(runs.glob("tiny/seed?/*.json"))
    names = [file.name for file in files]
    assert names == [f"tiny-seed{s}{x}.json" for s in (0, 1) for x in ("-loops2", "-step6", "")]
    for file in files:
        results = read_results(file)
        assert set(results.lengths) == {"1", "3"} and results.examples == 4
        assert results.step == (6 if "step6" in file.name else 12)
        assert bool(results.kinds) == file.name.endswith(("seed0.json", "seed1.json"))
        assert results.training.step
    assert {"generalization.png", "test_time_loops.pdf", "table.md"} <= {
        path.name for path in out.iterdir()
    }
    assert "2 seeds" in (out / "table.md").read_text()

    before = {file: file.stat().st_mtime_ns for file in files}
    gone = files[0]
    scores = json.loads(gone.read_text())["lengths"]
    gone.unlink()
    capsys.readouterr()
    run(monkeypatch, WORDS)
    assert "already trained to step 12" in capsys.readouterr().out
    assert json.loads(gone.read_text())["lengths"] == scores
    assert all(file.stat().st_mtime_ns == before[file] for file in files[1:])

    # What was scored on the way cannot be scored again after it.
    (runs / "tiny" / "seed1" / "tiny-seed1-step6.json").unlink()
    with pytest.raises(InputError, match="trained to step 12, beyond 6: ask for more"):
        run(monkeypatch, WORDS)


def test_results_of_another_run_are_refused(tiny_system, monkeypatch):
    run(monkeypatch, f"{WORDS} --seeds 1")
    with pytest.raises(InputError, match="examples is 4 there and 5 here; name another folder"):
        run(monkeypatch, f"{WORDS} --seeds 1 --examples 5")
    with pytest.raises(InputError, match="train.steps is 12 there and 13 here"):
        run(monkeypatch, f"{WORDS} --seeds 1 train.steps=13")
    (tiny_system / "runs/reproduced-256/tiny/tiny-seed0.json").write_text("{")
    with pytest.raises(InputError, match="tiny-seed0.json: not JSON"):
        run(monkeypatch, f"{WORDS} --seeds 1")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def fresh_clone(tmp_path, monkeypatch):
    """What programs here read of a clone, and the results that it comes with."""
    for name in ("configs", "figures"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "name"),
    [
        # Once it went its own way, whatever train.steps said.
        pytest.param("--width 256 --system loop30", "reproduced-256", marks=pytest.mark.slow),
        ("--study pointer", "pointer"),
    ],
)
def test_results_that_a_clone_comes_with_are_no_runs_own(
    fresh_clone, monkeypatch, capsys, words, name
):
    before = contents(fresh_clone)
    tiny = "model.width=8 model.heads=2 train.steps=5 train.batch=2 data.examples=0"
    run(monkeypatch, f"{words} --seeds 1 --examples 2 evaluation.lengths=[1,2] {tiny}")
    made = {path: read_results(path) for path in fresh_clone.glob("runs/**/*-seed0*.json")}
    assert {path.parts[-3] for path in made} == {name}
    for results in made.values():
        assert set(results.lengths) == {"1", "2"} and results.examples == 2
        # LoopLM-30 stands at 2 where it has applied its block as often as LoopLM-12 at its end.
        assert results.step in (5, 2) and results.config.train.steps == 5
    after = contents(fresh_clone)
    assert {path: after[path] for path in before} == before
    new = {path.relative_to(fresh_clone).parts[0] for path in after.keys() - before.keys()}
    assert new == {"runs"}
    printed = capsys.readouterr().out
    assert f"made now: {len(made)} results file" in printed and "kept" not in printed
    assert all(str(path.relative_to(fresh_clone)) in printed for path in made)
    table = (fresh_clone / "runs" / name / "figures" / "table.md").read_text()
    assert "2 problems a length" in table and "1 seed" not in table


@pytest.fixture
def undrawn(monkeypatch):
    """Without figures, which take most of the time."""
    monkeypatch.setattr(figures, "export", lambda paths, out: None)


def test_what_was_kept_is_said_and_what_other_code_made(tiny_system, undrawn, monkeypatch, capsys):
    def printed_by(words: str) -> str:
        capsys.readouterr()
        run(monkeypatch, words)
        return capsys.readouterr().out

    runs = tiny_system / "runs" / "reproduced-256" / "tiny"
    words = f"{WORDS} --seeds 1"
    first = printed_by(words)
    files = sorted(runs.glob("*-seed0*.json"))
    before = contents(runs)
    assert "made now: 3 results files" in first and "kept" not in first
    again = printed_by(words)
    assert "kept as it was: 3 results files" in again and "made now" not in again
    assert "--fresh" not in again
    for file in files:
        assert str(file.relative_to(tiny_system)) in first
        assert str(file.relative_to(tiny_system)) in again

    monkeypatch.setattr(provenance, "commit", lambda: SECOND)
    later = printed_by(words)
    for file in files:
        said = f"{file.relative_to(tiny_system)} was made by commit {FIRST[:12]}; the code here is"
        assert f"{said} commit {SECOND[:12]}" in later
    assert "--fresh makes all of it anew" in later
    assert contents(runs) == before

    # A training that goes on by other code, or is scored by it.
    files[0].unlink()
    mixed = printed_by(words)
    assert f"tiny was trained by commit {FIRST[:12]}; the code here is" in mixed
    assert "made now: 1 results file\n" in mixed and "kept as it was: 2 results files" in mixed
    assert read_results(files[0]).commit == SECOND

    anew = printed_by(f"{words} --fresh")
    assert "made now: 3 results files" in anew and "kept as it was" not in anew
    assert "was made" not in anew
    assert {read_results(file).commit for file in files} == {SECOND}
    old = runs.with_name("tiny.old-1")
    assert read_results(old / files[1].name).commit == FIRST


def test_code_with_changes_is_never_taken_for_the_same():
    account = Account("commit 1+changes")
    for commit in ("commit 1+changes", "commit 1", "commit 1+changes"):
        account.note("x was made", commit)
    code = "the code here is commit 1+changes"
    same = f"x was made by commit 1+changes; {code}, perhaps with other changes"
    assert account.notes == [same, f"x was made by commit 1; {code}"]
    account = Account("commit 1")
    account.note("x was made", "commit 1")
    assert account.notes == []


def test_a_signal_is_kept_waiting_by_a_training_alone(tiny_system, undrawn, monkeypatch):
    """A scoring that waited for its end, which may take hours, was what a Ctrl-C met."""
    handlers = {}

    def noting(name, function):
        def noted(*given, **more):
            handlers.setdefault(name, set()).add(signal.getsignal(signal.SIGINT))
            return function(*given, **more)

        return noted

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(reproducing, "train", noting("train", train))
    monkeypatch.setattr(reproducing, "score", noting("score", reproducing.score))
    run(monkeypatch, f"{WORDS} --seeds 1")
    assert handlers["score"] == {before} and before not in handlers["train"]


def test_what_was_made_is_said_of_a_run_that_stops(tiny_system, undrawn, monkeypatch, capsys):
    def stopping(config, run_path, until=None, **more):
        if until is None:
            raise signals.Stopped(15, "stopped")
        return train(config, run_path, until, **more)

    monkeypatch.setattr(reproducing, "train", stopping)
    with pytest.raises(signals.Stopped):
        run(monkeypatch, WORDS)
    printed = capsys.readouterr().out
    assert "made now: 2 results files" in printed and "tiny-seed1-step6.json" in printed


def test_results_are_published_only_where_it_is_asked(tiny_system, monkeypatch):
    published = tiny_system / "figures" / "mine"
    (published / "results").mkdir(parents=True)
    (published / "results" / "tiny-seed0.json").write_text("another's")
    run(monkeypatch, f"{WORDS} --run runs/mine --out figures/mine")
    runs = tiny_system / "runs" / "mine" / "tiny"
    own = {path.name: path.read_bytes() for path in runs.glob("seed?/*-seed?*.json")}
    assert {path.name: path.read_bytes() for path in (published / "results").iterdir()} == own
    assert len(own) == 6 and (published / "table.md").exists()
    assert {path.name for path in (tiny_system / "runs").iterdir()} == {"mine"}


@pytest.mark.slow
def test_systems_that_were_made_otherwise_are_not_drawn(tiny_system, undrawn, monkeypatch, capsys):
    """As when another process makes them, with other changes."""

    def study(overrides):
        path = tiny_system / "configs" / "tiny.toml"
        scored = ["evaluation.lengths=[1, 3]", *overrides]
        return [
            Experiment(read_config(path, [*scored, f'name="{name}"']), (Scoring(),))
            for name in ("one", "two")
        ]

    monkeypatch.setitem(studies.STUDIES, "table-256", study)
    run(monkeypatch, f"{WORDS} --seeds 1 --system one train.steps=5")
    capsys.readouterr()
    run(monkeypatch, f"{WORDS} --seeds 1 --system two")
    assert "not drawn: runs/reproduced-256/one/one-seed0.json" in capsys.readouterr().out


# Keys, values in TOML and as they are read, that a user may want to change everywhere.
OVERRIDES = st.sampled_from(
    [
        ("train.steps", "20", 20),
        ("train.batch", "4", 4),
        ("train.learning_rate", "0.01", 0.01),
        ("train.seed", "7", 7),
        ("data.max_length", "3", 3),
        ("data.task", '"addition"', "addition"),
        ("data.task", '"subtraction"', "subtraction"),
        ("data.row_length", "40", 40),
        ("data.layout", '"single"', "single"),
        ("data.layout", '"packed"', "packed"),
        ("data.examples", "0", 0),
        ("evaluation.lengths", "[1, 2]", (1, 2)),
        ("evaluation.examples", "3", 3),
        ("model.width", "16", 16),
        ("model.heads", "2", 2),
        ("model.loops", "4", 4),
        ("model.loops", "3", 3),
        ("model.layers", "2", 2),
        ("model.kind", '"gpt"', "gpt"),
        ("model.kind", '"loop"', "loop"),
        ("model.max_relative_distance", "1", 1),
        ("model.max_relative_distance", "3", 3),
        ("model.window", "true", True),
        ("model.window", "false", False),
        ("model.positions", '"rope"', "rope"),
        ("model.positions", '"coupled-bias"', "coupled-bias"),
        ("model.inject_input", "true", True),
        ("model.dropout", "0.2", 0.2),
        ("name", '"mine"', "mine"),
        ("system.name", '"Mine"', "Mine"),
    ]
)


@given(st.sampled_from(sorted(studies.STUDIES)), st.lists(OVERRIDES, max_size=3))
@settings(max_examples=25, deadline=None)
def test_an_override_reaches_every_system_or_is_refused_by_name(name, overrides):
    with contextlib.chdir(ROOT):
        try:
            experiments = studies.STUDIES[name]([f"{key}={text}" for key, text, _ in overrides])
        except InputError as error:
            keys = [key for key, _, _ in overrides]
            sections = {key.split(".")[-1] for key in keys} | set(keys)
            assert any(word in str(error) for word in sections), error
            return
    last = {key: value for key, _, value in overrides}
    for config, scorings, drawn in experiments:
        for key, value in last.items():
            if drawn and key.startswith("model.") and config.name != drawn:
                # What a looped model is compared with has sizes that follow from its own.
                continue
            found = config
            for part in key.replace("system.name", "system").split("."):
                found = getattr(found, part)
            assert found == value
        for scoring in scorings:
            assert scoring.step is None or 1 <= scoring.step < config.train.steps
            if isinstance(scoring.loops, int):
                assert scoring.loops >= 1
        assert len({scoring.loops for scoring in scorings if scoring.step is None}) == sum(
            scoring.step is None for scoring in scorings
        )


@given(st.integers(1, 30_000), st.sampled_from(["table-256", "table-768"]))
@settings(max_examples=15, deadline=None)
def test_no_scoring_lies_beyond_the_training(steps, name):
    with contextlib.chdir(ROOT):
        experiments = studies.STUDIES[name]([f"train.steps={steps}"])
    for config, scorings, *_ in experiments:
        assert config.train.steps == steps
        for scoring in scorings:
            assert scoring.step is None or scoring.step * 30 // 12 <= steps
            # Not the training's end once more.
            assert scoring.step != steps


def test_bad_command_lines_are_refused():
    assert_refused(run_program("spak_jax.reproduce", "--seeds", "0"), "--seeds 0")
    assert_refused(run_program("spak_jax.reproduce", "--width", "300"), "--width", "300")
    assert_refused(run_program("spak_jax.reproduce", "--system", "gpt"), "--system gpt", "gpt12")
    words = ("--study", "frontier", "--width", "256")
    assert_refused(run_program("spak_jax.reproduce", *words), "--width 256", "not of frontier")
    assert_refused(run_program("spak_jax.reproduce", "train.stepz=1"), "stepz")
    words = ("--seeds", "2", "train.seeds=3")
    assert_refused(run_program("spak_jax.reproduce", *words), "--seeds 2", "train.seeds=3")
    words = ("--examples", "2", "evaluation.examples=3")
    assert_refused(run_program("spak_jax.reproduce", *words), "--examples 2", "examples=3")
