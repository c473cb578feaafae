"""Halting that pays: the calibration keeps its word, and what is reported is what was counted."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from conftest import tiny_config

from spak_jax import halting
from spak_jax.command_line import InputError
from spak_jax.config import parse_config
from spak_jax.evaluation import calibration
from spak_jax.evaluation.forward import PUBLISHED_HALTING, Halting
from spak_jax.evaluation.loaded import LoadedModel, load
from spak_jax.evaluation.score import Scorer, Settings
from spak_jax.models.halting import RULES
from spak_jax.reports import depth_figure, halting_figure
from spak_jax.tasks.arithmetic import Addition

ADDITION = Addition()


@pytest.fixture(scope="module")
def found(half_trained):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "CALIBRATED_ON", 400)
        patch.setattr(calibration, "DOUBTS", dict.fromkeys(RULES, (0.3, 0.1, 0.01, 1e-4)))
        given = load(half_trained), (1, 2), 60, 3, None, RULES, ("all-carry",)
        return calibration.measure(*given)


@pytest.mark.parametrize("way", ["none", "published"])
def test_scores_are_those_of_the_evaluator(half_trained, way):
    trained = load(half_trained)
    problems = ADDITION.sample_exact(jax.random.key(1), 1, 200)
    outcome = calibration.HaltingScorer(trained, 3)(
        problems, {"none": calibration.NEVER, "published": PUBLISHED_HALTING}[way]
    )
    halt = PUBLISHED_HALTING if way == "published" else None
    expected = Scorer(trained, Settings((1,), 1, 0, halt=halt))(problems)
    np.testing.assert_array_equal(outcome.correct, expected.correct)
    loops = np.where(outcome.answering, outcome.steps, 0).sum(1) / outcome.answering.sum(1)
    np.testing.assert_allclose(loops, expected.loops, rtol=1e-6)
    assert 0.05 < outcome.correct.mean() < 0.999
    # What is read ends with the answer: of `1+2=3`, five tokens, `=` and `3` choose its symbols.
    count = list(np.asarray(ADDITION.render(problems, 9)[0][0])).index(ADDITION.end)
    assert outcome.read[0].sum() == count and outcome.answering[0].sum() == count - 3


@pytest.mark.parametrize("rule", RULES)
def test_the_calibration_saves_most_of_what_it_may(found, rule):
    plain, tried = found["calibration"]["none"], found["calibration"][rule]
    assert plain["row_loops"] == plain["text_steps"] == 3
    least = plain["accuracy"] - calibration.MOST_LOST
    doubts = {x["doubt"]: x for x in tried}
    way = found["ways"][rule]
    chosen = 1 - way["after"] if rule == "confidence" else way["after"]
    chosen = min(doubts, key=lambda doubt: abs(doubt - chosen))
    kept = [x for x in tried if x["accuracy"] >= least]
    if kept:
        assert doubts[chosen]["accuracy"] >= least
        most = 1.1 * min(x["row_loops"] for x in kept)
        assert doubts[chosen]["row_loops"] <= most
        assert all(x["row_loops"] > most for x in kept if x["doubt"] < chosen)
    else:
        assert chosen == min(doubts)
    # Less doubt, more loops: nothing is tried that could not be chosen, but for the first.
    loops = [doubts[doubt]["row_loops"] for doubt in sorted(doubts)]
    assert loops == sorted(loops, reverse=True)
    if kept and len(doubts) < 4:
        assert loops[0] > most >= loops[1]


@pytest.mark.parametrize("rule", RULES)
def test_calibrating_alone_chooses_the_same(half_trained, found, rule):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "CALIBRATED_ON", 400)
        patch.setattr(calibration, "CALIBRATION_SEED", 3)
        patch.setattr(calibration, "DOUBTS", dict.fromkeys(RULES, (0.3, 0.1, 0.01, 1e-4)))
        way = calibration.calibrated(load(half_trained), rule)
    assert way._asdict() == found["ways"][rule]


def test_a_number_of_loops_for_all_is_what_the_evaluator_runs(found, half_trained):
    problems = ADDITION.sample_exact(jax.random.fold_in(jax.random.key(3), 2), 2, 60)
    scorer = Scorer(load(half_trained), Settings((2,), 1, 0, loops=2))
    fixed = [line["accuracy"] for line in found["swept"]["fixed"]]
    assert [line["loops"] for line in found["swept"]["fixed"]] == [1, 2, 3]
    assert fixed[1] == pytest.approx(scorer(problems).correct.mean())
    assert fixed[2] == found["swept"]["none"]["accuracy"]
    easier = ADDITION.sample_exact(jax.random.key(1), 1, 200)
    found = calibration.HaltingScorer(load(half_trained), 3).after_loops(easier)
    assert len({line["accuracy"] for line in found}) > 1


def test_where_every_doubt_loses_the_least_is_taken():
    doubts = calibration.DOUBTS["confidence"]
    tried = [{"doubt": d, "accuracy": 0.5, "row_loops": 1} for d in doubts]
    lossy = {"none": {"accuracy": 0.9}, "confidence": tried}
    assert calibration._chosen(lossy, "confidence") == min(doubts)


def test_less_doubt_may_take_a_tenth_more_loops():
    loops = {0.3: 10, 0.1: 10.9, 0.03: 11.1, 0.01: 30}
    tried = [{"doubt": d, "accuracy": 1.0, "row_loops": n} for d, n in loops.items()]
    found = {"none": {"accuracy": 1.0}, "agreement": tried}
    assert calibration._chosen(found, "agreement") == 0.1
    # What loses answers sets no measure.
    tried.append({"doubt": 0.9, "accuracy": 0.5, "row_loops": 2})
    assert calibration._chosen(found, "agreement") == 0.1


def test_loops_are_counted_by_token_row_and_carries(found, half_trained):
    trained = load(half_trained)
    problems = ADDITION.sample_exact(jax.random.fold_in(jax.random.key(3), 2), 2, 60)
    way = Halting(**found["ways"]["convergence"])
    outcome = calibration.HaltingScorer(trained, 3)(problems, way)
    line = found["lengths"]["2"]["convergence"]
    assert line["total"] == 60 and line["correct"] == outcome.correct.sum()
    read = [steps[read] for steps, read in zip(outcome.steps, outcome.read, strict=True)]
    assert line["row_loops"] == pytest.approx(np.mean([max(row) for row in read]))
    assert line["text_steps"] == pytest.approx(np.mean(np.concatenate(read)))
    assert line["by_token"][4] == pytest.approx(np.mean([row[4] for row in read]))
    assert len(line["by_token"]) == max(map(len, read))
    counted = sum(group["problems"] for group in line["measures"]["carries"].values())
    assert counted == 60 and set(line["measures"]["carries"]) <= {"0", "1", "2"}
    for problem in found["drawn"]["problems"]:
        assert len(problem["steps"]["convergence"]) == len(problem["text"])
    assert found["drawn"]["measure"] == "carries"
    carries = [problem["measure"] for problem in found["drawn"]["problems"]]
    assert carries == sorted(carries)


def test_loops_are_set_against_depth(found, half_trained):
    """By counts that a file holds, from which the figure is drawn again."""
    stored = json.loads(json.dumps(found))
    hard = stored["kinds"]["all-carry"]
    for length, ways in (*stored["lengths"].items(), *hard.items()):
        for way in ways.values():
            depth, loops, problems = np.array(way["depths"]).T
            assert problems.sum() == way["total"] and set(depth) <= set(range(int(length) + 2))
            assert (loops * problems).sum() / way["total"] == pytest.approx(way["row_loops"])
    assert stored["trends"]["none"]["correlation"] is None
    figure = depth_figure.draw(stored)
    for rule, axes in zip(RULES, figure.axes, strict=True):
        trend = stored["trends"][rule]
        assert f"slope {trend['slope']:.2f}" in axes.get_title(loc="left")
        drawn = {tuple(point) for each in axes.collections for point in each.get_offsets().data}
        every = (*stored["lengths"].values(), *hard.values())
        counted = [line for ways in every for line in ways[rule]["depths"]]
        assert drawn == {(depth, loops) for depth, loops, _ in counted}


def test_it_is_drawn(found):
    figure = halting_figure.draw(found)
    assert len(figure.axes) == len(RULES) + 2
    texts = {text.get_text() for axes in figure.axes[:2] for text in axes.texts}
    assert {"+", "="} <= texts


@pytest.fixture
def command(monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["halting", *map(str, words)])
        halting.main()

    return run


@pytest.mark.slow
def test_the_command_line(half_trained, tmp_path, monkeypatch, capsys, command):
    # The shapes of `found`, whose programs are there.
    monkeypatch.setattr(calibration, "CALIBRATED_ON", 400)
    monkeypatch.setattr(calibration, "DOUBTS", dict.fromkeys(RULES, (0.1, 0.01)))
    command(half_trained, "--lengths", "1", "--examples", "60", "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "halting.json").read_text())
    assert list(found["lengths"]) == ["1"] and found["examples"] == 60
    assert set(found["milliseconds"]) == set(found["ways"]) == {"none", "published", *RULES}
    for name in ("halting.png", "loops-by-depth.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000
    assert "convergence: threshold" in capsys.readouterr().out
    run = shutil.copytree(half_trained, tmp_path / "run")
    command(run, "--lengths", "1", "--examples", "60")
    assert (run / "halting" / "halting.json").is_file()
    # Drawn again, the figures are the same bytes.
    drawn = tmp_path / "out" / "loops-by-depth.png"
    before = drawn.read_bytes()
    drawn.unlink()
    command(tmp_path / "out" / "halting.json")
    assert drawn.read_bytes() == before


def test_the_command_line_refuses(half_trained, tmp_path, command):
    (tmp_path / "old.json").write_text("{}")
    with pytest.raises(InputError, match="old.json: not what `halting` writes"):
        command(tmp_path / "old.json")
    with pytest.raises(InputError, match="--kind ones: must be of nines, all-carry"):
        command(half_trained, "--kind", "ones")
    with pytest.raises(InputError, match="--loops 2y: must be"):
        command(half_trained, "--loops", "2y")
    with pytest.raises(InputError, match="--lengths .*upwards"):
        command(half_trained, "--lengths", "0")


def test_a_stack_has_no_loops_to_stop():
    model = {"kind": "gpt", "width": 16, "heads": 2, "layers": 2}
    stack = parse_config(tiny_config().model_dump(mode="json") | {"model": model}, "test")
    with pytest.raises(InputError, match="no loops to stop"):
        calibration.measure(LoadedModel(stack, None, 0), (1,), 1, 0, None)
    with pytest.raises(InputError, match="no loops to stop"):
        calibration.calibrated(LoadedModel(stack, None, 0), "convergence")
