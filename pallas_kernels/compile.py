"""Compiles the kernels for GPUs that are not there and says what each takes of them:
`python -m pallas_kernels.compile [--target NAME,...] [--kernel NAME ... | --shape BxTxHxD ...]
[--json FILE]`.

Registers and spills come from NVIDIA's assembler, all else from what XLA writes out while it
compiles. Exit status 1 if a kernel does not compile, does not fit, spills too much or misses the
tensor cores; 2 if the command cannot be carried out.
"""

import argparse
import atexit
import concurrent.futures
import dataclasses
import datetime
import functools
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from pallas_kernels import dispatch, long, short, tiles
from pallas_kernels.looped_cases import LOOPED_CASES, LoopedCase
from pallas_kernels.programs import Table, console, progress, run_program
from pallas_kernels.shapes import (
    LONG,
    SCORING,
    TRAINING,
    WINDOWED_SCORING,
    WINDOWED_TRAINING,
    Shape,
    parse_shape,
)
from pallas_kernels.stream_cases import DROPOUT, STREAM_CASES, StreamCase
from pallas_kernels.targets import TARGETS, compiling_for
from pallas_kernels.tile import Extras, Options, table_dtype

# Bytes that a thread may store for want of registers, which hold 1,020 of them. A quarter of that
# is 32 KiB for four warps: two such blocks fit the 128 KiB that L1 and shared memory have together
# on the smallest target, beside their tiles. What is more goes out to L2, every time.
MOST_SPILLED = 256
CLIP = 15
# XLA writes out a kernel's code only where it is asked for since JAX 0.11. All else it could write
# of a kernel is hundreds of megabytes.
WRITTEN_OUT = {"xla_dump_emitter_re": "ptx"}
# The products of matrices on Hopper, on data-centre Blackwell, and on all other chips.
TENSOR_CORE_INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
# Each takes a core and some 400 MB.
MOST_WORKERS = 8

ALL_KERNELS = (
    *tiles.KERNELS,
    tiles.LOOPED,
    *dict.fromkeys(name for case in STREAM_CASES for name in case.kernels),
)

_LAUNCH = re.compile(r"\] (\w+) grid: .*shared_memory: (\d+) bytes")
_ENTRY = re.compile(r"\.entry (\w+)\(")
_PTX_TARGET = re.compile(r"^\.target (\w+)", re.MULTILINE)
_TOO_MUCH = re.compile(r"Shared memory size limit exceeded: requested (\d+)")


