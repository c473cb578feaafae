"""JAX's settings change nothing that is computed here, and forbidden NaNs are not ours."""

import contextlib
import functools

import jax
import numpy as np
import pytest
from conftest import tiny_config, with_slow

from spak_jax import models
from spak_jax.evaluation import calibration
from spak_jax.evaluation.answers import solve
from spak_jax.evaluation.loaded import load
from spak_jax.evaluation.score import Settings, score
from spak_jax.training import checkpoint
from spak_jax.training.loop import train
from spak_jax.training.named_arrays import digest

SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "rbg": lambda: jax.default_prng_impl("rbg"),
    "keys of old": lambda: jax.threefry_partitionable(False),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "no NaN": lambda: jax.debug_nans(True),
}
# Those of numbers together, as each costs a training; of those of keys one would hide the other.
AT_ONCE = {
    "numbers": ("x64", "no rank promotion", "strict dtypes", "no NaN"),
    "keys": ("rbg",),
    "keys of old": ("keys of old",),
}
# What draws, and has weights beside those of layers.
SCHEMES = {"random-rope": {}, "learned": {"window": True, "clip": 2}, "coupled-embedding": {}}


def config_of(scheme):
    return tiny_config(
        model={"positions": scheme, "loops": 2, **SCHEMES[scheme]},
        data={"examples": 0, "max_length": 2, "bridge_fraction": 0.0, "row_length": 12},
        train={"steps": 3, "checkpoint_every": 3, "batch": 2},
        evaluation={"lengths": [2], "examples": 5},
    )


@pytest.fixture(scope="module")
def as_ever(tmp_path_factory):
    """Of a scheme a run, and what becomes of it."""

    @functools.cache
    def of(scheme):
        run = tmp_path_factory.mktemp(scheme)
        return run, outcome(scheme, run)

    return of


def outcome(scheme, run):
    """A training's weights, its scores, answers and the threshold it halts by."""
    config = config_of(scheme)
    train(config, run)
    trained = load(run)
    return (
        digest(checkpoint.restore(run).weights),
        score(trained, Settings.of(config.evaluation)),
        solve(trained, [("1", "2"), ("10", "345")]),
    )


@pytest.mark.parametrize("settings", AT_ONCE)
@pytest.mark.parametrize("scheme", with_slow(SCHEMES, "random-rope"))
def test_the_same_whatever_the_settings(scheme, settings, as_ever, tmp_path):
    run, expected = as_ever(scheme)
    with contextlib.ExitStack() as stack:
        for setting in AT_ONCE[settings]:
            stack.enter_context(SETTINGS[setting]())
        assert outcome(scheme, tmp_path / "run") == expected
        # And a run that was made without it is read.
        trained = load(run)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(trained.weights)} == {"float32"}


def test_calibrating_knows_no_settings(half_trained, monkeypatch):
    monkeypatch.setattr(calibration, "CALIBRATED_ON", 64)
    trained = load(half_trained)
    found = []
    for setting in (contextlib.nullcontext, SETTINGS["x64"], SETTINGS["no NaN"]):
        with setting():
            found.append(calibration.calibrated(trained, "convergence"))
    assert found[0] == found[1] == found[2]


def test_a_models_weights_are_float32_under_x64():
    """Of a model that a user's own program builds."""
    for scheme in SCHEMES:
        with jax.enable_x64(True):
            _, weights = models.abstract(config_of(scheme))
        assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {np.dtype(np.float32)}
