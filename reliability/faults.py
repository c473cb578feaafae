"""Faults on purpose, and what became of each:
`python -m reliability.faults [FAULT ...] [--json FILE]`.

Trainings are killed, asked to stop, run beside each other, and left without disk, folder or memory;
checkpoints are damaged. Each fault is a function that tries it so many times and yields in a few
words what became of every try; where a promise of the README was not kept, it raises `Broken`. What
readers make of hostile input is `fuzz`. From the repository's root, on Linux.
"""

import contextlib
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reliability.campaigns import carry_out, table_of
from spak_jax.command_line import (
    Failure,
    InputError,
    console,
    progress,
    run_program,
)
from spak_jax.config import Config, read_config
from spak_jax.interop.torch_checkpoint import read_original
from spak_jax.training import checkpoint, loggers, run_folder, signals, stored_checkpoint
from spak_jax.training.loop import train
from spak_jax.training.named_arrays import digest

CONFIG = "configs/quickstart.toml"
EVERY = 20
# Small, with a checkpoint many times a second, and never at its end.
ENDLESS = ("train.batch=8", f"train.checkpoint_every={EVERY}", "train.steps=1000000000")
SHORT = ("train.batch=8", f"train.checkpoint_every={EVERY}", "train.steps=200")
# For what should take seconds, on a machine that has other work.
PATIENCE = 300
SEED = 0

# `sh -c ALONE_WITH_A_DISK sh FOLDER OPTIONS COPY PROGRAM...`: a file system in FOLDER that nobody
# else sees; what the program leaves in it is copied.
ALONE_WITH_A_DISK = """
disk=$1 options=$2 copy=$3; shift 3
mount -t tmpfs -o "$options" none "$disk" || exit 99
"$@"; status=$?
cp -a "$disk/." "$copy"; exit $status
"""
# `sh -c ALONE_READ_ONLY sh FOLDER PROGRAM...`
ALONE_READ_ONLY = """
mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit 99
shift; "$@"
"""
NO_NAMESPACE = 99

Moments = random.Random
Fault = Callable[[Path, int, Moments], Iterator[str]]


class Broken(Exception):
    """A promise was not kept; the message says which."""


class NotTried(Exception):
    """This machine lacks what a fault needs; the message says what."""


def killed(folder: Path, times: int, moments: Moments) -> Iterator[str]:
    """SIGKILL at random moments; the training that goes on ends with the bits of a quiet one."""
    run = folder / "killed"
    for _ in range(times):
        half_written = _half_written(run)
        with _training(run, *ENDLESS) as process:
            early = moments.random() < 0.2
            if early:
                time.sleep(moments.uniform(0, 5))
            else:
                _await_checkpoint(run, process)
                time.sleep(moments.uniform(0, 1))
            process.kill()
            process.wait()
        if _half_written(run) - half_written:
            yield "killed in the middle of a save"
        else:
            yield "killed while starting" if early else "killed between saves"
    _require_bits_of_a_quiet_run(run, folder / "quiet", ENDLESS)


def asked_to_stop(folder: Path, times: int, moments: Moments) -> Iterator[str]:
    """Each signal that is heeded, one and two of them."""
    run = folder / "asked"
    for i in range(times):
        number, twice = signals.HEEDED[i % 3], i // 3 % 2 == 1
        with _training(run, *ENDLESS) as process:
            _await_checkpoint(run, process)
            time.sleep(moments.uniform(0, 0.5))
            process.send_signal(number)
            if twice:
                time.sleep(moments.uniform(0, 0.02))
                process.send_signal(number)
            status, said = _end(process)
        _require(status == 128 + number, f"{number.name}: status {status}: {said}")
        newest = checkpoint.restore(run, optimizer=True).step
        if "the same command" in said:
            last = loggers.read(run)[-1].step
            _require(last == newest, f"{number.name}: step {last} is logged, {newest} kept")
            yield "ended with a checkpoint of the last step"
        else:
            _require(twice, f"{number.name}: {said}")
            yield "a second signal ended it at once, with an earlier checkpoint"
    _require_bits_of_a_quiet_run(run, folder / "quiet", ENDLESS)


