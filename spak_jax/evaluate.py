"""Zero-shot scoring: `python -m spak_jax.evaluate RUN [options]`.

A problem counts only where the whole answer is right, its closing newline included. Greedy
generation is right exactly when the largest logit is right at every step along the true answer:
as long as all earlier choices were right, the model has read the true text. So one forward pass
over the true text scores all steps at once; `--decode` generates for real and must agree.
"""

import argparse
import datetime
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.ops.looped import AT_ONCE
from spak_jax import addition, checkpoint, generation, jax_settings, metrics, model
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
from spak_jax.config import MAX_DIGITS, OPERANDS, Config, Evaluation, LoopedModel, Train

# Halting rules, in the order of helps.
HALTING_RULES = ("convergence", "confidence")

# Rows are filled up to a multiple of the step, so that many lengths share one compiled program; a
# GPU computes so fast that compiling is what counts.
ROWS_PER_CALL, ROWS_PER_CALL_ON_GPU = 512, 4096
LENGTH_STEP, LENGTH_STEP_ON_GPU = 16, 64
# Fewer rows where they are long. A GPU's kernels hold no score; plain attention holds all at once.
SCORES_PER_CALL, TOKENS_PER_CALL_ON_GPU = 2**23, 2**18
# Beyond so many digits fewer problems are scored, so that their digits are as many.
FULL_DIGITS = 100
# The seed's columns split one draw; 10 times as many problems leave each about enough.
SEED_COLUMNS_FACTOR = 10
CURVE_POINTS = 400
MAX_LOOPS = 10_000
# Wrong answers that are shown.
SHOWN = 10
# Of waiting for scores.
INSTEAD = (
    "fewer problems (--examples; evaluation.examples of a training) or shorter ones (--digits;"
    " evaluation.digits) take less"
)
LONGEST_PROBLEM = max(addition.text_length(MAX_DIGITS, task) for task in OPERANDS)

_problem_rows = jax.jit(addition.problem_rows, static_argnums=(1, 2))


class Trained(NamedTuple):
    """A model as a run left it: configuration, weights (an `nnx.State`), steps trained."""

    config: Config
    weights: Any
    step: int


class Halting(NamedTuple):
    """A rule that stops tokens, of `HALTING_RULES`, and its thresholds before the `=` of a problem
    and from it on."""

    rule: str
    before: float
    after: float

    @classmethod
    def with_doubt(cls, rule: str, doubt: float) -> "Halting":
        threshold = 1 - doubt if rule == "confidence" else doubt
        return cls(rule, threshold, threshold)


# "Wait to think": the original's thresholds.
PUBLISHED_HALTING = Halting("confidence", 0.90, 0.999)


@dataclass(frozen=True)
class Settings:
    """What to score and how.

    digits: lengths, all operands exactly that long. examples: problems for each; of n > 100 digits
    100 / n times as many. seed: of the problems. loops: None for as many as in training. halt:
    how each token stops; None for never. decode: generate instead of teacher forcing. kinds: of
    additions, scored at each length too (`addition.KINDS`).
    """

    digits: tuple[int, ...]
    examples: int
    seed: int
    loops: int | None = None
    halt: Halting | None = None
    decode: bool = False
    kinds: tuple[str, ...] = ()

    @classmethod
    def of(cls, evaluation: Evaluation) -> "Settings":
        return cls(evaluation.digits, evaluation.examples, evaluation.seed)


class Outcome(NamedTuple):
    """Of each problem: whether it was answered right, and loops taken at the tokens that answer.

    correct: bool `[problems]`. steps: float32 `[problems]`, the mean over the answer's tokens.
    """

    correct: np.ndarray
    steps: np.ndarray


class Answer(NamedTuple):
    """What a model wrote behind `=`, most significant digit first, and the loops of each symbol.

    `loops` of the token that chose it; empty for a model that does not loop.
    """

    text: str
    loops: list[int]


