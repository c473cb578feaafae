"""Halting: rules that stop a token once it has been looped enough, calibrated, and what they save.

Three rules stop a token (`LoopLM.halting_logits`): by confidence, by convergence, or by agreement.
Each has one number here, the doubt that is left: a confident token's largest probability is at
least one minus the doubt, a converged one's state and those of all before it have moved by no more
than that share of themselves in a loop, an agreeing one's probabilities and theirs by no more than
that much of one. The number is calibrated on problems of the training distribution alone. Of those
that lose at most a tenth of a point there it is the least that takes at most a tenth more loops
than the one that saves most: a longer problem has more chances to stop too early. Where none loses
so little, it is the least that is tried.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pallas_kernels.tuning import timing
from spak_jax import jax_settings
from spak_jax.command_line import InputError, or_a_gpu, progress
from spak_jax.config import Config
from spak_jax.config_sections import LoopedModel
from spak_jax.data import sample_training
from spak_jax.evaluation import depths
from spak_jax.evaluation.batching import batch_of, padded_length, rows_per_call
from spak_jax.evaluation.forward import PUBLISHED_HALTING, Halting, forward
from spak_jax.evaluation.loaded import LoadedModel
from spak_jax.evaluation.loops import Loops
from spak_jax.models.halting import RULES
from spak_jax.tasks import Batch, Problems, Task

# Tried in the calibration, and drawn.
DOUBTS = {
    "confidence": tuple(
        float(f"{digit}e{power}") for power in range(-1, -8, -1) for digit in (3, 1)
    ),
    # More would be no agreement: with 0.1 and 0.3, which do well on trained lengths, the longest
    # carries of sums were cut off.
    "agreement": (0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4, 3e-5, 1e-5),
    "convergence": (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.02, 0.01),
}
# A share of the answers, against no halting, on problems of the training distribution.
MOST_LOST = 0.001
# A share of the fewest loops, which less doubt may take besides.
SPARED = 0.1
CALIBRATED_ON = 4_000
CALIBRATION_SEED = 0
# Numbers of loops for all rows that are tried, at most.
FIXED_TRIED = 16
DRAWN_PROBLEMS = 8
TIMED_PASSES = 5
NONE, PUBLISHED, FIXED = "none", "published", "fixed"

NEVER = Halting("confidence", 2.0, 2.0)


class HaltingPredictions(NamedTuple):
    """Of problems: whether each was answered right, and the loops of its tokens.

    correct: bool `[problems]`. steps: int `[problems, tokens]`, of the tokens that are read. read:
    bool, of the tokens before the newline that ends the problem. answering: bool, of those among
    them that choose a symbol of the answer.
    """

    correct: np.ndarray
    steps: np.ndarray
    read: np.ndarray
    answering: np.ndarray

    @property
    def row_loops(self) -> np.ndarray:
        """Of each problem's slowest token."""
        return np.where(self.read, self.steps, 0).max(1)

    def mean(self, of: np.ndarray) -> float:
        """Loops of some tokens."""
        return float(self.steps[of].mean())

    def summary(self) -> dict[str, float]:
        return {
            "accuracy": float(self.correct.mean()),
            "answer_steps": self.mean(self.answering),
            "text_steps": self.mean(self.read),
            "row_loops": float(self.row_loops.mean()),
        }


