"""Holds claims against their evidence: results files, or any JSON."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spak_jax.command_line import InputError
from spak_jax.config import Fact, Specification
from spak_jax.evaluation.results import Results, read_results
from spak_jax.reports.grouping import Evaluated, gather
from spak_jax.specs import language
from spak_jax.specs.check import Finding, expression_of, verdict_of
from spak_jax.specs.language import ExpressionError, Unknown, Value, Verdict, spelled
from spak_jax.specs.metrics import no_metric, of_results

LARGEST_EVIDENCE = 64 * 2**20


def judge_claims(specification: Specification, folder: Path) -> list[Finding]:
    """Holds every claim (`[[fact]]`) against its evidence.

    Raises:
      InputError: a claim or its evidence cannot be read; the message names it.
    """
    return [_judge_claim(fact, folder) for fact in specification.fact]


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
    return as_one(files, ", ".join(map(str, paths)))


def as_one(files: Sequence[tuple[Path, Results]], named: str) -> Evaluated:
    evaluated, _ = gather(files)
    if len(evaluated) > 1:
        labels = ", ".join(line.label for line in evaluated)
        raise InputError(f"{named}: of several evaluations ({labels}); name those of one")
    return evaluated[0]


def _judge_claim(fact: Fact, folder: Path) -> Finding:
    if fact.holds is None:
        verdict = Verdict(None, {}, "not yet reproduced")
        return Finding(fact.name, None, fact.claim, None, verdict)
    found = {name: evidence(fact.name, pattern, folder) for name, pattern in fact.evidence.items()}

    def lookup(path: language.Path) -> Value:
        if path[0] not in found:
            raise no_metric(path, found)
        return found[path[0]](path)

    verdict = verdict_of(fact.name, expression_of(fact.name, fact.holds), lookup)
    return Finding(fact.name, None, fact.claim, fact.holds, verdict)


def evidence(name: str, pattern: str, folder: Path) -> Callable[[language.Path], Value]:
    """What a claim's evidence gives for a metric: results files of one system, or any JSON.

    Args:
      name: of the claim.
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
            f"the claim {name}: {pattern!r}: must be within {project.name}, with '..' at most once,"
            " at its start, and without '**'"
        )
    try:
        paths = sorted(folder.glob(str(Path(pattern)))) if first else []
        # Nor by links.
        outside = not all(path.resolve().is_relative_to(project) for path in paths)
    except (ValueError, NotImplementedError, OSError, RuntimeError) as error:
        raise InputError(f"the claim {name}: {pattern!r} names no files ({error})") from None
    if outside:
        raise InputError(f"the claim {name}: {pattern!r} leads out of {project.name}")
    if not paths:
        return _absent(f"no file {pattern}")
    try:
        if any(path.stat().st_size > LARGEST_EVIDENCE for path in paths):
            raise InputError(
                f"the claim {name}: {pattern} is larger than {LARGEST_EVIDENCE:,} bytes"
            )
        contents = [json.loads(path.read_bytes()) for path in paths]
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the claim {name}: {pattern} cannot be read as JSON ({error})") from None
    if all(isinstance(content, dict) and "lengths" in content for content in contents):
        evaluated = as_one([(path, read_results(path)) for path in paths], pattern)
        return lambda path: of_results(evaluated, path[1:])
    if len(contents) > 1:
        raise InputError(f"the claim {name}: {pattern} names several files that are no results")
    return lambda path: _within(contents[0], path)


def _absent(reason: str) -> Callable[[language.Path], Value]:
    def lookup(path: language.Path) -> Value:
        raise Unknown(reason)

    return lookup


def _within(content: Any, path: language.Path) -> Value:
    """A number, string, truth value or list of them in nested JSON."""
    for i, part in enumerate(path[1:], start=1):
        if isinstance(content, dict) and part in content:
            content = content[part]
        elif isinstance(content, list) and part.isdecimal() and int(part) < len(content):
            content = content[int(part)]
        else:
            known = list(content)[:20] if isinstance(content, dict) else []
            raise no_metric(path[: i + 1], known)
    if isinstance(content, list):
        content = tuple(content)
    if isinstance(content, tuple | bool | int | float | str):
        return content
    raise ExpressionError(f"{spelled(path)} is no single value")
