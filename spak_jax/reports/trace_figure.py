"""A picture of how a looped model comes to an answer (`spak_jax.evaluation.trace`)."""

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spak_jax.reports.canvas import WIDE, write_caption

WRONG = "; in red with the right one behind it where it is another"


def draw(traced: dict[str, Any]) -> Figure:
    """A panel of attention for each loop, and confidence by loop below them."""
    loops = traced["loops"]
    read, right, chosen = (traced[part].replace("\n", "¶") for part in ("text", "right", "chosen"))
    confidence, looked = np.array(traced["confidence"]), np.array(traced["looked"])
    width, margin = WIDE + 1.6, 0.45
    panel = 0.35 + 0.075 * len(right)
    below = 0.75 + 0.16 * loops
    height = loops * panel + below + 0.5
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        loops + 1,
        1,
        gridspec_kw={
            "height_ratios": [panel - 0.28] * loops + [0.16 * loops],
            "left": margin / width,
            "right": 1 - 0.75 / width,
            "top": 1 - 0.22 / height,
            "bottom": 0.75 / height,
            "hspace": 0.28 * (loops + 1) / (height - 1.2),
        },
    )
    shown = {"aspect": "auto", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    for loop, panel_axes in enumerate(axes[:-1]):
        image = panel_axes.imshow(looked[loop], cmap="Blues", **shown)
        panel_axes.set_title(f"loop {loop + 1}: attention, mean over heads", loc="left", pad=2)
        _symbols(panel_axes.yaxis, chosen, right)
        _symbols(panel_axes.xaxis, read)
        panel_axes.set_ylabel("chosen symbol")
    bar = figure.add_axes((1 - 0.6 / width, 0.5, 0.12 / width, 0.4))
    figure.colorbar(image, cax=bar)
    sure = axes[-1].imshow(confidence, cmap="Greens", **shown)
    axes[-1].set_title("probability of the right symbol after each loop", loc="left", pad=2)
    _symbols(axes[-1].xaxis, right)
    axes[-1].set_yticks(range(loops), range(1, loops + 1))
    axes[-1].set_ylabel("loop")
    bar = figure.add_axes((1 - 0.6 / width, 0.75 / height, 0.12 / width, 0.16 * loops / height))
    figure.colorbar(sure, cax=bar, ticks=[0, 1])
    caption = (
        f"{traced['system']}: {traced['problem']}, as the model writes it. Chosen: after the"
        f" last loop, behind the right symbols before it{WRONG if chosen != right else ''}."
        f" {traced['device']}, {traced['date']}."
    )
    write_caption(figure, caption)
    return figure


def _symbols(axis, text: str, right: str | None = None) -> None:
    """A tick and a symbol of the text for each row or column; marked where it is not the right
    one."""
    right = text if right is None else right
    pairs = list(zip(text, right, strict=True))
    labels = [symbol if symbol == true else f"{symbol} ({true})" for symbol, true in pairs]
    axis.set_ticks(range(len(text)), labels, fontsize=4)
    axis.set_tick_params(length=0, pad=1)
    for label, (symbol, true) in zip(axis.get_ticklabels(), pairs, strict=True):
        if symbol != true:
            label.set_color("red")
