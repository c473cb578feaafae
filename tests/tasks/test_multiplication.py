"""Products on arrays against Python's integers."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spak_jax.registry import TASKS
from spak_jax.tasks import Task

DECIMAL, BINARY = (TASKS.get(name)() for name in ("multiplication", "binary-multiplication"))
WIDTH = 12
answers = jax.jit(lambda problems, task: task.answers(problems), static_argnums=1)


def numbers(base: int):
    """Of up to `WIDTH` digits, every length alike, and those with the longest carries."""
    return st.integers(1, WIDTH).flatmap(
        lambda digits: st.one_of(
            st.integers(0, base**digits - 1),
            st.sampled_from([0, 1, base**digits - 1, base ** (digits - 1)]),
        )
    )


def written(number: int, task: Task) -> str:
    return str(number) if task is DECIMAL else format(number, "b")


@settings(max_examples=30)
@given(
    st.sampled_from([DECIMAL, BINARY]).flatmap(
        lambda task: st.tuples(
            st.just(task), st.lists(st.tuples(*[numbers(task.base)] * 2), min_size=8, max_size=8)
        )
    )
)
def test_products_are_those_of_integers(drawn):
    task, pairs = drawn
    problems = task.pad(task.arrays([[written(n, task) for n in pair] for pair in pairs]), WIDTH)
    products, lengths = map(np.asarray, answers(problems, task))
    for digits, length, (a, b) in zip(products, lengths, pairs, strict=True):
        expected = written(a * b, task)
        assert task.solve((written(a, task), written(b, task))) == expected
        assert "".join(map(str, digits[:length][::-1])) == expected and not digits[length:].any()
    expected = [len(written(a, task)) + len(written(b, task)) for a, b in pairs]
    assert task.depths(problems).tolist() == expected


def test_texts():
    assert DECIMAL.text(("123", "456")) == "321*654=88065\n"
    assert BINARY.text(("110", "101")) == "011*101=01111\n"
    assert DECIMAL.format(DECIMAL.example) == "456*123"
    with pytest.raises(ValueError, match="012 has a leading zero"):
        DECIMAL.parse("012*3", 9)
    with pytest.raises(ValueError, match=r"'12\*3' is not a problem such as 110\*101"):
        BINARY.parse("12*3", 9)


@pytest.mark.parametrize("task", [DECIMAL, BINARY], ids=lambda task: task.name)
def test_the_longest_sums_do_not_overflow(task):
    """(b^n - 1)^2 = b^2n - 2 b^n + 1, where every sum is as large as can be."""
    length = 10_000
    problems = task.sample_kind(np.random.default_rng(0), "highest-digits", length, 1)
    digits, lengths = map(np.asarray, answers(problems, task))
    nine, eight = task.base - 1, task.base - 2
    expected = [1, *[0] * (length - 1), eight, *[nine] * (length - 1)]
    assert digits.tolist() == [expected] and lengths.tolist() == [2 * length]


@pytest.mark.parametrize("task", [DECIMAL, BINARY], ids=lambda task: task.name)
@pytest.mark.parametrize("length", [1, 2, 9])
def test_kinds_are_what_they_say(task, length):
    def drawn(kind: str, order: int):
        problems = task.sample_kind(np.random.default_rng(length), kind, length, 20)
        found = np.asarray(problems.inputs), np.asarray(problems.lengths)
        # The two orders take turns.
        return (array[order::2, [order, 1 - order]] for array in found)

    for order in (0, 1):
        inputs, _ = drawn("highest-digits", order)
        assert (inputs == task.base - 1).all()
        inputs, lengths = drawn("power", order)
        assert (lengths == length).all()
        assert (inputs[:, 1] == (np.arange(length) == length - 1)).all()
        _, lengths = drawn("one-digit", order)
        assert (lengths == [length, 1]).all()