def damaged(folder: Path, times: int, moments: Moments) -> Iterator[str]:
    """Each file of a checkpoint truncated, emptied, removed, and `times` times one byte flipped."""
    run = folder / "damaged"
    train(_config(SHORT), run, 2 * EVERY)
    good = checkpoint.restore(run, optimizer=True)
    whole = _digests(good)
    older, newest = (run / run_folder.CHECKPOINTS / str(n * EVERY) for n in (1, 2))
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for name, changed in _damages(content, times, moments):
            path.unlink()
            if changed is not None:
                path.write_bytes(changed)
            try:
                found = checkpoint.restore(run, optimizer=True)
                same = _digests(found) == whole and found.config == good.config
                _require(same, f"{path.relative_to(run)} {name}: something else was loaded")
                yield "restored to the same bits"
            except InputError as error:
                named = str(newest) in str(error) and f"go back to step {older.name}" in str(error)
                _require(named, f"{path.relative_to(run)} {name}: {error}")
                yield "refused, the checkpoint and the good one before it named"
            path.write_bytes(content)


def disk_full(folder: Path, times: int, moments: Moments) -> Iterator[str]:
    """A disk that is full sooner or later; what is on it goes on elsewhere."""
    config = _config(SHORT)
    train(config, folder / "quiet")
    size = sum(_blocks(p) for p in (folder / "quiet" / run_folder.CHECKPOINTS).rglob("*"))
    for i in range(times):
        disk, copy = folder / f"disk{i}", folder / f"copy{i}"
        disk.mkdir()
        copy.mkdir()
        # Two checkpoints are kept, and a third is there while it is written.
        options = f"size={4096 * int((0.1 + 1.6 * (i + moments.random()) / times) * size / 4096)}"
        status, said = _alone(
            ALONE_WITH_A_DISK, disk, options, copy, *_command(disk / "run", *SHORT)
        )
        if status == 0:
            outcome = "there was room enough"
        else:
            _require_message(status, said)
            outcome = "one message, and the training went on to the same bits with more room"
        train(config, copy / "run")
        _require_same(copy / "run", folder / "quiet")
        yield outcome


def read_only(folder: Path, times: int, moments: Moments) -> Iterator[str]:
    """A folder where nothing can be written, with a run in it and without."""
    run = folder / "begun"
    train(_config(SHORT), run, EVERY)
    (folder / "empty").mkdir()
    for i in range(times):
        where = (folder / "empty", run)[i % 2]
        before = _contents(where)
        status, said = _alone(ALONE_READ_ONLY, where, *_command(where, *SHORT))
        _require_message(status, said, "cannot write")
        _require(_contents(where) == before, "something changed")
        yield "refused, nothing changed"


def vanished(folder: Path, times: int, moments: Moments) -> Iterator[str]:
    """The run folder is moved away under a training."""
    for i in range(times):
        run, aside = folder / f"run{i}", folder / f"aside{i}"
        with _training(run, *ENDLESS) as process:
            _await_checkpoint(run, process)
            time.sleep(moments.uniform(0, 0.5))
            run.rename(aside)
            status, said = _end(process)
        _require_message(status, said, str(run))
        checkpoint.restore(aside, optimizer=True)
        yield "one message, checkpoints good where they went"


def second_training(folder: Path, times: int, moments: Moments) -> Iterator[str]:
    """Another training in the same folder; and the lock of one that was killed."""
    run = folder / "shared"
    for _ in range(times):
        with _training(run, *ENDLESS) as process:
            # Also where the one before was killed.
            _await_checkpoint(run, process)
            with _training(run, *ENDLESS) as second:
                status, said = _end(second)
            _require_message(status, said, "is being written by another process")
            _require(status == 2 and process.poll() is None, f"status {status}: {said}")
            process.kill()
        yield "the second refused, the first went on; its lock died with it"
    _require_bits_of_a_quiet_run(run, folder / "quiet", ENDLESS)


