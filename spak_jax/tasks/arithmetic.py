"""Sums and differences of decimal numbers, written least significant digit first.

123 + 456 = 579 is the text `321+654=975` and a newline. Beside addition there are the addition of
three numbers and subtraction, `321-12=003`, where the first number is never the smaller one and the
answer has as many digits as it has.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spak_jax import baseline
from spak_jax.registry import TASKS
from spak_jax.tasks.base import Problems
from spak_jax.tasks.numbers import Numbers, significant
from spak_jax.tasks.places import over_places


class Arithmetic(Numbers):
    """A number, and others that are added to it or taken from it."""

    operator = "+"
    depth_unit = "places that a carry is handed on"
    # Of what the first number is changed by each of the others.
    sign = 1
    published_columns = baseline.COLUMNS
    # Of a sum of two, whatever the task: what seeds have always drawn hangs on it.
    shortest_text = 6

    def answers(self, problems: Problems):
        """The sums, or differences: uint8 digits `[..., width + 1]` and int32 lengths `[...]`."""
        places, carried = self._places_and_carries(problems)
        pad = [(0, 0)] * (places.ndim - 1)
        total = jnp.pad(places, [*pad, (0, 1)]) + jnp.pad(carried, [*pad, (1, 0)])
        total = (total % 10).astype(jnp.uint8)
        return total, problems.lengths[..., 0] if self.sign < 0 else significant(total)

    def solve(self, problem: tuple[str, ...]) -> str:
        """The answer; differences with the digits of the first number."""
        digits, carries = zip(*self._by_place(problem), strict=True)
        highest = [carries[-1]] if carries[-1] else []
        return "".join(map(str, [*highest, *reversed(digits)]))

    def answer_length(self, length: int) -> int:
        return length + 1

    def measures(self, problems: Problems) -> dict[str, jax.Array]:
        return {"carries": self.carries(problems)}

    def carries(self, problems: Problems):
        """The number of places that carry into the next, or borrow from it, int32 `[...]`."""
        carried, _ = self._carried(problems)
        return (carried != 0).sum(-1, dtype=np.int32)

    def depths(self, problems: Problems):
        """The places that the farthest carry, or borrow, has been handed on, int32 `[...]`.

        A place that carries by its own digits alone hands its carry on by one place, into the next.
        One that carries as it does only because of what comes in, as digits that sum to nine do,
        hands on what came by one more. Without carries it is 0; of 99...9 + 1, with n digits, n.

        In other words, the rounds of a ripple-carry adder: if nothing is carried at first, and in
        every round each place carries what its digits and the round before make it carry, this is
        the first round after which all is right.
        """
        _, handed_on = self._carried(problems)
        return handed_on.max(-1)

    def count_carries(self, problem: Sequence[str]) -> int:
        """How many places carry into the next, or borrow from it: the twin of `carries`."""
        return sum(carry != 0 for _, carry in self._by_place(problem))

    def _by_place(self, problem: Sequence[str]) -> Iterator[tuple[int, int]]:
        """From the least significant place on, the answer's digit and what is carried."""
        carry = 0
        for place in range(max(map(len, problem))):
            first, *others = (int(n[-1 - place]) if place < len(n) else 0 for n in problem)
            carry, digit = divmod(first + self.sign * sum(others) + carry, 10)
            yield digit, carry

    def _places(self, problems: Problems):
        """Of each place the operands' digits added up, or subtracted: int32 `[..., width]`."""
        signs = np.array([1] + [self.sign] * (self.inputs - 1), np.int32)
        return (problems.inputs.astype(np.int32) * signs[:, None]).sum(-2, dtype=np.int32)

    def _carried(self, problems: Problems):
        """What each place carries into the next, and how many places that has been handed on:
        int32 `[..., width]` each, of arrays of the device or of the host."""
        places = self._places(problems)

        def step(xp, state, place):
            alone_before, carry, handed_on = state
            alone, total = place // 10, (place + carry) // 10
            # Places change what comes in by one at most: it was there in the second round, if what
            # the place before carries alone made it so, or came as late as the last of that.
            handed_on = xp.where(total == (place + alone_before) // 10, 2, handed_on + 1)
            handed_on = xp.where(total == alone, total != 0, handed_on)
            return (alone, total, handed_on), (total, handed_on)

        none = places[..., 0] * 0
        return over_places(step, (none, none, none), places)[1]

    def _places_and_carries(self, problems: Problems):
        """`_places`, and what each carries into the next: int32 `[..., width]`."""
        places = self._places(problems)
        least = min(self.sign, 0)
        # Carry look-ahead: a place is a map from what comes in to what goes out, maps of neighbours
        # make the map of both.
        come_in = least + jnp.arange(self.inputs)
        maps = jnp.floor_divide(places[..., None] + come_in, 10) - least

        def join(low, high):
            return jnp.take_along_axis(high, low, axis=-1)

        maps = jax.lax.associative_scan(join, maps, axis=maps.ndim - 2)
        return places, maps[..., -least] + least


@TASKS.register("addition")
class Addition(Arithmetic):
    """`123+456`, with kinds of problems that chance leaves out: `sample_kind`."""

    kinds = ("nines", "all-carry", "no-carry", "lopsided", "chains")

    def sample_kind(
        self, random: np.random.Generator, kind: str, length: int, count: int
    ) -> Problems:
        """`count` additions of one kind: arrays of the host.

        Args:
          random: draws them.
          kind: "nines", 99...9 + 1 and 1 + 99...9 in turns; "all-carry", where every place carries
            into the next; "no-carry", where none does; "lopsided", where the other number has at
            most 3 digits; "chains", where the lowest place carries and all others sum to nine, so
            that they hand it on; of the last four, both orders.
          length: digits of the longer number; of both, for all-carry, no-carry and chains.
          count: of problems.
        """
        shape, place = (count, length), np.arange(length)
        top, low = (place == length - 1) & (length > 1), place == 0
        if kind == "nines":
            a, b = np.full(shape, 9), np.broadcast_to(low, shape)
        elif kind == "lopsided":
            a, b = random.integers(np.broadcast_to(top, shape), 10), random.integers(0, 10, shape)
            b = np.where(place < random.integers(1, min(3, length) + 1, (count, 1)), b, 0)
        elif kind == "all-carry":
            # At the lowest place nothing comes in, and 0 + 9 would not do.
            a = random.integers(np.broadcast_to(top | low, shape), 10)
            b = random.integers(np.maximum(9 - a + low, top), 10)
        elif kind == "no-carry":
            a = random.integers(np.broadcast_to(top, shape), np.where(top, 9, 10))
            b = random.integers(np.broadcast_to(top, shape), 10 - a)
        elif kind == "chains":
            a = random.integers(np.broadcast_to(top | low, shape), np.where(top & ~low, 9, 10))
            b = 9 - a + low
        else:
            return super().sample_kind(random, kind, length, count)
        swap = (np.arange(count) % 2 == 1)[:, None]
        inputs = np.stack([np.where(swap, b, a), np.where(swap, a, b)], -2).astype(np.uint8)
        lengths = np.maximum(1, np.where(inputs > 0, place + 1, 0).max(-1)).astype(np.int32)
        return Problems(inputs, lengths)

    def kind_count(self, kind: str, count: int) -> int:
        # 99...9 + 1 can be written in two ways.
        return min(count, 2) if kind == "nines" else super().kind_count(kind, count)


@TASKS.register("three-operands")
class ThreeOperands(Arithmetic):
    """`123+456+789`."""

    inputs = 3


@TASKS.register("subtraction")
class Subtraction(Arithmetic):
    """`456-123`, never below zero."""

    operator = "-"
    sign = -1

    def arrange(self, inputs, lengths, xp=jnp) -> Problems:
        """The larger number first."""
        a, b = inputs[..., 0, :], inputs[..., 1, :]
        # The highest place where they differ decides.
        highest = xp.where(a != b, xp.arange(1, a.shape[-1] + 1), 0).argmax(-1)[..., None]
        smaller = xp.take_along_axis(a, highest, -1) < xp.take_along_axis(b, highest, -1)
        inputs = xp.where(smaller[..., None], inputs[..., ::-1, :], inputs)
        return Problems(inputs, xp.where(smaller, lengths[..., ::-1], lengths))

    def check(self, problem: tuple[str, ...]) -> None:
        super().check(problem)
        first, second = problem
        if (len(first), first) < (len(second), second):
            raise ValueError(
                f"{self.format(problem)}: the first number must not be the smaller one"
            )
