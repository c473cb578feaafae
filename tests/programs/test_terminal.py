"""Tables, texts and bars on terminals: no word is lost, none is markup, none is cut."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from unittest import mock

import pytest
from conftest import HOSTILE, ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from spak_jax.command_line import Table, console


def shown(renderable, columns: int, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    columns = {"COLUMNS": str(columns)}
    with mock.patch.dict(os.environ, columns), contextlib.redirect_stdout(stream):
        console.print(renderable)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


cells = st.text("ab [/]:{}\\加é", max_size=12) | st.sampled_from([HOSTILE, "[red]", ":x:", "[/]"])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(cells, min_size=3, max_size=3), min_size=1, max_size=3),
    st.integers(1, 120),
    st.sampled_from(["utf-8", "ascii", "latin-1"]),
)
@example([["", "", HOSTILE], ["", ":::::::::", ""]], 48, "utf-8")
def test_a_table_shows_every_word_at_any_width(rows, columns, encoding):
    table = Table("one", "two", "three", title="a [title]")
    for row in rows:
        table.add_row(*row)
    text = shown(table, columns, encoding)
    said = [word for row in rows for cell in row for word in cell.split()]
    said = [word.encode(encoding, "backslashreplace").decode(encoding) for word in said]
    assert all(word in text for word in said)
    if encoding == "utf-8":
        longest = 2 + max(map(cell_len, [*said, "three:", "[title]"]))
        assert all(cell_len(line) <= max(columns, longest) for line in text.splitlines())


@pytest.mark.parametrize("text", [HOSTILE, "[/]", "[link=x]", ":warning:", "\\[", "{x}", "'a' 1"])
def test_no_text_is_markup(text):
    assert shown(text, 200).rstrip("\n") == text
    table = Table(text, title=text)
    table.add_row(text)
    assert shown(table, 200).count(text) == 3


def in_terminal(columns: int, *command: str, **environment: str) -> str:
    """What a command writes to a terminal of some columns."""
    terminal, own = pty.openpty()
    fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"TERM": "xterm"}
    with subprocess.Popen(
        command, env=variables | environment, stdin=own, stdout=own, stderr=own
    ) as process:
        os.close(own)
        written = b""
        # Reading fails once the process has closed the terminal.
        with contextlib.suppress(OSError):
            while part := os.read(terminal, 65536):
                written += part
    os.close(terminal)
    assert process.returncode == 0, written
    return written.decode()


WORK = f"""
import time
from pallas_kernels.programs import Table, console, progress, run_program

def main():
    console.print({ascii(HOSTILE)})
    table = Table(*(f"heading {{i}}" for i in range(6)))
    table.add_row(*(f"cell {{i}}" for i in range(6)))
    console.print(table)
    with progress("work", 100, unit="steps") as bar:
        for i in range(3):
            time.sleep(0.3)
            bar.advance(30, "loss 0.1234, learning rate 1.0e-03")

run_program(main)
"""


@pytest.mark.parametrize("columns", [80, 40])
def test_bars_and_tables_fit_a_terminal(columns):
    written = in_terminal(columns, sys.executable, "-c", WORK, PYTHONPATH=str(ROOT))
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", written)
    lines = re.split(r"[\r\n]+", plain)
    assert all(cell_len(line) <= columns for line in lines), lines
    assert HOSTILE in plain and "…" not in plain
    assert all(f"cell {i}" in plain and f"heading {i}" in plain for i in range(6))
    bars = [line for line in lines if line.startswith("work ")]
    assert any("90 of 100 steps" in line for line in bars)
    assert all("━" in line or "╸" in line for line in bars), bars
    if columns == 80:
        assert any("left" in line and "loss 0.1234" in line for line in bars), bars