def not_finite(folder: Path, times: int, moments: Moments) -> Iterator[str]:
    """Learning rates that make losses or gradients infinite or not a number."""
    for i in range(times):
        run = folder / f"run{i}"
        rate, dtype = 10 ** moments.uniform(15, 38), ("float32", "bfloat16")[i % 2]
        overrides = (*SHORT, f"train.learning_rate={rate!r}", f'model.dtype="{dtype}"')
        try:
            train(_config(overrides), run)
        except Failure as failure:
            said = str(failure)
        else:
            raise Broken(f"a learning rate of {rate:.0e} went unnoticed")
        kept = checkpoint.restore(run)
        _require(f"step {kept.step} is kept" in said and "at step" in said, said)
        finite = all(np.isfinite(array).all() for array in kept.weights.values())
        _require(finite, f"the checkpoint of step {kept.step} is not finite")
        yield "stopped at the step, the last good checkpoint named"


def out_of_memory(folder: Path, times: int, moments: Moments) -> Iterator[str]:
    """More memory than there is."""
    for i in range(times):
        run = folder / f"run{i}"
        with _training(run, *SHORT) as process:
            _await_checkpoint(run, process)
            process.kill()
        # Another batch is another configuration, so that its run has a folder of its own.
        with _training(folder / f"big{i}", *SHORT[1:], f"train.batch={2 ** (30 + i % 3)}") as big:
            status, said = _end(big)
        _require_message(status, said, "out of memory")
        yield "one message with what to try"


def pickled_code(folder: Path, times: int, moments: Moments) -> Iterator[str]:
    """PyTorch checkpoints that would run a program when they are unpickled."""
    try:
        import torch
    except ImportError:
        raise NotTried("PyTorch is not installed") from None
    ran = folder / "ran"
    calls = [
        _Call(os.system, f"touch {ran}"),
        _Call(eval, f"open({str(ran)!r}, 'w')"),
        _Call(exec, f"open({str(ran)!r}, 'w')"),
        _Call(subprocess.call, ["touch", str(ran)]),
        _Call(Path.touch, ran),
    ]
    for i in range(times):
        path, call = folder / f"hostile{i}.pt", calls[i % len(calls)]
        contents = [call, {"model": {"w": call}, "model_args": {}}, {"model": {}, "x": [call]}]
        content = contents[moments.randrange(3)]
        if i % 3 == 2:
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=i % 3 == 0)
        try:
            read_original(path)
        except InputError as error:
            _require("\n" not in str(error), f"more than a line: {error}")
        else:
            raise Broken(f"{call.function.__name__} was taken")
        _require(not ran.exists(), f"{call.function.__name__} was run")
        yield "refused, nothing run"


def lost_process(folder: Path, times: int, moments: Moments) -> Iterator[str]:
    """One of two processes that train together is killed; later both go on together."""
    run = folder / "two"
    for i in range(times):
        with contextlib.ExitStack() as held:
            pair = [held.enter_context(each) for each in _together(run)]
            _await_checkpoint(run, *pair)
            time.sleep(moments.uniform(0, 0.5))
            pair[i % 2].kill()
            status, said = _end(pair[1 - i % 2])
        # Our words where what they do together fails. Where one waits for a connection, JAX ends it
        # by SIGABRT when the other's heartbeats have been missing for long.
        by_jax = "This most likely indicates that another task died" in said
        if status == -signal.SIGABRT and by_jax:
            yield "the other ended by JAX and with its words; both went on together"
            continue
        _require_message(status, said, "another process is gone")
        yield "the other ended with one message; both went on together"
    with contextlib.ExitStack() as held:
        pair = [held.enter_context(each) for each in _together(run)]
        _await_checkpoint(run, *pair)
        pair[1].send_signal(signal.SIGTERM)
        for process in pair:
            status, said = _end(process)
            _require(status == 128 + signal.SIGTERM, f"status {status}: {said}")
    last = checkpoint.restore(run, optimizer=True).step
    _require(last == loggers.read(run)[-1].step, "what is logged and what is kept differ")
    train(_config(ENDLESS), folder / "one", EVERY)
    first = [loggers.read(each)[0].loss for each in (run, folder / "one")]
    _require(np.allclose(*first, rtol=1e-6), f"the first losses are {first}")
    yield "a signal to one stopped both, with a checkpoint"


