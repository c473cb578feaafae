"""A figure's panels, legend and caption, laid out in inches, and the files it is saved as."""

import io
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from spak_jax.reports.style import GREY

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

LegendEntry = tuple[Line2D, str]


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


def canvas(
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
