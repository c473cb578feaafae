"""Chooses tiles of kernels from what a specification declares, within its invariants.

What was found is a claim of the specification, with a file of evidence.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels import tiles
from pallas_kernels.targets import TARGETS, target_at_hand
from pallas_kernels.tuning import aot, tune
from spak_jax.command_line import InputError
from spak_jax.config import read_specification
from spak_jax.specs import design_space
from spak_jax.specs.design_space import Declared
from spak_jax.specs.language import ExpressionError

# Where the files lie that the claims of specifications rest on.
EVIDENCE = Path("figures") / "results"


def tune_by(
    path: Path,
    targets: Sequence[str],
    say: Callable[[str], None],
    *,
    out: Path = tune.OUT,
    write: bool = False,
) -> None:
    """Tunes what a specification declares, on each target or on the GPU at hand.

    Args:
      path: of its file.
      targets: that the compiler is asked for; none times the candidates on the GPU at hand.
      say: is called with a line on every candidate, and on what is written.
      out: folder for the table and the evidence.
      write: into the kernels' own table, the evidence into `EVIDENCE`, and a claim into the file.

    Raises:
      InputError: it declares nothing of the kind, or something cannot be read or written.
    """
    table_path = tiles.FILE if write else out / tiles.FILE.name
    table = tune.table_so_far(table_path)
    try:
        declared = design_space.declared_by(read_specification(path))
        for target in targets or (target_at_hand(),):
            found = within_invariants(declared, target, say, timed=not targets)
            for kernel, lines in found.lines.items():
                old = table[target].get(kernel, {})
                table[target] = table[target] | {kernel: old | lines}
            tune.write_table(table, table_path, say)
            evidence = (EVIDENCE if write else out) / f"tuned_{declared.name}_{target}.json"
            claim, holds = record(declared, target, found, evidence)
            say(f"wrote {evidence}: {claim}")
            if write:
                files = {"tuned": os.path.relpath(evidence, path.parent)}
                text = path.read_text(encoding="utf-8")
                text = design_space.with_claim(text, f"tuned-{target}", claim, files, holds)
                path.write_text(text)
                say(f"wrote it into {path} as a claim")
    except (ExpressionError, OSError, aot.Unavailable) as error:
        raise InputError(f"{path}: {error}") from None


class Found(NamedTuple):
    """What came of tuning by a specification on one target.

    lines: of the table, by kernel and key. tried: for the file of evidence, every candidate.
    chosen: by kernel, the candidate taken.
    """

    lines: dict[str, dict[str, dict[str, Any]]]
    tried: list[dict[str, Any]]
    chosen: dict[str, dict[str, Any]]


def within_invariants(
    declared: Declared, target: str, say: Callable[[str], None], *, timed: bool
) -> Found:
    """The best of the tiles that a specification declares for a target and its invariants allow.

    Args:
      declared: what it declares.
      target: a name in `TARGETS`.
      say: is called with a line on every candidate.
      timed: whether the target's GPU is at hand, so that times decide; else the compiler does.

    Raises:
      ExpressionError: it declares nothing for the target, or no tile of a kernel obeys the
        invariants.
    """
    spaces = {
        k: by_target[target] for k, by_target in declared.spaces.items() if target in by_target
    }
    if not spaces:
        raise ExpressionError(f"declares no design space for {target}: [kernels.KERNEL.{target}]")
    tried = [
        tune.Candidate(kernel, declared.case.shape, settings, declared.case.dtype)
        for kernel, space in spaces.items()
        for settings in design_space.tiles_in(kernel, space)
    ]
    cases = [
        dataclasses.replace(declared.case, kernel=c.kernel, settings=c.settings) for c in tried
    ]
    reports = aot.measure([target], cases)
    broken = [design_space.broken_invariants(declared, target, [report]) for report in reports]
    allowed_places = [i for i in range(len(tried)) if not broken[i] and not reports[i].problem]
    for kernel in spaces:
        if not any(tried[i].kernel == kernel for i in allowed_places):
            names = sorted(
                {name for i, c in enumerate(tried) if c.kernel == kernel for name in broken[i]}
            )
            raise ExpressionError(
                f"no tile of kernels.{kernel}.{target} obeys {', '.join(names) or 'it'}"
            )
    seconds = {}
    if timed:
        allowed = [tried[i] for i in allowed_places]
        seconds = {allowed_places[i]: s for i, s in tune.time_all(allowed, say).items()}
        lines = tune.fastest(tried, seconds, jax.devices()[0].device_kind)
    else:
        lines = tune.preferred(reports[i] for i in allowed_places)
    records = []
    for i, (candidate, report) in enumerate(zip(tried, reports, strict=True)):
        breaks = f", breaks {', '.join(broken[i])}" if broken[i] else ""
        say(
            f"{target}: {candidate}: {report.registers} registers, {report.spilled} B spilled,"
            f" {report.shared_memory} B shared{breaks}"
        )
        records.append(
            {
                "kernel": candidate.kernel,
                "settings": candidate.settings,
                "registers": report.registers,
                "spilled": report.spilled,
                "shared_memory": report.shared_memory,
                "problem": report.problem,
                "broken": broken[i],
                "microseconds": 1e6 * seconds[i] if i in seconds else None,
            }
        )
    taken = {k: _settings_alone(entry) for k, by_key in lines.items() for entry in by_key.values()}
    chosen = {one["kernel"]: one for one in records if one["settings"] == taken.get(one["kernel"])}
    return Found(lines, records, chosen)


def _settings_alone(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "evidence"}


def record(declared: Declared, target: str, found: Found, evidence: Path) -> tuple[str, str]:
    """Writes a file of evidence.

    Returns:
      What rests on it: a claim, and the expression that holds of the evidence by the name `tuned`.
    """
    limit = TARGETS[target].shared_memory
    content = {
        "specification": declared.name,
        "target": target,
        "shape": str(declared.case.shape),
        "dtype": declared.case.dtype,
        "date": tune.today(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "shared_memory_per_block": limit,
        "laws": {name: check.text for name, check in declared.invariants.items()},
        "chosen": found.chosen,
        "tried": found.tried,
    }
    evidence.parent.mkdir(parents=True, exist_ok=True)
    evidence.write_text(json.dumps(content, indent=1) + "\n")
    allowed = sum(not one["broken"] and not one["problem"] for one in found.tried)
    tiles_taken = "; ".join(
        f"{kernel} {' '.join(f'{k}={v}' for k, v in one['settings'].items())}"
        for kernel, one in found.chosen.items()
    )
    how = "by time" if any(one["microseconds"] for one in found.tried) else "by the compiler"
    claim = (
        f"Of {len(found.tried)} tiles declared for {target}, {allowed} obey the invariants; chosen"
        f" {how}: {tiles_taken}."
    )
    holds = " and ".join(
        f"tuned.chosen.{kernel}.shared_memory <= tuned.shared_memory_per_block and"
        f" tuned.chosen.{kernel}.spilled <= {one['spilled']}"
        for kernel, one in found.chosen.items()
    )
    return claim, holds