class Campaign(NamedTuple):
    """A fault, its name in the table, and how many times it is tried."""

    tries: Fault
    words: str
    times: int


CAMPAIGN = {
    "killed": Campaign(killed, "SIGKILL at a random moment", 50),
    "signals": Campaign(asked_to_stop, "SIGTERM, SIGINT or SIGHUP, once or twice", 12),
    "damage": Campaign(
        damaged, "one file of a checkpoint truncated, emptied, removed, flipped", 15
    ),
    "disk-full": Campaign(disk_full, "disk full at some point", 6),
    "read-only": Campaign(read_only, "read-only disk", 4),
    "vanished": Campaign(vanished, "run folder moved away", 4),
    "second": Campaign(second_training, "second training in a run folder, then a stale lock", 4),
    "not-finite": Campaign(not_finite, "loss or gradient not finite", 6),
    "memory": Campaign(out_of_memory, "out of memory", 2),
    "lost-process": Campaign(lost_process, "one of two processes killed", 4),
    "pickle": Campaign(pickled_code, "PyTorch checkpoint with code in it", 30),
}


def attempt(name: str, folder: Path, times: int | None = None) -> dict[str, Any]:
    """Tries a fault.

    Args:
      name: of `CAMPAIGN`.
      folder: an empty one, for what it needs.
      times: how many times; None for as many as the campaign has.

    Returns:
      JSON: the fault in words, how often it was tried, how often what became of it, the promise
      that was broken or null, why it was not tried or null, and seconds.
    """
    tries, words, most = CAMPAIGN[name]
    outcomes, broken, missing, started = Counter(), None, None, time.monotonic()
    try:
        with progress(name, unit="outcomes") as bar:
            for outcome in tries(folder, most if times is None else times, random.Random(SEED)):
                outcomes[outcome] += 1
                bar.advance()
    except Broken as error:
        broken = str(error)
    except NotTried as error:
        missing = str(error)
    return {
        "fault": words,
        "tried": outcomes.total() + (broken is not None),
        "outcomes": dict(outcomes),
        "broken": broken,
        "not_tried": missing,
        "seconds": round(time.monotonic() - started, 1),
    }


def table(found: Mapping[str, Any]) -> str:
    """What a campaign found, in Markdown."""

    def not_kept(each: Mapping[str, Any]) -> list[str]:
        broken = [f"**broken**: {each['broken']}"] if each["broken"] else []
        return broken + ([f"not tried: {each['not_tried']}"] if each["not_tried"] else [])

    return table_of("fault", (found[name] for name in CAMPAIGN if name in found), not_kept)


def main() -> None:
    carry_out(
        program="reliability.faults",
        description="Cause faults and see what becomes of them.",
        part="fault",
        key="fault",
        known=CAMPAIGN,
        seed=SEED,
        attempts=_attempts,
        table=table,
    )


