"""Standard output and error that take any text, and tell what could not be written."""

import contextlib
import io
import os
import select
import sys
from collections.abc import Callable, Iterator


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
def standard_streams() -> Iterator[Callable[[], OSError | None]]:
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
