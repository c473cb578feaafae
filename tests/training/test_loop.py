"""Training: it learns, it goes on to the last bit as if never stopped, it stops before harm."""

import json
import re
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_refused, run_program, tiny_config
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from spak_jax import models
from spak_jax.command_line import Failure, InputError
from spak_jax.config import leaves
from spak_jax.config_sections import Train
from spak_jax.data import make_dataset, training_batch
from spak_jax.evaluation.loaded import load
from spak_jax.positions import learned
from spak_jax.release import release
from spak_jax.tasks import Batch
from spak_jax.tasks.arithmetic import Addition
from spak_jax.training import checkpoint, loggers, run_folder, runs
from spak_jax.training.loop import train
from spak_jax.training.runs import _consecutive_seeds, per_seed_configs
from spak_jax.training.step import (
    _that_makes_steps,
    compiled,
    initial_state,
    loss,
    make_training,
    optimizer,
    schedule,
)

ADDITION = Addition()


def assert_same_run(one, other):
    """The newest checkpoints of two run folders hold the same bits."""
    a, b = (checkpoint.restore(run, optimizer=True) for run in (one, other))
    assert a.step == b.step
    for mine, theirs in ((a.weights, b.weights), (a.optimizer, b.optimizer)):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].tobytes() == theirs[name].tobytes(), name


def test_schedule_warms_up_decays_and_stays():
    rate = schedule(Train())
    assert float(rate(0)) == 0
    np.testing.assert_allclose(rate(50), 5e-4, rtol=1e-5)
    np.testing.assert_allclose(rate(100), 1e-3, rtol=1e-5)
    np.testing.assert_allclose(rate(7_550), (1e-3 + 1e-4) / 2, rtol=1e-4)
    np.testing.assert_allclose([rate(15_000), rate(20_000)], 1e-4, rtol=1e-4)


def test_loss_counts_answer_tokens_of_supervised_readouts_only(tiny):
    network = jax.jit(lambda: models.build(tiny, jax.random.key(0)))()
    make = jax.jit(lambda key: training_batch(key, tiny.data, 4, None))
    batch = Batch(*map(np.asarray, make(jax.random.key(1))))
    loss_of = nnx.jit(lambda network, batch: loss(network, batch, ADDITION, None))
    value = loss_of(network, batch)
    # By hand: loops 2 and 3 of 3, every answer token alike.
    logits = nnx.jit(lambda network, loops: network(batch.tokens, loops=loops), static_argnums=1)
    entropies = []
    for loops in (2, 3):
        log_p = log_softmax(np.asarray(logits(network, loops)), axis=-1)
        picked = np.take_along_axis(log_p, batch.targets[..., None], axis=-1)[..., 0]
        entropies += (-picked[batch.answer]).tolist()
    np.testing.assert_allclose(value, np.mean(entropies), rtol=1e-6)
    changed = batch._replace(targets=np.where(batch.answer, batch.targets, 5))
    assert loss_of(network, changed) == value


def test_the_optimizer_is_adamw_behind_a_clip():
    recipe = Train(warmup_steps=1, decay_steps=10, clip_norm=1.0)
    weights = {"w": jnp.array([1.0, -2.0])}
    gradient = {"w": jnp.array([30.0, 40.0])}
    update = optimizer(recipe)
    _, state = update.update(gradient, update.init(weights), weights)
    changes, _ = update.update(gradient, state, weights)
    # Two equal gradients, clipped to norm 1: Adam's bias-corrected ratio is the sign.
    expected = -1e-3 * (np.array([1.0, 1.0]) + 1e-4 * np.array([1.0, -2.0]))
    np.testing.assert_allclose(changes["w"], expected, rtol=1e-4)


def begun(config):
    """State and dataset before the first step."""
    return jax.jit(lambda: (initial_state(config), make_dataset(config.data)))()


