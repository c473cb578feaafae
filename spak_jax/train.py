"""Training: `python -m spak_jax.train [CONFIG] [key.path=value ...] [--run DIR] [--fresh]`.

The whole step (data, loss, gradients, optimizer) is one function of the state, and one compiled
call runs many of them. All randomness is folded from the seed and the step number, so a run that
was stopped anywhere goes on as if it never had been.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
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
from spak_jax.config import Config, Train, first_difference, read_config

DEFAULT_CONFIG = Path("configs/quickstart.toml")
VALIDATION_BATCHES = 8
# A compiled call that takes longer leaves its user without news.
SECONDS_PER_CALL = 2.0


class TrainState(NamedTuple):
    """All that changes from step to step: weights, optimizer state, int32 number of steps done."""

    weights: Any
    optimizer: Any
    step: jax.Array


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


def loss(network: model.GPT | model.LoopLM, batch: addition.Batch, key: jax.Array | None):
    """Mean cross-entropy of the answer tokens, over every readout that training supervises.

    Args:
      network: the model.
      batch: rows of text.
      key: PRNG key for dropout; None for none.

    Returns:
      A float32 scalar.
    """
    logits = network.supervised_logits(batch.tokens, key=key)
    targets = jnp.broadcast_to(batch.targets, logits.shape[:-1])
    entropies = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return entropies.mean(0).sum(where=batch.answer) / batch.answer.sum()


def initial_state(config: Config) -> TrainState:
    """Weights from `train.seed`, and an optimizer that has seen nothing."""
    weights = nnx.state(model.build(config, addition.VOCABULARY_SIZE, _key(config, "weights")))
    return TrainState(weights, optimizer(config.train).init(weights), jnp.int32(0))


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
      array of `train.steps_per_call`, NaN beyond `count`. The count is no shape: one program
      serves every count.
    """
    definition, _ = model.abstract(config, addition.VOCABULARY_SIZE, attention)
    update = optimizer(config.train).update
    data_key, dropout_key = _key(config, "data"), _key(config, "dropout")

    def one_step(state: TrainState, supply: Supply):
        batch = addition.training_batch(
            jax.random.fold_in(data_key, state.step),
            config.data,
            config.train.batch,
            supply.training,
        )

        def objective(weights):
            network = nnx.merge(definition, weights)
            return loss(network, batch, jax.random.fold_in(dropout_key, state.step))

        value, gradients = jax.value_and_grad(objective)(state.weights)
        updates, optimizer_state = update(gradients, state.optimizer, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        return TrainState(weights, optimizer_state, state.step + 1), value

    def run_steps(state: TrainState, supply: Supply, count: jax.Array):
        def body(i, carry):
            state, losses = carry
            state, value = one_step(state, supply)
            return state, losses.at[i].set(value)

        losses = jnp.full(config.train.steps_per_call, jnp.nan, jnp.float32)
        return jax.lax.fori_loop(0, count, body, (state, losses))

    return run_steps


def make_validation(config: Config) -> Callable[[Any, Supply], jax.Array]:
    """A pure function of (weights, supply): the loss on held-out problems, without dropout.

    Always the same few batches, so that values of one run can be compared.
    """
    definition, _ = model.abstract(config, addition.VOCABULARY_SIZE)
    keys = jax.random.split(_key(config, "validation"), VALIDATION_BATCHES)

    def validation_loss(weights, supply: Supply):
        network = nnx.merge(definition, weights)

        def one_batch(key):
            rows = addition.training_batch(key, config.data, config.train.batch, supply.held_out)
            return loss(network, rows, None)

        return jax.lax.map(one_batch, keys).mean()

    return validation_loss


def train(config: Config, run_path: Path) -> TrainState:
    """Trains to the last step, from the newest checkpoint in the run folder if there is one.

    Args:
      config: of this run; a checkpoint of another is refused.
      run_path: the run folder.

    Raises:
      InputError: the run folder is another configuration's, damaged, or cannot be written.
      Failure: the loss is no longer finite; the last good checkpoint stays.
    """
    state = initial_state(config)
    begun = bool(checkpoint.steps_in(run_path))
    if begun:
        state = _restored_state(config, run_path, state)
        console.print(f"{run_path}: going on after step {state.step}")
    run = checkpoint.Run(run_path)
    if not begun:
        run.save(0, config, state.weights, state.optimizer)
    metrics = _Metrics(run_path / checkpoint.METRICS, int(state.step))
    supply = make_supply(config)

    started = time.monotonic()
    count = jnp.int32(0)
    run_steps = jax.jit(make_training(config), donate_argnums=0)
    run_steps = run_steps.lower(state, supply, count).compile()
    validation_loss = jax.jit(make_validation(config)).lower(state.weights, supply).compile()
    console.print(
        f"{config.system}: {model.parameter_count(state.weights):,} parameters,"
        f" {config.train.steps:,} steps of {config.train.batch} x {config.data.row_length} tokens"
        f" on {evaluate.device_name()}; compiled in {time.monotonic() - started:.1f} s"
    )

    learning_rate = schedule(config.train)
    step, printed, pace = int(state.step), time.monotonic(), 1
    with progress_bar(config.name) as progress:
        task = progress.add_task("", total=config.train.steps, completed=step, status="")
        while step < config.train.steps:
            target = _next_stop(step, pace, config.train)
            started = time.monotonic()
            state, losses = run_steps(state, supply, jnp.int32(target - step))
            losses = jax.device_get(losses)[: target - step].tolist()
            seconds = (time.monotonic() - started) / len(losses)
            pace = max(1, min(int(SECONDS_PER_CALL / seconds), config.train.steps_per_call))
            for i, value in enumerate(losses):
                _require_finite("loss", value, step + i + 1, run_path)
            line = {
                "step": target,
                "loss": sum(losses) / len(losses),
                "learning_rate": float(learning_rate(target - 1)),
                "seconds_per_step": seconds,
            }
            if target % config.train.checkpoint_every == 0 or target == config.train.steps:
                line["validation_loss"] = float(validation_loss(state.weights, supply))
                _require_finite("validation loss", line["validation_loss"], target, run_path)
            # Metrics first: lines past the newest checkpoint are dropped on going on, and none
            # before it may be missing.
            metrics.append(line)
            if "validation_loss" in line:
                run.save(target, config, state.weights, state.optimizer)
            step = target
            status = (
                f"loss {line['loss']:.4f}  rate {line['learning_rate']:.1e}"
                f"  {1 / seconds:.1f} steps/s"
            )
            progress.update(task, completed=step, status=status)
            if progress.disable and (time.monotonic() - printed > 10 or step >= config.train.steps):
                printed = time.monotonic()
                console.print(f"step {step:,} of {config.train.steps:,}  {status}")
    run.close()
    return state


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
    arguments = parser.parse_intermixed_args()
    config_path, overrides = arguments.config, arguments.overrides
    if "=" in config_path:
        config_path, overrides = str(DEFAULT_CONFIG), [config_path, *overrides]
    config = read_config(Path(config_path), overrides)
    run_path = arguments.run or Path("runs") / config.name
    if arguments.fresh:
        _move_aside(run_path)
    state = train(config, run_path)
    trained = evaluate.Trained(config, state.weights, int(state.step))
    results = evaluate.score_run(trained, evaluate.Settings.of(config.evaluation), run_path)
    evaluate.write_results(run_path / checkpoint.RESULTS, results)
    evaluate.print_results(results)
    console.print(f"results: {run_path / checkpoint.RESULTS}")


def _next_stop(step: int, pace: int, train: Train) -> int:
    """Where the compiled call that starts after `step` ends, at a checkpoint if one is due."""
    due = (step // train.checkpoint_every + 1) * train.checkpoint_every
    return min(step + pace, due, train.steps)


def _require_finite(name: str, value: float, step: int, run_path: Path) -> None:
    if not math.isfinite(value):
        raise Failure(
            f"the {name} is {value} at step {step}; the checkpoint of step"
            f" {checkpoint.steps_in(run_path)[-1]} is kept in {run_path}. A lower"
            ' train.learning_rate, more train.warmup_steps or model.dtype="float32" may help'
        )


def _key(config: Config, purpose: str) -> jax.Array:
    """The PRNG key of one purpose; different purposes never share random numbers."""
    purposes = ("weights", "data", "dropout", "validation")
    return jax.random.split(jax.random.key(config.train.seed), 4)[purposes.index(purpose)]


def _restored_state(config: Config, run_path: Path, like: TrainState) -> TrainState:
    restored = checkpoint.restore(run_path, optimizer=True)
    difference = first_difference(restored.config, config)
    if difference:
        raise InputError(
            f"{run_path} holds a run of another configuration: {difference};"
            " name another folder with --run, or start over with --fresh"
        )
    if restored.optimizer is None:
        raise InputError(f"{run_path} holds imported weights without an optimizer: it cannot go on")
    try:
        weights = checkpoint.from_named(like.weights, restored.weights)
        optimizer_state = checkpoint.from_named(like.optimizer, restored.optimizer)
    except ValueError as error:
        raise InputError(f"the checkpoint of step {restored.step} in {run_path}: {error}") from None
    return TrainState(
        jax.device_put(weights), jax.device_put(optimizer_state), jnp.int32(restored.step)
    )


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
