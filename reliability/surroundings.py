"""Hostile surroundings, and what programs make of them:
`python -m reliability.surroundings [KIND ...] [--json FILE]`.

Paths that a file system allows, encodings, terminals, closed streams, permissions, variables,
working folders, limits: the input is good, and what is around a program is odd. Each trial runs one
program in a process of its own. The promise: it does what it does in quiet surroundings, with the
same numbers, or says in one line why it cannot and leaves all as it was; it writes nothing but what
it was asked for. What faults and hostile input do is tried by `faults` and `fuzz`. On Linux.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import importlib.util
import json
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels.programs.terminal import cell_len
from reliability import fuzz
from reliability.campaigns import carry_out, table_of
from reliability.faults import ALONE_READ_ONLY, Broken, NotTried, alone
from spak_jax.command_line import (
    Failure,
    console,
    run_program,
)
from spak_jax.evaluation.results import read_results
from spak_jax.training import checkpoint, run_folder
from spak_jax.training.named_arrays import digest

CODE = Path(__file__).parents[1]
# For what takes seconds, on a machine that has other work.
PATIENCE = 180
AT_ONCE = 2
SEED = 0
# A file system's longest name, in bytes.
LONGEST = 255
# A terminal of so many columns must do for tables.
WIDE = 80

# Learns nothing; four steps, two checkpoints, an invariant that holds.
CONFIG = """
name = "tiny"
[system]
name = "Tiny loop"
[model]
kind = "loop"
width = 16
heads = 2
loops = 2
[data]
layout = "single"
row_length = 24
examples = 900
[train]
steps = 4
batch = 8
warmup_steps = 2
decay_steps = 4
steps_per_call = 2
checkpoint_every = 2
[evaluation]
lengths = [1, 2]
examples = 5
[[invariant]]
name = "small"
law = "It is small."
check = "model.width < 17"
"""
DRAWN = ("generalization.png", "training.pdf", "table.md")
TRACED = ("trace.json", "trace.png", "trace.pdf")
# What is read back of a results file.
SCORES = ("lengths", "published_columns", "measures", "step", "seed")

# Pieces of names: what shells, patterns, markup, formats, option parsers and URLs take for theirs.
PIECES = [
    *(b"[", b"]", b"[0-9]", b"[/]", b"[bold]", b"[/red]x", b"{", b"{}", b"{0}", b"%s", b"%(a)s"),
    *(b"*", b"**", b"?", b"~", b"$HOME", b"`id`", b"$(id)", b"'", b'"', b"\\", b"\\n", b";", b"&"),
    *(b" ", b"\t", b"\n", b"\r", b"\x01", b"\x1b[31m", b"\x7f", b"#", b"=", b"a=1", b":", b"gs:"),
    *(b"-", b"--run", b"..a", b".", b"|", b"<", b">", b"@", b"+", b",", b"!", b"^", b"12", b"tmp"),
    *(b"\xff", b"\xc3", b"\x80", b"\xed\xa0\x80", b".orbax-checkpoint-tmp", b".partial", b".json"),
    *(each.encode() for each in ("é", "e\u0301", "ß", "数", "🙂", "\u202e", "\u2028", "\ufeff")),
]


class Files(NamedTuple):
    """What a trial's program is given and may write; all lie in `root`, nothing else does."""

    root: Path
    name: str

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def temporary(self) -> Path:
        return self.root / "temporary"

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def config(self) -> Path:
        return self._with_ending(self.folder, ".toml")

    @property
    def trained(self) -> Path:
        return self.folder / self.folder.name

    @property
    def original(self) -> Path:
        return self._with_ending(self.folder, ".pt")

    @property
    def new(self) -> Path:
        """Where the program writes, in a folder that is not there."""
        return self.folder / "new" / self.folder.name

    @property
    def new_json(self) -> Path:
        return self._with_ending(self.folder / "new", ".json")

    def _with_ending(self, folder: Path, ending: str) -> Path:
        stem = os.fsencode(self.folder.name)[: LONGEST - len(ending)]
        return folder / (os.fsdecode(stem) + ending)


