"""Answers in one pass, loops by a problem's length, and grids of both."""

import json

import jax
import numpy as np
import pytest
from conftest import ROOT, assert_refused, run_program, tiny_config

import spak_jax as spak
from spak_jax.evaluation.answers import solve, write_answers
from spak_jax.evaluation.forward import Halting
from spak_jax.evaluation.loaded import load
from spak_jax.evaluation.loops import Loops
from spak_jax.evaluation.score import Scorer, Settings
from spak_jax.training.loop import train


@pytest.fixture(scope="module")
def parity(tmp_path_factory):
    """A run that knows the parities of short sequences."""
    run = tmp_path_factory.mktemp("runs") / "parity"
    config = tiny_config(
        model={
            "positions": "coupled-bias", "window": True, "inject_input": True, "loops": 4,
            "normalize_state": True, "shared_step": True, "no_grad_warmup_loops": 2,
            "init_std": 0.25, "scale_embedding": True, "dropout": 0.0,
        },
        data={
            "task": "parity", "answers": "in-place", "max_length": 3, "bridge_fraction": 0.0,
            "row_length": 4, "examples": 0, "curriculum": 0.5,
        },
        train={
            "steps": 120, "decay_steps": 120, "batch": 32, "learning_rate": 1e-2,
            "steps_per_call": 60, "checkpoint_every": 60,
        },
        evaluation={"lengths": [1, 2, 3]},
    )  # fmt: skip
    train(config, run)
    return run


def test_answers_are_read_out_in_their_places(parity):
    """What is written is what is scored, and what Python gives is what the program does."""
    loaded = load(parity)
    asked = [(f"{i:0{n}b}",) for n in (1, 2, 3, 6) for i in range(min(2**n, 8))]
    predictions = Scorer(loaded, Settings((1,), 1, 0))(loaded.task.arrays(asked))
    answers = write_answers(loaded, asked)
    right = [
        answer.text == loaded.task.solve(each) for answer, each in zip(answers, asked, strict=True)
    ]
    assert predictions.correct.tolist() == right
    # It has learned something, and not all: both ways of being scored are met.
    assert any(right) and not all(right)
    run = spak.load(parity)
    assert run.solve([each for (each,) in asked]) == [answer.text for answer in answers]
    result = run_program("spak_jax.solve", parity, "1")
    assert result.returncode == 0 and "settled after, of 4 loops" in result.stdout, result.stderr
    # Sequences of one padded length, each with loops of its own.
    some = [("110",), ("10",)]
    for answer, each in zip(solve(loaded, some, Loops(1, 2.0)), some, strict=True):
        assert answer._replace(settled=None) == write_answers(loaded, [each], Loops(1, 2.0))[0]
        assert answer.settled == solve(loaded, [each], 1 + 2 * len(each[0]))[0].settled
    result = run_program("spak_jax.solve", parity, "110", "--loops", "2x+1")
    assert result.returncode == 0 and "of 2x+1 loops" in result.stdout, result.stderr
    assert_refused(run_program("spak_jax.solve", parity, "1", "--loops", "0"), "--loops 0")
    trace = run.trace("10")
    assert trace.text == "=10" and trace.first == 1 and trace.right == "11"
    assert trace.attention.shape == (4, 2, 3, 3) and len(trace.chosen) == 2


def test_answers_are_read_out_at_their_blanks(tmp_path):
    """Whatever they are: the model has learned next to nothing."""
    data = {"answers": "one-pass", "max_length": 2, "bridge_fraction": 0.0}
    train(tiny_config(data=data, train={"steps": 5, "checkpoint_every": 5}), tmp_path / "run")
    loaded = load(tmp_path / "run")
    asked = [("1", "2"), ("34", "5"), ("99", "99")]
    predictions = Scorer(loaded, Settings((1,), 1, 0))(loaded.task.arrays(asked))
    assert not predictions.correct.any()
    for problem, answer in zip(asked, write_answers(loaded, asked), strict=True):
        trace = spak.load(tmp_path / "run").trace("+".join(problem))
        assert trace.text == loaded.task.prompt(problem) and trace.text.count("_") > 2
        written = trace.chosen.partition("\n")[0]
        assert trace.first == trace.text.index("_") and answer.text == written[::-1]


@pytest.mark.parametrize(
    "name, trained, loops, length", [("parity", 16, 16, 96), ("s4", 8, 12, 40)]
)
def test_released_weights_think_longer_on_longer_problems(name, trained, loops, length):
    """Far longer ones than any in training are right, with loops for them alone."""
    loaded = load(ROOT / "released" / name)
    assert loaded.config.data.longest == trained and loaded.config.model.loops == loops
    problems = loaded.task.sample_exact(jax.random.key(0), length, 4)
    for given, right in ((loops, 0), (Loops(16, 2.0), 4)):
        assert Scorer(loaded, Settings((1,), 1, 0, given))(problems).correct.sum() == right


def test_released_weights_carry_through_any_sum_in_one_pass():
    loaded = load(ROOT / "released" / "addition-one-pass")
    nines = loaded.task.sample_kind(np.random.default_rng(0), "nines", 40, 2)
    assert Scorer(loaded, Settings((1,), 1, 0, Loops(16, 2.0)))(nines).correct.all()


