"""Word problems of finite groups: the running products of a sequence of elements.

A group that is not solvable, such as A5 or S5, makes this as hard as any problem that circuits of
logarithmic depth solve (Barrington 1989): no stack of a fixed number of blocks is known to solve
all lengths.
"""

import functools
import itertools
import string
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from spak_jax.registry import TASKS
from spak_jax.tasks.base import Problems, Task

# A character for each element, the first for the identity.
CHARACTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits
CHARACTERS += "".join(c for c in map(chr, range(0xC0, 0x180)) if c.isalpha())


class GroupProducts(Task):
    """`bca=bed`: each answer symbol is the product of the elements up to its place.

    A group of one's own is a subclass with its multiplication table, registered:

        @TASKS.register("z4")
        class Z4(GroupProducts, table=[[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]]):
            pass
    """

    unit = "elements"
    kinds = ("first-element",)
    # `table[a][b]`, the product of the elements a and b; element 0 is the identity.
    table: ClassVar[np.ndarray]

    def __init_subclass__(cls, table, **more):
        """Args: table: int `[order, order]`.

        Raises:
          ValueError: the table is not that of a group whose identity is element 0.
        """
        super().__init_subclass__(**more)
        cls.table = checked_table(table)
        cls.symbols = CHARACTERS[: len(cls.table)]

    def answers(self, problems: Problems):
        table = jnp.asarray(self.table, jnp.uint8)
        products = jax.lax.associative_scan(
            lambda left, right: table[left, right], problems.inputs[..., 0, :], axis=-1
        )
        return products, problems.lengths[..., 0]

    def solve(self, problem: tuple[str, ...]) -> str:
        product, answer = 0, ""
        for element in map(self.symbols.index, problem[0]):
            product = int(self.table[product, element])
            answer += self.symbols[product]
        return answer

    def sample_kind(
        self, random: np.random.Generator, kind: str, length: int, count: int
    ) -> Problems:
        """`count` problems of one kind: arrays of the host.

        "first-element", where identities follow the first element, which must be carried to the
        last place.
        """
        if kind not in self.kinds:
            return super().sample_kind(random, kind, length, count)
        elements = np.zeros((count, 1, length), np.uint8)
        elements[..., 0] = random.integers(1, len(self.table), (count, 1))
        return Problems(elements, np.full((count, 1), length, np.int32))

    def position_ids(self, tokens: jax.Array) -> jax.Array:
        """An element and the product up to it share an id, 2, 3, 4 ... from the first; `=` has
        1."""
        return self.aligned_ids(tokens)


def checked_table(table) -> np.ndarray:
    """A multiplication table, if it is that of a group whose identity is element 0.

    Raises:
      ValueError: saying what it lacks.
    """
    table = np.asarray(table)
    order = np.arange(len(table))
    if table.shape != (len(order), len(order)) or not 2 <= len(order) <= len(CHARACTERS):
        raise ValueError(f"table of shape {table.shape}: square, with 2 to {len(CHARACTERS)} rows")
    if not (np.sort(table) == order).all() or not (np.sort(table.T) == order).all():
        raise ValueError("table: each row and column must hold each element once")
    if not (table[0] == order).all() or not (table[:, 0] == order).all():
        raise ValueError("table: element 0 must be the identity")
    if not (table[table[:, :, None], order] == table[order[:, None, None], table]).all():
        raise ValueError("table: products must be associative")
    return table


@functools.cache
def permutation_table(degree: int, even: bool = False) -> np.ndarray:
    """The table of the permutations of so many things, or of the even ones alone, the identity
    first: the product of a and b does a first."""
    elements = [p for p in itertools.permutations(range(degree)) if not even or _is_even(p)]
    permutations, digits = np.array(elements), degree ** np.arange(degree)
    # Every permutation as a number, so that products are looked up at once: this runs on import.
    index = np.zeros(degree**degree, int)
    index[permutations @ digits] = np.arange(len(elements))
    return index[permutations[:, permutations] @ digits].T


def _is_even(permutation: tuple[int, ...]) -> bool:
    pairs = itertools.combinations(permutation, 2)
    return sum(first > second for first, second in pairs) % 2 == 0


@TASKS.register("s3")
class S3(GroupProducts, table=permutation_table(3)):
    """The six permutations of three things."""


@TASKS.register("s4")
class S4(GroupProducts, table=permutation_table(4)):
    """The 24 permutations of four things; solvable."""


@TASKS.register("a5")
class A5(GroupProducts, table=permutation_table(5, even=True)):
    """The 60 even permutations of five things; the smallest group that is not solvable."""


@TASKS.register("s5")
class S5(GroupProducts, table=permutation_table(5)):
    """The 120 permutations of five things."""
