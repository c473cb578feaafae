"""What position schemes let a token see, and what they give in training and outside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import (
    GPT,
    LENGTH,
    LOOP,
    build,
    error,
    logits_of,
    make_config,
    random_batch,
    random_model,
    random_weights,
)

from spak_jax.models.fused import attention_weights
from spak_jax.positions.base import PositionInputs, PositionScheme
from spak_jax.positions.coupled import EMBEDDED_IDS, offset_ids
from spak_jax.positions.rope import WIDEST_GAP
from spak_jax.registry import POSITIONS
from spak_jax.tasks.arithmetic import Addition

ADDITION = Addition()

ONE_LOOP = LOOP | {"loops": 1}


def seen_by_the_last(network, tokens, **more) -> list[bool]:
    """Which tokens change the logits of the last one."""
    last = lambda tokens: np.asarray(logits_of(network, tokens, **more))[:, -1]  # noqa: E731
    before, seen = last(tokens), []
    for place in range(LENGTH):
        changed = tokens.copy()
        changed[:, place] = (changed[:, place] + 1) % len(ADDITION.vocabulary)
        after = last(changed)
        seen.append(bool((np.abs(after - before) > 1e-6).any()))
    return seen


def test_no_scheme_knows_only_which_tokens_came_before():
    network, tokens = random_model(**ONE_LOOP | {"positions": "none"}), random_batch().tokens
    moved = np.concatenate([tokens[:, -2::-1], tokens[:, -1:]], axis=1)
    assert error(*(np.asarray(logits_of(network, x))[:, -1] for x in (moved, tokens))) < 1e-6


@pytest.mark.parametrize("kind", [GPT | {"layers": 1}, ONE_LOOP], ids=["gpt", "loop"])
def test_a_window_over_tokens_ends_there(kind):
    more = {"positions": "token-bias", "max_relative_distance": 3, "window": True}
    tokens = random_batch().tokens
    assert seen_by_the_last(random_model(**kind | more), tokens) == [False] * 10 + [True] * 4
    assert all(seen_by_the_last(random_model(**kind | more | {"window": False}), tokens))
    further = random_model(**kind | more | ({"layers": 2} if kind["kind"] == "gpt" else {}))
    if kind["kind"] == "gpt":
        assert seen_by_the_last(further, tokens) == [False] * 7 + [True] * 7


def test_a_window_over_coupled_ids_leaves_what_has_none():
    network = random_model(**ONE_LOOP | {"positions": "coupled-bias", "window": True})
    tokens = random_batch(rows=1).tokens
    ids = np.array([[2, 3, 4, 0, 2, 3, 4, 1, 2, 3, 4, 5, 0, 3]])
    expected = [bool(i == 0 or abs(int(i) - 3) <= 1) for i in ids[0]]
    assert seen_by_the_last(network, tokens, position_ids=ids) == expected
    # For tokens with a place only differences count; what has none is seen all the same.
    everywhere = lambda ids: np.asarray(logits_of(network, tokens, position_ids=ids))  # noqa: E731
    placed = lambda ids: everywhere(ids)[:, ids[0] > 0]  # noqa: E731
    moved = np.where(ids > 0, ids + 40, 0)
    assert error(placed(moved), placed(ids)) < 1e-6
    assert error(everywhere(ids + 1), everywhere(ids)) > 0.001


def test_coupled_rope_turns_by_ids():
    tokens, ids = random_batch().tokens, jnp.asarray(random_batch(1).tokens)
    coupled = random_model(**LOOP | {"positions": "coupled-rope"})
    by_place = random_model(**LOOP)
    found = logits_of(coupled, tokens, position_ids=ids)
    assert error(found, logits_of(by_place, tokens, positions=ids)) < 1e-6
    with pytest.raises(ValueError, match="'coupled-rope' needs position_ids"):
        coupled(tokens)


def test_random_gaps_are_turned_by_in_training_too():
    network, tokens = random_model(**LOOP | {"positions": "random-rope"}), random_batch().tokens
    plain = logits_of(network, tokens)
    assert error(logits_of(network, tokens), plain) == 0
    assert error(logits_of(random_model(**LOOP), tokens), plain) > 0.01
    for seed in (1, 2):
        given = {"positions": jnp.arange(LENGTH), "key": jax.random.key(seed)}
        rope_positions = network.position_scheme.inputs(tokens, **given).rope_positions
        gaps = np.diff(rope_positions)
        assert gaps.min() >= 1 and gaps.max() <= WIDEST_GAP and len(set(gaps.ravel())) > 8
    expected = logits_of(random_model(**LOOP), tokens, positions=rope_positions)
    assert error(plain, expected) > 0.01


def test_embedded_ids_are_moved_in_training_only():
    ids = np.array([[0, 2, 3, 4], [1, 5, 6, 0]])
    offset = jax.jit(offset_ids)
    np.testing.assert_array_equal(offset(ids, None), ids)
    assert (np.max(offset(ids * 100, None), -1) == EMBEDDED_IDS - 1).all()
    keys = jax.random.split(jax.random.key(0), 200)
    moved = np.asarray(jax.jit(jax.vmap(offset_ids, (None, 0)))(ids, keys))
    assert ((moved == 0) == (ids == 0)).all() and (moved < EMBEDDED_IDS).all()
    # One offset a row.
    offsets = np.where(ids > 0, moved - ids, -1)
    most = offsets.max(-1, keepdims=True)
    assert ((offsets == most) | (offsets == -1)).all()
    assert (most.min(0) < 5).all() and (most.max(0) > EMBEDDED_IDS - 15).all()
    network = random_model(**LOOP | {"positions": "coupled-embedding"})
    tokens = random_batch(rows=2, length=4).tokens
    plain = logits_of(network, tokens, position_ids=ids)
    assert error(logits_of(network, tokens, position_ids=ids, key=jax.random.key(1)), plain) > 0.01


def learned_model(**architecture):
    """Whose gates say what coupled ids say: digits advance, all else starts anew."""
    config = make_config(
        **LOOP | {"positions": "learned", "max_relative_distance": 2, "window": True},
        **architecture,
    )
    weights = random_weights(config)
    logits = np.full(len(ADDITION.vocabulary), -1, np.float32)
    logits[ADDITION.first_symbol : ADDITION.equals] = 1
    weights["pointer.gate_logits"] = logits
    return build(config, weights)


def test_a_counter_counts_and_starts_anew():
    learned = learned_model().position_scheme.counter
    tokens = np.array([ADDITION.encode("12+345=6789\n1+")])
    run = nnx.jit(lambda counter, *progress: counter(tokens, *progress))
    counter = lambda *progress: np.asarray(run(learned, *progress))  # noqa: E731
    ids = counter()
    assert ids.dtype == np.int32
    assert ids[0].tolist() == [1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 0]
    # In the first part of training gates are soft, after it they are decided.
    early, late = (counter(progress) for progress in (0.1, 0.9))
    assert 0 < np.abs(early - 1 - ids).max() < 0.2
    assert late.dtype == np.float32 and (late == ids).all()
    # However near to a half they are.
    learned.gate_logits[...] *= 0.05
    early, late = (counter(progress) for progress in (0.1, 0.9))
    assert np.abs(early - 1 - ids).max() > 0.5 and (late == ids).all()
    assert (counter() == ids).all()


def test_learned_ids_reach_attention_and_gradients_reach_them():
    network, tokens = learned_model(), random_batch().tokens
    as_bias = random_model(
        **LOOP | {"positions": "coupled-bias", "max_relative_distance": 2, "window": True}
    )
    ids = nnx.jit(lambda network: network.position_scheme.counter(jnp.asarray(tokens)))(network)
    definition, state = nnx.split(network)
    shared = {k: v for k, v in nnx.to_pure_dict(state).items() if k != "position_scheme"}
    target, other = nnx.split(as_bias)
    nnx.replace_by_pure_dict(other, shared)
    same = nnx.merge(target, other)
    assert error(logits_of(network, tokens), logits_of(same, tokens, position_ids=ids)) < 1e-6

    batch = random_batch()
    weights = batch.answer.astype(jnp.float32)

    @jax.jit
    @jax.grad
    def gradient(state, progress):
        network = nnx.merge(definition, state)
        tokens, targets = jnp.asarray(batch.tokens), jnp.asarray(batch.targets)
        losses = network.supervised_losses(tokens, targets, weights, progress=progress)
        return losses.mean()

    # While gates are soft the window reaches one difference further, and not after.
    @nnx.jit
    def looked_at(network, progress):
        given = network._position_inputs(jnp.asarray(tokens), progress=progress)
        looked = attention_weights(network.block, network.embedding(tokens), given, None).max(1)
        return looked, given.position_ids, jnp.asarray(given.window_slack)

    seen, past = {}, np.tril(np.ones((LENGTH, LENGTH), bool))
    for progress in (0.1, 0.9):
        looked, ids, slack = map(np.asarray, looked_at(network, progress))
        difference = np.abs(ids[:, :, None] - ids[:, None, :])
        placed = ids[:, None, :] >= 0.5
        seen[progress] = np.where((looked > 0) & placed, difference, 0).max()
        within = (difference <= 2.5 + slack) | ~placed
        assert ((looked > 0) == (within & past)).all()
    assert seen[0.1] > 2.5 and seen[0.9] == 2

    def of_gates(progress):
        gates = gradient(state, progress)["position_scheme"]["counter"]["gate_logits"]
        return np.asarray(gates[...])

    assert np.abs(of_gates(0.1)).max() > 1e-5
    assert (of_gates(0.9) == 0).all()


def test_a_scheme_is_held_to_what_its_class_says(monkeypatch):
    """Only an annealed one is given the training's progress; slack is for training alone."""
    known = {name: POSITIONS.get(name) for name in POSITIONS.names()}
    monkeypatch.setattr(POSITIONS, "_classes", known)
    met = []

    @POSITIONS.register("slack")
    class Slack(PositionScheme):
        def inputs(self, tokens, *, positions, position_ids=None, key=None, progress=None):
            met.append(progress)
            return PositionInputs(window_slack=jnp.float32(1))

    network, tokens = random_model(**LOOP | {"positions": "slack"}), random_batch().tokens
    network._position_inputs(tokens, progress=0.5)
    Slack.anneals_until = 0.2
    network._position_inputs(tokens, progress=0.5)
    assert met == [None, 0.5]
    with pytest.raises(ValueError, match="'slack' gives window_slack outside training"):
        network(tokens)
