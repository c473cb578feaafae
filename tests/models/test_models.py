"""The models against PyTorch written from the equations, and against what they promise."""

import math
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_slow
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import (
    ARCHITECTURES,
    GPT,
    HEADS,
    LENGTH,
    LOOP,
    ROUNDING,
    WIDTH,
    build,
    error,
    logits_of,
    make_config,
    random_batch,
    random_model,
    random_weights,
)

from spak_jax import models
from spak_jax.config import Config, read_config
from spak_jax.models import fused
from spak_jax.models.block import EPSILON, Block, dropout
from spak_jax.models.fused import Stream
from spak_jax.positions.base import PositionInputs
from spak_jax.tasks.arithmetic import Addition
from spak_jax.training import step
from spak_jax.training.named_arrays import named_arrays

ADDITION = Addition()

CONFIGS = Path(__file__).parents[2] / "configs"
IN_ORDER = PositionInputs(rope_positions=np.arange(LENGTH))


@pytest.fixture
def reference():
    """The PyTorch equations; tests that ask for them are skipped without PyTorch."""
    pytest.importorskip("torch")
    import torch_reference

    return torch_reference


@nnx.jit(static_argnames="loops")
def halting_of(network, tokens, thresholds, positions=None, loops=None):
    return network.halting_logits(tokens, thresholds, loops=loops, positions=positions)


@nnx.jit
def supervised_of(network, batch):
    tokens, targets, weights = (jnp.asarray(x) for x in batch)
    return network.supervised_losses(tokens, targets, weights.astype(jnp.float32))


@jax.jit
def loss_of_logits(logits, batch):
    """The sum of the cross-entropies that count, by hand."""
    log_p = jax.nn.log_softmax(logits)
    of_targets = jnp.take_along_axis(log_p, batch.targets[..., None], axis=-1)[..., 0]
    return -jnp.where(batch.answer, of_targets, 0).sum()


@nnx.jit
def block_of(block, x, key=None):
    """The stream after a block."""
    return block(
        x, position_inputs=IN_ORDER, keys=None if key is None else jax.random.split(key, 3)
    )


def to_torch(weights: dict[str, np.ndarray]):
    import torch

    return {name: torch.tensor(array, dtype=torch.float64) for name, array in weights.items()}


def reference_states(reference, config: Config, weights, tokens, loops=None):
    import torch

    tokens, architecture = torch.tensor(tokens), config.model
    if architecture.kind == "gpt":
        return reference.gpt_states(weights, tokens, HEADS)
    return reference.loop_states(weights, tokens, HEADS, architecture.inject_input, loops)


# Against the equations in PyTorch.


