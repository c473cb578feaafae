"""The look inside a looped model."""

import json
import shutil

import numpy as np
import pytest
from conftest import assert_refused, run_program, tiny_config

from spak_jax.command_line import InputError
from spak_jax.config import parse_config
from spak_jax.evaluation.forward import forward
from spak_jax.evaluation.loaded import load
from spak_jax.evaluation.trace import as_json, trace
from spak_jax.reports import trace_figure
from spak_jax.tasks.arithmetic import Addition

ADDITION = Addition()


def test_a_trace_is_of_the_answer(half_trained):
    trained = load(half_trained)
    traced = as_json(trace(trained, ("57", "8"), None))
    assert traced["text"] == "75+8=56" and traced["first"] == 4 and traced["right"] == "56\n"
    confidence, looked = np.array(traced["confidence"]), np.array(traced["looked"])
    # Of each loop: the tokens that choose 5, 6 and the newline; they look at the text before.
    assert confidence.shape == (3, 3) and looked.shape == (3, 3, 7)
    np.testing.assert_allclose(looked.sum(-1), 1, atol=1e-2)
    assert (looked[:, 0, 5:] == 0).all()
    batch = ADDITION.batch(ADDITION.arrays([("57", "8")]), 7)
    logits, _ = forward(trained.config)(trained.weights, batch.tokens)
    chances = np.exp(logits[0] - np.logaddexp.reduce(logits[0], axis=-1, keepdims=True))
    expected = [chances[4 + i, batch.targets[0, 4 + i]] for i in range(3)]
    np.testing.assert_allclose(confidence[-1], expected, atol=1e-3)
    chosen = np.asarray(logits[0].argmax(-1))[4:]
    assert traced["chosen"] == ADDITION.decode(chosen) and len(traced["chosen"]) == 3
    json.dumps(traced)


def test_a_trace_shows_what_was_chosen_and_marks_what_is_wrong(half_trained):
    """Its labels of the chosen symbols were those of the true ones."""
    loaded = load(half_trained)
    traced = loaded.describe() | as_json(trace(loaded, ("57", "8"), None))
    for chosen, labels in (("56\n", ["5", "6", "¶"]), ("5\n7", ["5", "¶ (6)", "7 (¶)"])):
        figure = trace_figure.draw(traced | {"chosen": chosen})
        ticks = figure.axes[0].get_yticklabels()
        assert [tick.get_text() for tick in ticks] == labels
        assert [tick.get_color() == "red" for tick in ticks] == ["(" in label for label in labels]
        caption = figure.texts[0].get_text().replace("\n", " ")
        assert ("in red" in caption) == ("7" in chosen)


def test_what_cannot_be_traced_is_refused(half_trained):
    trained = load(half_trained)
    with pytest.raises(InputError, match="at most 400"):
        trace(trained, ("1" + "0" * 300, "1"), None)
    values = tiny_config().model_dump(mode="json")
    values["model"] = {"kind": "gpt", "layers": 2, "width": 16, "heads": 2}
    stacked = trained._replace(config=parse_config(values, "test"))
    with pytest.raises(InputError, match="tiny is a stack of 2 blocks"):
        trace(stacked, ("1", "2"), None)


def test_the_trace_command(half_trained, tmp_path):
    out = tmp_path / "out"
    result = run_program("spak_jax.trace", half_trained, "999+1", "--loops", "5", "--out", out)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["trace.json", "trace.pdf", "trace.png"]
    traced = json.loads((out / "trace.json").read_text())
    assert traced["loops"] == 5 and traced["problem"] == "999+1" and traced["step"] == 220
    assert "note: 5 loops, 3 in training" in result.stdout
    # Unasked, beside the run: nothing that the repository holds is written over.
    run = shutil.copytree(half_trained, tmp_path / "run")
    result = run_program("spak_jax.trace", run, "9+1")
    assert result.returncode == 0 and (run / "trace" / "trace.png").is_file(), result.stderr
    assert_refused(run_program("spak_jax.trace", half_trained, "999-1"), "999-1")
    assert_refused(run_program("spak_jax.trace", half_trained, "1+1", "--loops", "0"), "--loops 0")
