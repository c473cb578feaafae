"""Hostile surroundings, and what programs make of them:
`python -m reliability.surroundings [KIND ...] [--json FILE]`.

Paths that a file system allows, encodings, terminals, closed streams, permissions, variables,
working folders, limits: the input is good, and what is around a program is odd. Each trial runs one
program in a process of its own. The promise: it does what it does in quiet surroundings, with the
same numbers, or says in one line why it cannot and leaves all as it was; it writes nothing but what
it was asked for. What faults and hostile input do is tried by `faults` and `fuzz`. On Linux.
"""

import concurrent.futures
import os
import random
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reliability.attempts import AT_ONCE, CODE, Prepared, Surroundings, attempt, prepare
from reliability.campaigns import carry_out, table_of
from reliability.faults import ALONE_READ_ONLY, Broken, NotTried, alone
from reliability.programs import LONGEST, TURNS
from spak_jax.command_line import Failure, console, run_program
from spak_jax.training import run_folder

SEED = 0

# Pieces of names: what shells, patterns, markup, formats, option parsers and URLs take for theirs.
PIECES = [
    *(b"[", b"]", b"[0-9]", b"[/]", b"[bold]", b"[/red]x", b"{", b"{}", b"{0}", b"%s", b"%(a)s"),
    *(b"*", b"**", b"?", b"~", b"$HOME", b"`id`", b"$(id)", b"'", b'"', b"\\", b"\\n", b";", b"&"),
    *(b" ", b"\t", b"\n", b"\r", b"\x01", b"\x1b[31m", b"\x7f", b"#", b"=", b"a=1", b":", b"gs:"),
    *(b"-", b"--run", b"..a", b".", b"|", b"<", b">", b"@", b"+", b",", b"!", b"^", b"12", b"tmp"),
    *(b"\xff", b"\xc3", b"\x80", b"\xed\xa0\x80", b".orbax-checkpoint-tmp", b".partial", b".json"),
    *(each.encode() for each in ("é", "e\u0301", "ß", "数", "🙂", "\u202e", "\u2028", "\ufeff")),
]

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


if __name__ == "__main__":
    run_program(main)
