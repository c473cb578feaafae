"""A picture of the loops that problems take against the depth that they need."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from spak_jax.evaluation.calibration import rules_of
from spak_jax.evaluation.loops import Loops
from spak_jax.reports.canvas import TITLE_LINE, WIDE, canvas
from spak_jax.reports.style import COLOURS, GREY

HEIGHT = 1.7
# Square points, of all problems of a length.
LARGEST = 60


def draw(found: dict[str, Any]) -> Figure:
    """One panel for each rule that halts, calibrated on the training distribution: loops of a
    problem's slowest token over its depth, with the line of least squares.

    found: what `spak_jax.evaluation.calibration.measure` gives.
    """
    colours = {length: COLOURS[i % len(COLOURS)] for i, length in enumerate(found["lengths"])}
    entries = [
        (Line2D([], [], color=colour, marker="o", linestyle=""), f"{n} {found['length_unit']}")
        for n, colour in colours.items()
    ]
    entries.append((Line2D([], [], color=GREY), "line of least squares"))
    most = Loops(found["loops"], found["loops_per_symbol"] or 0.0)
    caption = (
        f"{found['system']}: {found['examples']:,} problems a length; areas: shares of them."
        f" At most {most} loops: where none halts, that is what is seen."
        f" Thresholds are calibrated on the training distribution. {found['device']},"
        f" {found['date']}."
    )
    rules = rules_of(found)
    above = 2 * TITLE_LINE
    figure, panels = canvas(WIDE, HEIGHT, above, len(rules), entries, caption)
    for rule, axes in zip(rules, panels, strict=True):
        for length, colour in colours.items():
            # Of hard problems, too, where they were scored.
            for lines in (found["lengths"], *found.get("kinds", {}).values()):
                line = lines[length][rule]
                depths, loops, problems = np.array(line["depths"]).T
                size = LARGEST * problems / line["total"]
                axes.scatter(depths, loops, s=size, color=colour, alpha=0.7, linewidths=0)
        trend, said = found["trends"][rule], "all of one depth"
        if trend["slope"] is not None:
            ends = np.array(axes.get_xlim())
            axes.plot(ends, trend["intercept"] + trend["slope"] * ends, color=GREY, zorder=0)
            said = f"slope {trend['slope']:.2f}"
        if trend["correlation"] is not None:
            said += f", correlation {trend['correlation']:.2f}"
        axes.set_title(f"{rule}\n{said}", loc="left")
        axes.set_xlabel(f"depth ({found['depth_unit']})")
        axes.set_ylim(bottom=0)
        axes.grid()
    panels[0].set_ylabel("loops taken")
    return figure
