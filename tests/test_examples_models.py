"""A block and a position scheme of one's own train, resume, score and write as ours do."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, tiny_config, with_slow
from flax import nnx
from random_models import LENGTH, build, error, logits_of, make_config, random_batch, random_weights

from spak_jax import models
from spak_jax.evaluation import generate
from spak_jax.evaluation.answers import solve
from spak_jax.evaluation.forward import forward
from spak_jax.evaluation.loaded import load
from spak_jax.evaluation.score import Scorer, Settings
from spak_jax.models import fused
from spak_jax.registry import BLOCKS
from spak_jax.tasks.arithmetic import Addition
from spak_jax.training import checkpoint
from spak_jax.training.loop import train
from spak_jax.training.named_arrays import digest, named_arrays

ADDITION = Addition()

pytestmark = pytest.mark.usefixtures("exact_products")


def example(name: str):
    """The module in a file of `examples/`, imported once."""
    name, path = f"example_{name}", ROOT / "examples" / f"{name}.py"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


QK_NORM, ABSOLUTE = example("qk_norm"), example("absolute_positions")
OURS = {"block": {"block": "qk-norm"}, "scheme": {"positions": "absolute"}}
KINDS = {"loop": {"kind": "loop", "loops": 3}, "gpt": {"kind": "gpt", "layers": 2}}


@pytest.mark.parametrize("own", with_slow(OURS, "block"))
def test_it_trains_resumes_scores_and_writes(own, tmp_path):
    config = tiny_config(model=OURS[own], data={"examples": 0})
    train(config, tmp_path / "at once")
    train(config, tmp_path / "run", 4)
    train(config, tmp_path / "run")
    one, other = (checkpoint.restore(tmp_path / name).weights for name in ("at once", "run"))
    assert digest(one) == digest(other)
    learned = {"block": "block.q_scale", "scheme": "position_scheme.table.embedding"}[own]
    initial = jax.jit(lambda: nnx.state(models.build(config, jax.random.key(0))))()
    start = named_arrays(initial)
    assert start.keys() == one.keys() and not np.array_equal(one[learned], start[learned])

    trained = load(tmp_path / "run")
    problems = ADDITION.sample_exact(jax.random.key(1), 2, 20)
    forced, written = (
        Scorer(trained, Settings((2,), 20, 0, decode=decode))(problems) for decode in (False, True)
    )
    np.testing.assert_array_equal(forced.correct, written.correct)
    assert len(solve(trained, [("1", "2"), ("34", "5")])) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", OURS)
def test_it_writes_what_recomputing_says(own, kind):
    """By whichever decoder is picked: a cache serves a scheme of one's own, and no such block."""
    config = make_config(**KINDS[kind], **OURS[own])
    weights = nnx.state(build(config, random_weights(config)))
    picked = generate.pick_decoder(config.model, (3, LENGTH), None)
    assert picked == (generate.WITH_CACHE if own == "scheme" else generate.WITHOUT_CACHE)
    run = forward(config)
    prompt = jnp.asarray(random_batch().tokens, jnp.int32)
    prompt_length = jnp.array([3, 5, 1])
    found, expected = (
        jax.jit(generate.make_generate_fn(config, run, decoder=decoder))(
            weights, prompt, prompt_length
        )
        for decoder in (None, generate.WITHOUT_CACHE)
    )
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(value, wanted)
    assert len({*np.asarray(found[0]).ravel().tolist()}) > 3


def test_queries_and_keys_are_normed_and_probabilities_shown():
    config = make_config(**KINDS["loop"], block="qk-norm")
    weights = random_weights(config)
    # Queries of any length attend alike.
    longer = {**weights, "block.qkv.kernel": weights["block.qkv.kernel"].copy()}
    longer["block.qkv.kernel"][:, :64] *= 5
    tokens = random_batch().tokens
    plain = logits_of(build(config, weights), tokens)
    assert error(logits_of(build(config, longer), tokens), plain) < 1e-4
    ours = make_config(**KINDS["loop"])
    known = {name: x for name, x in weights.items() if not name.endswith(("q_scale", "k_scale"))}
    assert error(logits_of(build(ours, known), tokens), plain) > 0.01
    shown = nnx.jit(lambda network: network.forward_with_intermediates(jnp.asarray(tokens))[1])
    np.testing.assert_allclose(np.sum(shown(build(config, weights)), -1), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_block_called_by_hand(kind, monkeypatch):
    """And no fused way is asked for, though all are there."""
    for name in ("add_layer_norm", "attention_inputs", "add_attention", "looped_block"):
        monkeypatch.setattr(fused, name, None)
    config = make_config(**KINDS[kind], block="qk-norm")
    network, batch = build(config, random_weights(config)), random_batch()
    tokens, wanted, weights = (jnp.asarray(x) for x in batch)
    weights = weights.astype(jnp.float32)

    def by_hand(network):
        given = network._position_inputs(tokens)
        x, streams = network.embedding(tokens), []
        for step in range(3 if kind == "loop" else 2):
            if kind == "loop":
                block, x = network.block, x + network.step_embedding.embedding[step]
            else:
                definition, layers = nnx.split(network.blocks)
                own = jax.tree.map(lambda leaf, step=step: leaf[step], layers)
                block = nnx.merge(definition, own)
            x = block(x, position_inputs=given)
            streams.append(x)
        supervised = streams[1:] if kind == "loop" else streams[-1:]
        log_p = jax.nn.log_softmax(network.unembed(jnp.stack(supervised)))
        target = jnp.broadcast_to(wanted[..., None], (*log_p.shape[:-1], 1))
        return -(jnp.take_along_axis(log_p, target, axis=-1)[..., 0] * weights).sum()

    def trained(network):
        return network.supervised_losses(tokens, wanted, weights).sum()

    found, expected = (jax.tree.leaves(nnx.jit(nnx.grad(f))(network)) for f in (trained, by_hand))
    for value, truth in zip(found, expected, strict=True):
        assert error(value, truth) < 1e-5


def test_places_behind_the_last_share_an_embedding():
    config = make_config(**KINDS["loop"], positions="absolute")
    network = build(config, random_weights(config))
    tokens = jnp.zeros((1, 4), jnp.int32)
    given = network._position_inputs(tokens, jnp.array([0, 1, 255, 300])).embedding[0]
    assert (given[2] == given[3]).all() and not (given[0] == given[1]).any()


def test_a_window_needs_a_scheme_with_ids():
    with pytest.raises(Exception, match="model.positions = 'absolute' has none"):
        make_config(**KINDS["loop"], positions="absolute", window=True)


def test_names_are_those_of_classes():
    assert BLOCKS.get("qk-norm") is QK_NORM.QKNormBlock
    assert ABSOLUTE.AbsolutePositions.name == "absolute"