@pytest.mark.parametrize("name", with_slow(ARCHITECTURES, "gpt", "loop", "loop-injected-swiglu"))
def test_logits_loss_and_all_gradients_equal_the_reference(name, reference):
    import torch

    config = make_config(**ARCHITECTURES[name])
    weights, batch = random_weights(config), random_batch()
    network = build(config, weights)

    def loss_and_logits(network):
        return step.loss(network, batch, ADDITION, None), network(jnp.asarray(batch.tokens))

    graded = nnx.jit(nnx.value_and_grad(loss_and_logits, has_aux=True))
    (loss, logits), gradients = graded(network)
    gradients = named_arrays(nnx.to_pure_dict(gradients))

    theirs = {weight: array.requires_grad_() for weight, array in to_torch(weights).items()}
    states = reference_states(reference, config, theirs, batch.tokens)
    supervised = states[-1:] if config.model.kind == "gpt" else states[len(states) // 2 :]
    expected = reference.loss(
        theirs, supervised, torch.tensor(batch.targets), torch.tensor(batch.answer)
    )
    expected.backward()

    assert logits.dtype == jnp.float32
    assert error(logits, reference.readout(theirs, states[-1]).detach()) < ROUNDING
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    assert gradients.keys() == theirs.keys()
    for weight, array in theirs.items():
        assert error(gradients[weight], array.grad) < ROUNDING, weight


@pytest.mark.parametrize("name", ["loop", "loop-injected-swiglu"])
@pytest.mark.parametrize("loops", [1, 7])
def test_other_loops_than_trained_equal_the_reference(name, loops, reference):
    config = make_config(**ARCHITECTURES[name])
    weights, tokens = random_weights(config), random_batch().tokens
    theirs = to_torch(weights)
    states = reference_states(reference, config, theirs, tokens, loops)
    assert len(states) == loops
    found = logits_of(build(config, weights), tokens, loops=loops)
    assert error(found, reference.readout(theirs, states[-1])) < ROUNDING


@pytest.mark.parametrize("name", ["loop", "loop-injected-swiglu"])
@pytest.mark.parametrize("loops", [None, 7])
def test_halting_equals_the_reference(name, loops, reference):
    import torch

    config = make_config(**ARCHITECTURES[name])
    weights, tokens = random_weights(config), random_batch().tokens
    thresholds = np.random.default_rng(1).uniform(0.4, 1.1, tokens.shape).astype(np.float32)
    logits, steps = halting_of(build(config, weights), tokens, thresholds, loops=loops)
    expected, taken, closest = reference.halt(
        to_torch(weights),
        torch.tensor(tokens),
        torch.tensor(thresholds),
        HEADS,
        config.model.inject_input,
        loops,
    )
    # Rounding decides nothing here, and tokens stop at different loops.
    assert closest > 1e-5
    assert len(taken.unique()) >= 3
    assert steps.dtype == jnp.int32
    np.testing.assert_array_equal(steps, taken)
    assert error(logits, expected) < ROUNDING


# Halting.


def test_no_halting_above_one():
    network, tokens = random_model(**LOOP), random_batch().tokens
    logits, steps = halting_of(network, tokens, jnp.float32(1.01))
    assert (steps == 4).all()
    assert error(logits, logits_of(network, tokens)) < 1e-6


def test_a_threshold_of_zero_halts_after_one_loop():
    network, tokens = random_model(**LOOP), random_batch().tokens
    logits, steps = halting_of(network, tokens, jnp.float32(0))
    assert (steps == 1).all()
    assert error(logits, logits_of(network, tokens, loops=1)) < 1e-6


def test_a_halted_token_keeps_its_state():
    network, tokens = random_model(**LOOP), random_batch().tokens
    stopped = np.arange(LENGTH) % 3 == 0
    logits, steps = halting_of(network, tokens, np.where(stopped, np.float32(0), np.float32(1.01)))
    np.testing.assert_array_equal(steps, np.broadcast_to(np.where(stopped, 1, 4), tokens.shape))
    once = logits_of(network, tokens, loops=1)
    logits, once = np.asarray(logits), np.asarray(once)
    assert error(logits[:, stopped], once[:, stopped]) < 1e-6
    # The others go on, and what they attend to has stopped changing.
    assert error(logits[:, ~stopped], np.asarray(logits_of(network, tokens))[:, ~stopped]) > 0.01


def test_halting_knows_positions():
    network, tokens = random_model(**LOOP), random_batch().tokens
    uneven = np.arange(LENGTH) * 2
    plain, _ = halting_of(network, tokens, jnp.float32(1.01))
    moved, _ = halting_of(network, tokens, jnp.float32(1.01), uneven)
    assert error(moved, plain) > 0.01
    assert error(moved, logits_of(network, tokens, uneven)) < 1e-6


# Sizes and initial values.


@pytest.mark.parametrize(
    ("file", "parameters"),
    [
        ("gpt12", 9_446_912),
        ("loop12", 793_600),
        ("loop30", 798_208),
        ("loop128e", 201_728),
        ("gpt12-w768", 84_963_840),
        ("loop12-w768", 7_099_392),
    ],
)
def test_parameter_counts(file, parameters):
    config = read_config(CONFIGS / f"{file}.toml")
    _, weights = models.abstract(config)
    assert models.parameter_count(weights) == parameters


def fresh_model(config: Config):
    return nnx.jit(lambda: models.build(config, jax.random.key(0)))()


@pytest.mark.parametrize("name", ["gpt", "gpt-swiglu", "loop", "loop-odd-swiglu"])
def test_initial_values(name):
    config = make_config(**ARCHITECTURES[name] | {"width": 128})
    network = fresh_model(config)
    layers = config.model.layers if config.model.kind == "gpt" else 1
    smaller = 0.02 / math.sqrt(2 * layers)
    for weight, array in named_arrays(nnx.to_pure_dict(nnx.state(network))).items():
        assert array.dtype == jnp.float32, weight
        array = np.asarray(array)
        if weight.endswith("scale"):
            assert (array == 1).all(), weight
            continue
        expected = smaller if "attention_out" in weight or "mlp_out" in weight else 0.02
        # Five standard errors of what so many draws show.
        margin = 5 / math.sqrt(2 * array.size)
        assert float(array.std()) == pytest.approx(expected, rel=margin), weight
        assert abs(float(array.mean())) < 5 * expected / math.sqrt(array.size), weight


def test_blocks_start_with_weights_of_their_own():
    network = fresh_model(make_config(**GPT))
    first, second, third = np.asarray(network.blocks.qkv.kernel[...])
    assert not (first == second).any() and not (second == third).any()


# What a token can see, and where it stands.


@cache
def two_models():
    return random_model(**GPT), random_model(**LOOP)


@settings(max_examples=10, deadline=None)
@given(place=st.integers(0, LENGTH - 1), shift=st.integers(1, 12), seed=st.integers(0, 99))
def test_no_token_sees_the_future(place, shift, seed):
    tokens = random_batch(seed).tokens
    changed = tokens.copy()
    changed[:, place] = (changed[:, place] + shift) % len(ADDITION.vocabulary)
    for network in two_models():
        before, after = logits_of(network, tokens), logits_of(network, changed)
        before, after = np.asarray(before), np.asarray(after)
        np.testing.assert_allclose(after[:, :place], before[:, :place], rtol=0, atol=1e-6)
        # Everything from there on does see it.
        assert (np.abs(after - before)[:, place:].max(-1) > 1e-6).all()


@pytest.mark.parametrize("kind", [0, 1], ids=["gpt", "loop"])
def test_only_relative_positions_count(kind):
    network, tokens = two_models()[kind], random_batch().tokens
    counted = logits_of(network, tokens)
    positions = np.arange(LENGTH)
    assert error(logits_of(network, tokens, positions), counted) < 1e-6
    assert error(logits_of(network, tokens, positions + 50), counted) < 2e-5
    assert error(logits_of(network, tokens, positions * 2), counted) > 0.01
    rows = np.stack([positions, positions + 9, positions * 2])
    assert error(logits_of(network, tokens, rows)[1], counted[1]) < 2e-5
    assert error(logits_of(network, tokens, rows)[2], counted[2]) > 0.01


# Loops that start alike: normalised states, one step embedding, warm-up loops; and a look inside.

STABLE = LOOP | {"inject_input": True, "normalize_state": True, "shared_step": True}


def test_states_keep_their_size_however_many_loops():
    tokens = random_batch().tokens
    few = logits_of(random_model(**STABLE), tokens, loops=2)
    many = logits_of(random_model(**STABLE), tokens, loops=300)
    assert error(many, few) < 2
    config = make_config(**STABLE)
    assert random_weights(config)["step_embedding.embedding"].shape == (1, WIDTH)


ANSWERING = STABLE | {"answer_feedback": True}


@pytest.mark.parametrize("normalized", [True, False])
def test_answers_are_fed_back_in_place_of_states(normalized):
    """Logits and gradients against the equations: between two loops the symbols' probabilities,
    embedded, are all that is handed on."""
    network = random_model(**ANSWERING | {"normalize_state": normalized})
    batch = random_batch()
    tokens = jnp.asarray(batch.tokens)

    def by_hand(network):
        x = first = network.embedding.embedding[...][tokens]
        for _ in range(3):
            answers = jnp.exp(network.unembed(x))
            answers /= answers.sum(-1, keepdims=True)
            x = answers @ network.answer_embedding.embedding[...]
            if normalized:
                x -= x.mean(-1, keepdims=True)
                x /= jnp.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)
            shift = network.step_embedding.embedding[0]
            x = network.block(x + first + shift, position_inputs=IN_ORDER)
        return network.unembed(x)

    def checked(logits):
        return nnx.jit(nnx.value_and_grad(lambda network: loss_of_logits(logits(network), batch)))

    loss, gradient = checked(lambda network: network(tokens, loops=3))(network)
    expected, wanted = checked(by_hand)(network)
    assert error(loss, expected) < 1e-6
    # What the last logits come from does not hang on states before, but by what was read of them.
    assert np.abs(gradient["answer_embedding"]["embedding"][...]).max() > 1e-6
    for found, value in zip(*map(jax.tree.leaves, (gradient, wanted)), strict=True):
        assert error(found, value) < 1e-4


