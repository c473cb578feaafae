"""A picture of how a looped model comes to an answer that is laid out in rows, as a maze is
(`spak_jax.evaluation.trace`)."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from spak_jax.reports.canvas import CAPTION_LINE, PAD, TITLE_LINE, WIDE, lines_of
from spak_jax.reports.style import GREY

# Of panels: in a row, of loops, and inches between two of them.
COLUMNS, MOST, APART = 4, 7, 0.15
# Of a cell, how much the mark of its answer covers.
MARK = 0.6
# Marks of cells whose answer is another than the right one.
WRONG = "#CC0000"


def draw(traced: dict[str, Any]) -> Figure:
    """A panel with the right answer, and of some loops, the last among them, what was chosen."""
    right, by_loop = traced["right"].rstrip("\n"), traced["chosen_by_loop"]
    columns, colours = traced["raster"]["columns"], traced["raster"]["colours"]
    asked = traced["problem"].replace("/", "")
    loops = panel_loops(len(by_loop))
    answers = [("the right answer", right)]
    answers += [(_title(loop, by_loop[loop - 1], right), by_loop[loop - 1]) for loop in loops]

    across = min(COLUMNS, len(answers))
    down = -(-len(answers) // across)
    panel = (WIDE - 2 * PAD - (across - 1) * APART) / across
    caption = lines_of(_caption(traced, right), 120)
    foot = PAD + CAPTION_LINE * (len(caption) + 2)
    above = 2 * TITLE_LINE
    height = down * (panel + above) + foot + PAD
    figure = Figure(figsize=(WIDE, height))
    FigureCanvasAgg(figure)
    for i, (title, answer) in enumerate(answers):
        row, column = divmod(i, across)
        left, top = PAD + column * (panel + APART), above + row * (panel + above)
        size = panel / WIDE, panel / height
        axes = figure.add_axes((left / WIDE, 1 - (top + panel) / height, *size))
        _draw_cells(axes, asked, answer[: len(right)], right, columns, colours)
        axes.set_title(title, loc="left", pad=3, fontsize=7)
    used = [symbol for symbol in colours if symbol in asked + right]
    handles = [Patch(color=colours[symbol], label=symbol) for symbol in used]
    handles.append(Patch(fill=False, edgecolor=WRONG, label="wrong"))
    figure.legend(
        handles=handles, loc="lower left", ncols=len(handles), frameon=False, fontsize=6,
        bbox_to_anchor=(PAD / WIDE, (PAD + CAPTION_LINE * len(caption)) / height), handlelength=1,
        borderpad=0.2, borderaxespad=0.2,
    )  # fmt: skip
    figure.text(PAD / WIDE, PAD / height, "\n".join(caption), color=GREY, fontsize=6)
    return figure


def panel_loops(loops: int) -> list[int]:
    """The loops that have a panel, counted from 1: at most `MOST`, twice as far each from the
    first, and the last."""
    powers = [2**i for i in range(loops.bit_length()) if 2**i < loops]
    return [*powers[-(MOST - 1) :], loops]


def _title(loop: int, chosen: str, right: str) -> str:
    wrong = sum(a != b for a, b in zip(chosen, right, strict=False))
    return f"loop {loop}: {f'{wrong:,} wrong' if wrong else 'all right'}"


def _caption(traced: dict[str, Any], right: str) -> str:
    rows = len(right) // traced["raster"]["columns"]
    return (
        f"{traced['system']}: what it answers after some of {traced['loops']} loops to a problem of"
        f" {rows} x {traced['raster']['columns']} cells. {traced['device']}, {traced['date']}."
    )


def _draw_cells(
    axes: Axes, asked: str, answer: str, right: str, columns: int, colours: dict[str, str]
) -> None:
    """The problem's cells, and the answer's as smaller squares on them; wrong ones have an edge."""
    painted = lambda symbol: to_rgb(colours.get(symbol, "white"))  # noqa: E731
    cells = np.array([painted(symbol) for symbol in asked]).reshape(-1, columns, 3)
    axes.imshow(cells, interpolation="nearest")
    for i, (symbol, true) in enumerate(zip(answer, right, strict=True)):
        row, column = divmod(i, columns)
        corner = column - MARK / 2, row - MARK / 2
        edge = WRONG if symbol != true else "none"
        colour = colours.get(symbol, "none")
        if edge != "none" or colour != "none":
            look = {"facecolor": colour, "edgecolor": edge, "linewidth": 0.6}
            axes.add_patch(Rectangle(corner, MARK, MARK, **look))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
