"""Batches: problems drawn from the training distribution and laid out in rows of tokens.

All is pure and runs inside `jit`; what is drawn hangs on a key alone.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spak_jax import jax_settings, tasks
from spak_jax.config_sections import Data
from spak_jax.tasks import Batch, Problems, Task, next_token_batch


class FixedDataset(NamedTuple):
    """Problems drawn once, to train and to validate on; None where every step draws its own."""

    training: Problems | None
    held_out: Problems | None


def sample_training(
    key: jax.Array, data: Data, shape: tuple[int, ...], progress: jax.Array | float = 1.0
) -> Problems:
    """Problems for training: short inputs, and now and then longer "bridge" ones.

    Args:
      key: PRNG key.
      data: the parameters of their distribution.
      shape: of the problems.
      progress: share of the training that is done, which a curriculum goes by.

    Returns:
      Problems in arrays with room for those of length `data.longest`.
    """
    task = tasks.of(data)
    bridge_key, longest_key, *keys = jax.random.split(key, 2 + task.inputs)
    bridge = jax.random.bernoulli(bridge_key, jnp.float32(data.bridge_fraction), shape)
    bridges = jnp.array(data.bridge_lengths, jnp.int32)
    longest = bridges[jax.random.randint(longest_key, shape, 0, bridges.size, dtype=jnp.int32)]
    at_most = jnp.where(bridge, longest, data.max_length)
    if data.curriculum:
        grown = 1 + jnp.int32(data.longest * progress / data.curriculum)
        at_most = jnp.minimum(at_most, grown)
    return task.sample(keys, at_most, data.longest)


@functools.partial(jax.jit, static_argnums=(1, 2))
def sample_published_columns(key: jax.Array, count: int, task: Task) -> Problems:
    """`count` problems that a published table's columns divide: the longest of them, or shorter."""
    longest = max(last for _, last in task.published_columns.values())
    at_most = jnp.full(count, longest, jnp.int32)
    return task.sample(jax.random.split(key, task.inputs), at_most, longest)


def make_dataset(data: Data) -> FixedDataset:
    """The fixed problems of a training, drawn once from `data.seed`.

    Nine tenths of what is drawn trains (`data.examples`), one tenth validates, as in the original.
    """
    if not data.examples:
        return FixedDataset(None, None)
    held_out = data.examples // 9
    drawn = sample_training(jax_settings.key(data.seed), data, (data.examples + held_out,))
    part = lambda start, stop: jax.tree.map(lambda array: array[start:stop], drawn)  # noqa: E731
    return FixedDataset(part(0, data.examples), part(data.examples, None))


def training_batch(
    key: jax.Array,
    data: Data,
    size: int,
    problems: Problems | None,
    progress: jax.Array | float = 1.0,
) -> Batch:
    """Rows of training text, made from a key alone.

    Args:
      key: PRNG key of this batch.
      data: distribution and layout.
      size: of the batch.
      problems: a fixed set to take them from; None draws fresh ones.
      progress: as of `sample_training`.

    Returns:
      A batch of `size` rows of `data.row_length` tokens. Packed rows start at the start of a
      problem, uniformly chosen; those of a fixed set go on with the problems that follow it
      there. A problem that the end of a row cuts still counts as far as it goes.
    """
    task, packed = tasks.of(data), data.layout == "packed"
    problems_a_row = -(-(data.row_length + 1) // task.shortest_text) if packed else 1
    if problems is None:
        chosen = sample_training(key, data, (size, problems_a_row), progress)
    else:
        count = problems.count
        start = jax.random.randint(key, (size, 1), 0, count, dtype=jnp.int32)
        chosen = jax.tree.map(
            lambda array: array[(start + jnp.arange(problems_a_row)) % count], problems
        )
    if packed:
        return next_token_batch(*_pack(chosen, data.row_length + 1, task))
    one_a_row = jax.tree.map(lambda array: array[:, 0], chosen)
    return task.batch(one_a_row, data.row_length)


def _pack(problems: Problems, length: int, task: Task):
    """Texts one after another: problems `[rows, n]` to tokens and mask `[rows, length]`."""
    width = task.text_length(problems.width)
    tokens, answer = task.render(problems, width)
    ends = jnp.cumsum(task.written_lengths(problems), axis=-1)
    t = jnp.arange(length)
    which = (t[None, :, None] >= ends[:, None, :]).sum(-1)
    starts = jnp.pad(ends, [(0, 0), (1, 0)])
    place = which * width + t - jnp.take_along_axis(starts, which, axis=1)

    def gather(array):
        return jnp.take_along_axis(array.reshape(array.shape[0], -1), place, axis=1)

    return gather(tokens), gather(answer)
