"""Copying: a sequence is to be written again."""

import jax
import numpy as np

from spak_jax.registry import TASKS
from spak_jax.tasks.base import Problems, Task


@TASKS.register("copying")
class Copying(Task):
    """`hadb=hadb`."""

    symbols = "abcdefgh"
    kinds = ("all-equal", "in-turns")

    def answers(self, problems: Problems):
        return problems.inputs[..., 0, :], problems.lengths[..., 0]

    def solve(self, problem: tuple[str, ...]) -> str:
        return problem[0]

    def sample_kind(
        self, random: np.random.Generator, kind: str, length: int, count: int
    ) -> Problems:
        """`count` problems of one kind: arrays of the host.

        "all-equal", where all symbols are; "in-turns", where two symbols take turns. Who goes by
        what came before loses the place in both.
        """
        if kind not in self.kinds:
            return super().sample_kind(random, kind, length, count)
        symbols = len(self.symbols)
        first = random.integers(0, symbols, (count, 1))
        other = (first + random.integers(1, symbols, (count, 1))) % symbols
        turns = (np.arange(length) % 2 == 1) & (kind == "in-turns")
        sequences = np.where(turns, other, first).astype(np.uint8)
        return Problems(sequences[:, None], np.full((count, 1), length, np.int32))

    def position_ids(self, tokens: jax.Array) -> jax.Array:
        """A symbol and its copy share an id, 2, 3, 4 ... from the first; `=` has 1."""
        return self.aligned_ids(tokens)
