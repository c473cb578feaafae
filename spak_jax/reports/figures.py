"""Results files to figures and tables.

All input is checked and all output is built in memory before the first file is written.
"""

import contextlib
import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from spak_jax.baseline import COLUMN_LENGTHS
from spak_jax.command_line import InputError, console, write_file
from spak_jax.evaluation.results import Curve, read_results
from spak_jax.evaluation.statistics import Estimate
from spak_jax.reports.grouping import (
    Evaluated,
    gather,
    interval_kind,
    length_unit,
    loop_families,
    origin,
    problem_counts,
    ranges,
    scheme_families,
    seed_note,
    training_families,
)
from spak_jax.reports.tables import latex_table, markdown_table, table_rows

LOG_AXIS_OVER = 40
# A column whose accuracies over all numbers of loops lie closer than this tells nothing of loops.
INFORMATIVE_SPREAD = 0.01
# Of loops at test time: more lines in a panel cannot be distinguished.
MOST_SERIES = 8
NOT_ALL_SERIES = f" At most {MOST_SERIES} lengths a panel are drawn, the others are left out."
# More systems in one panel cannot be read; where there are schemes, their figure has them all.
MOST_LINES = 12

# Okabe and Ito's palette without its yellow, which is lost on white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)))
VALIDATION = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 2.5,
    "markerfacecolor": "white",
    "markeredgewidth": 0.6,
}

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.0,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
    # System names are text; a dollar sign in one is no formula.
    "text.parse_math": False,
}
GREY = "0.45"

# Inches. Single column and one and a half columns of a two-column page.
SINGLE, WIDE = 3.4, 5.2
LEFT, RIGHT = 0.52, 0.18
# Between panels of a row, with tick labels and an axis label there or without.
BESIDE, BESIDE_UNLABELLED = 0.6, 0.2
# Above the axes, for a note in small print and for a line of a title.
NOTE, TITLE_LINE = 0.2, 0.15
# From the axes down to where the legend may begin: tick labels and the axis label.
UNDER_AXES = 0.45
LEGEND_LINE, CAPTION_LINE, PAD = 0.135, 0.11, 0.06
# From one marker of a line to its next.
MARKER_GAP = 0.09
# For a label of the length axis: of two digits, or of up to five on a logarithmic one.
TICK_ROOM, LOG_TICK_ROOM = 0.215, 0.3

SET_APART = "Lines are set slightly apart sideways."
SOME_MARKED = "Markers and bars only where there is room for them."

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

LegendEntry = tuple[Line2D, str]
# By the number of loops.
Series = dict[int, Estimate]
# By the lengths it holds, such as `12` or, of a published column, `5-7`.
SeriesByLength = dict[str, Series]


def draw_generalization(evaluated: Sequence[Evaluated]) -> Figure:
    """Accuracy (%) over length, a line for each system: the baseline's Figure 1."""
    logarithmic = max(line.lengths[-1] for line in evaluated) > LOG_AXIS_OVER
    entries = [
        (_sample(i), line.label + seed_note(map(line.seeds_at, line.lengths)))
        for i, line in enumerate(evaluated)
    ]
    caption = f"{_provenance(evaluated)} Filled markers: trained lengths; open: zero-shot."
    if len(evaluated) > 1:
        caption += f" {SET_APART}"
    if logarithmic:
        caption += f" {SOME_MARKED}"
    figure, [axes] = _canvas(WIDE, 2.3, NOTE, 1, entries, caption)
    _length_axis(axes, evaluated, logarithmic)
    _accuracy_axis(axes)
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
    figure, panels = _canvas(
        WIDE,
        1.15,
        PAD + TITLE_LINE * max(map(len, titles)),
        len(families),
        [(_sample(i), name + seed_note(seeds[name])) for i, name in enumerate(names)],
        f"{_provenance(evaluated)} Lengths: {_inputs(evaluated)}. Shaded, with filled markers:"
        f" trained lengths; open: zero-shot. {SET_APART} {SOME_MARKED}",
        2 if len(families) in (2, 4) else 3,
        BESIDE_UNLABELLED,
    )
    for axes, (_, lines), title in zip(panels, families, titles, strict=True):
        axes.set_title("\n".join(title), pad=4)
        _length_axis(axes, evaluated, logarithmic)
        axes.set_xlabel(length_unit(evaluated))
        _accuracy_axis(axes)
        if not axes.get_subplotspec().is_first_col():
            axes.set_ylabel("")
            axes.tick_params(labelleft=False)
        for line in lines:
            index = names.index(line.label)
            _draw_lengths(axes, line, index, _aside(index, len(names), logarithmic), logarithmic)
        _shade_trained_lengths(axes, lines, logarithmic)
    return figure


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
    figure, panels = _canvas(
        SINGLE if len(families) == 1 else WIDE,
        1.9,
        NOTE + TITLE_LINE * max(map(len, titles)),
        len(families),
        [(_sample(i), _counted(name, unit)) for i, name in enumerate(names)],
        _provenance(members)
        + _left_out([label for label, _ in families], series, informative, unit)
        + (NOT_ALL_SERIES if drawn != informative else ""),
    )
    for axes, (_, lines), title, found in zip(panels, families, titles, drawn, strict=True):
        axes.set_title("\n".join(title), pad=12)
        _loop_axis(axes, lines)
        _accuracy_axis(axes)
        for name, by_loops in found.items():
            filled = [False] * len(by_loops)
            loops, estimates = list(by_loops), list(by_loops.values())
            _draw_estimates(axes, loops, estimates, names.index(name), filled)
    return figure


