"""Holds specifications to their laws: `python -m spak_jax.check CONFIG ... [key.path=value ...]
[--target NAME,...] [--results FILE ...]`.

Before a run: what can be known without a GPU, with `--target` also what a compiler knows of one
that is not there, and estimates. After it, with `--results`: what the run came to. Facts are held
against the results files that they name. Exit status 0 if nothing is broken, 1 if a law is broken
or a fact no longer holds, 2 if a specification cannot be used.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels import compile, laws
from pallas_kernels.laws import Law, LawError, Unknown, Value, Verdict, spelled
from pallas_kernels.targets import TARGETS
from spak_jax.command_line import Failure, InputError, Table, console, progress, run_program
from spak_jax.config import (
    Fact,
    Specification,
    add_words,
    files_and_overrides,
    read_specification,
)
from spak_jax.evaluation.results import Results, read_results
from spak_jax.quantities import Quantities, no_quantity, of_results
from spak_jax.reports.grouping import Evaluated, gather, ranges

# Quantities that the target decides.
OF_TARGET = ("target", "kernel", "memory", "time")
LARGEST_EVIDENCE = 64 * 2**20
WORDS = {True: "holds", False: "broken", None: "unknown"}


class Finding(NamedTuple):
    """What became of one law or fact.

    name: of the law or fact. target: the GPU that it was judged for; None where none matters.
    prose: the law or claim in words. check: its expression; None for a fact not yet reproduced.
    """

    name: str
    target: str | None
    prose: str
    check: str | None
    verdict: Verdict


def judge(
    specification: Specification,
    folder: Path,
    targets: Sequence[str] = (),
    evaluated: Evaluated | None = None,
    thorough: bool = True,
) -> list[Finding]:
    """Judges every law of a specification, those of GPUs for each target.

    Args:
      specification: whose.
      folder: where it lies, and those that it is compared with.
      targets: names in `TARGETS`.
      evaluated: its results, if there are any.
      thorough: whether what takes more than a moment is judged, or left unknown.

    Raises:
      InputError: a law cannot be read, or speaks of what there is not; the message names it.
    """
    parsed = [(each, _parsed(each.name, each.check)) for each in specification.invariant]
    for_each = {
        target: Quantities(specification, folder, target, evaluated, thorough)
        for target in (None, *targets)
    }
    return [
        Finding(each.name, target, each.law, law.text, _verdict(each.name, law, for_each[target]))
        for each, law in parsed
        for target in ((targets or (None,)) if _is_of_target(law) else (None,))
    ]


def judge_facts(specification: Specification, folder: Path) -> list[Finding]:
    """Holds every fact against its evidence.

    Raises:
      InputError: a fact or its evidence cannot be read; the message names it.
    """
    return [_judge_fact(fact, folder) for fact in specification.fact]


def require_lawful(specification: Specification, path: Path, overrides: Sequence[str] = ()) -> None:
    """Refuses what its file itself says must not be; without compiling anything.

    What overrides break is another matter: whoever gives them knows that the file's claims are of
    the run that it describes. Each law that no longer holds is said in a line.

    Args:
      specification: with the overrides.
      path: of its file.
      overrides: of the command line.

    Raises:
      InputError: a law is known to be broken, also without the overrides.
    """
    broken = _broken(specification, path)
    if not broken:
        return
    as_written = broken
    if overrides:
        try:
            as_written = _broken(read_specification(path), path)
        except InputError:
            # The file builds no run without them.
            as_written = {}
    for name, why in broken.items():
        if name in as_written:
            raise InputError(f"{path} breaks its law {name}, {why}")
        console.print(f"no longer true with {' '.join(overrides)}: {name}, {why}")


def _broken(specification: Specification, path: Path) -> dict[str, str]:
    """By name the laws that are known to be broken at once, or cannot be judged, and why."""
    found = {}
    for law in specification.invariant:
        alone = specification.model_copy(update={"invariant": (law,)})
        try:
            findings = judge(alone, path.parent, thorough=False)
        except InputError as error:
            # Such as one on loops, of what has none any more.
            found[law.name] = f"{law.law!r}: {error}"
            continue
        for each in findings:
            if each.verdict.holds is False:
                measures = measured(each.verdict)
                found[law.name] = f"{law.law!r}: {each.check} does not hold, with {measures}"
    return found


def measured(verdict: Verdict) -> str:
    """The quantities of a verdict, for people."""
    found = ", ".join(
        f"{name} = {shown(value)}{' (estimate)' * ('time.' in name)}"
        for name, value in verdict.measured.items()
    )
    return "; ".join(part for part in (found, verdict.reason) if part)


def shown(value: Value) -> str:
    """A quantity's value, for people."""
    if isinstance(value, tuple):
        numbers = ranges(value) if all(isinstance(v, int) for v in value) else value
        return f"({numbers})"
    if isinstance(value, bool | str):
        return repr(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.check", description="Hold specifications to their laws."
    )
    add_words(parser, several=True)
    parser.add_argument(
        "--target",
        type=compile.parse_targets,
        default=(),
        metavar="NAME,...",
        help=f"judge for these GPUs too, without having them: {', '.join(TARGETS)}",
    )
    parser.add_argument(
        "--results", type=Path, nargs="+", default=(), metavar="FILE", help="results of a run of it"
    )
    arguments = parser.parse_intermixed_args()
    paths, overrides = files_and_overrides(arguments)
    if arguments.results and len(paths) > 1:
        raise InputError(f"--results are of one specification: {len(paths)} are given")
    compile.touch_no_gpu()
    broken = []
    for path in paths:
        specification = read_specification(path, overrides)
        evaluated = read_evaluated(specification, arguments.results) if arguments.results else None
        with progress(f"judging {path}"):
            findings = judge(specification, path.parent, arguments.target, evaluated)
            findings += judge_facts(specification, path.parent)
        console.print(_table(specification, findings))
        broken += [f"{path}: {each.name}" for each in findings if each.verdict.holds is False]
    if broken:
        raise Failure(f"broken: {', '.join(broken)}")


