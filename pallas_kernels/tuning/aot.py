"""Compiles the kernels for GPUs that are not there, and finds what each takes of them.

Registers and spills come from NVIDIA's assembler, all else from what XLA writes out while it
compiles.
"""

import atexit
import concurrent.futures
import dataclasses
import functools
import importlib.util
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels.targets import TARGETS, compiling_for
from pallas_kernels.tuning import attention_case
from pallas_kernels.tuning.cases import ATTENTION, Case

# Bytes that a thread may store for want of registers, which hold 1,020 of them. A quarter of that
# is 32 KiB for four warps: two such blocks fit the 128 KiB that L1 and shared memory have together
# on the smallest target, beside their tiles. What is more goes out to L2, every time.
MOST_SPILLED = 256
# XLA writes out a kernel's code only where it is asked for since JAX 0.11. All else it could write
# of a kernel is hundreds of megabytes.
WRITTEN_OUT = {"xla_dump_emitter_re": "ptx"}
# The products of matrices on Hopper, on data-centre Blackwell, and on all other chips.
TENSOR_CORE_INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
# Each takes a core and some 400 MB.
MOST_WORKERS = 8

_LAUNCH = re.compile(r"\] (\w+) grid: .*shared_memory: (\d+) bytes")
_ENTRY = re.compile(r"\.entry (\w+)\(")
_PTX_TARGET = re.compile(r"^\.target (\w+)", re.MULTILINE)
_TOO_MUCH = re.compile(r"Shared memory size limit exceeded: requested (\d+)")


class Unavailable(RuntimeError):
    """What compiling for another GPU needs is not installed; the message says how to get it."""


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
    case: Case
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
            "extras": self.case.asked(),
            "registers": self.registers,
            "spilled_bytes": self.spilled,
            "shared_memory_bytes": self.shared_memory,
            "shared_memory_limit_bytes": TARGETS[self.target].shared_memory,
            "tensor_core_instructions": dict(self.tensor_cores),
            "compile_seconds": self.seconds and round(self.seconds, 2),
            "ok": self.problem is None,
            "problem": self.problem,
        }


def measure(
    targets: Sequence[str],
    cases: Sequence[Case],
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
    # Registers and spills are those of the code that a GPU would run in earnest.
    jax.config.update("jax_disable_most_optimizations", False)


def _reports(target: str, case: Case, assembler: str) -> list[Report]:
    try:
        return _compiled(target, case, assembler)
    except Exception as error:  # Tracing, Triton, LLVM and XLA fail in many ways: all are reported.
        message = str(error).strip() or repr(error)
    problem = message.splitlines()[0][:200]
    if case.operation == ATTENTION and case.kernel is None:
        # The message does not say which kernel failed: each one alone does.
        alone = [
            report
            for kernel in case.kernels(target)
            for report in _reports(target, attention_case.alone(case, target, kernel), assembler)
        ]
        if any(report.problem for report in alone):
            return alone
    asked = _TOO_MUCH.search(message)
    return [
        Report(target, kernel, case, shared_memory=asked and int(asked[1]), problem=problem)
        for kernel in case.kernels(target)
    ]


def _compiled(target: str, case: Case, assembler: str) -> list[Report]:
    function, arguments = case.program(target)
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
        for kernel in case.kernels(target):
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
