"""Loops taken against the depth that problems need: counts, and the line through them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

# Depth, loops, and how many problems of that depth took so many.
Counts = list[list[int]]


def counts(depths: np.ndarray, loops: np.ndarray) -> Counts:
    """Of each pair that there is `[depth, loops, problems]`, by rising depth and loops.

    depths, loops: int `[problems]`.
    """
    pairs, problems = np.unique(np.stack([depths, loops], 1), axis=0, return_counts=True)
    return np.concatenate([pairs, problems[:, None]], 1).tolist()


def merged(parts: Iterable[Counts]) -> Counts:
    """The counts of several groups of problems together."""
    depths, loops, problems = np.array([line for part in parts for line in part]).T
    return counts(np.repeat(depths, problems), np.repeat(loops, problems))


def trend(found: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How loops follow depth, of `counts`.

    Returns:
      `slope`, the loops for each step of depth, and `intercept`, of the line of least squares, and
      `correlation` (Pearson's); None where all depths, or for the correlation all loops, are one.
    """
    depths, loops, problems = np.array(found).T
    line: dict[str, Any] = {"slope": None, "intercept": None, "correlation": None}
    if len(np.unique(depths)) < 2:
        return line
    slope, intercept = np.polyfit(depths, loops, 1, w=np.sqrt(problems))
    line |= {"slope": float(slope), "intercept": float(intercept)}
    if len(np.unique(loops)) > 1:
        covariance = np.cov(depths, loops, fweights=problems)
        spread = np.sqrt(covariance[0, 0] * covariance[1, 1])
        line["correlation"] = float(covariance[0, 1] / spread)
    return line
