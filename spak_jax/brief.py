"""A specification as one self-contained page: `python -m spak_jax.brief SPEC [--target NAME,...]
[--results FILE ...]`.

Markdown, fit to be given to a colleague or a language model as the whole context of the next step:
what the system is for, what builds it, its laws with what they measure now, the tiles of its
kernels and what may be chosen, what was learned and on what evidence.
"""

import argparse
import datetime
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pallas_kernels import compile, tiles
from pallas_kernels.specification_files import NAMED, specification_file
from pallas_kernels.targets import TARGETS
from spak_jax import check, provenance, quantities
from spak_jax.check import WORDS, Finding
from spak_jax.command_line import run_program
from spak_jax.config import Specification, leaves, read_specification

PROSE = ("objective", "hypothesis", "rationale")


def page(
    specification: Specification,
    path: Path,
    targets: Sequence[str],
    findings: Sequence[Finding],
    facts: Sequence[Finding],
) -> str:
    """The Markdown of a specification with what its laws and facts were found to be."""
    parts = [
        _opening(specification),
        ["## What builds the run", "", *_table(("key", "value"), _settings(specification))],
        ["## Laws", "", *_table(("law", "on", "check", "measured", "verdict"), _laws(findings))],
    ]
    if facts:
        heading = ("claim", "evidence", "verdict")
        parts.append(["## What was learned", "", *_table(heading, _facts(specification, facts))])
    if targets:
        heading = ("kernel", "target", "tile in use", "evidence", "may be chosen from")
        parts.append(["## Kernels", "", *_table(heading, _kernels(specification, targets))])
    parts.append(_commands(path, targets))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.brief", description="Print a specification as one page."
    )
    parser.add_argument(
        "specification",
        metavar="SPEC",
        help=NAMED,
    )
    parser.add_argument(
        "--target",
        type=compile.parse_targets,
        default=(),
        metavar="NAME,...",
        help=f"with what is known of these GPUs: {', '.join(TARGETS)}",
    )
    parser.add_argument(
        "--results", type=Path, nargs="+", default=(), metavar="FILE", help="results of a run of it"
    )
    arguments = parser.parse_args()
    path, targets = specification_file(arguments.specification), arguments.target
    compile.touch_no_gpu()
    specification = read_specification(path)
    given = arguments.results
    evaluated = check.read_evaluated(specification, given) if given else None
    findings = check.judge(specification, path.parent, targets, evaluated)
    facts = check.judge_facts(specification, path.parent)
    # Not through the console: Markdown for a file.
    print(page(specification, path, targets, findings, facts), end="")


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


def _laws(findings: Iterable[Finding]) -> Iterator[tuple[str, ...]]:
    for each in findings:
        words = f"**{each.name}**: {each.prose.strip()}"
        verdict = WORDS[each.verdict.holds]
        yield words, each.target or "", f"`{each.check}`", check.measured(each.verdict), verdict


def _facts(specification: Specification, facts: Iterable[Finding]) -> Iterator[tuple[str, ...]]:
    for fact, found in zip(specification.fact, facts, strict=True):
        files = ", ".join(f"`{name}`: {pattern}" for name, pattern in fact.evidence.items())
        evidence = f"`{fact.holds}` over {files}: {check.measured(found.verdict)}"
        words = f"**{fact.name}**: {fact.claim.strip()}"
        if fact.holds is None:
            yield words, "", found.verdict.reason
        else:
            yield words, evidence, WORDS[found.verdict.holds]


def _kernels(specification: Specification, targets: Sequence[str]) -> Iterator[tuple[str, ...]]:
    case = quantities.attention_case(specification.config)
    for target in targets:
        declared = [k for k, spaces in specification.kernels.items() if target in spaces]
        for kernel in dict.fromkeys((*compile.kernels_of(target, case), *declared)):
            space = specification.kernels.get(kernel, {}).get(target, {})
            tile = compile.settings_of(target, case, kernel)
            key = compile.tile_key(target, case, kernel)
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
        f"python -m spak_jax.check {path} --target {target}   # the laws above",
        f"python -m spak_jax.train {path}",
        f"python -m pallas_kernels.tune --spec {path} --target {target}   # tiles within the laws",
        "```",
    ]


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = lambda row: "| " + " | ".join(_cell(cell) for cell in row) + " |"  # noqa: E731
    return [cells(heading), "|" + " --- |" * len(heading), *map(cells, rows)]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    run_program(main)
