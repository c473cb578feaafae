"""Whether thinking only as long as needed pays: `python -m spak_jax.halting RUN [options]`.

Two rules stop a token (`LoopLM.halting_logits`): "confidence" and "convergence". Each has one
number here, the doubt that is left: a confident token's largest probability is at least one minus
the doubt, a converged one's state and those of all before it have moved by no more than that share
of themselves in a loop. The number is calibrated on problems of the training law alone, as the one
that saves most loops and loses at most a tenth of a point there, or the least that is tried where
none loses so little; then both rules, and the original's thresholds, are scored at lengths that
were not looked at for it: answers right, and loops by token, by number of carries and by row. A
row's loops are those of its slowest token: so many a program of `pallas_kernels.ops.looped` runs.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pallas_kernels.ops.looped import RULES
from pallas_kernels.tuning import timing
from spak_jax import addition, evaluate, figures, jax_settings, model
from spak_jax.addition import Batch, Problems
from spak_jax.command_line import (
    InputError,
    Table,
    console,
    progress,
    run_program,
    writable_folder,
    write_file,
)
from spak_jax.config import Config, LoopedModel
from spak_jax.evaluate import Halting

# Tried in the calibration, and drawn.
DOUBTS = {
    "confidence": tuple(
        float(f"{digit}e{power}") for power in range(-1, -8, -1) for digit in (3, 1)
    ),
    "convergence": (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.02, 0.01),
}
# A share of the answers, against no halting, on problems of the training law.
MOST_LOST = 0.001
CALIBRATED_ON = 4_000
CALIBRATION_SEED = 0
DRAWN_PROBLEMS = 8
TIMED_PASSES = 5
NONE, SEED, FIXED = "none", "seed", "fixed"


NEVER = Halting("confidence", 2.0, 2.0)
ORIGINAL = evaluate.PUBLISHED_HALTING


class Outcome(NamedTuple):
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


class Thinker:
    """Answers problems with one model under any thresholds, compiling once for each rule."""

    def __init__(self, trained: evaluate.Trained, loops: int):
        config = trained.config
        self._weights, self._task = trained.weights, config.data.task
        definition, _ = model.abstract(config, addition.VOCABULARY_SIZE)

        def run(weights, batch: Batch, rule: str, before, after):
            tokens = batch.tokens
            thresholds = evaluate.thresholds(tokens, Halting(rule, before, after))
            logits, steps = nnx.merge(definition, weights).halting_logits(
                tokens, thresholds, rule=rule, loops=loops, ids=addition.coupled_ids(tokens)
            )
            right = (logits.argmax(-1) == batch.targets) | ~batch.answer
            return right.all(-1), steps, ~addition.ended(tokens), batch.answer

        def each_loop(weights, batch: Batch):
            tokens = batch.tokens
            network, ids = nnx.merge(definition, weights), addition.coupled_ids(tokens)
            logits, _ = network.traced(tokens, loops=loops, ids=ids)
            return ((logits.argmax(-1) == batch.targets) | ~batch.answer).all(-1).T

        self._run = jax.jit(run, static_argnames="rule")
        self._each_loop = jax.jit(each_loop)
        self._rows = jax.jit(addition.problem_rows, static_argnums=(1, 2))

    def batches(self, problems: Problems) -> list[Batch]:
        """Rows of problems, as many to a call as scoring takes; the last call is filled up."""
        length = evaluate.padded_length(problems.digits, self._task)
        problems, count = addition.widened(problems, length), problems.count
        rows = min(evaluate.rows_per_call(length), count)
        index = [np.minimum(np.arange(i, i + rows), count - 1) for i in range(0, count, rows)]
        return [self._rows(Problems(*(x[i] for x in problems)), length, self._task) for i in index]

    def run(self, batches: Iterable[Batch], halting: Halting) -> list[tuple]:
        """What each batch comes to, still on the device, as `Outcome` has it."""
        return [self._run(self._weights, batch, *halting) for batch in batches]

    def after_each_loop(self, problems: Problems) -> list[float]:
        """Answers right where all tokens stop after so many loops: 1, 2 and so on."""
        parts = [self._each_loop(self._weights, batch) for batch in self.batches(problems)]
        return np.concatenate(parts)[: problems.count].mean(0).tolist()

    def __call__(self, problems: Problems, halting: Halting) -> Outcome:
        parts = self.run(self.batches(problems), halting)
        return Outcome(*(np.concatenate(x)[: problems.count] for x in zip(*parts, strict=True)))


@jax_settings.fixed()
def calibrated(trained: evaluate.Trained, rule: str, loops: int | None = None) -> Halting:
    """A rule with the doubt that `measure` would choose for it, without all that it tries.

    Args:
      trained: a looped model.
      rule: of `RULES`.
      loops: at most; None for as many as in training.

    Raises:
      InputError: the model does not loop.
    """
    think = Thinker(trained, loops or _looped(trained.config).loops)
    law = _law(trained.config, jax_settings.key(CALIBRATION_SEED))
    with progress("calibrating", len(DOUBTS[rule]) + 1, unit="thresholds") as told:

        def outcome(way: Halting) -> dict[str, float]:
            found = think(law, way).summary()
            told.advance()
            return found

        calibration = {NONE: outcome(NEVER), rule: []}
        # The less doubt, the more loops: once those that lose little take more, all the others do.
        for doubt in sorted(DOUBTS[rule], reverse=True):
            found = {"doubt": doubt, **outcome(Halting.with_doubt(rule, doubt))}
            calibration[rule].append(found)
            kept = _keeping(calibration, rule)
            if kept and found["row_loops"] > min(x["row_loops"] for x in kept):
                break
    return Halting.with_doubt(rule, _chosen(calibration, rule))


@jax_settings.fixed()
def measure(
    trained: evaluate.Trained, digits: Sequence[int], examples: int, seed: int, loops: int | None
) -> dict[str, Any]:
    """Calibrates both rules and scores them.

    Args:
      trained: a looped model.
      digits: lengths to score, all operands exactly that long; the last is swept and drawn.
      examples: problems a length.
      seed: of the problems.
      loops: at most; None for as many as in training.

    Returns:
      What `main` writes: `calibration`, `lengths`, `swept`, `drawn`, and where it comes from.

    Raises:
      InputError: the model does not loop.
    """
    config = trained.config
    loops = loops or _looped(config).loops
    think = Thinker(trained, loops)
    key, task = jax_settings.key(seed), config.data.task
    law = _law(config, key)
    scored = {
        n: addition.sample_exact(jax.random.fold_in(key, n), n, examples, task) for n in digits
    }
    total = 2 * (sum(map(len, DOUBTS.values())) + 1) + 4 * len(digits)
    instead = evaluate.or_a_gpu("fewer problems (--examples) or shorter ones (--digits) take less")
    with progress("halting", total, unit="scorings", instead=instead) as told:

        def outcomes(problems: Problems, ways: Iterable[Halting]) -> list[Outcome]:
            found = []
            for way in ways:
                found.append(think(problems, way))
                told.advance()
            return found

        calibration = _swept(think, law, outcomes)
        chosen = {rule: _chosen(calibration, rule) for rule in RULES}
        ways = {NONE: NEVER, SEED: ORIGINAL} | {
            rule: Halting.with_doubt(rule, doubt) for rule, doubt in chosen.items()
        }
        lengths = {
            str(n): {
                name: _scored(outcome, np.asarray(addition.carries(problems, task)))
                for name, outcome in zip(ways, outcomes(problems, ways.values()), strict=True)
            }
            for n, problems in scored.items()
        }
        swept = _swept(think, scored[digits[-1]], outcomes) | {"digits": digits[-1]}
    return evaluate.origin(trained) | {
        "loops": loops,
        "examples": examples,
        "seed": seed,
        "ways": {name: way._asdict() for name, way in ways.items()},
        "calibration": calibration | {"problems": CALIBRATED_ON, "most_lost": MOST_LOST},
        "lengths": lengths,
        "swept": swept,
        "drawn": _drawn(think, trained, digits[-1], ways, seed),
        "milliseconds": _milliseconds(think, scored[digits[-1]], ways),
    }


def _looped(config: Config) -> LoopedModel:
    if not isinstance(config.model, LoopedModel):
        raise InputError(f"{config.name} is a stack of blocks: it has no loops to stop")
    return config.model


def _law(config: Config, key: jax.Array) -> Problems:
    """The problems that rules are calibrated on."""
    return addition.sample_law(jax.random.fold_in(key, 0), config.data, (CALIBRATED_ON,))


def _swept(think: Thinker, problems: Problems, outcomes: Callable) -> dict[str, Any]:
    """What every doubt leaves of the answers, and of the loops, by rule; without halting; and with
    as many loops for all."""
    [plain] = outcomes(problems, [NEVER])
    found: dict[str, Any] = {NONE: plain.summary(), FIXED: think.after_each_loop(problems)}
    for rule in RULES:
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
    """The doubt with the fewest loops of those that lose little; the least of all if none does."""
    kept = _keeping(calibration, rule)
    if not kept:
        return min(DOUBTS[rule])
    return min(kept, key=lambda x: (x["row_loops"], x["doubt"]))["doubt"]


def _scored(outcome: Outcome, carries: np.ndarray) -> dict[str, Any]:
    """A summary, with loops by token of the text and by number of carries."""
    by_token = [
        float(outcome.steps[outcome.read[:, t], t].mean())
        for t in range(outcome.read.shape[1])
        if outcome.read[:, t].any()
    ]
    by_carries = {}
    for count in np.unique(carries):
        which = carries == count
        answering = outcome.answering & which[:, None]
        by_carries[str(count)] = {"problems": int(which.sum()), "steps": outcome.mean(answering)}
    correct, total = int(outcome.correct.sum()), len(outcome.correct)
    return {
        "correct": correct,
        "total": total,
        **outcome.summary(),
        "by_token": by_token,
        "by_carries": by_carries,
    }


def _drawn(think: Thinker, trained, digits: int, ways: dict[str, Halting], seed: int):
    """Loops of every token of a few problems, under the calibrated rules: few carries to many."""
    task = trained.config.data.task
    many = addition.sample_exact(jax_settings.key(seed + 1), digits, 40 * DRAWN_PROBLEMS, task)
    order = np.argsort(np.asarray(addition.carries(many, task)), kind="stable")
    picked = order[np.linspace(0, len(order) - 1, DRAWN_PROBLEMS).astype(int)]
    problems = Problems(*(np.asarray(x)[picked] for x in many))
    outcomes = {rule: think(problems, ways[rule]) for rule in RULES}
    length = outcomes[RULES[0]].read.shape[1]
    batch = addition.problem_rows(problems, length, task)
    drawn = []
    for i, carries in enumerate(np.asarray(addition.carries(problems, task))):
        count = int(outcomes[RULES[0]].read[i].sum())
        steps = {rule: outcome.steps[i, :count].tolist() for rule, outcome in outcomes.items()}
        text = addition.decode(np.asarray(batch.tokens[i, :count]))
        drawn.append({"text": text, "carries": int(carries), "steps": steps})
    return drawn


def _milliseconds(think: Thinker, problems: Problems, ways: dict[str, Halting]) -> dict[str, float]:
    """Medians of scoring some problems once, taking turns."""
    batches = think.batches(problems)
    programs = {
        name: timing.Program(lambda way=way: jax.block_until_ready(think.run(batches, way)), 1)
        for name, way in ways.items()
    }
    times = timing.medians(programs, TIMED_PASSES)
    return {name: 1e3 * median for name, (_, median, _) in times.items()}


def show(found: dict[str, Any]) -> None:
    """A table for people."""
    table = Table("digits", "halting", "right", "loops: answer", "all tokens", "row", "saved")
    for digits, ways in found["lengths"].items():
        for name, line in ways.items():
            table.add_row(
                digits,
                name,
                f"{line['accuracy']:.2%}",
                f"{line['answer_steps']:.2f}",
                f"{line['text_steps']:.2f}",
                f"{line['row_loops']:.2f}",
                f"{found['loops'] / line['row_loops']:.2f}x",
            )
        table.add_section()
    console.print(table)
    for rule in RULES:
        way = found["ways"][rule]
        console.print(
            f"{rule}: threshold {way['after']:.8g}, calibrated on {CALIBRATED_ON:,} problems of the"
            " training law"
        )
    times = ", ".join(f"{name} {time:.1f} ms" for name, time in found["milliseconds"].items())
    console.print(f"scoring once on {found['device']}: {times}")


def draw(found: dict[str, Any]) -> Figure:
    """Loops of each token of a few problems as a heat map, and accuracy over loops below it."""
    problems = found["drawn"]
    tokens = max(len(problem["text"]) for problem in problems)
    loops, width = found["loops"], figures.WIDE + 1.6
    heat, curve, above, below = 0.17 * len(problems), 1.7, 0.25, 0.95
    height = above + len(RULES) * (heat + 0.45) + curve + below
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    left, right = 0.75 / width, 1 - 0.75 / width
    for i, rule in enumerate(RULES):
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
        axes.set_yticks(range(len(problems)), [str(p["carries"]) for p in problems], fontsize=6)
        axes.set_ylabel("carries")
        axes.set_xticks([])
    bar = figure.add_axes(
        (right + 0.1 / width, (height - above - heat) / height, 0.1 / width, heat / height)
    )
    figure.colorbar(image, cax=bar).set_ticks(sorted({1, loops}))
    axes = figure.add_axes((left, below / height, (right - left) * 0.6, (curve - 0.15) / height))
    for i, rule in enumerate(RULES):
        points = sorted((p["row_loops"], 100 * p["accuracy"]) for p in found["swept"][rule])
        style = {"color": figures.COLOURS[i], "marker": figures.MARKERS[i], "markersize": 3}
        axes.plot(*zip(*points, strict=True), label=f"{rule}, threshold moved", **style)
        line = found["lengths"][str(found["swept"]["digits"])][rule]
        axes.plot(
            line["row_loops"], 100 * line["accuracy"], "o", markersize=8, fillstyle="none",
            color=figures.COLOURS[i],
        )  # fmt: skip
    fixed = found["swept"][FIXED]
    loops_of_all = range(1, len(fixed) + 1)
    axes.plot(
        loops_of_all, [100 * x for x in fixed], color=figures.GREY, label="as many for all rows"
    )
    for name, marker in ((NONE, "x"), (SEED, "+")):
        line = found["lengths"][str(found["swept"]["digits"])][name]
        label = "no halting" if name == NONE else "the original's thresholds"
        axes.plot(line["row_loops"], 100 * line["accuracy"], marker, color="black", label=label)
    axes.set_xlabel(f"loops of a row, mean; {found['swept']['digits']} digits")
    axes.set_ylabel("whole answers right (%)")
    axes.grid()
    axes.legend(loc="center left", bbox_to_anchor=(1.04, 0.5), frameon=False)
    caption = (
        f"{found['system']}: {found['examples']:,} problems a length; circles: calibrated on the"
        f" training law. {found['device']}, {found['date']}."
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
        prog="python -m spak_jax.halting",
        description="Stop each token once it has thought enough: what that costs and saves.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--digits", default="4,8,12", help="lengths to score (default 4,8,12)")
    parser.add_argument("--examples", type=int, default=1_000, help="problems a length")
    parser.add_argument("--seed", type=int, default=0, help="of the problems")
    parser.add_argument("--loops", type=int, help="at most, instead of the trained number")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for the pictures (default: RUN/halting)"
    )
    arguments = parser.parse_intermixed_args()
    digits = evaluate.parse_digits(arguments.digits)
    evaluate.check_range("--examples", arguments.examples, 1, 1_000_000)
    evaluate.check_range("--seed", arguments.seed, 0, 2**31 - 2)
    evaluate.check_range("--loops", arguments.loops, 1, evaluate.MAX_LOOPS)
    trained = evaluate.load(arguments.run)
    out = writable_folder(arguments.out or arguments.run / "halting")
    found = measure(trained, digits, arguments.examples, arguments.seed, arguments.loops)
    show(found)
    evaluate.warn_of_loops(found["config"]["model"], found["loops"])
    files = {"halting.json": json.dumps(found, indent=1) + "\n"}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(figures.STYLE)
        drawn = draw(found)
        files |= {f"halting.{kind}": figures.saved(drawn, kind) for kind in ("png", "pdf")}
    for name, content in files.items():
        write_file(out / name, content)
        console.print(f"wrote {out / name}")


if __name__ == "__main__":
    run_program(main)
