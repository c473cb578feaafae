"""Prefix parity: after each bit, whether the ones so far are odd in number."""

import jax
import jax.numpy as jnp
import numpy as np

from spak_jax.registry import TASKS
from spak_jax.tasks.base import Problems, Task


@TASKS.register("parity")
class Parity(Task):
    """`1011=1101`: each answer bit is the sum of the bits up to its place, modulo 2."""

    symbols = "01"
    unit = "bits"
    kinds = ("all-ones", "first-one")

    def answers(self, problems: Problems):
        bits = problems.inputs[..., 0, :]
        parities = jnp.cumsum(bits, -1, dtype=jnp.int32) % 2
        return parities.astype(jnp.uint8), problems.lengths[..., 0]

    def solve(self, problem: tuple[str, ...]) -> str:
        answer, odd = "", False
        for bit in problem[0]:
            odd ^= bit == "1"
            answer += "01"[odd]
        return answer

    def sample_kind(
        self, random: np.random.Generator, kind: str, length: int, count: int
    ) -> Problems:
        """`count` problems of one kind: arrays of the host.

        "all-ones", where the parity turns at every bit; "first-one", where the first bit alone is a
        one, and must be carried to the last place.
        """
        if kind not in self.kinds:
            return super().sample_kind(random, kind, length, count)
        one = np.ones(length, bool) if kind == "all-ones" else np.arange(length) == 0
        bits = np.broadcast_to(one, (count, 1, length)).astype(np.uint8)
        return Problems(bits, np.full((count, 1), length, np.int32))

    def kind_count(self, kind: str, count: int) -> int:
        # There is one of each length.
        return 1

    def position_ids(self, tokens: jax.Array) -> jax.Array:
        """A bit and its parity share an id, 2, 3, 4 ... from the first; `=` has 1."""
        return self.aligned_ids(tokens)
