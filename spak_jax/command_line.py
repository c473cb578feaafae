"""What every program here shares: that of all programs (`pallas_kernels.programs`), and files."""

import tempfile
import uuid
from pathlib import Path

from pallas_kernels.programs import (
    Failure,
    InputError,
    Table,
    console,
    first_line,
    progress,
    require_devices,
    run_program,
)

__all__ = [
    "Failure",
    "InputError",
    "Table",
    "console",
    "first_line",
    "progress",
    "require_devices",
    "run_program",
    "writable_folder",
    "write_file",
]


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
        raise InputError(f"cannot write {path}: {error.strerror}") from None
