"""Sorting: the symbols of a sequence are to be written in order."""

import jax
import jax.numpy as jnp
import numpy as np

from spak_jax.registry import TASKS
from spak_jax.tasks.base import Problems, Task


@TASKS.register("sorting")
class Sorting(Task):
    """`hadb=abdh`.

    The depth is the length: so many rounds sort any sequence where neighbours alone are compared
    and exchanged (odd-even transposition sort, Knuth, The Art of Computer Programming 3, 5.3.4).
    """

    symbols = "abcdefgh"
    kinds = ("all-equal", "sorted", "reverse-sorted")

    def answers(self, problems: Problems):
        symbols, length = problems.inputs[..., 0, :], problems.lengths[..., 0]
        written = jnp.arange(symbols.shape[-1]) < length[..., None]
        # What stands behind the end stays there.
        order = jnp.sort(jnp.where(written, symbols, len(self.symbols)), axis=-1)
        return jnp.where(written, order, 0).astype(jnp.uint8), length

    def solve(self, problem: tuple[str, ...]) -> str:
        return "".join(sorted(problem[0], key=self.symbols.index))

    def sample_kind(
        self, random: np.random.Generator, kind: str, length: int, count: int
    ) -> Problems:
        """`count` problems of one kind: arrays of the host.

        "all-equal", where all symbols are; "sorted", which stay as they are; "reverse-sorted",
        which the answer turns round.
        """
        if kind not in self.kinds:
            return super().sample_kind(random, kind, length, count)
        drawn = random.integers(0, len(self.symbols), (count, 1 if kind == "all-equal" else length))
        order = np.sort(np.broadcast_to(drawn, (count, length)), -1).astype(np.uint8)
        if kind == "reverse-sorted":
            order = order[:, ::-1]
        return Problems(order[:, None], np.full((count, 1), length, np.int32))

    def position_ids(self, tokens: jax.Array) -> jax.Array:
        """The symbols of equal place in problem and answer share an id, 2, 3, 4 ... from the first;
        `=` has 1."""
        return self.aligned_ids(tokens)
