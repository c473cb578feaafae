"""What campaigns done in parts share: which parts were asked for, what was found before."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from spak_jax.command_line import InputError


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
