"""How figures look: the colours, markers and lines of systems, and Matplotlib's settings."""

import contextlib
from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib.lines import Line2D

# Okabe and Ito's palette without its yellow, which is lost on white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)))

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


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Within it Matplotlib draws and saves as all figures here are, whatever its settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def line_style(index: int) -> dict[str, Any]:
    """The colour, marker and dashes of one line of several."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
    }


def sample(index: int, **changes: str) -> Line2D:
    """What a legend shows of a line."""
    return Line2D([], [], **(line_style(index) | changes))
