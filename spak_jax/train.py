"""Training: `python -m spak_jax.train [CONFIG] [key.path=value ...] [--run DIR] [--fresh]`.

The whole step (data, loss, gradients, optimizer) is one function of the state, and one compiled
call runs many of them. All randomness is folded from the seed and the step number, so a run that
was stopped anywhere goes on as if it never had been.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from spak_jax import addition, checkpoint, evaluate, model
from spak_jax.command_line import (
    Failure,
    InputError,
    console,
    progress_bar,
    run_program,
    write_file,
)
from spak_jax.config import Config, Train, first_difference, read_specification

DEFAULT_CONFIG = Path("configs/quickstart.toml")
VALIDATION_BATCHES = 8
# A compiled call that takes longer leaves its user without news.
SECONDS_PER_CALL = 2.0


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

    Args:
      network: the model.
      batch: rows of text.
      key: PRNG key for dropout; None for none.
      progress: share of the training that is done; None outside it.

    Returns:
      A float32 scalar.
    """
    weights = batch.answer / batch.answer.sum()
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
            update={"train": config.train.model_copy(update={"seed": seed, "seeds": 1})}
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
      `train.steps_per_call`, and returns the new state and the float32 loss of each step in an
      array of `train.steps_per_call`, or one such row a seed, NaN beyond `count`. The count is no
      shape: one program serves every count.
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

        def objective(weights):
            progress = state.step / config.train.steps
            return loss(nnx.merge(definition, weights), batch, dropout_key, progress)

        value, gradients = jax.value_and_grad(objective)(state.weights)
        updates, optimizer_state = update(gradients, state.optimizer, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        return TrainState(weights, optimizer_state, state.step + 1, state.seed), value

    every_seed = one_step
    if config.train.seeds > 1:
        every_seed = jax.vmap(one_step, in_axes=(OVER_SEEDS, None), out_axes=(OVER_SEEDS, 0))

    def run_steps(state: TrainState, supply: Supply, count: jax.Array):
        def body(i, carry):
            state, losses = carry
            state, value = every_seed(state, supply)
            return state, losses.at[..., i].set(value)

        losses = jnp.full((*state.seed.shape, config.train.steps_per_call), jnp.nan, jnp.float32)
        return jax.lax.fori_loop(0, count, body, (state, losses))

    return run_steps


def make_validation(config: Config) -> Callable[[TrainState, Supply], jax.Array]:
    """A pure function of (state, supply): the loss on held-out problems, without dropout.

    Always the same few batches, so that values of one run can be compared.
    """
    definition, _ = model.abstract(config, addition.VOCABULARY_SIZE)

    def validation_loss(state: TrainState, supply: Supply):
        network = nnx.merge(definition, state.weights)

        def one_batch(key):
            rows = addition.training_batch(key, config.data, config.train.batch, supply.held_out)
            return loss(network, rows, None)

        keys = jax.random.split(_key(state.seed, "validation"), VALIDATION_BATCHES)
        return jax.lax.map(one_batch, keys).mean()

    if config.train.seeds == 1:
        return validation_loss
    return jax.vmap(validation_loss, in_axes=(OVER_SEEDS, None))


@functools.lru_cache(maxsize=1)
def compiled(config: Config) -> tuple[Callable, Callable]:
    """The programs of `make_training`, which takes its state's memory, and `make_validation`."""
    state = jax.eval_shape(lambda: initial_state(config))
    supply = jax.eval_shape(lambda: make_supply(config))
    run_steps = jax.jit(make_training(config), donate_argnums=0)
    run_steps = run_steps.lower(state, supply, jax.ShapeDtypeStruct((), jnp.int32))
    validation_loss = jax.jit(make_validation(config)).lower(state, supply)
    return run_steps.compile(), validation_loss.compile()


def train(config: Config, run_path: Path, until: int | None = None) -> list[TrainState]:
    """Trains to the last step, from the newest checkpoint in the run folder if there is one.

    Args:
      config: of this run; a checkpoint of another is refused.
      run_path: the run folder; with several seeds, of all of them (`run_folders`).
      until: a step to stop at, with a checkpoint, on the way to the last; None for the last.

    Returns:
      The last state of each seed's training.

    Raises:
      InputError: the run folder is another configuration's, damaged, or cannot be written, or has
        been trained beyond `until`.
      Failure: the loss is no longer finite; the last good checkpoint stays.
    """
    last = config.train.steps if until is None else until
    runs = _Runs(config, run_path)
    state = runs.state
    if state.step > last:
        raise InputError(
            f"{run_path} has been trained to step {state.step:,}, beyond {last:,}; move it aside to"
            " train it again"
        )
    supply = jax.jit(lambda: make_supply(config))()
    started = time.monotonic()
    run_steps, validation_loss = compiled(config)
    seeds = config.train.seeds
    console.print(
        f"{config.system}: {model.parameter_count(state.weights) // seeds:,} parameters,"
        f" {config.train.steps:,} steps of {config.train.batch} x {config.data.row_length} tokens"
        f"{f', {seeds} seeds' if seeds > 1 else ''}"
        f" on {evaluate.device_name()}; compiled in {time.monotonic() - started:.1f} s"
    )

    learning_rate = schedule(config.train)
    step, printed, pace = int(state.step), time.monotonic(), 1
    with progress_bar(config.name) as progress:
        task = progress.add_task("", total=last, completed=step, status="")
        while step < last:
            target = _next_stop(step, pace, last, config.train)
            started = time.monotonic()
            state, losses = run_steps(state, supply, jnp.int32(target - step))
            losses = jnp.atleast_2d(losses)[:, : target - step]
            losses = jax.device_get(losses).tolist()
            seconds = (time.monotonic() - started) / (target - step)
            pace = max(1, min(int(SECONDS_PER_CALL / seconds), config.train.steps_per_call))
            runs.require_finite("loss", losses, step + 1)
            common = {
                "step": target,
                "learning_rate": float(learning_rate(target - 1)),
                "seconds_per_step": seconds,
            }
            lines = [{"loss": sum(values) / len(values), **common} for values in losses]
            checkpointing = target % config.train.checkpoint_every == 0 or target == last
            if checkpointing:
                validated = jnp.atleast_1d(validation_loss(state, supply)).tolist()
                runs.require_finite("validation loss", [[value] for value in validated], target)
                for line, value in zip(lines, validated, strict=True):
                    line["validation_loss"] = value
            # Metrics first: lines past the newest checkpoint are dropped on going on, and none
            # before it may be missing.
            runs.append(lines)
            if checkpointing:
                runs.save(state)
            step = target
            status = (
                f"loss {sum(line['loss'] for line in lines) / seeds:.4f}"
                f"  rate {common['learning_rate']:.1e}  {1 / seconds:.1f} steps/s"
            )
            progress.update(task, completed=step, status=status)
            if progress.disable and (time.monotonic() - printed > 10 or step >= last):
                printed = time.monotonic()
                console.print(f"step {step:,} of {last:,}  {status}")
    runs.close()
    return _apart(state)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.train",
        description="Train a model, or go on with a training, and score it.",
    )
    parser.add_argument(
        "config", nargs="?", help="a TOML file (default: %(default)s)", default=str(DEFAULT_CONFIG)
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="changes to it, in TOML, such as model.loops=24",
    )
    parser.add_argument("--run", type=Path, help="the run folder (default: runs/NAME)")
    parser.add_argument(
        "--fresh", action="store_true", help="start over; a run that is there is moved aside"
    )
    parser.add_argument(
        "--despite-laws", action="store_true", help="train although a law of the file is broken"
    )
    arguments = parser.parse_intermixed_args()
    config_path, overrides = arguments.config, arguments.overrides
    if "=" in config_path:
        config_path, overrides = str(DEFAULT_CONFIG), [config_path, *overrides]
    specification = read_specification(Path(config_path), overrides)
    config = specification.config
    if not arguments.despite_laws:
        # Here, as it compiles training steps of this module.
        from spak_jax.check import require_lawful

        require_lawful(specification, Path(config_path))
    run_path = arguments.run or Path("runs") / config.name
    if arguments.fresh:
        _move_aside(run_path)
    states = train(config, run_path)
    settings = evaluate.Settings.of(config.evaluation)
    runs = zip(states, one_by_one(config), run_folders(config, run_path), strict=True)
    for state, one, path in runs:
        trained = evaluate.Trained(one, state.weights, int(state.step))
        results = evaluate.score_run(trained, settings, path)
        evaluate.write_results(path / checkpoint.RESULTS, results)
        evaluate.print_results(results)
        console.print(f"results: {path / checkpoint.RESULTS}")


