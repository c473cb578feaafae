"""A specification as one self-contained page of Markdown.

Fit to be given to a colleague or a language model as the whole context of the next step: what the
system is for, what builds it, its invariants with what they measure now, the tiles of its kernels
and what may be chosen, what was learned and on what evidence.
"""

import datetime
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pallas_kernels import tiles
from pallas_kernels.tuning import attention_case
from spak_jax import provenance
from spak_jax.config import Specification, leaves
from spak_jax.specs import check
from spak_jax.specs.check import WORDS, Finding
from spak_jax.specs.design_space import spaces_of
from spak_jax.specs.gpu_metrics import training_attention

PROSE = ("objective", "hypothesis", "rationale")


def page(
    specification: Specification,
    path: Path,
    targets: Sequence[str],
    findings: Sequence[Finding],
    claims: Sequence[Finding],
) -> str:
    """The Markdown of a specification with what its invariants and claims were found to be."""
    parts = [
        _opening(specification),
        ["## What builds the run", "", *_table(("key", "value"), _settings(specification))],
        [
            "## Invariants",
            "",
            *_table(("invariant", "on", "check", "measured", "verdict"), _invariants(findings)),
        ],
    ]
    if claims:
        heading = ("claim", "evidence", "verdict")
        parts.append(["## What was learned", "", *_table(heading, _claims(specification, claims))])
    if targets:
        heading = ("kernel", "target", "tile in use", "evidence", "may be chosen from")
        parts.append(["## Kernels", "", *_table(heading, _kernels(specification, targets))])
    parts.append(_commands(path, targets))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _opening(specification: Specification) -> list[str]:
    system = specification.system
    lines = [f"# {system.name}", ""]
    if system.baseline_name:
        lines += [f"In the baseline's table: {system.baseline_name}.", ""]
    for name in PROSE:
        if text := getattr(system, name):
            lines += [f"**{name.capitalize()}.** {text.strip()}", ""]
    if system.compared_with:
        lines += [f"Compared with: {', '.join(system.compared_with)}.", ""]
    return lines + [f"Measured {datetime.date.today()}, commit {provenance.commit() or 'unknown'}."]


def _settings(specification: Specification) -> Iterator[tuple[str, str]]:
    for key, value in leaves(specification.config.model_dump(mode="json")):
        yield f"`{key}`", f"`{value}`"


def _invariants(findings: Iterable[Finding]) -> Iterator[tuple[str, ...]]:
    for each in findings:
        words = f"**{each.name}**: {each.prose.strip()}"
        verdict = WORDS[each.verdict.holds]
        yield words, each.target or "", f"`{each.check}`", check.measured(each.verdict), verdict


def _claims(specification: Specification, claims: Iterable[Finding]) -> Iterator[tuple[str, ...]]:
    for fact, found in zip(specification.fact, claims, strict=True):
        files = ", ".join(f"`{name}`: {pattern}" for name, pattern in fact.evidence.items())
        evidence = f"`{fact.holds}` over {files}: {check.measured(found.verdict)}"
        words = f"**{fact.name}**: {fact.claim.strip()}"
        if fact.holds is None:
            yield words, "", found.verdict.reason
        else:
            yield words, evidence, WORDS[found.verdict.holds]


def _kernels(specification: Specification, targets: Sequence[str]) -> Iterator[tuple[str, ...]]:
    case, spaces = training_attention(specification.config), spaces_of(specification)
    if case is None:
        return
    for target in targets:
        declared = [kernel for kernel, by_target in spaces.items() if target in by_target]
        for kernel in dict.fromkeys((*case.kernels(target), *declared)):
            space = spaces.get(kernel, {}).get(target, {})
            tile = attention_case.settings_of(target, case, kernel)
            key = attention_case.tile_key(target, case, kernel)
            evidence = tiles.evidence(target, kernel, key) if tile else "none"
            yield kernel, target, _assignments(tile), evidence, _assignments(space)


def _assignments(settings: dict) -> str:
    return ", ".join(
        f"{name} {', '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in settings.items()
    )


def _commands(path: Path, targets: Sequence[str]) -> list[str]:
    target = ",".join(targets) or "rtx5070"
    return [
        "## Commands",
        "",
        "```sh",
        f"python -m spak_jax.check {path} --target {target}   # the invariants above",
        f"python -m spak_jax.train {path}",
        f"python -m spak_jax.tune {path} --target {target}   # tiles within the invariants",
        "```",
    ]


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = lambda row: "| " + " | ".join(_cell(cell) for cell in row) + " |"  # noqa: E731
    return [cells(heading), "|" + " --- |" * len(heading), *map(cells, rows)]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
