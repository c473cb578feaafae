"""Stored files of all times: their keys and names of weights are read as what they were."""

import json

import jax
import numpy as np
import pytest
from conftest import ROOT, tiny_config

from spak_jax import checkpoint, evaluate
from spak_jax.command_line import InputError
from spak_jax.config import FORMER_MODEL_KEYS, Config, parse_config
from spak_jax.results import read_results
from spak_jax.train import train

RELEASED = sorted((ROOT / "released").iterdir())


def description_of(run) -> dict:
    newest = checkpoint.steps_in(run)[-1]
    path = run / "checkpoints" / str(newest) / "description" / "metadata"
    return json.loads(path.read_text())


@pytest.mark.parametrize("run", RELEASED, ids=lambda path: path.name)
def test_released_checkpoints_are_read(run):
    stored = description_of(run)["config"]["model"]
    assert FORMER_MODEL_KEYS.keys() <= stored.keys() and "block" not in stored
    model = evaluate.load(run).config.model
    assert model.block == "transformer"
    for old, new in FORMER_MODEL_KEYS.items():
        assert getattr(model, new) == stored[old]
    # And as they were stored: the digest that the description has is over names, too.
    weights = checkpoint.restore(run).weights
    assert checkpoint.digest(weights) == description_of(run)["digests"]["weights"]
    assert checkpoint.named_arrays(evaluate.load(run).weights).keys() == weights.keys()


def test_a_key_by_both_its_names_is_refused():
    values = tiny_config().model_dump(mode="json")
    with pytest.raises(InputError, match="clip and max_relative_distance, two names of one key"):
        parse_config(values | {"model": values["model"] | {"clip": 1}}, "test")
    with pytest.raises(InputError, match="unknown key model.clap"):
        parse_config(values | {"model": values["model"] | {"clap": 1}}, "test")


def of_before(model: dict) -> dict:
    names = {new: old for old, new in FORMER_MODEL_KEYS.items()}
    return {names.get(key, key): value for key, value in model.items() if key != "block"}


@pytest.mark.parametrize("scheme", ["learned", "coupled-embedding"])
def test_a_run_that_was_begun_before_goes_on(scheme, tmp_path, monkeypatch):
    """Weights and the optimizer's arrays, by the names that they have ever had."""
    config = tiny_config(model={"positions": scheme}, data={"examples": 0})
    train(config, tmp_path / "at once")
    dump = Config.model_dump

    def dump_of_before(self, **how):
        values = dump(self, **how)
        return values | {"model": of_before(values["model"])}

    with monkeypatch.context() as patch:
        patch.setattr(Config, "model_dump", dump_of_before)
        train(config, tmp_path / "run", 4)
    assert "clip" in description_of(tmp_path / "run")["config"]["model"]
    stored = checkpoint.restore(tmp_path / "run", optimizer=True)
    learned = {"learned": "pointer.gate_logits", "coupled-embedding": "id_embedding.embedding"}
    for arrays, count in ((stored.weights, 1), (stored.optimizer, 2)):
        found = [name for name in arrays if f".{name}".endswith(f".{learned[scheme]}")]
        assert len(found) == count and not any("position_scheme" in name for name in arrays)
    train(config, tmp_path / "run")
    one, other = (checkpoint.restore(tmp_path / name).weights for name in ("at once", "run"))
    assert checkpoint.digest(one) == checkpoint.digest(other)


def test_results_from_before_have_the_keys_of_today(tmp_path):
    [path, *_] = sorted((ROOT / "figures" / "frontier" / "results").glob("frontier-seed?.json"))
    assert "free_loops" in json.loads(path.read_text())["config"]["model"]
    model = read_results(path).config.model.model_dump()
    assert model["no_grad_warmup_loops"] == 12 and model["block"] == "transformer"
    assert not FORMER_MODEL_KEYS.keys() & model.keys()


def test_names_of_weights_are_stored_as_ever():
    config = tiny_config(model={"positions": "learned"})
    state = evaluate.models.abstract(config, 13)[1]
    names = checkpoint.named_arrays(state)
    assert "pointer.gate_logits" in names and "block.qkv.kernel" in names
    filled = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in names.items()}
    assert jax.tree.structure(checkpoint.from_named(state, filled)) == jax.tree.structure(state)
