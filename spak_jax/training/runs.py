"""The run folders of a training, one a seed: what is there, what can go on, what is kept."""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from spak_jax import provenance
from spak_jax.command_line import Failure, InputError, console, first_line
from spak_jax.config import Config, first_difference
from spak_jax.config_sections import Parallel
from spak_jax.registry import POSITIONS
from spak_jax.training import checkpoint, loggers, parallel, run_folder
from spak_jax.training.named_arrays import from_named
from spak_jax.training.step import (
    TrainState,
    init_sharded_state,
    initial_state,
    shardings,
    stack_seeds,
    unstack_seeds,
)

# No part of any step: names, and when a training saves, tells, ends and is scored.
BESIDE_THE_STEPS = (
    "name",
    "system",
    "evaluation",
    "train.steps",
    "train.steps_per_call",
    "train.checkpoint_every",
)


def per_seed_configs(config: Config) -> list[Config]:
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
    return [run_path / f"seed{one.train.seed}" for one in per_seed_configs(config)]


def require_same_kind(config: Config, run_path: Path) -> None:
    """Raises `InputError` where one run stands in the place of several seeds', or they in its."""
    seeds = config.train.seeds
    if seeds > 1 and run_folder.steps_in(run_path):
        raise InputError(
            f"{run_path} holds one run, which train.seeds = {seeds} does not go on with; name"
            " another folder with --run, or start over with --fresh"
        )
    begun = [path for path in named_seed_folders(run_path) if run_folder.steps_in(path)]
    if seeds == 1 and begun:
        raise InputError(
            f"{run_path} holds runs of several seeds, which train.seeds = 1 does not go on with;"
            f" name one of them, such as --run {begun[0]}, or start over with --fresh"
        )


def named_seed_folders(run_path: Path) -> list[Path]:
    """Those in a run folder that are named as the runs of its seeds."""
    try:
        names = [entry.name for entry in os.scandir(run_path) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"cannot read the run folder {run_path}: {error.strerror}") from None
    return sorted(run_path / name for name in names if re.fullmatch("seed(0|[1-9][0-9]*)", name))


def seeds_behind(config: Config, run_path: Path) -> tuple[Config, Path, int] | None:
    """Seeds to train first, so that all can go on from one step: in which folder, to which step.

    None where all have a checkpoint of the same step, or none has any.
    """
    behind, folders = None, run_folders(config, run_path)
    while True:
        begun = [set(run_folder.steps_in(path)) for path in folders]
        if not any(begun) or set.intersection(*begun):
            return behind
        newest = max(max(steps, default=0) for steps in begun)
        first, *more = (i for i, steps in enumerate(begun) if newest not in steps)
        # One program trains seeds that follow one another.
        count = 1 + sum(i == first + n for n, i in enumerate(more, start=1))
        config, folders = _consecutive_seeds(config, first, count), folders[first : first + count]
        behind = config, run_path if count > 1 else folders[0], newest


def _consecutive_seeds(config: Config, first: int, count: int) -> Config:
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
    if difference or steps[0] == steps[1]:
        return difference
    differing = f"train.steps is {stored.train.steps:,} there and {asked.train.steps:,} here"
    # What goes by the share of the training that is done.
    if asked.data.curriculum:
        return (
            f"{differing}, and says how fast data.curriculum = {asked.data.curriculum} lets lengths"
            f" grow: not as in the {step:,} steps done"
        )
    anneals_until = POSITIONS.get(asked.model.positions).anneals_until
    if step < anneals_until * steps[0] or not anneals_until:
        return None
    return (
        f"{differing}, and says when the ids of model.positions = {asked.model.positions!r} become"
        f" firm: not after step {step:,} as trained"
    )


class RunFolders:
    """The run folders of a training, one a seed, kept at the same steps.

    path: of all of them. step: that the training has reached. Of several processes each reads, and
    the first writes.
    """

    def __init__(self, config: Config, run_path: Path):
        self.path, self.step = run_path, 0
        self._config = config
        self._configs, self._paths = per_seed_configs(config), run_folders(config, run_path)

    def require_same_training(self, last: int) -> None:
        """Raises `InputError` where a run that is there cannot go on to step `last`."""
        for i, path in enumerate(self._paths):
            steps = run_folder.steps_in(path)
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
        begun = [set(run_folder.steps_in(path)) for path in self._paths]
        common = set.intersection(*begun)
        if common:
            # Where a kill fell between two of them, some runs are a checkpoint ahead.
            self.step = max(common)
            state = stack_seeds([self._restored(i, self.step) for i in range(len(begun))])
            self._require_within(self.step, last)
            where = shardings(self._config)
            state = state if where is None else jax.device_put(state, where)
            what = "going on after" if self.step < last else "already trained to"
            console.print(f"{self.path}: {what} step {self.step:,}")
        else:
            state = init_sharded_state(self._config)
        self._runs = [checkpoint.Run(path) for path in self._paths]
        for run in self._runs:
            run.drop_after(self.step)
        if not common:
            self.save(state)
        parallel.on_primary_process(lambda: [loggers.cut(path, self.step) for path in self._paths])
        return state

    def _require_within(self, step: int, last: int) -> None:
        if step > last:
            raise InputError(
                f"{self.path} has been trained to step {step:,}, beyond {last:,}: ask for more"
                " train.steps, name another folder with --run, or start over with --fresh"
            )

    def save(self, state: TrainState) -> None:
        """A checkpoint of each seed's run."""
        parts = zip(self._runs, self._configs, unstack_seeds(parallel.on_host(state)), strict=True)
        for run, config, one in parts:
            run.save(int(one.step), config, one.weights, one.optimizer)

    def append(self, lines: Sequence[loggers.Line]) -> None:
        """A line for the metrics of each."""
        pairs = zip(self._paths, lines, strict=True)
        parallel.on_primary_process(lambda: [loggers.append(*pair) for pair in pairs])

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
                    f"out of memory on {provenance.device_name()} after step {self.step:,}"
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
        steps = run_folder.steps_in(path)
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
            weights = from_named(like.weights, restored.weights)
            optimizer_state = from_named(like.optimizer, restored.optimizer)
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
            for folder in (run_path, *named_seed_folders(run_path)):
                held.enter_context(run_folder.locked(folder))
            whole.rename(aside)
    except OSError as error:
        raise InputError(f"cannot move {run_path} aside: {error.strerror}") from None
    console.print(f"the run in {run_path} is now in {aside}")
