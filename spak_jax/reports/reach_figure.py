"""How far a model reaches: accuracy over lengths and loops, a panel for each system."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spak_jax.reports.canvas import CAPTION_LINE, PAD, SINGLE, WIDE, lines_of
from spak_jax.reports.grouping import (
    Evaluated,
    length_unit,
    loop_families,
    origin,
    problem_counts,
    seed_note,
)
from spak_jax.reports.style import GREY

# A grid of fewer numbers of loops, or of lengths, is no grid.
LEAST = 3
# A length is reached where so many answers are right.
REACHED = 0.99
# Inches.
CELL, LABELS, ABOVE, BELOW, BAR = 0.26, 0.62, 0.42, 0.62, 0.5


def draw_reach(evaluated: Sequence[Evaluated]) -> Figure | None:
    """Accuracy as colour over the length of problems and the number of loops, the least number that
    reaches each length marked; stacks of blocks, which have no loops to choose, as one row.

    Returns:
      None where no system was evaluated over at least three lengths and three numbers of loops.
    """
    families = [
        (label, lines)
        for label, lines in loop_families(evaluated)
        if len(lines) >= LEAST and len(_shared_lengths(lines)) >= LEAST
    ]
    if not families:
        return None
    # Beside the grids what has no loops to choose, at the lengths that these show.
    shown = {n for _, lines in families for n in _shared_lengths(lines)}
    stacks = [
        (line.label, [line])
        for line in evaluated
        if line.first.loops is None and len(shown & set(line.lengths)) >= LEAST
    ]
    # Grids stand one above another, and beside them, if there are any, rows.
    sides = [side for side in (families, stacks) if side]
    width = SINGLE if len(sides) == 1 else WIDE
    results = [
        each for side in sides for _, lines in side for line in lines for each in line.results
    ]
    caption = (
        f"{origin(results)}, {problem_counts(results)}. Line: the fewest loops that solve at least"
        f" {REACHED:.0%} of a length's problems. Dashed: the longest trained length."
    )
    text = "\n".join(lines_of(caption, int(width / 0.0435)))
    foot = CAPTION_LINE * (text.count("\n") + 1) + 2 * PAD
    total = foot + max(
        sum(len(lines) * CELL + ABOVE + BELOW for _, lines in side) for side in sides
    )
    figure = Figure(figsize=(width, total))
    FigureCanvasAgg(figure)
    panel_width = (width - BAR - len(sides) * LABELS - 0.1) / len(sides)
    for column, side in enumerate(sides):
        left, top = LABELS + column * (panel_width + LABELS), total
        for label, lines in side:
            own = len(lines) * CELL
            box = left / width, (top - ABOVE - own) / total, panel_width / width, own / total
            image = _draw_panel(figure.add_axes(box), label, lines, shown)
            top -= ABOVE + own + BELOW
    height = len(families[0][1]) * CELL
    bar = figure.add_axes(
        ((width - BAR + 0.05) / width, (total - ABOVE - height) / total, 0.1 / width,
         height / total)
    )  # fmt: skip
    figure.colorbar(image, cax=bar, ticks=[0, 50, 100])
    bar.set_xlabel("%", fontsize=6)
    figure.text(PAD / width, PAD / total, text, color=GREY, fontsize=6, va="bottom")
    return figure


def _draw_panel(axes: Axes, label: str, lines: Sequence[Evaluated], shown: set[int]):
    """The colours of one system, a row for each number of loops; gives the image.

    shown: the lengths that may be.
    """
    lengths = [n for n in _shared_lengths(lines) if n in shown]
    cells = np.array([[line.at_length(n).mean for n in lengths] for line in lines])
    image = axes.imshow(
        100 * cells, origin="lower", aspect="auto", vmin=0, vmax=100, cmap="viridis"
    )
    title = label + seed_note(len(line.results) for line in lines)
    axes.set_title("\n".join(lines_of(title, 46)), pad=4, fontsize=7)
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=4.5)
    axes.set_xlabel(f"{length_unit(lines)} of a problem")
    if lines[0].first.loops is None:
        axes.set_yticks([])
    else:
        axes.set_yticks(range(len(lines)), [f"{line.first.loops:,}" for line in lines])
        axes.set_ylabel("loops")
    for at, row in enumerate(cells):
        for column, accuracy in enumerate(row):
            axes.text(
                column, at, f"{100 * accuracy:.0f}", ha="center", va="center", fontsize=5,
                color="black" if accuracy > 0.6 else "white",
            )  # fmt: skip
    trained = [n for n in lengths if n <= _longest_trained(lines[0])]
    if 0 < len(trained) < len(lengths):
        axes.axvline(len(trained) - 0.5, color=GREY, linestyle="--", linewidth=1)
    # Below the fewest loops that reach each length, above all where none does.
    below = np.where((cells >= REACHED).any(0), (cells >= REACHED).argmax(0), len(cells)) - 0.5
    if len(lines) > 1:
        axes.stairs(below, np.arange(len(lengths) + 1) - 0.5, baseline=None, color="red", lw=1.5)
    return image


def _shared_lengths(lines: Sequence[Evaluated]) -> list[int]:
    """The lengths that every one of these was scored at."""
    return sorted(set.intersection(*(set(line.lengths) for line in lines)))


def _longest_trained(line: Evaluated) -> int:
    return max((n for n in line.lengths if not line.is_zero_shot(n)), default=0)
