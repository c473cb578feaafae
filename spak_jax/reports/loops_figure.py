"""Accuracy over loops at inference, a panel for each system."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spak_jax.baseline import COLUMN_LENGTHS
from spak_jax.evaluation.statistics import Estimate
from spak_jax.reports.accuracy import accuracy_axis, draw_estimates, provenance
from spak_jax.reports.canvas import NOTE, SINGLE, TITLE_LINE, WIDE, canvas, lines_of
from spak_jax.reports.grouping import Evaluated, length_unit, loop_families, ranges, seed_note
from spak_jax.reports.style import GREY, sample

# A column whose accuracies over all numbers of loops lie closer than this tells nothing of loops.
INFORMATIVE_SPREAD = 0.01
# Of loops at test time: more lines in a panel cannot be distinguished.
MOST_SERIES = 8
NOT_ALL_SERIES = f" At most {MOST_SERIES} lengths a panel are drawn, the others are left out."
# By the number of loops.
Series = dict[int, Estimate]
# By the lengths it holds, such as `12` or, of a published column, `5-7`.
SeriesByLength = dict[str, Series]


def draw_test_time_loops(evaluated: Sequence[Evaluated]) -> Figure | None:
    """Accuracy (%) over loops at inference, a panel for each system: the baseline's Figure 2.

    Returns:
      None where no system was evaluated at two numbers of loops.
    """
    families = loop_families(evaluated)
    if not families:
        return None
    series = [_series(lines) for _, lines in families]
    informative = [_informative(found) for found in series]
    drawn = [_readable(found) for found in informative]
    names = sorted({n for found in drawn for n in found}, key=lambda n: int(n.partition("-")[0]))
    members = [line for _, lines in families for line in lines]
    unit = length_unit(members)
    titles = [
        lines_of(label + seed_note(e.seeds for s in found.values() for e in s.values()), 38)
        for (label, _), found in zip(families, drawn, strict=True)
    ]
    figure, panels = canvas(
        SINGLE if len(families) == 1 else WIDE,
        1.9,
        NOTE + TITLE_LINE * max(map(len, titles)),
        len(families),
        [(sample(i), _counted(name, unit)) for i, name in enumerate(names)],
        provenance(members)
        + _left_out([label for label, _ in families], series, informative, unit)
        + (NOT_ALL_SERIES if drawn != informative else ""),
    )
    for axes, (_, lines), title, found in zip(panels, families, titles, drawn, strict=True):
        axes.set_title("\n".join(title), pad=12)
        _loop_axis(axes, lines)
        accuracy_axis(axes)
        for name, by_loops in found.items():
            filled = [False] * len(by_loops)
            loops, estimates = list(by_loops), list(by_loops.values())
            draw_estimates(axes, loops, estimates, names.index(name), filled)
    return figure


def _series(lines: Sequence[Evaluated]) -> SeriesByLength:
    """By column or, where a family has no columns, by length."""
    series: SeriesByLength = {}
    for line in lines:
        for column, held in COLUMN_LENGTHS.items():
            if found := line.in_column(column):
                series.setdefault(held, {})[line.first.loops] = found
    if series:
        return series
    for length in sorted({n for line in lines for n in line.lengths}):
        found = {line.first.loops: line.at_length(length) for line in lines}
        series[str(length)] = {loops: e for loops, e in found.items() if e}
    return series


def _informative(series: SeriesByLength) -> SeriesByLength:
    """Those that change with the number of loops; all of them where none does."""
    means = {name: [e.mean for e in by_loops.values()] for name, by_loops in series.items()}
    changing = [name for name, m in means.items() if max(m) - min(m) >= INFORMATIVE_SPREAD]
    return {name: series[name] for name in changing or series}


def _readable(series: SeriesByLength) -> SeriesByLength:
    """As many as can be read: the shortest, the longest, and lengths spaced evenly in logarithm."""
    if len(series) <= MOST_SERIES:
        return series
    # There are fewer columns than that, so these are lengths.
    lengths = np.array([int(name) for name in series])
    wanted = np.geomspace(lengths.min(), lengths.max(), MOST_SERIES)
    nearest = np.abs(np.log(lengths / wanted[:, None])).argmin(1)
    return {str(n): series[str(n)] for n in lengths[np.unique(nearest)]}


def _counted(name: str, unit: str) -> str:
    """`1 digit`, `5-7 digits`."""
    return f"{name} {unit.removesuffix('s') if name == '1' else unit}"


def _left_out(
    labels: Sequence[str],
    series: Sequence[SeriesByLength],
    drawn: Sequence[SeriesByLength],
    unit: str,
) -> str:
    """A sentence on what loops do not change, by family where there are several."""
    parts = []
    for label, found, shown in zip(labels, series, drawn, strict=True):
        by_percent: dict[str, list[str]] = {}
        for name, by_loops in found.items():
            if name not in shown:
                percent = f"{100 * next(iter(by_loops.values())).mean:.0f}%"
                by_percent.setdefault(percent, []).append(name)
        constant = ", ".join(
            f"{_counted(_together(names), unit)} ({percent})"
            for percent, names in by_percent.items()
        )
        if constant:
            parts.append(f"{label}: {constant}" if len(labels) > 1 else constant)
    if not parts:
        return ""
    return f" Not drawn, as loops change them by less than a point: {'; '.join(parts)}."


def _together(names: Sequence[str]) -> str:
    """`1-4, 7` for the lengths 1, 2, 3, 4, 7; columns one by one."""
    return ranges(map(int, names)) if all(map(str.isdigit, names)) else ", ".join(names)


def _loop_axis(axes: Axes, lines: Sequence[Evaluated]) -> None:
    loops = [line.first.loops for line in lines]
    trained = lines[0].first.config.model.loops
    first, last = min(*loops, trained), max(*loops, trained)
    margin = 0.04 * (last - first) + 0.3
    axes.set_xlim(first - margin, last + margin)
    # Ticks where there are points, unless their labels would run into one another.
    if len(loops) < 2 or np.diff(loops).min() < 0.07 * (last - first):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    else:
        axes.set_xticks(loops)
    axes.set_xlabel("loops at inference")
    axes.axvline(trained, color=GREY, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    where = {"transform": axes.get_xaxis_transform(), "color": GREY, "fontsize": 7}
    axes.text(trained, 1.01, f"trained: {trained}", ha="center", va="bottom", **where)
