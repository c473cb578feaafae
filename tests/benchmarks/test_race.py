"""The race to a hundred digits."""

import pytest
from conftest import TINY, assert_refused, run_program, tiny_config

from benchmarks import race
from spak_jax.command_line import Failure


@pytest.mark.slow
def test_a_race_ends_where_the_digits_are_right(monkeypatch):
    config = tiny_config(
        data={"max_length": 1, "bridge_fraction": 0.0, "row_length": 8, "examples": 0},
        train={"steps": 60, "decay_steps": 60, "learning_rate": 1e-2, "batch": 32,
               "steps_per_call": 10},
    )  # fmt: skip
    monkeypatch.setattr(race, "ACCURACY", 0.01)
    monkeypatch.setattr(race, "EXAMPLES", 300)
    result = race.race(config, 1, 20)
    assert result["accuracy"] >= 0.01 and result["total"] == 300
    assert result["step"] % 20 == 0 and 0 < result["step"] <= 60
    assert 0 < result["training_seconds"] < result["seconds"]
    monkeypatch.setattr(race, "ACCURACY", 0.999)
    with pytest.raises(Failure, match="99.9% of 1 digits not reached in 60 steps"):
        race.race(config, 1, 30)


def test_the_race_command_refuses(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    words = ("benchmarks.race", tmp_path / "tiny.toml")
    assert_refused(run_program(*words, "train.seeds=2"), "train.seeds = 2")
    assert_refused(run_program(*words, "--every", "0"), "--every 0")
    assert_refused(run_program(*words, "--lengths", "0"), "--lengths 0")
