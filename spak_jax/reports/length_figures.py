"""Accuracy over length: in one panel for all systems, or in one for each position scheme."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from spak_jax.reports.accuracy import accuracy_axis, draw_estimates, provenance
from spak_jax.reports.canvas import BESIDE_UNLABELLED, NOTE, PAD, TITLE_LINE, WIDE, canvas, lines_of
from spak_jax.reports.grouping import Evaluated, length_unit, scheme_families, seed_note
from spak_jax.reports.style import GREY, sample

LOG_AXIS_OVER = 40
# For a label of the length axis: of two digits, or of up to five on a logarithmic one.
TICK_ROOM, LOG_TICK_ROOM = 0.215, 0.3

SET_APART = "Lines are set slightly apart sideways."
SOME_MARKED = "Markers and bars only where there is room for them."


def draw_generalization(evaluated: Sequence[Evaluated]) -> Figure:
    """Accuracy (%) over length, a line for each system: the baseline's Figure 1."""
    logarithmic = max(line.lengths[-1] for line in evaluated) > LOG_AXIS_OVER
    entries = [
        (sample(i), line.label + seed_note(map(line.seeds_at, line.lengths)))
        for i, line in enumerate(evaluated)
    ]
    caption = f"{provenance(evaluated)} Filled markers: trained lengths; open: zero-shot."
    if len(evaluated) > 1:
        caption += f" {SET_APART}"
    if logarithmic:
        caption += f" {SOME_MARKED}"
    figure, [axes] = canvas(WIDE, 2.3, NOTE, 1, entries, caption)
    _length_axis(axes, evaluated, logarithmic)
    accuracy_axis(axes)
    for i, line in enumerate(evaluated):
        _draw_lengths(axes, line, i, _aside(i, len(evaluated), logarithmic), logarithmic)
    _mark_trained_lengths(axes, evaluated, logarithmic)
    return figure


def draw_schemes(evaluated: Sequence[Evaluated]) -> Figure | None:
    """Accuracy (%) over length, a panel for each position scheme, a line for each model.

    Returns:
      None where all models know positions by the same scheme.
    """
    families = scheme_families(evaluated)
    if not families:
        return None
    logarithmic = max(line.lengths[-1] for line in evaluated) > LOG_AXIS_OVER
    seeds: dict[str, list[int]] = {}
    for line in (line for _, lines in families for line in lines):
        seeds.setdefault(line.label, []).extend(map(line.seeds_at, line.lengths))
    names = list(seeds)
    titles = [lines_of(title, 24) for title, _ in families]
    figure, panels = canvas(
        WIDE,
        1.15,
        PAD + TITLE_LINE * max(map(len, titles)),
        len(families),
        [(sample(i), name + seed_note(seeds[name])) for i, name in enumerate(names)],
        f"{provenance(evaluated)} Lengths: {_inputs(evaluated)}. Shaded, with filled markers:"
        f" trained lengths; open: zero-shot. {SET_APART} {SOME_MARKED}",
        2 if len(families) in (2, 4) else 3,
        BESIDE_UNLABELLED,
    )
    for axes, (_, lines), title in zip(panels, families, titles, strict=True):
        axes.set_title("\n".join(title), pad=4)
        _length_axis(axes, evaluated, logarithmic)
        axes.set_xlabel(length_unit(evaluated))
        accuracy_axis(axes)
        if not axes.get_subplotspec().is_first_col():
            axes.set_ylabel("")
            axes.tick_params(labelleft=False)
        for line in lines:
            index = names.index(line.label)
            _draw_lengths(axes, line, index, _aside(index, len(names), logarithmic), logarithmic)
        _shade_trained_lengths(axes, lines, logarithmic)
    return figure


def _aside(index: int, count: int, logarithmic: bool) -> float:
    """How far a line is moved sideways so that equal accuracies stay visible side by side."""
    offset = (index - (count - 1) / 2) * min(0.09, 0.5 / count)
    return offset * 0.1 if logarithmic else offset


