"""What all programs share: how they fail, print, show progress and find a file by its name.

A program is a module with a `main` that `run_program` runs. All that people read goes through
`console`, which takes no text for markup; tables are this module's `Table`, which cuts nothing, and
whatever takes more than seconds happens within `progress`.
"""

import collections
import contextlib
import copy
import difflib
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import rich.console
import rich.table
from rich.cells import cell_len
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from pallas_kernels import compilation_cache

# Off a terminal rich would wrap tables at 80 columns; a log or a pipe wants them whole.
OFF_TERMINAL = 140
# A bar is so many columns at most, and left out where fewer than the least are free.
LONGEST_BAR, SHORTEST_BAR = 40, 8
# Off a terminal: seconds until the first line on work that goes on, and between two of them.
FIRST_LINE, BETWEEN_LINES = 3.0, 10.0
# Seconds that the pace of work is measured over.
PACE = 30.0
# Work that will take longer (seconds) says what to do instead, once its pace was measured so long.
LONG, MEASURED = 600.0, 2.0

# By any of these JAX takes it that there is a GPU of NVIDIA's.
DEVICE_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")


class Failure(Exception):
    """A program cannot go on. It prints `label` and the message alone, and exits with `status`."""

    status = 1
    label = "error"


class InputError(Failure):
    """What the user gave cannot be used: the message names the field, the value and a way out."""

    status = 2


def run_program(main: Callable[[], None]) -> None:
    """Runs `main`; a `Failure` ends the process with its message and status, no traceback.

    Output that cannot be written stops no work: it is dropped, files are written all the same, and
    the status tells. It is 141, without a message, where a reader such as `head` has gone, as if
    SIGPIPE had ended the program; 1, with a message, where a disk is full. What the output's
    encoding lacks is written as an escape, such as `\\xe9`.
    """
    with _standard_streams() as lost:
        expect_no_libraries()
        compilation_cache.keep()
        try:
            try:
                main()
            except (AssertionError, RuntimeError):
                # What a JAX without devices raises, anywhere.
                if "jax" in sys.modules:
                    require_devices()
                raise
            status = 0
        except Failure as error:
            print(f"{error.label}: {error}", file=sys.stderr)
            status = error.status
        except KeyboardInterrupt:
            print("stopped: SIGINT", file=sys.stderr)
            status = 128 + signal.SIGINT
        except SystemExit as end:
            status = end.code
        error = lost()
        if error and not status:
            status = 128 + signal.SIGPIPE
            if not isinstance(error, BrokenPipeError):
                print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
                status = 1
    if status:
        raise SystemExit(status)


def expect_no_libraries() -> None:
    """For a program, before it uses JAX: where there is no GPU, its libraries are not missed.

    JAX's plugin is also installed to compile for absent GPUs. Without one JAX leaves it alone, but
    not before it has looked for cuDNN and printed a traceback because that is not there.
    """
    if not any(map(os.path.exists, DEVICE_FILES)):
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def require_devices() -> None:
    """Starts JAX's platform, which everything that computes needs.

    Raises:
      InputError: it does not start; the message says which was asked for, and what is there.
    """
    import jax

    try:
        jax.devices()
    # It asserts where none of the platforms asked for is there.
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.jax_platforms
        said = str(error).strip().splitlines()
        why = said[0][:200] if said else "it finds no device of that kind"
        raise InputError(
            f"JAX cannot start {f'on JAX_PLATFORMS={asked}' if asked else 'here'} ({why}):"
            " JAX_PLATFORMS=cpu is there on every machine; unset, JAX takes what it finds"
        ) from None


class Console(rich.console.Console):
    """A console for any text: nothing in it is markup, and no terminal is needed."""

    def __init__(self):
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True)

    @property
    def encoding(self) -> str:
        """Of the stream that is written to now; rich asks for that of one given at first."""
        return (getattr(self.file, "encoding", None) or "utf-8").lower()

    @property
    def size(self) -> rich.console.ConsoleDimensions:
        """That which COLUMNS says, else the terminal's; many columns where there is none."""
        width, height = super().size
        columns = os.environ.get("COLUMNS", "")
        if columns.isdecimal() and int(columns):
            width = int(columns)
        elif not self.is_terminal:
            width = OFF_TERMINAL
        return rich.console.ConsoleDimensions(width, height)


console = Console()


