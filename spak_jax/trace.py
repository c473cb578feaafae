"""How a looped model comes to an answer: `python -m spak_jax.trace RUN PROBLEM [--out DIR]`.

Draws, for one problem, where each loop looks from the tokens that write the answer, and how sure
it is of each digit after each loop; the numbers drawn are written beside the pictures.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spak_jax import addition, evaluate, figures, jax_settings, models
from spak_jax.command_line import (
    InputError,
    console,
    progress,
    run_program,
    writable_folder,
    write_file,
)
from spak_jax.config import LoopedModel

# What a picture can show, a pixel or two a token.
LONGEST_TEXT = 400
DECIMALS = 4
WRONG = "; in red with the right one behind it where it is another"


@jax_settings.fixed()
def trace(trained: evaluate.Trained, numbers: tuple[int, ...], loops: int | None) -> dict[str, Any]:
    """What every loop does with a problem and its true answer.

    Args:
      trained: the model.
      numbers: the operands.
      loops: None for as many as in training.

    Returns:
      `text`, the problem as the model reads it; `first`, the index of the token that chooses the
      answer's first symbol; `chosen`, what each token from there on chooses after the last loop;
      for each loop, each of the tokens from there that choose one:
      `confidence`, the probability of the true next symbol, and `looked`, the weights of attention
      over the text, the mean over heads; `system`, `config` and where and when.

    Raises:
      InputError: the model does not loop, or the text is too long to draw.
    """
    config = trained.config
    if not isinstance(config.model, LoopedModel):
        raise InputError(f"{config.name} is a stack of blocks: it has no loops to trace")
    task = config.data.task
    problems = addition.problems_from_integers([numbers])
    text = addition.problem_text(numbers, task)
    if len(text) > LONGEST_TEXT:
        raise InputError(f"a text of {len(text)} symbols: at most {LONGEST_TEXT} can be drawn")
    batch = addition.problem_rows(problems, len(text) - 1, task)
    definition, _ = models.abstract(config, addition.VOCABULARY_SIZE)

    @jax.jit
    def run(weights, batch):
        network = nnx.merge(definition, weights)
        position_ids = addition.coupled_ids(batch.tokens)
        logits, looked = network.forward_with_intermediates(
            batch.tokens, loops=loops, position_ids=position_ids
        )
        if looked is None:
            raise InputError(f"model.block = {config.model.block!r} shows no weights of attention")
        chances = jax.nn.softmax(logits[:, 0])
        true = jnp.broadcast_to(batch.targets[0, :, None], (*chances.shape[:2], 1))
        right = jnp.take_along_axis(chances, true, axis=-1)[..., 0]
        return right, looked[:, 0].mean(1), logits[-1, 0].argmax(-1)

    confidence, looked, chosen = map(np.asarray, run(trained.weights, batch))
    first = text.index("=")
    rounded = lambda array: np.round(array.astype(float), DECIMALS).tolist()  # noqa: E731
    return evaluate.origin(trained) | {
        "problem": addition.shown(numbers, task),
        "loops": len(confidence),
        "text": text,
        "first": first,
        "chosen": addition.decode(chosen[first:]),
        "confidence": rounded(confidence[:, first:]),
        "looked": rounded(looked[:, first:]),
    }


def draw(traced: dict[str, Any]) -> Figure:
    """A panel of attention for each loop, and confidence by loop below them."""
    text, first, loops = traced["text"], traced["first"], traced["loops"]
    read, right, chosen = (
        part.replace("\n", "¶") for part in (text[:-1], text[first + 1 :], traced["chosen"])
    )
    confidence, looked = np.array(traced["confidence"]), np.array(traced["looked"])
    width, margin = figures.WIDE + 1.6, 0.45
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
        f"{traced['system']}: {traced['problem']}, least significant digit first. Chosen: after the"
        f" last loop, behind the right symbols before it{WRONG if chosen != right else ''}."
        f" {traced['device']}, {traced['date']}."
    )
    figure.text(
        figures.PAD / width,
        figures.PAD / height,
        "\n".join(figures.lines_of(caption, 150)),
        color=figures.GREY,
        fontsize=6,
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.trace", description="Draw how a looped model comes to an answer."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("problem", metavar="PROBLEM", help="such as 999999+1")
    parser.add_argument("--loops", type=int, help="instead of the trained number")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for the pictures (default: RUN/trace)"
    )
    arguments = parser.parse_intermixed_args()
    evaluate.check_range("--loops", arguments.loops, 1, evaluate.MAX_LOOPS)
    trained = evaluate.load(arguments.run)
    try:
        numbers = addition.parse_problem(arguments.problem, trained.config.data.task)
    except ValueError as error:
        raise InputError(str(error)) from None
    out = writable_folder(arguments.out or arguments.run / "trace")
    with progress("tracing"):
        traced = trace(trained, numbers, arguments.loops)
    files = {"trace.json": json.dumps(traced) + "\n"}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(figures.STYLE)
        drawn = draw(traced)
        files |= {f"trace.{kind}": figures.saved(drawn, kind) for kind in ("png", "pdf")}
    for name, content in files.items():
        write_file(out / name, content)
        console.print(f"wrote {out / name}")
    evaluate.warn_of_loops(traced["config"]["model"], traced["loops"])


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


if __name__ == "__main__":
    run_program(main)