def draw_training(evaluated: Sequence[Evaluated]) -> Figure | None:
    """Loss (nats a token) over training steps, a line for each run, those of one system alike.

    Returns:
      None where no results file holds a training curve.
    """
    families = training_families(evaluated)
    if not families:
        return None
    entries = [
        (_sample(i, marker=""), family.label + seed_note([len(family.results)]))
        for i, family in families
    ]
    runs = [(i, results) for i, family in families for results in family.results]
    if any(results.training.validation_step for _, results in runs):
        entries.append((Line2D([], [], color=GREY, **VALIDATION), "validation loss"))
    caption = f"{origin([results for _, results in runs])}."
    figure, [axes] = _canvas(WIDE, 2.1, PAD, 1, entries, caption)
    for i, results in runs:
        _draw_curve(axes, results.training, i)
    _loss_axis(axes)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("training (optimizer steps)")
    axes.grid(axis="y")
    return figure


def render(evaluated: Sequence[Evaluated]) -> dict[str, str | bytes]:
    """All files by name; the same contents for the same systems.

    Figures that the results hold nothing for are left out, and so are the tables where there are
    only the user's own problems.
    """
    files: dict[str, str | bytes] = {}
    with style():
        schemes = draw_schemes(evaluated)
        is_crowded = schemes is not None and len(evaluated) > MOST_LINES
        drawings = {
            "generalization": None if is_crowded else draw_generalization(evaluated),
            "schemes": schemes,
            "test_time_loops": draw_test_time_loops(evaluated),
            "training": draw_training(evaluated),
        }
        for name, figure in drawings.items():
            if figure:
                files |= saved(name, figure)
    if table_rows(evaluated):
        files["table.md"] = markdown_table(evaluated)
        files["table.tex"] = latex_table(evaluated)
    return files


def export(paths: Sequence[Path], out: Path) -> None:
    """Draws the figures and writes the tables of results files into a folder.

    Raises:
      InputError: a file is no results file, or the folder cannot be written.
    """
    evaluated, repeats = gather([(path, read_results(path)) for path in paths])
    files = {out / name: content for name, content in render(evaluated).items()}
    for sentence in repeats:
        console.print(sentence)
    for path in files:
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder")
    for path, content in files.items():
        write_file(path, content)
        console.print(f"wrote {path}")


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Within it Matplotlib draws and saves as all figures here are, whatever its settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def saved(name: str, figure: Figure) -> dict[str, bytes]:
    """The files of a figure, `NAME.png` and `NAME.pdf`: the same whenever it is drawn."""
    files = {}
    for kind, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata)
        files[f"{name}.{kind}"] = buffer.getvalue()
    return files


def write_caption(figure: Figure, caption: str) -> None:
    """In small print at the foot of a figure of one wide panel."""
    width, height = figure.get_size_inches()
    text = "\n".join(lines_of(caption, 150))
    figure.text(PAD / width, PAD / height, text, color=GREY, fontsize=6)


def _aside(index: int, count: int, logarithmic: bool) -> float:
    """How far a line is moved sideways so that equal accuracies stay visible side by side."""
    offset = (index - (count - 1) / 2) * min(0.09, 0.5 / count)
    return offset * 0.1 if logarithmic else offset


def _draw_lengths(axes: Axes, line: Evaluated, index: int, aside: float, logarithmic: bool) -> None:
    """An evaluation's accuracies over lengths, on axes whose limits are set."""
    lengths = np.array(line.lengths, float)
    x = lengths * np.exp(aside) if logarithmic else lengths + aside
    estimates = [line.at_length(n) for n in line.lengths]
    _draw_estimates(axes, x, estimates, index, [line.is_zero_shot(n) for n in line.lengths])


