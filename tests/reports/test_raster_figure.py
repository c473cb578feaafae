"""Pictures of answers that are laid out in rows."""

import json
from unittest import mock

import jax
import numpy as np
import pytest
from conftest import run_program, tiny_config
from flax import nnx
from matplotlib.colors import to_rgba

from spak_jax import models, tasks
from spak_jax.evaluation.forward import forward
from spak_jax.evaluation.loaded import LoadedModel
from spak_jax.evaluation.trace import as_json, trace
from spak_jax.reports import raster_figure
from spak_jax.reports.raster_figure import WRONG, panel_loops

MAZE = "S../##./G.."


@pytest.fixture(scope="module")
def untrained() -> LoadedModel:
    data = {
        "task": "mazes", "answers": "in-place", "max_length": 2, "bridge_fraction": 0.0,
        "row_length": 10,
    }  # fmt: skip
    model = {"positions": "grid-bias", "window": True, "causal": False, "init_std": 0.5}
    config = tiny_config(model=model, data=data)
    return LoadedModel(config, nnx.state(models.build(config, jax.random.key(0))), 0)


def test_a_trace_tells_rows_and_what_each_loop_chose(untrained):
    task = tasks.of(untrained.config.data)
    problem = task.parse(MAZE, 2)
    traced = as_json(trace(untrained, problem, 2))
    json.dumps(traced)
    assert traced["raster"]["columns"] == 3 and "looked" not in traced
    assert traced["right"] == "***..****" and traced["chosen"] == traced["chosen_by_loop"][-1]
    tokens = task.batch(task.arrays([problem]), 10).tokens
    for loops, chosen in enumerate(traced["chosen_by_loop"], start=1):
        logits, _ = forward(untrained.config, loops)(untrained.weights, tokens)
        assert task.decode(np.asarray(logits)[0, 1:].argmax(-1)) == chosen


def test_a_picture_shows_each_answer_and_marks_what_is_wrong():
    colours = {"#": "0.25", "*": "blue"}
    traced = {
        "system": "s", "device": "d", "date": "2026-01-01", "problem": MAZE, "loops": 3,
        "right": "***..****", "raster": {"columns": 3, "colours": colours},
        "chosen_by_loop": [".........", "**..*****", "***..****"],
    }  # fmt: skip
    figure = raster_figure.draw(traced)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["the right answer", "loop 1: 7 wrong", "loop 2: 2 wrong", "loop 3: all right"]
    for axes, answer in zip(figure.axes, ["***..****", *traced["chosen_by_loop"]], strict=True):
        walls = np.asarray(axes.images[0].get_array())[..., 0].reshape(-1) < 0.5
        assert walls.tolist() == [cell == "#" for cell in MAZE.replace("/", "")]
        squares = {}
        for square in axes.patches:
            column, row = (round(x) for x in square.get_center())
            squares[row * 3 + column] = square
        for i, (chosen, right) in enumerate(zip(answer, "***..****", strict=True)):
            square = squares.pop(i, None)
            assert (square is not None) == (chosen == "*" or chosen != right)
            if square:
                assert (square.get_edgecolor() == to_rgba(WRONG)) == (chosen != right)
                assert (square.get_facecolor() == to_rgba("blue")) == (chosen == "*")
        assert not squares


@pytest.mark.parametrize(
    ("loops", "expected"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (64, [1, 2, 4, 8, 16, 32, 64]),
     (500, [8, 16, 32, 64, 128, 256, 500])],
)  # fmt: skip
def test_few_loops_have_a_panel_and_the_last_one_has(loops, expected):
    assert panel_loops(loops) == expected


def test_the_trace_command_draws_a_maze(untrained, tmp_path):
    with mock.patch("spak_jax.evaluation.loaded.load", lambda run: untrained):
        result = run_program("spak_jax.trace", tmp_path, MAZE)
    assert result.returncode == 0, result.stderr
    drawn = tmp_path / "trace"
    assert sorted(path.name for path in drawn.iterdir()) == ["trace.json", "trace.pdf", "trace.png"]
    traced = json.loads((drawn / "trace.json").read_text())
    assert len(traced["chosen_by_loop"]) == 3 and traced["problem"] == MAZE
