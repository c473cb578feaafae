"""One program run in odd surroundings, and judged: `attempt`."""

import concurrent.futures
import contextlib
import errno
import fcntl
import importlib.util
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels.programs.terminal import cell_len
from reliability import fuzz
from reliability.faults import Broken, NotTried
from reliability.programs import CONFIG, PRINTING, PROGRAMS, Files
from spak_jax.training import run_folder

CODE = Path(__file__).parents[1]
# For what takes seconds, on a machine that has other work.
PATIENCE = 180
AT_ONCE = 2
# A terminal of so many columns must do for tables.
WIDE = 80
# Root passes by permissions by these rights; without them it is an owner as any other.
_WITHOUT_RIGHTS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


class Surroundings(NamedTuple):
    """What is odd around a program.

    description: in words. variables: of its environment, None to take one away. name: of all files
    and folders. arrange: is called with the files before the start. before: words before the
    program's, `{folder}` among them for its folder. folder: where it is started, if not among its
    files. columns: of a terminal that it writes to. lines: that are read of what it writes before
    the pipe is closed. rights: whether root keeps its own. refusal: None where it must do its work;
    else words in small letters, one of which a refusal says (none: any). same: whether the numbers
    must be those of quiet surroundings, bit for bit. silent: whether nobody hears it; results are
    written all the same, and its status may tell.
    """

    description: str
    variables: Mapping[str, str | None] = {}
    name: str = "here"
    arrange: Callable[[Files], None] = lambda files: None
    before: tuple[str, ...] = ()
    folder: Path | None = None
    columns: int | None = None
    lines: int | None = None
    rights: bool = True
    refusal: tuple[str, ...] | None = None
    same: bool = True
    silent: bool = False


class Prepared(NamedTuple):
    """folder: a tiny trained run, its configuration, an original's checkpoint. quiet: what each
    program makes in quiet surroundings."""

    folder: Path
    quiet: dict[str, Any]


def prepare(folder: Path, programs: Sequence[str] = tuple(PROGRAMS)) -> Prepared:
    """Trains the run that the programs are given, and runs each where nothing is odd.

    Args:
      folder: an empty one, which other users can enter.
      programs: that will be tried.

    Raises:
      Broken: one does not do its work even there.
    """
    prepared = Prepared(folder / "prepared", {})
    files = Files(folder / "prepared", "files")
    files.folder.mkdir(parents=True)
    files.config.write_text(CONFIG, encoding="utf-8")
    here = Surroundings("quiet surroundings")
    words = ["spak_jax.train", files.config, "--run", files.trained]
    for each in (files.home, files.temporary):
        each.mkdir()
    status, said, errors = _run(words, here, files)
    if status:
        raise Broken(f"quiet surroundings, train: {errors or said}")
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.save(fuzz.original(), files.original)
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        able = [name for name in programs if _lacks(name, here) is None]
        trials = {
            name: pool.submit(attempt, name, here, folder / f"quiet-{name}", prepared)
            for name in able
        }
        for name, made in trials.items():
            prepared.quiet[name] = made.result()[1]
    return prepared


def attempt(program: str, place: Surroundings, folder: Path, prepared: Prepared) -> tuple[str, Any]:
    """Runs a program in odd surroundings.

    Args:
      program: of `PROGRAMS`.
      place: the surroundings.
      folder: where the trial's files are made; not there yet, and gone afterwards.
      prepared: what they are copied from.

    Returns:
      What became of it in a few words, and what the program made (None where it was refused).

    Raises:
      Broken: a promise was not kept.
      NotTried: this machine cannot make the surroundings.
    """
    missing = _lacks(program, place)
    if missing:
        raise NotTried(missing)
    files = Files(folder, place.name)
    try:
        _lay_out(files, prepared)
        place.arrange(files)
        before = _contents(files)
        status, said, errors = _run(PROGRAMS[program].words(files), place, files)
        # What is compared is there for us, whoever may read it.
        outcome, made = _judge(program, place, files, status, said, errors, before)
        if made is not None and program in prepared.quiet:
            pair = json.loads(json.dumps(made)), prepared.quiet[program]
            numbers = [each if place.same else each[:-1] for each in pair]
            _require(numbers[0] == numbers[1], f"other results: {numbers[0]}, not {numbers[1]}")
        return outcome, json.loads(json.dumps(made))
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL):
            raise
        raise NotTried(f"the file system does not take it: {error.strerror}") from None
    finally:
        _remove(files.root)