def test_one_compiled_call_equals_single_steps(tiny):
    """The same program takes any number of steps, and each is the plain one."""
    # The program that trains, which takes its state's memory.
    run_steps, _ = compiled(tiny)
    first, dataset = jax.tree.map(np.asarray, begun(tiny))
    together, metrics = jax.tree.map(np.asarray, run_steps(first, dataset, np.int32(4)))
    assert all((x[4:] == 0).all() and (x[:4] > 0).all() for x in metrics)
    state = first
    for i in range(4):
        state, alone = jax.tree.map(np.asarray, run_steps(state, dataset, np.int32(1)))
        assert [x[0] for x in alone] == [x[i] for x in metrics]
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(together), strict=True):
        assert (one == other).all()


def test_a_step_is_the_plain_recipe(tiny):
    config = tiny_config(model={"dropout": 0.0})
    state, dataset = begun(config)
    # The first step's rate is 0; the second moves the weights.
    after, metrics = jax.jit(make_training(config))(state, dataset, jnp.int32(2))
    definition, _ = models.abstract(config)
    key = jax.random.split(jax.random.key(config.train.seed), 4)[1]
    weights, moments = state.weights, state.optimizer
    update = optimizer(config.train)

    @jax.jit
    def step(weights, moments, key):
        batch = training_batch(key, config.data, config.train.batch, dataset.training)

        def objective(weights):
            return loss(nnx.merge(definition, weights), batch, ADDITION, None)

        value, gradient = jax.value_and_grad(objective)(weights)
        changes, moments = update.update(gradient, moments, weights)
        norm = optax.tree.norm(gradient)
        return optax.apply_updates(weights, changes), moments, value, norm

    for i in range(2):
        weights, moments, value, norm = step(weights, moments, jax.random.fold_in(key, i))
        np.testing.assert_allclose(metrics.loss[i], value, rtol=1e-5)
        np.testing.assert_allclose(metrics.gradient_norm[i], norm, rtol=1e-4)
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
    train(tiny, tmp_path / "whole")

    class Stopped(Exception):
        pass

    save = checkpoint.Run.save

    def stop_there(run, step, *rest):
        if step == stop:
            raise Stopped
        save(run, step, *rest)

    monkeypatch.setattr(checkpoint.Run, "save", stop_there)
    with pytest.raises(Stopped):
        train(tiny, tmp_path / "stopped")
    monkeypatch.undo()
    assert run_folder.steps_in(tmp_path / "stopped") == kept
    train(tiny, tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    # Calls may end elsewhere, but no step is logged twice and no checkpoint's line is missing.
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
    together = tiny_config(train={"seeds": 2, "seed": 4})
    states = train(together, tmp_path / "all")
    for state, one in zip(states, per_seed_configs(together), strict=True):
        assert one == tiny_config(train={"seed": int(state.seed)})
        folder = tmp_path / "all" / f"seed{state.seed}"
        (alone,) = train(one, tmp_path / f"alone{state.seed}")
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
    assert len({float(jax.tree.leaves(state.weights)[0].sum()) for state in states}) == 2


def test_several_seeds_go_on_from_their_last_common_checkpoint(tmp_path, monkeypatch):
    config = tiny_config(train={"seeds": 2})
    train(config, tmp_path / "whole")

    class Stopped(Exception):
        pass

    save = checkpoint.Run.save

    def stop_between_two(run, step, *rest):
        if step == 8 and run.path.name == "seed1":
            raise Stopped
        save(run, step, *rest)

    monkeypatch.setattr(checkpoint.Run, "save", stop_between_two)
    with pytest.raises(Stopped):
        train(config, tmp_path / "stopped")
    monkeypatch.undo()
    folders = runs.run_folders(config, tmp_path / "stopped")
    assert [run_folder.steps_in(folder)[-1] for folder in folders] == [8, 4]
    train(config, tmp_path / "stopped")
    for folder in folders:
        assert_same_run(tmp_path / "whole" / folder.name, folder)


def test_one_seed_and_several_do_not_share_a_folder(tiny, tmp_path):
    train(tiny, tmp_path / "one")
    with pytest.raises(InputError, match="one run, which train.seeds = 2 does not go on with"):
        train(tiny_config(train={"seeds": 2}), tmp_path / "one")
    train(tiny_config(train={"seeds": 2}), tmp_path / "two")
    with pytest.raises(InputError, match="several seeds, which train.seeds = 1 does not"):
        train(tiny, tmp_path / "two")
    assert "seed0" in str(assert_refuses(tiny, tmp_path / "two"))


def assert_refuses(config, run):
    """The refusal of a training, which leaves the run folder as it was."""
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(InputError) as refusal:
        train(config, run)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert "\n" not in str(refusal.value)
    return refusal.value


def test_more_seeds_are_brought_to_the_step_of_those_there_are(tmp_path, monkeypatch):
    """And a kill on the way costs nothing that a checkpoint holds."""
    run = tmp_path / "run"
    of = lambda seeds, **more: tiny_config(train={"seeds": seeds, **more})  # noqa: E731
    train(of(2), run)
    assert "train.batch is 8 there and 4 here" in str(assert_refuses(of(3, batch=4), run))
    assert "beyond 8" in str(assert_refuses(of(3, steps=8), run))
    assert {path.name for path in run.iterdir()} == {"seed0", "seed1"}

    class Stopped(Exception):
        pass

    save, before = checkpoint.Run.save, files_in(run, "*.json", "d/*")

    def stop_there(written, step, *rest):
        if step == 8:
            raise Stopped
        save(written, step, *rest)

    monkeypatch.setattr(checkpoint.Run, "save", stop_there)
    with pytest.raises(Stopped):
        train(of(3), run)
    monkeypatch.undo()
    folders = runs.run_folders(of(3), run)
    assert [run_folder.steps_in(folder)[-1] for folder in folders] == [12, 12, 4]
    states = train(of(3), run)
    assert [(int(state.seed), int(state.step)) for state in states] == [(0, 12), (1, 12), (2, 12)]
    assert files_in(run, "*.json", "d/*").items() > before.items()
    train(tiny_config(train={"seed": 2}), tmp_path / "alone")
    assert_same_run(run / "seed2", tmp_path / "alone")


def files_in(run, *patterns):
    found = [path for pattern in patterns for path in run.rglob(pattern) if path.is_file()]
    return {path: path.read_bytes() for path in found}


@given(
    st.lists(st.sets(st.sampled_from([0, 4, 8, 12, 16]), max_size=2), min_size=1, max_size=6),
    st.integers(0, 3),
)
def test_seeds_that_are_behind_are_trained_in_groups_that_can_be(begun, first):
    """Whatever steps a kill, or another number of seeds, has left."""
    steps = {f"seed{first + i}": sorted(each) for i, each in enumerate(begun)}
    config = tiny_config(train={"seed": first, "seeds": max(2, len(begun))})
    steps |= {path.name: [] for path in runs.run_folders(config, Path()) if path.name not in steps}
    newest = max((each[-1] for each in steps.values() if each), default=None)
    with mock.patch.object(run_folder, "steps_in", lambda path: steps[path.name]):
        for _ in range(100):
            behind = runs.seeds_behind(config, Path())
            if behind is None:
                break
            some, path, step = behind
            names = [path.name for path in runs.run_folders(config, Path())]
            group = [path.name for path in runs.run_folders(some, path)]
            assert group == [f"seed{one.train.seed}" for one in per_seed_configs(some)]
            assert set(group) < set(names)
            common = set.intersection(*(set(steps[name]) for name in group))
            # They go on from one step, or begin, and end where others are.
            assert common or not any(steps[name] for name in group)
            assert max(common, default=-1) < step <= newest
            assert any(step in steps[name] for name in names if name not in group)
            steps |= {name: [step] for name in group}
    assert behind is None
    common = set.intersection(*map(set, steps.values()))
    assert common or not any(steps.values())


def test_some_seeds_share_what_devices_they_can():
    config = tiny_config(train={"seeds": 6, "seed": 10}, parallel={"seeds": 2})
    some = _consecutive_seeds(config, 2, 3)
    assert (some.train.seed, some.train.seeds, some.parallel.seeds) == (12, 3, 1)
    assert _consecutive_seeds(config, 2, 4).parallel.seeds == 2


@pytest.mark.parametrize("every", [1, 4])
def test_numbers_that_are_not_finite_stop_it_and_the_last_good_checkpoint_is_kept(tmp_path, every):
    # The rate of step 1 is 0, so the second step's update is what breaks the weights.
    config = tiny_config(train={"learning_rate": 1e30, "checkpoint_every": every})
    with pytest.raises(Failure, match="is (nan|inf) at step [234]") as failure:
        train(config, tmp_path)
    assert failure.value.status == 1 and "train.learning_rate" in str(failure.value)
    kept = checkpoint.restore(tmp_path)
    failed_at = int(re.search(r"at step (\d)", str(failure.value))[1])
    assert kept.step == (failed_at - 1 if every == 1 else 0)
    assert f"step {kept.step} is kept" in str(failure.value)
    assert all(np.isfinite(array).all() for array in kept.weights.values())


def test_another_configuration_is_refused_and_nothing_changes(tiny, tmp_path):
    train(tiny, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=r"model.loops is 3 there and 4 here"):
        train(tiny_config(model={"loops": 4}), tmp_path)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_training_goes_on_for_longer(tiny, tmp_path):
    """To the same bits as if that had been planned, also with other intervals and another name."""
    train(tiny_config(train={"steps": 20}), tmp_path / "planned")
    train(tiny, tmp_path / "run")
    longer = tiny_config(
        train={"steps": 20, "checkpoint_every": 3, "steps_per_call": 4},
        evaluation={"lengths": [1]},
    ).model_copy(update={"name": "other", "system": "Another name"})
    train(longer, tmp_path / "run")
    assert_same_run(tmp_path / "planned", tmp_path / "run")
    assert checkpoint.restore(tmp_path / "run").config == longer
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").open()]
    assert steps == sorted(set(steps)) and {4, 8, 12, 15, 20} <= set(steps)
    assert "step 20, beyond 19: ask for more train.steps" in str(
        assert_refuses(tiny_config(train={"steps": 19}), tmp_path / "run")
    )


@pytest.mark.filterwarnings("ignore:Pydantic")
def test_every_field_that_makes_steps_is_refused_and_no_other_is():
    config = tiny_config()
    for key, value in leaves(config.model_dump()):
        *sections, name = key.split(".")
        other = config
        changed = {name: value + 1 if type(value) is int else "changed"}
        for section in reversed(sections):
            changed = {section: getattr(other, section).model_copy(update=changed)}
        difference = runs._difference(config, config.model_copy(update=changed), 12)
        beside = key.startswith(runs.BESIDE_THE_STEPS)
        assert (difference is None) == beside, key
        assert beside or difference.startswith(f"{key} is ")


def test_gates_that_became_firm_do_not_soften_again():
    """Gates are soft for the first part of the steps there will be, which a longer training has."""
    of = lambda steps: tiny_config(model={"positions": "learned"}, train={"steps": steps})  # noqa: E731
    firm = 12 * learned.SOFT_UNTIL
    for step in range(13):
        for one, other in ((12, 24), (24, 12)):
            difference = runs._difference(of(one), of(other), step)
            assert (difference is None) == (step < firm), step
            if difference:
                assert f"train.steps is {one} there and {other} here" in difference
                assert "become firm" in difference
        assert runs._difference(of(12), of(12), step) is None


def test_lengths_that_have_grown_do_not_grow_otherwise():
    of = lambda steps: tiny_config(  # noqa: E731
        data={"examples": 0, "curriculum": 0.5}, train={"steps": steps}
    )
    for step in (1, 12):
        difference = runs._difference(of(12), of(24), step)
        assert "train.steps is 12 there and 24 here" in difference
        assert "data.curriculum = 0.5" in difference
        assert runs._difference(of(12), of(12), step) is None


def test_a_program_knows_when_a_training_ends_where_its_steps_go_by_that():
    def of(steps, **more):
        return _that_makes_steps(tiny_config(train={"steps": steps}, **more), seed=0)

    assert of(12) == of(24)
    for more in ({"model": {"positions": "learned"}}, {"data": {"examples": 0, "curriculum": 0.5}}):
        assert of(12, **more) != of(24, **more)


@given(
    st.integers(2**30, 2**34),
    st.sampled_from(
        [
            "steps",
            "decay_steps",
            "warmup_steps",
            "seed",
            "batch",
            "steps_per_call",
            "checkpoint_every",
            "seeds",
        ]
    ),
    st.integers(1, 64),
)
def test_numbers_that_arrays_cannot_hold_are_refused_by_name(number, name, seeds):
    try:
        config = tiny_config(train={"decay_steps": 2**31 - 1, "seeds": seeds, name: number})
    except InputError as error:
        assert f"train.{name}" in str(error) or "train.warmup_steps" in str(error)
        assert number >= 2**31 - 65 or name in ("seeds", "warmup_steps", "decay_steps")
        return
    recipe = config.train
    last_seed = recipe.seed + recipe.seeds - 1
    for largest in (
        last_seed,
        recipe.steps,
        recipe.decay_steps,
        recipe.batch,
        recipe.warmup_steps,
    ):
        assert int(np.int32(largest)) == largest
    assert np.isfinite(schedule(recipe)(np.int32(recipe.steps - 1)))


def test_every_seed_and_mean_is_one():
    most = 2**31 - 1
    config = tiny_config(train={"seed": most - 1, "seeds": 2})
    assert [one.train.seed for one in per_seed_configs(config)] == [most - 1, most]
    with pytest.raises(InputError, match="train.seeds = 2 from train.seed = 2147483647"):
        tiny_config(train={"seed": most, "seeds": 2})
    with pytest.raises(InputError, match="train.betas.*less than 1"):
        tiny_config(train={"betas": [0.9, 1.0]})


def test_only_what_is_not_underfoot_is_moved_aside(tmp_path, monkeypatch):
    inside = tmp_path / "outer" / "inner"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    for name in (".", "..", "../../outer", str(inside), str(tmp_path)):
        with pytest.raises(InputError, match="was started in it"):
            runs.move_aside(Path(name))
    (tmp_path / "link").symlink_to(inside)
    runs.move_aside(Path("../../link"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.old-1", "outer"]
    runs.move_aside(Path("none"))
    with pytest.raises(InputError, match="File name too long"):
        runs.move_aside(Path("x" * 300))


def test_a_run_of_any_name_is_trained_read_and_released(tiny, tmp_path):
    name = "lr[1e-3] *?b\\c~%{x}:'é\n"
    run = tmp_path / name / "run"
    train(tiny, run, 4)
    (state,) = train(tiny, run)
    out = tmp_path / name / "out"
    assert release(run, out) == 12
    for path in (run, out):
        loaded = load(path)
        same = zip(jax.tree.leaves(loaded.weights), jax.tree.leaves(state.weights), strict=True)
        assert all((mine == theirs).all() for mine, theirs in same)
    assert loggers.read(run)[-1].step == 12


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


def test_a_folder_that_moves_away_during_a_save_ends_the_training(tiny, tmp_path, monkeypatch):
    save = checkpoint.Run.save

    def moved_meanwhile(run, step, *rest):
        if step == 4:
            run.path.rename(tmp_path / "aside")
            # As Orbax does, with all parents.
            (run.path / run_folder.CHECKPOINTS).mkdir(parents=True)
        save(run, step, *rest)

    monkeypatch.setattr(checkpoint.Run, "save", moved_meanwhile)
    with pytest.raises(Failure, match=r"cannot write .*metrics.jsonl: No such file"):
        train(tiny, tmp_path / "run")
    assert checkpoint.restore(tmp_path / "aside").step == 0
