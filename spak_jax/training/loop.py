"""The loop around the step: from the newest checkpoint to the last step, come what may."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from spak_jax import jax_settings, models
from spak_jax.command_line import console, or_a_gpu, progress, require_devices
from spak_jax.config import Config
from spak_jax.config_sections import Train
from spak_jax.training import loggers, parallel, run_folder, signals
from spak_jax.training.runs import RunFolders, require_same_kind, run_folders, seeds_behind
from spak_jax.training.step import TrainState, compiled, schedule, sharded_dataset, unstack_seeds

# A compiled call that takes longer leaves its user without news.
SECONDS_PER_CALL = 2.0
# Of waiting for a training.
INSTEAD = (
    "it can be stopped at any time, and goes on when it is asked for again; for a trial take fewer"
    " steps, such as train.steps=200, or the configuration quickstart"
)


@jax_settings.fixed()
def train(
    config: Config,
    run_path: Path,
    until: int | None = None,
    *,
    on_step: Callable[[loggers.Line], None] | None = None,
    request: signals.Request | None = None,
) -> list[TrainState]:
    """Trains to the last step, from the newest checkpoint in the run folder if there is one.

    A run goes on with more `train.steps` than it was begun with, other intervals, other scoring or
    another name: only what would have changed the steps already done is refused. Where some of
    several seeds have no run yet, or are behind, they are brought to the others' step first.

    Args:
      config: of this run; a checkpoint of another training is refused.
      run_path: the run folder; with several seeds, of all of them (`run_folders`).
      until: a step to stop at, with a checkpoint, on the way to the last; None for the last.
      on_step: gets the metrics after every compiled call, of each seed in turn. What it raises ends
        the training; the newest checkpoint stays.
      request: asks it to stop after the steps under way, with a checkpoint
        (`signals.graceful_shutdown`); None where nothing does.

    Returns:
      The last state of each seed's training, on one device.

    Raises:
      InputError: the run folder is another training's, in use, damaged, or cannot be read or
        written, or has been trained beyond `until`; or there are too few devices.
      Failure: a number is no longer finite, memory or disk is full, or another process is gone; the
        last good checkpoint stays.
      Stopped: by a request, with a checkpoint.
    """
    last = config.train.steps if until is None else until
    request = request or signals.Request()
    require_devices()
    require_same_kind(config, run_path)
    if seeds_behind(config, run_path) is not None:
        # Before folders are made for those that have none.
        RunFolders(config, run_path).require_same_training(last)
    with contextlib.ExitStack() as held:
        folders = run_folders(config, run_path)
        lock = lambda: [held.enter_context(run_folder.locked(path)) for path in folders]  # noqa: E731
        parallel.on_primary_process(lock)
        while (behind := seeds_behind(config, run_path)) is not None:
            some, path, step = behind
            first, count = some.train.seed, some.train.seeds
            seeds = f"seeds {first} to {first + count - 1}" if count > 1 else f"seed {first}"
            console.print(f"{run_path}: {seeds} to step {step:,} first, where the others are")
            _train(some, path, step, on_step, request)
        return _train(config, run_path, last, on_step, request)


def _train(config, run_path, last, on_step, request) -> list[TrainState]:
    runs = RunFolders(config, run_path)
    with runs.explaining():
        return _train_in(runs, config, last, on_step, request)


def _train_in(
    runs: RunFolders,
    config: Config,
    last: int,
    on_step: Callable[[loggers.Line], None] | None,
    request: signals.Request,
) -> list[TrainState]:
    state = runs.begin(last)
    if runs.step == last:
        runs.close()
        return unstack_seeds(parallel.on_first_device(state, config.parallel))
    dataset = sharded_dataset(config)
    started = time.monotonic()
    with progress("compiling"):
        run_steps, validation_loss = compiled(config)
    seeds = config.train.seeds
    console.print(
        f"{config.system}: {models.parameter_count(state.weights) // seeds:,} parameters,"
        f" {config.train.steps:,} steps of {config.train.batch} x {config.data.row_length} tokens"
        f"{f', {seeds} seeds' if seeds > 1 else ''}"
        f" on {parallel.devices_in_words(config.parallel)}; compiled in"
        f" {time.monotonic() - started:.1f} s"
    )

    learning_rate = schedule(config.train)
    pace = 1
    (asked,) = parallel.all_gather(request.signal)
    instead = or_a_gpu(INSTEAD)
    with progress(config.name, last, runs.step, "steps", instead) as shown:
        # Compiled already: the first step tells the pace.
        shown.advance(0)
        while runs.step < last and not any(asked):
            step, target = runs.step, _next_stop(runs.step, pace, last, config.train)
            started = time.monotonic()
            state, metrics = run_steps(state, dataset, np.int32(target - step))
            metrics = jax.tree.map(
                lambda x: np.atleast_2d(x)[:, : target - step].tolist(),  # noqa: B023
                jax.device_get(metrics),
            )
            seconds = (time.monotonic() - started) / (target - step)
            pace = max(1, min(int(SECONDS_PER_CALL / seconds), config.train.steps_per_call))
            runs.require_finite(
                {"loss": metrics.loss, "norm of the gradient": metrics.gradient_norm}, step + 1
            )
            asked, paces = parallel.all_gather(request.signal, pace)
            pace = min(paces)
            losses = [sum(values) / len(values) for values in metrics.loss]
            validated = [None] * seeds
            due = target % config.train.checkpoint_every == 0 or target == last
            if due or any(asked):
                validated = np.atleast_1d(jax.device_get(validation_loss(state, dataset))).tolist()
                runs.require_finite({"validation loss": [[x] for x in validated]}, target)
            rate = float(learning_rate(target - 1))
            # Metrics first: lines past the newest checkpoint are dropped on going on, and none
            # before it may be missing.
            lines = [
                loggers.Line(
                    loss=loss,
                    step=target,
                    learning_rate=rate,
                    seconds_per_step=seconds,
                    validation_loss=value,
                )
                for loss, value in zip(losses, validated, strict=True)
            ]
            runs.append(lines)
            if due or any(asked):
                runs.save(state)
            runs.step = target
            for line in lines if on_step else ():
                on_step(line)
            status = f"loss {sum(losses) / seeds:.4f}, learning rate {rate:.1e}"
            shown.advance(target - step, status)
    runs.close()
    if any(asked):
        raise signals.Stopped(
            max(asked),
            f"step {runs.step:,} of {last:,} is kept in {runs.path}; the same command, without"
            " --fresh, goes on from there",
        )
    return unstack_seeds(parallel.on_first_device(state, config.parallel))


def _next_stop(step: int, pace: int, last: int, train: Train) -> int:
    """Where the compiled call that starts after `step` ends, at a checkpoint if one is due."""
    due = (step // train.checkpoint_every + 1) * train.checkpoint_every
    return min(step + pace, due, last)
