"""Accuracies on a panel: points with their intervals, the axis, and where they come from."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from spak_jax.evaluation.statistics import Estimate
from spak_jax.reports.grouping import Evaluated, interval_kind, origin, problem_counts
from spak_jax.reports.style import line_style

# From one marker of a line to its next.
MARKER_GAP = 0.09


def draw_estimates(
    axes: Axes,
    x: Sequence[float] | np.ndarray,
    estimates: Sequence[Estimate],
    index: int,
    is_open: Sequence[bool],
) -> None:
    """A line through all points, and markers and bars at those that lie far enough apart.

    The axes must have their limits, and x must rise.
    """
    style = line_style(index)
    colour, marker = style["color"], style.pop("marker")
    y = np.array([100 * e.mean for e in estimates])
    # Rounding may leave a bound a hair on the wrong side of the mean.
    below = np.maximum(y - [100 * e.low for e in estimates], 0)
    above = np.maximum([100 * e.high for e in estimates] - y, 0)
    axes.plot(x, y, zorder=2 + index / 100, **style)
    for i in _apart(axes, x):
        bar = [[below[i]], [above[i]]]
        axes.errorbar(x[i], y[i], bar, fmt="none", ecolor=colour, elinewidth=0.7, zorder=2)
        axes.plot(
            x[i],
            y[i],
            marker=marker,
            color=colour,
            markerfacecolor="white" if is_open[i] else colour,
            markeredgewidth=0.8,
            zorder=3 + index / 100,
        )


def _apart(axes: Axes, x: Sequence[float] | np.ndarray) -> list[int]:
    """Indices of rising values that lie MARKER_GAP apart on the axes, first and last among them."""
    inches = axes.transData.transform([(value, 0) for value in x])[:, 0] / axes.figure.dpi
    shown = [0]
    for i, place in enumerate(inches):
        if place >= inches[shown[-1]] + MARKER_GAP:
            shown.append(i)
    return sorted({0, *shown[:-1], len(inches) - 1})


def accuracy_axis(axes: Axes) -> None:
    axes.set_ylabel("whole answers right (%)")
    # A little more than 0 to 100, so that markers at either end are not cut.
    axes.set_ylim(-3, 103)
    axes.set_yticks(range(0, 101, 20))
    axes.spines["left"].set_bounds(0, 100)
    axes.grid(axis="y")


def provenance(evaluated: Sequence[Evaluated]) -> str:
    """Where the accuracies come from, and what their bars are, for a caption."""
    results = [r for line in evaluated for r in line.results]
    kind = interval_kind(evaluated)
    return f"{origin(results)}, {problem_counts(results)}. Bars: {kind}."