def read_evaluated(specification: Specification, paths: Sequence[Path]) -> Evaluated:
    """Results files of a specification's runs, all seeds together.

    Raises:
      InputError: one cannot be read or is of another system, or they are of several evaluations.
    """
    files = [(path, read_results(path)) for path in paths]
    for path, read in files:
        if read.config.name != specification.name:
            raise InputError(
                f"{path} is of {read.config.name}: --results must be of {specification.name}"
            )
    return _as_one(files, ", ".join(map(str, paths)))


def _as_one(files: Sequence[tuple[Path, Results]], named: str) -> Evaluated:
    evaluated, _ = gather(files)
    if len(evaluated) > 1:
        labels = ", ".join(line.label for line in evaluated)
        raise InputError(f"{named}: of several evaluations ({labels}); name those of one")
    return evaluated[0]


def _parsed(name: str, check: str) -> Law:
    try:
        return laws.parse(check)
    except LawError as error:
        raise _refused(name, check, error) from None


def _verdict(name: str, law: Law, lookup: laws.Lookup) -> Verdict:
    try:
        return law.check(lookup)
    except LawError as error:
        raise _refused(name, law.text, error) from None


def _refused(name: str, check: str, error: LawError) -> InputError:
    return InputError(f"the law {name}, {check!r}: {error}")


def _is_of_target(law: Law) -> bool:
    return any(part in OF_TARGET for path in law.quantities() for part in path[:1] + path[2:3])


def _judge_fact(fact: Fact, folder: Path) -> Finding:
    if fact.holds is None:
        verdict = Verdict(None, {}, "not yet reproduced")
        return Finding(fact.name, None, fact.claim, None, verdict)
    found = {name: evidence(fact.name, pattern, folder) for name, pattern in fact.evidence.items()}

    def lookup(path: laws.Path) -> Value:
        if path[0] not in found:
            raise no_quantity(path, found)
        return found[path[0]](path)

    verdict = _verdict(fact.name, _parsed(fact.name, fact.holds), lookup)
    return Finding(fact.name, None, fact.claim, fact.holds, verdict)


def evidence(name: str, pattern: str, folder: Path) -> Callable[[laws.Path], Value]:
    """What a fact's evidence gives for a quantity: results files of one system, or any JSON.

    Args:
      name: of the fact.
      pattern: of the files, from the specification's folder; within the project, which is that
        folder's parent, and without `**`.
      folder: of the specification.

    Raises:
      InputError: the pattern is another, or what it names cannot be read.
    """
    project = folder.resolve().parent
    # Before anything is looked for: such patterns walk the whole disk, again and again.
    first, *rest = Path(pattern).parts or ("",)
    if Path(pattern).is_absolute() or ".." in rest or any("**" in part for part in (first, *rest)):
        raise InputError(
            f"the fact {name}: {pattern!r}: must be within {project.name}, with '..' at most once,"
            " at its start, and without '**'"
        )
    try:
        paths = sorted(folder.glob(str(Path(pattern)))) if first else []
        # Nor by links.
        outside = not all(path.resolve().is_relative_to(project) for path in paths)
    except (ValueError, NotImplementedError, OSError, RuntimeError) as error:
        raise InputError(f"the fact {name}: {pattern!r} names no files ({error})") from None
    if outside:
        raise InputError(f"the fact {name}: {pattern!r} leads out of {project.name}")
    if not paths:
        return _absent(f"no file {pattern}")
    try:
        if any(path.stat().st_size > LARGEST_EVIDENCE for path in paths):
            raise InputError(
                f"the fact {name}: {pattern} is larger than {LARGEST_EVIDENCE:,} bytes"
            )
        contents = [json.loads(path.read_bytes()) for path in paths]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the fact {name}: {pattern} cannot be read as JSON ({error})") from None
    if all(isinstance(content, dict) and "lengths" in content for content in contents):
        evaluated = _as_one([(path, read_results(path)) for path in paths], pattern)
        return lambda path: of_results(evaluated, path[1:])
    if len(contents) > 1:
        raise InputError(f"the fact {name}: {pattern} names several files that are no results")
    return lambda path: _within(contents[0], path)


def _absent(reason: str) -> Callable[[laws.Path], Value]:
    def lookup(path: laws.Path) -> Value:
        raise Unknown(reason)

    return lookup


def _within(content: Any, path: laws.Path) -> Value:
    """A number, string, truth value or list of them in nested JSON."""
    for i, part in enumerate(path[1:], start=1):
        if isinstance(content, dict) and part in content:
            content = content[part]
        elif isinstance(content, list) and part.isdecimal() and int(part) < len(content):
            content = content[int(part)]
        else:
            known = list(content)[:20] if isinstance(content, dict) else []
            raise no_quantity(path[: i + 1], known)
    if isinstance(content, list):
        content = tuple(content)
    if isinstance(content, tuple | bool | int | float | str):
        return content
    raise LawError(f"{spelled(path)} is no single value")


def _table(specification: Specification, findings: Sequence[Finding]) -> Table:
    table = Table(title=f"{specification.name}: {specification.system.name}", title_justify="left")
    for heading in ("law", "on", "says", "measured", "verdict"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        says = finding.prose if finding.check is None else f"{finding.prose}\n{finding.check}"
        word = WORDS[finding.verdict.holds]
        table.add_row(finding.name, finding.target or "", says, measured(finding.verdict), word)
    return table


if __name__ == "__main__":
    run_program(main)
