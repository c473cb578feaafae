"""What several test files share: tiny configurations, and programs run as a user runs them."""

import contextlib
import fcntl
import io
import os
import runpy
import subprocess
import sys
import tempfile
import tomllib
import traceback
import warnings
import zlib
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import hypothesis
import pytest

# pytest-xdist tells its workers the width of the terminal; tables are as wide as they want here.
os.environ.pop("COLUMNS", None)
# Tests compare float32 numbers; a GPU that happens to be there would change them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test's time is compiling what another test, worker or run has compiled before.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "spak-jax-test-cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Models and interpreted kernels as small as here need no fast code: compiling it took 40% longer. A
# GPU gets what users get.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # A program here is no work for several threads: splitting it took a tenth longer.
    flags = ["--xla_cpu_parallel_codegen_split_count=1"]
    # Its older emitters of code compile twice as fast; jaxlib 0.11 has no others than the new ones.
    if version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *flags)).strip()
# On a GPU the workers share its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402

from spak_jax.config import Config, parse_config  # noqa: E402

ROOT = Path(__file__).parents[1]
# Text that a terminal, an encoding or a markup takes for something else.
HOSTILE = "[bold]Größe :smile: 加[/x] ☃"

# Compiling takes as long as it takes. A commit passes or fails the same way every time: what is
# drawn follows from a test's name. `--hypothesis-profile=searching` draws anew in each run.
hypothesis.settings.register_profile("searching", deadline=None, print_blob=True)
hypothesis.settings.register_profile("repeating", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeating")


def pytest_runtest_setup(item):
    """Each case of a parametrized test draws its own; by itself Hypothesis gives all the same."""
    if hypothesis.is_hypothesis_test(item.obj) and hypothesis.settings().derandomize:
        hypothesis.seed(zlib.crc32(item.nodeid.encode()))(item.obj)


@pytest.fixture(autouse=True, scope="module")
def programs_are_let_go():
    """Each compiled program holds memory maps, of which a process may have some 65,000: beyond them
    the compiler crashes. Up to then modules share what they compile."""
    yield
    with open("/proc/self/maps") as maps:
        used = sum(1 for _ in maps)
    if used > 20_000:
        jax.clear_caches()


TINY = """
name = "tiny"
[system]
name = "Tiny loop"
[model]
kind = "loop"
width = 16
heads = 2
loops = 3
[data]
layout = "single"
row_length = 24
examples = 900
[train]
steps = 12
batch = 8
warmup_steps = 2
decay_steps = 12
steps_per_call = 5
checkpoint_every = 4
[evaluation]
lengths = [1, 2, 7]
examples = 20
"""


@contextlib.contextmanager
def optimizing():
    """What is compiled here, or by a program that is started here, is compiled as users have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def optimized():
    with optimizing():
        yield


@pytest.fixture(scope="module")
def exact_products():
    """Products of float32 as they are meant: XLA's on a GPU are in tf32 by default."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def tiny_toml(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def tiny() -> Config:
    return tiny_config()


def tiny_config(**sections) -> Config:
    """The tiny configuration with some keys of some sections changed."""
    values = tomllib.loads(TINY)
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return parse_config(values | {"system": values["system"]["name"]}, "test")


def with_slow(cases, *kept):
    """Cases for `parametrize`: those `kept` by default, the others where `-m slow` asks."""
    return [case if case in kept else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def in_turn(rows, columns):
    """Pairs for `parametrize`: by default each row with one column, which take turns; the others
    where `-m slow` asks."""
    return [
        pytest.param(row, column, marks=[] if i % len(columns) == j else [pytest.mark.slow])
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]


def run_program(*words: str, env=None, input: str = "") -> subprocess.CompletedProcess:
    """`python -m WORDS...`, or `python FILE.py ...`, from the root, its output as text.

    In this process, which has imported what takes seconds; with another environment in its own.
    """
    words = list(map(str, words))
    if env:
        command = [sys.executable, *([] if words[0].endswith(".py") else ["-m"]), *words]
        return subprocess.run(
            command, cwd=ROOT, env=env, input=input, capture_output=True, text=True
        )
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with (
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", words),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(input.encode()))),
        warnings.catch_warnings(),
    ):
        # That the module runs although tests have imported it.
        warnings.filterwarnings("ignore", message=".*found in sys.modules after import")
        try:
            if words[0].endswith(".py"):
                runpy.run_path(words[0], run_name="__main__")
            else:
                runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code or 0
        except Exception:
            traceback.print_exc()
            status = 1
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def run_lines(script: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess:
    """A script in a process of its own, its standard streams as a shell sets them."""
    command = ["bash", "-c", f'"$0" -c "$1" {shell}', sys.executable, script]
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=variables, capture_output=True, timeout=120)


def assert_refused(result: subprocess.CompletedProcess, *said: str) -> None:
    """One message with these words, exit status 2, no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    for word in said:
        assert word in result.stderr


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, testrun_uid):
    """A folder by its name, filled by a function of its path: once, also by several workers."""
    shared = tmp_path_factory.getbasetemp().parent / f"shared-{testrun_uid}"
    shared.mkdir(exist_ok=True)

    def made(name: str, fill) -> Path:
        folder = shared / name
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                (unfinished := shared / f"{name}.unfinished").mkdir()
                fill(unfinished)
                unfinished.rename(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def half_trained(made_once) -> Path:
    """The run folder of a small LoopLM that adds some single digits right and others not."""
    from spak_jax.training.loop import train

    config = tiny_config(
        model={"width": 32, "dropout": 0.0},
        data={"max_length": 1, "bridge_fraction": 0.0, "row_length": 8, "examples": 0},
        train={
            "steps": 220,
            "batch": 64,
            "learning_rate": 1e-2,
            "decay_steps": 220,
            "steps_per_call": 110,
            "checkpoint_every": 110,
        },
    )
    return made_once("half-trained", lambda folder: train(config, folder / "run")) / "run"
