"""Loss over training steps, a line for each run."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from spak_jax.evaluation.results import Curve
from spak_jax.reports.canvas import PAD, WIDE, canvas
from spak_jax.reports.grouping import Evaluated, origin, seed_note, training_families
from spak_jax.reports.style import GREY, line_style, sample

VALIDATION = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 2.5,
    "markerfacecolor": "white",
    "markeredgewidth": 0.6,
}

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def draw_training(evaluated: Sequence[Evaluated]) -> Figure | None:
    """Loss (nats a token) over training steps, a line for each run, those of one system alike.

    Returns:
      None where no results file holds a training curve.
    """
    families = training_families(evaluated)
    if not families:
        return None
    entries = [
        (sample(i, marker=""), family.label + seed_note([len(family.results)]))
        for i, family in families
    ]
    runs = [(i, results) for i, family in families for results in family.results]
    if any(results.training.validation_step for _, results in runs):
        entries.append((Line2D([], [], color=GREY, **VALIDATION), "validation loss"))
    caption = f"{origin([results for _, results in runs])}."
    figure, [axes] = canvas(WIDE, 2.1, PAD, 1, entries, caption)
    for i, results in runs:
        _draw_curve(axes, results.training, i)
    _loss_axis(axes)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("training (optimizer steps)")
    axes.grid(axis="y")
    return figure


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
    style = line_style(index) | {"marker": "", "linewidth": 0.8}
    axes.plot(curve.step, curve.loss, **style)
    marks = VALIDATION | {"color": style["color"]}
    axes.plot(curve.validation_step, curve.validation_loss, zorder=3, **marks)
