"""What every program here shares: that of all programs (`pallas_kernels.programs`), and files."""

import contextlib
import functools
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pallas_kernels import programs
from pallas_kernels.programs import (
    Failure,
    InputError,
    Table,
    console,
    first_line,
    progress,
    require_devices,
)

__all__ = [
    "Failure",
    "InputError",
    "Table",
    "check_range",
    "console",
    "first_line",
    "or_a_gpu",
    "parse_lengths",
    "prepare_drawing",
    "progress",
    "require_devices",
    "run_program",
    "writable_folder",
    "write_file",
]


def run_program(main: Callable[[], None]) -> None:
    """Runs the `main` of a program, as `pallas_kernels.programs` has it, with quiet libraries."""
    _quiet_libraries()
    programs.run_program(main)


def prepare_drawing() -> None:
    """Imports Matplotlib for a program, before anything that draws.

    As it is imported it looks for a backend, of which files need none, and for a folder of its own.

    Raises:
      InputError: it finds no folder that it can write.
    """
    os.environ.pop("MPLBACKEND", None)
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        # Relative ones do not count, by their specification; Matplotlib would make them here.
        if not os.path.isabs(os.environ.get(name, os.sep)):
            del os.environ[name]
    # Where it has no folder it makes one for the time being, and warns.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        # Where a umask forbids even us to enter what we make, it would end in tracebacks.
        probe = tempfile.mkdtemp()
        try:
            os.listdir(probe)
        finally:
            os.rmdir(probe)
        import matplotlib.font_manager
        import matplotlib.style  # noqa: F401
    except OSError as error:
        raise InputError(
            f"Matplotlib needs a folder of its own ({error.strerror}): set MPLCONFIGDIR to one that"
            " can be written"
        ) from None


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
    # A name of its own: several processes may write one figure, each from what is there, and a name
    # of 255 bytes has no room for an ending.
    partial = path.with_name(f"{uuid.uuid4().hex}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def parse_lengths(option: str, text: str, most: int) -> tuple[int, ...]:
    """`1-12,16,24` as sorted lengths without repeats.

    Raises:
      InputError: it is written otherwise, or a length is not between 1 and `most`.
    """
    return tuple(sorted(set(_lengths(option, text, most))))


def check_range(option: str, value: int | None, low: int, high: int) -> None:
    """Raises `InputError` where an option's number is given and out of bounds."""
    if value is not None and not low <= value <= high:
        raise InputError(f"{option} {value}: must be from {low:,} to {high:,}")


def or_a_gpu(instead: str) -> str:
    """What to do instead of waiting; without a GPU also that one would do."""
    import jax

    return instead if jax.default_backend() == "gpu" else f"{instead}; a GPU is far faster"


def _lengths(option: str, text: str, most: int) -> Iterator[int]:
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = (first, last) if dash else (first, first)
        if not all(number.isdecimal() for number in numbers):
            raise InputError(f"{option} {text[:80]!r}: expected lengths such as 1-12,16,24")
        # Python refuses to read numbers of thousands of digits.
        bounds = [int(number[:9]) for number in numbers]
        if not 1 <= bounds[0] <= bounds[1] <= most:
            raise InputError(
                f"{option} {text[:80]!r}: {part[:80]!r} must run upwards between 1 and {most}"
            )
        yield from range(bounds[0], bounds[1] + 1)


def _quiet_libraries() -> None:
    """Until the program ends libraries do not tell what our programs say themselves."""
    # Orbax tells every save, restore and error; of several arrays that cannot be read, one error is
    # raised, and asyncio would tell the rest.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = functools.partial(_but_late_answers, sys.unraisablehook)


def _but_late_answers(tell: Callable[[Any], None], unraisable: Any) -> None:
    """Tells of errors that nobody can catch, but not of those of arrays that nobody waits for.

    After one array could not be read, TensorStore goes on and answers to an event loop of Orbax
    that is closed; one for which there was no file left cannot be closed.
    """
    message = str(unraisable.exc_value)
    if message != "Event loop is closed" and not message.endswith("has no attribute '_ssock'"):
        tell(unraisable)