def test_a_problem_takes_its_own_loops(parity):
    """Among others it comes to what it comes to with as many loops for all."""
    loaded = load(parity)
    asked = [(f"{i:0{n}b}",) for n in (1, 3, 6) for i in range(2)]
    together = Scorer(loaded, Settings((1,), 1, 0, Loops(1, 2.0)))(loaded.task.arrays(asked))
    assert together.loops.tolist() == [3, 3, 7, 7, 13, 13]
    for i, each in enumerate(asked):
        alone = Settings((1,), 1, 0, int(together.loops[i]))
        assert Scorer(loaded, alone)(loaded.task.arrays([each])).correct[0] == together.correct[i]
    written = write_answers(loaded, asked, Loops(1, 2.0))
    assert [len(answer.loops) and answer.loops[0] for answer in written] == [3, 3, 7, 7, 13, 13]
    results = spak.load(parity).evaluate([2, 3], examples=4, loops="2x+1")
    assert (results.loops, results.loops_per_symbol, results.loops_label) == (1, 2.0, "2x+1")
    assert [each.mean_loops for each in results.lengths.values()] == [5, 7]


def test_a_problem_halts_within_loops_of_its_own(parity):
    """It takes so many at most; what it comes to does not depend on those beside it."""
    loaded, halt = load(parity), Halting("convergence", 0.01, 0.01)
    asked = [(bit * n,) for n in (1, 3, 6) for bit in "01"]
    problems = loaded.task.arrays(asked)

    def scored(loops, halt):
        return Scorer(loaded, Settings((1,), 1, 0, loops, halt))(problems)

    free, own = scored(500, halt), scored(Loops(1, 1.0), halt)
    assert (free.loops < 500).all() and len(set(free.loops.tolist())) > 1
    assert (own.loops <= [2, 2, 4, 4, 7, 7]).all() and (own.loops < free.loops).any()
    # Thresholds that nothing reaches leave the bound alone.
    never = scored(Loops(1, 1.0), Halting("convergence", -1.0, -1.0))
    plain = scored(Loops(1, 1.0), None)
    assert plain.loops.tolist() == never.loops.tolist() == [2, 2, 4, 4, 7, 7]
    assert plain.correct.tolist() == never.correct.tolist()
    written = write_answers(loaded, asked, Loops(1, 1.0), halt)
    assert [np.mean(answer.loops) for answer in written] == pytest.approx(own.loops)
    # In one pass, decoding is the same.
    decoded = Settings((1,), 1, 0, Loops(1, 1.0), halt, decode=True)
    assert Scorer(loaded, decoded)(problems).loops.tolist() == own.loops.tolist()


@pytest.mark.parametrize(
    ("text", "found"),
    [("7", 7), ("2x", Loops(0, 2.0)), ("1.5x+8", Loops(8, 1.5)), ("10000", 10_000)],
)
def test_numbers_of_loops(text, found):
    assert Loops.parse(text) == found and str(found) == text


@pytest.mark.parametrize("text", ["", "0", "x", "0x", "-1", "2x+", "+2", "2y", "10001", "1e3", "٣"])
def test_other_numbers_of_loops_are_refused(text):
    with pytest.raises(ValueError, match="from 1 to 10,000"):
        Loops.parse(text)


def test_at_least_one_loop_is_taken():
    assert Loops(0, 0.1).of(np.array([1, 10, 11])).tolist() == [1, 1, 2]


def test_what_does_not_go_together_is_refused(parity, half_trained):
    refused = "loops = 2x: a model that writes symbol by symbol takes one number for all problems"
    result = run_program("spak_jax.evaluate", half_trained, "--loops", "2x", "--decode")
    assert_refused(result, refused)
    assert_refused(run_program("spak_jax.evaluate", parity, "--loops", "2y"), "--loops 2y: must be")
    with pytest.raises(ValueError, match=refused):
        spak.load(half_trained).solve("1+1", loops="2x")


def test_a_grid_is_scored_and_drawn(parity, half_trained, tmp_path):
    words = ("--lengths", "1,2,3,6", "--loops", "1,2,4", "--examples", "5", "--out", tmp_path)
    result = run_program("spak_jax.grid", parity, *words)
    assert result.returncode == 0, result.stderr
    for loops in (1, 2, 4):
        found = json.loads((tmp_path / f"tiny-loops{loops}.json").read_text())
        assert found["loops"] == loops and list(found["lengths"]) == ["1", "2", "3", "6"]
        assert found["lengths"]["6"]["zero_shot"] and not found["lengths"]["3"]["zero_shot"]
    assert {"reach.png", "reach.pdf"} <= {path.name for path in tmp_path.iterdir()}
    # Each cell is what `evaluate` gives.
    own = spak.load(parity).evaluate([1, 2, 3, 6], examples=5, loops=2)
    assert found["method"] == own.method == "in place"
    cells = json.loads((tmp_path / "tiny-loops2.json").read_text())["lengths"]
    assert {n: each.correct for n, each in own.lengths.items()} == {
        n: each["correct"] for n, each in cells.items()
    }
    assert_refused(run_program("spak_jax.grid", parity, "--loops", "0"), "--loops")
    assert_refused(run_program("spak_jax.grid", parity, "--lengths", "a"), "--lengths")