class HaltingScorer:
    """Answers problems with one model under any thresholds, compiling once for each rule.

    loops: at most; `Loops` for each problem's own number.
    """

    def __init__(self, loaded: LoadedModel, loops: int | Loops):
        config, self.loops = loaded.config, loops
        task = self._task = loaded.task
        self._weights = loaded.weights

        def run(weights, batch: Batch, most, rule: str, before, after):
            logits, steps = forward(config, loops, Halting(rule, before, after))(
                weights, batch.tokens, *most
            )
            return right(logits, batch), steps, ~task.after_end(batch.tokens), batch.answer

        def after_loops(weights, batch: Batch, most):
            return right(forward(config, Loops())(weights, batch.tokens, most)[0], batch)

        def right(logits, batch):
            return ((logits.argmax(-1) == batch.targets) | ~batch.answer).all(-1)

        self._run = jax.jit(run, static_argnames="rule")
        self._after_loops = jax.jit(after_loops)

    def batches(self, problems: Problems) -> list[tuple[Batch, tuple[jax.Array, ...]]]:
        """Rows of problems, as many to a call as scoring takes, the last call filled up; with
        `Loops` each with the int32 loops of its rows."""
        length = padded_length(self._task.size_of(problems.width), self._task)
        sizes = self.sizes(problems)
        problems, count = self._task.pad(problems, length), problems.count
        rows = min(rows_per_call(length), count)
        index = [np.minimum(np.arange(i, i + rows), count - 1) for i in range(0, count, rows)]
        each = isinstance(self.loops, Loops)
        return [
            (
                batch_of(Problems(*(x[i] for x in problems)), length, self._task),
                (self.loops.of(sizes[i]),) if each else (),
            )
            for i in index
        ]

    def sizes(self, problems: Problems) -> np.ndarray:
        return np.asarray(self._task.lengths(problems))

    def run(self, batches: Iterable[tuple], halting: Halting) -> list[tuple]:
        """What each batch comes to, still on the device, as `HaltingPredictions` has it."""
        return [self._run(self._weights, batch, most, *halting) for batch, most in batches]

    def after_loops(self, problems: Problems) -> list[dict[str, float]]:
        """Answers right where all tokens stop after so many loops, for numbers up to the most."""
        most = self.loops
        if isinstance(most, Loops):
            most = int(most.of(self.sizes(problems)).max())
        batches, found = [batch for batch, _ in self.batches(problems)], []
        for loops in np.linspace(1, most, min(most, FIXED_TRIED)).astype(np.int32):
            parts = [
                self._after_loops(self._weights, batch, np.full(len(batch.tokens), loops))
                for batch in batches
            ]
            accuracy = float(np.concatenate(parts)[: problems.count].mean())
            found.append({"loops": int(loops), "accuracy": accuracy})
        return found

    def __call__(self, problems: Problems, halting: Halting) -> HaltingPredictions:
        parts = self.run(self.batches(problems), halting)
        return HaltingPredictions(
            *(np.concatenate(x)[: problems.count] for x in zip(*parts, strict=True))
        )


@jax_settings.fixed()
def calibrated(loaded: LoadedModel, rule: str, loops: int | Loops | None = None) -> Halting:
    """A rule with the doubt that `measure` would choose for it, without all that it tries.

    Args:
      loaded: a looped model.
      rule: of `RULES`.
      loops: at most; None for as many as in training, `Loops` for each problem's own number.

    Raises:
      InputError: the model does not loop.
    """
    scorer = HaltingScorer(loaded, loops or _looped(loaded.config).loops)
    trained_on = _training_problems(loaded.config, jax_settings.key(CALIBRATION_SEED))
    with progress("calibrating", len(DOUBTS[rule]) + 1, unit="thresholds") as bar:
        found = _calibration(scorer, trained_on, [rule], bar.advance)
    return Halting.with_doubt(rule, _chosen(found, rule))


