"""Streams that are closed, full, unread or of another encoding stop no work."""

import pytest
from conftest import HOSTILE, run_lines

OUTPUT = f"""
import os, sys
from pathlib import Path
from pallas_kernels.programs import Failure, console, run_program

def main():
    Path(os.environ["KEPT"]).write_text("")
    for i in range(3000):
        console.print(f"line {{i}} " + {ascii(HOSTILE)})
    print("\\udc80 plainly")
    print("to standard error", {ascii(HOSTILE)}, file=sys.stderr)
    Path(os.environ["KEPT"]).write_text("all")
    if "FAILS" in os.environ:
        raise Failure("as asked")

run_program(main)
"""


@pytest.mark.parametrize(
    ("shell", "status", "said"),
    [
        ("", 0, b"to standard error"),
        (">&-", 0, b"to standard error"),
        ("2>&-", 0, b""),
        (">&- 2>&-", 0, b""),
        ("<&- >&- 2>&-", 0, b""),
        (">/dev/full", 1, b"error: cannot write the output: No space left on device"),
        ("2>/dev/full", 0, b""),
        ("| head -1; exit ${PIPESTATUS[0]}", 141, b"to standard error"),
    ],
)
def test_output_that_cannot_be_written_stops_no_work(shell, status, said, tmp_path):
    kept = tmp_path / "kept"
    result = run_lines(OUTPUT, shell, KEPT=str(kept))
    assert result.returncode == status, result.stderr
    assert said in result.stderr and b"Traceback" not in result.stderr
    assert b"Exception ignored" not in result.stderr and b"Broken" not in result.stderr
    assert kept.read_text() == "all"


def test_a_failure_has_its_own_status_where_nobody_reads(tmp_path):
    ends = "| head -1; exit ${PIPESTATUS[0]}"
    result = run_lines(OUTPUT, ends, KEPT=str(tmp_path / "kept"), FAILS="1")
    assert result.returncode == 1 and b"error: as asked" in result.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict", "utf-8:strict"])
def test_what_an_encoding_lacks_is_escaped(encoding, tmp_path):
    surroundings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = run_lines(
        OUTPUT, "", KEPT=str(tmp_path / "kept"), PYTHONIOENCODING=encoding, **surroundings
    )
    assert result.returncode == 0, result.stderr
    name = encoding.partition(":")[0]
    escaped = HOSTILE.encode(name, "backslashreplace")
    assert result.stdout.count(escaped) == 3000 and b"\\udc80 plainly" in result.stdout
    assert escaped in result.stderr
