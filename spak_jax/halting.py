"""Whether looping only as long as needed pays: `python -m spak_jax.halting RUN [options]`.

All rules are calibrated (`spak_jax.evaluation.calibration`); then they, and the baseline's
thresholds, are scored at lengths that were not looked at for it: answers right, and loops by token,
by what the task measures, by row and by the depth that a problem needs. A row's loops are those of
its slowest token: so many a program of `pallas_kernels.ops.looped` runs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from spak_jax.command_line import (
    InputError,
    Table,
    check_range,
    console,
    parse_lengths,
    prepare_drawing,
    run_program,
    writable_folder,
    write_file,
)
from spak_jax.config_sections import MAX_LENGTH
from spak_jax.evaluation.calibration import CALIBRATED_ON, NONE, measure, rules_of
from spak_jax.evaluation.loaded import load
from spak_jax.evaluation.loops import asked_loops
from spak_jax.models.halting import RULES
from spak_jax.reports.scores import warn_of_loops


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spak_jax.halting",
        description="Stop each token once it has thought enough: what that costs and saves.",
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run folder, or a halting.json, to be drawn again"
    )
    parser.add_argument("--lengths", default="4,8,12", help="of problems to score (default 4,8,12)")
    parser.add_argument("--examples", type=int, default=1_000, help="problems a length")
    parser.add_argument("--seed", type=int, default=0, help="of the problems")
    parser.add_argument(
        "--loops",
        help="at most, instead of the trained number: another, such as 24, or so many times the"
        " length of each problem, such as 4x+64",
    )
    parser.add_argument(
        "--rule",
        action="append",
        choices=RULES,
        help="calibrate and score this one only; repeatable (all)",
    )
    parser.add_argument(
        "--kind",
        action="append",
        default=[],
        metavar="NAME",
        help="at each length also hard problems of the task, such as chains of carries; repeatable",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="for what is written (default: RUN/halting, or beside the file)",
    )
    arguments = parser.parse_intermixed_args()
    lengths = parse_lengths("--lengths", arguments.lengths, MAX_LENGTH)
    check_range("--examples", arguments.examples, 1, 1_000_000)
    check_range("--seed", arguments.seed, 0, 2**31 - 2)
    loops = asked_loops(arguments.loops)
    stored = _stored(arguments.run) if arguments.run.is_file() else None
    loaded = None if stored else load(arguments.run)
    known = loaded.task.kinds if loaded else ()
    for kind in arguments.kind:
        if not stored and kind not in known:
            raise InputError(f"--kind {kind}: must be of {', '.join(known) or 'none'}")
    beside = arguments.run.parent if stored else arguments.run / "halting"
    out = writable_folder(arguments.out or beside)
    # Before the work, as the folder is.
    prepare_drawing()
    from spak_jax.reports import depth_figure, halting_figure
    from spak_jax.reports.canvas import saved
    from spak_jax.reports.style import style

    if stored:
        found = stored
    else:
        asked = arguments.examples, arguments.seed, loops, arguments.rule or RULES, arguments.kind
        found = measure(loaded, lengths, *asked)
    show(found)
    if not found["loops_per_symbol"]:
        warn_of_loops(found["config"]["model"], found["loops"])
    files = {} if stored else {"halting.json": json.dumps(found, indent=1) + "\n"}
    with style():
        files |= saved("halting", halting_figure.draw(found))
        files |= saved("loops-by-depth", depth_figure.draw(found))
    for name, content in files.items():
        write_file(out / name, content)
        console.print(f"wrote {out / name}")


def _stored(path: Path) -> dict[str, Any]:
    """What a `halting.json` holds; raises InputError where it is none that is written today."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    if not (isinstance(found, dict) and "trends" in found):
        raise InputError(f"{path}: not what `halting` writes, or by an earlier version")
    return found


def show(found: dict[str, Any]) -> None:
    """A table for people."""
    table = Table(
        found["length_unit"], "halting", "right", "loops: answer", "all tokens", "row", "saved"
    )
    # A file of an earlier version has no kinds.
    kinds = found.get("kinds", {}).items()
    every = [*found["lengths"].items()]
    every += [(f"{kind} {n}", ways) for kind, lines in kinds for n, ways in lines.items()]
    for what, ways in every:
        for name, line in ways.items():
            table.add_row(
                what,
                name,
                f"{line['accuracy']:.2%}",
                f"{line['answer_steps']:.2f}",
                f"{line['text_steps']:.2f}",
                f"{line['row_loops']:.2f}",
                f"{ways[NONE]['row_loops'] / line['row_loops']:.2f}x",
            )
        table.add_section()
    console.print(table)
    for rule in rules_of(found):
        way = found["ways"][rule]
        console.print(
            f"{rule}: threshold {way['after']:.8g}, calibrated on {CALIBRATED_ON:,} problems of the"
            " training distribution"
        )
        _show_trend(found["trends"][rule], found["depth_unit"])
    times = ", ".join(f"{name} {time:.1f} ms" for name, time in found["milliseconds"].items())
    console.print(f"scoring once on {found['device']}: {times}")


def _show_trend(trend: dict[str, Any], unit: str) -> None:
    if trend["slope"] is None:
        return
    said = f"{trend['slope']:.3f} x depth ({unit}) + {trend['intercept']:.1f}"
    if trend["correlation"] is not None:
        said += f", correlation {trend['correlation']:.3f}"
    console.print(f"  loops of a row: {said}")


if __name__ == "__main__":
    run_program(main)
