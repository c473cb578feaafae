"""Loops that end with the last token that halts: what is left out would have changed nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import LOOP, build, error, make_config, random_batch, random_weights

from spak_jax.models.halting import PATIENCE, init_halting, until_halted, update_halting

ROWS, TOKENS, STEPS = 2, 4, 8
STABLE = LOOP | {"inject_input": True, "normalize_state": True, "shared_step": True}
ENDLESS = 10**9
RULE = "convergence"


def model(causal: bool):
    config = make_config(**STABLE)
    changed = config.model.model_copy(update={"causal": causal})
    config = config.model_copy(update={"model": changed})
    return build(config, random_weights(config))


@nnx.jit(static_argnames="loops")
def halting_of(network, tokens, thresholds, loops):
    return network.halting_logits(tokens, thresholds, rule=RULE, loops=loops)


@nnx.jit
def halting_of_each(network, tokens, thresholds, loops):
    return network.halting_logits(tokens, thresholds, rule=RULE, loops=loops)


@jax.jit(static_argnames=("causal", "rule"))
def halted(streams, thresholds, most, causal, rule):
    """Steps and last streams where the block number k makes `streams[k]` of anything, and streams
    are their own logits."""

    def step(state):
        x = streams[state.steps.max()]
        more = {"causal": causal, "most": most[:, None]}
        return update_halting(state, x, thresholds, lambda x: x, rule, **more)

    state = until_halted(step, init_halting(jnp.zeros_like(streams[0])))
    return state.steps, state.x


def rests(rule, before, now, threshold):
    if rule == "convergence":
        return np.linalg.norm(now - before) <= threshold * np.linalg.norm(now)
    before, now = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (before, now))
    # Of what is more probable now, by how much.
    return np.maximum(now - before, 0).sum() <= threshold


def halted_by_hand(streams, thresholds, most, causal, rule):
    steps, last = np.zeros((ROWS, TOKENS), int), np.zeros_like(streams[0])
    for row in range(ROWS):
        done, rested = [False] * TOKENS, [0] * TOKENS
        patience = PATIENCE if rule == "agreement" else 1
        for k in range(most[row]):
            before = last[row].copy()
            for t in range(TOKENS):
                if not done[t]:
                    last[row, t], steps[row, t] = streams[k, row, t], k + 1
            at_rest = [
                rests(rule, before[t], last[row, t], thresholds[row, t]) for t in range(TOKENS)
            ]
            for t in range(TOKENS):
                rested[t] = rested[t] + 1 if all(at_rest[: t + 1] if causal else at_rest) else 0
                done[t] |= rested[t] >= patience
    return steps, last


@settings(max_examples=60)
@given(st.booleans(), st.sampled_from(["convergence", "agreement"]), st.integers(0, 2**20))
def test_tokens_halt_when_all_that_they_see_has_come_to_rest(causal, rule, seed):
    random = np.random.default_rng(seed)
    # Steps that are sometimes long: tokens move again after a rest.
    moves = random.choice([0.01, 0.1, 1, 3], (STEPS, ROWS, TOKENS, 1))
    streams = 1 + (moves * random.standard_normal((STEPS, ROWS, TOKENS, 3))).cumsum(0)
    streams = streams.astype(np.float32)
    tried = [-1, 0.3, 1, 2] if rule == "convergence" else [-1, 0.1, 0.4, 1.1]
    thresholds = random.choice(tried, (ROWS, TOKENS), p=[0.04, 0.2, 0.4, 0.36])
    thresholds, most = thresholds.astype(np.float32), random.integers(1, STEPS + 1, ROWS)
    found = halted(streams, thresholds, most, causal, rule)
    for value, expected in zip(
        found, halted_by_hand(streams, thresholds, most, causal, rule), strict=True
    ):
        np.testing.assert_array_equal(value, expected)


def test_a_state_may_go_in_circles_that_no_answer_shows():
    """By agreement it halts; it never converges."""
    unembed = lambda x: x[..., :2]  # noqa: E731

    def steps(rule):
        def step(state):
            circle = jnp.array([0.5, -0.5, (-1.0) ** state.steps.max()])
            x = jnp.broadcast_to(circle, state.x.shape)
            return update_halting(state, x, jnp.float32(0.01), unembed, rule, most=9)

        with jax.disable_jit():
            return until_halted(step, init_halting(jnp.zeros((1, 2, 3)))).steps.tolist()

    assert steps("agreement") == [[1 + PATIENCE] * 2]
    assert steps("convergence") == [[9, 9]]


def test_no_block_is_applied_once_all_have_halted():
    count = 0

    def step(state):
        nonlocal count
        count += 1
        return update_halting(state, state.x + 1, None, None, most=jnp.array([[3], [5]]))

    with jax.disable_jit():
        state = until_halted(step, init_halting(jnp.zeros((2, 4, 3))))
    assert count == 5 and state.steps.tolist() == [[3] * 4, [5] * 4]
    assert state.x[..., 0].tolist() == state.steps.tolist()


@pytest.mark.parametrize("causal", [True, False])
def test_a_bound_that_is_not_reached_costs_nothing(causal):
    """A billion loops are allowed; as many as are needed are run, and give what all of some give
    where gradients have to go back through them."""
    network, tokens = model(causal), jnp.asarray(random_batch().tokens)
    random = np.random.default_rng(0)
    thresholds = random.uniform(0.1, 0.2, tokens.shape).astype(np.float32)
    logits, steps = halting_of(network, tokens, thresholds, ENDLESS)
    most = int(steps.max())
    assert 4 < most < 60 and len(np.unique(steps)) >= 2
    if not causal:
        assert (steps == steps[:, :1]).all()

    @nnx.jit
    def scanned(network):
        def total(network):
            found = network.halting_logits(tokens, thresholds, rule=RULE, loops=most + 3)
            return jnp.sin(found[0]).mean(), found

        return nnx.value_and_grad(total, has_aux=True)(network)

    (_, (expected, taken)), gradient = scanned(network)
    np.testing.assert_array_equal(steps, taken)
    assert error(logits, expected) < 1e-6
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))


def test_each_sequence_has_a_bound_of_its_own():
    network, tokens = model(False), jnp.asarray(random_batch().tokens)
    free, steps = halting_of(network, tokens, np.float32(0.1), ENDLESS)
    free_steps = np.asarray(steps)[:, 0]
    most = jnp.array([free_steps[0] + 5, free_steps[1] - 1, 2])
    logits, steps = halting_of_each(network, tokens, np.float32(0.1), most)
    assert np.asarray(steps)[:, 0].tolist() == [free_steps[0], free_steps[1] - 1, 2]
    # A sequence that converges as a whole is what a plain call makes of it in as many loops.
    expected = nnx.jit(lambda network, loops: network(tokens, loops=loops))(network, steps[:, 0])
    assert error(logits, expected) < 1e-6
    assert error(logits[0], free[0]) < 1e-6 < error(logits[1], free[1])
