"""Zero-shot scoring: `python -m spak_jax.evaluate RUN [options]`.

What is scored, and how, `spak_jax.evaluation.score` says.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from spak_jax.command_line import (
    InputError,
    check_range,
    console,
    parse_lengths,
    run_program,
    writable_folder,
)
from spak_jax.config_sections import MAX_LENGTH
from spak_jax.evaluation.answers import write_answers
from spak_jax.evaluation.calibration import calibrated
from spak_jax.evaluation.forward import PUBLISHED_HALTING, Halting
from spak_jax.evaluation.loaded import LoadedModel, load, seed_folders
from spak_jax.evaluation.loops import Loops, asked_loops
from spak_jax.evaluation.problems_file import read_problems
from spak_jax.evaluation.results import write_results
from spak_jax.evaluation.score import Settings, score, score_own_problems
from spak_jax.models.halting import RULES
from spak_jax.reports.scores import print_over_seeds, print_results

# Wrong answers that are shown.
SHOWN = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.evaluate",
        description="Score a run on problems it has not seen, whole answers only.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--lengths", help="of problems to score, such as 1-12,16,24")
    parser.add_argument("--examples", type=int, help="problems a length")
    parser.add_argument("--seed", type=int, help="of the problems")
    parser.add_argument(
        "--loops",
        help="instead of the trained number: another, such as 24, or so many times the length of"
        " each problem, such as 2x or 2x+8; with --halt so many at most",
    )
    parser.add_argument(
        "--halt",
        nargs="?",
        const="convergence",
        choices=[*RULES, "published"],
        metavar="RULE",
        help="stop each token by a rule: convergence (the default), once its state has come to"
        " rest; agreement, once what it reads out has; confidence, once it is sure; all calibrated"
        " on trained lengths first; published: once it is sure by the original's thresholds, which"
        " lose answers",
    )
    parser.add_argument("--decode", action="store_true", help="generate instead of teacher forcing")
    parser.add_argument(
        "--problems",
        metavar="FILE",
        help="your own, such as 123+456, one a line, optionally =579; - for standard input",
    )
    parser.add_argument(
        "--kinds",
        action="store_true",
        help="at each length also the task's hard problems, such as long chains of carries",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a results file")
    arguments = parser.parse_intermixed_args()
    lengths = None
    if arguments.lengths is not None:
        lengths = parse_lengths("--lengths", arguments.lengths, MAX_LENGTH)
    check_range("--examples", arguments.examples, 1, 10_000_000)
    check_range("--seed", arguments.seed, 0, 2**31 - 1)
    loops = asked_loops(arguments.loops)
    runs = seed_folders(arguments.run) or [arguments.run]
    first = load(runs[0])
    task = first.task
    if arguments.kinds and not task.kinds:
        raise InputError(f"--kinds: {first.config.name} was trained on {task.name}, which has none")
    own = read_problems(arguments.problems, task) if arguments.problems else None
    defaults = first.config.evaluation
    settings = Settings(
        lengths=lengths or defaults.lengths,
        examples=arguments.examples or defaults.examples,
        seed=defaults.seed if arguments.seed is None else arguments.seed,
        loops=loops,
        decode=arguments.decode,
        kinds=task.kinds if arguments.kinds else (),
    )
    if arguments.json:
        # Before the work, so that none is lost to a folder that cannot be written.
        writable_folder(arguments.json.parent)
    source = "standard input" if arguments.problems == "-" else Path(arguments.problems or "").name
    every = []
    for run in runs:
        loaded = first if run is runs[0] else load(run)
        if arguments.halt:
            settings = replace(settings, halt=_halting(loaded, arguments.halt, loops))
        wrong = []
        if own:
            results, wrong = score_own_problems(loaded, settings, own, source, run)
        else:
            results = score(loaded, settings, run)
        print_results(results)
        _show_wrong(loaded, settings, wrong)
        if arguments.json:
            path = arguments.json
            if len(runs) > 1:
                path = path.with_name(f"{path.stem}-{run.name}{path.suffix}")
            write_results(path, results)
            console.print(f"results: {path}")
        every.append(results)
    if len(every) > 1:
        print_over_seeds(every)


def _halting(loaded: LoadedModel, name: str, loops: int | Loops | None) -> Halting:
    """The rule that `--halt` names, calibrated for a model; says what it is, and what it costs."""
    if name == "published":
        console.print(
            "warning: --halt published: the original's thresholds lose answers, the more the longer"
            " the problems; --halt convergence is calibrated for the model"
        )
        return PUBLISHED_HALTING
    halting = calibrated(loaded, name, loops)
    console.print(
        f"halting by {name}, calibrated on problems of trained lengths: threshold"
        f" {halting.after:.8g}"
    )
    if name == "confidence":
        console.print(
            "warning: --halt confidence: on problems longer than in training a model can be sure"
            " and wrong; --halt convergence waits until nothing moves"
        )
    return halting


def _show_wrong(loaded: LoadedModel, settings: Settings, wrong: list[tuple[str, ...]]) -> None:
    """What the model writes in the place of some answers, and what is right."""
    task, shown = loaded.task, wrong[:SHOWN]
    answers = write_answers(loaded, shown, settings.loops, settings.halt) if shown else []
    for problem, answer in zip(shown, answers, strict=True):
        console.print(f"wrong: {task.format(problem)}={answer.text}, right: {task.solve(problem)}")
    if len(wrong) > SHOWN:
        console.print(f"... and {len(wrong) - SHOWN} more")


if __name__ == "__main__":
    run_program(main)
