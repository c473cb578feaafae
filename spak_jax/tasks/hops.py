"""Hops: induction repeated, where each hop starts from where the last one has led."""

import jax
import jax.numpy as jnp
import numpy as np

from spak_jax.registry import TASKS
from spak_jax.tasks.base import Problems, Task, uniform_symbols
from spak_jax.tasks.places import over_places

LETTERS, MARK = "abcd", "1"
# Letters of a sequence for each hop that its size has room for: about half are hopped over.
PLACES = 6
# A draw gives one of all the letters, and one of those that are not the neighbour.
DRAWS = len(LETTERS) * (len(LETTERS) - 1)


@TASKS.register("hops")
class Hops(Task):
    """`cabcdab:11=a`, p-hop induction (Sanford et al. 2024, Transformers, Parallel Computation,
    and Logarithmic Depth, arXiv 2402.09268).

    A hop leads from a letter to the one behind its last occurrence before. The answer is the letter
    that as many hops as there are marks lead to, from the last one of the sequence. No letter
    stands twice in a row, and no hop leads out of the sequence.

    What grows is the number of hops: a problem of length n has at most n of them, over a sequence
    of at most `6 n` letters, and one of exactly that length has n over `6 n`. Marks stand one by
    one behind the sequence, so that no symbol is new where there are more.
    """

    symbols = LETTERS + MARK
    inputs = 2
    operator = ":"
    unit = "hops"
    kinds = ("long-hops", "short-hops")
    # `aba:1=b` and a newline.
    shortest_text = 8

    def answers(self, problems: Problems):
        sequence, hops = problems.inputs[..., 0, :], problems.lengths[..., 1:]
        place = jnp.arange(1, sequence.shape[-1] + 1)
        follows = jnp.zeros(sequence.shape, jnp.int32)
        for letter in range(len(LETTERS)):
            here = sequence == letter
            behind_last = jax.lax.cummax(jnp.where(here, place, 0), axis=sequence.ndim - 1)
            before = jnp.pad(behind_last[..., :-1], [(0, 0)] * (sequence.ndim - 1) + [(1, 0)])
            follows = jnp.where(here, before, follows)
        # Of 1, 2, 4, 8 ... hops at once.
        at = problems.lengths[..., :1] - 1
        for bit in range(sequence.shape[-1].bit_length()):
            there = jnp.take_along_axis(follows, at, axis=-1)
            at = jnp.where((hops >> bit) % 2 == 1, there, at)
            follows = jnp.take_along_axis(follows, follows, axis=-1)
        return jnp.take_along_axis(sequence, at, axis=-1), jnp.ones_like(hops[..., 0])

    def solve(self, problem: tuple[str, ...]) -> str:
        sequence, marks = problem
        at = len(sequence) - 1
        for _ in marks:
            at = sequence.rindex(sequence[at], 0, at) + 1
        return sequence[at]

    def answer_length(self, length: int) -> int:
        return 1

    def lengths(self, problems: Problems):
        """The size of each problem, int32 `[...]`: its hops, or those that its sequence has room
        for, whichever are more."""
        return (-(-problems.lengths // np.array([PLACES, 1], np.int32))).max(-1)

    def length(self, problem) -> int:
        sequence, marks = problem
        return max(-(-len(sequence) // PLACES), len(marks))

    def depths(self, problems: Problems):
        """The hops, int32 `[...]`: one after another takes a step each. (Every place could as well
        look up where two, four, eight ... hops lead from there, in logarithmically many.)"""
        return problems.lengths[..., 1]

    def text_length(self, length: int) -> int:
        return PLACES * length + length + self.inputs + 2

    def sample(self, keys: jax.Array, at_most: jax.Array, width: int) -> Problems:
        """Problems for training: a number of hops, uniform, over a sequence of a size, uniform, but
        with room for the hops; then the letters.

        Args:
          keys, at_most: as of `Task.sample`; sizes are in hops.
          width: at least every `at_most`; the arrays are `6 * width` wide.
        """
        size_key, draw_key = jax.random.split(keys[0])
        uniform = lambda key: jax.random.randint(  # noqa: E731
            key, at_most.shape, 1, at_most + 1, dtype=jnp.int32
        )
        hops = uniform(keys[1])
        letters = PLACES * jnp.maximum(hops, uniform(size_key))
        shape = (*at_most.shape, PLACES * width)
        draws = jax.random.randint(draw_key, shape, 0, DRAWS, dtype=jnp.int32)
        return _problems(_backwards(draws, hops, letters), letters, hops, jnp)

    def sample_exact(self, key: jax.Array, length: int, count: int) -> Problems:
        """`count` problems of so many hops, over sequences of `6 * length`: arrays of the host."""
        draws = uniform_symbols(key, 0, DRAWS, (count, PLACES * length)).astype(np.int32)
        hops = np.full(count, length, np.int32)
        return _problems(_backwards(draws, hops, PLACES * hops), PLACES * hops, hops, np)

    def sample_kind(
        self, random: np.random.Generator, kind: str, length: int, count: int
    ) -> Problems:
        """`count` problems of one kind, of `length` hops over `6 * length` letters: arrays of the
        host.

        "long-hops", where each leads over as many letters as the next, to the start of the
        sequence; "short-hops", where each leads back by one letter, and all the rest distracts.
        """
        if kind not in self.kinds:
            return super().sample_kind(random, kind, length, count)
        draws = random.integers(0, DRAWS, (count, PLACES * length), np.int32)
        hops = np.full(count, length, np.int32)
        long = kind == "long-hops"
        written = _backwards(draws, hops, PLACES * hops if long else hops + 2, long)
        return _problems(written, PLACES * hops, hops, np)

    def position_ids(self, tokens: jax.Array) -> jax.Array:
        """Each token has its place in the row, 2, 3, 4 ...: those that stand side by side belong
        together, marks too, which can each take one hop on from the last. Newlines have none, 0."""
        place = jnp.arange(2, tokens.shape[-1] + 2, dtype=jnp.int32)
        return jnp.where(tokens == self.end, 0, place)

    @property
    def example(self) -> tuple[str, ...]:
        return ("cabcdab", "11")

    def check(self, problem: tuple[str, ...]) -> None:
        sequence, marks = problem
        if MARK in sequence or set(marks) != {MARK}:
            raise ValueError(
                f"{self.format(problem)}: letters of {LETTERS} before the {self.operator}, and a"
                f" {MARK} for each hop behind it"
            )
        for one, next_one in zip(sequence, sequence[1:], strict=False):
            if one == next_one:
                raise ValueError(f"{one + one} in {sequence}: no letter may stand twice in a row")
        try:
            self.solve(problem)
        except ValueError:
            raise ValueError(f"{len(marks)} hops lead out of {sequence}") from None


def _backwards(draws, hops, room, long: bool = False):
    """Sequences from their last letter to their first, int32 as the draws.

    A letter is uniform, but not its neighbour; where the hops that are left have no place to spare,
    it is the one that the next hop looks for.

    Args:
      draws: int32 `[..., places]`, uniform below `DRAWS`.
      hops: int32 `[...]`, that can be taken from the last letter.
      room: int32 `[...]`, letters that these may take, at least two more than there are hops.
      long: whether each hop is `PLACES` letters long instead.
    """
    spacing = PLACES if long else 1

    def step(xp, state, draw):
        # What the next hop looks for, and the letter that was written last.
        target, behind, left, room = state
        letter = draw % (len(LETTERS) - 1)
        letter = letter + (letter >= behind)
        if long:
            others = (target + 1) % len(LETTERS), (target + 2) % len(LETTERS)
            other = xp.where(others[0] == behind, others[1], others[0])
            letter = xp.where(letter == target, other, letter)
        due = (left > 0) & (room <= spacing * (left - 1) + 1)
        letter = xp.where(due, target, letter)
        found = letter == target
        return (xp.where(found, behind, target), letter, left - found, room - 1), letter

    last = draws[..., 0] % len(LETTERS)
    _, before = over_places(step, (last, last, hops, room - 1), draws[..., 1:])
    xp = np if isinstance(draws, np.ndarray) else jnp
    return xp.concatenate([last[..., None], before], -1)


def _problems(backwards, letters, hops, xp) -> Problems:
    """Problems of sequences from their last letter on, `[..., places]`, their lengths and hops."""
    place = xp.arange(backwards.shape[-1])
    turned = letters[..., None] - 1 - place
    sequence = xp.take_along_axis(backwards, xp.maximum(turned, 0), -1)
    marks = xp.where(place < hops[..., None], len(LETTERS), 0)
    inputs = xp.stack([xp.where(turned >= 0, sequence, 0), marks], -2).astype(xp.uint8)
    return Problems(inputs, xp.stack([letters, hops], -1))
