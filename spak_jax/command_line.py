"""What every program here shares: one way to fail on bad input, one console, one progress bar."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Off a terminal rich would wrap tables at 80 columns; a log or a pipe wants them whole.
console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, soft_wrap=True)


class Failure(Exception):
    """A program cannot go on. It prints `label` and the message alone, and exits with `status`."""

    status = 1
    label = "error"


class InputError(Failure):
    """What the user gave cannot be used: the message names the field, the value and a way out."""

    status = 2


def run_program(main: Callable[[], None]) -> None:
    """Runs `main`; a `Failure` ends the process with its message and status, no traceback."""
    try:
        try:
            main()
        except (AssertionError, RuntimeError):
            # What a JAX without devices raises, anywhere.
            if "jax" in sys.modules:
                require_devices()
            raise
    except Failure as error:
        print(f"{error.label}: {error}", file=sys.stderr)
        raise SystemExit(error.status) from None
    except KeyboardInterrupt:
        print("stopped: SIGINT", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def require_devices() -> None:
    """Starts JAX's platform, which everything that computes needs.

    Raises:
      InputError: it does not start; the message says which was asked for, and what is there.
    """
    # Here: most programs tell their help without it.
    import jax

    try:
        jax.devices()
    # It asserts where none of the platforms asked for is there.
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.jax_platforms
        why = first_line(error) if str(error) else "it finds no device of that kind"
        raise InputError(
            f"JAX cannot start {f'on JAX_PLATFORMS={asked}' if asked else 'here'} ({why}):"
            " JAX_PLATFORMS=cpu is there on every machine; unset, JAX takes what it finds"
        ) from None


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line that is not too long."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def progress_bar(description: str) -> Progress:
    """A bar with count, rate or loss (the task's field `status`), time used and time left.

    Draws nothing when the output is no terminal; callers that run long print lines instead.
    """
    return Progress(
        TextColumn(description),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def writable_folder(path: Path) -> Path:
    """`path`, made with its parents if need be, after proof that a file can be written into it.

    Raises:
      InputError: it cannot be made, is no folder, or nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        # A name of its own: other processes may be proving the same.
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"cannot write into the folder {path}: {error.strerror}") from None
    return path


def write_file(path: Path, content: str | bytes) -> None:
    """Writes `content` to `path` whole or not at all: a reader never meets half a file.

    Text is written as UTF-8.

    Raises:
      InputError: the folder of `path` cannot be written.
    """
    writable_folder(path.parent)
    # With the process in its name: several may write one figure, each from what is there.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


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