class Table(rich.table.Table):
    """A table that loses nothing where it is narrow: cells are wrapped between words, and where not
    even each column's longest word has room, every row is a list of lines `heading: cell`.

    Cells and headings are text.
    """

    def add_row(self, *cells: str, **style) -> None:
        # Spaces at a line's start would have rich break the word behind them.
        lines = [[line.strip() for line in cell.splitlines()] for cell in cells]
        super().add_row(*map("\n".join, lines), **style)

    def __rich_console__(self, console, options):
        fitted = self._fitted(console, options)
        if fitted is None:
            yield Text("\n".join(self._lines(options.max_width)))
        else:
            yield from rich.table.Table.__rich_console__(fitted, console, options)

    def _fitted(self, console, options) -> "Table | None":
        """The table with widths for its columns that split no word; None where there are none."""
        unbounded = options.update(width=10**6)
        ranges = [self._measure_column(console, unbounded, column) for column in self.columns]
        spare = options.max_width - self._extra_width - sum(each.minimum for each in ranges)
        if spare < 0:
            return None
        wanted = sum(each.span for each in ranges)
        share = min(1.0, spare / wanted) if wanted else 0.0
        fitted = copy.copy(self)
        fitted.columns = [copy.copy(column) for column in self.columns]
        for column, each in zip(fitted.columns, ranges, strict=True):
            # rich adds the padding.
            padding = self._get_padding_width(column._index)
            column.width = each.minimum + int(share * each.span) - padding
            # rich counts wide characters wrongly, and cuts off more than spaces otherwise.
            column.overflow = "fold"
        return fitted

    def _lines(self, width: int) -> Iterator[str]:
        if self.title:
            yield from _wrapped(str(self.title), width)
        for row in zip(*(column.cells for column in self.columns), strict=True):
            yield ""
            for column, cell in zip(self.columns, row, strict=True):
                start = f"{column.header}: " if column.header else ""
                for line in str(cell).splitlines():
                    yield from _wrapped(start + line, width)
                    start = "  "


def _wrapped(text: str, width: int) -> Iterator[str]:
    """A line as several of so many columns; a word that is longer stays whole."""
    words = text.split()
    line = text[: len(text) - len(text.lstrip())] + "".join(words[:1])
    for word in words[1:]:
        if cell_len(f"{line} {word}") > width:
            yield line
            line = f"  {word}"
        else:
            line = f"{line} {word}"
    yield line


@contextlib.contextmanager
def progress(
    what: str, total: int | None = None, completed: int = 0, unit: str = "", instead: str = ""
) -> Iterator["Progress"]:
    """Within it a person sees how far some work is: a bar on a terminal, lines off it.

    Off a terminal the first line comes after some seconds, so that short work says nothing. Work
    within work that is shown is not shown.

    Args:
      what: the work.
      total: how much of it there is; None if nobody knows.
      completed: how much was done before.
      unit: what is counted, in the plural.
      instead: what may be done instead of waiting, said once if it will take long.

    Yields:
      What is to be told of its progress.
    """
    told = Progress(what, total, completed, unit, instead)
    with told._shown():
        yield told


class Progress:
    """How far some work is; made by `progress`."""

    _any_shown = False

    def __init__(self, what: str, total: int | None, completed: int, unit: str, instead: str):
        self._what, self._total, self._completed, self._unit = what, total, completed, unit
        self._instead, self._status = instead, ""
        self._began, self._ended = time.monotonic(), threading.Event()
        self._samples: collections.deque[tuple[float, int]] = collections.deque()
        self._printed = False

    def advance(self, count: int = 1, status: str | None = None) -> None:
        """So much more is done; `status`, words with commas between, stands until another does.

        The pace is counted from the first call on: what came before may have compiled.
        """
        now = time.monotonic()
        self._completed += count
        self._status = self._status if status is None else status
        self._samples.append((now, self._completed))
        while len(self._samples) > 2 and self._samples[1][0] < now - PACE:
            self._samples.popleft()
        left = self.left()
        if self._instead and now - self._samples[0][0] > MEASURED and left and left > LONG:
            console.print(f"{self._what}: about {in_words(left)} to go; {self._instead}")
            self._instead = ""

    def rate(self) -> float | None:
        """How much is done a second; None as long as nobody knows."""
        if len(self._samples) < 2:
            return None
        (first, before), (last, after) = self._samples[0], self._samples[-1]
        return (after - before) / (last - first) if last > first else None

    def left(self) -> float | None:
        """Seconds to the end; None as long as nobody knows."""
        rate = self.rate()
        return (self._total - self._completed) / rate if rate and self._total else None

    def __rich_console__(self, console, options):
        """What a terminal shows: as many parts as have room beside a bar, the first ones first."""
        what, count, *parts = self._parts()
        room = options.max_width - cell_len(what) - 1
        line = count
        for part in parts:
            if cell_len(f"{line}  {part}") <= room - SHORTEST_BAR - 1:
                line = f"{line}  {part}"
        free = min(room - cell_len(line) - 1, LONGEST_BAR)
        if self._total is None or free < SHORTEST_BAR:
            yield Text(f"{what} {line}", overflow="fold", no_wrap=False)
            return
        row = rich.table.Table.grid(padding=(0, 1, 0, 0))
        bar = ProgressBar(self._total, min(self._completed, self._total), width=free)
        row.add_row(Text(what, no_wrap=True), bar, Text(line, no_wrap=True))
        yield row

    def _parts(self) -> list[str]:
        """What is known, by importance."""
        elapsed = in_words(time.monotonic() - self._began)
        unit = f" {self._unit}" if self._unit else ""
        if self._total is None:
            count = f"{self._completed:,}{unit}" if self._completed else ""
            return [self._what, *filter(None, [count, f"for {elapsed}"])]
        parts = [self._what, f"{self._completed:,} of {self._total:,}{unit}"]
        rate, left = self.rate(), self.left()
        if left:
            parts.append(f"about {in_words(left)} left")
        parts += filter(None, self._status.split(", "))
        if rate:
            each = f"{rate:,.0f} a second" if rate >= 10 else f"{rate:.1f} a second"
            parts.append(each if rate >= 1 else f"{in_words(1 / rate)} each")
        return [*parts, f"after {elapsed}"]

    def _print(self) -> None:
        what, *parts = self._parts()
        console.print(f"{what}: {', '.join(parts)}")
        self._printed = True

    def _print_now_and_then(self) -> None:
        pause = FIRST_LINE
        while not self._ended.wait(pause):
            self._print()
            pause = BETWEEN_LINES

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        if Progress._any_shown or console.quiet:
            self._instead = ""
            yield
            return
        Progress._any_shown = True
        try:
            if console.is_terminal and not console.is_dumb_terminal:
                # What has no end to be looked at leaves nothing behind.
                with Live(self, console=console, transient=self._total is None):
                    yield
                return
            printing = threading.Thread(target=self._print_now_and_then, daemon=True)
            printing.start()
            try:
                yield
            finally:
                self._ended.set()
                printing.join()
                # The last status says how the work ended.
                if self._total is not None and (self._printed or self._status):
                    self._print()
        finally:
            Progress._any_shown = False


