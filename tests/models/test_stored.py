"""Stored files of all times: their keys and names of weights are read as what they were."""

import json

import jax
import numpy as np
import pytest
from conftest import ROOT, tiny_config, with_slow

from spak_jax import models
from spak_jax.command_line import InputError
from spak_jax.config import Config, parse_config
from spak_jax.evaluation.loaded import load
from spak_jax.evaluation.results import read_results
from spak_jax.former_names import FORMER_NAMES
from spak_jax.training import checkpoint, run_folder
from spak_jax.training.loop import train
from spak_jax.training.named_arrays import digest, from_named, named_arrays

RELEASED = sorted((ROOT / "released").iterdir())
# Stored when some keys had other names.
FORMER = ("frontier", "frontier-tiny", "pointer")


def description_of(run) -> dict:
    newest = run / "checkpoints" / str(run_folder.steps_in(run)[-1])
    return json.loads((newest / "description" / "metadata").read_text())


@pytest.mark.parametrize("run", RELEASED, ids=lambda path: path.name)
def test_released_checkpoints_are_read(run):
    stored = description_of(run)["config"]["model"]
    model = load(run).config.model
    assert model.block == "transformer"
    if run.name in FORMER:
        assert FORMER_NAMES["model"].keys() <= stored.keys() and "block" not in stored
        for old, new in FORMER_NAMES["model"].items():
            assert getattr(model, new) == stored[old]
    # And as they were stored: the digest that the description has is over names, too.
    weights = checkpoint.restore(run).weights
    assert digest(weights) == description_of(run)["digests"]["weights"]
    assert named_arrays(load(run).weights).keys() == weights.keys()


def test_a_key_by_both_its_names_is_refused():
    values = tiny_config().model_dump(mode="json")
    with pytest.raises(
        InputError, match="model.clip is the former name of model.max_relative_distance"
    ):
        parse_config(values | {"model": values["model"] | {"clip": 1}}, "test")
    with pytest.raises(InputError, match="unknown key model.clap"):
        parse_config(values | {"model": values["model"] | {"clap": 1}}, "test")


def of_before(values: dict) -> dict:
    """A configuration as it was stored before keys had the names that they have now."""
    stored = values | {"model": {k: v for k, v in values["model"].items() if k != "block"}}
    for section, names in FORMER_NAMES.items():
        former = {new: old for old, new in names.items()}
        stored[section] = {former.get(key, key): x for key, x in stored[section].items()}
    return stored


@pytest.mark.parametrize("scheme", with_slow(["learned", "coupled-embedding"], "learned"))
def test_a_run_that_was_begun_before_goes_on(scheme, tmp_path, monkeypatch):
    """Weights and the optimizer's arrays, by the names that they have ever had."""
    config = tiny_config(model={"positions": scheme}, data={"examples": 0})
    train(config, tmp_path / "at once")
    dump = Config.model_dump

    def dump_of_before(self, **how):
        return of_before(dump(self, **how))

    with monkeypatch.context() as patch:
        patch.setattr(Config, "model_dump", dump_of_before)
        train(config, tmp_path / "run", 4)
    stored = description_of(tmp_path / "run")["config"]
    assert "clip" in stored["model"] and "max_digits" in stored["data"]
    stored = checkpoint.restore(tmp_path / "run", optimizer=True)
    learned = {"learned": "pointer.gate_logits", "coupled-embedding": "id_embedding.embedding"}
    for arrays, count in ((stored.weights, 1), (stored.optimizer, 2)):
        found = [name for name in arrays if f".{name}".endswith(f".{learned[scheme]}")]
        assert len(found) == count and not any("position_scheme" in name for name in arrays)
    train(config, tmp_path / "run")
    one, other = (checkpoint.restore(tmp_path / name).weights for name in ("at once", "run"))
    assert digest(one) == digest(other)


def test_results_from_before_have_the_keys_of_today(tmp_path):
    [path, *_] = sorted((ROOT / "figures" / "frontier" / "results").glob("frontier-seed?.json"))
    assert "free_loops" in json.loads(path.read_text())["config"]["model"]
    model = read_results(path).config.model.model_dump()
    assert model["no_grad_warmup_loops"] == 12 and model["block"] == "transformer"
    assert not FORMER_NAMES["model"].keys() & model.keys()


def test_names_of_weights_are_stored_as_ever():
    config = tiny_config(model={"positions": "learned"})
    state = models.abstract(config)[1]
    names = named_arrays(state)
    assert "pointer.gate_logits" in names and "block.qkv.kernel" in names
    filled = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in names.items()}
    assert jax.tree.structure(from_named(state, filled)) == jax.tree.structure(state)
