"""Every command of the README, read from it: each is in `EXPECTED`, and each does what that says.

`python -m pytest -n 0 -m readme` runs them all as written, in a fresh clone with an environment of
its own, in the README's order; later ones use what earlier ones leave. What takes hours is really
started, must show life, and is stopped as a user would stop it.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

from spak_jax.training import checkpoint, run_folder

README = ROOT / "README.md"
# What must show life is waited for this long, on a machine that has other work.
PATIENCE = 1200
# And this long for its end, once asked.
GRACE = 600
SHIPPED = ("benchmarks", "configs", "pallas_kernels", "released", "reliability", "spak_jax")
SHIPPED += ("tests",)


class Ends(NamedTuple):
    """Ends by itself, having said this (a pattern), and leaves these files.

    given: files that it reads and that a user has: where they are in the clone, by name.
    """

    says: str = ""
    leaves: tuple[str, ...] = ()
    status: int = 0
    given: dict[str, str] = {}


class Lives(NamedTuple):
    """Says this (a pattern) and goes on for long: it is stopped by SIGTERM.

    run: the run folder that then holds a checkpoint; None where there is nothing to keep.
    """

    says: str
    run: str | None = None


class Needs(NamedTuple):
    """Cannot run here for want of this; not even tried."""

    what: str


NO_GPU = Ends("needs a GPU", status=2)
# Without a GPU they take their time, and say so.
TIMES = Lives("timing: ")
FEW_DEVICES = Ends("parallel", status=2)
STEPS = r"[\d,]+ of [\d,]+ steps"
SCORES = r"scoring: [\d,]+ of [\d,]+ problems"
WRITES = r"wrote \S+"

# By command, in the README's order; spaces and comments do not count.
EXPECTED: dict[str, Ends | Lives | Needs] = {
    # Installing, and the two commands.
    "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e . &&"
    " .venv/bin/python -m spak_jax.train && .venv/bin/python -m spak_jax.figures"
    " runs/quickstart/results.json --out runs/quickstart/figures": Ends(
        "3,000 of 3,000 steps", ("runs/quickstart/results.json", "runs/quickstart/figures/table.md")
    ),
    "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[test]' &&"
    " .venv/bin/python -m pytest": Lives(r"(?m)^\.\.\.|\d+ workers"),
    ".venv/bin/python -m pytest -n 0 -m readme": Needs("more than itself"),
    "pip install torch==2.13.0": Ends("torch"),
    "JAX_PLATFORMS=cuda .venv/bin/python -m pytest -n 8 -m gpu": Needs("a GPU"),
    "pip install -c constraints.txt -e '.[cuda]'": Needs("gigabytes for a GPU"),
    "pip install -c constraints.txt -e '.[aot]'": Ends("jax-cuda13-plugin"),
    # Train, score, ask, draw.
    "python -m spak_jax.train loop12": Lives(STEPS, "runs/loop12"),
    "python -m spak_jax.train loop12 train.steps=20 --run runs/trial": Ends(
        "20 of 20 steps", ("runs/trial/results.json",)
    ),
    "python -m spak_jax.train loop12 --fresh": Lives(STEPS, "runs/loop12"),
    "python -m spak_jax.train configs/loop12.toml train.seeds=5 --run runs/five": Lives(
        STEPS, "runs/five/seed0"
    ),
    "python -m spak_jax.evaluate runs/loop12 --examples 10000 --json loop12.json": Lives(SCORES),
    "python -m spak_jax.evaluate runs/five --json five.json": Lives(SCORES),
    "python -m spak_jax.evaluate runs/loop12 --loops 24 --json loop12-at-24.json": Lives(SCORES),
    "python -m spak_jax.evaluate runs/loop12 --halt": Lives(SCORES),
    "python -m spak_jax.evaluate runs/loop12 --lengths 1-12,16,24 --decode": Lives(SCORES),
    "python -m spak_jax.evaluate runs/quickstart --lengths 100,1000 --kinds": Ends("100.0%"),
    # In one pass.
    "python -m spak_jax.train parity": Lives(STEPS, "runs/parity"),
    "python -m spak_jax.evaluate runs/parity --lengths 32,64 --examples 100 --loops 2x": Ends(
        "2x loops"
    ),
    "python -m spak_jax.grid runs/parity --lengths 8,16,32,64 --loops 8,16,32,64,128"
    " --examples 200": Ends(WRITES, ("runs/parity/grid/reach.png",)),
    "python -m spak_jax.solve released/parity 110100101101001011010010 --loops 2x+16": Ends(
        "right"
    ),
    'python -m spak_jax.solve released/addition-one-pass "99999999999999999999+1"'
    " --loops 2x+16": Ends("1" + 20 * "0"),
    "python -m spak_jax.solve released/s4 bcadbefgxxwqrstuvbca --loops 2x+16": Ends("right"),
    "python -m spak_jax.solve released/s5 abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    " --loops 2x+16": Ends("right"),
    "python -m spak_jax.evaluate released/addition-one-pass --loops 2x+16 --halt agreement"
    " --lengths 16 --examples 50": Ends("halting by agreement"),
    "python -m spak_jax.halting released/addition-one-pass --loops 2x+16 --rule agreement"
    " --kind chains --lengths 6,16,32,64,100 --examples 60": Lives("halting: "),
    "python -m spak_jax.reproduce --study depth": Lives(STEPS),
    r"printf '123+456\n99+1=100\n' | python -m spak_jax.evaluate runs/loop12 --problems -": Ends(
        "whole answers right"
    ),
    "python -m spak_jax.reproduce --seeds 5 --width 256": Lives(STEPS),
    "python -m spak_jax.reproduce --study frontier": Lives(STEPS),
    'python -m spak_jax.solve runs/quickstart "123+456" "9876+5432"': Ends("579.*\n.*15308"),
    'python -m spak_jax.trace runs/quickstart "99999999999999+1"': Ends(WRITES),
    "python -m benchmarks.race": Lives(STEPS),
    # From Python.
    "python examples/caesar.py train quickstart data.task=caesar name=caesar": Ends(
        "3,000 of 3,000 steps", ("runs/caesar/results.json",)
    ),
    "python examples/caesar.py solve runs/caesar abcdefghabcdefgh": Ends("defghabcdefghabc"),
    "python -m spak_jax.figures loop12.json loop12-at-24.json": Ends(
        WRITES,
        given={
            "loop12.json": "figures/reproduced-256/results/loop12-seed0.json",
            "loop12-at-24.json": "figures/reproduced-256/results/loop12-seed0-loops24.json",
        },
    ),
    "python -m spak_jax.convert ckpt.pt runs/imported": Ends("now in runs/imported"),
    # Past the frontier.
    "python -m spak_jax.reproduce --study pointer": Lives(STEPS),
    'python -m spak_jax.solve released/pointer "99999999999999999999+1"': Ends("1" + 20 * "0"),
    "python -m spak_jax.evaluate released/pointer --lengths 2000,5000,10000"
    " --examples 10000": Lives(SCORES),
    "python -m spak_jax.release RUN DIR": Ends(),
    "python -m spak_jax.trace released/frontier 999999999999999999999999+1": Ends(WRITES),
    "python -m spak_jax.evaluate runs/frontier/frontier/seed1 --loops 24"
    " --lengths 1-12,16,24,32,48,64,80,100 --examples 500": Needs("a training of hours"),
    "python -m benchmarks.race configs/pointer.toml [--lengths 12]": Lives(STEPS),
    # How fast it trains, thinks and writes.
    "python -m benchmarks.models CONFIG": TIMES,
    "python -m benchmarks.models CONFIG [train.seeds=5]": TIMES,
    "python -m benchmarks.models configs/loop12.toml --target rtx5070": Ends("which is not here"),
    "python -m benchmarks.models configs/loop12.toml --inference --json inference.json": TIMES,
    "python -m benchmarks.models configs/loop12.toml --inference --target rtx5070": Ends(
        "not here"
    ),
    "python -m pallas_kernels.tune --kernel looped_block": NO_GPU,
    "python -m pallas_kernels.compile --kernel looped_block --json looped_compile.json": Ends(
        "ok", ("looped_compile.json",)
    ),
    "python -m spak_jax.halting released/frontier --loops 12": Ends(WRITES),
    "python -m benchmarks.models configs/loop12.toml --generation --json generation.json": TIMES,
    # Several devices and machines.
    "python -m spak_jax.train configs/loop12-w768.toml parallel.data=8"
    " train.batch=1024": FEW_DEVICES,
    "python -m spak_jax.train configs/gpt12-w768.toml parallel.data=8"
    " parallel.shard_weights=true": FEW_DEVICES,
    "python -m spak_jax.train configs/loop12.toml train.seeds=8 parallel.seeds=8"
    " --run runs/eight": FEW_DEVICES,
    "python -m benchmarks.scaling configs/gpt12-w768.toml configs/loop12-w768.toml"
    " --json scaling.json": Ends("scaling needs several", status=2),
    "srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 python -m spak_jax.train"
    " configs/loop12-w768.toml parallel.data=16 train.batch=2048"
    " --run /shared/wide --distributed": Needs("Slurm"),
    'for i in 0 1; do ssh "machine$i" "cd /shared/spak-jax &&'
    " JAX_COORDINATOR_ADDRESS=machine0:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=$i"
    " .venv/bin/python -m spak_jax.train configs/loop12-w768.toml parallel.data=16"
    ' train.batch=2048 --run /shared/wide --distributed" & done; wait': Needs("two machines"),
    # Faults.
    "python -m reliability.faults killed": Lives(r"killed \.\.\."),
    "python -m reliability.faults --json faults.json": Lives(r"killed \.\.\."),
    "python -m reliability.fuzz --count 11500 --json fuzz.json": Lives("specifications: "),
    "python -m reliability.surroundings --json surroundings.json": Lives(r"paths \.\.\."),
    "python -m reliability.soak configs/quickstart.toml train.batch=32 train.steps=1000000000"
    " train.checkpoint_every=40 evaluation.examples=50 --json soak.json": Lives(STEPS),
    "python reliability/orbax_growth.py": Lives("by_numpy"),
    # Kernels.
    "python -m benchmarks.kernels --json bench.json": NO_GPU,
    "python -m benchmarks.windows --json windows.json": TIMES,
    "python -m pallas_kernels.tune": NO_GPU,
    "python -m pallas_kernels.tune --write": NO_GPU,
    "python -m pallas_kernels.tune --target rtx5070,b200": Lives("rtx5070"),
    "python -m pallas_kernels.compile --target rtx5070,b200,h100 --json compile.json": Lives(
        "rtx5070"
    ),
    "python -m benchmarks.report figures/results/attention_h100.json": Ends(r"\|"),
    "python -m benchmarks.report figures/results/kernels_compile.json --shape 128x64x4x64"
    " --shape 4x4096x16x64 --shape 8192x256": Ends(r"\|"),
    "python -m benchmarks.models configs/loop12.toml --attention pallas --attention xla": TIMES,
    # Specifications.
    "python -m spak_jax.check configs/loop12.toml --target rtx5070,h100": Ends("holds"),
    "python -m spak_jax.check configs/quickstart.toml --results runs/quickstart/results.json": Ends(
        "reach"
    ),
    "python -m spak_jax.tune configs/loop12.toml --target rtx5070": Lives("rtx5070"),
    "python -m spak_jax.brief configs/loop12.toml --target rtx5070 > brief.md": Ends(
        leaves=("brief.md",)
    ),
}
# Where the page leaves something for a user to fill in.
FILLED = {
    "RUN DIR": "runs/quickstart given-away",
    "[--lengths 12]": "--lengths 12",
    "CONFIG [train.seeds=5]": "configs/quickstart.toml train.seeds=5",
    "CONFIG": "configs/quickstart.toml",
}


def commands(text: str) -> dict[str, str]:
    """The commands of a page in its order, as written: of its `sh` blocks, and within its lines.

    By what they are without comments and layout.
    """
    found: list[str] = []
    parts = re.split(r"(?ms)^```(\w*)\n(.*?)^```$", text)
    for prose, language, block in zip(
        parts[::3], [*parts[1::3], ""], [*parts[2::3], ""], strict=True
    ):
        for code in re.findall(r"`([^`]+)`", prose):
            if re.search(r"\bpython (-m )?\w|^pip install", code):
                found.append(" ".join(code.split()))
        if language == "sh":
            found += _of_block(block)
    return {_plain(written): written for written in found}


def _of_block(block: str) -> Iterator[str]:
    whole = ""
    for line in block.splitlines():
        whole += line + "\n"
        # The shell itself says whether it waits for more.
        waits = subprocess.run(["bash", "-n", "-c", whole], capture_output=True).returncode
        if not waits and not whole.endswith("\\\n"):
            if _plain(whole):
                yield whole
            whole = ""
    assert not whole, f"no end: {whole}"


def _plain(command: str) -> str:
    """Without comments and what only lays it out."""
    lines = [re.sub(r"(^|\s)#\s.*$", "", line).removesuffix("\\") for line in command.splitlines()]
    return " ".join(" ".join(lines).split())


def test_commands_are_read_from_blocks_and_lines():
    page = """Run `python -m a.b X
[y]` or `pip install -e .`, not `python`.
```sh
one &&
  two 'it  is'   # why
three \\
  four

for i in 1; do
  five
done
```
```toml
six = 1
```
"""
    assert list(commands(page)) == [
        "python -m a.b X [y]",
        "pip install -e .",
        "one && two 'it is'",
        "three four",
        "for i in 1; do five done",
    ]


def test_every_command_of_the_readme_has_an_expectation():
    found = commands(README.read_text(encoding="utf-8"))
    unknown = [each for each in found if each not in EXPECTED]
    assert not unknown, f"a new command of the README has no expectation: {unknown}"
    gone = [each for each in EXPECTED if each not in found]
    assert not gone, f"no longer in the README: {gone}"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A fresh clone of what is committed here."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.fail("commands follow each other: add -n 0")
    folder = tmp_path_factory.mktemp("readme") / "spak-jax"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


def in_order() -> list[str]:
    """As the page has them, but what it says to install, wherever, at first."""
    first = lambda command: "-m venv" not in command and "pip install" not in command  # noqa: E731
    return sorted(EXPECTED, key=first)


@pytest.mark.readme
@pytest.mark.parametrize("command", in_order())
def test_a_command_does_what_is_expected(command, clone):
    expected = EXPECTED[command]
    if isinstance(expected, Needs):
        pytest.skip(f"needs {expected.what}")
    written = commands((clone / "README.md").read_text(encoding="utf-8"))[command]
    for blank, filled in FILLED.items():
        written = written.replace(blank, filled)
    if isinstance(expected, Ends):
        for name, source in expected.given.items():
            shutil.copy(clone / source, clone / name)
        if "ckpt.pt" in command:
            save = "import torch; from reliability import fuzz"
            save += "; torch.save(fuzz.original(), 'ckpt.pt')"
            subprocess.run([clone / ".venv/bin/python", "-c", save], cwd=clone, check=True)
        status, said = ended(written, clone)
        assert status == expected.status, said
        assert re.search(expected.says, said), said
        missing = [name for name in expected.leaves if not (clone / name).stat().st_size]
        assert not missing
    else:
        status, said = stopped(written, clone, expected.says)
        if expected.run is None:
            assert status in (0, 128 + signal.SIGTERM, -signal.SIGTERM), said
        else:
            assert status == 128 + signal.SIGTERM and "the same command" in said, said
            assert run_folder.steps_in(clone / expected.run)
            checkpoint.restore(clone / expected.run, optimizer=True)
    assert "Traceback" not in said, said
    assert not differing(clone, "--untracked-files=no"), "what is committed was changed"
    assert not differing(clone, "--", *SHIPPED), "something was left among what ships"


def differing(clone: Path, *words: str) -> str:
    """What Git finds in a clone that is not as committed."""
    command = ["git", "status", "--porcelain", *words]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True).stdout


def ended(command: str, clone: Path) -> tuple[int, str]:
    """The status of a command that ends by itself, and all that it said."""
    with started(command, clone) as process:
        try:
            said, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            pytest.fail(f"did not end within {PATIENCE} s: {said}")
    return process.returncode, said


def stopped(command: str, clone: Path, says: str) -> tuple[int, str]:
    """The same of a command that is asked to stop once it has said something."""
    said: list[str] = []
    with started(command, clone) as process:
        alive = threading.Event()

        def read() -> None:
            while piece := os.read(process.stdout.fileno(), 4096):
                said.append(piece.decode("utf-8", "replace"))
                if re.search(says, "".join(said)):
                    alive.set()
            alive.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        showed = alive.wait(PATIENCE) and re.search(says, "".join(said))
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"did not end within {GRACE} s of SIGTERM: {''.join(said)}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        reader.join(GRACE)
    assert showed, f"no sign of life: {''.join(said)}"
    return process.returncode, "".join(said)


@contextlib.contextmanager
def started(command: str, clone: Path) -> Iterator[subprocess.Popen]:
    """A command as a user of the clone gives it, in a group of its own."""
    ours = re.compile("JAX|XLA|PYTEST|PYTHON|VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not ours.match(name)}
    # The page has the environment active from its first section on.
    if "-m venv" not in command:
        environment["PATH"] = f"{clone / '.venv/bin'}:{environment['PATH']}"
    with subprocess.Popen(
        ["bash", "-c", command],
        cwd=clone,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        yield process
