"""A picture of what halting costs and saves (`spak_jax.evaluation.calibration`)."""

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spak_jax.evaluation.calibration import FIXED, NONE, PUBLISHED, rules_of
from spak_jax.reports.canvas import WIDE, write_caption
from spak_jax.reports.style import COLOURS, GREY, MARKERS


def draw(found: dict[str, Any]) -> Figure:
    """Loops of each token of a few problems as a heat map, and accuracy over loops below it."""
    problems = found["drawn"]["problems"]
    tokens, rules = max(len(problem["text"]) for problem in problems), rules_of(found)
    # Without halting all problems of one length take as many.
    loops, width = round(found["swept"][NONE]["row_loops"]), WIDE + 1.6
    heat, curve, above, below = 0.17 * len(problems), 1.7, 0.25, 0.95
    height = above + len(rules) * (heat + 0.45) + curve + below
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    left, right = 0.75 / width, 1 - 0.75 / width
    for i, rule in enumerate(rules):
        bottom = height - above - (i + 1) * heat - i * 0.45
        axes = figure.add_axes((left, bottom / height, right - left, heat / height))
        steps = np.full((len(problems), tokens), np.nan)
        for row, problem in enumerate(problems):
            steps[row, : len(problem["text"])] = problem["steps"][rule]
            for t, symbol in enumerate(problem["text"]):
                dark = problem["steps"][rule][t] > 0.6 * loops
                colour = "white" if dark else "black"
                axes.text(t, row, symbol, ha="center", va="center", fontsize=5, color=colour)
        image = axes.imshow(
            steps, cmap="viridis_r", vmin=1, vmax=loops, aspect="auto", interpolation="nearest"
        )
        axes.set_title(f"loops of each token until its {rule} halts it", loc="left", pad=3)
        axes.set_yticks(range(len(problems)), [str(p["measure"]) for p in problems], fontsize=6)
        axes.set_ylabel(found["drawn"]["measure"])
        axes.set_xticks([])
    bar = figure.add_axes(
        (right + 0.1 / width, (height - above - heat) / height, 0.1 / width, heat / height)
    )
    figure.colorbar(image, cax=bar).set_ticks(sorted({1, loops}))
    axes = figure.add_axes((left, below / height, (right - left) * 0.6, (curve - 0.15) / height))
    for i, rule in enumerate(rules):
        points = sorted((p["row_loops"], 100 * p["accuracy"]) for p in found["swept"][rule])
        style = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 3}
        axes.plot(*zip(*points, strict=True), label=f"{rule}, threshold moved", **style)
        line = found["lengths"][str(found["swept"]["length"])][rule]
        axes.plot(
            line["row_loops"], 100 * line["accuracy"], "o", markersize=8, fillstyle="none",
            color=COLOURS[i],
        )  # fmt: skip
    fixed = found["swept"][FIXED]
    points = [(x["loops"], 100 * x["accuracy"]) for x in fixed]
    axes.plot(*zip(*points, strict=True), color=GREY, label="as many for all rows")
    for name, marker in ((NONE, "x"), (PUBLISHED, "+")):
        line = found["lengths"][str(found["swept"]["length"])][name]
        label = "no halting" if name == NONE else "the baseline's thresholds"
        axes.plot(line["row_loops"], 100 * line["accuracy"], marker, color="black", label=label)
    axes.set_xlabel(f"loops of a row, mean; {found['swept']['length']} {found['length_unit']}")
    axes.set_ylabel("whole answers right (%)")
    axes.grid()
    axes.legend(loc="center left", bbox_to_anchor=(1.04, 0.5), frameon=False)
    caption = (
        f"{found['system']}: {found['examples']:,} problems a length; circles: calibrated on the"
        f" training distribution. {found['device']}, {found['date']}."
    )
    write_caption(figure, caption)
    return figure