def _attempts(names: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in names:
        console.print(f"{name} ...")
        with tempfile.TemporaryDirectory() as folder:
            yield name, attempt(name, Path(folder))


class _Call:
    """Pickled, it is a call of a function."""

    def __init__(self, function: Callable, argument: Any):
        self.function, self.argument = function, argument

    def __reduce__(self):
        return self.function, (self.argument,)


def _config(overrides: Sequence[str]) -> Config:
    return read_config(Path(CONFIG), overrides)


def _command(run: Path, *overrides: str) -> list[str]:
    words = ["-m", "spak_jax.train", CONFIG, *overrides, "--run", str(run)]
    return [sys.executable, *words]


@contextlib.contextmanager
def _training(
    run: Path, *words: str, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """A training in a process of its own, which ends here if not before."""
    # Under nohup this process ignores SIGHUP, and so would that one.
    heeding = ("env", f"--default-signal={','.join(map(_short_name, signals.HEEDED))}")
    with subprocess.Popen(
        [*heeding, *_command(run, *words)],
        env=None if environment is None else os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _short_name(number: signal.Signals) -> str:
    return number.name.removeprefix("SIG")


def _together(run: Path) -> list[contextlib.AbstractContextManager[subprocess.Popen]]:
    """Two processes that split the rows of each batch."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pair = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    words = (*ENDLESS, "parallel.data=2", "--distributed")
    return [_training(run, *words, environment=pair | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]


def _await_checkpoint(run: Path, *processes: subprocess.Popen) -> None:
    """Returns when there is one that was not there before."""
    before, until = run_folder.steps_in(run)[-1:], time.monotonic() + PATIENCE
    while (newest := run_folder.steps_in(run)[-1:]) == before or newest == [0]:
        for process in processes:
            if process.poll() is not None:
                raise Broken(f"a training ended by itself: {process.communicate()[0]}")
        _require(time.monotonic() < until, f"no checkpoint in {PATIENCE} s")
        time.sleep(0.01)


def _end(process: subprocess.Popen) -> tuple[int, str]:
    """The status of a process that ends by itself, and all that it said."""
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise Broken(f"it did not end within {PATIENCE} s") from None
    return process.returncode, said


def alone(script: str, *words: Any) -> list[str]:
    """The command of a script, up to its last words, that may mount file systems of its own."""
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    return [*alone, *map(str, words)]


def _alone(script: str, *words: Any) -> tuple[int, str]:
    """Runs a script where it may mount file systems that nobody else sees."""
    try:
        result = subprocess.run(
            alone(script, *words),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
    except FileNotFoundError:
        raise NotTried("there is no unshare(1)") from None
    if result.returncode == NO_NAMESPACE or "unshare failed" in result.stdout:
        raise NotTried("no file system may be mounted, even in a namespace of its own")
    return result.returncode, result.stdout


def _require(kept: bool, otherwise: str) -> None:
    if not kept:
        raise Broken(" ".join(otherwise.split())[-600:])


def _require_message(status: int, said: str, *words: str) -> None:
    """One message with these words and the status of a failure, no traceback."""
    good = status in (1, 2) and "error: " in said and "Traceback" not in said
    _require(good and all(word in said for word in words), f"status {status}: {said}")


def _require_same(run: Path, other: Path) -> None:
    a, b = (checkpoint.restore(each, optimizer=True) for each in (run, other))
    _require(a.step == b.step and _digests(a) == _digests(b), f"step {a.step}: other bits")


def _require_bits_of_a_quiet_run(run: Path, quiet: Path, overrides: Sequence[str]) -> None:
    """Both train to the same step from where they are."""
    last = (checkpoint.restore(run).step // EVERY + 5) * EVERY
    for each in (run, quiet):
        train(_config(overrides), each, last)
    _require_same(run, quiet)


def _digests(restored: stored_checkpoint.Restored) -> tuple[str, str]:
    return digest(restored.weights), digest(restored.optimizer)


def _half_written(run: Path) -> set[str]:
    """What Orbax writes aside before it is a checkpoint."""
    with contextlib.suppress(FileNotFoundError):
        names = os.listdir(run / run_folder.CHECKPOINTS)
        return {name for name in names if not name.isdecimal()}
    return set()


def _damages(content: bytes, flips: int, moments: Moments) -> Iterator[tuple[str, bytes | None]]:
    """What may become of a file, None for nothing."""
    yield "removed", None
    if content:
        yield "emptied", b""
        yield "cut at its end", content[:-1]
        yield "cut in its middle", content[: len(content) // 2]
    for _ in range(flips if content else 0):
        place, bit = moments.randrange(len(content)), 1 << moments.randrange(8)
        changed = bytes([content[place] ^ bit])
        yield f"byte {place} flipped", content[:place] + changed + content[place + 1 :]


def _blocks(path: Path) -> int:
    """Bytes that a file takes on a disk of ordinary blocks."""
    return 4096 * (1 + (path.stat().st_size if path.is_file() else 0) // 4096)


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":
    run_program(main)
