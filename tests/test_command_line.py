"""What all programs share: help, output on any terminal or none, progress, files by name."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT, assert_refused, run_program
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from pallas_kernels.programs import compilation_cache, progress_bar
from spak_jax.command_line import InputError, Table, console, progress, write_file
from spak_jax.config_files import named_file

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
HOSTILE = "[bold]Größe :smile: 加[/x] ☃"


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


@pytest.mark.parametrize("columns", [80, 40, 20])
def test_narrow_output_loses_no_word(half_trained, columns, monkeypatch, tmp_path):
    monkeypatch.setattr(progress_bar, "FIRST_LINE", 1e6)
    problems = tmp_path / "problems"
    problems.write_text("1+2\n99+1\n")
    for command in (
        ["spak_jax.evaluate", half_trained, "--examples", "9", "--lengths", "1,2"],
        ["spak_jax.evaluate", half_trained, "--problems", problems],
        ["spak_jax.solve", half_trained, "1+2", "123456789123456789123456789+1"],
        ["spak_jax.check", "quickstart"],
    ):
        monkeypatch.setenv("COLUMNS", "500")
        wide = run_program(*command)
        monkeypatch.setenv("COLUMNS", str(columns))
        narrow = run_program(*command)
        assert (wide.returncode, narrow.returncode) == (0, 0)
        assert words(wide.stdout) <= words(narrow.stdout), command


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


def run_lines(script: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess:
    """A script in a process of its own, its standard streams as a shell sets them."""
    command = ["bash", "-c", f'"$0" -c "$1" {shell}', sys.executable, script]
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=variables, capture_output=True, timeout=120)


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


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_lives_without_standard_output(program):
    with mock.patch("contextlib.redirect_stdout", lambda out: mock.patch("sys.stdout", None)):
        result = run_program(program, "--help")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


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


class Clock:
    """Time as a test wants it."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def lines_of(work, monkeypatch, *arguments, **more) -> list[str]:
    """What `progress` prints off a terminal while `work(bar, clock)` goes on."""
    clock, out = Clock(), io.StringIO()
    monkeypatch.setattr(progress_bar, "time", clock)
    with contextlib.redirect_stdout(out), progress(*arguments, **more) as bar:
        work(bar, clock)
    return out.getvalue().splitlines()


def test_progress_off_a_terminal_is_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(progress_bar, "FIRST_LINE", 0.05)
    monkeypatch.setattr(progress_bar, "BETWEEN_LINES", 0.05)

    def work(bar, clock):
        for _ in range(4):
            clock.now += 5.0
            bar.advance(10, "loss 0.5")
        for _ in range(200):
            if bar._printed:
                break
            programs_wait(0.02)

    import time as real

    programs_wait = real.sleep
    lines = lines_of(work, monkeypatch, "working", 100, unit="steps")
    expected = "working: 40 of 100 steps, about 30 s left, loss 0.5, 2.0 a second, after 20 s"
    assert expected in lines


def test_short_work_says_nothing_and_its_last_status_is_said(monkeypatch):
    assert lines_of(lambda bar, clock: bar.advance(), monkeypatch, "working", 1) == []
    ended = lines_of(lambda bar, clock: bar.advance(1, "loss 1"), monkeypatch, "working", 1)
    assert ended == ["working: 1 of 1, loss 1, after 0 s"]


@pytest.mark.parametrize(("seconds", "warned"), [(0.5, False), (100.0, True)])
def test_long_work_says_once_what_to_do_instead(seconds, warned, monkeypatch):
    def work(bar, clock):
        for _ in range(10):
            clock.now += seconds
            bar.advance()

    lines = lines_of(work, monkeypatch, "working", 1_000, instead="take a walk")
    assert sum("take a walk" in line for line in lines) == warned
    if warned:
        assert lines[0] == "working: about 27.7 hours to go; take a walk"


def test_work_within_work_is_not_shown(monkeypatch):
    def work(bar, clock):
        with progress("inner", 1) as inner:
            inner.advance(1, "unseen")

    assert lines_of(work, monkeypatch, "outer") == []