@jax_settings.fixed()
def measure(
    loaded: LoadedModel,
    lengths: Sequence[int],
    examples: int,
    seed: int,
    loops: int | Loops | None,
    rules: Sequence[str] = RULES,
    kinds: Sequence[str] = (),
) -> dict[str, Any]:
    """Calibrates rules and scores them.

    Args:
      loaded: a looped model.
      lengths: of problems to score, all inputs exactly that long; the last is swept and drawn.
      examples: problems a length.
      seed: of the problems.
      loops: at most; None for as many as in training, `Loops` for each problem's own number.
      rules: of `RULES`.
      kinds: of the task's hard problems, scored at each length, too (`Task.kinds`).

    Returns:
      What `main` writes: `calibration`, `lengths`, `kinds`, `trends` (how loops follow depth over
      all lengths and kinds), `swept`, `drawn`, and where it comes from.

    Raises:
      InputError: the model does not loop.
    """
    config = loaded.config
    loops = loops or _looped(config).loops
    scorer = HaltingScorer(loaded, loops)
    key, task = jax_settings.key(seed), loaded.task
    trained_on = _training_problems(config, key)
    scored = {n: task.sample_exact(jax.random.fold_in(key, n), n, examples) for n in lengths}
    hard = {kind: _of_kind(task, kind, lengths, examples, seed) for kind in kinds}
    total = 2 * (sum(len(DOUBTS[rule]) for rule in rules) + 1)
    total += (2 + len(rules)) * (1 + len(kinds)) * len(lengths)
    instead = or_a_gpu("fewer problems (--examples) or shorter ones (--lengths) take less")
    with progress("halting", total, unit="scorings", instead=instead) as bar:

        def outcomes(problems: Problems, ways: Iterable[Halting]) -> list[HaltingPredictions]:
            found = []
            for way in ways:
                found.append(scorer(problems, way))
                bar.advance()
            return found

        calibration = _calibration(scorer, trained_on, rules, bar.advance)
        chosen = {rule: _chosen(calibration, rule) for rule in rules}
        ways = {NONE: NEVER, PUBLISHED: PUBLISHED_HALTING} | {
            rule: Halting.with_doubt(rule, doubt) for rule, doubt in chosen.items()
        }

        def lines_of(drawn: dict[int, Problems]) -> dict[str, dict[str, Any]]:
            return {
                str(n): {
                    name: _scored(outcome, task, problems)
                    for name, outcome in zip(ways, outcomes(problems, ways.values()), strict=True)
                }
                for n, problems in drawn.items()
            }

        by_length = lines_of(scored)
        by_kind = {kind: lines_of(drawn) for kind, drawn in hard.items()}
        swept = _swept(scorer, scored[lengths[-1]], rules, outcomes) | {"length": lengths[-1]}
    return loaded.describe() | {
        **(loops if isinstance(loops, Loops) else Loops(loops)).described(),
        "examples": examples,
        "seed": seed,
        "ways": {name: way._asdict() for name, way in ways.items()},
        "calibration": calibration | {"problems": CALIBRATED_ON, "most_lost": MOST_LOST},
        "length_unit": task.unit,
        "lengths": by_length,
        "kinds": by_kind,
        "depth_unit": task.depth_unit,
        "trends": {
            name: depths.trend(
                depths.merged(
                    line[name]["depths"]
                    for lines in (by_length, *by_kind.values())
                    for line in lines.values()
                )
            )
            for name in ways
        },
        "swept": swept,
        "drawn": _drawn(scorer, task, lengths[-1], {rule: ways[rule] for rule in rules}, seed),
        "milliseconds": _milliseconds(scorer, scored[lengths[-1]], ways),
    }


def rules_of(found: dict[str, Any]) -> list[str]:
    """The rules that `measure` was asked for, or knew of when it was an earlier version."""
    return [rule for rule in RULES if rule in found["ways"]]


def _looped(config: Config) -> LoopedModel:
    if not isinstance(config.model, LoopedModel):
        raise InputError(f"{config.name} is {config.model.described}: it has no loops to stop")
    return config.model


def _training_problems(config: Config, key: jax.Array) -> Problems:
    """The problems that rules are calibrated on."""
    return sample_training(jax.random.fold_in(key, 0), config.data, (CALIBRATED_ON,))


def _of_kind(
    task: Task, kind: str, lengths: Sequence[int], examples: int, seed: int
) -> dict[int, Problems]:
    """The problems of one kind, by length."""
    count = task.kind_count(kind, examples)
    return {n: task.sample_kind(np.random.default_rng((seed, n)), kind, n, count) for n in lengths}


def _calibration(
    scorer: HaltingScorer, problems: Problems, rules: Sequence[str], advance: Callable[[], None]
) -> dict[str, Any]:
    """What is left of the answers, and of the loops, without halting and by doubt of each rule:
    from the most doubt on, as far as is needed to choose one."""

    def outcome(way: Halting) -> dict[str, float]:
        found = scorer(problems, way).summary()
        advance()
        return found

    found: dict[str, Any] = {NONE: outcome(NEVER)}
    for rule in rules:
        found[rule] = []
        # The less doubt, the more loops: once one takes too many, all the others do.
        for doubt in sorted(DOUBTS[rule], reverse=True):
            one = {"doubt": doubt, **outcome(Halting.with_doubt(rule, doubt))}
            found[rule].append(one)
            kept = _keeping(found, rule)
            if kept and one["row_loops"] > _allowed(kept):
                break
    return found