@jax_settings.fixed()
def load(run: Path) -> Trained:
    """The newest checkpoint of a run folder as a model.

    Raises:
      InputError: the folder holds none that can be used.
    """
    if seeds := seed_folders(run):
        raise InputError(
            f"{run} holds runs of several seeds: name one of {', '.join(map(str, seeds))}"
        )
    restored = checkpoint.restore(run)
    _, like = model.abstract(restored.config, addition.VOCABULARY_SIZE)
    try:
        weights = checkpoint.from_named(like, restored.weights)
    except ValueError as error:
        raise InputError(f"the checkpoint of step {restored.step} in {run}: {error}") from None
    return Trained(restored.config, jax.device_put(weights), restored.step)


def seed_folders(run: Path) -> list[Path]:
    """The run folders in a folder of several seeds, by rising seed; none in a run folder."""
    if not run.is_dir() or checkpoint.steps_in(run):
        return []
    folders = {
        int(number): folder
        for folder in run.iterdir()
        if (number := folder.name.removeprefix("seed")).isdecimal()
        and folder.name == f"seed{number}"
        and checkpoint.steps_in(folder)
    }
    return [folders[seed] for seed in sorted(folders)]


def forward(config: Config, loops: int | None = None, halt: Halting | None = None) -> Callable:
    """A pure function of (weights, tokens) that gives logits and the loops each token took.

    Raises:
      InputError: loops or halting are asked of a model that does not loop.
    """
    looped = isinstance(config.model, LoopedModel)
    if not looped and (loops is not None or halt):
        asked = "--halt" if halt else "--loops"
        raise InputError(
            f"{asked}: {config.name} is a stack of {config.model.layers} blocks;"
            " only a looped model has loops to choose"
        )
    definition, _ = model.abstract(config, addition.VOCABULARY_SIZE)
    depth = (loops or config.model.loops) if looped else 0

    def plain(weights, tokens):
        network = nnx.merge(definition, weights)
        more = {"loops": loops} if looped else {}
        logits = network(tokens, ids=addition.coupled_ids(tokens), **more)
        return logits, jnp.full(tokens.shape, depth, jnp.int32)

    def halting(weights, tokens):
        return nnx.merge(definition, weights).halting_logits(
            tokens,
            thresholds(tokens, halt),
            rule=halt.rule,
            loops=loops,
            ids=addition.coupled_ids(tokens),
        )

    return halting if halt else plain


def writer(config: Config, loops: int | None = None, halt: Halting | None = None) -> Callable:
    """`generation.fastest` for a model, with loops and halting as `forward` takes them."""
    run = forward(config, loops, halt)
    if halt and halt.rule == "convergence":
        # Whether a token stops hangs on all before it, of which caches keep nothing.
        return functools.partial(generation.generate, generation.recomputing(run))
    sure = functools.partial(thresholds, halting=halt) if halt else None
    return generation.fastest(config, run, loops=loops, thresholds=sure)


def thresholds(tokens: jax.Array, halting: Halting) -> jax.Array:
    """Of each token, float32 `[rows, length]`."""
    asked = jnp.where(addition.from_equals_on(tokens), halting.after, halting.before)
    # What fills a row up after its problem is not waited for; nothing before it sees it.
    return jnp.where(addition.ended(tokens), AT_ONCE[halting.rule], asked).astype(jnp.float32)


