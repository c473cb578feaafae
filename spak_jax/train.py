"""Training: `python -m spak_jax.train [CONFIG] [key.path=value ...] [--run DIR] [--fresh]`.

The whole step (data, loss, gradients, optimizer) is one function of the state, and one compiled
call runs many of them. All randomness is folded from the seed and the step number, so a run that
was stopped anywhere goes on as if it never had been.
"""

import argparse
import contextlib
import functools
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from pallas_kernels import shards
from spak_jax import (
    addition,
    checkpoint,
    evaluate,
    interruption,
    jax_settings,
    metrics,
    model,
    parallel,
    positions,
)
from spak_jax.command_line import (
    Failure,
    InputError,
    console,
    first_line,
    progress,
    require_devices,
    run_program,
)
from spak_jax.config import (
    Config,
    Parallel,
    Train,
    add_words,
    file_and_overrides,
    first_difference,
    read_specification,
)

VALIDATION_BATCHES = 8
# No part of any step: names, and when a training saves, tells, ends and is scored.
BESIDE_THE_STEPS = (
    "name",
    "system",
    "evaluation",
    "train.steps",
    "train.steps_per_call",
    "train.checkpoint_every",
)
# A compiled call that takes longer leaves its user without news.
SECONDS_PER_CALL = 2.0
# Of waiting for a training.
INSTEAD = (
    "it can be stopped at any time, and goes on when it is asked for again; for a trial take fewer"
    " steps, such as train.steps=200, or the configuration quickstart"
)


class TrainState(NamedTuple):
    """All that changes from step to step, and the seed of all that is drawn.

    weights, optimizer: pytrees; seed: int32. With several seeds these have a leading axis for them.
    step: int32, the steps done.
    """

    weights: Any
    optimizer: Any
    step: jax.Array
    seed: jax.Array


# Which parts of a state have an axis for the seeds, for `jax.vmap`.
OVER_SEEDS = TrainState(weights=0, optimizer=0, step=None, seed=0)


class Told(NamedTuple):
    """What a call tells of each of its steps, float32: the loss, and the norm of its gradient.

    Arrays of `train.steps_per_call`, or one such row a seed; 0 beyond the steps that were taken.
    """

    loss: jax.Array
    gradient_norm: jax.Array


class Supply(NamedTuple):
    """Fixed problems to train and to validate on; None where an endless stream makes them."""

    training: addition.Problems | None
    held_out: addition.Problems | None


def schedule(train: Train) -> optax.Schedule:
    """The learning rate at a step: linear warm-up from 0, cosine decay, then constant."""
    return optax.warmup_cosine_decay_schedule(
        0.0,
        train.learning_rate,
        train.warmup_steps,
        train.decay_steps,
        train.final_learning_rate,
    )


def optimizer(train: Train) -> optax.GradientTransformation:
    """AdamW on all weights, behind a clip of the global gradient norm."""
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(
            schedule(train),
            b1=train.betas[0],
            b2=train.betas[1],
            weight_decay=train.weight_decay,
        ),
    )


def loss(
    network: model.GPT | model.LoopLM,
    batch: addition.Batch,
    key: jax.Array | None,
    progress: jax.Array | float | None = None,
):
    """Mean cross-entropy of the answer tokens, over every readout that training supervises.

    Where rows are split over devices (`shards`), this device's part of that of all rows.

    Args:
      network: the model.
      batch: rows of text.
      key: PRNG key for dropout; None for none.
      progress: share of the training that is done; None outside it.

    Returns:
      A float32 scalar.
    """
    weights = batch.answer / shards.total(batch.answer.sum())
    ids = addition.coupled_ids(batch.tokens)
    losses = network.supervised_losses(
        batch.tokens, batch.targets, weights, ids=ids, key=key, progress=progress
    )
    return losses.mean()


