"""Accuracies and their 95% intervals."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from spak_jax.evaluation.results import Score

# SciPy is imported where it is used: it takes a third of what `solve`, which scores nothing, would
# wait for before it starts.

CONFIDENCE = 0.95
WILSON = "95% Wilson intervals"
OVER_SEEDS = (
    "95% Student intervals of the mean over training seeds, widened where the Wilson interval of"
    " all their problems together reaches further"
)


class Predictions(NamedTuple):
    """Of each problem: whether it was answered right, and loops taken at the tokens that answer.

    correct: bool `[problems]`. loops: float32 `[problems]`, the mean over the answer's tokens.
    """

    correct: np.ndarray
    loops: np.ndarray

    def of(self, chosen: np.ndarray) -> "Predictions":
        """Those of some problems, by a bool array."""
        return Predictions(self.correct[chosen], self.loops[chosen])


class Estimate(NamedTuple):
    """An accuracy, a fraction, its 95% interval, and how many training seeds it comes from."""

    mean: float
    low: float
    high: float
    seeds: int


def summary(predictions: Predictions, **more: Any) -> dict[str, Any]:
    """Counts, accuracy and its 95% Wilson interval (Wilson 1927), mean loops at answer tokens."""
    from scipy.stats import binomtest

    correct, total = int(predictions.correct.sum()), len(predictions.correct)
    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return {
        "correct": correct,
        "total": total,
        "accuracy": correct / total,
        "low": float(interval.low),
        "high": float(interval.high),
        **more,
        "mean_loops": float(predictions.loops.mean()),
    }


def estimate(scores: Sequence[Score]) -> Estimate | None:
    """The accuracy that one score, or one score for each training seed, tells.

    One score keeps its own interval. Several give their mean with Student's interval of the mean
    over seeds, widened where the Wilson interval of the pooled counts reaches further: seeds that
    agree by chance claim no more certainty than their problems allow. No score gives None.
    """
    from scipy.stats import binomtest
    from scipy.stats import t as student_t

    if not scores:
        return None
    if len(scores) == 1:
        return Estimate(scores[0].accuracy, scores[0].low, scores[0].high, 1)
    accuracies = np.array([score.accuracy for score in scores])
    mean = float(accuracies.mean())
    error = float(accuracies.std(ddof=1)) / math.sqrt(len(scores))
    reach = float(student_t.ppf((1 + CONFIDENCE) / 2, len(scores) - 1)) * error
    pooled = binomtest(sum(s.correct for s in scores), sum(s.total for s in scores))
    wilson = pooled.proportion_ci(CONFIDENCE, method="wilson")
    low = max(min(mean - reach, float(wilson.low)), 0.0)
    high = min(max(mean + reach, float(wilson.high)), 1.0)
    return Estimate(mean, low, high, len(scores))