def _judge(
    program: str,
    place: Surroundings,
    files: Files,
    status: int | None,
    said: str,
    errors: str,
    before: dict[str, bytes],
) -> tuple[str, Any]:
    shown = f"status {status}: {errors or said}"
    _require(status is not None, f"it did not end within {PATIENCE} s: {said} {errors}")
    for word in ("Traceback", "Exception ignored", "Fatal Python error"):
        _require(word not in said + errors, shown)
    if place.columns is not None and place.columns >= WIDE:
        _require_fit(_plain(said), place.columns)
    after = _contents(files)
    changed = [name for name in before if after.get(name) != before[name]]
    _require(not changed, f"{changed and changed[0]!r} is changed or lost")
    _require(not os.listdir(files.temporary), "temporary files are left")
    outputs = tuple(os.fspath(each.relative_to(files.root)) for each in (files.new, files.new_json))
    for name in after.keys() - before.keys():
        wanted = name.startswith(outputs) and program not in PRINTING
        _require(wanted, f"{name!r} was not asked for")
    left = sorted(after.keys() - before.keys())
    _require(status != 2 or not left, f"refused, and leaves {left and left[0]!r}: {shown}")
    lines = [line for line in _plain(errors).splitlines() if not _is_warning(line)]
    unheard = place.silent and status in (1, 128 + signal.SIGPIPE, -signal.SIGPIPE)
    if unheard and program in PRINTING:
        _require(len(lines) < 2, f"more than a line: {shown}")
        return "ended unheard", None
    if status == 0 or unheard:
        _require(len(lines) <= unheard, f"did its work, and says {errors}")
        try:
            made = PROGRAMS[program].read(files, None if place.silent else _plain(said))
        except Exception as error:  # noqa: BLE001  whatever keeps us from reading it
            # A result is no less one where nobody hears of it.
            raise Broken(f"no results: {type(error).__name__}: {error}; {shown}") from None
        return "did its work, unheard" if unheard else "did its work", made
    _require(status in (1, 2), shown)
    if place.columns is not None:
        lines = [line for line in _plain(said).splitlines() if line.startswith("error: ")]
    _require(len(lines) == 1 and lines[0].startswith("error: "), f"not one line: {shown}")
    (line,) = lines
    _require(place.refusal is not None, f"refused: {line}")
    for word in ("damaged", "--fresh", "train again"):
        _require(word not in line, f"blamed on good files: {line}")
    true = not place.refusal or any(word in line.lower() for word in place.refusal)
    _require(true, f"the cause is not named: {line}")
    return "refused, nothing lost", None


def _require_fit(said: str, columns: int) -> None:
    """No cell of a table is cut, and no line of one is broken by the terminal."""
    for line in said.splitlines():
        _require("…" not in line, f"cut at {columns} columns: {line}")
        too_wide = any(border in line for border in "│┃") and cell_len(line) > columns
        _require(not too_wide, f"wider than {columns} columns: {line}")


def _is_warning(line: str) -> bool:
    """Ours, or JAX's that its cache of programs cannot be used, which is true and costs nothing."""
    return bool(re.match(r"(warning|note): |.*persistent compilation cache|  warnings\.warn", line))


