"""Zero-shot scores: how many answers of a model are right, whole answers only.

A problem counts only where the whole answer is right, its closing newline included. Greedy
generation is right exactly when the largest logit is right at every step along the true answer:
as long as all earlier choices were right, the model has read the true text. So one forward pass
over the true text scores all steps at once; decoding generates for real and must agree.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spak_jax import data, jax_settings
from spak_jax.command_line import or_a_gpu, progress
from spak_jax.config import Config
from spak_jax.config_sections import Evaluation, LoopedModel
from spak_jax.evaluation import generate
from spak_jax.evaluation.batching import batch_of, calls, power_of_two, rows_per_call
from spak_jax.evaluation.forward import Halting, forward, generate_fn
from spak_jax.evaluation.loaded import LoadedModel
from spak_jax.evaluation.loops import Loops
from spak_jax.evaluation.results import Results
from spak_jax.evaluation.statistics import Predictions, summary
from spak_jax.models import flops
from spak_jax.tasks import Batch, Problems
from spak_jax.training import loggers

# Beyond this length fewer problems are scored, so that their symbols are as many.
FULL_LENGTH = 100
# Published columns split one draw; 10 times as many problems leave each about enough.
COLUMNS_FACTOR = 10
CURVE_POINTS = 400
# Of waiting for scores.
INSTEAD = (
    "fewer problems (--examples; evaluation.examples of a training) or shorter ones (--lengths;"
    " evaluation.lengths) take less"
)


@dataclass(frozen=True)
class Settings:
    """What to score and how.

    lengths: of problems, all inputs exactly that long. examples: problems for each; of a length
    n > 100, 100 / n times as many. seed: of the problems. loops: None for as many as in training;
    `Loops` for each problem's own number, in one program for all numbers. halt: how each token
    stops, after so many loops at the latest; None for never. decode: generate instead of teacher
    forcing, which in one pass is the same. kinds: of the task's hard problems (`Task.kinds`),
    scored at each length too. published: whether problems of the published columns are, where the
    task has some.
    """

    lengths: tuple[int, ...]
    examples: int
    seed: int
    loops: int | Loops | None = None
    halt: Halting | None = None
    decode: bool = False
    kinds: tuple[str, ...] = ()
    published: bool = True

    @classmethod
    def of(cls, evaluation: Evaluation) -> "Settings":
        return cls(evaluation.lengths, evaluation.examples, evaluation.seed)


class Scorer:
    """Answers problems with one model and settings, compiling once for each padded length; in one
    pass once for all numbers of loops, too.

    What a problem comes to does not depend on those it is answered with.

    task: that the model learned.
    """

    def __init__(self, loaded: LoadedModel, settings: Settings):
        self.task, self._weights = loaded.task, loaded.weights
        # One program for all seeds.
        config = loaded.config.model_only()
        self._config, self._settings = config, settings
        loops, decode = settings.loops, settings.decode and not self.task.one_pass
        if self.task.one_pass and isinstance(loops, int) and not settings.halt:
            # A grid of lengths and loops is then as many programs as it has lengths.
            loops = Loops(loops)
        self._loops_of = loops.of if isinstance(loops, Loops) else None
        if isinstance(loops, Loops) and not decode:
            # The program is given each problem's own number.
            loops = Loops()
        self._rows = _compiled_rows(config, loops, settings.halt, decode)

    @jax_settings.fixed()
    def __call__(self, problems: Problems, advance: Callable[[int], None] = lambda n: None):
        """Scores problems.

        Args:
          problems: any number, as arrays of device or host.
          advance: called after each call with the number of problems scored.

        Returns:
          Their `Predictions`, in their order.
        """
        task = self.task
        problems = Problems(*map(np.asarray, problems))
        sizes = np.asarray(task.lengths(problems))
        parts = []
        for chosen, filled, length in calls(sizes, task, self._rows_per_call):
            rows = task.pad(Problems(*(array[filled] for array in problems)), length)
            more = (jnp.asarray(self._loops_of(sizes[filled])),) if self._loops_of else ()
            parts.append((chosen, self._rows(self._weights, batch_of(rows, length, task), *more)))
            advance(len(chosen))
        predictions = Predictions(np.empty(len(sizes), bool), np.empty(len(sizes), np.float32))
        for chosen, found in parts:
            for whole, part in zip(predictions, found, strict=True):
                whole[chosen] = np.asarray(part)[: len(chosen)]
        return predictions

    def _rows_per_call(self, length: int) -> int:
        rows = rows_per_call(length)
        if self._settings.decode and not self.task.one_pass:
            # So that caches hold them; the row that is scored is one token longer.
            held = generate.max_cached_batch(self._config.model, length + 1, self._settings.loops)
            rows = min(rows, power_of_two(held))
        return rows


@functools.lru_cache
def _compiled_rows(
    config: Config, loops: int | Loops | None, halt: Halting | None, decode: bool
) -> Callable:
    if decode:
        write = generate_fn(config, loops, halt)
        return jax.jit(lambda weights, batch: _decoded(write, weights, batch))
    run = forward(config, loops, halt)
    return jax.jit(lambda *given: _teacher_forced(run, *given))


@jax_settings.fixed()
def score(loaded: LoadedModel, settings: Settings, run: Path | None = None) -> Results:
    """Scores a model at every asked length, by published columns and by the task's measures.

    Args:
      loaded: the model.
      settings: what to score and how.
      run: the run folder whose training curve the results hold; None for none.
    """
    scorer, task = Scorer(loaded, settings), loaded.task
    key, longest = jax_settings.key(settings.seed), loaded.config.data.longest
    columns = None
    if task.published_columns and settings.published:
        of_columns = jax.random.fold_in(key, 0)
        count = COLUMNS_FACTOR * settings.examples
        columns = data.sample_published_columns(of_columns, count, task)
    counts = {length: _problems_of(settings.examples, length) for length in settings.lengths}
    of_kind = {
        kind: {n: task.kind_count(kind, count) for n, count in counts.items()}
        for kind in settings.kinds
    }
    lengths, kinds, parts, measures = {}, {kind: {} for kind in settings.kinds}, [], []
    total = sum(sum(each.values()) for each in (counts, *of_kind.values()))
    total += columns.count if columns else 0
    with progress("scoring", total, unit="problems", instead=or_a_gpu(INSTEAD)) as bar:
        advance = bar.advance
        for length, count in counts.items():
            problems = task.sample_exact(jax.random.fold_in(key, length), length, count)
            predictions = scorer(problems, advance)
            lengths[str(length)] = _of_length(loaded.config, length, predictions)
            parts.append(predictions)
            measures.append(task.measures(problems))
            for i, kind in enumerate(settings.kinds):
                random = np.random.default_rng((settings.seed, length, i))
                drawn = task.sample_kind(random, kind, length, of_kind[kind][length])
                of_length = _of_length(loaded.config, length, scorer(drawn, advance))
                kinds[kind][str(length)] = of_length
        in_columns = _by_column(scorer, columns, longest, advance) if columns else {}
    whole = Predictions(*map(np.concatenate, zip(*parts, strict=True)))
    return Results.of(
        _description(loaded, settings)
        | {
            "lengths": lengths,
            "published_columns": in_columns,
            "kinds": kinds,
            "measures": {
                name: _group_by(np.concatenate([each[name] for each in measures]), whole)
                for name in measures[0]
            },
            "training": training_curve(run) if run else {},
        }
    )


def score_own_problems(
    loaded: LoadedModel,
    settings: Settings,
    own: Sequence[tuple[str, ...]],
    source: str,
    run: Path | None = None,
) -> tuple[Results, list[tuple[str, ...]]]:
    """Scores the user's own problems, grouped by their length.

    Args:
      loaded, settings, run: as of `score`.
      own: the inputs of each problem.
      source: where they come from, in words.

    Returns:
      The results, and the problems answered wrong.
    """
    task = loaded.task
    sizes = np.array([task.length(problem) for problem in own])
    predictions = Predictions(np.empty(len(own), bool), np.empty(len(own), np.float32))
    measures: dict[str, np.ndarray] = {}
    scorer = Scorer(loaded, settings)
    with progress("scoring", len(own), unit="problems", instead=or_a_gpu(INSTEAD)) as bar:
        # A few at a time: as arrays all are as wide as the longest.
        for chosen, _, _ in calls(sizes, task):
            problems = task.arrays([own[i] for i in chosen])
            predictions.correct[chosen], predictions.loops[chosen] = scorer(problems, bar.advance)
            for name, found in task.measures(problems).items():
                measures.setdefault(name, np.empty(len(own), np.int32))[chosen] = found
    results = Results.of(
        _description(loaded, settings)
        | {
            "examples": len(own),
            "problems": source,
            "lengths": _group_by(sizes, predictions, functools.partial(_of_length, loaded.config)),
            "published_columns": {},
            "measures": {name: _group_by(found, predictions) for name, found in measures.items()},
            "training": training_curve(run) if run else {},
        }
    )
    wrong = [each for each, right in zip(own, predictions.correct, strict=True) if not right]
    return results, wrong


def training_curve(run: Path) -> dict[str, list[float]]:
    """Losses over steps, thinned for drawing, and the median seconds that a step took.

    Returns:
      `step` and `loss` (the mean over the compiled call that ended there), `validation_step` and
      `validation_loss`, and `seconds_per_step`.
    """
    lines = loggers.read(run)
    if not lines:
        return {}
    every = -(-len(lines) // CURVE_POINTS)
    # Counted from the end, so that the last point is always there.
    thinned = lines[::-every][::-1]
    validated = [line for line in lines if line.validation_loss is not None]
    return {
        "step": [line.step for line in thinned],
        "loss": [line.loss for line in thinned],
        "validation_step": [line.step for line in validated],
        "validation_loss": [line.validation_loss for line in validated],
        "seconds_per_step": float(np.median([line.seconds_per_step for line in lines])),
    }


def _teacher_forced(run: Callable, weights, batch: Batch, *of_each) -> tuple[jax.Array, jax.Array]:
    logits, loops = run(weights, batch.tokens, *of_each)
    right = (logits.argmax(-1) == batch.targets) | ~batch.answer
    return right.all(-1), loops.mean(-1, jnp.float32, where=batch.answer)


def _decoded(write: Callable, weights, batch: Batch) -> tuple[jax.Array, jax.Array]:
    # The whole rows; the answer's mask, which speaks of targets, moves one place on with them.
    tokens = jnp.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
    answer = jnp.pad(batch.answer, [(0, 0), (1, 0)])
    generated, loops = write(weights, tokens, answer.argmax(-1))
    right = (generated == tokens) | ~answer
    return right.all(-1), loops.mean(-1, jnp.float32, where=answer)


def _problems_of(examples: int, length: int) -> int:
    """How many problems of a length are scored."""
    return max(1, examples * FULL_LENGTH // max(length, FULL_LENGTH))


def _of_length(config: Config, length: int, predictions: Predictions) -> dict[str, Any]:
    """The summary of problems of one length, with the operations of one of them."""
    found = summary(predictions, zero_shot=length > config.data.longest)
    # A model that does not loop says 0.
    depth = found["mean_loops"] or None
    return found | {"operations": flops.operations_a_problem(config, length, depth)}


def _group_by(
    group: np.ndarray,
    predictions: Predictions,
    summarize: Callable[[int, Predictions], dict[str, Any]] = lambda value, found: summary(found),
) -> dict[str, Any]:
    """Summaries of the problems of each group, a non-negative number, in order."""
    return {
        str(value): summarize(value, predictions.of(group == value))
        for value in np.unique(group).tolist()
    }


def _by_column(
    scorer: Scorer, problems: Problems, longest: int, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Summaries of the problems in each published column that holds some."""
    predictions = scorer(problems, advance)
    sizes = np.asarray(scorer.task.lengths(problems))
    columns = {}
    for name, (first, last) in scorer.task.published_columns.items():
        chosen = (first <= sizes) & (sizes <= last)
        if chosen.any():
            columns[name] = summary(
                predictions.of(chosen),
                zero_shot=bool((sizes[chosen] > longest).all()),
                trained_share=float((sizes[chosen] <= longest).mean()),
            )
    return columns


def _loops(model: LoopedModel, loops: int | Loops | None) -> dict[str, Any]:
    return loops.described() if isinstance(loops, Loops) else {"loops": loops or model.loops}


def _method(loaded: LoadedModel, settings: Settings) -> str:
    if loaded.task.one_pass:
        return "in place" if loaded.task.in_place else "one pass"
    return "decoding" if settings.decode else "teacher forcing"


def _description(loaded: LoadedModel, settings: Settings) -> dict[str, Any]:
    looped = isinstance(loaded.config.model, LoopedModel)
    return loaded.describe() | {
        **(_loops(loaded.config.model, settings.loops) if looped else {"loops": None}),
        "halting": list(settings.halt[1:]) if settings.halt else None,
        "halting_rule": settings.halt.rule if settings.halt else None,
        "training_operations": loaded.step * flops.operations_a_step(loaded.config),
        "method": _method(loaded, settings),
        "examples": settings.examples,
        "seed": settings.seed,
        "length_unit": loaded.task.unit,
    }
