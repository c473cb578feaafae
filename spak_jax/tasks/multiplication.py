"""Products of two numbers, written least significant digit first.

123 * 456 = 56088 is the text `321*654=88065` and a newline. Beside the decimal ones there are
binary ones, as the Neural GPU learned them (Kaiser and Sutskever 2016, Neural GPUs Learn
Algorithms).
"""

import jax.numpy as jnp
import numpy as np

from spak_jax.registry import TASKS
from spak_jax.tasks.base import Problems
from spak_jax.tasks.numbers import Numbers, significant
from spak_jax.tasks.places import over_places


@TASKS.register("multiplication")
class Multiplication(Numbers):
    """`123*456`, in decimal."""

    operator = "*"
    kinds = ("highest-digits", "power", "one-digit")
    depth_unit = "places of the product"

    def answers(self, problems: Problems):
        """The products: uint8 digits `[..., 2 * width]` and int32 lengths `[...]`.

        As by hand, for any length: the first number times each digit of the second, from the lowest
        on, is added to the sums of the places so far; the lowest sum is then complete, and leaves.
        No sum is above 81 times the digits of a number: int32 has room for millions of digits.
        """
        first, second = jnp.moveaxis(problems.inputs.astype(jnp.int32), -2, 0)
        # Once the second number is used up, what is left of the sums leaves.
        second = jnp.pad(second, [(0, 0)] * (second.ndim - 1) + [(0, second.shape[-1])])

        def step(xp, state, digit):
            sums, carry = state
            sums = sums + first * digit[..., None]
            complete = sums[..., 0] + carry
            left = xp.concatenate([sums[..., 1:], xp.zeros_like(sums[..., :1])], -1)
            return (left, complete // self.base), complete % self.base

        nothing = jnp.zeros_like(first)
        _, digits = over_places(step, (nothing, nothing[..., 0]), second)
        return digits.astype(jnp.uint8), significant(digits)

    def solve(self, problem: tuple[str, ...]) -> str:
        # Digit by digit: Python's own conversions refuse thousands of them.
        product, answer = 1, ""
        for number in problem:
            value = 0
            for digit in number:
                value = value * self.base + self.symbols.index(digit)
            product *= value
        while product or not answer:
            product, digit = divmod(product, self.base)
            answer = self.symbols[digit] + answer
        return answer

    def answer_length(self, length: int) -> int:
        return 2 * length

    def depths(self, problems: Problems):
        """The digits of both numbers together, int32 `[...]`: so many places the product has.

        Its highest digit may hang on what is carried up from the lowest place of all, and the
        lowest digit of one number is multiplied by the highest of the other. Shifting one number by
        a place in every step, and adding at all places at once, is done in as many steps (Atrubin
        1965, A One-Dimensional Real-Time Iterative Multiplier).
        """
        return problems.lengths.sum(-1, dtype=np.int32)

    def sample_kind(
        self, random: np.random.Generator, kind: str, length: int, count: int
    ) -> Problems:
        """`count` products of one kind: arrays of the host.

        Args:
          random: draws them.
          kind: "highest-digits", 99...9 * 99...9, where sums and carries are as large as can be;
            "power", where one number is 100...0, and the other has to move by all its places;
            "one-digit", where one number has a single digit; of the last two, both orders.
          length: digits of the longer number; of both, but for one-digit.
          count: of problems.
        """
        if kind not in self.kinds:
            return super().sample_kind(random, kind, length, count)
        shape, place = (count, length), np.arange(length)
        top = place == length - 1
        highest = np.full(shape, self.base - 1)
        number = random.integers(np.broadcast_to(top & (length > 1), shape), self.base)
        other = {
            "highest-digits": highest,
            "power": np.broadcast_to(top, shape),
            "one-digit": random.integers(0, self.base, shape) * (place == 0),
        }[kind]
        pair = [highest if kind == "highest-digits" else number, other]
        swap = (np.arange(count) % 2 == 1)[:, None]
        inputs = np.stack([np.where(swap, *pair[::-1]), np.where(swap, *pair)], -2)
        return Problems(inputs.astype(np.uint8), np.asarray(significant(inputs)))

    def kind_count(self, kind: str, count: int) -> int:
        # There is one of each length.
        return 1 if kind == "highest-digits" else super().kind_count(kind, count)


@TASKS.register("binary-multiplication")
class BinaryMultiplication(Multiplication):
    """`101*110`, in binary."""

    symbols = "01"
    unit = "bits"

    @property
    def example(self) -> tuple[str, ...]:
        return ("110", "101")