def _swept(
    scorer: HaltingScorer, problems: Problems, rules: Sequence[str], outcomes: Callable
) -> dict[str, Any]:
    """What every doubt leaves of the answers, and of the loops, by rule; without halting; and with
    as many loops for all."""
    [plain] = outcomes(problems, [NEVER])
    found: dict[str, Any] = {NONE: plain.summary(), FIXED: scorer.after_loops(problems)}
    for rule in rules:
        doubts = DOUBTS[rule]
        tried = outcomes(problems, [Halting.with_doubt(rule, doubt) for doubt in doubts])
        found[rule] = [
            {"doubt": doubt, **outcome.summary()}
            for doubt, outcome in zip(doubts, tried, strict=True)
        ]
    return found


def _keeping(calibration: dict[str, Any], rule: str) -> list[dict[str, float]]:
    """What was found of the doubts that lose little."""
    least = calibration[NONE]["accuracy"] - MOST_LOST
    # Counts of problems, so that rounding decides nothing.
    return [x for x in calibration[rule] if x["accuracy"] >= least - 1e-9]


def _chosen(calibration: dict[str, Any], rule: str) -> float:
    """The least doubt that takes few loops of those that lose little; of all if none does."""
    kept = _keeping(calibration, rule)
    if not kept:
        return min(DOUBTS[rule])
    return min(x["doubt"] for x in kept if x["row_loops"] <= _allowed(kept))


def _allowed(kept: list[dict[str, float]]) -> float:
    """The most loops that the chosen doubt takes."""
    return (1 + SPARED) * min(x["row_loops"] for x in kept)


def _scored(outcome: HaltingPredictions, task: Task, problems: Problems) -> dict[str, Any]:
    """A summary, with loops by token of the text, by what the task measures, and by depth."""
    measures = task.measures(problems)
    by_token = [
        float(outcome.steps[outcome.read[:, t], t].mean())
        for t in range(outcome.read.shape[1])
        if outcome.read[:, t].any()
    ]
    correct, total = int(outcome.correct.sum()), len(outcome.correct)
    return {
        "correct": correct,
        "total": total,
        **outcome.summary(),
        "by_token": by_token,
        "measures": {name: _steps_by(np.asarray(x), outcome) for name, x in measures.items()},
        "depths": depths.counts(np.asarray(task.depths(problems)), outcome.row_loops),
    }


def _steps_by(measure: np.ndarray, outcome: HaltingPredictions) -> dict[str, Any]:
    """Loops at the tokens that answer, by the value of what was measured."""
    found = {}
    for value in np.unique(measure):
        which = measure == value
        answering = outcome.answering & which[:, None]
        found[str(value)] = {"problems": int(which.sum()), "steps": outcome.mean(answering)}
    return found


def _drawn(
    scorer: HaltingScorer, task: Task, length: int, ways: dict[str, Halting], seed: int
) -> dict[str, Any]:
    """Loops of every token of a few problems, under the calibrated rules: from those of which the
    task measures least to those of which it measures most."""
    many = task.sample_exact(jax_settings.key(seed + 1), length, 40 * DRAWN_PROBLEMS)
    [(name, measure), *_] = [*task.measures(many).items(), (task.unit, task.lengths(many))]
    measure = np.asarray(measure)
    order = np.argsort(measure, kind="stable")
    picked = order[np.linspace(0, len(order) - 1, DRAWN_PROBLEMS).astype(int)]
    problems = Problems(*(np.asarray(x)[picked] for x in many))
    outcomes = {rule: scorer(problems, way) for rule, way in ways.items()}
    read = next(iter(outcomes.values())).read
    width = read.shape[1]
    batch = task.batch(problems, width)
    drawn = []
    for i, value in enumerate(measure[picked].tolist()):
        count = int(read[i].sum())
        steps = {rule: outcome.steps[i, :count].tolist() for rule, outcome in outcomes.items()}
        text = task.decode(np.asarray(batch.tokens[i, :count]))
        drawn.append({"text": text, "measure": value, "steps": steps})
    return {"measure": name, "problems": drawn}


def _milliseconds(
    scorer: HaltingScorer, problems: Problems, ways: dict[str, Halting]
) -> dict[str, float]:
    """Medians of scoring some problems once, taking turns."""
    batches = scorer.batches(problems)
    programs = {
        name: timing.Program(lambda way=way: jax.block_until_ready(scorer.run(batches, way)), 1)
        for name, way in ways.items()
    }
    times = timing.medians(programs, TIMED_PASSES)
    return {name: 1e3 * median for name, (_, median, _) in times.items()}