def test_states_that_read_out_alike_go_on_alike():
    """A final norm does not see how large a state is: nor does the next loop."""
    network = random_model(**ANSWERING)
    x, first = jax.random.normal(jax.random.key(0), (2, 3, LENGTH, WIDTH))
    one, other = (network._enter(Stream(factor * x), first, None).x for factor in (1, 3))
    assert error(one, other) < 1e-5
    assert error(network._enter(Stream(x[::-1]), first, None).x, one) > 0.1


def test_one_launch_hands_states_on_alone(monkeypatch):
    tokens = random_batch().tokens
    monkeypatch.setattr(fused.looped, "supports_fused", lambda *given, **more: True)
    assert fused.supports_fused(random_model(**STABLE), tokens)
    network = random_model(**ANSWERING)
    assert not fused.supports_fused(network, tokens)
    with pytest.raises(ValueError, match="answer_feedback"):
        network.fused_forward(jnp.asarray(tokens))


def test_one_launch_is_not_asked_for_rules_that_it_does_not_know(monkeypatch):
    network, tokens = random_model(**STABLE), jnp.asarray(random_batch().tokens)
    monkeypatch.setattr(fused, "supports_fused", lambda *given: True)
    monkeypatch.setattr(fused, "fused_forward", lambda *given, **more: "launched")
    thresholds = jnp.full(tokens.shape, 0.01)
    assert network.halting_logits(tokens, thresholds, rule="convergence") == "launched"
    _, steps = network.halting_logits(tokens, thresholds, rule="agreement", loops=2)
    assert steps.shape == tokens.shape


