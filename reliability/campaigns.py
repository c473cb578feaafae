"""What campaigns done in parts share: which were asked for, what was found, and its table."""

import argparse
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spak_jax import provenance
from spak_jax.command_line import Failure, InputError, write_file

# What is found of a part, beside its name in words.
OF_A_PART = ("tried", "outcomes", "broken", "not_tried", "date")


def named(given: Collection[str], known: Collection[str]) -> Collection[str]:
    """The parts of a campaign that were asked for: those `given`, or all there are.

    Raises:
      InputError: one is not known.
    """
    for name in given:
        if name not in known:
            raise InputError(f"{name}: must be of {', '.join(known)}")
    return given or known


def found_before(
    path: Path, names: Collection[str], needed: Collection[str]
) -> dict[str, dict[str, Any]]:
    """What a campaign that is done in parts has written to a file so far, by name.

    Args:
      path: of the file; where there is none, nothing was found.
      names: that may stand in it.
      needed: keys of each.

    Raises:
      InputError: the file holds something else, which a campaign must not replace.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        found = None
    ours = isinstance(found, dict) and found.keys() <= set(names)
    if not ours or any(
        not isinstance(each, dict) or set(needed) - each.keys() for each in found.values()
    ):
        raise InputError(f"{path} is there, and holds no results of this program")
    return found


def carry_out(
    program: str,
    description: str,
    part: str,
    key: str,
    known: Collection[str],
    seed: int,
    attempts: Callable[[Collection[str]], Iterator[tuple[str, dict[str, Any]]]],
    table: Callable[[Mapping[str, Any]], str],
) -> None:
    """The program of a campaign: the parts that a command line names, tried, written and shown.

    Args:
      program: its module.
      description: of it, in a line.
      part: what one is called in the usage.
      key: of its name in words.
      known: all parts.
      seed: of what is drawn.
      attempts: tries parts one after another, and gives each with what was found.
      table: what was found, in Markdown.

    Raises:
      Failure: a promise was broken.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument(
        "parts", nargs="*", metavar=part.upper(), help=f"of {', '.join(known)} (all)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help=f"write what was found; what FILE holds of other {part}s stays",
    )
    arguments = parser.parse_args()
    names = named(arguments.parts, known)
    found = found_before(arguments.json, known, (key, *OF_A_PART)) if arguments.json else {}
    origin = provenance.where_and_when() | {"seed": seed}
    for name, each in attempts(names):
        found[name] = each | origin
        # After each: the rest may take long.
        if arguments.json:
            write_file(arguments.json, json.dumps(found, indent=1) + "\n")
    print(table(found))
    broken = [name for name, each in found.items() if each["broken"]]
    if broken:
        raise Failure(f"a promise was broken: {', '.join(broken)}")


def table_of(
    key: str,
    found: Iterable[Mapping[str, Any]],
    not_kept: Callable[[Mapping[str, Any]], list[str]],
) -> str:
    """A table in Markdown of what was found.

    Args:
      key: of a part's name in words, which heads them.
      found: of each part.
      not_kept: what to say of one that was broken or not tried.
    """
    lines = [f"| {key} | tried | what became of it | date |", "| --- | ---: | --- | --- |"]
    for each in found:
        became = [f"{words}: {count:,}" for words, count in each["outcomes"].items()]
        became += not_kept(each)
        lines.append(f"| {each[key]} | {each['tried']:,} | {'; '.join(became)} | {each['date']} |")
    return "\n".join(lines)