def initial_state(config: Config) -> TrainState:
    """Weights drawn from the seed, or each of the seeds, and an optimizer that has seen nothing."""

    def of_seed(seed):
        weights = nnx.state(model.build(config, addition.VOCABULARY_SIZE, _key(seed, "weights")))
        return TrainState(weights, optimizer(config.train).init(weights), jnp.int32(0), seed)

    seed, seeds = jnp.int32(config.train.seed), config.train.seeds
    if seeds == 1:
        return of_seed(seed)
    return jax.vmap(of_seed, out_axes=OVER_SEEDS)(seed + jnp.arange(seeds))


def one_by_one(config: Config) -> list[Config]:
    """The configuration of each seed's training."""
    first = config.train.seed
    return [
        config.model_copy(
            update={
                "train": config.train.model_copy(update={"seed": seed, "seeds": 1}),
                "parallel": Parallel(),
            }
        )
        for seed in range(first, first + config.train.seeds)
    ]


def run_folders(config: Config, run_path: Path) -> list[Path]:
    """Where each seed's run is kept: `run_path` itself, or one folder in it a seed."""
    if config.train.seeds == 1:
        return [run_path]
    return [run_path / f"seed{one.train.seed}" for one in one_by_one(config)]


def make_supply(config: Config) -> Supply:
    """The training and held-out problems of a configuration."""
    return Supply(*(addition.fixed_supply(config.data) if config.data.examples else (None, None)))