def test_warmup_loops_come_before_those_that_count():
    """As many as the key draws, then the supervised ones: by the losses of longer models."""
    batch, network = (
        random_batch(),
        random_model(**STABLE | {"loops": 2, "no_grad_warmup_loops": 3}),
    )
    weights = jnp.asarray(batch.answer, jnp.float32)

    @jax.jit
    def losses(key):
        tokens, targets = jnp.asarray(batch.tokens), jnp.asarray(batch.targets)
        return network.supervised_losses(tokens, targets, weights, key=key)

    after = [loss_of_logits(logits_of(network, batch.tokens, loops=n + 2), batch) for n in range(4)]
    met = set()
    for key in jax.random.split(jax.random.key(0), 20):
        (found,) = losses(key)
        met.add(min(range(4), key=lambda n: abs(float(after[n] - found))))
        assert min(abs(float(x - found) / float(x)) for x in after) < 1e-5
    assert met == {0, 1, 2, 3}
    # Without a key nothing is drawn.
    np.testing.assert_allclose(supervised_of(network, batch), [after[0]], rtol=1e-5)


def test_each_warmup_loop_drops_other_numbers():
    network = random_model(**STABLE | {"loops": 1, "no_grad_warmup_loops": 2, "dropout": 0.5})
    tokens = jnp.asarray(random_batch().tokens)
    keys = jax.random.split(jax.random.key(0), 20)
    draw = jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 1), (), 0, 3))
    key = keys[jax.jit(draw)(keys).tolist().index(2)]

    @nnx.jit
    def twice(network, key, numbers):
        step, stream, inputs = network._loop(tokens, 1, None, None, key, None)
        shift, own = jax.tree.map(lambda x: x[0], inputs)
        for i in numbers:
            dropped = jax.vmap(lambda key: jax.random.fold_in(key, i))(own)  # noqa: B023
            stream, _ = step(stream, (shift, dropped))
        return fused.apply_pending(stream, own[-1], 0.5)

    @nnx.jit
    def warmed_up(network, key):
        _, first, inputs = network._loop(tokens, 1, None, None, key, None)
        found = network._after_warmup_loops(first, tokens, None, key, None)
        return fused.apply_pending(found, jax.tree.map(lambda x: x[0], inputs[1])[-1], 0.5)

    found = warmed_up(network, key)
    assert error(found, twice(network, key, np.array([0, 1]))) < 1e-5
    assert min(error(found, twice(network, key, np.array([i, i]))) for i in (0, 1)) > 0.1