def _next_stop(step: int, pace: int, last: int, train: Train) -> int:
    """Where the compiled call that starts after `step` ends, at a checkpoint if one is due."""
    due = (step // train.checkpoint_every + 1) * train.checkpoint_every
    return min(step + pace, due, last)


def _key(seed: jax.Array | int, purpose: str) -> jax.Array:
    """The PRNG key of one purpose; different purposes never share random numbers."""
    purposes = ("weights", "data", "dropout", "validation")
    return jax.random.split(jax.random.key(seed), 4)[purposes.index(purpose)]


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


class _Runs:
    """The run folders of a training, one a seed, kept at the same steps.

    Raises:
      InputError: the folders are another configuration's, damaged, or cannot be written.
    """

    def __init__(self, config: Config, run_path: Path):
        self._configs, self._paths = one_by_one(config), run_folders(config, run_path)
        several = config.train.seeds > 1
        others = [run_path] if several else run_path.glob("seed*")
        if any((path / checkpoint.CHECKPOINTS).is_dir() for path in others):
            raise InputError(
                f"{run_path} holds {'one run' if several else 'runs of several seeds'}, which"
                f" train.seeds = {config.train.seeds} does not go on with; name another folder with"
                " --run, or start over with --fresh"
            )
        begun = [set(checkpoint.steps_in(path)) for path in self._paths]
        common = set.intersection(*begun)
        if any(begun) and not common:
            raise InputError(
                f"{run_path}: the runs of its seeds have no checkpoint of the same step; name"
                " another folder with --run, or start over with --fresh"
            )
        if common:
            # Where a kill fell between two of them, some runs are a checkpoint ahead.
            self.state = _together([self._restored(i, max(common)) for i in range(len(begun))])
            console.print(f"{run_path}: going on after step {self.state.step}")
        else:
            # Compiled as one program: a weight at a time takes seconds.
            self.state = jax.jit(lambda: initial_state(config))()
        step = int(self.state.step)
        self._runs = [checkpoint.Run(path) for path in self._paths]
        for run in self._runs:
            run.drop_after(step)
        if not common:
            self.save(self.state)
        self._metrics = [_Metrics(path / checkpoint.METRICS, step) for path in self._paths]

    def save(self, state: TrainState) -> None:
        """A checkpoint of each seed's run."""
        parts = zip(self._runs, self._configs, _apart(jax.device_get(state)), strict=True)
        for run, config, one in parts:
            run.save(int(one.step), config, one.weights, one.optimizer)

    def append(self, lines: Sequence[dict[str, float]]) -> None:
        """A line for the metrics of each."""
        for metrics, line in zip(self._metrics, lines, strict=True):
            metrics.append(line)

    def require_finite(self, name: str, values: Sequence[Sequence[float]], first: int) -> None:
        """Raises `Failure` where one of a run's values, by step from the first, is not finite."""
        for path, of_run in zip(self._paths, values, strict=True):
            for step, value in enumerate(of_run, first):
                if not math.isfinite(value):
                    raise Failure(
                        f"the {name} is {value} at step {step}; the checkpoint of step"
                        f" {checkpoint.steps_in(path)[-1]} is kept in {path}. A lower"
                        ' train.learning_rate, more train.warmup_steps or model.dtype="float32"'
                        " may help"
                    )

    def close(self) -> None:
        for run in self._runs:
            run.close()

    def _restored(self, i: int, step: int) -> TrainState:
        config, path = self._configs[i], self._paths[i]
        restored = checkpoint.restore(path, optimizer=True, at_most=step)
        difference = first_difference(restored.config, config)
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


def _move_aside(run_path: Path) -> None:
    if not run_path.exists():
        return
    number = 1
    while (aside := run_path.with_name(f"{run_path.name}.old-{number}")).exists():
        number += 1
    try:
        run_path.rename(aside)
    except OSError as error:
        raise InputError(f"cannot move {run_path} to {aside}: {error.strerror}") from None
    console.print(f"the run in {run_path} is now in {aside}")


class _Metrics:
    """The run's JSON lines, cut back to what the checkpoint that we go on from knew."""

    def __init__(self, path: Path, step: int):
        lines = evaluate.read_metrics(path.parent)
        kept = [line for line in lines if line["step"] <= step]
        write_file(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._path = path

    def append(self, line: dict[str, float]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    run_program(main)