def _draw_lengths(axes: Axes, line: Evaluated, index: int, aside: float, logarithmic: bool) -> None:
    """An evaluation's accuracies over lengths, on axes whose limits are set."""
    lengths = np.array(line.lengths, float)
    x = lengths * np.exp(aside) if logarithmic else lengths + aside
    estimates = [line.at_length(n) for n in line.lengths]
    draw_estimates(axes, x, estimates, index, [line.is_zero_shot(n) for n in line.lengths])


def _width(axes: Axes) -> float:
    """Inches."""
    return axes.get_position().width * axes.figure.get_figwidth()


def _inputs(evaluated: Sequence[Evaluated]) -> str:
    """Whose symbols a length counts, in words."""
    own, strict = (
        any(bool(line.first.problems) == asked for line in evaluated) for asked in (True, False)
    )
    return {
        (False, True): "every input exactly this long",
        (True, False): "the longest input",
        (True, True): "every input; own problems: the longest one",
    }[own, strict]


def _length_axis(axes: Axes, evaluated: Sequence[Evaluated], logarithmic: bool) -> None:
    axes.set_xlabel(f"{length_unit(evaluated)} ({_inputs(evaluated)})")
    shortest = min(line.lengths[0] for line in evaluated)
    longest = max(line.lengths[-1] for line in evaluated)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(shortest / 1.15, longest * 1.15)
        decade = _width(axes) / math.log10(1.15**2 * longest / shortest)
        subs = (1, 2, 5) if decade > 3 * LOG_TICK_ROOM else (1,)
        most = 1 + int(_width(axes) / LOG_TICK_ROOM)
        axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=most))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(shortest - 0.5, longest + 0.5)
        _integer_ticks(axes, shortest, longest)


def _integer_ticks(axes: Axes, first: int, last: int) -> None:
    room = int(_width(axes) / TICK_ROOM)
    if last - first < room:
        axes.set_xticks(range(first, last + 1))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=min(12, room), integer=True))


def _mark_trained_lengths(axes: Axes, evaluated: Sequence[Evaluated], logarithmic: bool) -> None:
    """Shades the trained lengths and names both sides of its border."""
    edge, has_below, beyond = _shade_trained_lengths(axes, evaluated, logarithmic)
    where = {"transform": axes.get_xaxis_transform(), "color": GREY, "fontsize": 7, "va": "bottom"}
    if has_below:
        axes.text(edge, 1.01, "trained lengths  ", ha="right", **where)
    if beyond:
        axes.text(edge, 1.01, f"  {beyond}", ha="left", **where)


def _shade_trained_lengths(
    axes: Axes, evaluated: Sequence[Evaluated], logarithmic: bool
) -> tuple[float, bool, str]:
    """Shades the lengths below the first zero-shot one and draws the border.

    Returns:
      Where the border is, whether lengths lie below it, and what those above it are.
    """
    left, right = axes.get_xlim()
    zero_shot = {n for line in evaluated for n in line.lengths if line.is_zero_shot(n)}
    trained = {n for line in evaluated for n in line.lengths if not line.is_zero_shot(n)}
    first_beyond = min(zero_shot, default=math.inf)
    below = [n for n in trained if n < first_beyond]
    if not zero_shot:
        edge = right
    elif not below:
        edge = left
    elif logarithmic:
        edge = math.sqrt(max(below) * first_beyond)
    else:
        edge = (max(below) + first_beyond) / 2
    if below:
        axes.axvspan(left, edge, color="0.94", linewidth=0, zorder=0)
    if not zero_shot:
        return edge, bool(below), ""
    axes.axvline(edge, color=GREY, linewidth=0.6, zorder=1)
    # Systems trained on other lengths may share the axes.
    return edge, bool(below), "zero-shot" + " for some" * (len(below) < len(trained))
