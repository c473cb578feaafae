"""A soak: growth is a line through what came after the start, and one round is a whole one."""

import pytest
from conftest import tiny_config

from reliability import soak


def test_growth_is_that_of_later_rounds():
    hour = 3600.0
    rounds = [
        {
            "seconds": hour * i / 10,
            "step": i,
            # What is loaded at first is no growth.
            "memory": 1000 + 5 * i if i > 1 else 1,
            "files": 6,
            "threads": 3,
            "checkpoint_bytes": 10 + i % 2,
            "metrics_bytes": 20 * i,
        }
        for i in range(10)
    ]
    found = soak.summary(rounds)
    assert found["memory_an_hour"] == pytest.approx(50)
    assert found["metrics_bytes_an_hour"] == pytest.approx(200)
    assert (found["memory_first"], found["memory_last"], found["memory_most"]) == (1010, 1045, 1045)
    assert found["checkpoint_bytes_most"] == 11 and found["minutes"] == pytest.approx(54)


@pytest.mark.slow
def test_a_round_trains_saves_and_scores(tmp_path):
    config = tiny_config(train={"steps": 1_000_000, "decay_steps": 12})
    found = soak.soak(config, 1e-6, tmp_path / "run")
    assert (found["scorings"], found["steps"], found["checkpoints"]) == (1, 8, 2)
    assert found["rounds"][0]["checkpoint_bytes"] > 0 and (tmp_path / "run/results.json").exists()
