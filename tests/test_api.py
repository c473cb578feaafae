"""What is used from Python: the names of the public API, and what they promise."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY

import spak_jax as spak
from spak_jax.evaluation.results import Results


@pytest.fixture
def tiny_config(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return spak.Config.from_file(path, "train.steps=4", "evaluation.lengths=[1,2]")


def test_importing_changes_nothing():
    """No logger, no hook, no signal, no limit, no environment; and nothing heavy is imported."""
    program = (
        "import os, sys, signal, logging\n"
        "def state():\n"
        "    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}\n"
        "    names = ('', 'absl', 'asyncio', 'jax', 'matplotlib')\n"
        "    loggers = [(x.level, x.handlers) for x in map(logging.getLogger, names)]\n"
        "    hooks = sys.excepthook, sys.unraisablehook, sys.get_int_max_str_digits()\n"
        "    return repr((handlers, loggers, hooks, dict(os.environ)))\n"
        "import absl.logging, matplotlib, jax, flax.nnx, orbax.checkpoint\n"
        "before = state()\n"
        "import spak_jax as spak\n"
        "[getattr(spak, name) for name in spak.__all__]\n"
        "assert state() == before, (before, state())\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    light = "import spak_jax, sys; assert not {'jax', 'numpy', 'pydantic'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", light], cwd=ROOT, check=True)


def test_a_run_is_trained_loaded_and_asked(tiny_config, tmp_path):
    steps = []
    run = spak.train(tiny_config, tmp_path / "run", on_step=steps.append)
    assert steps[-1].step == run.step == 4 and steps[-1].validation_loss is not None
    again = spak.load(str(tmp_path / "run"))
    assert again.step == 4 and again.config == run.config and "step 4" in repr(again)
    answers = run.solve(["1+2", "34+5"])
    assert answers == again.solve(["1+2", "34+5"]) and run.solve("1+2") == answers[0]
    tokens = np.array([run.task.encode("1+2=")])
    np.testing.assert_array_equal(run.model(tokens), again.model(tokens))
    assert run.model(tokens, loops=5).shape == (1, 4, 13)
    traced = run.trace("12+3", loops=2)
    assert traced.logits.shape == (2, 7, 13) and traced.attention.shape == (2, 2, 7, 7)
    np.testing.assert_allclose(traced.attention.sum(-1), 1, rtol=1e-4)
    probs = jax.nn.softmax(traced.logits[:, traced.first])
    right = run.task.encode(traced.text)[traced.first + 1]
    np.testing.assert_allclose(traced.confidence[:, traced.first], probs[:, right], rtol=1e-5)
    scores = run.evaluate(lengths=[1, 3], examples=5, kinds=["nines"], decode=True)
    assert isinstance(scores, Results) and scores.lengths["3"].total == 5
    assert scores.kinds["nines"]["3"].total == 2 and scores.training.step


def test_wrong_arguments_are_named(tiny_config, tmp_path):
    run = spak.train(tiny_config, tmp_path / "run")
    for call, said in (
        (lambda: run.solve("1+"), "'1\\+' is not a problem such as 456\\+123"),
        (lambda: run.solve("1+2", loops=0), "loops = 0: must be from 1"),
        (lambda: run.trace("1+2", loops=-1), "loops = -1"),
        (lambda: run.evaluate(lengths=[]), "lengths = \\[\\]: at least one"),
        (lambda: run.evaluate(lengths=[0]), "lengths = \\[0\\]"),
        (lambda: run.evaluate(examples=0), "examples = 0"),
        (lambda: run.evaluate(kinds=["odd"]), "kinds = \\['odd'\\]: 'odd' must be of nines"),
        (lambda: spak.load(tmp_path / "none"), "there is no run folder"),
        (lambda: spak.Config.from_file("loop13"), "loop13"),
        (lambda: spak.Config.from_file("loop12", "train.stepz=3"), "stepz"),
        (lambda: spak.train(spak.Config.from_file("loop12", "train.seeds=2"), "x"), "seeds = 2"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_an_interrupt_is_an_exception_and_costs_nothing_that_was_kept(tiny_config, tmp_path):
    def interrupt(line):
        raise KeyboardInterrupt

    whole = spak.train(tiny_config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        spak.train(tiny_config, tmp_path / "run", on_step=interrupt)
    assert spak.load(tmp_path / "run").step == 0
    run = spak.train(tiny_config, tmp_path / "run")
    for a, b in zip(*(jax.tree.leaves(each.weights) for each in (whole, run)), strict=True):
        np.testing.assert_array_equal(a, b)