def test_a_file_may_have_the_longest_name_there_is(tmp_path):
    path = tmp_path / ("🙂" * 62 + ".json")
    for content in ("first", "second"):
        write_file(path, content)
        assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("given", ["é数/Zahlen é数🙂.toml", "é数=1.toml"])
def test_a_file_is_found_by_its_name_in_an_ascii_locale(given, tmp_path):
    (tmp_path / "é数").mkdir()
    (tmp_path / given).write_text("odd = 1")
    environment = {
        "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    # The file is read, and what it lacks is said.
    result = subprocess.run(
        [sys.executable, "-m", "spak_jax.train", given],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
    )
    assert result.returncode == 2 and b"is missing" in result.stderr, result.stderr


def test_a_file_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs"
    folder.mkdir()
    for name in ("loop12", "gpt12"):
        (folder / f"{name}.toml").write_text("")
    for word in ("loop12", "loop12.toml", Path("configs/loop12.toml")):
        assert named_file(word, Path("configs")) == Path("configs/loop12.toml")
    (tmp_path / "gpt12").mkdir()
    assert named_file("gpt12", Path("configs")) == Path("configs/gpt12.toml")
    (tmp_path / "loop12").write_text("")
    assert named_file("loop12", Path("configs")) == Path("loop12")


@pytest.mark.parametrize("word", ["loop13", "x" * 300, "", "configs", "no/loop12.toml", "a\0b"])
def test_an_unknown_name_lists_what_there_is(word):
    with pytest.raises(InputError, match="loop128e") as refused:
        named_file(word, ROOT / "configs")
    assert len(str(refused.value)) < 600
    if "loop1" in word:
        assert "did you mean loop" in str(refused.value)


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


# What has been compiled.

ADDS = """
import jax, jax.numpy as jnp, sys
from pallas_kernels.programs import run_program
def main():
    print(float(jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.ones((64, 64)))))
    print(jax.config.jax_compilation_cache_dir or None)
run_program(main)
"""


def compiled_in(caches: Path, **environment: str) -> list[str]:
    """What `ADDS` prints, with nothing said about caches but the user's folder."""
    own = {"XDG_CACHE_HOME": str(caches), "JAX_COMPILATION_CACHE_DIR": ""} | environment
    own["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    result = run_lines(ADDS, "", **own)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result.stdout.decode().splitlines()


def test_programs_keep_what_they_compile_in_the_users_folder(tmp_path):
    pytest.importorskip("filelock")
    first = compiled_in(tmp_path)
    folder = Path(first[1])
    assert folder.parent == tmp_path / "spak-jax" and folder.stat().st_mode & 0o077 == 0
    made = {path.name for path in folder.glob("*-cache")}
    assert made
    # A killed process leaves half a program, of which no time is written yet.
    victim = sorted(folder.glob("*-cache"))[0]
    victim.write_bytes(victim.read_bytes()[:9])
    victim.with_name(victim.name.replace("-cache", "-atime")).unlink()
    assert compiled_in(tmp_path) == first
    assert {path.name for path in folder.glob("*-cache")} == made
    assert victim.stat().st_size > 9


def test_programs_work_without_a_folder_to_keep_in(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert compiled_in(file)[1] == "None"
    assert compiled_in(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")[1] == "None"
    elsewhere = tmp_path / "elsewhere"
    assert compiled_in(tmp_path, JAX_COMPILATION_CACHE_DIR=str(elsewhere))[1] == str(elsewhere)
    assert not (tmp_path / "spak-jax").exists() and file.read_text() == ""


def test_a_library_keeps_nothing(tmp_path):
    script = "import jax, spak_jax.train; print(jax.config.jax_compilation_cache_dir)"
    own = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}
    assert run_lines(script, "", **own).stdout.decode().split() in (["None"], [])
    assert not list(tmp_path.iterdir())


def test_kinds_of_processors_have_folders_of_their_own(monkeypatch):
    here = compilation_cache.folder()
    assert here == compilation_cache.folder()
    monkeypatch.setattr(compilation_cache, "_processor", lambda: "another")
    assert compilation_cache.folder() != here
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", mock.Mock(side_effect=RuntimeError))
    assert compilation_cache.folder() is None