def rows_per_call(length: int) -> int:
    """Problems of so many tokens that one call of a compiled program scores at most."""
    if jax.default_backend() == "gpu":
        return min(ROWS_PER_CALL_ON_GPU, _power_of_two(TOKENS_PER_CALL_ON_GPU // length))
    return min(ROWS_PER_CALL, _power_of_two(SCORES_PER_CALL // length**2))


def padded_length(digits: int, task: str) -> int:
    """Tokens that rows of problems are filled up to, so that one program serves many lengths."""
    step = LENGTH_STEP_ON_GPU if jax.default_backend() == "gpu" else LENGTH_STEP
    length = addition.text_length(digits, task)
    # Longer rows by larger steps: a tenth more work, and fewer programs.
    step *= _power_of_two(length // (10 * step))
    return -(-length // step) * step


def calls(
    digits: np.ndarray, task: str, most_rows: Callable[[int], int] = rows_per_call
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """What calls of compiled programs take: problems of one padded length together, so that a long
    one makes no short one's row longer.

    Args:
      digits: int `[problems]`, of the longest operand.
      task: of the problems.
      most_rows: how many rows of so many tokens one call takes at most.

    Yields:
      The indices of the problems that a call answers; the same, filled up with the first of them to
      a number of rows that few programs serve; and the length of the rows.
    """
    different, which = np.unique(digits, return_inverse=True)
    lengths = np.array([padded_length(n, task) for n in different.tolist()])[which]
    for length in np.unique(lengths).tolist():
        together = np.flatnonzero(lengths == length)
        # A power of two, so that few programs serve all counts.
        rows = min(most_rows(length), 1 << (len(together) - 1).bit_length())
        for start in range(0, len(together), rows):
            chosen = together[start : start + rows]
            filling = np.full(rows - len(chosen), chosen[0])
            yield chosen, np.concatenate([chosen, filling]), length


class Scorer:
    """Answers problems with one model and settings, compiling once for each padded length.

    What a problem comes to does not depend on those it is answered with.
    """

    def __init__(self, trained: Trained, settings: Settings):
        self._weights = trained.weights
        # What the model computes does not depend on how it was trained: one program for all seeds.
        config = trained.config.model_copy(update={"train": Train()})
        self._config, self._settings = config, settings
        self._rows = _compiled_rows(config, settings.loops, settings.halt, settings.decode)

    @jax_settings.fixed()
    def __call__(self, problems: Problems, advance: Callable[[int], None] = lambda n: None):
        """Scores problems.

        Args:
          problems: any number, as arrays of device or host.
          advance: told after each call how many problems it scored.

        Returns:
          Their `Outcome`, in their order.
        """
        task = self._config.data.task
        problems = Problems(*map(np.asarray, problems))
        digits = addition.longest_operand(problems)
        parts = []
        for chosen, filled, length in calls(digits, task, self._rows_per_call):
            rows = addition.widened(Problems(*(array[filled] for array in problems)), length)
            parts.append((chosen, self._rows(self._weights, _problem_rows(rows, length, task))))
            advance(len(chosen))
        outcome = Outcome(np.empty(len(digits), bool), np.empty(len(digits), np.float32))
        for chosen, found in parts:
            for whole, part in zip(outcome, found, strict=True):
                whole[chosen] = np.asarray(part)[: len(chosen)]
        return outcome

    def _rows_per_call(self, length: int) -> int:
        rows = rows_per_call(length)
        if self._settings.decode:
            # So that caches hold them; the row that is scored is one token longer.
            held = generation.most_rows(self._config.model, length + 1, self._settings.loops)
            rows = min(rows, _power_of_two(held))
        return rows


@functools.lru_cache
def _compiled_rows(
    config: Config, loops: int | None, halt: Halting | None, decode: bool
) -> Callable:
    if decode:
        write = writer(config, loops, halt)
        return jax.jit(lambda weights, batch: _decoded(write, weights, batch))
    run = forward(config, loops, halt)
    return jax.jit(lambda weights, batch: _teacher_forced(run, weights, batch))


@jax_settings.fixed()
def write_answers(
    trained: Trained,
    asked: Sequence[tuple[int, ...]],
    loops: int | None = None,
    halt: Halting | None = None,
) -> list[Answer]:
    """Generates the answers to problems greedily, each as if it were asked alone.

    Args:
      trained: the model.
      asked: operands of each problem.
      loops: None for as many as in training.
      halt: how each token stops; None for never.

    Returns:
      What was written. A text has room for the longest answer to such operands, its newline, and
      nothing more: a model that does not stop is cut off there.
    """
    config = trained.config
    task, looped = config.data.task, isinstance(config.model, LoopedModel)
    write = jax.jit(writer(config, loops, halt))
    digits = np.array([max(len(str(number)) for number in numbers) for numbers in asked])
    most = lambda length: min(  # noqa: E731
        rows_per_call(length), _power_of_two(generation.most_rows(config.model, length, loops))
    )
    answers: list[Answer] = [Answer("", [])] * len(asked)
    for chosen, filled, length in calls(digits, task, most):
        prompts = [addition.prompt_text(asked[i], task) for i in filled]
        tokens = np.array([addition.encode(prompt.ljust(length, "\n")) for prompt in prompts])
        starts = np.array([len(prompt) for prompt in prompts], np.int32)
        room = np.array([addition.text_length(digits[i], task) for i in filled], np.int32)
        written, taken = jax.device_get(
            write(trained.weights, tokens.astype(np.int32), starts, room)
        )
        for row, i in enumerate(chosen):
            start, end = starts[row], room[row]
            text = addition.decode(written[row, start:end]).partition("\n")[0]
            spent = taken[row, start : start + len(text)].tolist() if looped else []
            answers[i] = Answer(text[::-1], spent[::-1])
    return answers


@jax_settings.fixed()
def score(trained: Trained, settings: Settings) -> dict[str, Any]:
    """Scores a model at every asked length, by the seed's columns and by carries.

    Returns:
      The contents of a results file, without the training curve.
    """
    scorer = Scorer(trained, settings)
    key = jax_settings.key(settings.seed)
    longest, task = trained.config.data.longest, trained.config.data.task
    column_problems = addition.sample_seed_columns(
        jax.random.fold_in(key, 0), SEED_COLUMNS_FACTOR * settings.examples, task
    )
    counts = {digits: _problems_of(settings.examples, digits) for digits in settings.digits}
    lengths, kinds, outcomes, carries = {}, {kind: {} for kind in settings.kinds}, [], []
    of_kind = {kind: {n: _of_kind(kind, count) for n, count in counts.items()} for kind in kinds}
    total = sum(sum(each.values()) for each in (counts, *of_kind.values())) + column_problems.count
    with progress("scoring", total, unit="problems", instead=or_a_gpu(INSTEAD)) as told:
        advance = told.advance
        for digits, count in counts.items():
            problems = addition.sample_exact(jax.random.fold_in(key, digits), digits, count, task)
            outcome = scorer(problems, advance)
            lengths[str(digits)] = summary(outcome, zero_shot=digits > longest)
            outcomes.append(outcome)
            carries.append(addition.carries(problems, task))
            for i, kind in enumerate(settings.kinds):
                random = np.random.default_rng((settings.seed, digits, i))
                drawn = addition.sample_kind(random, kind, digits, of_kind[kind][digits])
                outcome = scorer(drawn, advance)
                kinds[kind][str(digits)] = summary(outcome, zero_shot=digits > longest)
        column_outcome = scorer(column_problems, advance)
    results = _description(trained, settings)
    results["lengths"] = lengths
    results["seed_columns"] = _seed_columns(column_problems, column_outcome, longest)
    results["kinds"] = kinds
    results["carries"] = _by(
        np.concatenate(carries), Outcome(*map(np.concatenate, zip(*outcomes, strict=True)))
    )
    return results


def score_run(trained: Trained, settings: Settings, run: Path) -> dict[str, Any]:
    """The contents of a results file: `score`, and the training curve of the run folder."""
    return score(trained, settings) | {"training": training_curve(run)}


def score_own_problems(
    trained: Trained, settings: Settings, own: list[tuple[int, ...]], source: str
) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """Scores the user's own problems, grouped by the longest operand's digits.

    Returns:
      The contents of a results file, and the problems answered wrong.
    """
    longest, task = trained.config.data.longest, trained.config.data.task
    digits = np.array([max(len(str(number)) for number in numbers) for numbers in own])
    outcome = Outcome(np.empty(len(own), bool), np.empty(len(own), np.float32))
    carries = np.empty(len(own), np.int32)
    scorer = Scorer(trained, settings)
    with progress("scoring", len(own), unit="problems", instead=or_a_gpu(INSTEAD)) as told:
        # A few at a time: as arrays all are as wide as the longest.
        for chosen, _, _ in calls(digits, task):
            problems = addition.problems_from_integers([own[i] for i in chosen])
            found = scorer(problems, told.advance)
            outcome.correct[chosen], outcome.steps[chosen] = found
            carries[chosen] = addition.carries(problems, task)
    results = _description(trained, settings) | {"examples": len(own), "problems": source}
    results["lengths"] = _by(digits, outcome, longest)
    results["seed_columns"] = {}
    results["carries"] = _by(carries, outcome)
    wrong = [numbers for numbers, right in zip(own, outcome.correct, strict=True) if not right]
    return results, wrong


def summary(outcome: Outcome, **more: Any) -> dict[str, Any]:
    """Counts, accuracy and its 95% Wilson interval (Wilson 1927), mean loops at answer tokens."""
    # A third of what a program that scores nothing, `solve`, would wait for before it starts.
    from scipy.stats import binomtest

    correct, total = int(outcome.correct.sum()), len(outcome.correct)
    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return {
        "correct": correct,
        "total": total,
        "accuracy": correct / total,
        "low": float(interval.low),
        "high": float(interval.high),
        **more,
        "mean_steps": float(outcome.steps.mean()),
    }


def read_problems(path: str, task: str = "addition") -> list[tuple[int, ...]]:
    """The problems in a file, one `123+456` or `123+456=579` a line; `-` is standard input.

    Raises:
      InputError: naming the line that is no problem, and why.
    """
    name = "standard input" if path == "-" else path
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as file:
            # One byte more than fits, so that a line that is too long shows itself.
            lines = iter(lambda: file.readline(LONGEST_PROBLEM + 2), b"")
            problems = [_read_line(name, i, line, task) for i, line in enumerate(lines, start=1)]
    except OSError as error:
        raise InputError(f"cannot read the problems file {name}: {error.strerror}") from None
    if not problems:
        raise InputError(f"{name} holds no problem: one such as 123+456 a line")
    return problems


def training_curve(run: Path) -> dict[str, list[float]]:
    """Losses over steps, thinned for drawing, and the median seconds that a step took.

    Returns:
      `step` and `loss` (the mean over the compiled call that ended there), `validation_step` and
      `validation_loss`, and `seconds_per_step`.
    """
    lines = metrics.read(run)
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


def print_results(results: Mapping[str, Any]) -> None:
    """The zero-shot table, for people."""
    loops = f", {results['loops']} loops" if results["loops"] else ""
    seed = results["config"]["train"]["seed"]
    table = _table(f"{results['system']}, training seed {seed}{loops}, step {results['step']:,}")
    for length, line in results["lengths"].items():
        _add_row(table, length, line)
    if results["seed_columns"]:
        table.add_section()
        for column, line in results["seed_columns"].items():
            _add_row(table, f"seed's {column}", line)
    for kind, lines in results.get("kinds", {}).items():
        table.add_section()
        for length, line in lines.items():
            _add_row(table, f"{kind} {length}", line)
    console.print(table)
    if results["loops"]:
        warn_of_loops(results["config"]["model"], results["loops"])


def print_over_seeds(every: Sequence[Mapping[str, Any]]) -> None:
    """The same of runs that differ in their training seed: means over seeds and intervals."""
    # Reading results takes what a program that scores nothing would wait for before it starts.
    from spak_jax.results import OVER_SEEDS, Evaluated, Results, ranges

    seeds = tuple(Results.model_validate_json(json.dumps(results)) for results in every)
    line = Evaluated(every[0]["system"], seeds)
    numbers = ranges(results.config.train.seed for results in seeds)
    loops = f", {every[0]['loops']} loops" if every[0]["loops"] else ""
    table = _table(f"{line.label}, mean over training seeds {numbers}{loops}")
    parts = [("", "lengths", line.at_length, line.lengths)]
    parts += [("seed's ", "seed_columns", line.in_column, seeds[0].seed_columns)]
    for prefix, part, estimate, names in parts:
        table.add_section()
        for name in names:
            lines = [results[part][str(name)] for results in every]
            found = estimate(name)
            of_all = {
                "correct": sum(each["correct"] for each in lines),
                "total": sum(each["total"] for each in lines),
                "mean_steps": float(np.mean([each["mean_steps"] for each in lines])),
            }
            mean = {"accuracy": found.mean, "low": found.low, "high": found.high}
            _add_row(table, f"{prefix}{name}", lines[0] | of_all | mean)
    console.print(table)
    console.print(f"Intervals: {OVER_SEEDS}.")


def warn_of_loops(architecture: Mapping[str, Any], loops: int) -> None:
    """Says so where a model runs more loops than it was trained for.

    architecture: the configuration's section `model`.
    """
    if loops > architecture["loops"] and not architecture.get("free_loops"):
        console.print(
            f"note: {loops} loops, {architecture['loops']} in training: this model was not trained"
            " to be repeated (model.free_loops = 0), and more loops can cost all answers"
        )


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes a results file."""
    write_file(path, json.dumps(results, indent=1) + "\n")


def or_a_gpu(instead: str) -> str:
    """What to do instead of waiting; without a GPU also that one would do."""
    return instead if jax.default_backend() == "gpu" else f"{instead}; a GPU is far faster"


def device_name() -> str:
    """What this process computes on, as JAX names it."""
    return jax.devices()[0].device_kind


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.evaluate",
        description="Score a run on additions it has not seen, whole answers only.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--digits", help="lengths to score, such as 1-12,16,24")
    parser.add_argument("--examples", type=int, help="problems a length")
    parser.add_argument("--seed", type=int, help="of the problems")
    parser.add_argument("--loops", type=int, help="instead of the trained number")
    parser.add_argument(
        "--halt",
        nargs="?",
        const="convergence",
        choices=[*HALTING_RULES, "published"],
        help="stop each token by a rule: convergence (the default), once its state has come to"
        " rest; confidence, once it is sure; both calibrated on trained lengths first; published:"
        " once it is sure by the original's thresholds, which lose answers",
    )
    parser.add_argument("--decode", action="store_true", help="generate instead of teacher forcing")
    parser.add_argument(
        "--problems",
        metavar="FILE",
        help="your own, one 123+456 a line, optionally =579; - for standard input",
    )
    parser.add_argument(
        "--kinds",
        action="store_true",
        help=f"at each length also {', '.join(addition.KINDS)} additions",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a results file")
    arguments = parser.parse_intermixed_args()
    digits = parse_digits(arguments.digits) if arguments.digits is not None else None
    check_range("--examples", arguments.examples, 1, 10_000_000)
    check_range("--seed", arguments.seed, 0, 2**31 - 1)
    check_range("--loops", arguments.loops, 1, MAX_LOOPS)
    runs = seed_folders(arguments.run) or [arguments.run]
    first = load(runs[0])
    task = first.config.data.task
    if arguments.kinds and task != "addition":
        raise InputError(f"--kinds: {first.config.name} was trained on {task}, not addition")
    own = read_problems(arguments.problems, task) if arguments.problems else None
    defaults = first.config.evaluation
    settings = Settings(
        digits=digits or defaults.digits,
        examples=arguments.examples or defaults.examples,
        seed=defaults.seed if arguments.seed is None else arguments.seed,
        loops=arguments.loops,
        decode=arguments.decode,
        kinds=addition.KINDS if arguments.kinds else (),
    )
    if arguments.json:
        # Before the work, so that none is lost to a folder that cannot be written.
        writable_folder(arguments.json.parent)
    source = "standard input" if arguments.problems == "-" else Path(arguments.problems or "").name
    every = []
    for run in runs:
        trained = first if run is runs[0] else load(run)
        if arguments.halt:
            settings = replace(settings, halt=_halting(trained, arguments.halt, arguments.loops))
        wrong = []
        if own:
            results, wrong = score_own_problems(trained, settings, own, source)
        else:
            results = score(trained, settings)
        results["training"] = training_curve(run)
        print_results(results)
        _show_wrong(trained, settings, wrong)
        if arguments.json:
            path = arguments.json
            if len(runs) > 1:
                path = path.with_name(f"{path.stem}-{run.name}{path.suffix}")
            write_results(path, results)
            console.print(f"results: {path}")
        every.append(results)
    if len(every) > 1:
        print_over_seeds(every)


def parse_digits(text: str) -> tuple[int, ...]:
    """`1-12,16,24` as sorted lengths without repeats.

    Raises:
      InputError: it is written otherwise, or a length is not between 1 and `MAX_DIGITS`.
    """
    return tuple(sorted(set(_lengths(text))))


def _lengths(text: str) -> Iterator[int]:
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = (first, last) if dash else (first, first)
        if not all(number.isdecimal() for number in numbers):
            raise InputError(f"--digits {text[:80]!r}: expected lengths such as 1-12,16,24")
        # Python refuses to read numbers of thousands of digits.
        bounds = [int(number[:9]) for number in numbers]
        if not 1 <= bounds[0] <= bounds[1] <= MAX_DIGITS:
            raise InputError(
                f"--digits {text[:80]!r}: {part[:80]!r} must run upwards between 1 and {MAX_DIGITS}"
            )
        yield from range(bounds[0], bounds[1] + 1)


def check_range(option: str, value: int | None, low: int, high: int) -> None:
    """Raises `InputError` where an option's number is given and out of bounds."""
    if value is not None and not low <= value <= high:
        raise InputError(f"{option} {value}: must be from {low:,} to {high:,}")


def _read_line(name: str, number: int, line: bytes, task: str) -> tuple[int, ...]:
    where = f"{name}, line {number}"
    if not line.endswith(b"\n"):
        if len(line) > LONGEST_PROBLEM:
            raise InputError(
                f"{where}: longer than any problem of {MAX_DIGITS}-digit numbers"
                f" ({LONGEST_PROBLEM} characters)"
            )
        raise InputError(f"{where}: no newline at its end; the file may have been cut short")
    text = line[:-1].decode("ascii", "backslashreplace")
    if text.endswith("\r"):
        raise InputError(f"{where}: ends as on Windows; save the file with Unix line ends")
    if not text:
        raise InputError(f"{where}: empty; one problem such as 123+456 a line")
    try:
        return addition.parse_problem(text, task)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _teacher_forced(run: Callable, weights, batch: Batch) -> tuple[jax.Array, jax.Array]:
    logits, steps = run(weights, batch.tokens)
    right = (logits.argmax(-1) == batch.targets) | ~batch.answer
    return right.all(-1), steps.mean(-1, jnp.float32, where=batch.answer)


def _decoded(write: Callable, weights, batch: Batch) -> tuple[jax.Array, jax.Array]:
    # The whole rows; the answer's mask, which speaks of targets, moves one place on with them.
    tokens = jnp.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
    answer = jnp.pad(batch.answer, [(0, 0), (1, 0)])
    generated, steps = write(weights, tokens, answer.argmax(-1))
    right = (generated == tokens) | ~answer
    return right.all(-1), steps.mean(-1, jnp.float32, where=answer)


def _problems_of(examples: int, digits: int) -> int:
    """How many problems of a length are scored."""
    return max(1, examples * FULL_DIGITS // max(digits, FULL_DIGITS))


def _of_kind(kind: str, count: int) -> int:
    """How many of a kind: a tenth as many as plain ones; 99...9 + 1 can be written in two ways."""
    return min(count, 2) if kind == "nines" else -(-count // 10)


def _power_of_two(number: int) -> int:
    """The largest one up to a number, at least 1."""
    return 1 << max(number.bit_length() - 1, 0)


def _by(group: np.ndarray, outcome: Outcome, longest: int | None = None) -> dict[str, Any]:
    """Summaries of the problems of each group, a non-negative number, in order."""
    summaries = {}
    for value in np.unique(group):
        chosen = group == value
        more = {} if longest is None else {"zero_shot": bool(value > longest)}
        summaries[str(value)] = summary(
            Outcome(outcome.correct[chosen], outcome.steps[chosen]), **more
        )
    return summaries


def _seed_columns(problems: Problems, outcome: Outcome, longest: int) -> dict[str, Any]:
    longer = np.asarray(addition.longest_operand(problems))
    columns = {}
    for name, (first, last) in addition.SEED_COLUMNS.items():
        chosen = (first <= longer) & (longer <= last)
        if chosen.any():
            columns[name] = summary(
                Outcome(outcome.correct[chosen], outcome.steps[chosen]),
                zero_shot=bool((longer[chosen] > longest).all()),
                trained_share=float((longer[chosen] <= longest).mean()),
            )
    return columns


def _halting(trained: Trained, name: str, loops: int | None) -> Halting:
    """The rule that `--halt` names, calibrated for a model; says what it is, and what it costs."""
    if name == "published":
        console.print(
            "warning: --halt published: the original's thresholds lose answers, the more the longer"
            " the numbers; --halt convergence is calibrated for the model"
        )
        return PUBLISHED_HALTING
    # Here, as it scores by this module.
    from spak_jax.halting import calibrated

    halting = calibrated(trained, name, loops)
    console.print(
        f"halting by {name}, calibrated on problems of trained lengths: threshold"
        f" {halting.after:.8g}"
    )
    if name == "confidence":
        console.print(
            "warning: --halt confidence: on numbers longer than in training a model can be sure and"
            " wrong; --halt convergence waits until nothing moves"
        )
    return halting


def _show_wrong(trained: Trained, settings: Settings, wrong: list[tuple[int, ...]]) -> None:
    """What the model writes in the place of some answers, and what is right."""
    task, shown = trained.config.data.task, wrong[:SHOWN]
    answers = write_answers(trained, shown, settings.loops, settings.halt) if shown else []
    for numbers, answer in zip(shown, answers, strict=True):
        console.print(
            f"wrong: {addition.shown(numbers, task)}={answer.text}, right:"
            f" {addition.answer_of(numbers, task)}"
        )
    if len(wrong) > SHOWN:
        console.print(f"... and {len(wrong) - SHOWN} more")


def _description(trained: Trained, settings: Settings) -> dict[str, Any]:
    looped = isinstance(trained.config.model, LoopedModel)
    return origin(trained) | {
        "loops": (settings.loops or trained.config.model.loops) if looped else None,
        "halting": list(settings.halt[1:]) if settings.halt else None,
        "halting_rule": settings.halt.rule if settings.halt else None,
        "method": "decoding" if settings.decode else "teacher forcing",
        "examples": settings.examples,
        "seed": settings.seed,
    }


def origin(trained: Trained) -> dict[str, Any]:
    """What model something was found out about, and where and when."""
    return {
        "system": trained.config.system,
        "config": trained.config.model_dump(mode="json"),
        "parameters": model.parameter_count(trained.weights),
        "step": trained.step,
        "dtype": str(model.compute_dtype(trained.config.model.dtype)),
        **where_and_when(),
    }


def where_and_when() -> dict[str, str | None]:
    """What every measurement names: device, version of JAX, date, and commit of this code."""
    return {
        "device": device_name(),
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of this code, marked where its files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    git = lambda *words: subprocess.run(  # noqa: E731
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        commit = git("rev-parse", "HEAD")
        # An installed copy may lie inside somebody else's checkout.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        # Results and figures that programs leave in a checkout are not its code.
        changed = git("status", "--porcelain", "--", "..", ":(exclude,top)figures")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+changes" if changed else commit


def _table(title: str) -> Table:
    table = Table(title=f"{title}: whole answers right", title_justify="left")
    for heading in ("digits", "", "right", "95% interval", "problems", "mean loops"):
        table.add_column(heading, justify="left" if not heading else "right")
    return table


def _add_row(table: Table, name: str, line: Mapping[str, Any]) -> None:
    beyond = "zero-shot" if line.get("zero_shot") else ""
    if 0 < line.get("trained_share", 0) < 1:
        beyond = f"{line['trained_share']:.1%} trained lengths"
    table.add_row(
        name,
        beyond,
        f"{line['accuracy']:.1%}",
        f"{line['low']:.1%} - {line['high']:.1%}",
        f"{line['correct']:,} / {line['total']:,}",
        f"{line['mean_steps']:.1f}" if line["mean_steps"] else "",
    )


if __name__ == "__main__":
    run_program(main)
