"""Reversing: a sequence is to be written from its end."""

import jax
import jax.numpy as jnp
import numpy as np

from spak_jax.registry import TASKS
from spak_jax.tasks.base import Problems, Task


@TASKS.register("reversing")
class Reversing(Task):
    """`hadb=bdah`."""

    symbols = "abcdefgh"
    kinds = ("all-equal", "first-alone")

    def answers(self, problems: Problems):
        symbols, length = problems.inputs[..., 0, :], problems.lengths[..., 0]
        place = length[..., None] - 1 - jnp.arange(symbols.shape[-1])
        reverse = jnp.take_along_axis(symbols, jnp.maximum(place, 0), axis=-1)
        return jnp.where(place >= 0, reverse, 0).astype(jnp.uint8), length

    def solve(self, problem: tuple[str, ...]) -> str:
        return problem[0][::-1]

    def sample_kind(
        self, random: np.random.Generator, kind: str, length: int, count: int
    ) -> Problems:
        """`count` problems of one kind: arrays of the host.

        "all-equal", where all symbols are; "first-alone", where the first is another than the rest,
        and has to reach the last place of the answer.
        """
        if kind not in self.kinds:
            return super().sample_kind(random, kind, length, count)
        symbols = len(self.symbols)
        most = random.integers(0, symbols, (count, 1))
        other = (most + random.integers(1, symbols, (count, 1))) % symbols
        alone = (np.arange(length) == 0) & (kind == "first-alone")
        sequences = np.where(alone, other, most).astype(np.uint8)
        return Problems(sequences[:, None], np.full((count, 1), length, np.int32))

    def position_ids(self, tokens: jax.Array) -> jax.Array:
        """A symbol has the same id in problem and answer: from the first on 2, 3, 4 ... in the
        problem, down to 2 in the answer. `=`, which chooses the answer's first symbol, has one more
        than that. What is written beyond the answer has no place, 0. In place, the problem's alone
        are there, and `=` before them has 1.
        """
        if self.in_place:
            return self.aligned_ids(tokens)
        t, axis = jnp.arange(tokens.shape[-1]), tokens.ndim - 1
        start = jax.lax.cummax(jnp.where(tokens == self.end, t + 1, 0), axis=axis)
        equals = jax.lax.cummax(jnp.where(tokens == self.equals, t, -1), axis=axis)
        forth, back = t - start + 2, 2 * equals - start + 2 - t
        ids = jnp.where(equals >= start, back, forth)
        return jnp.where(tokens == self.end, 0, jnp.maximum(ids, 0)).astype(jnp.int32)