def test_no_gradient_goes_back_through_warmup_loops():
    """The gradient is that of the loops that count, from the state that the others left."""
    batch = random_batch()
    weights = jnp.asarray(batch.answer, jnp.float32)
    network = random_model(
        **STABLE | {"loops": 1, "no_grad_warmup_loops": 1, "inject_input": False}
    )
    definition, state = nnx.split(network)

    @jax.jit
    def gradient(key):
        def loss(state):
            tokens, targets = jnp.asarray(batch.tokens), jnp.asarray(batch.targets)
            network = nnx.merge(definition, state)
            return network.supervised_losses(tokens, targets, weights, key=key).sum()

        return jax.grad(loss)(state)["step_embedding"]["embedding"][...]

    def expected(free):
        def loss(shift):
            tokens = jnp.asarray(batch.tokens)
            x = network.embedding(tokens)
            for fixed in [True] * free + [False]:
                entered = network._enter(Stream(x), x, None)
                own = jax.lax.stop_gradient(shift) if fixed else shift
                x = network.block(entered.x + own, position_inputs=IN_ORDER)
            return loss_of_logits(network.unembed(x), batch)

        return jax.jit(jax.grad(loss))(network.step_embedding.embedding[0])

    found = [gradient(key)[0] for key in jax.random.split(jax.random.key(0), 12)]
    wanted = [expected(0), expected(1)]
    chosen = [min((0, 1), key=lambda n: error(g, wanted[n])) for g in found]
    assert set(chosen) == {0, 1}
    assert max(error(g, wanted[n]) for g, n in zip(found, chosen, strict=True)) < 1e-4


@pytest.mark.parametrize("architecture", [LOOP, STABLE], ids=["plain", "stable"])
def test_a_trace_shows_what_each_loop_does(architecture):
    network, tokens = random_model(**architecture), random_batch().tokens
    logits, looked = nnx.jit(
        lambda network: network.forward_with_intermediates(jnp.asarray(tokens), loops=3)
    )(network)
    for loop in range(3):
        assert error(logits[loop], logits_of(network, tokens, loops=loop + 1)) < 1e-6
    assert looked.shape == (3, *tokens.shape[:1], HEADS, LENGTH, LENGTH)
    np.testing.assert_allclose(np.sum(looked, -1), 1, rtol=1e-5)
    assert np.triu(looked, 1).max() == 0


# Dropout.


@pytest.mark.parametrize("architecture", [GPT, LOOP], ids=["gpt", "loop"])
def test_dropout_depends_on_the_key_alone(architecture):
    network, tokens = random_model(**architecture | {"dropout": 0.1}), random_batch().tokens
    plain = logits_of(network, tokens)
    without = logits_of(random_model(**architecture), tokens)
    np.testing.assert_array_equal(plain, without)
    one, same, other = (logits_of(network, tokens, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert error(other, one) > 0.01
    assert error(one, plain) > 0.01


def test_dropout_keeps_the_mean():
    x = np.random.default_rng(0).standard_normal(50, np.float32) + 3
    keys = jax.random.split(jax.random.key(1), 20_000)
    dropped = np.asarray(jax.jit(jax.vmap(lambda key: dropout(x, 0.3, key)))(keys))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], np.broadcast_to(x, kept.shape)[kept] / 0.7, 1e-6)
    assert float(kept.mean()) == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / kept.size))
    standard_error = np.abs(x).max() * math.sqrt(0.3 / 0.7 / len(keys))
    np.testing.assert_allclose(dropped.mean(0), x, atol=5 * standard_error)
    assert dropout(x, 0.3, None) is x