def make_training(
    config: Config, attention: str | None = None
) -> Callable[[TrainState, Supply, jax.Array], Any]:
    """The compiled-call function of a configuration.

    Args:
      config: of the run.
      attention: implementation, as `pallas_kernels.attention` takes it; None the fastest.

    Returns:
      A pure function of (state, supply, count) that takes `count` steps, at most
      `train.steps_per_call`, and returns the new state and what the steps tell (`Told`). The count
      is no shape: one program serves every count.
    """
    definition, _ = model.abstract(config, addition.VOCABULARY_SIZE, attention)
    update = optimizer(config.train).update

    def one_step(state: TrainState, supply: Supply):
        batch = addition.training_batch(
            jax.random.fold_in(_key(state.seed, "data"), state.step),
            config.data,
            config.train.batch,
            supply.training,
        )

        dropout_key = jax.random.fold_in(_key(state.seed, "dropout"), state.step)
        progress = state.step / config.train.steps

        def objective(weights, batch, dropout_key, progress):
            return loss(nnx.merge(definition, weights), batch, dropout_key, progress)

        value, gradients = parallel.value_and_grad(objective, config.parallel)(
            state.weights, batch, dropout_key, progress
        )
        updates, optimizer_state = update(gradients, state.optimizer, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        told = Told(value, optax.tree.norm(gradients))
        return TrainState(weights, optimizer_state, state.step + 1, state.seed), told

    every_seed = one_step
    if config.train.seeds > 1:
        every_seed = parallel.over_seeds(
            one_step, config.parallel, in_axes=(OVER_SEEDS, None), out_axes=(OVER_SEEDS, 0)
        )

    def run_steps(state: TrainState, supply: Supply, count: jax.Array):
        def body(i, carry):
            state, told = carry
            state, of_step = every_seed(state, supply)
            return state, jax.tree.map(lambda x, value: x.at[..., i].set(value), told, of_step)

        none = jnp.zeros((*state.seed.shape, config.train.steps_per_call), jnp.float32)
        return jax.lax.fori_loop(0, count, body, (state, Told(none, none)))

    return run_steps


def make_validation(config: Config) -> Callable[[TrainState, Supply], jax.Array]:
    """A pure function of (state, supply): the loss on held-out problems, without dropout.

    Always the same few batches, so that values of one run can be compared.
    """
    definition, _ = model.abstract(config, addition.VOCABULARY_SIZE)

    def objective(weights, batch):
        return loss(nnx.merge(definition, weights), batch, None)

    def validation_loss(state: TrainState, supply: Supply):
        def one_batch(key):
            rows = addition.training_batch(key, config.data, config.train.batch, supply.held_out)
            return parallel.value(objective, config.parallel)(state.weights, rows)

        keys = jax.random.split(_key(state.seed, "validation"), VALIDATION_BATCHES)
        return jax.lax.map(one_batch, keys).mean()

    if config.train.seeds == 1:
        return validation_loss
    return parallel.over_seeds(validation_loss, config.parallel, in_axes=(OVER_SEEDS, None))


def shardings(config: Config) -> TrainState | None:
    """Where each array of a state lies; None on one device."""
    state = jax.eval_shape(lambda: initial_state(config))
    several = config.train.seeds > 1
    parts = zip(state, OVER_SEEDS, strict=True)
    placed = [parallel.shardings(x, config.parallel, several and ax is not None) for x, ax in parts]
    return None if placed[0] is None else TrainState(*placed)


def first_state(config: Config) -> TrainState:
    """`initial_state` on its devices, compiled as one program: a weight at a time takes seconds."""
    return jax.jit(lambda: initial_state(config), out_shardings=shardings(config))()


def first_supply(config: Config) -> Supply:
    """`make_supply`, whole on every device."""
    return jax.jit(
        lambda: make_supply(config), out_shardings=parallel.everywhere(config.parallel)
    )()


@functools.lru_cache(maxsize=1)
def compiled(config: Config) -> tuple[Callable, Callable]:
    """The programs of `make_training`, which takes its state's memory, and `make_validation`."""
    where, everywhere = shardings(config), parallel.everywhere(config.parallel)
    validation_loss = jax.jit(
        make_validation(config),
        in_shardings=None if where is None else (where, everywhere),
        out_shardings=everywhere,
    )
    return compiled_steps(config), validation_loss.lower(*_shapes(config)).compile()


def compiled_steps(config: Config) -> Callable:
    """The program of `make_training` alone."""
    where, everywhere = shardings(config), parallel.everywhere(config.parallel)
    run_steps = jax.jit(
        make_training(config),
        donate_argnums=0,
        in_shardings=None if where is None else (where, everywhere, everywhere),
        out_shardings=None if where is None else (where, everywhere),
    )
    return run_steps.lower(*_shapes(config), jax.ShapeDtypeStruct((), jnp.int32)).compile()


@jax_settings.fixed()
def train(config: Config, run_path: Path, until: int | None = None) -> list[TrainState]:
    """Trains to the last step, from the newest checkpoint in the run folder if there is one.

    SIGTERM, SIGINT and SIGHUP end it after the steps under way, with a checkpoint. So it must be
    called from the main thread.

    A run goes on with more `train.steps` than it was begun with, other intervals, other scoring or
    another name: only what would have changed the steps already done is refused. Where some of
    several seeds have no run yet, or are behind, they are brought to the others' step first.

    Args:
      config: of this run; a checkpoint of another training is refused.
      run_path: the run folder; with several seeds, of all of them (`run_folders`).
      until: a step to stop at, with a checkpoint, on the way to the last; None for the last.

    Returns:
      The last state of each seed's training, on one device.

    Raises:
      InputError: the run folder is another training's, in use, damaged, or cannot be read or
        written, or has been trained beyond `until`; or there are too few devices.
      Failure: a number is no longer finite, memory or disk is full, or another process is gone; the
        last good checkpoint stays.
      Stopped: by a signal, with a checkpoint.
    """
    last = config.train.steps if until is None else until
    require_devices()
    _require_same_kind(config, run_path)
    if _behind(config, run_path) is not None:
        # Before folders are made for those that have none.
        _Runs(config, run_path).require_same_training(last)
    with contextlib.ExitStack() as held:
        request = held.enter_context(interruption.heeded())
        folders = run_folders(config, run_path)
        lock = lambda: [held.enter_context(checkpoint.locked(path)) for path in folders]  # noqa: E731
        parallel.by_first(lock)
        while (behind := _behind(config, run_path)) is not None:
            some, path, step = behind
            first, count = some.train.seed, some.train.seeds
            seeds = f"seeds {first} to {first + count - 1}" if count > 1 else f"seed {first}"
            console.print(f"{run_path}: {seeds} to step {step:,} first, where the others are")
            _train(some, path, step, request)
        return _train(config, run_path, last, request)


def _train(
    config: Config, run_path: Path, last: int, request: interruption.Request
) -> list[TrainState]:
    runs = _Runs(config, run_path)
    with runs.explaining():
        return _train_in(runs, config, last, request)


def _train_in(
    runs: "_Runs", config: Config, last: int, request: interruption.Request
) -> list[TrainState]:
    state = runs.begin(last)
    if runs.step == last:
        runs.close()
        return _apart(parallel.on_first_device(state, config.parallel))
    supply = first_supply(config)
    started = time.monotonic()
    with progress("compiling"):
        run_steps, validation_loss = compiled(config)
    seeds = config.train.seeds
    console.print(
        f"{config.system}: {model.parameter_count(state.weights) // seeds:,} parameters,"
        f" {config.train.steps:,} steps of {config.train.batch} x {config.data.row_length} tokens"
        f"{f', {seeds} seeds' if seeds > 1 else ''}"
        f" on {parallel.devices_in_words(config.parallel)}; compiled in"
        f" {time.monotonic() - started:.1f} s"
    )

    learning_rate = schedule(config.train)
    pace = 1
    (asked,) = parallel.of_all(request.signal)
    instead = evaluate.or_a_gpu(INSTEAD)
    with progress(config.name, last, runs.step, "steps", instead) as shown:
        # Compiled already: the first step tells the pace.
        shown.advance(0)
        while runs.step < last and not any(asked):
            step, target = runs.step, _next_stop(runs.step, pace, last, config.train)
            started = time.monotonic()
            state, told = run_steps(state, supply, np.int32(target - step))
            told = jax.tree.map(
                lambda x: np.atleast_2d(x)[:, : target - step].tolist(),  # noqa: B023
                jax.device_get(told),
            )
            seconds = (time.monotonic() - started) / (target - step)
            pace = max(1, min(int(SECONDS_PER_CALL / seconds), config.train.steps_per_call))
            runs.require_finite(
                {"loss": told.loss, "norm of the gradient": told.gradient_norm}, step + 1
            )
            asked, paces = parallel.of_all(request.signal, pace)
            pace = min(paces)
            losses = [sum(values) / len(values) for values in told.loss]
            validated = [None] * seeds
            due = target % config.train.checkpoint_every == 0 or target == last
            if due or any(asked):
                validated = np.atleast_1d(jax.device_get(validation_loss(state, supply))).tolist()
                runs.require_finite({"validation loss": [[x] for x in validated]}, target)
            rate = float(learning_rate(target - 1))
            # Metrics first: lines past the newest checkpoint are dropped on going on, and none
            # before it may be missing.
            runs.append(
                [
                    metrics.Line(
                        loss=loss,
                        step=target,
                        learning_rate=rate,
                        seconds_per_step=seconds,
                        validation_loss=value,
                    )
                    for loss, value in zip(losses, validated, strict=True)
                ]
            )
            if due or any(asked):
                runs.save(state)
            runs.step = target
            status = f"loss {sum(losses) / seeds:.4f}, learning rate {rate:.1e}"
            shown.advance(target - step, status)
    runs.close()
    if any(asked):
        raise interruption.Stopped(
            max(asked),
            f"step {runs.step:,} of {last:,} is kept in {runs.path}; the same command, without"
            " --fresh, goes on from there",
        )
    return _apart(parallel.on_first_device(state, config.parallel))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.train",
        description="Train a model, or go on with a training, and score it.",
    )
    add_words(parser, default="quickstart")
    parser.add_argument(
        "--run", type=checkpoint.run_folder, help="the run folder (default: runs/NAME)"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over; a run that is there is moved aside"
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="be one of several processes, as Slurm, Open MPI or JAX_COORDINATOR_ADDRESS,"
        " JAX_NUM_PROCESSES and JAX_PROCESS_ID say",
    )
    arguments = parser.parse_intermixed_args()
    with parallel.one_of_several() if arguments.distributed else contextlib.nullcontext():
        _train_and_score(arguments)


