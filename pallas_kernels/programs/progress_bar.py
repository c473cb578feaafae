"""How far work is that takes more than seconds: a bar on a terminal, lines off it."""

import collections
import contextlib
import threading
import time
from collections.abc import Iterator

import rich.table
from rich.cells import cell_len
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from pallas_kernels.programs.terminal import console

# A bar is so many columns at most, and left out where fewer than the least are free.
LONGEST_BAR, SHORTEST_BAR = 40, 8
# Off a terminal: seconds until the first line on work that goes on, and between two of them.
FIRST_LINE, BETWEEN_LINES = 3.0, 10.0
# Seconds that the pace of work is measured over.
PACE = 30.0
# Work that will take longer (seconds) says what to do instead, once its pace was measured so long.
LONG, MEASURED = 600.0, 2.0


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
      The `Progress` to advance.
    """
    shown = Progress(what, total, completed, unit, instead)
    with shown._shown():
        yield shown


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
