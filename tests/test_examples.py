"""The examples, as their first lines say they are used."""

import json

import jax
import numpy as np
import pytest
from conftest import ROOT, assert_refused, run_program

import spak_jax as spak
from spak_jax.evaluation import calibration
from spak_jax.models.halting import RULES

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SHORT = (
    "model.width=16", "model.loops=2", "train.batch=8", "train.checkpoint_every=4",
    "train.warmup_steps=2", "evaluation.lengths=[1,3,8]", "evaluation.examples=5",
)  # fmt: skip


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_one_short_file(path):
    assert len(path.read_text().splitlines()) <= 60


@pytest.fixture(scope="module")
def caesar(tmp_path_factory):
    """A run folder of the task `caesar`, trained in two parts."""
    run = tmp_path_factory.mktemp("examples") / "caesar"
    words = ("train", "quickstart", "data.task=caesar", "name=caesar", *SHORT, "--run", run)
    for steps in (4, 8):
        result = run_program("examples/caesar.py", *words, f"train.steps={steps}")
        assert result.returncode == 0, result.stderr
    assert "going on after step 4" in result.stdout
    return run


def test_a_task_of_ones_own_is_trained_and_goes_on_to_the_same_bits(caesar, tmp_path):
    words = ("train", "quickstart", "data.task=caesar", "name=caesar", *SHORT)
    result = run_program("examples/caesar.py", *words, "train.steps=8", "--run", tmp_path / "one")
    assert result.returncode == 0, result.stderr
    # Eight steps in all, as they would have been at once but for the schedule, which counts them.
    one, parts = spak.load(tmp_path / "one"), spak.load(caesar)
    assert one.step == parts.step == 8
    for a, b in zip(*(jax.tree.leaves(run.weights) for run in (one, parts)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_task_of_ones_own_is_scored_solved_traced_and_drawn(caesar, tmp_path, monkeypatch):
    example = lambda *words: run_program("examples/caesar.py", *words)  # noqa: E731
    scores = tmp_path / "scores.json"
    result = example("evaluate", caesar, "--lengths", "1-3", "--decode", "--json", scores)
    assert result.returncode == 0, result.stderr
    assert "letters" in result.stdout and json.loads(scores.read_text())["length_unit"] == "letters"
    result = example("solve", caesar, "abc", "h")
    assert result.returncode == 0 and "abc" in result.stdout, result.stderr
    result = example("trace", caesar, "abcd", "--out", tmp_path / "trace")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "trace" / "trace.json").read_text())["text"] == "abcd=defg"
    result = example("figures", caesar / "results.json", "--out", tmp_path / "figures")
    assert result.returncode == 0, result.stderr
    assert "letters" in (tmp_path / "figures" / "table.md").read_text()
    monkeypatch.setattr(calibration, "CALIBRATED_ON", 64)
    monkeypatch.setattr(calibration, "DOUBTS", dict.fromkeys(RULES, (0.1, 0.01)))
    result = example("halting", caesar, "--lengths", "2", "--examples", "8", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert_refused(example("solve", caesar, "abz"), "'abz' is not a problem such as abcd")
    assert_refused(example("evaluate", caesar, "--kinds"), "caesar, which has none")


def test_a_task_of_ones_own_from_python(caesar):
    run = spak.load(caesar)
    assert run.task.name == "caesar"
    answer = run.solve("abcabc")
    assert isinstance(answer, str) and run.solve(["abcabc", "h"])[0] == answer
    tokens = np.array([run.task.encode("abc=abc")])
    logits = run.model(tokens, loops=3, position_ids=run.task.position_ids(tokens))
    assert logits.shape == (1, 7, len(run.task.vocabulary))
    assert run.trace("abc", loops=3).logits.shape == (3, 7, len(run.task.vocabulary))
    scores = run.evaluate(lengths=[2, 9], examples=6)
    assert scores.lengths["2"].total == 6 and scores.lengths["9"].zero_shot