class Unavailable(RuntimeError):
    """What compiling for another GPU needs is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Case:
    """What is compiled: attention as `dispatch` runs it, or one kernel with settings of its own.

    shape: of q, k, v. dtype: its name. rope: whether q and k are turned. rate: of dropout. clip: of
    the ids of a bias table and a window, None for neither. backward: whether with gradients;
    nothing where `kernel` is given. kernel: one of `tiles.KERNELS`, or None for what `dispatch`
    takes. settings: of that kernel, as `tiles.settings` gives them.
    """

    shape: Shape
    dtype: str = "bfloat16"
    rope: bool = True
    rate: float = 0.0
    clip: int | None = None
    backward: bool = True
    kernel: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    multiplies = True

    @property
    def item_size(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    def extras(self) -> str:
        """What comes beside q, k and v, in words."""
        used = {
            "RoPE": self.rope,
            f"dropout {self.rate:g}": self.rate,
            "ids, bias, window": self.clip is not None,
        }
        return ", ".join(name for name, value in used.items() if value)


AnyCase = Case | StreamCase | LoopedCase


@dataclass(frozen=True)
class Report:
    """What one kernel takes on one target.

    registers: of a thread. spilled: bytes that a thread stores for want of registers.
    shared_memory: bytes of a block. tensor_cores: how often each instruction for products of
    matrices stands in the code. seconds: to compile the program that the kernel is part of.
    problem: None if all is well. Where it does not compile, all that is unknown is None.
    """

    target: str
    kernel: str
    case: AnyCase
    registers: int | None = None
    spilled: int | None = None
    shared_memory: int | None = None
    tensor_cores: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None
    problem: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "kernel": self.kernel,
            "shape": str(self.case.shape),
            "dtype": self.case.dtype,
            "extras": self.case.extras(),
            "registers": self.registers,
            "spilled_bytes": self.spilled,
            "shared_memory_bytes": self.shared_memory,
            "shared_memory_limit_bytes": TARGETS[self.target].shared_memory,
            "tensor_core_instructions": dict(self.tensor_cores),
            "compile_seconds": self.seconds and round(self.seconds, 2),
            "ok": self.problem is None,
            "problem": self.problem,
        }


def standard_cases() -> list[AnyCase]:
    """All shapes of `shapes`: training with dropout, scoring forward only, long rows both without
    and with everything a call can ask for, rows with a window over ids; `STREAM_CASES` and
    `LOOPED_CASES`. Of shapes that differ in batch and heads alone, the first."""
    training = [Case(shape, rate=DROPOUT) for shape in TRAINING]
    scoring = [Case(shape, backward=False) for shape in SCORING]
    everything = [Case(shape, rate=DROPOUT, clip=CLIP) for shape in LONG]
    windowed = [
        Case(shape, rope=False, clip=1, backward=shape in WINDOWED_TRAINING)
        for shape in WINDOWED_TRAINING + WINDOWED_SCORING
    ]
    cases = [*training, *scoring, *map(Case, LONG), *everything, *windowed]
    return _distinct(cases) + STREAM_CASES + LOOPED_CASES


def _distinct(cases: Iterable[Case]) -> list[Case]:
    first = {}
    for case in cases:
        compiled = dataclasses.replace(case, shape=case.shape._replace(batch=1, heads=1))
        first.setdefault(repr(compiled), case)
    return list(first.values())


def program(case: AnyCase, target: str) -> tuple[Callable, tuple]:
    """A function to compile, and its arguments as `jax.ShapeDtypeStruct`s.

    Those of attention are q, k, v, extras, log-sum-exp, delta and the output's gradient.
    """
    if not isinstance(case, Case):
        return case.program(target)
    batch, length, heads, head_dim = case.shape
    options = Options(
        length=length,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        causal=True,
        rate=case.rate,
        clip=case.clip,
        windowed=case.clip is not None,
        target=target,
        interpret=False,
    )
    array = jax.ShapeDtypeStruct
    given = {}
    if case.rope:
        tables = array((1, length, head_dim // 2), table_dtype(case.dtype))
        given |= {"cos": tables, "sin": tables}
    if case.clip is not None:
        given["ids"] = array((batch, length), jnp.int32)
        given["bias"] = array((heads, 2 * case.clip + 2), jnp.float32)
    if case.rate:
        given["seed"] = array((2,), jnp.uint32)
    q = array(tuple(case.shape), case.dtype)
    scalars = array((batch, heads, length), jnp.float32)
    function = _whole(case, options) if case.kernel is None else _one_kernel(case, options)
    return function, (q, q, q, Extras(**given), scalars, scalars, q)


def _whole(case: Case, options: Options) -> Callable:
    def forward(q, k, v, extras, *_):
        given = (q, k, v), extras.bias
        return dispatch.run_kernels(given, extras._replace(bias=None), options)

    def both(q, k, v, extras, lse, delta, d_out):
        def attend(q, k, v, bias):
            return dispatch.run_kernels(((q, k, v), bias), extras._replace(bias=None), options)

        out, gradients = jax.vjp(attend, q, k, v, extras.bias)
        return out, gradients(d_out)

    return both if case.backward else forward


def _one_kernel(case: Case, options: Options) -> Callable:
    def run(q, k, v, extras, lse, delta, d_out):
        if case.kernel == "short_forward":
            return short.forward((q, k, v), extras, options, **case.settings)
        if case.kernel == "short_backward":
            return short.backward((q, k, v), extras, lse, d_out, options, **case.settings)
        cut = long.Tile(**case.settings)
        if case.kernel == "long_forward":
            return long.forward(q, k, v, extras, options, cut)
        kernel = long.d_q_and_bias if case.kernel == "long_d_q" else long.d_kv
        return kernel(q, k, v, extras, lse, delta, d_out, options, cut)

    return run


def measure(
    targets: Sequence[str],
    cases: Sequence[AnyCase],
    done: Callable[[list[Report]], None] = lambda reports: None,
) -> list[Report]:
    """Compiles all cases for all targets, several at a time, in processes that touch no GPU.

    Args:
      targets: names in `TARGETS`.
      cases: what to compile.
      done: is given the reports of each case and target as soon as there are any.

    Returns:
      The reports of all kernels, by target and case in the order given.

    Raises:
      Unavailable: the GPU plugin of JAX or NVIDIA's assembler is missing.
    """
    check_plugin()
    assembler = find_assembler()
    pool = _workers()
    jobs = [(target, case) for target in targets for case in cases]
    futures = [pool.submit(_reports, *job, assembler) for job in jobs]
    try:
        for future in concurrent.futures.as_completed(futures):
            done(future.result())
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return [report for future in futures for report in future.result()]


@functools.cache
def _workers() -> concurrent.futures.Executor:
    """Processes that compile, for all calls: each takes seconds to import JAX, and starts when
    there is work for it. New ones, not forks: JAX has threads, and may have a GPU, in this one."""
    pool = concurrent.futures.ProcessPoolExecutor(
        min(os.cpu_count() or 1, MOST_WORKERS),
        multiprocessing.get_context("spawn"),
        _prepare_worker,
    )
    # Left to the end of the interpreter, Python 3.11 complains of what is gone before it.
    atexit.register(pool.shutdown)
    return pool


def check_plugin() -> None:
    """Raises `Unavailable` where JAX's plugin for NVIDIA GPUs is not installed."""
    try:
        found = importlib.util.find_spec("jax_plugins.xla_cuda13")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise Unavailable(
            "JAX's plugin for NVIDIA GPUs is not installed: pip install 'spak-jax[aot]'"
        )


