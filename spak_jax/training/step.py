"""The training step: data, loss, gradients, optimizer, as one pure function of the state.

One compiled call runs many steps. All randomness is folded from the seed and the step number, so a
run that was stopped anywhere goes on as if it never had been.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pallas_kernels import shards
from spak_jax import jax_settings, models, tasks
from spak_jax.config import Config
from spak_jax.config_sections import Data, Parallel, Train
from spak_jax.data import FixedDataset, make_dataset, training_batch
from spak_jax.registry import POSITIONS
from spak_jax.tasks import Batch, Task
from spak_jax.training import parallel

VALIDATION_BATCHES = 8


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


class StepMetrics(NamedTuple):
    """What a call tells of each of its steps, float32: the loss, and the norm of its gradient.

    Arrays of `train.steps_per_call`, or one such row a seed; 0 beyond the steps that were taken.
    """

    loss: jax.Array
    gradient_norm: jax.Array


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
    network: models.GPT | models.LoopLM | models.GRU,
    batch: Batch,
    task: Task,
    key: jax.Array | None,
    progress: jax.Array | float | None = None,
):
    """Mean cross-entropy of the answer tokens, over every readout that training supervises.

    Where rows are split over devices (`shards`), this device's part of that of all rows.

    Args:
      network: the model.
      batch: rows of text.
      task: that they are of.
      key: PRNG key for dropout; None for none.
      progress: share of the training that is done; None outside it.

    Returns:
      A float32 scalar.
    """
    weights = batch.answer / shards.total(batch.answer.sum())
    ids = task.position_ids(batch.tokens)
    losses = network.supervised_losses(
        batch.tokens, batch.targets, weights, position_ids=ids, key=key, progress=progress
    )
    return losses.mean()


def initial_state(config: Config) -> TrainState:
    """Weights drawn from the seed, or each of the seeds, and an optimizer that has seen nothing."""

    def of_seed(seed):
        weights = nnx.state(models.build(config, _key(seed, "weights")))
        return TrainState(weights, optimizer(config.train).init(weights), jnp.int32(0), seed)

    seed, seeds = jnp.int32(config.train.seed), config.train.seeds
    if seeds == 1:
        return of_seed(seed)
    return jax.vmap(of_seed, out_axes=OVER_SEEDS)(seed + jnp.arange(seeds))


def make_training(
    config: Config, attention: str | None = None
) -> Callable[[TrainState, FixedDataset, jax.Array], Any]:
    """The compiled-call function of a configuration.

    Args:
      config: of the run.
      attention: implementation, as `pallas_kernels.attention` takes it; None the fastest.

    Returns:
      A pure function of (state, dataset, count) that takes `count` steps, at most
      `train.steps_per_call`, and returns the new state and the `StepMetrics`. The count
      is no shape: one program serves every count.
    """
    definition, _ = models.abstract(config, attention)
    task = tasks.of(config.data)
    update = optimizer(config.train).update

    def one_step(state: TrainState, dataset: FixedDataset):
        progress = state.step / config.train.steps
        batch = training_batch(
            jax.random.fold_in(_key(state.seed, "data"), state.step),
            config.data,
            config.train.batch,
            dataset.training,
            progress,
        )
        dropout_key = jax.random.fold_in(_key(state.seed, "dropout"), state.step)

        def objective(weights, batch, dropout_key, progress):
            return loss(nnx.merge(definition, weights), batch, task, dropout_key, progress)

        value, gradients = parallel.value_and_grad(objective, config.parallel)(
            state.weights, batch, dropout_key, progress
        )
        updates, optimizer_state = update(gradients, state.optimizer, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        metrics = StepMetrics(value, optax.tree.norm(gradients))
        return TrainState(weights, optimizer_state, state.step + 1, state.seed), metrics

    every_seed = one_step
    if config.train.seeds > 1:
        every_seed = parallel.over_seeds(
            one_step, config.parallel, in_axes=(OVER_SEEDS, None), out_axes=(OVER_SEEDS, 0)
        )

    def run_steps(state: TrainState, dataset: FixedDataset, count: jax.Array):
        def body(i, carry):
            state, metrics = carry
            state, of_step = every_seed(state, dataset)
            return state, jax.tree.map(lambda x, value: x.at[..., i].set(value), metrics, of_step)

        none = jnp.zeros((*state.seed.shape, config.train.steps_per_call), jnp.float32)
        return jax.lax.fori_loop(0, count, body, (state, StepMetrics(none, none)))

    return run_steps


def make_validation(config: Config) -> Callable[[TrainState, FixedDataset], jax.Array]:
    """A pure function of (state, dataset): the loss on held-out problems, without dropout.

    Always the same few batches, so that values of one run can be compared.
    """
    definition, _ = models.abstract(config)
    task = tasks.of(config.data)

    def objective(weights, batch):
        return loss(nnx.merge(definition, weights), batch, task, None)

    def validation_loss(state: TrainState, dataset: FixedDataset):
        def one_batch(key):
            rows = training_batch(key, config.data, config.train.batch, dataset.held_out)
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


def init_sharded_state(config: Config) -> TrainState:
    """`initial_state` on its devices, compiled as one program: a weight at a time takes seconds."""
    return _initializer(_that_makes_steps(config, config.train.seed))()


def sharded_dataset(config: Config) -> FixedDataset:
    """`make_dataset`, whole on every device."""
    return _dataset_maker(config.data, config.parallel)()


# A program that is kept is not traced again by the next training of a process.
@functools.lru_cache(maxsize=8)
def _initializer(config: Config) -> Callable[[], TrainState]:
    return jax.jit(lambda: initial_state(config), out_shardings=shardings(config))


@functools.lru_cache(maxsize=8)
def _dataset_maker(data: Data, devices: Parallel) -> Callable[[], FixedDataset]:
    return jax.jit(lambda: make_dataset(data), out_shardings=parallel.replicated(devices))


def _that_makes_steps(config: Config, seed: int) -> Config:
    """Without what no program knows: names, how a run is scored, when it is saved, and when it
    ends, unless a step goes by the share of the training that is done."""
    unknown = {"seed": seed, "checkpoint_every": 1}
    if not (config.data.curriculum or POSITIONS.get(config.model.positions).anneals_until):
        unknown["steps"] = 1
    train = config.train.model_copy(update=unknown)
    return config.model_only().model_copy(update={"train": train})


def compiled(config: Config) -> tuple[Callable, Callable]:
    """The programs of `make_training`, which takes its state's memory, and `make_validation`.

    Those of the last configurations are kept. No program knows its seed, which its state has: a
    training of another seed, by another name, for longer or scored otherwise runs the same one.
    """
    return _compiled(_that_makes_steps(config, seed=0))


@functools.lru_cache(maxsize=8)
def _compiled(config: Config) -> tuple[Callable, Callable]:
    where, everywhere = shardings(config), parallel.replicated(config.parallel)
    validation_loss = jax.jit(
        make_validation(config),
        in_shardings=None if where is None else (where, everywhere),
        out_shardings=everywhere,
    )
    return compiled_steps(config), validation_loss.lower(*_shapes(config)).compile()


def compiled_steps(config: Config) -> Callable:
    """The program of `make_training` alone."""
    where, everywhere = shardings(config), parallel.replicated(config.parallel)
    run_steps = jax.jit(
        make_training(config),
        donate_argnums=0,
        in_shardings=None if where is None else (where, everywhere, everywhere),
        out_shardings=None if where is None else (where, everywhere),
    )
    return run_steps.lower(*_shapes(config), jax.ShapeDtypeStruct((), jnp.int32)).compile()


def unstack_seeds(state: TrainState) -> list[TrainState]:
    """The state of each seed."""
    if state.seed.ndim == 0:
        return [state]

    def of(i):
        parts = [
            x if axis is None else _take(x, i) for x, axis in zip(state, OVER_SEEDS, strict=True)
        ]
        return TrainState(*parts)

    return [of(i) for i in range(state.seed.size)]


def stack_seeds(states: Sequence[TrainState]) -> TrainState:
    """One state of several seeds', all at the same step."""
    if len(states) == 1:
        return states[0]
    stack = lambda *parts: jax.tree.map(lambda *x: jnp.stack(x), *parts)  # noqa: E731
    parts = zip(*states, OVER_SEEDS, strict=True)
    return TrainState(*(x if axis is None else stack(x, *more) for x, *more, axis in parts))


def _shapes(config: Config) -> tuple[TrainState, FixedDataset]:
    return jax.eval_shape(lambda: (initial_state(config), make_dataset(config.data)))


def _key(seed: jax.Array | int, purpose: str) -> jax.Array:
    """The PRNG key of one purpose; different purposes never share random numbers."""
    purposes = ("weights", "data", "dropout", "validation")
    return jax.random.split(jax_settings.key(seed), 4)[purposes.index(purpose)]


def _take(tree, i: int):
    return jax.tree.map(lambda x: x[i], tree)
