"""Problems of numbers, written least significant digit first."""

import jax
import jax.numpy as jnp
import numpy as np

from spak_jax.tasks.base import Task, Written, uniform_symbols


class Numbers(Task):
    """Inputs and answers are numbers without leading zeros; `symbols` are the digits."""

    symbols = "0123456789"
    inputs = 2
    unit = "digits"

    @property
    def base(self) -> int:
        return len(self.symbols)

    def sample_input(self, key: jax.Array, at_most: jax.Array, width: int):
        """A number of at most `at_most` digits: first a length, uniform, then a number, uniform.

        Uniform digits make a uniform number; its length is without leading zeros.
        """
        number, _ = super().sample_input(key, at_most, width)
        return number, significant(number)

    def exact_input(self, key: jax.Array, length: int, count: int) -> np.ndarray:
        rest_key, first_key = jax.random.split(key)
        rest = uniform_symbols(rest_key, 0, self.base, (count, length - 1))
        lowest = 0 if length == 1 else 1
        first = uniform_symbols(first_key, lowest, self.base, (count, 1))
        return np.concatenate([rest, first], axis=1)

    def position_ids(self, tokens: jax.Array) -> jax.Array:
        """Ids that tell which digits belong together: those of equal significance share one, of
        operands and answer alike, 2, 3, 4 ... from the least; `=`, which chooses the first digit of
        the answer, has 1, as each digit has one less than the next. The operator and newlines have
        none, 0.
        """
        return self.aligned_ids(tokens)

    def in_written_order(self, sequence: Written) -> Written:
        return sequence[::-1]

    @property
    def example(self) -> tuple[str, ...]:
        return ("456", "123", "789")[: self.inputs]

    def check(self, problem: tuple[str, ...]) -> None:
        for number in problem:
            if len(number) > 1 and number[0] == "0":
                raise ValueError(f"{number} has a leading zero: the models never write one")


def significant(number: jax.Array) -> jax.Array:
    """Digits of numbers `[..., digits]` without leading zeros, at least 1: int32 `[...]`."""
    place = jnp.arange(1, number.shape[-1] + 1)
    return jnp.maximum(1, jnp.where(number > 0, place, 0).max(-1)).astype(jnp.int32)
