"""Hops against their definition, and problems that are made to need them."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from spak_jax.registry import TASKS
from spak_jax.tasks.hops import PLACES

HOPS = TASKS.get("hops")()
answers = jax.jit(HOPS.answers)


def landings(sequence: str) -> list[int]:
    """Where hop after hop leads to, counted from 1, until one leads out of the sequence.

    As it is defined: find(i) is the largest j <= i with X_(j-1) = X_i, or 0.
    """
    x, at = " " + sequence, len(sequence)
    found = []
    while at := max([j for j in range(2, at + 1) if x[j - 1] == x[at]], default=0):
        found.append(at)
    return found


sequences = st.lists(st.integers(1, 3), min_size=2, max_size=29).map(
    lambda steps: "".join("abcd"[i % 4] for i in np.cumsum([0, *steps]))
)


@settings(max_examples=60)
@given(st.lists(sequences.filter(landings), min_size=8, max_size=8), st.integers(0, 10**6))
def test_answers_follow_the_definition(drawn, seed):
    chains = list(map(landings, drawn))
    counts = [1 + seed % len(chain) for chain in chains]
    problems = [(x, "1" * n) for x, n in zip(drawn, counts, strict=True)]
    expected = [x[chain[n - 1] - 1] for x, chain, n in zip(drawn, chains, counts, strict=True)]
    assert [HOPS.solve(problem) for problem in problems] == expected
    arrays = HOPS.pad(HOPS.arrays(problems), 30)
    symbols, lengths = map(np.asarray, answers(arrays))
    assert [HOPS.symbols[i] for i in symbols[:, 0]] == expected and (lengths == 1).all()
    assert HOPS.depths(arrays).tolist() == counts
    for x, chain in zip(drawn, chains, strict=True):
        assert HOPS.parse(f"{x}:{'1' * len(chain)}", 30)
        with pytest.raises(ValueError, match=f"{len(chain) + 1} hops lead out of {x}"):
            HOPS.parse(f"{x}:1{'1' * len(chain)}", 30)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("abba:1", "bb in abba: no letter may stand twice in a row"),
        ("ab1:11", "letters of abcd before the :"),
        ("aba:1a", "a 1 for each hop"),
        ("aba:1=a", "is wrong: it is b"),
        ("abababababababababababab:1", "a problem of 4 hops: at most 3"),
        ("aba:1111", "a problem of 4 hops: at most 3"),
    ],
)
def test_what_is_no_problem_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        HOPS.parse(text, 3)


def texts(problems) -> list[tuple[str, str]]:
    found = []
    for inputs, lengths in zip(*map(np.asarray, problems), strict=True):
        pair = zip(inputs, lengths, strict=True)
        found.append(tuple("".join(HOPS.symbols[i] for i in each[:n]) for each, n in pair))
    return found


@pytest.mark.parametrize("length", [1, 2, 5, 16])
def test_hops_are_as_many_as_asked_for(length):
    exact = texts(HOPS.sample_exact(jax.random.key(length), length, 60))
    random = np.random.default_rng(length)
    long, short = (texts(HOPS.sample_kind(random, kind, length, 30)) for kind in HOPS.kinds)
    for sequence, marks in (*exact, *long, *short):
        assert marks == "1" * length and len(sequence) == PLACES * length
        assert len(landings(sequence)) >= length
    for sequence, _ in long:
        # All the way to the second letter, with no place for another hop.
        assert landings(sequence)[length - 1] == 2
        steps = -np.diff([len(sequence), *landings(sequence)[:length]])
        assert steps[0] == PLACES - 2 and (steps[1:] == PLACES).all()
    for sequence, _ in short:
        assert landings(sequence)[:length] == [len(sequence) - n for n in range(1, length + 1)]
    # Problems differ, and no answer is the likely one.
    assert length < 5 or len(set(exact)) == 60
    assert length < 5 or len({HOPS.solve(problem) for problem in exact}) == 4


def test_letters_are_uniform_where_hops_leave_them_free():
    """With few hops over long sequences nearly all letters are."""
    keys = jax.random.split(jax.random.key(0), 2)
    problems = HOPS.sample(keys, np.full(1_000, 20), 20)
    sequences, lengths = np.asarray(problems.inputs)[:, 0], np.asarray(problems.lengths)
    assert set(lengths[:, 1].tolist()) == set(range(1, 21))
    chosen = (lengths[:, 1] <= 3) & (lengths[:, 0] >= 15 * PLACES)
    pairs = zip(sequences[chosen].astype(int), lengths[chosen, 0], strict=True)
    steps = np.concatenate([np.diff(sequence[:length]) % 4 for sequence, length in pairs])
    assert len(steps) > 2_000
    assert chisquare(np.bincount(steps, minlength=4)[1:]).pvalue > 1e-4


def test_ids_are_places():
    task = TASKS.get("hops")("one-pass")
    ids = task.position_ids(np.array(task.encode("abab:1=__\n")))
    assert ids.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10, 0]