@pytest.mark.parametrize("silent", ["attention_out.kernel", "mlp_out.kernel"])
def test_both_halves_of_a_block_drop(silent):
    """With one half of the block silenced, zeros in what the other adds are dropped channels."""
    config = make_config(**LOOP | {"dropout": 0.3})
    weights = random_weights(config)
    weights[f"block.{silent}"] *= 0
    block = build(config, weights).block
    x = np.random.default_rng(0).standard_normal((8, LENGTH, WIDTH), np.float32)
    added = np.asarray(block_of(block, x, jax.random.key(1))) - x
    assert float((added == 0).mean()) == pytest.approx(0.3, abs=0.05)
    # Probabilities of attention are dropped besides; the first token has only one to drop.
    expected = (np.asarray(block_of(block, x)) - x) / 0.7
    kept = np.where(added == 0, 0, added - expected)
    assert (np.abs(kept).max() > 0.01) == (silent == "mlp_out.kernel")


def test_the_embedding_drops():
    config = make_config(**LOOP | {"dropout": 0.3})
    weights = random_weights(config)
    for silent in ("block.attention_out.kernel", "block.mlp_out.kernel"):
        weights[silent] *= 0
    network, tokens = build(config, weights), random_batch().tokens
    dropped = logits_of(network, tokens, key=jax.random.key(0))
    assert error(dropped, logits_of(network, tokens)) > 0.01


# One way to compute against another.


def test_the_scan_equals_an_unrolled_loop():
    network, tokens = random_model(**GPT), random_batch().tokens
    definition, weights = nnx.split(network.blocks)
    state = network.embedding(jnp.asarray(tokens))
    for layer in range(network.layers):
        own = jax.tree.map(lambda array, layer=layer: np.asarray(array)[layer], weights)
        state = block_of(nnx.merge(definition, own), state)
    assert error(logits_of(network, tokens), network.unembed(state)) < 1e-6


@pytest.mark.parametrize("architecture", [GPT, LOOP], ids=["gpt", "loop"])
def test_bfloat16_stays_near_float32(architecture):
    tokens = random_batch().tokens
    found = logits_of(random_model(**architecture | {"dtype": "bfloat16"}), tokens)
    assert found.dtype == jnp.float32
    assert 1e-4 < error(found, logits_of(random_model(**architecture), tokens)) < 0.05


@pytest.mark.parametrize("loops", [1, 4, 5])
def test_supervised_losses_are_those_of_the_second_half(loops):
    network, batch = random_model(**LOOP | {"loops": loops}), random_batch()
    supervised = supervised_of(network, batch)
    expected = [
        loss_of_logits(logits_of(network, batch.tokens, loops=n), batch)
        for n in range(loops // 2 + 1, loops + 1)
    ]
    assert supervised.shape == (loops - loops // 2,)
    np.testing.assert_allclose(supervised, expected, rtol=1e-6)


def test_a_gpt_supervises_its_logits():
    network, batch = random_model(**GPT), random_batch()
    expected = loss_of_logits(logits_of(network, batch.tokens), batch)
    np.testing.assert_allclose(supervised_of(network, batch), [expected], rtol=1e-6)


TABULATED = {
    "loop": LOOP,
    "gpt": GPT | {"mlp": "swiglu"},
    "ids alone": GPT | {"positions": "coupled-embedding"},
    "biases": LOOP | {"positions": "coupled-bias", "window": True, "inject_input": True},
    "counter": LOOP | {"positions": "learned", "window": True},
    "no positions": LOOP | {"positions": "none"},
}


@pytest.mark.parametrize("name", TABULATED)
def test_flax_tabulates_every_kind_of_model(name):
    """A table with a line for each part; and methods are left as they were."""
    config = make_config(**TABULATED[name])
    network = build(config, random_weights(config))
    tokens = np.zeros((2, 6), np.int32)
    before = Block.__call__
    table = nnx.tabulate(network, tokens, position_ids=tokens)
    assert Block.__call__ is before
    count = models.parameter_count(nnx.state(network))
    assert f"{count:,}" in table
    for part in ("embedding", "final_norm", "Block", "LayerNorm"):
        assert part in table
