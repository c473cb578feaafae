"""Running products in a group: tables that are none are refused, and those that ship are groups."""

import numpy as np
import pytest

from spak_jax.registry import TASKS
from spak_jax.tasks.groups import GroupProducts, permutation_table

ORDERS = {"s3": 6, "s4": 24, "a5": 60, "s5": 120}


@pytest.mark.parametrize("name", ORDERS)
def test_permutations(name):
    task = TASKS.get(name)()
    assert len(task.symbols) == len(set(task.symbols)) == ORDERS[name]
    assert not set(task.symbols) & set("\n=_")
    identity, last = task.symbols[0], task.symbols[-1]
    assert task.solve((identity * 3,)) == identity * 3
    assert task.solve((last + identity,)) == last + last


def test_the_left_element_acts_first():
    """Swapping the first two things and then the last two moves the first to the end."""
    task = TASKS.get("s3")()
    # In the order of itertools: 012, 021, 102, 120, 201, 210.
    swap_last, swap_first, turned = (task.symbols[i] for i in (1, 2, 4))
    assert task.solve((swap_first + swap_last,)) == swap_first + turned


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t[:-1], "square"),
        (lambda t: np.where(t == 5, 4, t), "each element once"),
        (lambda t: t[::-1], "element 0 must be the identity"),
        (lambda t: np.array([[0, 1, 2, 3, 4], [1, 0, 3, 4, 2], [2, 4, 0, 1, 3], [3, 2, 4, 0, 1],
                             [4, 3, 1, 2, 0]]), "associative"),
    ],
)  # fmt: skip
def test_a_table_that_is_no_group_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        type("Broken", (GroupProducts,), {}, table=change(permutation_table(3)))


def test_a_group_of_ones_own():
    class Z4(GroupProducts, table=(np.arange(4)[:, None] + np.arange(4)) % 4):
        pass

    assert Z4().solve(("bbbb",)) == "bcda"
