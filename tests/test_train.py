"""Training: it learns, it goes on to the last bit as if never stopped, it stops before harm."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_refused, run_program, tiny_config
from flax import nnx

from spak_jax import addition, checkpoint, model
from spak_jax import train as training
from spak_jax.command_line import Failure, InputError
from spak_jax.config import Train


def assert_same_run(one, other):
    """The newest checkpoints of two run folders hold the same bits."""
    a, b = (checkpoint.restore(run, optimizer=True) for run in (one, other))
    assert a.step == b.step
    for mine, theirs in ((a.weights, b.weights), (a.optimizer, b.optimizer)):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].tobytes() == theirs[name].tobytes(), name


def test_schedule_warms_up_decays_and_stays():
    rate = training.schedule(Train())
    assert float(rate(0)) == 0
    np.testing.assert_allclose(rate(50), 5e-4, rtol=1e-5)
    np.testing.assert_allclose(rate(100), 1e-3, rtol=1e-5)
    np.testing.assert_allclose(rate(7_550), (1e-3 + 1e-4) / 2, rtol=1e-4)
    np.testing.assert_allclose([rate(15_000), rate(20_000)], 1e-4, rtol=1e-4)


def test_loss_counts_answer_tokens_of_supervised_readouts_only(tiny):
    network = model.build(tiny, addition.VOCABULARY_SIZE, jax.random.key(0))
    batch = addition.training_batch(jax.random.key(1), tiny.data, 4, None)
    value = training.loss(network, batch, None)
    # By hand: loops 2 and 3 of 3, every answer token alike.
    entropies = []
    for loops in (2, 3):
        log_p = jax.nn.log_softmax(network(batch.tokens, loops=loops))
        picked = jnp.take_along_axis(log_p, batch.targets[..., None], axis=-1)[..., 0]
        entropies += (-picked[batch.answer]).tolist()
    np.testing.assert_allclose(value, np.mean(entropies), rtol=1e-6)
    changed = batch._replace(targets=jnp.where(batch.answer, batch.targets, 5))
    assert training.loss(network, changed, None) == value


def test_the_optimizer_is_adamw_behind_a_clip():
    recipe = Train(warmup_steps=1, decay_steps=10, clip_norm=1.0)
    weights = {"w": jnp.array([1.0, -2.0])}
    gradient = {"w": jnp.array([30.0, 40.0])}
    update = training.optimizer(recipe)
    _, state = update.update(gradient, update.init(weights), weights)
    changes, _ = update.update(gradient, state, weights)
    # Two equal gradients, clipped to norm 1: Adam's bias-corrected ratio is the sign.
    expected = -1e-3 * (np.array([1.0, 1.0]) + 1e-4 * np.array([1.0, -2.0]))
    np.testing.assert_allclose(changes["w"], expected, rtol=1e-4)


def begun(config):
    """State and supply before the first step."""
    return jax.jit(lambda: (training.initial_state(config), training.make_supply(config)))()


def test_one_compiled_call_equals_single_steps(tiny):
    """The same program takes any number of steps, and each is the plain one."""
    run_steps = jax.jit(training.make_training(tiny))
    first, supply = begun(tiny)
    together, told = run_steps(first, supply, jnp.int32(4))
    assert all(np.isnan(x[4:]).all() and np.isfinite(x[:4]).all() for x in told)
    state = first
    for i in range(4):
        state, alone = run_steps(state, supply, jnp.int32(1))
        assert [x[0] for x in alone] == [x[i] for x in told]
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(together), strict=True):
        assert (one == other).all()


def test_a_step_is_the_plain_recipe(tiny):
    config = tiny_config(model={"dropout": 0.0})
    state, supply = begun(config)
    # The first step's rate is 0; the second moves the weights.
    after, told = jax.jit(training.make_training(config))(state, supply, jnp.int32(2))
    definition, _ = model.abstract(config, addition.VOCABULARY_SIZE)
    key = jax.random.split(jax.random.key(config.train.seed), 4)[1]
    weights, optimizer = state.weights, state.optimizer
    update = training.optimizer(config.train)

    @jax.jit
    def step(weights, optimizer, key):
        batch = addition.training_batch(key, config.data, config.train.batch, supply.training)

        def objective(weights):
            return training.loss(nnx.merge(definition, weights), batch, None)

        value, gradient = jax.value_and_grad(objective)(weights)
        changes, optimizer = update.update(gradient, optimizer, weights)
        norm = optax.tree.norm(gradient)
        return optax.apply_updates(weights, changes), optimizer, value, norm

    for i in range(2):
        weights, optimizer, value, norm = step(weights, optimizer, jax.random.fold_in(key, i))
        np.testing.assert_allclose(told.loss[i], value, rtol=1e-5)
        np.testing.assert_allclose(told.gradient_norm[i], norm, rtol=1e-4)
    for mine, theirs in zip(jax.tree.leaves(weights), jax.tree.leaves(after.weights), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_a_training_learns_and_leaves_metrics(half_trained):
    lines = [json.loads(line) for line in (half_trained / "metrics.jsonl").open()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)) and {110, 220} <= set(steps)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert [line["step"] for line in lines if "validation_loss" in line] == [110, 220]
    assert all(line["seconds_per_step"] > 0 for line in lines)


@pytest.mark.parametrize(("stop", "kept"), [(4, [0]), (8, [0, 4])])
def test_going_on_after_a_stop_changes_nothing(tiny, tmp_path, monkeypatch, stop, kept):
    training.train(tiny, tmp_path / "whole")

    class Stopped(Exception):
        pass

    save = checkpoint.Run.save

    def stop_there(run, step, *rest):
        if step == stop:
            raise Stopped
        save(run, step, *rest)

    monkeypatch.setattr(checkpoint.Run, "save", stop_there)
    with pytest.raises(Stopped):
        training.train(tiny, tmp_path / "stopped")
    monkeypatch.undo()
    assert checkpoint.steps_in(tmp_path / "stopped") == kept
    training.train(tiny, tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    # Calls may end elsewhere, but no step is told twice and no checkpoint's line is missing.
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped/metrics.jsonl").open()]
    assert steps == sorted(set(steps)) and {4, 8, 12} <= set(steps)


def test_seeds_differ_and_repeat(tiny, tmp_path):
    weights = lambda seed: jax.tree.leaves(  # noqa: E731
        begun(tiny_config(train={"seed": seed}))[0].weights
    )
    same = [(a == b).all() for a, b in zip(weights(0), weights(0), strict=True)]
    other = [(a == b).all() for a, b in zip(weights(0), weights(1), strict=True)]
    assert all(same) and not all(other)


def test_several_seeds_in_one_program_are_their_own_trainings(tiny, tmp_path):
    """Each is what it would have been alone, goes on alone, and is a run folder like any other."""
    together = tiny_config(train={"seeds": 3, "seed": 4})
    states = training.train(together, tmp_path / "all")
    for state, one in zip(states, training.one_by_one(together), strict=True):
        assert one == tiny_config(train={"seed": int(state.seed)})
        folder = tmp_path / "all" / f"seed{state.seed}"
        (alone,) = training.train(one, tmp_path / f"alone{state.seed}")
        same = zip(jax.tree.leaves(alone.weights), jax.tree.leaves(state.weights), strict=True)
        for mine, theirs in same:
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)
        kept = checkpoint.restore(folder)
        assert kept.step == one.train.steps and kept.config == one
        losses = [
            [json.loads(line)["loss"] for line in (path / "metrics.jsonl").open()][-1]
            for path in (folder, tmp_path / f"alone{state.seed}")
        ]
        np.testing.assert_allclose(*losses, rtol=1e-3)
    assert len({float(jax.tree.leaves(state.weights)[0].sum()) for state in states}) == 3


def test_several_seeds_go_on_from_their_last_common_checkpoint(tmp_path, monkeypatch):
    config = tiny_config(train={"seeds": 2})
    training.train(config, tmp_path / "whole")

    class Stopped(Exception):
        pass

    save = checkpoint.Run.save

    def stop_between_two(run, step, *rest):
        if step == 8 and run.path.name == "seed1":
            raise Stopped
        save(run, step, *rest)

    monkeypatch.setattr(checkpoint.Run, "save", stop_between_two)
    with pytest.raises(Stopped):
        training.train(config, tmp_path / "stopped")
    monkeypatch.undo()
    folders = training.run_folders(config, tmp_path / "stopped")
    assert [checkpoint.steps_in(folder)[-1] for folder in folders] == [8, 4]
    training.train(config, tmp_path / "stopped")
    for folder in folders:
        assert_same_run(tmp_path / "whole" / folder.name, folder)


def test_one_seed_and_several_do_not_share_a_folder(tiny, tmp_path):
    training.train(tiny, tmp_path / "one")
    with pytest.raises(InputError, match="one run, which train.seeds = 2 does not go on with"):
        training.train(tiny_config(train={"seeds": 2}), tmp_path / "one")
    training.train(tiny_config(train={"seeds": 2}), tmp_path / "two")
    with pytest.raises(InputError, match="several seeds, which train.seeds = 1 does not"):
        training.train(tiny, tmp_path / "two")
    with pytest.raises(InputError, match="no checkpoint of the same step"):
        training.train(tiny_config(train={"seeds": 3}), tmp_path / "two")


@pytest.mark.parametrize("every", [1, 4])
def test_numbers_that_are_not_finite_stop_it_and_the_last_good_checkpoint_is_kept(tmp_path, every):
    # The rate of step 1 is 0, so the second step's update is what breaks the weights.
    config = tiny_config(train={"learning_rate": 1e30, "checkpoint_every": every})
    with pytest.raises(Failure, match="is (nan|inf) at step [234]") as failure:
        training.train(config, tmp_path)
    assert failure.value.status == 1 and "train.learning_rate" in str(failure.value)
    kept = checkpoint.restore(tmp_path)
    failed_at = int(re.search(r"at step (\d)", str(failure.value))[1])
    assert kept.step == (failed_at - 1 if every == 1 else 0)
    assert f"step {kept.step} is kept" in str(failure.value)
    assert all(np.isfinite(array).all() for array in kept.weights.values())


def test_another_configuration_is_refused_and_nothing_changes(tiny, tmp_path):
    training.train(tiny, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=r"model.loops is 3 there and 4 here"):
        training.train(tiny_config(model={"loops": 4}), tmp_path)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_the_command_line_moves_an_old_run_aside_and_refuses_bad_input(tiny_toml, tmp_path):
    run = tmp_path / "run"
    words = ["spak_jax.train", tiny_toml, "train.steps=4", "--run", run]
    first = run_program(*words)
    assert first.returncode == 0, first.stderr
    assert "zero-shot" in first.stdout
    results = json.loads((run / "results.json").read_text())
    assert results["step"] == 4 and results["lengths"]["7"]["zero_shot"]
    assert run_program(*words, "--fresh").returncode == 0
    assert (tmp_path / "run.old-1" / "results.json").exists()
    assert_refused(
        run_program(*words, "train.batch=9"), "train.batch is 8 there and 9 here", "--fresh"
    )
    assert_refused(run_program("spak_jax.train", tmp_path / "none.toml"), "none.toml")
    assert_refused(
        run_program("spak_jax.train", tiny_toml, "--run", tiny_toml / "run"), "tiny.toml/run"
    )
