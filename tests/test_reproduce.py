"""The program that makes the seed's whole table, on one tiny system."""

import json
import sys

import pytest
from conftest import TINY, assert_refused, run_program

from spak_jax import reproduce, studies
from spak_jax.command_line import InputError
from spak_jax.config import read_config
from spak_jax.results import read_results
from spak_jax.studies import Experiment, Scoring, Study
from spak_jax.tables import PUBLISHED

WORDS = "--seeds 2 --examples 4 data.max_digits=2 data.bridge_fraction=0.0"


@pytest.fixture
def tiny_system(tmp_path, monkeypatch):
    """The tiny configuration as the only system, in an empty working folder."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.toml").write_text(TINY)
    monkeypatch.chdir(tmp_path)

    def study(overrides):
        config = read_config(tmp_path / "configs" / "tiny.toml", overrides)
        scorings = (Scoring(step=6), Scoring(kinds=True), Scoring(loops=2))
        return Study([Experiment(config, scorings)], (1, 3), 1_000)

    monkeypatch.setitem(studies.STUDIES, "table-256", study)
    return tmp_path


def run(monkeypatch, words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce", *words.split()])
    reproduce.main()


@pytest.mark.parametrize("name", studies.STUDIES)
def test_systems_of_a_study_can_be_told_apart(name):
    study = studies.STUDIES[name](["train.seeds=2"])
    configs = [experiment.config for experiment in study.experiments]
    assert all(config.train.seeds == 2 for config in configs)
    for names in ([c.name for c in configs], [c.system for c in configs]):
        assert len(set(names)) == len(names)
    for config in configs:
        # Nothing longer than 6 digits is ever trained on; that nothing is drawn beyond the law is
        # proved in test_addition.
        assert config.data.longest == 6


def test_every_published_row_is_reproduced():
    for width, suffix in ((256, ""), (768, "-w768")):
        experiments = studies.table(width, []).experiments
        scored = {
            (config.name, scoring.loops or getattr(config.model, "loops", None))
            for config, scorings in experiments
            for scoring in scorings
            if scoring.step is None
        }
        for name, loops in PUBLISHED:
            # There is no 768-wide LoopLM-128e: it is 128 wide by its name.
            if not (name == "loop128e" and suffix):
                assert (name + suffix, loops) in scored


def test_what_is_done_is_kept_and_what_is_missing_is_made_again(tiny_system, monkeypatch, capsys):
    run(monkeypatch, WORDS)
    out = tiny_system / "figures" / "reproduced-256"
    files = sorted((out / "results").iterdir())
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
    assert "going on after step 12" in capsys.readouterr().out
    assert json.loads(gone.read_text())["lengths"] == scores
    assert all(file.stat().st_mtime_ns == before[file] for file in files[1:])

    # What was scored on the way cannot be scored again after it.
    (out / "results" / "tiny-seed1-step6.json").unlink()
    with pytest.raises(InputError, match="has been trained to step 12, beyond 6; move it aside"):
        run(monkeypatch, WORDS)


def test_results_of_another_run_are_refused(tiny_system, monkeypatch):
    run(monkeypatch, f"{WORDS} --seeds 1")
    with pytest.raises(InputError, match="examples is 4 there and 5 here; name another folder"):
        run(monkeypatch, f"{WORDS} --seeds 1 --examples 5")
    with pytest.raises(InputError, match="train.steps is 12 there and 13 here"):
        run(monkeypatch, f"{WORDS} --seeds 1 train.steps=13")
    (tiny_system / "figures/reproduced-256/results/tiny-seed0.json").write_text("{")
    with pytest.raises(InputError, match="tiny-seed0.json cannot be read as a results file"):
        run(monkeypatch, f"{WORDS} --seeds 1")


def test_bad_command_lines_are_refused():
    assert_refused(run_program("spak_jax.reproduce", "--seeds", "0"), "--seeds 0")
    assert_refused(run_program("spak_jax.reproduce", "--width", "300"), "--width", "300")
    assert_refused(run_program("spak_jax.reproduce", "--system", "gpt"), "--system gpt", "gpt12")
    words = ("--study", "frontier", "--width", "256")
    assert_refused(run_program("spak_jax.reproduce", *words), "--width 256", "not of frontier")
    assert_refused(run_program("spak_jax.reproduce", "train.stepz=1"), "stepz")