def touch_no_gpu() -> None:
    """Before JAX is used: a GPU at hand would be taken for the target, and JAX's plugin without one
    would not start."""
    jax.config.update("jax_platforms", "cpu")


def find_assembler() -> str:
    """Path of ptxas: of the package nvidia-cuda-nvcc, or else the one on PATH.

    Raises:
      Unavailable: there is none.
    """
    package = importlib.util.find_spec("nvidia")
    folders = package.submodule_search_locations if package else []
    packaged = [path for folder in folders for path in Path(folder).glob("*/bin/ptxas")]
    found = str(min(packaged)) if packaged else shutil.which("ptxas")
    if found is None:
        raise Unavailable(
            "ptxas is neither on PATH nor in the package nvidia-cuda-nvcc:"
            " pip install 'spak-jax[aot]', or install the CUDA toolkit"
        )
    return found


def _prepare_worker() -> None:
    # An interrupt ends the process that started this one, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    touch_no_gpu()
    # A program found in a cache is not written out.
    jax.config.update("jax_enable_compilation_cache", False)


def _reports(target: str, case: AnyCase, assembler: str) -> list[Report]:
    try:
        return _compiled(target, case, assembler)
    except Exception as error:  # Tracing, Triton, LLVM and XLA fail in many ways: all are reported.
        message = str(error).strip() or repr(error)
    problem = message.splitlines()[0][:200]
    if isinstance(case, Case) and case.kernel is None:
        # The message does not say which kernel failed: each one alone does.
        alone = [
            report
            for kernel in kernels_of(target, case)
            for report in _reports(target, _alone(target, case, kernel), assembler)
        ]
        if any(report.problem for report in alone):
            return alone
    asked = _TOO_MUCH.search(message)
    return [
        Report(target, kernel, case, shared_memory=asked and int(asked[1]), problem=problem)
        for kernel in kernels_of(target, case)
    ]


def kernels_of(target: str, case: AnyCase) -> tuple[str, ...]:
    """Names of the kernels of a case; the first is the forward pass."""
    if not isinstance(case, Case):
        return case.kernels
    if case.kernel is not None:
        return (case.kernel,)
    whole_row = tiles.whole_row(
        target,
        "short_forward",
        case.shape.length,
        case.shape.head_dim,
        case.item_size,
        biased=case.clip is not None,
    )
    kernels = tiles.SHORT_KERNELS if whole_row else tiles.LONG_KERNELS
    return kernels if case.backward else kernels[:1]


def _alone(target: str, case: Case, kernel: str) -> Case:
    """One kernel of attention, with the settings that it has there."""
    return dataclasses.replace(case, kernel=kernel, settings=settings_of(target, case, kernel))