def in_words(seconds: float) -> str:
    """A time that a person can grasp: `45 s`, `2.5 minutes`, `3.2 hours`, `2.1 days`."""
    for unit, length in (("days", 86_400), ("hours", 3_600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.1f} minutes" if seconds >= 120 else f"{seconds:.0f} s"


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line that is not too long."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def named_file(word: str | Path, *folders: Path, suffix: str = ".toml") -> Path:
    """The file that a word of a command line names: a path, or the name of a file in a folder.

    A path that exists wins.

    Args:
      word: `loop12`, `loop12.toml` or a path.
      folders: where names are looked for, one after the other.
      suffix: of the files there.

    Raises:
      InputError: there is none; the message says what there is.
    """
    word = str(word)
    # Neither fails where a name is too long.
    if os.path.exists(word) and not os.path.isdir(word):
        return Path(word)
    name = word.removesuffix(suffix)
    files = [folder / f"{name}{suffix}" for folder in folders] if os.sep not in name else []
    for file in files:
        if os.path.isfile(file):
            return file
    folder, known = folders[0], []
    for place in folders:
        with contextlib.suppress(OSError):
            known = sorted(path.stem for path in place.glob(f"*{suffix}"))
        if known:
            folder = place
            break
    shown = word if len(word) <= 100 else f"{word[:97]}..."
    close = difflib.get_close_matches(Path(name).name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    there = f"{folder} has {', '.join(known)}" if known else f"the folder {folder} has none here"
    reason = "it is a folder" if os.path.isdir(word) else "no such file"
    raise InputError(f"cannot read the specification {shown}: {reason}; {hint}{there}")


class _StandardFile(io.FileIO):
    """The file of a standard stream. Once something could not be written all else is dropped.

    lost: the error of what could not be written.
    """

    lost: OSError | None = None

    def write(self, content) -> int:
        try:
            while self.lost is None:
                written = super().write(content)
                if written is not None:
                    return written
                # A pipe that does not block, and is full.
                select.select([], [self], [])
        except OSError as error:
            self.lost = error
        return memoryview(content).nbytes


@contextlib.contextmanager
def _standard_streams() -> Iterator[Callable[[], OSError | None]]:
    """Within it standard output and error take any text and raise nothing.

    Yields:
      What flushes standard output and returns the error of what it lost, if it lost anything.
    """
    for number in range(3):
        # Files that are opened later must not take the numbers of closed streams: libraries write
        # to these numbers.
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_lenient(*pair) for pair in zip(before, (1, 2), strict=True))
    streams = sys.stdout, sys.stderr

    def lost() -> OSError | None:
        streams[0].flush()
        file = getattr(getattr(streams[0], "buffer", None), "raw", None)
        return file.lost if isinstance(file, _StandardFile) else None

    try:
        yield lost
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before


def _lenient(stream, number: int):
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    # Not what a test or a notebook has put in its place.
    if stream not in (sys.__stdout__, sys.__stderr__) or not isinstance(stream, io.TextIOWrapper):
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_StandardFile(number, "wb", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
