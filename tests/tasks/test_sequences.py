"""Copying, reversing and sorting: hard problems, and the ids of a sequence that is turned round."""

import numpy as np
import pytest

from spak_jax.registry import TASKS


def drawn(name: str, kind: str, length: int) -> list[str]:
    """Sequences of a kind, as people write them."""
    task = TASKS.get(name)()
    problems = task.sample_kind(np.random.default_rng(0), kind, length, 40)
    assert (problems.lengths == length).all() and problems.inputs.dtype == np.uint8
    return ["".join(task.symbols[i] for i in sequence) for sequence in problems.inputs[:, 0]]


@pytest.mark.parametrize("name", ["copying", "reversing", "sorting"])
def test_all_equal(name):
    sequences = drawn(name, "all-equal", 7)
    assert {len(set(sequence)) for sequence in sequences} == {1} and len(set(sequences)) > 4


@pytest.mark.parametrize("length", [1, 2, 7])
def test_in_turns(length):
    for sequence in drawn("copying", "in-turns", length):
        assert sequence == (sequence[:2] * length)[:length]
        assert len(set(sequence)) == min(length, 2)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_the_first_alone(length):
    for sequence in drawn("reversing", "first-alone", length):
        assert len(set(sequence[1:])) <= 1 and sequence[0] not in sequence[1:]


def test_sorted_ones():
    for sequence in drawn("sorting", "sorted", 9):
        assert TASKS.get("sorting")().solve((sequence,)) == sequence
    for sequence in drawn("sorting", "reverse-sorted", 9):
        assert TASKS.get("sorting")().solve((sequence,)) == sequence[::-1]
    assert len(set(drawn("sorting", "sorted", 9))) > 30


@pytest.mark.parametrize(
    ("answered", "text", "ids"),
    [
        ("symbol-by-symbol", "abcd=dcba\n\n", [2, 3, 4, 5, 6, 5, 4, 3, 2, 0, 0]),
        ("symbol-by-symbol", "ab=babababab", [2, 3, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0]),
        ("symbol-by-symbol", "ab=ba\nabc=cba\n", [2, 3, 4, 3, 2, 0, 2, 3, 4, 5, 4, 3, 2, 0]),
        ("one-pass", "abcd=_____\n", [2, 3, 4, 5, 6, 5, 4, 3, 2, 1, 0]),
        ("in-place", "=abcd\n", [1, 2, 3, 4, 5, 0]),
    ],
)
def test_ids_of_what_is_reversed_go_down_again(answered, text, ids):
    task = TASKS.get("reversing")(answered)
    assert task.position_ids(np.array(task.encode(text))).tolist() == ids