def _train_and_score(arguments: argparse.Namespace) -> None:
    path, overrides = file_and_overrides(arguments)
    specification = read_specification(path, overrides)
    config = specification.config
    # Here, as it compiles training steps of this module.
    from spak_jax.specs.check import require_invariants

    for line in require_invariants(specification, path, overrides):
        console.print(line)
    run_path = arguments.run or Path("runs") / config.name
    if arguments.fresh:
        parallel.by_first(lambda: move_aside(run_path))
    states = train(config, run_path)
    if not parallel.is_first():
        return
    settings = evaluate.Settings.of(config.evaluation)
    runs = zip(states, one_by_one(config), run_folders(config, run_path), strict=True)
    for state, one, path in runs:
        trained = evaluate.Trained(one, state.weights, int(state.step))
        results = evaluate.score_run(trained, settings, path)
        evaluate.write_results(path / checkpoint.RESULTS, results)
        evaluate.print_results(results)
        console.print(f"results: {path / checkpoint.RESULTS}")


def _shapes(config: Config) -> tuple[TrainState, Supply]:
    return jax.eval_shape(lambda: (initial_state(config), make_supply(config)))


def _next_stop(step: int, pace: int, last: int, train: Train) -> int:
    """Where the compiled call that starts after `step` ends, at a checkpoint if one is due."""
    due = (step // train.checkpoint_every + 1) * train.checkpoint_every
    return min(step + pace, due, last)


def _key(seed: jax.Array | int, purpose: str) -> jax.Array:
    """The PRNG key of one purpose; different purposes never share random numbers."""
    purposes = ("weights", "data", "dropout", "validation")
    return jax.random.split(jax_settings.key(seed), 4)[purposes.index(purpose)]


def _apart(state: TrainState) -> list[TrainState]:
    """The state of each seed."""
    if state.seed.ndim == 0:
        return [state]

    def of(i):
        parts = [
            x if axis is None else _take(x, i) for x, axis in zip(state, OVER_SEEDS, strict=True)
        ]
        return TrainState(*parts)

    return [of(i) for i in range(state.seed.size)]


def _take(tree, i: int):
    return jax.tree.map(lambda x: x[i], tree)


def _together(states: Sequence[TrainState]) -> TrainState:
    """One state of several seeds', all at the same step."""
    if len(states) == 1:
        return states[0]
    stack = lambda *parts: jax.tree.map(lambda *x: jnp.stack(x), *parts)  # noqa: E731
    parts = zip(*states, OVER_SEEDS, strict=True)
    return TrainState(*(x if axis is None else stack(x, *more) for x, *more, axis in parts))


def _require_same_kind(config: Config, run_path: Path) -> None:
    """Raises `InputError` where one run stands in the place of several seeds', or they in its."""
    seeds = config.train.seeds
    if seeds > 1 and checkpoint.steps_in(run_path):
        raise InputError(
            f"{run_path} holds one run, which train.seeds = {seeds} does not go on with; name"
            " another folder with --run, or start over with --fresh"
        )
    begun = [path for path in _seed_folders(run_path) if checkpoint.steps_in(path)]
    if seeds == 1 and begun:
        raise InputError(
            f"{run_path} holds runs of several seeds, which train.seeds = 1 does not go on with;"
            f" name one of them, such as --run {begun[0]}, or start over with --fresh"
        )


def _seed_folders(run_path: Path) -> list[Path]:
    """Those in a run folder that are named as the runs of its seeds."""
    try:
        names = [entry.name for entry in os.scandir(run_path) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"cannot read the run folder {run_path}: {error.strerror}") from None
    return sorted(run_path / name for name in names if re.fullmatch("seed(0|[1-9][0-9]*)", name))


def _behind(config: Config, run_path: Path) -> tuple[Config, Path, int] | None:
    """Seeds to train first, so that all can go on from one step: in which folder, to which step.

    None where all have a checkpoint of the same step, or none has any.
    """
    behind, folders = None, run_folders(config, run_path)
    while True:
        begun = [set(checkpoint.steps_in(path)) for path in folders]
        if not any(begun) or set.intersection(*begun):
            return behind
        newest = max(max(steps, default=0) for steps in begun)
        first, *more = (i for i, steps in enumerate(begun) if newest not in steps)
        # One program trains seeds that follow one another.
        count = 1 + sum(i == first + n for n, i in enumerate(more, start=1))
        config, folders = _some_seeds(config, first, count), folders[first : first + count]
        behind = config, run_path if count > 1 else folders[0], newest


def _some_seeds(config: Config, first: int, count: int) -> Config:
    """The configuration of `count` of its seeds, from the one at place `first` on."""
    train = config.train.model_copy(
        update={"seed": config.train.seed + first, "seeds": count},
    )
    devices = config.parallel.model_copy(
        update={"seeds": math.gcd(config.parallel.seeds, count)},
    )
    return config.model_copy(update={"train": train, "parallel": devices})


def _difference(stored: Config, asked: Config, step: int) -> str | None:
    """What would have made other steps, up to this one, than those done; None for nothing."""
    difference = first_difference(stored, asked, but=BESIDE_THE_STEPS)
    steps = sorted((stored.train.steps, asked.train.steps))
    # The one part of a step that goes by how many there will be.
    soft = asked.model.positions == "learned" and step < positions.SOFT_UNTIL * steps[0]
    if difference or steps[0] == steps[1] or asked.model.positions != "learned" or soft:
        return difference
    return (
        f"train.steps is {stored.train.steps:,} there and {asked.train.steps:,} here, and says when"
        f' the gates of model.positions = "learned" become firm: not after step {step:,} as trained'
    )


class _Runs:
    """The run folders of a training, one a seed, kept at the same steps.

    path: of all of them. step: that the training has reached. Of several processes each reads, and
    the first writes.
    """

    def __init__(self, config: Config, run_path: Path):
        self.path, self.step = run_path, 0
        self._config = config
        self._configs, self._paths = one_by_one(config), run_folders(config, run_path)

    def require_same_training(self, last: int) -> None:
        """Raises `InputError` where a run that is there cannot go on to step `last`."""
        for i, path in enumerate(self._paths):
            steps = checkpoint.steps_in(path)
            if steps:
                self._require_within(steps[-1], last)
                self._restored(i, steps[-1])

    def begin(self, last: int) -> TrainState:
        """The state to go on from: that of the newest checkpoints, or the first one.

        Where there are some, all have one of the same step.

        Raises:
          InputError: the folders are another training's, damaged, or cannot be written, or have
            been trained beyond step `last`.
        """
        begun = [set(checkpoint.steps_in(path)) for path in self._paths]
        common = set.intersection(*begun)
        if common:
            # Where a kill fell between two of them, some runs are a checkpoint ahead.
            self.step = max(common)
            state = _together([self._restored(i, self.step) for i in range(len(begun))])
            self._require_within(self.step, last)
            where = shardings(self._config)
            state = state if where is None else jax.device_put(state, where)
            what = "going on after" if self.step < last else "already trained to"
            console.print(f"{self.path}: {what} step {self.step:,}")
        else:
            state = first_state(self._config)
        self._runs = [checkpoint.Run(path) for path in self._paths]
        for run in self._runs:
            run.drop_after(self.step)
        if not common:
            self.save(state)
        parallel.by_first(lambda: [metrics.cut(path, self.step) for path in self._paths])
        return state

    def _require_within(self, step: int, last: int) -> None:
        if step > last:
            raise InputError(
                f"{self.path} has been trained to step {step:,}, beyond {last:,}: ask for more"
                " train.steps, name another folder with --run, or start over with --fresh"
            )

    def save(self, state: TrainState) -> None:
        """A checkpoint of each seed's run."""
        parts = zip(self._runs, self._configs, _apart(parallel.on_host(state)), strict=True)
        for run, config, one in parts:
            run.save(int(one.step), config, one.weights, one.optimizer)

    def append(self, lines: Sequence[metrics.Line]) -> None:
        """A line for the metrics of each."""
        pairs = zip(self._paths, lines, strict=True)
        parallel.by_first(lambda: [metrics.append(*pair) for pair in pairs])

    def require_finite(self, values: Mapping[str, Sequence[Sequence[float]]], first: int) -> None:
        """Raises `Failure` for the first step at which a number is not finite.

        Args:
          values: by what they are, of each run, by step.
          first: step.
        """
        for i, path in enumerate(self._paths):
            steps = zip(*(of_runs[i] for of_runs in values.values()), strict=True)
            for step, numbers in enumerate(steps, first):
                for name, number in zip(values, numbers, strict=True):
                    if not math.isfinite(number):
                        raise Failure(
                            f"the {name} is {number} at step {step};{self._kept(path)}. A lower"
                            " train.learning_rate, more train.warmup_steps or"
                            ' model.dtype="float32" may help'
                        )

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Within it what JAX says of full memory and lost processes is a `Failure`."""
        try:
            yield
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise Failure(
                    f"out of memory on {evaluate.device_name()} after step {self.step:,}"
                    f" ({first_line(error)});{self._kept(self._paths[0])}. A smaller train.batch or"
                    ' data.row_length, fewer train.seeds, model.dtype="bfloat16" or more devices'
                    " (parallel.data) may help"
                ) from None
            if parallel.is_of_another_process(error):
                raise Failure(
                    f"another process is gone, or cannot be reached, after step {self.step:,}"
                    f" ({first_line(error)});{self._kept(self._paths[0])}. Start all processes"
                    " again to go on from there"
                ) from None
            raise

    def close(self) -> None:
        for run in self._runs:
            run.close()

    def _kept(self, path: Path) -> str:
        steps = checkpoint.steps_in(path)
        if not steps:
            return f" no checkpoint is in {path}"
        return f" the checkpoint of step {steps[-1]} is kept in {path}"

    def _restored(self, i: int, step: int) -> TrainState:
        config, path = self._configs[i], self._paths[i]
        restored = checkpoint.restore(path, optimizer=True, at_most=step)
        difference = _difference(restored.config, config, restored.step)
        if difference:
            raise InputError(
                f"{path} holds a run of another configuration: {difference};"
                " name another folder with --run, or start over with --fresh"
            )
        if restored.optimizer is None:
            raise InputError(f"{path} holds imported weights without an optimizer: it cannot go on")
        like = jax.eval_shape(lambda: initial_state(config))
        try:
            weights = checkpoint.from_named(like.weights, restored.weights)
            optimizer_state = checkpoint.from_named(like.optimizer, restored.optimizer)
        except ValueError as error:
            raise InputError(f"the checkpoint of step {restored.step} in {path}: {error}") from None
        seed = jnp.int32(config.train.seed)
        weights, optimizer_state = jax.device_put((weights, optimizer_state))
        return TrainState(weights, optimizer_state, jnp.int32(restored.step), seed)


def move_aside(run_path: Path) -> None:
    whole = Path(os.path.abspath(run_path))
    if Path.cwd().is_relative_to(whole):
        raise InputError(
            f"--fresh cannot move {run_path} aside: this program was started in it; start it in"
            " another folder, or name another run"
        )
    try:
        if not run_path.exists():
            return
        number = 1
        while (aside := whole.with_name(f"{whole.name}.old-{number}")).exists():
            number += 1
        # Not away from under a training that is under way.
        with contextlib.ExitStack() as held:
            for folder in (run_path, *_seed_folders(run_path)):
                held.enter_context(checkpoint.locked(folder))
            whole.rename(aside)
    except OSError as error:
        raise InputError(f"cannot move {run_path} aside: {error.strerror}") from None
    console.print(f"the run in {run_path} is now in {aside}")


if __name__ == "__main__":
    run_program(main)
