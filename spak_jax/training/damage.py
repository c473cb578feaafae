"""Why a checkpoint could not be read: whether it is damaged, and which one before it is good."""

import contextlib
import json
import os
import re
from pathlib import Path

from spak_jax.command_line import InputError, first_line
from spak_jax.training.stored_checkpoint import FILES, digests_of_files, read

# How the errors of Orbax begin that a damaged checkpoint without digests of its files gives; their
# text tells full memory and missing permission apart.
OF_DAMAGE = (ValueError, LookupError, FileNotFoundError, EOFError)
OF_SURROUNDINGS = re.compile(
    "RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|UNIMPLEMENTED|CANCELLED|ABORTED"
    "|DEADLINE_EXCEEDED|INTERNAL"
)


def refusal(folders: list[Path], steps: list[int], error: Exception) -> InputError:
    """Why the last of these checkpoints could not be read, and what helps."""
    newest = folders[-1]
    try:
        damage = _damage(newest, error)
    except OSError as unreadable:
        error, damage = unreadable, None
    if damage is None:
        return InputError(f"cannot read the checkpoint {newest} ({cause(error)})")
    good = _newest_good(folders[:-1], steps)
    way_out = (
        "no earlier one is good: train again with --fresh"
        if good is None
        else f"remove {_listed(folders[steps.index(good) + 1 :])} to go back to step {good},"
        " which is good"
    )
    return InputError(f"the checkpoint {newest} is damaged ({damage}); {way_out}")


def _damage(folder: Path, error: Exception) -> str | None:
    """What is damaged in a checkpoint that gave an error; None where something else is wrong.

    Raises:
      OSError: a file in it cannot be read.
    """
    found = digests_of_files(folder)
    try:
        written = json.loads((folder / FILES).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        written = None
    if not isinstance(written, dict):
        # From before files had digests, or their list is damaged too.
        damage = isinstance(error, OF_DAMAGE) and not isinstance(error, InputError)
        ours = damage and not OF_SURROUNDINGS.search(str(error))
        return first_line(error) if ours else None
    changed = [name for name in written if found.get(name) != written[name]]
    if not changed:
        return None
    what = "is not as it was saved" if changed[0] in found else "is missing"
    return f"{changed[0]} {what}{f', and {len(changed) - 1} more' if changed[1:] else ''}"


def cause(error: Exception) -> str:
    """What an error says, in one line and our user's words."""
    match error:
        case MemoryError():
            return "out of memory"
        case OSError(strerror=str(what), filename=str(name)):
            return f"{name}: {what}"
    # TensorStore gives the system's error as a number, behind all that it was doing.
    by_system = re.search(r"os_error_code='([0-9]+)'", str(error))
    return os.strerror(int(by_system[1])) if by_system else first_line(error)


def _newest_good(folders: list[Path], steps: list[int]) -> int | None:
    """The last of these steps whose checkpoint can be read whole; None for none."""
    for folder, step in reversed(list(zip(folders, steps, strict=False))):
        # Whatever is wrong with it, it is not good.
        with contextlib.suppress(Exception):
            return read(folder, step, optimizer=True).step
    return None


def _listed(folders: list[Path]) -> str:
    return " and ".join(map(str, folders))