class Program(NamedTuple):
    """words: its module and what it is given. read: what it made, or raises what keeps it from it.

    What is made is a list for comparisons, last the numbers that may differ in their last bits.
    """

    words: Callable[[Files], list[str | Path]]
    read: Callable[[Files, str], Any]


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


def _trained(files: Files, said: str) -> Any:
    restored = checkpoint.restore(files.new, optimizer=True)
    kept = json.loads((files.new / run_folder.RESULTS).read_bytes())
    read_results(files.new / run_folder.RESULTS)
    digests = [digest(each) for each in (restored.weights, restored.optimizer)]
    return [restored.step, {key: kept[key] for key in SCORES}, digests]


def _evaluated(files: Files, said: str) -> Any:
    read_results(files.new_json)
    kept = json.loads(files.new_json.read_bytes())
    return [{key: kept[key] for key in SCORES}, None]


def _written(names: Sequence[str], files: Files, said: str) -> Any:
    for name in names:
        if not (files.new / name).stat().st_size:
            raise Broken(f"{name} is empty")
    return [sorted(os.listdir(files.new)), None]


def _converted(files: Files, said: str) -> Any:
    restored = checkpoint.restore(files.new)
    return [restored.step, digest(restored.weights)]


def _says(words: Sequence[str], files: Files, said: str) -> Any:
    """What is said, but for how it is laid out; where nothing can be, `said` is None."""
    missing = [word for word in words if said is not None and word not in said]
    if missing:
        raise Broken(f"it does not say {missing[0]!r}: {said}")
    return [None, None]


PROGRAMS = {
    "train": Program(lambda files: ["spak_jax.train", files.config, "--run", files.new], _trained),
    "evaluate": Program(
        lambda files: ["spak_jax.evaluate", files.trained, "--json", files.new_json], _evaluated
    ),
    "solve": Program(
        lambda files: ["spak_jax.solve", files.trained, "1+2", "34+5"],
        functools.partial(_says, ("1+2", "34+5")),
    ),
    "trace": Program(
        lambda files: ["spak_jax.trace", files.trained, "12+3", "--out", files.new],
        functools.partial(_written, TRACED),
    ),
    "figures": Program(
        lambda files: ["spak_jax.figures", files.trained / run_folder.RESULTS, "--out", files.new],
        functools.partial(_written, DRAWN),
    ),
    "check": Program(
        lambda files: ["spak_jax.check", files.config], functools.partial(_says, ("small",))
    ),
    "brief": Program(
        lambda files: ["spak_jax.brief", files.config], functools.partial(_says, ("Tiny loop",))
    ),
    "convert": Program(lambda files: ["spak_jax.convert", files.original, files.new], _converted),
}
# The rest take their turns: each surroundings meets `train` and some of them.
TURNS = ("evaluate", "solve", "figures", "check", "trace", "brief", "convert")
# Their work is to print: where nobody reads, they may end by that.
PRINTING = ("solve", "check", "brief")

Trials = Iterator[tuple[Surroundings, Sequence[str]]]


def paths(moments: random.Random) -> Trials:
    """Each piece of a name alone, and names put together from them, as long as may be."""
    names = [b"a" + piece + b"b" for piece in PIECES]
    moments.shuffle(names)
    names = [*(_name(names[i : i + 4]) for i in range(0, len(names), 4)), *_whole_names()]
    names += [_name(moments.choices(PIECES, k=moments.randint(1, 90))) for _ in range(6)]
    turns = _turns()
    for name in names:
        yield _called(os.fsdecode(name)), ("train", next(turns))
    # The longest path has 4,096 bytes: what is given still fits, what is made may not.
    for last in (1, 100, 180):
        deep = Surroundings(
            f"a path of {251 * 15 + last} bytes",
            name="/".join(["d" * 250] * 15 + ["e" * last, "x"]),
            refusal=("too long",),
        )
        yield deep, ("train", "evaluate")