def settings_of(target: str, case: Case, kernel: str) -> dict[str, Any]:
    """Arguments that launch one kernel of attention on a target; empty where there are none."""
    return tiles.settings(target, kernel, tile_key(target, case, kernel)) or {}


def tile_key(target: str, case: Case, kernel: str) -> str:
    """Key of the table's line for one kernel of attention."""
    sizes = case.shape.head_dim, case.item_size
    if kernel in tiles.LONG_KERNELS:
        return tiles.streamed_key(target, kernel, *sizes, with_ids=case.clip is not None)
    return tiles.key(kernel, case.shape.length, *sizes)


def _compiled(target: str, case: AnyCase, assembler: str) -> list[Report]:
    function, arguments = program(case, target)
    arguments = placed(arguments, target)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with compiling_for(target):
            lowered = jax.jit(function).lower(*arguments)
        lowered.compile(compiler_options=WRITTEN_OUT | {"xla_dump_to": folder})
        seconds = time.perf_counter() - start
        shared_memory = dict(_launches(Path(folder)))
        code = dict(_entries(Path(folder)))
        reports = []
        for kernel in kernels_of(target, case):
            if kernel not in code or kernel not in shared_memory:
                raise RuntimeError(f"XLA did not write out the code and the launch of {kernel}")
            registers, spilled = _assembled(code[kernel], assembler)
            report = Report(
                target,
                kernel,
                case,
                registers=registers,
                spilled=spilled,
                shared_memory=shared_memory[kernel],
                tensor_cores=_tensor_cores(code[kernel].read_text()),
                seconds=seconds,
            )
            reports.append(dataclasses.replace(report, problem=_problem(report)))
        return reports


def placed(arguments: Any, target: str) -> Any:
    """A pytree of shapes, on the one GPU of a machine that is not there."""
    whole = _sharding(target)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments)


@functools.cache
def _sharding(target: str) -> jax.sharding.Sharding:
    """Whole arrays on the one GPU of a machine that is not there."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGETS[target].description(), topology="1x1x1"
    )
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("gpu",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _launches(folder: Path) -> Iterator[tuple[str, int]]:
    """Names of kernels and the shared memory that XLA launches them with, in bytes."""
    for path in folder.glob("*thunk_sequence*.txt"):
        for name, size in _LAUNCH.findall(path.read_text()):
            yield name, int(size)


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names of kernels and the files that hold their PTX."""
    for path in folder.glob("*.ptx"):
        for name in _ENTRY.findall(path.read_text()):
            yield name, path


def _assembled(path: Path, assembler: str) -> tuple[int, int]:
    """Registers of a thread and bytes that it spills."""
    architecture = _PTX_TARGET.search(path.read_text())[1]
    result = subprocess.run(
        [assembler, "-v", f"-arch={architecture}", path, "-o", os.devnull],
        capture_output=True,
        text=True,
    )
    said = result.stdout + result.stderr
    if result.returncode:
        raise RuntimeError(f"ptxas: {said.strip()}")
    registers = re.search(r"Used (\d+) registers", said)
    return int(registers[1]), int(re.search(r"(\d+) bytes spill stores", said)[1])


def _tensor_cores(ptx: str) -> dict[str, int]:
    counts = {name: ptx.count(f"{name}.") for name in TENSOR_CORE_INSTRUCTIONS}
    return {name: count for name, count in counts.items() if count}


def _problem(report: Report) -> str | None:
    """What is wrong with a kernel that compiles; None if nothing is."""
    limit = TARGETS[report.target].shared_memory
    if report.shared_memory > limit:
        return f"takes {report.shared_memory} B of shared memory, more than {limit}"
    if report.spilled > MOST_SPILLED:
        return f"spills {report.spilled} B a thread, more than {MOST_SPILLED}"
    if not report.tensor_cores and report.case.dtype != "float32" and report.case.multiplies:
        return "multiplies matrices without tensor cores"
    return None


