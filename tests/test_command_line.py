"""What all programs share: help, one way to be run, output on any terminal or none, names."""

import functools
import json
import os
import re
import subprocess
import sys
from unittest import mock

import pytest
from conftest import HOSTILE, ROOT, assert_refused, run_program

from pallas_kernels.programs import progress_bar
from spak_jax.command_line import write_file

INSTALLED = ("spak_jax", "pallas_kernels")
OF_A_CHECKOUT = ("benchmarks", "reliability")
# It needs nothing of ours, nor what programs of ours share.
ALONE = "reliability.orbax_growth"
# It runs one of the others.
DISPATCHER = "spak_jax.__main__"
PROGRAMS = sorted(
    {
        f"{path.parent.name}.{path.stem}"
        for package in (*INSTALLED, *OF_A_CHECKOUT)
        for path in (ROOT / package).glob("*.py")
        if 'if __name__ == "__main__"' in path.read_text()
    }
    - {ALONE, DISPATCHER}
)


def test_all_programs_are_found():
    expected = {"spak_jax.train", "pallas_kernels.tune", "benchmarks.race", "reliability.faults"}
    assert expected <= set(PROGRAMS)


def test_what_is_installed_needs_nothing_of_a_checkout():
    of_a_checkout = re.compile(rf"^\s*(from|import) ({'|'.join(OF_A_CHECKOUT)})\b", re.M)
    files = [path for package in INSTALLED for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 30
    assert not [path for path in files if of_a_checkout.search(path.read_text())]


@pytest.mark.parametrize("columns", [20, 80])
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_says_how_it_is_used(program, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    result = run_program(program, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage:") and program in result.stdout
    assert "None" not in result.stdout and "%" not in result.stdout
    if columns == 80:
        assert max(map(len, result.stdout.splitlines())) <= columns


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_is_run_in_the_one_way(program):
    """Which is what keeps it from tracebacks on bad terminals."""
    text = (ROOT / f"{program.replace('.', '/')}.py").read_text()
    assert text.rstrip().endswith("    run_program(main)")
    assert not re.search("^(import|from) rich", text, re.M)


def test_one_command_runs_the_programs():
    usage = run_program("spak_jax", "--help")
    assert (usage.returncode, usage.stderr) == (0, "")
    commands = [program.partition(".")[2] for program in PROGRAMS if program.startswith("spak_jax")]
    assert sorted(commands) == sorted(line.split()[0] for line in usage.stdout.splitlines()[2:-2])
    for command in ("figures", "solve"):
        shown = run_program("spak_jax", command, "--help")
        assert shown.stdout == run_program(f"spak_jax.{command}", "--help").stdout
    assert_refused(run_program("spak_jax", "trian"), "spak trian: must be of", "train")
    assert_refused(run_program("spak_jax"), "usage: spak COMMAND")
    assert_refused(run_program("spak_jax", "solve"), "RUN")


def words(text: str) -> set[str]:
    return set(re.sub("[^!-9;-~]", " ", text).split())


@pytest.fixture(scope="module")
def shown(half_trained, tmp_path_factory):
    """What commands print in so many columns."""
    problems = tmp_path_factory.mktemp("shown") / "problems"
    problems.write_text("1+2\n99+1\n")
    commands = (
        ["spak_jax.evaluate", half_trained, "--examples", "9", "--lengths", "1,2"],
        ["spak_jax.evaluate", half_trained, "--problems", problems],
        ["spak_jax.solve", half_trained, "1+2", "123456789123456789123456789+1"],
        ["spak_jax.check", "quickstart"],
    )

    @functools.cache
    def in_columns(columns):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(progress_bar, "FIRST_LINE", 1e6)
            patch.setenv("COLUMNS", str(columns))
            results = [run_program(*command) for command in commands]
        assert [result.returncode for result in results] == [0] * len(commands)
        return [result.stdout for result in results]

    return in_columns


@pytest.mark.parametrize("columns", [80, 40, 20])
def test_narrow_output_loses_no_word(shown, columns):
    for wide, narrow in zip(shown(500), shown(columns), strict=True):
        assert words(wide) <= words(narrow)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_lives_without_standard_output(program):
    with mock.patch("contextlib.redirect_stdout", lambda out: mock.patch("sys.stdout", None)):
        result = run_program(program, "--help")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.slow
def test_a_training_whose_reader_has_gone_leaves_its_results(tiny_toml, tmp_path):
    run = tmp_path / "run"
    name = f"system.name={HOSTILE}"
    command = [sys.executable, "-m", "spak_jax.train", str(tiny_toml), name, "--run", str(run)]
    ends = '"$@" | head -1; exit ${PIPESTATUS[0]}'
    environment = os.environ | {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    result = subprocess.run(
        ["bash", "-c", ends, "bash", *command], cwd=ROOT, capture_output=True, env=environment
    )
    assert result.returncode == 141 and b"Traceback" not in result.stderr, result.stderr
    results = json.loads((run / "results.json").read_text())
    # What the shell gives is UTF-8 whatever the locale says.
    assert (results["step"], results["system"]) == (12, HOSTILE)


def test_a_file_may_have_the_longest_name_there_is(tmp_path):
    path = tmp_path / ("🙂" * 62 + ".json")
    for content in ("first", "second"):
        write_file(path, content)
        assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


def test_programs_take_names_and_refuse_unknown_ones():
    for program in (
        *("spak_jax.train", "spak_jax.check", "spak_jax.brief", "reliability.soak"),
        *("benchmarks.models", "benchmarks.race", "benchmarks.scaling"),
    ):
        assert_refused(run_program(program, "loop13"), "loop13", "did you mean loop")
    tune = run_program("spak_jax.tune", "loop13", "--target", "h100")
    assert_refused(tune, "did you mean loop")
    assert run_program("spak_jax.brief", "gpt12").stdout.startswith("# GPT-12L")
    assert_refused(run_program("spak_jax.train", "loop12", "gpt12"), "one configuration")
    assert_refused(run_program("benchmarks.models", "train.seeds=2"), "must be named")
