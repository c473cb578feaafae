"""Loops over depth: what is stored says all, and its line is that of the problems."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spak_jax.evaluation import depths

PROBLEMS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=40)


def counted(problems):
    return depths.counts(*np.array(problems).T)


@given(PROBLEMS, PROBLEMS)
def test_counts_are_those_of_the_problems(some, others):
    found = depths.merged([counted(some), counted(others)])
    assert found == sorted(found)
    assert {(depth, loops): n for depth, loops, n in found} == Counter(some + others)


@given(PROBLEMS)
def test_the_line_is_that_of_all_problems(problems):
    found = depths.trend(counted(problems))
    x, y = (np.array(values, float) for values in zip(*problems, strict=True))
    if x.std() == 0:
        assert set(found.values()) == {None}
        return
    slope = ((x - x.mean()) * (y - y.mean())).mean() / x.var()
    assert found["slope"] == pytest.approx(slope, abs=1e-9)
    assert found["intercept"] == pytest.approx(y.mean() - slope * x.mean(), abs=1e-9)
    if y.std() == 0:
        assert found["correlation"] is None
    else:
        expected = slope * x.std() / y.std()
        assert found["correlation"] == pytest.approx(expected, abs=1e-9)