def encodings(moments: random.Random) -> Trials:
    """A name outside ASCII where the locale or Python's own setting would have ASCII or another."""
    turns = _turns()
    for description, variables in (
        ("LC_ALL=C", {"LC_ALL": "C"}),
        ("LC_ALL=POSIX PYTHONCOERCECLOCALE=0", {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}),
        (
            "an ASCII locale without UTF-8 mode",
            {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        ),
        ("LANG=C.UTF-8", {"LANG": "C.UTF-8", "LC_ALL": None}),
        ("PYTHONUTF8=1", {"PYTHONUTF8": "1"}),
        ("a locale that is not there", {"LC_ALL": "xx_YY.UTF-8", "LANG": "xx_YY.UTF-8"}),
        ("LANG and LC_ALL unset", {"LC_ALL": None, "LANG": None}),
        *((f"PYTHONIOENCODING={e}", {"PYTHONIOENCODING": e}) for e in ("ascii", "latin-1")),
        ("PYTHONIOENCODING=utf-16", {"PYTHONIOENCODING": "utf-16"}),
        ("PYTHONIOENCODING=ascii:strict", {"PYTHONIOENCODING": "ascii:strict"}),
    ):
        for name, program in (
            ("Zahlen é数🙂", "train"),
            (os.fsdecode(b"\xff\xc3"), next(turns)),
        ):
            place = _called(name)._replace(variables=variables)
            yield place._replace(description=f"{description}, {place.description}"), (program,)
        yield Surroundings(description, variables), ("solve", next(turns))


def terminals(moments: random.Random) -> Trials:
    """Terminals of few columns, without colours, and what variables say of them."""
    turns = _turns(("solve", "train", "check", "evaluate"))
    for columns in (80, 40, 20, 1, 0):
        for name in ("here", "a folder of a rather long name [that] wraps"):
            here = Surroundings(f"a terminal of {columns} columns", name=name, columns=columns)
            yield here, (next(turns), next(turns))
    for description, variables in (
        ("TERM=dumb", {"TERM": "dumb"}),
        ("TERM unset", {"TERM": None}),
        ("NO_COLOR", {"NO_COLOR": "1"}),
        ("FORCE_COLOR", {"FORCE_COLOR": "1"}),
        *((f"COLUMNS={n}", {"COLUMNS": n}) for n in ("0", "-1", "abc", "1", "20")),
    ):
        yield Surroundings(f"a terminal and {description}", variables, columns=80), (next(turns),)
        yield Surroundings(f"a pipe and {description}", variables), (next(turns),)


def streams(moments: random.Random) -> Trials:
    """Streams that are closed, full, or that nobody reads to the end."""
    sh = lambda script: ("sh", "-c", f'exec "$@" {script}', "sh")  # noqa: E731
    every = ("train", "evaluate", "solve", "check", "brief")
    yield Surroundings("standard input closed", before=sh("<&-")), every
    yield Surroundings("standard output closed", before=sh(">&-"), silent=True), every
    yield Surroundings("standard error closed", before=sh("2>&-"), silent=True), every
    yield Surroundings("all streams closed", before=sh("<&- >&- 2>&-"), silent=True), every
    for stream, script in (("output", ">/dev/full"), ("error", "2>/dev/full")):
        full = f"standard {stream} on a full device"
        yield Surroundings(full, before=sh(script), silent=True), every
    for lines in (0, 1):
        yield Surroundings(f"a pipe closed after {lines} lines", lines=lines, silent=True), every


def permissions(moments: random.Random) -> Trials:
    """A user who is not almighty, where this or that cannot be read, written or entered."""
    refused = ("denied", "permit", "cannot write", "cannot be written")
    turns = _turns(("evaluate", "solve", "trace", "figures"))
    for description, arrange, programs, refusal in (
        ("nothing odd", lambda files: None, ("train", "evaluate", "convert"), None),
        (
            "a run folder that can only be read",
            lambda files: _only_read(files.trained),
            ("evaluate", "solve", "trace", "figures"),
            None,
        ),
        (
            "a run folder that cannot be entered",
            lambda files: files.trained.chmod(0),
            ("evaluate", "solve", "figures"),
            refused,
        ),
        (
            "checkpoints that cannot be read",
            lambda files: _unreadable(files.trained / run_folder.CHECKPOINTS),
            ("evaluate", "solve"),
            refused,
        ),
        (
            "one array that cannot be read",
            lambda files: _unreadable(
                files.trained / run_folder.CHECKPOINTS / "4" / "weights" / "d"
            ),
            ("evaluate", "solve"),
            refused,
        ),
        (
            "a configuration that cannot be read",
            lambda files: files.config.chmod(0),
            ("train", "check", "brief"),
            refused,
        ),
        (
            "a folder in which nothing can be made",
            lambda files: files.folder.chmod(0o555),
            ("train", "evaluate", "trace", "figures", "convert"),
            refused,
        ),
        (
            "a home folder that cannot be written",
            lambda files: files.home.chmod(0o555),
            ("train", next(turns)),
            None,
        ),
        (
            "a home folder that cannot be entered",
            lambda files: files.home.chmod(0),
            ("train", "figures"),
            None,
        ),
        (
            "no place for temporary files",
            lambda files: files.temporary.chmod(0o555),
            ("train", next(turns)),
            None,
        ),
    ):
        # Without a cache of programs that is elsewhere: the usual one is in the home folder.
        place = Surroundings(
            description, {"JAX_COMPILATION_CACHE_DIR": None}, arrange=arrange, rights=False
        )
        yield place._replace(refusal=refusal), programs
    for mask in ("077", "777"):
        before = ("sh", "-c", f'umask {mask}; exec "$@"', "sh")
        # What a mask takes away at once cannot be used by the same process either.
        refusal = refused if mask == "777" else None
        place = Surroundings(f"umask {mask}", before=before, rights=False, refusal=refusal)
        yield place, ("train", "evaluate", "figures")
    before = tuple(alone(ALONE_READ_ONLY, "{folder}"))
    yield (
        Surroundings("a read-only file system", before=before, refusal=("read-only",)),
        ("train", "evaluate", "trace", "convert"),
    )
    yield Surroundings("a run on a read-only file system", before=before), ("solve", "check")


def variables(moments: random.Random) -> Trials:
    """Variables that Python, JAX, Matplotlib and libraries of threads listen to."""
    nowhere, uncached = "/proc/nowhere/at all", {"JAX_COMPILATION_CACHE_DIR": None}
    turns = _turns(("evaluate", "solve", "trace", "figures", "check"))
    for description, values, change in (
        ("JAX_PLATFORMS=cuda", {"JAX_PLATFORMS": "cuda"}, {"refusal": ("cuda",)}),
        ("JAX_PLATFORMS=tpu", {"JAX_PLATFORMS": "tpu"}, {"refusal": ("tpu",)}),
        ("JAX_PLATFORMS=potato", {"JAX_PLATFORMS": "potato"}, {"refusal": ("potato",)}),
        ("JAX_PLATFORMS=", {"JAX_PLATFORMS": ""}, {}),
        ("JAX_ENABLE_X64=1", {"JAX_ENABLE_X64": "1"}, {"same": False}),
        ("JAX_DEBUG_NANS=1", {"JAX_DEBUG_NANS": "1"}, {}),
        ("JAX_DEBUG_INFS=1", {"JAX_DEBUG_INFS": "1"}, {}),
        ("JAX_DEFAULT_PRNG_IMPL=rbg", {"JAX_DEFAULT_PRNG_IMPL": "rbg"}, {"same": False}),
        ("JAX_THREEFRY_PARTITIONABLE=0", {"JAX_THREEFRY_PARTITIONABLE": "0"}, {"same": False}),
        (
            "JAX_DEFAULT_MATMUL_PRECISION",
            {"JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"},
            {"same": False},
        ),
        (
            "four devices",
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
            {"same": False},
        ),
        ("a cache of programs nowhere", {"JAX_COMPILATION_CACHE_DIR": nowhere}, {}),
        ("a cache of programs in a file", {"JAX_COMPILATION_CACHE_DIR": __file__}, {}),
        ("HOME unset", {"HOME": None, **uncached}, {}),
        ("HOME nowhere", {"HOME": nowhere, "XDG_CACHE_HOME": nowhere, **uncached}, {}),
        ("XDG_CACHE_HOME relative", {"XDG_CACHE_HOME": "cache", **uncached}, {}),
        ("TMPDIR nowhere", {"TMPDIR": nowhere}, {}),
        ("MPLBACKEND=nonsense", {"MPLBACKEND": "nonsense"}, {"refusal": ("backend",)}),
        ("MPLCONFIGDIR nowhere", {"MPLCONFIGDIR": nowhere}, {}),
        ("PYTHONOPTIMIZE=2", {"PYTHONOPTIMIZE": "2"}, {}),
        ("PYTHONWARNINGS=error", {"PYTHONWARNINGS": "error::UserWarning"}, {}),
        ("PYTHONDONTWRITEBYTECODE=1", {"PYTHONDONTWRITEBYTECODE": "1"}, {}),
        ("PYTHONHASHSEED=1", {"PYTHONHASHSEED": "1"}, {}),
        ("PYTHONSAFEPATH=1", {"PYTHONSAFEPATH": "1"}, {}),
        ("PYTHONDEVMODE=1", {"PYTHONDEVMODE": "1"}, {}),
        ("OMP_NUM_THREADS=1", {"OMP_NUM_THREADS": "1"}, {}),
        ("TZ=nonsense", {"TZ": "Mars/Olympus"}, {}),
        ("PATH empty", {"PATH": ""}, {}),
        ("PAGER, EDITOR, CI", {"CI": "1", "PAGER": "cat", "EDITOR": "ed"}, {}),
    ):
        place = Surroundings(description, values)._replace(**change)
        drawing = description.startswith(("MPL", "HOME", "TMPDIR"))
        yield place, ("train", "figures" if drawing else next(turns))


def folders(moments: random.Random) -> Trials:
    """Where a program is started: nowhere, where it may not write, and beside odd names."""
    gone = ("sh", "-c", 'mkdir /tmp/gone$$ && cd /tmp/gone$$ && rmdir ../gone$$; exec "$@"', "sh")
    turns = _turns()
    for place in (
        Surroundings("a working folder that is gone", before=gone),
        Surroundings("the root as working folder", folder=Path("/")),
        Surroundings("a working folder of devices", folder=Path("/dev")),
        Surroundings("a process's folder as working folder", folder=Path("/proc/self")),
        Surroundings("a working folder of other configurations", folder=CODE),
    ):
        yield place, ("train", next(turns), next(turns))


def limits(moments: random.Random) -> Trials:
    """Less of everything than a program is used to: it works, or says what it lacks."""
    limited = lambda words: ("sh", "-c", f'ulimit {words}; exec "$@"', "sh")  # noqa: E731
    turns = _turns(("evaluate", "solve", "figures"))
    for description, words, refusal in (
        ("256 open files", "-n 256", None),
        ("64 open files", "-n 64", None),
        ("24 open files", "-n 24", ("files",)),
        ("files of 2 KiB", "-f 4", ("too large",)),
        ("no core files", "-c 0", None),
        ("a stack of 1 MiB", "-s 1024", None),
        ("16 GiB of addresses", "-v 16777216", None),
    ):
        place = Surroundings(description, before=limited(words), refusal=refusal)
        yield place, ("train", next(turns))


class Kind(NamedTuple):
    """Surroundings of one kind, and their name in the table."""

    trials: Callable[[random.Random], Trials]
    words: str


CAMPAIGN = {
    "paths": Kind(paths, "paths that a file system allows"),
    "encodings": Kind(encodings, "locales and encodings"),
    "terminals": Kind(terminals, "terminals"),
    "streams": Kind(streams, "streams closed, full or unread"),
    "permissions": Kind(permissions, "permissions"),
    "variables": Kind(variables, "environment variables"),
    "folders": Kind(folders, "working folders"),
    "limits": Kind(limits, "limits on files and memory"),
}


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
        import threading

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


def run_kind(name: str, folder: Path, prepared: Prepared, share: float = 1.0) -> dict[str, Any]:
    """Tries surroundings of a kind.

    Args:
      name: of `CAMPAIGN`.
      folder: an empty one.
      prepared: what programs are given.
      share: of the trials, drawn.

    Returns:
      JSON: the kind in words, how many programs were tried, how often what became of them, which
      trials broke a promise and how, which could not be made and why, and seconds.
    """
    trials, words = CAMPAIGN[name]
    moments, started = random.Random(f"{SEED} {name}"), time.monotonic()
    outcomes, broken, missing = Counter(), [], Counter()
    all_of_it = [(place, program) for place, some in trials(moments) for program in some]
    if share < 1:
        all_of_it = moments.sample(all_of_it, max(1, round(share * len(all_of_it))))
    shipped = _shipped()
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [
            pool.submit(attempt, program, place, folder / str(i), prepared)
            for i, (place, program) in enumerate(all_of_it)
        ]
        for (place, program), future in zip(all_of_it, futures, strict=True):
            try:
                outcomes[future.result()[0]] += 1
            except Broken as error:
                broken.append(f"{place.description}, {program}: {error}")
                console.print(f"BROKEN: {broken[-1]}")
            except NotTried as error:
                missing[str(error)] += 1
    changed = sorted(set(_shipped().items()) ^ set(shipped.items()))
    if changed:
        broken.append(f"{changed[0][0]}, which ships, was changed")
    return {
        "surroundings": words,
        "tried": outcomes.total() + len(broken),
        "outcomes": dict(outcomes),
        "broken": broken,
        "not_tried": dict(missing),
        "seconds": round(time.monotonic() - started, 1),
    }


def table(found: Mapping[str, Any]) -> str:
    """What a campaign found, in Markdown."""

    def not_kept(each: Mapping[str, Any]) -> list[str]:
        broken = [f"**broken**: {len(each['broken'])}"] if each["broken"] else []
        return broken + [f"not tried, {why}: {n:,}" for why, n in each["not_tried"].items()]

    return table_of("surroundings", (found[name] for name in CAMPAIGN if name in found), not_kept)


def main() -> None:
    carry_out(
        program="reliability.surroundings",
        description="Run programs in odd surroundings and see what becomes of them.",
        part="kind",
        key="surroundings",
        known=CAMPAIGN,
        seed=SEED,
        attempts=_attempts,
        table=table,
    )


def _attempts(names: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        try:
            prepared = prepare(Path(folder))
        except Broken as error:
            raise Failure(f"nothing could be tried: {error}") from None
        for name in names:
            console.print(f"{name} ...")
            (Path(folder) / name).mkdir()
            yield name, run_kind(name, Path(folder) / name, prepared)


# Root passes by permissions by these rights; without them it is an owner as any other.
_WITHOUT_RIGHTS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


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


def _called(name: str) -> Surroundings:
    """Files of that name; what is not UTF-8 may be refused, TensorStore cannot write there."""
    try:
        name.encode()
        refusal = None
    except UnicodeEncodeError:
        refusal = ("utf-8",)
    return Surroundings(f"files named {name!r}", name=name, refusal=refusal)


def _name(pieces: Sequence[bytes]) -> bytes:
    name = b"".join(pieces)[:LONGEST]
    return name + b"_" if name in (b".", b"..") else name


def _whole_names() -> list[bytes]:
    """Names that mean something as they are, and the longest."""
    return [
        *(b"-", b"--help", b"~", b"~root", b"*", b"[a]", b" ", b"\n", b"..."),
        *(b"a" * LONGEST, "é".encode() * 127, "🙂".encode() * 63, b"[" * LONGEST),
        *(unicodedata.normalize(form, "ñandú").encode() for form in ("NFC", "NFD")),
        *(b"tiny.toml", b"results.json", b"12", b"model.width=3"),
    ]


def _turns(programs: Sequence[str] = TURNS) -> Iterator[str]:
    while True:
        yield from programs


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


def _shipped() -> dict[str, float]:
    """When the files that ship were changed, by their paths."""
    return {
        str(path): path.stat().st_mtime
        for name in ("configs", "figures", "released", "runs")
        for path in (CODE / name).rglob("*")
        if path.is_file()
    }


def _only_read(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)


def _unreadable(folder: Path) -> None:
    for path in list(folder.rglob("*")):
        if path.is_file():
            path.chmod(0)


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


if __name__ == "__main__":
    run_program(main)
