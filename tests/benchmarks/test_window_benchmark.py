"""The benchmark of rows with a window."""

import json

import pytest
from conftest import assert_refused, run_program

from benchmarks import windows


def test_a_window_is_timed_beside_every_pair(tmp_path):
    file = tmp_path / "windows.json"
    words = ("--places", "8", "--rounds", "2", "--json", file)
    result = run_program("benchmarks.windows", *words)
    assert result.returncode == 0, result.stderr
    results = json.loads(file.read_text())
    [entry] = results["measurements"]
    assert results["device"] and (entry["places"], entry["rows"]) == (8, windows.TOKENS // 8)
    assert set(entry["milliseconds"]) == {windows.WINDOW, windows.FULL}
    assert all(times["median"] > 0 for times in entry["milliseconds"].values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rounds 1", "--rounds 1"),
        ("--places 0", "--places 0"),
        ("loop12", "model.window"),
        ("--json no/such/file.json", "--json no/such/file.json"),
    ],
)
def test_bad_command_lines_are_refused(words, said):
    assert_refused(run_program("benchmarks.windows", *words.split()), said)
