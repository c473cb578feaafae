"""How a looped model comes to an answer: where each loop looks, and how sure it is."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spak_jax import jax_settings, models
from spak_jax.command_line import InputError
from spak_jax.config_sections import LoopedModel
from spak_jax.evaluation.loaded import LoadedModel
from spak_jax.tasks.base import Raster

# What a picture can show, a pixel or two a token.
LONGEST_TEXT = 400
DECIMALS = 4


class Trace(NamedTuple):
    """What every loop does with a problem and its true answer.

    problem: as people write it. text: as the model reads it, of whose tokens the arrays speak.
    first: the place that chooses the answer's first symbol: `=`, or the first blank, or in place
    the one behind `=`. right: the answer and, but in place, its newline, which the places from
    `first` on are to choose. logits: float32
    `[loops, length, vocabulary]`. attention: the weights of attention, float32
    `[loops, heads, length, length]`, keys last. confidence: the probability of the right symbol,
    float32 `[loops, length]`. chosen: what the places of `right` choose after the last loop.
    chosen_by_loop: the same after each. raster: how the problem and `right` are laid out.
    """

    problem: str
    text: str
    first: int
    right: str
    logits: np.ndarray
    attention: np.ndarray
    confidence: np.ndarray
    chosen: str
    chosen_by_loop: tuple[str, ...] = ()
    raster: Raster | None = None


@jax_settings.fixed()
def trace(loaded: LoadedModel, problem: tuple[str, ...], loops: int | None = None) -> Trace:
    """Runs a looped model over a problem and its true answer, and keeps what every loop gives.

    Args:
      loaded: the model.
      problem: its inputs.
      loops: None for as many as in training.

    Raises:
      InputError: the model does not loop, or the text is too long to draw.
    """
    config, task = loaded.config, loaded.task
    if not isinstance(config.model, LoopedModel):
        raise InputError(f"{config.name} is {config.model.described}: it has no loops to trace")
    text = task.prompt(problem) if task.one_pass else task.text(problem)[:-1]
    if len(text) >= LONGEST_TEXT:
        raise InputError(f"a text of {len(text) + 1} symbols: at most {LONGEST_TEXT} can be traced")
    batch = task.batch(task.arrays([problem]), len(text))
    first, *_, last = np.flatnonzero(batch.answer[0]).tolist()
    choosing = slice(first, last + 1)
    definition, _ = models.abstract(config)

    @jax.jit
    def run(weights, batch):
        network = nnx.merge(definition, weights)
        ids = task.position_ids(batch.tokens)
        logits, attention = network.forward_with_intermediates(
            batch.tokens, loops=loops, position_ids=ids
        )
        if attention is None:
            raise InputError(f"model.block = {config.model.block!r} shows no weights of attention")
        probs = jax.nn.softmax(logits[:, 0])
        true = jnp.broadcast_to(batch.targets[0, :, None], (*probs.shape[:2], 1))
        right = jnp.take_along_axis(probs, true, axis=-1)[..., 0]
        return logits[:, 0], attention[:, 0], right

    logits, attention, confidence = map(np.asarray, run(loaded.weights, batch))
    right = task.decode(batch.targets[0, choosing])
    chosen = tuple(map(task.decode, logits[:, choosing].argmax(-1)))
    return Trace(
        task.format(problem), text, choosing.start, right,
        logits, attention, confidence, chosen[-1], chosen, task.raster(problem),
    )  # fmt: skip


def as_json(traced: Trace) -> dict[str, Any]:
    """What pictures show of it, as plain values.

    `problem`, `text`, `first`, `right`, `chosen`, `loops`; for each loop and each token that
    chooses a symbol of `right` `confidence`, and `looked`, the weights of attention over the text,
    the mean over heads. Of a problem in rows there are `raster`, its columns and the colours of
    symbols, and `chosen_by_loop` instead of `looked`.
    """
    choosing = slice(traced.first, traced.first + len(traced.right))
    rounded = lambda array: np.round(array.astype(float), DECIMALS).tolist()  # noqa: E731
    if traced.raster is None:
        shown = {"looked": rounded(traced.attention.mean(1)[:, choosing])}
    else:
        shown = {"raster": traced.raster._asdict(), "chosen_by_loop": list(traced.chosen_by_loop)}
    return {
        "problem": traced.problem,
        "loops": len(traced.logits),
        "text": traced.text,
        "first": traced.first,
        "right": traced.right,
        "chosen": traced.chosen,
        "confidence": rounded(traced.confidence[:, choosing]),
        **shown,
    }