def table(reports: Iterable[Report], **style) -> Table:
    """The reports as a table, a row a kernel; the style is rich's."""
    drawn = Table("target", "kernel", "shape", "extras", **style)
    for name in ("registers", "spilled B", "shared B / limit"):
        drawn.add_column(name, justify="right")
    drawn.add_column("tensor cores")
    drawn.add_column("seconds", justify="right")
    drawn.add_column("result")
    for report in reports:
        limit = TARGETS[report.target].shared_memory
        instructions = [f"{count} {name}" for name, count in report.tensor_cores.items()]
        drawn.add_row(
            report.target,
            report.kernel,
            str(report.case.shape),
            report.case.extras(),
            _shown(report.registers),
            _shown(report.spilled),
            f"{_shown(report.shared_memory)} / {limit}",
            ", ".join(instructions) or "-",
            "-" if report.seconds is None else f"{report.seconds:.1f}",
            report.problem or "ok",
        )
    return drawn


def _shown(value: int | None) -> str:
    return "-" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.compile", description=__doc__)
    parser.add_argument(
        "--target",
        type=parse_targets,
        default=tuple(TARGETS),
        metavar="NAME,...",
        help=f"of {', '.join(TARGETS)}; all unless given",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--kernel",
        choices=ALL_KERNELS,
        action="append",
        metavar="NAME",
        help=f"this one alone, of {', '.join(ALL_KERNELS)}; repeatable",
    )
    chosen.add_argument(
        "--shape",
        type=parse_shape,
        action="append",
        metavar="BxTxHxD",
        help="instead of the standard ones: with RoPE and dropout, both directions; repeatable",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the reports")
    arguments = parser.parse_args()
    cases = standard_cases()
    if arguments.kernel:
        cases = [
            case
            for case in cases
            if any(
                name in arguments.kernel
                for target in arguments.target
                for name in kernels_of(target, case)
            )
        ]
    if arguments.shape:
        cases = _distinct(Case(shape, rate=DROPOUT) for shape in arguments.shape)
        for case in cases:
            _check_heads(parser, case, arguments.target)
    if arguments.json:
        # Told now, not after minutes of compiling.
        _save(parser, arguments.json, mode="a")
    try:
        reports = _measure_visibly(arguments.target, cases)
    except Unavailable as error:
        parser.error(str(error))
    if arguments.json:
        _save(parser, arguments.json, json.dumps(_as_json(reports), indent=1) + "\n")
    console.print(table(reports) if console.is_terminal else table(reports, box=None))
    console.print(
        "Batch and heads make no other kernel: of shapes that differ in them alone, one is shown."
        " Seconds are of the program that a kernel is part of."
    )
    failed = sum(report.problem is not None for report in reports)
    console.print(f"{len(reports)} kernels, {failed} with a problem")
    raise SystemExit(1 if failed else 0)


def _measure_visibly(targets: Sequence[str], cases: Sequence[Case]) -> list[Report]:
    """`measure` within `progress`; a problem is said when it is found."""
    with progress("compiling", len(targets) * len(cases), unit="programs") as told:

        def done(reports: list[Report]) -> None:
            first = reports[0]
            what = f"{first.target} {first.case.shape} {', '.join(r.kernel for r in reports)}"
            if problems := "; ".join(r.problem for r in reports if r.problem):
                console.print(f"{what}: {problems}")
            told.advance(status=what)

        return measure(targets, cases, done)


def _save(parser: argparse.ArgumentParser, path: Path, text: str = "", mode: str = "w") -> None:
    try:
        with path.open(mode) as file:
            file.write(text)
    except OSError as error:
        parser.error(f"--json {path}: cannot be written ({error.strerror})")


def _as_json(reports: Iterable[Report]) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "kernels": [report.as_json() for report in reports],
    }


def parse_targets(text: str) -> tuple[str, ...]:
    """`rtx5070,b200` as names of targets, for a command line.

    Raises:
      argparse.ArgumentTypeError: one is not in `TARGETS`.
    """
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in TARGETS:
            raise argparse.ArgumentTypeError(f"{name!r}: must be of {', '.join(TARGETS)}")
    return names


def _check_heads(parser: argparse.ArgumentParser, case: Case, targets: Iterable[str]) -> None:
    head_dim = case.shape.head_dim
    key = tiles.head_key(head_dim, case.item_size)
    if head_dim % 2:
        parser.error(f"--shape {case.shape}: head_dim {head_dim} must be even")
    for target in targets:
        if tiles.settings(target, "long_forward", key) is None:
            parser.error(
                f"--shape {case.shape}: head_dim {head_dim} is too large,"
                f" {tiles.FILE.name} has no tiles for it on {target}"
            )


if __name__ == "__main__":
    run_program(main)
