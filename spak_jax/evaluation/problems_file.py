"""People's own problems, a line each."""

import sys

from spak_jax.command_line import InputError
from spak_jax.config_sections import MAX_LENGTH
from spak_jax.tasks import Task


def read_problems(path: str, task: Task) -> list[tuple[str, ...]]:
    """The problems in a file, one a line, as `Task.parse` takes them; `-` is standard input.

    Raises:
      InputError: naming the line that is no problem, and why.
    """
    name = "standard input" if path == "-" else path
    longest = task.text_length(MAX_LENGTH)
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as file:
            # One byte more than fits, so that a line that is too long shows itself.
            lines = iter(lambda: file.readline(longest + 2), b"")
            problems = [
                _read_line(f"{name}, line {i}", line, task) for i, line in enumerate(lines, start=1)
            ]
    except OSError as error:
        raise InputError(f"cannot read the problems file {name}: {error.strerror}") from None
    if not problems:
        raise InputError(f"{name} holds no problem: one such as {_example(task)} a line")
    return problems


def _read_line(where: str, line: bytes, task: Task) -> tuple[str, ...]:
    longest = task.text_length(MAX_LENGTH)
    if not line.endswith(b"\n"):
        if len(line) > longest:
            raise InputError(
                f"{where}: longer than any problem of inputs of {MAX_LENGTH} {task.unit}"
                f" ({longest} characters)"
            )
        raise InputError(f"{where}: no newline at its end; the file may have been cut short")
    text = line[:-1].decode("utf-8", "backslashreplace")
    if text.endswith("\r"):
        raise InputError(f"{where}: ends as on Windows; save the file with Unix line ends")
    if not text:
        raise InputError(f"{where}: empty; one problem such as {_example(task)} a line")
    try:
        return task.parse(text, MAX_LENGTH)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _example(task: Task) -> str:
    return task.format(task.example)