def _run(
    words: Sequence[str | Path], place: Surroundings, files: Files
) -> tuple[int | None, str, str]:
    """Runs a program. Returns its status (None: it did not end), and what it said on both streams,
    on a terminal all on the first."""
    environment = os.environ | {
        "PYTHONPATH": str(CODE),
        "JAX_PLATFORMS": "cpu",
        "HOME": str(files.home),
        "TMPDIR": str(files.temporary),
        "LC_ALL": "C.UTF-8",
    }
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "PYTHONSTARTUP"):
        environment.pop(name, None)
    for name, value in place.variables.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    command = [
        *(() if place.rights or os.geteuid() else _WITHOUT_RIGHTS),
        *(os.fspath(files.folder) if word == "{folder}" else word for word in place.before),
        *(sys.executable, "-m", *map(os.fspath, words)),
    ]
    options: dict[str, Any] = {
        "env": environment,
        "cwd": place.folder or files.folder,
        "stdin": subprocess.DEVNULL,
        "start_new_session": True,
    }
    # `PATH` may be one of the oddities.
    command[0] = shutil.which(command[0]) or command[0]
    if place.columns is not None:
        return _on_terminal(command, place.columns, options)
    if place.lines is not None:
        return _half_read(command, place.lines, options)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    ) as process:
        try:
            said, errors = process.communicate(timeout=PATIENCE)
            status = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            (said, errors), status = process.communicate(), None
    encoding = "utf-16" if "utf-16" in place.variables.get("PYTHONIOENCODING", "") else "utf-8"
    return status, *(each.decode(encoding, "replace") for each in (said, errors))


def _on_terminal(
    command: list[str], columns: int, options: dict[str, Any]
) -> tuple[int | None, str, str]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    options = options | {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    pieces = []
    with subprocess.Popen(command, **options) as process:
        os.close(theirs)
        timer = _Timer(process)
        with timer, contextlib.suppress(OSError), os.fdopen(ours, "rb", 0) as file:
            while piece := file.read(4096):
                pieces.append(piece)
        process.wait()
    said = b"".join(pieces).decode("utf-8", "replace").replace("\r\n", "\n")
    return None if timer.rang else process.returncode, said, ""


def _half_read(
    command: list[str], lines: int, options: dict[str, Any]
) -> tuple[int | None, str, str]:
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    ) as process:
        timer = _Timer(process)
        with timer:
            said = b"".join(process.stdout.readline() for _ in range(lines))
            process.stdout.close()
            errors = process.stderr.read()
            process.wait()
    status = None if timer.rang else process.returncode
    return status, said.decode("utf-8", "replace"), errors.decode("utf-8", "replace")


class _Timer:
    """Ends a process that takes too long; `rang` says that it did."""

    def __init__(self, process: subprocess.Popen):
        self.rang = False
        self._process = process
        self._timer = threading.Timer(PATIENCE, self._ring)

    def _ring(self) -> None:
        self.rang = True
        self._process.kill()

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()


def _lacks(program: str, place: Surroundings) -> str | None:
    """What this machine lacks for a trial."""
    if program == "convert" and importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    if not place.rights and os.geteuid() == 0 and shutil.which("setpriv") is None:
        return "root cannot give its rights up: there is no setpriv(1)"
    return None


def _lay_out(files: Files, prepared: Prepared) -> None:
    given = Files(prepared.folder, "files")
    for each in (files.folder, files.home, files.temporary):
        each.mkdir(parents=True)
    shutil.copy(given.config, files.config)
    shutil.copytree(given.trained, files.trained)
    if given.original.exists():
        shutil.copy(given.original, files.original)


def _contents(files: Files) -> dict[str, bytes]:
    """All files but those of the home folder, which caches may use, by their paths."""
    found = {}
    for folder, _, names in os.walk(files.folder):
        for name in names:
            path = os.path.join(folder, name)
            # An empty lock is what is left of one.
            if name != run_folder.LOCK:
                with contextlib.suppress(OSError), open(path, "rb") as file:
                    found[os.path.relpath(path, files.root)] = file.read()
    return found


def _remove(folder: Path) -> None:
    for parent, names, _ in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                os.chmod(os.path.join(parent, name), 0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _plain(text: str) -> str:
    """Without what colours a terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def _require(kept: bool, otherwise: str) -> None:
    if not kept:
        message = " ".join(otherwise.split())
        raise Broken(message if len(message) < 800 else f"{message[:200]} ... {message[-600:]}")