def _draw_estimates(
    axes: Axes,
    x: Sequence[float] | np.ndarray,
    estimates: Sequence[Estimate],
    index: int,
    is_open: Sequence[bool],
) -> None:
    """A line through all points, and markers and bars at those that lie far enough apart.

    The axes must have their limits, and x must rise.
    """
    style = _line_style(index)
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


def _accuracy_axis(axes: Axes) -> None:
    axes.set_ylabel("whole answers right (%)")
    # A little more than 0 to 100, so that markers at either end are not cut.
    axes.set_ylim(-3, 103)
    axes.set_yticks(range(0, 101, 20))
    axes.spines["left"].set_bounds(0, 100)
    axes.grid(axis="y")


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


def _loss_axis(axes: Axes) -> None:
    axes.set_yscale("log", nonpositive="mask")
    lowest, highest = axes.get_ylim()
    if highest < 5 * lowest:
        # Within half a decade the steps 1, 2, 5 leave too few ticks.
        locator, label = MaxNLocator(nbins=5), "{:g}".format
    elif highest < 1000 * lowest:
        locator, label = LogLocator(subs=(1, 2, 5)), "{:g}".format
    else:
        locator, label = LogLocator(), _power_of_ten
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: label(y)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("loss (nats a token)")


def _power_of_ten(value: float) -> str:
    return f"10{str(round(math.log10(value))).translate(SUPERSCRIPTS)}"


def _draw_curve(axes: Axes, curve: Curve, index: int) -> None:
    style = _line_style(index) | {"marker": "", "linewidth": 0.8}
    axes.plot(curve.step, curve.loss, **style)
    marks = VALIDATION | {"color": style["color"]}
    axes.plot(curve.validation_step, curve.validation_loss, zorder=3, **marks)


def _line_style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
    }


def _sample(index: int, **changes: str) -> Line2D:
    return Line2D([], [], **(_line_style(index) | changes))


def _canvas(
    width: float,
    height: float,
    above: float,
    panels: int,
    entries: Sequence[LegendEntry],
    caption: str,
    columns: int = 2,
    beside: float = BESIDE,
) -> tuple[Figure, list[Axes]]:
    """A figure with panels, the legend below them and a grey caption below that.

    Everything is measured in inches from the top, so that no text ever lies on another.

    Args:
      width: of the figure.
      height: of each panel's axes.
      above: room above each panel, for titles and notes.
      panels: how many.
      entries: of the legend, in order.
      caption: any length; it is wrapped.
      columns: of panels, where there are so many.
      beside: room between panels of a row.
    """
    columns = min(panels, columns)
    rows = -(-panels // columns)
    characters = int((width - 2 * PAD) / 0.0435)
    text = "\n".join(lines_of(caption, characters))
    labels = ["\n".join(lines_of(label, 80 if width > SINGLE else 50)) for _, label in entries]
    widest = max(len(line) for label in labels for line in label.split("\n"))
    legend_columns = max(1, min(len(labels), int((width + PAD) / (0.53 + 0.05 * widest))))
    deepest = max(label.count("\n") + 1 for label in labels)
    legend_height = -(-len(labels) // legend_columns) * deepest * LEGEND_LINE
    caption_height = (text.count("\n") + 1) * CAPTION_LINE
    top = above + PAD
    below = UNDER_AXES + legend_height + caption_height + 2 * PAD
    row_gap = UNDER_AXES + above
    total = top + rows * height + (rows - 1) * row_gap + below

    figure = Figure(figsize=(width, total))
    FigureCanvasAgg(figure)
    left = LEFT / width
    panel_width = (width - LEFT - RIGHT - (columns - 1) * beside) / columns
    grid = figure.add_gridspec(
        rows,
        columns,
        left=left,
        right=1 - RIGHT / width,
        bottom=below / total,
        top=1 - top / total,
        hspace=row_gap / height,
        wspace=beside / panel_width,
    )
    axes = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(panels)]
    figure.legend(
        [sample for sample, _ in entries],
        # A legend passes over labels that begin with an underscore.
        [f" {label}" if label.startswith("_") else label for label in labels],
        loc="upper left",
        bbox_to_anchor=(PAD / width, (below - UNDER_AXES) / total),
        ncols=legend_columns,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        labelspacing=0.35,
        handlelength=3,
        columnspacing=1.5,
    )
    figure.text(
        PAD / width, PAD / total, text, color=GREY, fontsize=6, va="bottom", linespacing=1.1
    )
    return figure, axes


def lines_of(text: str, width: int) -> list[str]:
    """Text wrapped to lines of at most so many characters."""
    return textwrap.wrap(text, width) or [""]


def _provenance(evaluated: Sequence[Evaluated]) -> str:
    results = [r for line in evaluated for r in line.results]
    kind = interval_kind(evaluated)
    return f"{origin(results)}, {problem_counts(results)}. Bars: {kind}."
