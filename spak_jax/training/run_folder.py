"""Run folders: their names, what lies in them, and the lock of the process that writes there.

    RUN/checkpoints/STEP/weights      arrays by name, such as `block.qkv.kernel`
    RUN/checkpoints/STEP/optimizer    its arrays, likewise; absent from imported weights
    RUN/checkpoints/STEP/description  JSON: the whole configuration, and digests of all of it
    RUN/checkpoints/STEP/files.json   the digest of each of these files
    RUN/metrics.jsonl                 one line for each compiled call of the training (`metrics`)
    RUN/results.json                  the scores that ended the training
    RUN/lock                          held by the process that writes to the folder

What a checkpoint is, and how it is saved and read, is in `checkpoint`.
"""

import contextlib
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from spak_jax.command_line import InputError, writable_folder

CHECKPOINTS = "checkpoints"
RESULTS = "results.json"
LOCK = "lock"


def run_folder(text: str) -> Path:
    """A run folder as the command line names it.

    Raises:
      InputError: it names none: no text, as of an unset variable, or a file.
    """
    if not text:
        raise InputError("the name of the run folder is empty: name a folder, or . for this one")
    path = Path(text)
    try:
        path.stat()
        is_file = not path.is_dir()
    except FileNotFoundError:
        is_file = False
    except NotADirectoryError:
        is_file = True
    except OSError as error:
        raise InputError(f"cannot use the run folder {path}: {error.strerror}") from None
    if is_file:
        raise InputError(f"the run folder {path} cannot be a folder: it is a file, or under one")
    return path


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Within it no other process writes to a run folder, which is made if absent.

    The lock is the operating system's: it ends with the process that holds it, whatever ends that.

    Raises:
      InputError: another process holds it, the folder cannot be written, or the system has no such
        locks.
    """
    try:
        import fcntl
    except ImportError:
        raise InputError(
            f"writing run folders needs Linux or macOS: {platform.system()} has no locks of theirs"
            " (on Windows, work inside WSL)"
        ) from None
    writable_folder(run)
    try:
        file = (run / LOCK).open("a+")
    except OSError as error:
        raise InputError(f"cannot write {run / LOCK}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{run} is being written by another process ({file.read(100).strip()}); wait for"
                " it, or name another folder"
            ) from None
        except OSError as error:
            raise InputError(f"cannot lock {run / LOCK}: {error.strerror}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        try:
            yield
        finally:
            # Who held it is nobody's business in a folder that is given away.
            with contextlib.suppress(OSError):
                file.truncate(0)


def steps_in(run: Path) -> list[int]:
    """The steps that a run folder holds whole checkpoints of, in order.

    Entries of other names than we give are none of ours.

    Raises:
      InputError: the folder cannot be read.
    """
    try:
        names = [entry.name for entry in os.scandir(run / CHECKPOINTS) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"cannot read {run / CHECKPOINTS}: {error.strerror}") from None
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,18}", name))
