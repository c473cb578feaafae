"""Signals that ask a program to stop: it heeds the first when its work is safe, the second at once.

Python runs signal handlers between its own instructions, and a compiled call can take minutes. So a
thread waits for signals beside it.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from spak_jax.command_line import Failure

# SIGHUP, where there is one: a terminal was closed, or a connection lost.
HEEDED = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
# What brings back a terminal's cursor, which a progress bar hides.
SHOW_CURSOR = b"\x1b[?25h"


class Stopped(Failure):
    """A program was asked to stop, and has kept its work; its status is the signal's, as a shell
    would have it."""

    label = "stopped"

    def __init__(self, number: int, message: str):
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.status = 128 + number


@dataclass
class Request:
    """signal: the number of the signal that asked the program to stop; 0 as long as none has."""

    signal: int = 0


@contextlib.contextmanager
def graceful_shutdown() -> Iterator[Request]:
    """Within it SIGTERM, SIGINT and SIGHUP are a request; a second one ends the process at once.

    SIGHUP is not where it is ignored, as `nohup` has it.

    Only the main thread can enter it.
    """
    request = Request()
    reader, writer = os.pipe()
    # A signal's number is written to it in the very moment, whatever the main thread does.
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=_watch, args=(reader, request), daemon=True)
    watcher.start()
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in _heeded()}
    try:
        yield request
    finally:
        for number, handler in before.items():
            # None stands for a handler that is not Python's and cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(woken)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _heeded() -> list[int]:
    ignored = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in HEEDED if not (ignored and number == signal.SIGHUP)]


def _watch(reader: int, request: Request) -> None:
    while number := os.read(reader, 1):
        (number,) = number
        if number not in HEEDED:
            continue
        if request.signal:
            with contextlib.suppress(OSError, ValueError):
                if sys.stdout.isatty():
                    os.write(sys.stdout.fileno(), SHOW_CURSOR)
            os._exit(128 + number)
        request.signal = number
        # The terminal may be gone: that is what SIGHUP says.
        with contextlib.suppress(OSError, ValueError):
            print(
                f"{signal.Signals(number).name}: stopping after the steps under way, with a"
                " checkpoint; a second signal ends the process at once",
                file=sys.stderr,
                flush=True,
            )
