"""Holds specifications to their invariants, before a run and after it.

Before a run: what can be known without a GPU, for a target also what a compiler knows of one that
is not there, and estimates. After it: what the run came to.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from spak_jax.command_line import InputError
from spak_jax.config import Specification, read_specification
from spak_jax.reports.grouping import Evaluated, ranges
from spak_jax.specs import language
from spak_jax.specs.language import Expression, ExpressionError, Value, Verdict
from spak_jax.specs.metrics import Metrics

# Metrics that the target decides.
OF_TARGET = ("target", "kernel", "memory", "time")
WORDS = {True: "holds", False: "broken", None: "unknown"}


class Finding(NamedTuple):
    """What became of one invariant or claim.

    name: of it. target: the GPU that it was judged for; None where none matters.
    prose: what it says. check: its expression; None for a claim not yet reproduced.
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
    """Judges every invariant of a specification, those of GPUs for each target.

    Args:
      specification: whose.
      folder: where it lies, and those that it is compared with.
      targets: names in `TARGETS`.
      evaluated: its results, if there are any.
      thorough: whether what takes more than a moment is judged, or left unknown.

    Raises:
      InputError: an invariant cannot be read, or speaks of what there is not; the message names it.
    """
    expressions = [(each, expression_of(each.name, each.check)) for each in specification.invariant]
    metrics = {
        target: Metrics(specification, folder, target, evaluated, thorough)
        for target in (None, *targets)
    }
    return [
        Finding(
            each.name, target, each.law, check.text, verdict_of(each.name, check, metrics[target])
        )
        for each, check in expressions
        for target in ((targets or (None,)) if _is_of_target(check) else (None,))
    ]


def require_invariants(
    specification: Specification, path: Path, overrides: Sequence[str] = ()
) -> list[str]:
    """Refuses what its file itself says must not be; without compiling anything.

    What overrides break is another matter: whoever gives them knows that the file's claims are of
    the run that it describes.

    Args:
      specification: with the overrides.
      path: of its file.
      overrides: of the command line.

    Returns:
      A line for people for each invariant that no longer holds because of the overrides.

    Raises:
      InputError: an invariant is known to be broken, also without the overrides.
    """
    broken = _broken(specification, path)
    if not broken:
        return []
    as_written = broken
    if overrides:
        try:
            as_written = _broken(read_specification(path), path)
        except InputError:
            # The file builds no run without them.
            as_written = {}
    for name, why in broken.items():
        if name in as_written:
            raise InputError(f"{path} breaks its invariant {name}, {why}")
    given = " ".join(overrides)
    return [f"no longer true with {given}: {name}, {why}" for name, why in broken.items()]


def _broken(specification: Specification, path: Path) -> dict[str, str]:
    """By name the invariants that are known to be broken at once, or cannot be judged, and why."""
    found = {}
    for each in specification.invariant:
        alone = specification.model_copy(update={"invariant": (each,)})
        try:
            findings = judge(alone, path.parent, thorough=False)
        except InputError as error:
            # Such as one on loops, of what has none any more.
            found[each.name] = f"{each.law!r}: {error}"
            continue
        for finding in findings:
            if finding.verdict.holds is False:
                measures = measured(finding.verdict)
                found[each.name] = f"{each.law!r}: {finding.check} does not hold, with {measures}"
    return found


def measured(verdict: Verdict) -> str:
    """The metrics of a verdict, for people."""
    found = ", ".join(
        f"{name} = {shown(value)}{' (estimate)' * ('time.' in name)}"
        for name, value in verdict.measured.items()
    )
    return "; ".join(part for part in (found, verdict.reason) if part)


def shown(value: Value) -> str:
    """A metric's value, for people."""
    if isinstance(value, tuple):
        numbers = ranges(value) if all(isinstance(v, int) for v in value) else value
        return f"({numbers})"
    if isinstance(value, bool | str):
        return repr(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _is_of_target(check: Expression) -> bool:
    return any(part in OF_TARGET for path in check.metrics() for part in path[:1] + path[2:3])


def expression_of(name: str, check: str) -> Expression:
    """Raises `InputError`, with the name of the invariant or claim, where it cannot be read."""
    try:
        return language.parse(check)
    except ExpressionError as error:
        raise _refused(name, check, error) from None


def verdict_of(name: str, check: Expression, lookup: language.Lookup) -> Verdict:
    """Raises `InputError`, with the name of the invariant or claim, where it has no value."""
    try:
        return check.check(lookup)
    except ExpressionError as error:
        raise _refused(name, check.text, error) from None


def _refused(name: str, check: str, error: ExpressionError) -> InputError:
    return InputError(f"the invariant {name}, {check!r}: {error}")
